"""What Slurm's jobs do: each task does its share of the shards, and writes how each went.

A job's folder, in that of the shards:

    .slurm/name             what Slurm calls the job
    .slurm/stage            the stage, pickled
    .slurm/tasks/00003      the works of a task, pickled
    .slurm/results/00012    what went wrong with a shard, nothing for a shard that was done
    .slurm/log/             of `slurm_executor`: the script, a record of each task, and what the jobs printed
"""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubgen.data.web.engines.attempts import attempt, prepared
from hubgen.data.web.shards import shard_name
from hubgen.data.web.stages import Stage, Work
from hubgen.formats.atomic import written

JOB = ".slurm"
NAME, STAGE, TASKS, RESULTS, LOG = "name", "stage", "tasks", "results", "log"


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
