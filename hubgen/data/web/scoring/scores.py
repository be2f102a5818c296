"""Columns that say what a pair is worth: the stage of `hubgen data score`.

    shards = open_shards(Path("shards"))
    stage = Score((Language("cld3"), LaionHash()))
    run(stage, stage.works(shards), Path("shards"))          # language, language_score, hash

A `Part` makes some columns; those that look at pictures are in `embedding_scores`. Scores are stored, and
`hubgen data filter` decides. Every row stays: one without a value has null. A column that is there already is never
written over, so another part of the same name is an error.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from hubgen.data.errors import DataError
from hubgen.data.web.crawling.dedup import laion_hash
from hubgen.data.web.crawling.text import Detector, needed
from hubgen.data.web.shards import (
    TABLE,
    StoredShard,
    read_table,
    table_columns,
    table_schema,
    write_table,
)
from hubgen.data.web.stages import STAGES, Stage, Work, works_on
from hubgen.formats.digests import file_digest

SCORED = "scored"
"""Field of `_stats.json`: of each column that was added, how many rows have a value"""


class Part(ABC):
    """Some columns, made from a shard.

    It is sent to other processes by pickle; what cannot be sent is made in `setup`.
    """

    reads: tuple[str, ...] = ()
    """Columns that a shard must have"""

    @property
    @abstractmethod
    def columns(self) -> Mapping[str, Any]:
        """The columns that it makes, with their types (`pyarrow.DataType`)."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """All that they follow from beside the shard, as JSON values."""
        return {}

    def check(self, shards: Sequence[StoredShard]) -> None:  # noqa: B027
        """Looks at what is given before anything is computed; raises DataError where it cannot be."""

    def setup(self) -> None:  # noqa: B027
        """Called once in each process, before its first shard."""

    def close(self) -> None:  # noqa: B027
        """Called once in each process, after its last shard."""

    @abstractmethod
    def __call__(self, shard: StoredShard, table: Any) -> Mapping[str, Any]:
        """The columns for each row of the shard's table, lists or arrays (N,)."""


@dataclass
class Score(Stage):
    """Adds the columns of its parts to the tables of a folder.

    Raises:
        ValueError: There are no parts, or two make a column of one name.
    """

    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        names = [name for part in self.parts for name in part.columns]
        twice = sorted({name for name in names if names.count(name) > 1})
        if not names or twice:
            raise ValueError(f"`parts`: got the columns {names}, expected some, each once.")
        # A run that adds other columns is another stage: folders are scored bit by bit.
        self.name = f"score {', '.join(names)}"

    @property
    def columns(self) -> dict[str, Any]:
        """All that it adds, with their types."""
        return {name: kind for part in self.parts for name, kind in part.columns.items()}

    @property
    def settings(self) -> Mapping[str, Any]:  # type: ignore[override]
        """Those of the parts."""
        return {name: value for part in self.parts for name, value in part.settings.items()}

    def works(self, shards: Sequence[StoredShard]) -> list[Work]:
        """The work on shards.

        Raises:
            DataError: One lacks a column that a part reads, or has one that a part makes; or a part cannot begin.
        """
        for shard in shards:
            found = table_columns(shard.table)
            for name in (name for part in self.parts for name in part.reads):
                if name not in found:
                    raise DataError(f"{shard.table}: got the columns {found}, expected {name!r} too")
            if any(record["stage"] == self.name for record in shard.stats.get(STAGES, [])):
                continue
            there = [name for name in self.columns if name in found]
            if there:
                raise DataError(f"{shard.table}: has a column {there[0]!r} already, expected none: it would be lost")
        for part in self.parts:
            part.check(shards)
        return works_on(shards, self)

    def setup(self) -> None:
        for part in self.parts:
            part.setup()

    def close(self) -> None:
        for part in self.parts:
            part.close()

    def __call__(self, work: Work, folder: Path) -> dict[str, Any]:
        """Writes the shard's table; see `Stage`."""
        shard = StoredShard(work.source.parent, work.name)
        table = shard.read()
        table = table.drop_columns([name for name in self.columns if name in table.column_names])
        counts = dict(shard.stats.get(SCORED, {}))
        whole = table
        for part in self.parts:
            values = part(shard, table)
            for name, kind in part.columns.items():
                given = values[name]
                column = given if isinstance(given, pa.Array) else pa.array(given, kind)
                whole = whole.append_column(name, column)
                counts[name] = len(column) - column.null_count
        write_table(folder / f"{work.name}{TABLE}", whole)
        return {SCORED: counts}


# ---- of texts and addresses ----


@dataclass
class Language(Part):
    """`language` of each caption, "" where the detector is not sure, and `language_score`, its probability.

    Args:
        detector: "cld3" or "fasttext", see `hubgen.data.web.crawling.text.Detector`.
        least_score: Probability from which a language counts as known.
    """

    detector: str = "cld3"
    least_score: float = 0.0
    reads = ("caption",)

    @property
    def columns(self) -> Mapping[str, Any]:
        return {"language": pa.string(), "language_score": pa.float32()}

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"detector": self.detector, "least_score": self.least_score}

    def check(self, shards: Sequence[StoredShard]) -> None:
        Detector(self.detector, self.least_score)  # which says what is not installed

    def setup(self) -> None:
        self._detector = Detector(self.detector, self.least_score)

    def __call__(self, shard: StoredShard, table: Any) -> Mapping[str, Any]:
        texts = table.column("caption").to_pylist()
        found = [(None, None) if text is None else self._detector(text) for text in texts]
        return {"language": [name for name, _ in found], "language_score": [score for _, score in found]}


class LaionHash(Part):
    """`hash`, by which LAION's tables of scores are joined; see `hubgen.data.web.crawling.dedup.laion_hash`."""

    reads = ("url", "caption")

    @property
    def columns(self) -> Mapping[str, Any]:
        return {"hash": pa.int64()}

    def check(self, shards: Sequence[StoredShard]) -> None:
        needed("mmh3")

    def __call__(self, shard: StoredShard, table: Any) -> Mapping[str, Any]:
        return {"hash": hashes_of(table)}


def hashes_of(table: Any) -> list[int]:
    """LAION's hash of each row of a shard's table."""
    pairs = zip(table.column("url").to_pylist(), table.column("caption").to_pylist(), strict=True)
    return [laion_hash(url, text) for url, text in pairs]


# ---- of other tables ----

KEYS = ("hash", "url", "key")


@dataclass
class Joined(Part):
    """Columns of another table, found by a key; made by `of`.

    Every row of a shard stays: one that the table does not have gets nulls. Of rows of the table with one key, the
    first counts.
    """

    path: Path
    on: str
    """`hash`, which is computed where shards have none, `url` or `key`"""
    names: tuple[str, ...]
    digest: str
    _columns: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, path: Path, on: str | None = None, names: Sequence[str] = ()) -> "Joined":
        """The columns of a table.

        Args:
            path: A parquet file.
            on: A name in `KEYS`; `None`: the first of them that the table has.
            names: Of the columns to add; all but keys if none are given.

        Raises:
            DataError: It cannot be read, or has no such columns.
        """
        schema = table_schema(path)
        keys = [name for name in KEYS if name in schema.names]
        if not keys or on not in (None, *keys):
            raise DataError(f"{path}: got the columns {schema.names}, expected {on or ', '.join(KEYS)} to join by")
        for name in names:
            if name not in schema.names or name in KEYS:
                raise DataError(f"{path}: got the columns {schema.names}, expected {name!r}, to add, among them")
        chosen = tuple(names or [name for name in schema.names if name not in KEYS])
        if not chosen:
            raise DataError(f"{path}: got the columns {schema.names}, expected some beside the keys")
        columns = {name: schema.field(name).type for name in chosen}
        return cls(path, on or keys[0], chosen, file_digest(path), columns)

    @property
    def columns(self) -> Mapping[str, Any]:
        return self._columns

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"joined": self.digest, "on": self.on}

    @property
    def kind(self) -> Any:
        """Type of the key."""
        return pa.int64() if self.on == "hash" else pa.string()

    def check(self, shards: Sequence[StoredShard]) -> None:
        kind = table_schema(self.path).field(self.on).type
        texts = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        if not (pa.types.is_signed_integer(kind) if self.on == "hash" else texts):
            raise DataError(f"{self.path}: got {kind} in {self.on!r}, expected {self.kind}")
        for shard in shards:
            found = table_columns(shard.table)
            for name in ("url", "caption") if self.on == "hash" and "hash" not in found else (self.on,):
                if name not in found:
                    raise DataError(f"{shard.table}: got the columns {found}, expected {name!r} to join by {self.on}")

    def setup(self) -> None:
        table = read_table(self.path, [self.on, *self.names])
        self._keys = table.column(self.on).cast(self.kind)
        self._table = table.select(list(self.names))

    def __call__(self, shard: StoredShard, table: Any) -> Mapping[str, Any]:
        if self.on == "hash" and "hash" not in table.column_names:
            own = pa.array(hashes_of(table), pa.int64())
        else:
            own = table.column(self.on).cast(self.kind)
        places = pc.index_in(own, value_set=self._keys, skip_nulls=True)
        found = self._table.take(places).combine_chunks()
        return {name: found.column(name).combine_chunks() for name in self.names}
