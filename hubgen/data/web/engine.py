"""The loop over shards. Work, commit and resumption are one shard's (`stages`), so an engine cannot change results.

    report = run(stage, works, folder, workers=4)
    report.failed       # {"00007": "why"}: the others are done

`local` is a loop in this process, or with several workers a pool of fresh ones; `ray` is Ray Data's pool of actors.
`ENGINES` names all there are. An engine gives back a `Result` for each piece of work; `attempt` is what its processes
call.
"""

import logging
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, TypeAlias

from tqdm.auto import tqdm

from hubgen.data.web.stages import Stage, Work, alone_in, run_shard, to_do
from hubgen.errors import one_line


@dataclass
class Report:
    """What a run did."""

    done: list[str] = field(default_factory=list)
    """Names of the shards that were made"""
    there: int = 0
    """Shards that were made before"""
    failed: dict[str, str] = field(default_factory=dict)
    """Name of a shard to what went wrong, in one line"""


@dataclass(frozen=True)
class Result:
    """Of one shard."""

    work: Work
    problem: str | None
    stats: dict[str, Any] | None = None


Engine: TypeAlias = Callable[[Stage, Sequence[Work], Path, int], Iterator[Result]]


def run(
    stage: Stage,
    works: Sequence[Work],
    folder: Path,
    *,
    engine: str = "local",
    workers: int = 1,
    show_progress: bool = False,
) -> Report:
    """Does a stage to all shards that it was not done to yet; one that fails does not stop the others.

    Args:
        stage: What to do.
        works: The shards' input.
        folder: Of the shards; made if there is none.
        engine: A name in `ENGINES`.
        workers: Processes.
        show_progress: Whether a progress bar counts rows.

    Raises:
        ValueError: There is no such engine.
        DataError: The folder holds something else, or another run writes to it.
    """
    if engine not in ENGINES:
        raise ValueError(f"`engine`: got {engine!r}, expected {' or '.join(ENGINES)}.")
    with alone_in(folder):
        pending = to_do(stage, works, folder)
        report = Report(there=len(works) - len(pending))
        with tqdm(
            total=sum(work.stop - work.start for work in works),
            initial=sum(work.stop - work.start for work in works) - sum(work.stop - work.start for work in pending),
            desc=stage.name,
            unit=" rows",
            disable=not show_progress,
        ) as progress:
            for result in ENGINES[engine](stage, pending, folder, workers):
                if result.problem is None:
                    report.done.append(result.work.name)
                else:
                    report.failed[result.work.name] = result.problem
                progress.update(result.work.stop - result.work.start)
    report.done.sort()
    return report


def attempt(stage: Stage, work: Work, folder: Path) -> Result:
    """Does a stage to a shard; what goes wrong is told, not raised."""
    try:
        return Result(work, None, run_shard(stage, work, folder))
    except Exception as error:  # of one shard, whose turn it is to be told: the others go on
        if os.environ.get("HUBGEN_DEBUG") == "1":
            traceback.print_exc()
        return Result(work, f"{type(error).__name__}: {one_line(error)}")


@dataclass(frozen=True)
class Unprepared(Stage):
    """In the place of a stage whose `setup` went wrong: each shard is told why."""

    problem: str
    name = "unprepared"

    def __call__(self, work: Work, folder: Path) -> dict[str, Any]:
        raise ValueError(self.problem)


def prepared(stage: Stage) -> Stage:
    """The stage, set up; where that goes wrong, one that tells it for each shard, so that no pool breaks over it."""
    try:
        stage.setup()
    except Exception as error:
        return Unprepared(f"cannot be set up: {type(error).__name__}: {one_line(error)}")
    return stage


def local(stage: Stage, works: Sequence[Work], folder: Path, workers: int) -> Iterator[Result]:
    """In this process, or in a pool of fresh ones."""
    if not works:
        return
    if workers > 1:
        yield from _pool(stage, works, folder, min(workers, len(works)))
        return
    stage.setup()
    try:
        for work in works:
            yield attempt(stage, work, folder)
    finally:
        stage.close()


def _pool(stage: Stage, works: Sequence[Work], folder: Path, workers: int) -> Iterator[Result]:
    """A worker that dies takes its pool with it; the shards that were at work then are tried once more, one by one."""
    suspects: list[tuple[Work, str]] = []
    yield from _pools(stage, works, folder, workers, suspects)
    guilty: list[tuple[Work, str]] = []
    yield from _pools(stage, [work for work, _ in suspects], folder, 1, guilty)
    for work, problem in guilty:
        yield Result(work, f"its process ended: {problem}")


def _pools(
    stage: Stage, works: Sequence[Work], folder: Path, workers: int, suspects: list[tuple[Work, str]]
) -> Iterator[Result]:
    """One pool after the other until no work is left; what was at work when one died is added to `suspects`."""
    waiting = list(works)
    while waiting:
        running: dict[Future[Result], Work] = {}
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin, (stage,)) as pool:
            try:
                while waiting or running:
                    while waiting and len(running) < workers:  # no more than are at work
                        running[pool.submit(_attempt, waiting[0], folder)] = waiting[0]
                        waiting.pop(0)
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        result = future.result()
                        del running[future]
                        yield result
            except BrokenProcessPool as death:
                for future, work in running.items():
                    if future.exception() is None:
                        yield future.result()
                    elif stage.is_done(work, folder):
                        yield Result(work, None)
                    else:
                        suspects.append((work, one_line(death)))


_stage: Stage | None = None


def _begin(stage: Stage) -> None:
    """Of a fresh process: it ends with its parent, and at Ctrl-C without a word."""
    global _stage
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    _stage = prepared(stage)
    Finalize(None, _stage.close, exitpriority=0)


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


def _attempt(work: Work, folder: Path) -> Result:
    assert _stage is not None
    return attempt(_stage, work, folder)


# ---- Ray ----


class _Actor:
    """A process of Ray, with the stage set up once."""

    def __init__(self, stage: Stage, works: Sequence[Work], folder: Path) -> None:
        self._stage, self._works, self._folder = prepared(stage), works, folder

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Places of shards among the works -> what went wrong with each, "" for nothing."""
        works = [self._works[place] for place in batch["place"]]
        return {
            "place": batch["place"],
            "problem": [attempt(self._stage, work, self._folder).problem or "" for work in works],
        }


def on_ray(stage: Stage, works: Sequence[Work], folder: Path, workers: int) -> Iterator[Result]:
    """On the cluster that `RAY_ADDRESS` names, or a new one of this machine; all of it sees the files by their paths.

    Ray makes an actor anew that dies, and gives it its shard again.

    Raises:
        ValueError: Ray is not installed.
    """
    if not works:
        return
    try:
        import ray
        import ray.data
    except ImportError:
        raise ValueError("`engine`: got 'ray', and Ray is not installed: pip install \"hubgen[ray]\"") from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers
    ours = not ray.is_initialized()
    if ours:
        ray.init(num_cpus=None if "RAY_ADDRESS" in os.environ else max(workers, 1), include_dashboard=False,
                 logging_level=logging.ERROR, log_to_driver=False)  # fmt: skip
    context = ray.data.DataContext.get_current()
    before = context.enable_progress_bars
    context.enable_progress_bars = False
    try:
        shards = ray.data.from_items([{"place": place} for place in range(len(works))], override_num_blocks=len(works))
        done = shards.map_batches(
            _Actor,
            fn_constructor_args=(stage, list(works), folder.resolve()),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(works))),
            num_cpus=1,
            num_gpus=stage.gpus or None,
        )
        for row in done.iter_rows():
            yield Result(works[row["place"]], row["problem"] or None)
    finally:
        context.enable_progress_bars = before
        if ours:
            ray.shutdown()


ENGINES: dict[str, Engine] = {"local": local, "ray": on_ray}
