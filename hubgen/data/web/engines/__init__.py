"""What runs a stage over shards: a loop, processes of this machine, Ray, or jobs of Slurm.

engine          `run`, which all commands call, and the names of the engines
attempts        a stage done to a shard, whatever goes wrong with it; what an engine gives back
local, ray, slurm
slurm_tasks     what a job of Slurm does; slurm_executor: datatrove's part
"""
