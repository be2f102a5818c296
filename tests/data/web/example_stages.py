"""Stages for tests of the engines; fresh processes import them from here."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute

from hubgen.data.web.shards import TABLE, read_table, write_table
from hubgen.data.web.stages import Stage, Work


@dataclass(frozen=True)
class CaptionLengths(Stage):
    """Adds the length of each caption to the tables of a folder."""

    factor: int = 1
    raises: tuple[str, ...] = ()
    """Shards that cannot be done"""
    dies: tuple[str, ...] = ()
    """Shards that take their process with them"""
    once: Path | None = None
    """Folder where a death is noted, which then is the only one"""

    needs: str | None = None
    """A file that `setup` reads"""

    name = "caption_lengths"

    def setup(self) -> None:
        if self.needs is not None:
            Path(self.needs).read_bytes()

    @property
    def settings(self) -> Mapping[str, Any]:  # type: ignore[override]
        return {"factor": self.factor}

    def __call__(self, work: Work, folder: Path) -> dict[str, Any]:
        if work.name in self.raises:
            raise RuntimeError(f"shard {work.name} cannot be done")
        if work.name in self.dies:
            note = None if self.once is None else self.once / work.name
            if note is None or not note.exists():
                if note is not None:
                    note.touch()
                os._exit(9)
        table = read_table(work.source)
        if "length" in table.column_names:
            table = table.drop_columns(["length"])
        length = pa.compute.multiply(pa.compute.utf8_length(table.column("caption")), self.factor)
        write_table(folder / f"{work.name}{TABLE}", table.append_column("length", length))
        return {"longest": pa.compute.max(length).as_py()}


@dataclass(frozen=True)
class Devices(CaptionLengths):
    """Notes which GPUs its process may see; a process waits for one that sees others."""

    notes: Path = Path()
    """Folder that holds a file for each"""

    def __call__(self, work: Work, folder: Path) -> dict[str, Any]:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
        (self.notes / f"gpu-{seen}").touch()
        until = time.monotonic() + 60
        while len(list(self.notes.glob("gpu-*"))) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        return super().__call__(work, folder) | {"gpu": seen}
