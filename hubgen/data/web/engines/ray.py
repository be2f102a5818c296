"""The engine of a cluster of Ray: Ray Data's pool of actors (`hubgen[ray]`)."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubgen.data.web.engines.attempts import Result, Results, attempt, prepared
from hubgen.data.web.stages import Stage, Work


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


@dataclass(frozen=True)
class OnRay:
    """On the cluster that `RAY_ADDRESS` names, or a new one of this machine; all of it sees the files by their paths.

    Ray makes an actor anew that dies, and gives it its shard again.
    """

    gpus: float = 0.0
    """Of each worker; below 1 they share one. With 0 a worker sees none."""

    def __call__(self, stage: Stage, works: Sequence[Work], folder: Path, workers: int) -> Results:
        """See `Engine`.

        Raises:
            ValueError: Ray is not installed, or this machine has no GPU.
        """
        if not works:
            return
        try:
            import ray
            import ray.data
        except ImportError:
            raise ValueError("`engine`: got 'ray', and Ray is not installed: pip install \"hubgen[ray]\"") from None
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers
        ours, here = not ray.is_initialized(), "RAY_ADDRESS" not in os.environ
        if ours:
            ray.init(num_cpus=max(workers, 1) if here else None, include_dashboard=False,
                     logging_level=logging.ERROR, log_to_driver=False)  # fmt: skip
        context = ray.data.DataContext.get_current()
        before = context.enable_progress_bars
        context.enable_progress_bars = False
        try:
            there = ray.cluster_resources().get("GPU", 0)
            if here and there < self.gpus:  # a cluster may still grow; this machine does not, and Ray would wait
                raise ValueError(f"`gpus`: got {self.gpus:g} for each worker, and Ray finds {there:g} GPUs here")
            places = [{"place": place} for place in range(len(works))]
            done = ray.data.from_items(places, override_num_blocks=len(works)).map_batches(
                _Actor,
                fn_constructor_args=(stage, list(works), folder.resolve()),
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=min(workers, len(works))),
                num_cpus=1,
                num_gpus=self.gpus or None,
            )
            for row in done.iter_rows():
                yield Result(works[row["place"]], row["problem"] or None)
        finally:
            context.enable_progress_bars = before
            if ours:
                ray.shutdown()
