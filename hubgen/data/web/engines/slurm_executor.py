"""datatrove's executor for Slurm, as `slurm` needs it. Jobs load it from a pickle, so it stands in a module."""

import shlex
import sys
from typing import Any

from datatrove.executor.slurm import SlurmPipelineExecutor


class Executor(SlurmPipelineExecutor):
    """datatrove's, whose jobs run the Python that submits them; without a last job that adds up times."""

    def get_sbatch_args(self, max_array: int = 1) -> dict[str, Any]:
        """Without a partition, Slurm takes its own."""
        return {name: value for name, value in super().get_sbatch_args(max_array).items() if value is not None}

    def get_launch_file_contents(self, sbatch_args: dict[str, Any], run_script: str) -> str:
        """datatrove's script would look for a program on the path of the job."""
        python, task = shlex.quote(sys.executable), self.logging_dir.resolve_paths("executor.pik")
        run = f"{python} -m datatrove.tools.launch_pickled_pipeline {shlex.quote(task)}"
        return super().get_launch_file_contents(sbatch_args, run)

    def launch_merge_stats(self) -> None:
        """Our results are files of each shard."""
