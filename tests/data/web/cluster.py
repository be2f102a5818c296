"""A Slurm of one machine for tests: `sbatch`, `squeue`, `scancel`, `scontrol` that really run an array's tasks.

It knows what hubgen asks of Slurm and no more: an array with a limit of tasks at a time, a name, a file of the output.
"""

import os
from pathlib import Path

PROGRAMS = {
    "sbatch": r"""
for word; do case $word in --export=ALL,*) export "${word#--export=ALL,}";; esac; done
script=$CLUSTER/script-$$ && cp "${@: -1}" "$script"
value() { sed -n "s/^#SBATCH --$1=//p" "$script"; }
array=$(value array) name=$(value job-name) output=$(value output)
last=${array#0-} at_a_time=${array#*%}
output=${output//%A/$$}
export SLURM_JOB_ID=$$ SLURM_NODELIST=here
setsid bash -c "
    echo \$\$ > '$CLUSTER/running-$name'
    seq 0 ${last%\%*} | xargs -P $at_a_time -I@ bash -c '
        SLURM_ARRAY_TASK_ID=@ bash $script > ${output//%a/@} 2>&1 || true'
    rm '$CLUSTER/running-$name'
" < /dev/null > /dev/null 2>&1 &
while [ ! -s "$CLUSTER/running-$name" ]; do sleep 0.02; done
echo "Submitted batch job $$"
""",
    "squeue": r"""
for word; do case $word in --name=*) name=${word#--name=};; esac; done
if [ -e "$CLUSTER/running-$name" ]; then echo "$name"; fi
""",
    "scancel": r"""
name=${1#--name=}
if [ -e "$CLUSTER/running-$name" ]; then kill -9 -- -$(cat "$CLUSTER/running-$name"); rm "$CLUSTER/running-$name"; fi
""",
    "scontrol": "echo here\n",
}


def settings(folder: Path, root: Path) -> dict[str, str]:
    """Writes the programs; the environment in which they are found, and our tests' stages by the tasks."""
    folder.mkdir()
    for name, text in PROGRAMS.items():
        path = folder / name
        path.write_text(f"#!/bin/bash\n{text.lstrip()}")
        path.chmod(0o755)
    return {"CLUSTER": str(folder), "PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(root)}
