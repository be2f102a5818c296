"""Scores that follow from vectors of pictures and captions: `similarity`, LAION's tags, heads.

    scores = EmbeddingScores(Live(embedder("clip:openai/clip-vit-base-patch32")), tags=True)
    stage = Score((scores,))             # similarity, nsfw, under_age_prompts, animal_prompts

The vectors are computed (`Live`), or were by `hubgen data embed` (`Stored`). A row without a picture, or with one that
cannot be decoded, has null for all scores, and one without a caption has no similarity.

On a CPU, a worker computes on one thread, so that scores do not depend on how many workers there are.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from hubgen.acceleration.device import choose_device
from hubgen.data.errors import DataError
from hubgen.data.web.decoding import pictures_of
from hubgen.data.web.embedding.embedders import BATCH, Embedder, embedder
from hubgen.data.web.embedding.embeddings import StoredEmbeddings
from hubgen.data.web.scoring.heads import Head, read_head
from hubgen.data.web.scoring.scores import Part
from hubgen.data.web.scoring.tags import COLUMNS, PROMPTS, Tags
from hubgen.data.web.shards import STATS, StoredShard, read_stats, read_table
from hubgen.data.web.stages import STAGES
from hubgen.formats.digests import file_digest

AS_ONE = 1e-5
"""How far from 1 a length may be that single precision makes of 1; halves are farther, and brought to it"""


class Vectors(ABC):
    """Where vectors come from."""

    embedder: Embedder | None
    """Of texts; `None`: those of the captions are given too"""
    name: str
    """Of what made the vectors"""
    dimension: int

    @property
    @abstractmethod
    def settings(self) -> Mapping[str, Any]:
        """All that they follow from beside the shard."""

    def prepare(self, *, texts: bool, captions: bool) -> None:  # noqa: B027
        """Says what will be asked for: captions' vectors, and those of texts beside them.

        Raises:
            DataError: The model that this needs cannot be had here.
        """

    def check(self, shards: Sequence[StoredShard]) -> None:  # noqa: B027
        """Raises DataError where a shard has no vectors."""

    def setup(self) -> None:
        """Loads the model, if one is needed."""
        if self.embedder is not None:
            self.embedder.setup()

    @abstractmethod
    def pictures(self, shard: StoredShard, table: Any) -> tuple[list[int], Any]:
        """The rows that have a vector, in order, and these: (N, D) float32, of length 1."""

    def captions(self, shard: StoredShard, table: Any, rows: Sequence[int]) -> Any:
        """(N, D) float32, of length 1, of these rows' captions."""
        return self.texts(table.column("caption").take(pa.array(rows, pa.int64())).to_pylist())

    def texts(self, texts: Sequence[str]) -> Any:
        """(N, D) float32, of length 1."""
        assert self.embedder is not None
        return self.embedder.texts(texts)


class Live(Vectors):
    """Computed as they are needed."""

    def __init__(self, embedder: Embedder) -> None:
        self.embedder, self.name, self.dimension = embedder, embedder.name, embedder.dimension

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.embedder.settings  # type: ignore[union-attr]

    def pictures(self, shard: StoredShard, table: Any) -> tuple[list[int], Any]:
        assert self.embedder is not None
        shown = ((row, picture) for row, picture in pictures_of(shard, table) if picture is not None)
        rows: list[int] = []
        parts = [np.empty((0, self.dimension), np.float32)]
        while batch := list(islice(shown, BATCH)):
            rows += [row for row, _ in batch]
            parts.append(self.embedder.pictures([picture for _, picture in batch]))
        vectors = np.concatenate(parts)
        if vectors.shape != (len(rows), self.dimension):
            raise DataError(f"{self.name}: got vectors {vectors.shape}, expected {(len(rows), self.dimension)}")
        bad = ~np.isfinite(vectors).all(axis=1)
        if bad.any():
            key = table.column("key")[rows[int(bad.argmax())]].as_py()
            raise DataError(f"{shard.tar}: {key}: got no finite numbers from {self.name}, expected some")
        return rows, vectors


class Stored(Vectors):
    """Read from a folder of `hubgen data embed`.

    Args:
        folder: Of the vectors, and of those of the captions if they were asked for; otherwise the model that made the
            vectors is needed for captions.

    Raises:
        DataError: The folder is damaged, or of another program.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._stored = folder, StoredEmbeddings.open(folder)
        self.dimension = self._stored.dimension
        if self._stored.embedder is None:
            raise DataError(
                f"{folder}: got no record of what made the vectors, expected a folder of `hubgen data embed`"
            )
        self.name = self._stored.embedder
        self._parts = {part.table.stem: part for part in self._stored.parts}
        self._has_captions = bool(self._stored.settings.get("texts"))
        self.embedder = None

    def prepare(self, *, texts: bool, captions: bool) -> None:
        if texts or (captions and not self._has_captions):
            self.embedder = self._same_model()

    def _same_model(self) -> Embedder:
        """What made the vectors."""
        made_with = self._stored.settings
        one = embedder(self.name, dtype=made_with.get("dtype", "float32"))
        for key, value in one.settings.items():
            if made_with.get(key) != value:
                raise DataError(f"{self.folder}: was made with {key} {made_with.get(key)}, and here it is {value}")
        return one

    @property
    def settings(self) -> Mapping[str, Any]:
        """The embedder's, and a digest of what the parts were made from."""
        records = []
        for name in sorted(self._parts):
            record = read_stats(self.folder / f"{name}{STATS}")[STAGES][0]
            records.append([name, record["input"], record["output"]])
        digest = hashlib.sha256(json.dumps(records).encode()).hexdigest()
        return {**self._stored.settings, "embeddings": digest}

    def check(self, shards: Sequence[StoredShard]) -> None:
        for shard in shards:
            part, expected = self._parts.get(shard.name), shard.stats["successes"]
            if part is None:
                raise DataError(f"{self.folder}: got no {shard.name}.npy, expected the vectors of {shard.table}")
            if part.rows != expected:
                raise DataError(
                    f"{part.vectors}: got {part.rows} vectors, expected {expected}, the pictures of {shard.table}"
                )

    def pictures(self, shard: StoredShard, table: Any) -> tuple[list[int], Any]:
        part = self._parts[shard.name]
        offsets = table.column("offset").to_pylist()
        rows = [row for row, offset in enumerate(offsets) if offset is not None]
        keys, own = table.column("key").to_pylist(), read_table(part.table, ["key"]).column("key").to_pylist()
        for row, key in zip(rows, own, strict=True):
            if keys[row] != key:
                raise DataError(
                    f"{part.table}: got the key {key}, expected {keys[row]}, the next picture of {shard.tar}"
                )
        return rows, unit(part.read(), str(part.vectors))

    def captions(self, shard: StoredShard, table: Any, rows: Sequence[int]) -> Any:
        if not self._has_captions:
            return super().captions(shard, table, rows)
        part = self._parts[shard.name]
        places = np.cumsum(table.column("offset").is_valid().to_numpy()) - 1  # of a row among those with a picture
        return unit(part.read(texts=True), str(part.texts))[places[np.array(rows, np.int64)]]


def unit(vectors: Any, name: str) -> Any:
    """Vectors of length 1; those that have it, but for rounding, stay as they are.

    Raises:
        DataError: One has length 0.
    """
    lengths = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))
    if (lengths == 0).any():
        raise DataError(f"{name}: got a vector of length 0 in row {int(lengths.argmin())}, expected length 1")
    scale = np.where(np.abs(lengths - 1) > AS_ONE, lengths, 1.0)
    return (vectors / scale[:, None]).astype(np.float32)


def cosines(pictures: Any, texts: Any) -> Any:
    """(N,) float32, of vectors of length 1; added up in double precision, so that batches make no difference."""
    return np.einsum("nd,nd->n", pictures, texts, dtype=np.float64).astype(np.float32)


@dataclass
class EmbeddingScores(Part):
    """Scores of vectors.

    Args:
        vectors: Where they come from.
        similarity: Whether the cosine of picture and caption is a column: `similarity` of a CLIP, `conse_similarity` of
            ConSE, whose numbers mean something else.
        tags: Whether LAION's tags are; see `hubgen.data.web.scoring.tags`.
        heads: Names of further columns, and the files of their networks; see `hubgen.data.web.scoring.heads`.

    Raises:
        DataError: Tags are asked of another model than a CLIP, or a head does not fit.
    """

    vectors: Vectors
    similarity: bool = True
    tags: bool = False
    heads: tuple[tuple[str, Path], ...] = ()

    def __post_init__(self) -> None:
        if self.tags and not self.is_clip:
            raise DataError(f"tags: got the scorer {self.vectors.name}, expected a CLIP: the prompts are for it alone")
        for name, path in self.heads:
            head = read_head(path)
            if head.dimension != self.vectors.dimension:
                raise DataError(
                    f"{path}: got a head {name} for vectors of {head.dimension} numbers, expected "
                    f"{self.vectors.dimension}, those of {self.vectors.name}"
                )
        self.vectors.prepare(texts=self.tags, captions=self.similarity)
        self.reads = ("caption",) if self.similarity else ()
        self._settings = {f"head {name}": file_digest(path) for name, path in self.heads}

    @property
    def is_clip(self) -> bool:
        """Whether the vectors are those of a CLIP or SigLIP."""
        return self.vectors.name.startswith("clip:")

    @property
    def similarity_name(self) -> str:
        """What the column of cosines is called."""
        return "similarity" if self.is_clip else f"{self.vectors.name.partition(':')[0]}_similarity"

    @property
    def columns(self) -> Mapping[str, Any]:
        lists = pa.list_(pa.int8())
        return {
            **({self.similarity_name: pa.float32()} if self.similarity else {}),
            **(dict(zip(COLUMNS, (pa.string(), lists, lists), strict=True)) if self.tags else {}),
            **{name: pa.float32() for name, _ in self.heads},
        }

    @property
    def settings(self) -> Mapping[str, Any]:
        return {**self.vectors.settings, **self._settings}

    def check(self, shards: Sequence[StoredShard]) -> None:
        self.vectors.check(shards)

    def setup(self) -> None:
        self._threads = torch.get_num_threads()
        if choose_device(None, None)[0] == "cpu":
            torch.set_num_threads(1)
        self.vectors.setup()
        self._tags = Tags(self.vectors.texts(PROMPTS)) if self.tags else None
        self._heads: dict[str, Head] = {name: read_head(path) for name, path in self.heads}

    def close(self) -> None:
        torch.set_num_threads(self._threads)

    def __call__(self, shard: StoredShard, table: Any) -> Mapping[str, Any]:
        rows, pictures = self.vectors.pictures(shard, table)
        values: dict[str, list[Any]] = {name: [None] * len(table) for name in self.columns}

        def note(name: str, places: Sequence[int], found: Sequence[Any]) -> None:
            for row, value in zip(places, found, strict=True):
                values[name][row] = value

        if self.similarity:
            texts = table.column("caption").to_pylist()
            paired = [place for place, row in enumerate(rows) if (texts[row] or "").strip()]
            places = [rows[place] for place in paired]
            found = self.vectors.captions(shard, table, places)
            note(self.similarity_name, places, cosines(pictures[paired], found))
        if self._tags is not None:
            for name, tags in self._tags.columns(pictures).items():
                note(name, rows, tags)
        for name, head in self._heads.items():
            note(name, rows, head(pictures))
        return values
