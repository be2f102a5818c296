"""The engine of one machine: a loop in this process, or a pool of fresh ones."""

import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

from hubgen.data.web.engines.attempts import Result, Results, attempt, prepared
from hubgen.data.web.stages import Stage, Work
from hubgen.errors import one_line


@dataclass(frozen=True)
class Local:
    """In this process, or in a pool of fresh ones."""

    gpus: float = 0.0
    """That each worker sees, others than the next one's; below 1 they share one. 0: each sees all there are."""

    def __call__(self, stage: Stage, works: Sequence[Work], folder: Path, workers: int) -> Results:
        """See `Engine`."""
        if not works:
            return
        workers = min(workers, len(works))
        devices = dealt(self.gpus, workers) if self.gpus else []
        if workers > 1:
            yield from _pool(stage, works, folder, workers, devices)
            return
        stage.setup()
        try:
            for work in works:
                yield attempt(stage, work, folder)
        finally:
            stage.close()


def dealt(gpus: float, workers: int) -> list[str]:
    """What each worker's CUDA_VISIBLE_DEVICES shall be.

    Raises:
        ValueError: This machine has too few.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        import torch

        there = [str(number) for number in range(torch.cuda.device_count())]
    else:
        there = [name.strip() for name in named.split(",") if name.strip()]
    sharing, each = (1, int(gpus)) if gpus >= 1 else (int(1 / gpus), 1)
    needed = math.ceil(workers / sharing) * each
    if len(there) < needed:
        raise ValueError(
            f"`gpus`: got {gpus:g} for each of {workers} workers, expected {needed} GPUs and found {len(there)}"
        )
    return [",".join(there[(worker // sharing) * each :][:each]) for worker in range(workers)]


def _pool(stage: Stage, works: Sequence[Work], folder: Path, workers: int, devices: Sequence[str]) -> Iterator[Result]:
    """A worker that dies takes its pool with it; the shards that were at work then are tried once more, one by one."""
    suspects: list[tuple[Work, str]] = []
    yield from _pools(stage, works, folder, workers, devices, suspects)
    guilty: list[tuple[Work, str]] = []
    yield from _pools(stage, [work for work, _ in suspects], folder, 1, devices, guilty)
    for work, problem in guilty:
        yield Result(work, f"its process ended: {problem}")


def _pools(
    stage: Stage,
    works: Sequence[Work],
    folder: Path,
    workers: int,
    devices: Sequence[str],
    suspects: list[tuple[Work, str]],
) -> Iterator[Result]:
    """One pool after the other until no work is left; what was at work when one died is added to `suspects`."""
    waiting = list(works)
    context = multiprocessing.get_context("spawn")
    while waiting:
        running: dict[Future[Result], Work] = {}
        given = (stage, devices, context.Value("i", 0))
        with ProcessPoolExecutor(workers, context, _begin, given) as pool:
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
                    else:
                        suspects.append((work, one_line(death)))


_stage: Stage | None = None


def _begin(stage: Stage, devices: Sequence[str], begun: Any) -> None:
    """Of a fresh process: it ends with its parent, and at Ctrl-C without a word."""
    global _stage
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    if devices:
        with begun.get_lock():
            os.environ["CUDA_VISIBLE_DEVICES"] = devices[begun.value]
            begun.value += 1
    _stage = prepared(stage)
    Finalize(None, _stage.close, exitpriority=0)


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


def _attempt(work: Work, folder: Path) -> Result:
    assert _stage is not None
    return attempt(_stage, work, folder)
