"""The loop over shards. Work, commit and resumption are one shard's (`stages`), so an engine cannot change results.

    report = run(stage, works, folder, workers=4)
    report = run(stage, works, folder, engine=OnSlurm(partition="gpu", gpus=1), workers=16)
    report.failed       # {"00007": "why"}: the others are done

`local` is a loop in this process, or with several workers a pool of fresh ones; `ray` is Ray Data's pool of actors;
`slurm` submits an array of jobs by datatrove's executor and waits for them. `ENGINES` names all there are.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from tqdm.auto import tqdm

from hubgen.data.web.engines.attempts import Engine
from hubgen.data.web.engines.local import Local
from hubgen.data.web.engines.ray import OnRay
from hubgen.data.web.engines.slurm import OnSlurm, refuse_if_jobs_run
from hubgen.data.web.stages import Stage, Work, alone_in, to_do

ENGINES: dict[str, Callable[..., Engine]] = {"local": Local, "ray": OnRay, "slurm": OnSlurm}


@dataclass
class Report:
    """What a run did."""

    done: list[str] = field(default_factory=list)
    """Names of the shards that were made"""
    there: int = 0
    """Shards that were made before"""
    failed: dict[str, str] = field(default_factory=dict)
    """Name of a shard to what went wrong, in one line"""


def run(
    stage: Stage,
    works: Sequence[Work],
    folder: Path,
    *,
    engine: str | Engine = "local",
    workers: int = 1,
    show_progress: bool = False,
) -> Report:
    """Does a stage to all shards that it was not done to yet; one that fails does not stop the others.

    Args:
        stage: What to do.
        works: The shards' input.
        folder: Of the shards; made if there is none.
        engine: A name in `ENGINES`, or one of them with options.
        workers: Shards that are at work at a time, each in a process of its own.
        show_progress: Whether a progress bar counts rows, or what else the stage's works are made of.

    Raises:
        ValueError: There is no such engine, or what it needs is not there.
        DataError: The folder holds something else, or another run writes to it.
    """
    if isinstance(engine, str):
        if engine not in ENGINES:
            raise ValueError(f"`engine`: got {engine!r}, expected {', '.join(ENGINES)}.")
        engine = ENGINES[engine]()
    refuse_if_jobs_run(folder)
    with alone_in(folder):
        pending = to_do(stage, works, folder)
        report = Report(there=len(works) - len(pending))
        with (
            tqdm(
                total=sum(map(size_of, works)),
                initial=sum(map(size_of, works)) - sum(map(size_of, pending)),
                desc=stage.name,
                unit=f" {stage.unit}",
                disable=not show_progress,
            ) as progress,
            closing(engine(stage, pending, folder, workers)) as results,
        ):
            for result in results:
                if result.problem is None:
                    report.done.append(result.work.name)
                else:
                    report.failed[result.work.name] = result.problem
                progress.update(size_of(result.work))
    report.done.sort()
    return report


def size_of(work: Work) -> int:
    """Rows of a piece of work."""
    return work.stop - work.start
