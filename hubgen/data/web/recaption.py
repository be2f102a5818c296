"""Captions that a model writes for the pictures of shards, beside those that the web had.

    stage = Recaption.of("runs/captioner/captioner", beams=3)
    run(stage, stage.works(open_shards(folder)), folder)

Each row of a shard gets `COLUMNS`. A caption that is no good (`hubgen.captioning.generate`) is not stored, only its
mark; a row without a picture gets nothing. Training takes one caption or the other by `synthetic_captions`.

A batch is made of neighbouring rows of one shard, and on a CPU each worker computes on one thread, so that captions do
not depend on the engine, on the number of workers, or on where a run was stopped.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from PIL import Image

from hubgen.acceleration.device import choose_device
from hubgen.captioning.captioner import Captioner, open_captioner, open_parts
from hubgen.captioning.generate import STATUSES, Asked, check_asked, write_captions
from hubgen.captioning.templates import PROMPT
from hubgen.checks import whole
from hubgen.data.errors import DataError
from hubgen.data.web.decoding import pictures_of
from hubgen.data.web.shards import TABLE, StoredShard, table_columns, write_table
from hubgen.data.web.stages import STAGES, Stage, Work, works_on
from hubgen.formats.digests import file_digest

COLUMNS = ("synthetic_caption", "captioner", "prompt", "caption_status")
"""That the stage adds: the caption, null unless its status is `ok`; who wrote it; what was asked, null for a captioner
without questions; and the mark: ok, empty, repeating, cut_off, or unreadable of a picture that cannot be decoded"""
UNREADABLE = "unreadable"
DTYPES = ("float32", "bfloat16", "float16")
MARKS = "captions"
"""Field of `_stats.json`: how many captions have which mark"""


@dataclass
class Recaption(Stage):
    """Adds captions to the tables of a folder; `of` makes one and checks it."""

    model: str
    """Folder or Hub id"""
    revision: str | None
    """Commit of a model on the Hub"""
    captioner: str
    """What the column says: its name and a digest of its files, or its commit"""
    asked: Asked
    batch_size: int
    """Pictures at a time; the last bits of a product may depend on it, so it is part of the settings"""
    dtype: str
    _captioner: Captioner | None = field(default=None, init=False, repr=False, compare=False)
    _threads: int = field(default=0, init=False, repr=False, compare=False)

    name = "recaption"

    @classmethod
    def of(
        cls,
        model: str,
        *,
        prompt: str | None = None,
        beams: int = 1,
        max_new_tokens: int = Asked.max_new_tokens,
        batch_size: int = 16,
        dtype: str | None = None,
    ) -> "Recaption":
        """The stage of a captioner, of which config and processor are checked and no weights are read.

        Args:
            model: Folder or Hub id.
            prompt: The question; the usual one if not given, none for a captioner that takes none.
            beams: Of the search; 1 is greedy.
            max_new_tokens: Of a caption, at most; longer ones are marked `cut_off`.
            batch_size: Pictures at a time.
            dtype: One of `DTYPES`; by the device of this machine if not given.

        Raises:
            ValueError: The model is no captioner, its processor does not fit, or it cannot be asked so.
        """
        whole("batch_size", batch_size)
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"`dtype`: got {dtype!r}, expected one of {', '.join(DTYPES)}.")
        config, processor = open_parts(model)
        asked = Asked(prompt, max_new_tokens, beams)
        check_asked(config, processor, asked, model)
        if prompt is None and processor.chat_template is not None:
            asked = Asked(PROMPT, max_new_tokens, beams)
        folder = Path(model).expanduser()
        revision = None if folder.is_dir() else getattr(config, "_commit_hash", None)
        name = f"{folder.resolve().name}@{digest_of(folder)[:12]}" if folder.is_dir() else f"{model}@{revision}"
        return cls(model, revision, name, asked, batch_size, dtype or choose_device(None, None)[1])

    @property
    def settings(self) -> Mapping[str, Any]:  # type: ignore[override]
        """What captions follow from, beside the pictures."""
        return {
            "captioner": self.captioner,
            "prompt": self.asked.prompt,
            "beams": self.asked.beams,
            "max_new_tokens": self.asked.max_new_tokens,
            "batch_size": self.batch_size,
            "dtype": self.dtype,
        }

    def works(self, shards: Sequence[StoredShard]) -> list[Work]:
        """The work on shards.

        Raises:
            DataError: A shard has such columns from elsewhere, which would be lost.
        """
        for shard in shards:
            made = any(record["stage"] == self.name for record in shard.stats.get(STAGES, []))
            there = [] if made else sorted({*COLUMNS} & {*table_columns(shard.table)})
            if there:
                raise DataError(f"{shard.table}: has a column {there[0]!r} already, expected none: it would be lost")
        return works_on(shards, self)

    def setup(self) -> None:
        device, _ = choose_device(None, None)
        if device == "cpu":
            self._threads = torch.get_num_threads()
            torch.set_num_threads(1)
        captioner = open_captioner(self.model, getattr(torch, self.dtype), self.revision)
        captioner.model.to(device)
        self._captioner = captioner

    def close(self) -> None:
        self._captioner = None
        if self._threads:
            torch.set_num_threads(self._threads)

    def __call__(self, work: Work, folder: Path) -> dict[str, Any]:
        assert self._captioner is not None, "setup() has not been called"
        shard = StoredShard(work.source.parent, work.name)
        table = shard.read()
        values: dict[str, list[str | None]] = {name: [None] * len(table) for name in COLUMNS}
        pictures = _readable(shard, table, values["caption_status"])
        while batch := list(islice(pictures, self.batch_size)):
            rows, shown = zip(*batch, strict=True)
            for row, caption in zip(rows, write_captions(self._captioner, shown, self.asked), strict=True):
                values["synthetic_caption"][row] = caption.text if caption.status == "ok" else None
                values["caption_status"][row] = caption.status
        for row, status in enumerate(values["caption_status"]):
            if status is not None:
                values["captioner"][row], values["prompt"][row] = self.captioner, self.asked.prompt
        table = table.drop_columns([name for name in COLUMNS if name in table.column_names])
        for name in COLUMNS:
            table = table.append_column(name, pa.array(values[name], pa.string()))
        write_table(folder / f"{work.name}{TABLE}", table)
        marks = Counter(status for status in values["caption_status"] if status is not None)
        return {MARKS: {status: marks[status] for status in (*STATUSES, UNREADABLE) if marks[status]}}


def _readable(shard: StoredShard, table: Any, statuses: list[str | None]) -> Iterator[tuple[int, Image.Image]]:
    """Row and picture of each row that has one, RGB; one that cannot be decoded is noted among the statuses."""
    for row, picture in pictures_of(shard, table):
        if picture is None:
            statuses[row] = UNREADABLE
        else:
            yield row, picture


def digest_of(folder: Path) -> str:
    """Hexadecimal sha256 of all that a captioner in a folder says: its weights, configs and tokenizer."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".json", ".jinja", ".model", ".txt") and path.name != "training.json":
            digest.update(f"{path.name} {file_digest(path)}\n".encode())
    return digest.hexdigest()
