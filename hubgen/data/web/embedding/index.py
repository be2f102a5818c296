"""Search among stored vectors by faiss (Johnson et al., 2017, https://arxiv.org/abs/1702.08734).

    build_index(StoredEmbeddings.open(embeddings), folder)
    index = SearchIndex.open(folder)
    similarities, rows = index.search(embedder.texts(["a red car"]), 10)
    index.shown(rows[0])                              # key, caption, url of each

An index is a folder of its own, which needs the embeddings no more:

    vectors.faiss     all vectors, of length 1, and where they lie; the measure is the cosine
    rows.parquet      key, caption, url, in the order of the vectors
    index.json        counts, the embedder's name, the digest of the embeddings, and the recall that was measured

Up to `EXACT` vectors are searched all. Of more, k-means makes about √N cells, and a search looks into the `probes`
cells that are nearest. How many it needs is measured when the index is built: some vectors are searched exactly too,
and `probes` is doubled until enough of their true neighbours are found. Texts lie apart from pictures in CLIP's space,
so for them the share may be lower; `probes` of `search` asks for more.

All vectors are in memory while an index is built, 4 bytes a number. With one thread, the same vectors give the same
index. faiss is the extra `hubgen[index]`.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hubgen.data.errors import DataError
from hubgen.data.web.embedding.embeddings import StoredEmbeddings
from hubgen.data.web.shards import read_table, write_table
from hubgen.formats.atomic import written

VECTORS, ROWS, INFO = "vectors.faiss", "rows.parquet", "index.json"
EXACT = 10_000
"""Vectors up to which all are compared"""
CELLS = 65_536
"""At most"""
POINTS = 64
"""Vectors a cell that k-means sees"""
ASKED, NEIGHBOURS = 256, 10
"""Vectors that are searched exactly to measure recall, and how many neighbours of each"""
RECALL, LEAST_PROBES = 0.96, 16


def faiss() -> Any:
    """The package.

    Raises:
        DataError: It is not installed.
    """
    try:
        import faiss as package
    except ImportError as error:
        raise DataError('faiss: found no such package, expected it: pip install "hubgen[index]"') from error
    return package


@contextmanager
def faiss_threads(number: int) -> Iterator[None]:
    """Has faiss use so many threads inside; with other numbers than 1, last bits may differ."""
    package = faiss()
    before = package.omp_get_max_threads()
    package.omp_set_num_threads(number)
    try:
        yield
    finally:
        package.omp_set_num_threads(before)


def unit(vectors: np.ndarray) -> np.ndarray:
    """(n, D) float32 of length 1; zeros stay."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.ascontiguousarray(vectors / np.where(length > 0, length, 1), np.float32)


def cells_for(count: int) -> int:
    """Cells of an index of so many vectors: the power of two that is nearest to √N; 1 for an exact one."""
    return 1 if count <= EXACT else min(CELLS, 2 ** round(math.log2(count) / 2))


def empty_index(embeddings: StoredEmbeddings) -> Any:
    """faiss's index for these vectors, trained, with none of them in it.

    Raises:
        DataError: A number is none, or infinite.
    """
    package, dimension, cells = faiss(), embeddings.dimension, cells_for(len(embeddings))
    flat = package.IndexFlatIP(dimension)
    if cells == 1:
        return flat
    index = package.IndexIVFFlat(flat, dimension, cells, package.METRIC_INNER_PRODUCT)
    index.own_fields = True
    flat.this.disown()
    index.cp.spherical, index.cp.seed, index.nprobe = True, 1234, min(LEAST_PROBES, cells)
    chosen = np.sort(np.random.default_rng(0).permutation(len(embeddings))[: POINTS * cells])
    index.train(np.concatenate([part for part in _rows(embeddings, chosen)]))
    return index


def _rows(embeddings: StoredEmbeddings, rows: np.ndarray) -> list[np.ndarray]:
    """The vectors of some rows, given in order, of length 1."""
    found = []
    for start, vectors in embeddings.blocks():
        inside = rows[(rows >= start) & (rows < start + len(vectors))]
        found.append(unit(vectors[inside - start]))
    return found


def build_index(
    embeddings: StoredEmbeddings, folder: Path, *, recall: float = RECALL, threads: int = 1
) -> "SearchIndex":
    """Makes the index of a folder's vectors, and stores it.

    Args:
        embeddings: What to search.
        folder: Where to; an index that is there is replaced.
        recall: Share of the true ten nearest that searches shall find.
        threads: Of faiss; other numbers than 1 may change last bits.

    Raises:
        DataError: There are no vectors, or a number is none or infinite; the folder holds something else.
    """
    if folder.exists() and not (folder / INFO).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder}: is there and is no index (no {INFO}), expected a new or empty folder")
    if not len(embeddings):
        raise DataError(f"{embeddings.folder}: got no vector, expected at least one")
    with faiss_threads(threads):
        index = empty_index(embeddings)
        for _, vectors in embeddings.blocks():
            index.add(unit(vectors))
        info: dict[str, Any] = {
            "vectors": len(embeddings),
            "dimension": embeddings.dimension,
            "embedder": embeddings.embedder,
            "settings": dict(embeddings.settings),
            "embeddings": embeddings.digest(),
            "cells": cells_for(len(embeddings)),
            "probes": 1,
        }
        if info["cells"] > 1:
            info["probes"], info["recall"] = _probes_for(index, embeddings, recall)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with written(folder) as staged:
        staged.mkdir()
        faiss().write_index(index, str(staged / VECTORS))
        write_table(staged / ROWS, embeddings.table())
        (staged / INFO).write_text(json.dumps(info, indent=4) + "\n", encoding="utf-8")
    return SearchIndex.open(folder)


def _probes_for(index: Any, embeddings: StoredEmbeddings, wanted: float) -> tuple[int, float]:
    """The least probes, of powers of two, that find the wanted share of neighbours; and the share that they find."""
    asked = np.linspace(0, len(embeddings) - 1, ASKED).astype(np.int64)
    queries = np.concatenate(_rows(embeddings, asked))
    true = nearest(queries, embeddings, NEIGHBOURS + 1)
    probes = min(LEAST_PROBES, index.nlist)
    while True:
        index.nprobe = probes
        found = index.search(queries, NEIGHBOURS + 1)[1]
        share = shared(true, found, asked)
        if share >= wanted or probes == index.nlist:
            return probes, share
        probes = min(2 * probes, index.nlist)


def nearest(queries: np.ndarray, embeddings: StoredEmbeddings, count: int) -> np.ndarray:
    """(n, count) rows of the vectors that are nearest to each of the queries (n, D), all compared."""
    best = np.zeros((len(queries), 0), np.float32)
    rows = np.zeros((len(queries), 0), np.int64)
    for start, vectors in embeddings.blocks(8192):
        cosines = queries @ unit(vectors).T
        here = np.argpartition(-cosines, min(count, len(vectors)) - 1, axis=1)[:, :count]
        best = np.concatenate([best, np.take_along_axis(cosines, here, 1)], axis=1)
        rows = np.concatenate([rows, start + here], axis=1)
        order = np.argsort(-best, axis=1)[:, :count]
        best, rows = np.take_along_axis(best, order, 1), np.take_along_axis(rows, order, 1)
    return rows


def shared(true: np.ndarray, found: np.ndarray, asked: np.ndarray) -> float:
    """The share of the true neighbours (n, k + 1) that were found; what was asked is no neighbour of itself."""
    hits = total = 0
    for one, other, row in zip(true, found, asked, strict=True):
        neighbours = [place for place in one.tolist() if place != row][: len(one) - 1]
        hits += len(set(neighbours).intersection(other.tolist()))
        total += len(neighbours)
    return hits / total


@dataclass(frozen=True)
class SearchIndex:
    """An index on the disk, opened."""

    folder: Path
    info: Mapping[str, Any]
    """The content of index.json"""
    _index: Any

    @classmethod
    def open(cls, folder: Path) -> "SearchIndex":
        """Opens an index; large ones are read as they are searched.

        Raises:
            DataError: There is none, or a file is missing, damaged, or of another one.
        """
        try:
            info = json.loads((folder / INFO).read_text(encoding="utf-8"))
            count, dimension = info["vectors"], info["dimension"]
        except (OSError, ValueError, KeyError, TypeError) as problem:
            raise DataError(f"{folder}: got no readable {INFO}, expected an index of `hubgen data index`") from problem
        package, path = faiss(), folder / VECTORS
        try:
            index = package.read_index(str(path), package.IO_FLAG_MMAP if info["cells"] > 1 else 0)
        except RuntimeError as problem:
            raise DataError(f"{path}: cannot be read, expected the vectors of {INFO}") from problem
        if (index.ntotal, index.d) != (count, dimension):
            raise DataError(
                f"{path}: got {index.ntotal} vectors of {index.d}, expected {count} of {dimension} as {INFO} says"
            )
        return cls(folder, info, index)

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @cached_property
    def _rows(self) -> Any:
        table = read_table(self.folder / ROWS)
        if len(table) != len(self):
            raise DataError(f"{self.folder / ROWS}: got {len(table)} rows, expected {len(self)} as {INFO} says")
        return table

    def search(self, vectors: np.ndarray, count: int = 10, probes: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The nearest vectors of each of some.

        Args:
            vectors: (n, D), of any length but 0.
            count: k.
            probes: Cells to look into; `None`: as many as the index was measured to need.

        Returns:
            Cosines (n, k) float32, descending, and the rows (n, k) int64; k is at most the number of vectors. Where the
            cells hold fewer, the rows are -1.

        Raises:
            DataError: The vectors are of another dimension.
        """
        if vectors.ndim != 2 or vectors.shape[1] != self.info["dimension"]:
            raise DataError(
                f"{self.folder}: got a question of shape {vectors.shape}, expected vectors of "
                f"{self.info['dimension']} numbers, as {self.info['embedder'] or 'the embedder'} makes them"
            )
        if self.info["cells"] > 1:
            self._index.nprobe = min(probes or self.info["probes"], self.info["cells"])
        similarities, rows = self._index.search(unit(vectors), min(count, len(self)))
        return similarities, rows

    def shown(self, rows: Sequence[int]) -> list[dict[str, str | None]]:
        """key, caption and url of some rows."""
        found: list[dict[str, str | None]] = self._rows.take([row for row in rows if row >= 0]).to_pylist()
        return found
