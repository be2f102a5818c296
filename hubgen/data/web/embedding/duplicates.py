"""Pictures that are nearly the same as an earlier one, by their vectors; exact repeats of URLs are `dedup`'s.

    near_duplicates(StoredEmbeddings.open(folder), 0.95)       # (N,): the row that each is a copy of, or -1

The rows are gone through in order. One whose cosine with a row that stayed reaches the threshold is a near-duplicate of
the nearest such; else it stays. So of each pair that is as near, one goes; whatever goes has something as near that
stays, without chains; and the least key stays. `MarkDuplicates` writes the answer as a column of the shards, which
`hubgen data filter --where "duplicate_of is null"` reads.

Which vectors? `thumbnail` for copies of other sizes and compressions. Those of a CLIP find the same thing or scene too
(SemDeDup, https://arxiv.org/abs/2303.09540).
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from hubgen.data.errors import DataError
from hubgen.data.web.embedding.embeddings import StoredEmbeddings
from hubgen.data.web.embedding.index import empty_index, faiss_threads, unit
from hubgen.data.web.shards import SUCCESS, TABLE, StoredShard, read_table, write_table
from hubgen.data.web.stages import Stage, Work, works_on
from hubgen.formats.atomic import written

COLUMN = "duplicate_of"
BLOCK = 1024
"""Vectors that are compared at a time"""
ROUNDING = 1e-6
"""Of a cosine: what is equal counts as 1"""


def near_duplicates(embeddings: StoredEmbeddings, threshold: float) -> np.ndarray:
    """(N,) int64: for each row the earlier one that it is a near-duplicate of, -1 for those that stay.

    Exact up to `index.EXACT` rows; of more, only the cells of an index that are nearest are looked into, where copies
    nearly always lie.

    Args:
        embeddings: The vectors.
        threshold: Cosine from which two rows are the same, above 0, at most 1.

    Raises:
        DataError: The threshold is out of range, or a number of the vectors is none or infinite.
    """
    if not 0 < threshold <= 1:
        raise DataError(f"threshold: got {threshold:g}, expected a cosine above 0, at most 1")
    found = np.full(len(embeddings), -1, np.int64)
    if not len(found):
        return found
    with faiss_threads(1):
        _find(embeddings, threshold - ROUNDING, found)
    return found


def _find(embeddings: StoredEmbeddings, threshold: float, found: np.ndarray) -> None:
    """Writes the rows that stay to those that are near-duplicates of them."""
    kept, rows_of = empty_index(embeddings), np.zeros(0, np.int64)
    for start, vectors in embeddings.blocks(BLOCK):
        block = unit(vectors)
        similarity, nearest = kept.search(block, 1) if len(rows_of) else np.full((2, len(block), 1), -1)
        stays = _sieve(block, similarity[:, 0], threshold)  # (n,): itself, -1 for one that is in the index, or another
        for row, other in enumerate(stays):
            if other != row:
                found[start + row] = rows_of[int(nearest[row, 0])] if other < 0 else start + other
        own = np.flatnonzero(stays == np.arange(len(block)))
        kept.add(block[own])
        rows_of = np.concatenate([rows_of, start + own])


def _sieve(block: np.ndarray, before: np.ndarray, threshold: float) -> np.ndarray:
    """What each of some vectors is a near-duplicate of: the vector of the block that stays, or -1, an earlier one.

    Args:
        block: (n, D).
        before: (n,) of the greatest cosine with a vector before them that stays.
        threshold: As above.
    """
    cosines = block @ block.T
    answer = np.arange(len(block))
    stays = np.zeros(len(block), bool)
    for row in range(len(block)):
        inside = np.where(stays[:row], cosines[row, :row], -2)
        nearest = int(inside.argmax()) if row else 0
        greatest = inside[nearest] if row else -2
        if max(greatest, before[row]) < threshold:
            stays[row] = True
        else:
            answer[row] = nearest if greatest > before[row] else -1
    return answer


@dataclass
class MarkDuplicates(Stage):
    """Adds the column `duplicate_of` to shards: the key of the picture that a row's is a near-duplicate of, or null."""

    found: Path
    """Table of keys and the keys that they are near-duplicates of"""
    digest: str
    """Of that table"""
    threshold: float
    embedder: str | None

    name = "near_duplicates"

    @classmethod
    def of(cls, shards: Sequence[StoredShard], embeddings: StoredEmbeddings, threshold: float) -> "MarkDuplicates":
        """Finds the near-duplicates among the pictures of a folder, and stores them beside their vectors.

        Raises:
            DataError: A picture has no vector; or see `near_duplicates`.
        """
        keys = embeddings.table().column("key")
        for shard in shards:
            table = shard.read(["key", "status"])
            seen = table.filter(pa.compute.equal(table.column("status"), SUCCESS)).column("key")
            missing = seen.filter(pa.compute.invert(pa.compute.is_in(seen, keys.combine_chunks())))
            if len(missing):
                raise DataError(
                    f"{embeddings.folder}: got no vector for the key {missing[0].as_py()} of {shard.table}, expected "
                    "one for each picture"
                )
        rows = near_duplicates(embeddings, threshold)
        copies = np.flatnonzero(rows >= 0)
        table = pa.table({"key": keys.take(copies), COLUMN: keys.take(rows[copies])})
        path = embeddings.folder / f"near_duplicates-{threshold:g}{TABLE}"
        with written(path) as staged:
            write_table(staged, table)
        pairs = "\n".join(f"{row['key']} {row[COLUMN]}" for row in table.to_pylist())
        return cls(path, hashlib.sha256(pairs.encode()).hexdigest(), threshold, embeddings.embedder)

    @property
    def settings(self) -> Mapping[str, Any]:  # type: ignore[override]
        return {"threshold": self.threshold, "embedder": self.embedder, "found": self.digest}

    def works(self, shards: Sequence[StoredShard]) -> list[Work]:
        """The input of each shard."""
        return works_on(shards, self)

    def setup(self) -> None:
        """Reads what was found."""
        table = read_table(self.found)
        self._originals = dict(zip(table.column("key").to_pylist(), table.column(COLUMN).to_pylist(), strict=True))

    def __call__(self, work: Work, folder: Path) -> dict[str, Any]:
        """Writes the shard's table; see `Stage`."""
        table = read_table(work.source)
        if COLUMN in table.column_names:
            table = table.drop_columns([COLUMN])
        originals = [self._originals.get(key) for key in table.column("key").to_pylist()]
        write_table(folder / f"{work.name}{TABLE}", table.append_column(COLUMN, pa.array(originals, pa.string())))
        return {"near_duplicates": sum(original is not None for original in originals)}
