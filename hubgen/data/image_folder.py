"""Image-text folders: pictures with captions, all of them checked when the folder is opened.

The captions stand in metadata.jsonl, metadata.csv, metadata.parquet or text files, see `hubgen.data.metadata`.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from hubgen.checks import is_whole
from hubgen.data.errors import DataError
from hubgen.data.metadata import LeavesFolderError, Row, has_captions, has_metadata, read_rows
from hubgen.data.pictures import MAX_PIXELS, crop_to_square, decode_picture, on_white, read_picture, scale

TRAIN = "train"
# `datasets` finds splits by folder names that it knows, and "held_out" is none of them: builders write "test".
SPLIT_FOLDERS = {"held_out": ("held_out", "test")}

SHORTEST_SIDE = 8
"""Pixels that a picture has at least."""

SKIPPED_AT_MOST = 0.5
"""Share of rows that on_error="skip" leaves out before the folder as a whole counts as unusable."""

_TRANSFORM = "sRGB on white, central square, LANCZOS, 2"  # part of the fingerprint: how a file becomes pixels


class ImageTextFolder(Dataset):
    """Map-style data set of an image-text folder, all of it checked when it is opened.

    Each row has to name a picture inside the folder that no other row names, with a caption that is a non-empty string;
    each picture is decoded once. What fails raises `DataError` with file and row, or, with `on_error="skip"`, is left
    out and listed in `skipped`. A file name that leads out of the folder is an error always.

    Args:
        root: The folder.
        split: Name of a folder inside `root` to read instead; "held_out" also finds "test", and a folder without splits
            is "train", as `datasets` has it.
        size: Side of the square that pictures are brought to (central square, LANCZOS); None keeps them as they are.
        caption_column: Column of the caption; `captions` is read only beside "text".
        on_error: "fail" or "skip".
        max_pixels: Pixels of a picture at most.
        follow_links: Whether a picture may be a link to a file outside the folder, as in the Hub's cache and in
            git-annex; False refuses such.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str | None = None,
        size: int | None = None,
        caption_column: str = "text",
        on_error: str = "fail",
        max_pixels: int = MAX_PIXELS,
        follow_links: bool = True,
    ) -> None:
        if on_error not in ("fail", "skip"):
            raise DataError(f"`on_error`: got {on_error!r}, expected 'fail' or 'skip'")
        if size is not None and not is_whole(size):
            raise DataError(f"`size`: got {size!r}, expected a positive integer or None")
        self.size, self.max_pixels, self.follow_links, self.on_error = size, max_pixels, follow_links, on_error
        self.folder = _folder_of(Path(root), split)
        self.skipped: list[str] = []
        """One line for each row that was left out: file, row, what was found, what was expected."""
        self.file_names: list[str] = []
        self.texts: list[str] = []
        self.captions: list[list[str]] = []
        """Wordings of each picture's caption, the text first; a picture without others has one."""

        rows, self.without_row = read_rows(self.folder, caption_column, self._skip)
        """`without_row`: how many pictures of the folder no row names."""
        digest = hashlib.sha256(f"{_TRANSFORM} {size} {caption_column}\n".encode())
        for row in tqdm(rows, desc=f"check {self.folder.name}", disable=len(rows) < 5000, leave=False):
            try:
                content = self._checked(row)
            except LeavesFolderError:
                raise
            except DataError as problem:
                self._skip(problem)
                continue
            self.file_names.append(row.file_name)
            self.texts.append(row.captions[0])
            self.captions.append(row.captions)
            record = json.dumps([row.file_name, hashlib.sha256(content).hexdigest(), row.captions], ensure_ascii=False)
            digest.update(record.encode() + b"\n")
        self.fingerprint = digest.hexdigest()
        """sha256 over size, captions and the bytes of every picture, in the order of rows."""

        total = len(self.skipped) + len(self.file_names)
        if not self.file_names or len(self.skipped) > SKIPPED_AT_MOST * total:
            first = f"; the first: {self.skipped[0]}" if self.skipped else ""
            raise DataError(f"{self.folder}: {len(self.file_names)} of {total} rows can be used, expected most{first}")

    def left_out(self) -> list[str]:
        """What a user has to be told about the folder: rows that were skipped, and pictures without a row."""
        lines = [f"left out, {counted(len(self.skipped), 'row')} of {self.folder}:"] if self.skipped else []
        lines += [f"  {line}" for line in self.skipped]
        if self.without_row:
            lines.append(f"not used, {counted(self.without_row, 'picture')} of {self.folder} without a row")
        return lines

    def __len__(self) -> int:
        return len(self.file_names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The row: "pixel_values" (3, size, size) float32 in [-1, 1], "text", "captions" and "file_name"."""
        file_name = self.file_names[index]
        return {
            "pixel_values": self._pixels(file_name),
            "text": self.texts[index],
            "captions": self.captions[index],
            "file_name": file_name,
        }

    def load_pixels(self, indices: Sequence[int]) -> torch.Tensor:
        """Pictures at `indices`, (B, 3, size, size) float32 in [-1, 1]; raises `DataError` where their sizes differ."""
        pictures = [self._pixels(self.file_names[index]) for index in indices]
        shapes = {tuple(picture.shape) for picture in pictures}
        if len(shapes) != 1:
            raise DataError(f"{self.folder}: got pictures of {sorted(shapes)}, expected one shape; give a size")
        return torch.stack(pictures)

    def _pixels(self, file_name: str) -> torch.Tensor:
        picture = on_white(read_picture(self.folder / file_name, self.max_pixels))
        if self.size is not None:
            picture = scale(crop_to_square(picture), self.size)
        values = torch.from_numpy(np.array(picture))  # (H, W, 3) uint8
        return values.permute(2, 0, 1).float().div_(127.5).sub_(1.0).contiguous()

    # ---- checks ----

    def _skip(self, problem: DataError) -> None:
        if self.on_error == "fail":
            raise problem
        self.skipped.append(str(problem))

    def _checked(self, row: Row) -> bytes:
        """The bytes of a row's picture, which is one that can be used."""
        path = self.folder / row.file_name
        name = f"{row.place}: {path}"
        if not self.follow_links and not path.resolve().is_relative_to(self.folder.resolve()):
            raise LeavesFolderError(f"{name} is a link out of the folder, expected a file inside it")
        if not path.is_file():
            raise DataError(f"{name}: no such file, expected a picture")
        try:
            content = path.read_bytes()
        except OSError as problem:
            raise DataError(f"{name}: not readable ({problem.strerror}), expected a picture") from problem
        picture = decode_picture(content, name, self.max_pixels)
        if min(picture.size) < SHORTEST_SIDE:
            found = f"{picture.width}x{picture.height}"
            raise DataError(f"{name}: got {found} pixels, expected at least {SHORTEST_SIDE} on each side")
        return content


def counted(number: int, what: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def _folder_of(root: Path, split: str | None) -> Path:
    if not root.is_dir():
        raise DataError(f"{root}: no such folder, expected pictures with a metadata.jsonl")
    inner = sorted(path.name for path in root.iterdir() if path.is_dir())
    if split is None:
        splits = [name for name in inner if has_metadata(root / name)]
        if splits and not has_metadata(root):
            raise DataError(f"{root}: holds no metadata.jsonl, but splits: {', '.join(splits)}; name one of them")
        return root
    if split == ".":
        return root
    if PurePosixPath(split).name != split or split in ("", ".."):
        raise DataError(f"`split`: got {split!r}, expected the name of a folder in {root}")
    for name in SPLIT_FOLDERS.get(split, (split,)):
        if (root / name).is_dir():
            return root / name
    known = {name for names in SPLIT_FOLDERS.values() for name in names} | {"validation", "valid", "val", "dev"}
    if split == TRAIN and not known & set(inner) and has_captions(root):
        return root
    raise DataError(f"`split`: got {split!r}, expected a folder of {root}: {', '.join(inner) or 'it has none'}")
