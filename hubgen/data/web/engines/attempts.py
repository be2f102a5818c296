"""What the processes of an engine do: one attempt at a shard, whose outcome is told and not raised.

    result = attempt(prepared(stage), work, folder)
    result.problem      # None, or what went wrong in one line

`Engine` is the form of an engine; `local`, `ray` and `slurm` have one each.
"""

import os
import traceback
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from hubgen.data.web.stages import Stage, Work, finish, run_shard
from hubgen.errors import one_line


@dataclass(frozen=True)
class Result:
    """Of one shard."""

    work: Work
    problem: str | None


Results: TypeAlias = Generator[Result, None, None]


class Engine(Protocol):
    """Gets all the work done somewhere."""

    def __call__(self, stage: Stage, works: Sequence[Work], folder: Path, workers: int) -> Results:
        """A result for each piece of work, in the order in which they come.

        Args:
            stage: Not set up yet.
            works: None of them done.
            folder: Of the shards.
            workers: Shards that are at work at a time.

        Raises:
            ValueError: What the engine needs is not there.
        """


def attempt(stage: Stage, work: Work, folder: Path) -> Result:
    """Does a stage to a shard; what goes wrong is told, not raised.

    An earlier attempt may have been killed: what it had ready is moved to its place, and what it had committed stays.
    """
    try:
        finish(folder, work.name)
        if not stage.is_done(work, folder):
            run_shard(stage, work, folder)
    except Exception as error:  # of one shard, whose turn it is to be told: the others go on
        if os.environ.get("HUBGEN_DEBUG") == "1":
            traceback.print_exc()
        return Result(work, f"{type(error).__name__}: {one_line(error)}")
    return Result(work, None)


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
