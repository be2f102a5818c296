"""Vectors of the pictures of shards, in files: written by a stage, read without loading them all.

    00012.npy           (rows, D), float16 or float32: a vector of length 1 for each row of the shard with a picture
    00012.text.npy      likewise, of the captions, if they were asked for
    00012.parquet       key, caption, url of these rows, in the same order
    00012_stats.json    the commit of the shard (`stages`), and what the vectors were made with

    run(Embed(embedder("clip:openai/clip-vit-base-patch32")), works, folder)
    stored = StoredEmbeddings.open(folder)
    for start, vectors in stored.blocks(): ...                     # (n, D) float32

LAION published its embeddings so, npy beside parquet. `StoredEmbeddings` reads the folders of clip-retrieval too
(img_emb/img_emb_0.npy, text_emb/text_emb_0.npy, metadata/metadata_0.parquet; https://github.com/rom1504/clip-retrieval).
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from hubgen.data.errors import DataError
from hubgen.data.web.decoding import pictures_of
from hubgen.data.web.embedding.embedders import BATCH, Embedder
from hubgen.data.web.shards import (
    READY,
    STATS,
    TABLE,
    StoredShard,
    read_stats,
    read_table,
    shard_names,
    table_columns,
    table_rows,
    write_table,
)
from hubgen.data.web.stages import STAGES, Stage, Work
from hubgen.formats.digests import file_digest

VECTORS, TEXTS = ".npy", ".text.npy"
SHOWN = ("key", "caption", "url")
"""Columns that go with the vectors, those of them that the shard has"""
SEEN = ("key", "status", "offset", "size", "caption", "url", "md5", "sha256", "sha512")
"""Columns that vectors follow from, or that tell that pictures are others; further columns may come later"""


@dataclass(frozen=True)
class Embed(Stage):
    """Writes the vectors of a folder of shards to another one.

    A picture that cannot be read makes the shard fail: what a download wrote can be.
    """

    embedder: Embedder
    texts: bool = False
    """Whether captions are embedded too"""
    dtype: str = "float16"
    """Of the files: float16, which changes a cosine by less than 0.0005, or float32"""

    name = "embed"

    def __post_init__(self) -> None:
        if self.dtype not in ("float16", "float32"):
            raise DataError(f"dtype: got {self.dtype!r}, expected float16 or float32")

    @property
    def settings(self) -> Mapping[str, Any]:  # type: ignore[override]
        """The embedder's, and what is written."""
        return {**self.embedder.settings, "texts": self.texts, "stored": self.dtype}

    def works(self, shards: Sequence[StoredShard]) -> list[Work]:
        """The input of each shard. Columns that other stages add to it change nothing.

        Raises:
            DataError: Captions are asked for, and a shard has none.
        """
        if self.texts:
            for shard in shards:
                columns = table_columns(shard.table)
                if "caption" not in columns:
                    raise DataError(f"{shard.table}: got the columns {columns}, expected 'caption' too")
        return [Work(one.number, one.table, 0, one.stats["count"], digest_of(one)) for one in shards]

    def setup(self) -> None:
        """Loads the model."""
        self.embedder.setup()

    def __call__(self, work: Work, folder: Path) -> dict[str, Any]:
        """Writes the shard's vectors and their table; see `Stage`."""
        shard = StoredShard(work.source.parent, work.name)
        found = table_columns(shard.table)
        table = shard.read([*(name for name in SHOWN if name in found), "offset", "size"])
        table = table.filter(pa.compute.is_valid(table.column("offset")))
        files = {VECTORS: np.empty((len(table), self.embedder.dimension), self.dtype)}
        if self.texts:
            files[TEXTS] = np.empty_like(files[VECTORS])
        decoded = pictures_of(shard, table)
        for start in range(0, len(table), BATCH):
            rows = table.slice(start, BATCH).to_pylist()
            pictures = []
            for row, (_, picture) in zip(rows, islice(decoded, len(rows)), strict=True):
                if picture is None:
                    raise DataError(f"{shard.tar}: {row['key']}: is no picture that can be decoded")
                pictures.append(picture)
            files[VECTORS][start : start + BATCH] = self.embedder.pictures(pictures)
            if self.texts:
                files[TEXTS][start : start + BATCH] = self.embedder.texts([row["caption"] or "" for row in rows])
        for ending, vectors in files.items():
            np.save(folder / f"{work.name}{ending}", vectors)
        write_table(folder / f"{work.name}{TABLE}", table.drop_columns(["offset", "size"]))
        return {"count": len(table), "dimension": self.embedder.dimension}


def digest_of(shard: StoredShard) -> str:
    """Of the pictures and captions of a shard, from its table."""
    found = table_columns(shard.table)
    table = shard.read([name for name in SEEN if name in found or name in ("offset", "size")])
    content = {name: table.column(name).to_pylist() for name in sorted(table.column_names)}
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


# ---- reading ----


@dataclass(frozen=True)
class StoredPart:
    """The vectors of one shard, on the disk."""

    vectors: Path
    table: Path
    texts: Path | None
    rows: int

    @cached_property
    def columns(self) -> list[str]:
        return table_columns(self.table)

    def read(self, start: int = 0, stop: int | None = None, texts: bool = False) -> np.ndarray:
        """(n, D) float32 of some rows, of the captions for `texts`.

        Raises:
            DataError: A number among them is none, or infinite; or there are no vectors of captions.
        """
        path = self.texts if texts else self.vectors
        if path is None:
            raise DataError(f"{self.vectors}: got no vectors of captions beside it, expected some")
        vectors = np.asarray(np.load(path, mmap_mode="r")[start:stop], np.float32)
        bad = ~np.isfinite(vectors).all(axis=1)
        if bad.any():
            row = int(bad.argmax())
            value = vectors[row][~np.isfinite(vectors[row])][0]
            raise DataError(f"{path}: got {value} in row {start + row}, expected finite numbers")
        return vectors


@dataclass(frozen=True)
class StoredEmbeddings:
    """The vectors of a folder, all of the same length; rows are numbered through its parts, in their order."""

    folder: Path
    parts: tuple[StoredPart, ...]
    dimension: int
    """D"""
    settings: Mapping[str, Any]
    """Of the stage that wrote them; empty if another program did"""

    @classmethod
    def open(cls, folder: Path) -> "StoredEmbeddings":
        """Opens a folder; lengths and dimensions of all parts are checked, numbers only as they are read.

        Raises:
            DataError: It has no vectors; a file is missing, damaged, or fits no other: in rows its table, in dimension
                or settings the first.
        """
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder, expected one of embeddings (00000.npy, 00000.parquet, ...)")
        moving = sorted(folder.glob(f"{READY}*"))
        if moving:
            raise DataError(f"{moving[0]}: a run was stopped before this part was in its place; start it again")
        if (folder / "img_emb").is_dir():
            found, settings = _of_clip_retrieval(folder), dict[str, Any]()
        else:
            found, settings = _of_shards(folder)
        if not found:
            raise DataError(f"{folder}: got no embeddings, expected 00000.npy, 00000.parquet and 00000{STATS}")
        parts, dimension = [], None
        for vectors, table, texts in found:
            rows = table_rows(table)
            for path in (vectors, texts):
                if path is not None:
                    dimension = _check(path, rows, table, dimension)
            parts.append(StoredPart(vectors, table, texts, rows))
        assert dimension is not None
        return cls(folder, tuple(parts), dimension, settings)

    def __len__(self) -> int:
        return sum(part.rows for part in self.parts)

    @property
    def embedder(self) -> str | None:
        """The name of what made them, if it is known."""
        return self.settings.get("embedder")

    def blocks(self, rows: int = 65_536) -> Iterator[tuple[int, np.ndarray]]:
        """All vectors in order, at most `rows` at a time: number of the first row, and (n, D) float32.

        Raises:
            DataError: A number is none, or infinite.
        """
        before = 0
        for part in self.parts:
            for start in range(0, part.rows, rows):
                yield before + start, part.read(start, min(start + rows, part.rows))
            before += part.rows

    def table(self) -> Any:
        """key, caption and url of all rows in order (`pyarrow.Table`); what a part lacks is null, and the key "12"."""
        tables, before = [], 0
        for part in self.parts:
            table = read_table(part.table, [name for name in SHOWN if name in part.columns])
            columns = {}
            for name in SHOWN:
                if name in table.column_names:
                    columns[name] = table.column(name).cast(pa.string())
                elif name == "key":
                    columns[name] = pa.array([str(before + row) for row in range(part.rows)], pa.string())
                else:
                    columns[name] = pa.nulls(part.rows, pa.string())
            tables.append(pa.table(columns))
            before += part.rows
        return pa.concat_tables(tables)

    def digest(self) -> str:
        """Of all vectors and tables; they are read for it."""
        sums = hashlib.sha256()
        for part in self.parts:
            for path in (part.vectors, part.table):
                sums.update(bytes.fromhex(file_digest(path)))
        return sums.hexdigest()


Found = list[tuple[Path, Path, Path | None]]


def _of_shards(folder: Path) -> tuple[Found, dict[str, Any]]:
    """Files of vectors, of their tables, and of captions, as `Embed` writes them; and its settings."""
    names = shard_names(folder)
    found: Found = []
    settings: dict[str, Any] = {}
    for path in sorted(folder.glob(f"[0-9]*{VECTORS}")):
        if path.name.split(".")[0] not in names:
            raise DataError(
                f"{path}: got no {path.name.split('.')[0]}{STATS} beside it; start `hubgen data embed` again"
            )
    for name in names:
        path = folder / f"{name}{STATS}"
        records = [one for one in read_stats(path).get(STAGES, []) if one.get("stage") == Embed.name]
        if not records:
            raise DataError(f"{path}: got no record of embeddings, expected a folder of `hubgen data embed`")
        settings = settings or records[0]["settings"]
        if records[0]["settings"] != settings:
            raise DataError(f"{path}: got the settings {records[0]['settings']}, expected {settings}, of {names[0]}")
        texts = folder / f"{name}{TEXTS}" if settings.get("texts") else None
        found.append((folder / f"{name}{VECTORS}", folder / f"{name}{TABLE}", texts))
    return found, settings


def _of_clip_retrieval(folder: Path) -> Found:
    """The same of a folder of clip-retrieval."""
    found: Found = []
    files = {path: re.fullmatch(r"img_emb_(\d+)\.npy", path.name) for path in (folder / "img_emb").iterdir()}
    numbered = sorted((int(match[1]), match[1], path) for path, match in files.items() if match)
    for _, number, path in numbered:
        texts = folder / "text_emb" / f"text_emb_{number}.npy"
        found.append((path, folder / "metadata" / f"metadata_{number}.parquet", texts if texts.exists() else None))
    return found


def _check(path: Path, rows: int, table: Path, dimension: int | None) -> int:
    """The dimension of a file of vectors.

    Raises:
        DataError: It is damaged, or has another shape than `rows` and `dimension` ask for.
    """
    try:
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as problem:
        raise DataError(f"{path}: not a readable npy file ({' '.join(str(problem).split())[:200]})") from problem
    if vectors.ndim != 2 or vectors.dtype not in (np.float16, np.float32):
        raise DataError(f"{path}: got {vectors.dtype} {vectors.shape}, expected (rows, D) of float16 or float32")
    if len(vectors) != rows:
        raise DataError(f"{path}: got {len(vectors)} vectors, expected {rows}, the rows of {table.name}")
    if dimension is not None and vectors.shape[1] != dimension:
        raise DataError(f"{path}: got vectors of {vectors.shape[1]} numbers, expected {dimension} as in the first file")
    return int(vectors.shape[1])
