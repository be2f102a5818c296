"""Folders that are made of an image-text folder: begun once, finished by whoever calls again, split by split."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hubgen.data.errors import DataError
from hubgen.data.image_folder import ImageTextFolder
from hubgen.data.metadata import METADATA, has_metadata
from hubgen.formats.atomic import written

LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "build.json")


def splits_of(source: Path) -> dict[str, ImageTextFolder]:
    """The splits of an image-text folder by name, or the one in the folder itself as ".".

    Raises:
        DataError: `source` is no such folder.
    """
    if not source.is_dir():
        raise DataError(f"{source}: no such folder, expected an image-text folder")
    splits = [path.name for path in sorted(source.iterdir()) if path.is_dir() and has_metadata(path)]
    return {split: ImageTextFolder(source, split) for split in splits} or {".": ImageTextFolder(source)}


def begin(out: Path, described: Mapping[str, Any], name: str) -> None:
    """Begins a folder, or goes on with one that was begun for the same.

    Args:
        out: A folder that there is not yet, or what an interrupted run has left of it.
        described: What it is made of, as JSON values.
        name: Of the file in it that says so.

    Raises:
        DataError: It holds something else.
    """
    begun, text = out / name, json.dumps(described, indent=2, ensure_ascii=False) + "\n"
    if out.exists() and any(out.iterdir()) and not begun.is_file():
        raise DataError(f"{out}: holds other files, expected a new or empty folder")
    if begun.is_file() and json.loads(begun.read_text(encoding="utf-8")) != json.loads(text):
        raise DataError(f"{out}: was begun with other {begun.stem} ({name}), expected a new or empty folder")
    out.mkdir(parents=True, exist_ok=True)
    write_text(begun, text)


def copy_licences(source: Path, out: Path) -> None:
    """Copies what says whose the pictures of a folder are."""
    for pattern in LICENCES:
        for path in source.glob(pattern):
            shutil.copyfile(path, out / path.name)


def write_table(out: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes the rows of a split, which makes it whole."""
    write_text(out / METADATA[0], "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_text(path: Path, text: str) -> None:
    """Writes a file, whole or not at all."""
    with written(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
