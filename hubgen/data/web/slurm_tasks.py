"""What Slurm's jobs run, by datatrove: each task does its share of the shards, and writes how each went.

A job's folder, in that of the shards:

    .slurm/name             what Slurm calls the job
    .slurm/stage            the stage, pickled
    .slurm/tasks/00003      the works of a task, pickled
    .slurm/results/00012    what went wrong with a shard, nothing for a shard that was done
    .slurm/log/             datatrove's: its script, its record of each task, and what Slurm's jobs printed
"""

import pickle
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datatrove.executor.slurm import SlurmPipelineExecutor

from hubgen.data.web.attempts import attempt, prepared
from hubgen.data.web.engine_slurm import JOB, RESULTS
from hubgen.data.web.shards import shard_name
from hubgen.data.web.stages import Stage, Work
from hubgen.formats.atomic import written

TASKS, STAGE = "tasks", "stage"


@dataclass(frozen=True)
class Share:
    """A step of datatrove's pipelines: the shards of one task.

    Args:
        folder: Of the shards; all machines see it by this path.
    """

    folder: Path

    def __call__(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Does a task's shards; what goes wrong is written, not raised."""
        job = self.folder / JOB
        works: list[Work] = pickle.loads((job / TASKS / shard_name(rank)).read_bytes())
        stage = prepared(pickle.loads((job / STAGE).read_bytes()))
        try:
            for work in works:
                result = attempt(stage, work, self.folder)
                with written(job / RESULTS / work.name) as temporary:
                    temporary.write_text(result.problem or "", encoding="utf-8")
        finally:
            stage.close()


def write_tasks(stage: Stage, works: Sequence[Work], folder: Path, tasks: int) -> None:
    """Writes what tasks read: the stage, and to each task every `tasks`-th piece of work."""
    job = folder / JOB
    for name in (TASKS, RESULTS):
        (job / name).mkdir(parents=True)
    (job / STAGE).write_bytes(pickle.dumps(stage))
    for task in range(tasks):
        (job / TASKS / shard_name(task)).write_bytes(pickle.dumps(list(works[task::tasks])))


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
