"""What is done to one shard, and how the result is committed.

A stage is a function of one piece of input and its settings. What it makes lies in a folder of its own until it is
whole. Then the folder is renamed (`.ready-00012`), its files are moved to their places, `00012_stats.json` last. That
file holds a record of the stage: the digests of its input and of its output, and its settings. So a run that was killed
anywhere is finished by starting it again: what is committed stays, what was ready is moved, the rest is made.

    class CaptionLengths(Stage):
        name = "caption_lengths"

        def __call__(self, work, folder):                       # folder: where the shard's new files go
            ...
            return {}                                           # what `_stats.json` shall say beside the record

A stage that adds columns to the shards of a folder writes their tables anew and nothing else; the tar stays.
"""

import fcntl
import json
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubgen.data.errors import DataError
from hubgen.data.web.shards import (
    READY,
    STATS,
    TABLE,
    StoredShard,
    open_shards,
    read_stats,
    shard_name,
    shard_names,
    write_stats,
)
from hubgen.formats.atomic import sweep, written
from hubgen.formats.digests import file_digest

STAGES = "stages"
"""Field of `_stats.json`: the records of what was done to a shard, in order."""

GIVEN = "given"
"""Stands in the records for what another program did"""

LOCK = ".lock"


@dataclass(frozen=True)
class Work:
    """A piece of input that becomes one shard."""

    number: int
    """Of the shard"""
    source: Path
    """The file that its rows are in"""
    start: int
    """First row in that file"""
    stop: int
    """Row behind the last"""
    digest: str
    """Of all that its rows follow from"""

    @property
    def name(self) -> str:
        return shard_name(self.number)


class Stage(ABC):
    """What is done to each shard of a folder.

    It is sent to other processes by pickle; what cannot be sent is made in `setup`.
    """

    name: str
    """Of the record in `_stats.json`"""
    settings: Mapping[str, Any] = {}
    """All that results follow from beside the input, as JSON values"""
    unit: str = "rows"
    """What works are counted in on a progress bar, from `start` to `stop`"""

    def setup(self) -> None:  # noqa: B027
        """Called once in each process, before its first shard; what it raises ends a run in one process."""

    def close(self) -> None:  # noqa: B027
        """Called once in each process, after its last shard."""

    def is_done(self, work: Work, folder: Path) -> bool:
        """Whether a shard of the folder needs no more work; see `is_committed`."""
        return is_committed(folder, work, self)

    @abstractmethod
    def __call__(self, work: Work, folder: Path) -> dict[str, Any]:
        """Makes a shard's files in a new folder.

        Args:
            work: The input.
            folder: Where its files go, under their own names: `00012.tar`, `00012.parquet`, or one of them.

        Returns:
            Fields for `_stats.json`; those that are there already and not named stay.
        """


def works_on(shards: Sequence[StoredShard], stage: Stage) -> list[Work]:
    """The work of a stage that adds to the shards of a folder.

    What a shard's input is, the stages before this one say; one that img2dataset wrote has no record, and the bytes of
    its table are its digest.
    """
    works = []
    for shard in shards:
        before: list[dict[str, Any]] = []
        for record in shard.stats.get(STAGES, []):
            if record["stage"] == stage.name:
                break
            before.append(record)
        digest = before[-1]["output"] if before else file_digest(shard.table)
        works.append(Work(shard.number, shard.table, 0, shard.stats["count"], digest))
    return works


def is_committed(folder: Path, work: Work, stage: Stage) -> bool:
    """Whether a stage was done to a shard, from this input and with these settings.

    Raises:
        DataError: It was done from other input, or with other settings.
    """
    path = folder / f"{work.name}{STATS}"
    if not path.exists():
        return False
    records = read_stats(path).get(STAGES)
    if not records and work.source.parent.resolve() != folder.resolve():
        raise DataError(f"{path}: was written by another program, expected a new or empty folder")
    for record in records or []:
        if record.get("stage") != stage.name:
            continue
        before, now = record["settings"], json.loads(json.dumps(stage.settings))
        for name in sorted({*before, *now}):
            if before.get(name) != now.get(name):
                raise DataError(
                    f"{path}: was made with {name} {_shown(before.get(name))}, and this run has "
                    f"{_shown(now.get(name))}; expected the same settings, or another folder"
                )
        if record["input"] != work.digest:
            raise DataError(
                f"{path}: was made from other rows than those of {work.source}, {work.start} to {work.stop}; expected "
                "the same input, or another folder"
            )
        return True
    return False


def _shown(value: Any) -> str:
    return "not set" if value is None else json.dumps(value)


def run_shard(stage: Stage, work: Work, folder: Path) -> dict[str, Any]:
    """Does a stage to one shard and commits what it made; the new content of its `_stats.json`.

    Args:
        stage: Set up.
        work: Its input.
        folder: Of the shards.
    """
    started = time.time()
    ready, path = folder / f"{READY}{work.name}", folder / f"{work.name}{STATS}"
    with written(ready) as staged:
        staged.mkdir()
        fields = stage(work, staged)
        stats = read_stats(path) if path.exists() else {}
        records = []
        for record in stats.get(STAGES, []):
            if record["stage"] == stage.name:
                break
            records.append(record)
        if not records and work.source.parent.resolve() == folder.resolve():  # img2dataset's
            records = [{"stage": GIVEN, "input": None, "settings": {}, "output": work.digest}]
        ended = time.time()
        if not records:  # the times are those of the download, as img2dataset has them
            fields = {**fields, "duration": ended - started, "start_time": started, "end_time": ended}
        made = {"stage": stage.name, "input": work.digest, "settings": dict(stage.settings)}
        made["output"] = file_digest(staged / f"{work.name}{TABLE}")
        stats = _in_order({**(stats if records else {}), **fields}) | {STAGES: [*records, made]}
        write_stats(staged / path.name, stats)
    _move(ready, folder)
    return stats


ORDER = ("count", "successes", "failed_to_download", "failed_to_resize", "duration", "start_time", "end_time",
         "status_dict")  # fmt: skip
"""Of img2dataset's fields"""


def _in_order(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: fields[name] for name in ORDER if name in fields} | {
        name: value for name, value in fields.items() if name not in (*ORDER, STAGES)
    }


def _move(ready: Path, folder: Path) -> None:
    """Moves the files of a shard to their places, its `_stats.json` last; a part of them may have been moved before."""
    files = sorted(ready.iterdir(), key=lambda path: path.name.endswith(STATS))
    for path in files:
        os.replace(path, folder / path.name)
    shutil.rmtree(ready)


def finish(folder: Path, name: str) -> None:
    """Moves a shard to its place that was ready when its process was killed; without one, nothing."""
    ready = folder / f"{READY}{name}"
    if ready.is_dir():
        _move(ready, folder)


def recover(folder: Path) -> None:
    """Finishes what a killed run left: moves shards that were ready, and removes what was half made."""
    for ready in sorted(folder.glob(f"{READY}*")):
        finish(folder, ready.name.removeprefix(READY))
    sweep(folder)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Holds a folder for this run, and recovers it first.

    Raises:
        DataError: Another run holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{folder}: another run writes to it; expected one at a time") from None
        recover(folder)
        yield


def open_to_add(folder: Path) -> list[StoredShard]:
    """The shards of a folder that a stage adds to; what a killed run left there is finished first.

    Raises:
        DataError: See `open_shards`; or another run writes to the folder.
    """
    if any(folder.glob(f"{READY}*")):
        with alone_in(folder):  # which recovers it
            pass
    return open_shards(folder)


def to_do(stage: Stage, works: Sequence[Work], folder: Path) -> list[Work]:
    """The work that is not committed yet.

    Raises:
        DataError: Something in the folder was made from other input, or with other settings.
    """
    numbers = {work.number for work in works}
    further = [name for name in shard_names(folder) if int(name) not in numbers]
    if further:
        raise DataError(
            f"{folder / (further[0] + STATS)}: is no shard of this input, which has {len(works)}; expected the same "
            "input, or another folder"
        )
    return [work for work in works if not stage.is_done(work, folder)]
