"""Image-text folders: pictures with captions, all of them checked when the folder is opened.

The captions stand in metadata.jsonl, metadata.csv, metadata.parquet or text files, see `hubgen.data.metadata`.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from hubgen.checks import is_whole
from hubgen.data.errors import DataError
from hubgen.data.examples import BESIDE, MASK, Beside, CheckedExamples, check_size, counted
from hubgen.data.metadata import IMAGE, LeavesFolderError, Row, has_captions, has_metadata, read_rows
from hubgen.data.pictures import MAX_PIXELS, as_mask, decode_picture, on_white, read_picture
from hubgen.data.views import Size, pixels_of, square_view

TRAIN = "train"
# `datasets` finds splits by folder names that it knows, and "held_out" is none of them: builders write "test".
SPLIT_FOLDERS = {"held_out": ("held_out", "test")}

SHORTEST_SIDE = 8
"""Pixels that a picture has at least."""

_READING = "sRGB on white"  # part of the fingerprint: how a file becomes a picture


class ImageTextFolder(CheckedExamples, Dataset):
    """The examples of an image-text folder, all of it checked when it is opened; a map-style data set too.

    Each row has to name a picture inside the folder that no other row names, with a caption that is a non-empty string;
    each picture is decoded once. What fails raises `DataError` with file and row, or, with `on_error="skip"`, is left
    out and listed in `skipped`. A file name that leads out of the folder is an error always.

    Args:
        root: The folder.
        split: Name of a folder inside `root` to read instead; "held_out" also finds "test", and a folder without splits
            is "train", as `datasets` has it.
        size: Side of the square that `[row]` and `load_pixels` bring pictures to (central square, LANCZOS); None keeps
            them as they are.
        caption_column: Column of the caption; `captions` is read only beside "text". `None`: pictures need none.
        columns: Further columns of its tables to read, into `columns`.
        beside: Columns of further pictures, of which each row has one, of its picture's size.
        picture: Column of the picture itself.
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
        caption_column: str | None = "text",
        on_error: str = "fail",
        max_pixels: int = MAX_PIXELS,
        follow_links: bool = True,
        columns: Sequence[str] = (),
        beside: Sequence[str] = (),
        picture: str = IMAGE,
    ) -> None:
        if on_error not in ("fail", "skip"):
            raise DataError(f"`on_error`: got {on_error!r}, expected 'fail' or 'skip'")
        if size is not None and not is_whole(size):
            raise DataError(f"`size`: got {size!r}, expected a positive integer or None")
        self.size, self.max_pixels, self.follow_links, self.on_error = size, max_pixels, follow_links, on_error
        self.folder = _folder_of(Path(root), split, caption_column is not None)
        super().__init__(str(self.folder), columns, f"{_READING} {size} {caption_column}", beside)
        rows, self.without_row = read_rows(self.folder, caption_column, self._skip, columns, beside, picture)
        """`without_row`: how many pictures of the folder no row names."""
        for row in tqdm(rows, desc=f"check {self.folder.name}", disable=len(rows) < 5000, leave=False):
            try:
                content, picture_size = self._checked(row)
                further = {column: self._checked_beside(row, name, picture_size) for column, name in row.beside.items()}
            except LeavesFolderError:
                raise
            except DataError as problem:
                self._skip(problem)
                continue
            digest = hashlib.sha256(content).hexdigest()
            self._add(row.file_name, row.captions, picture_size, digest, row.repeats, row.columns, further)
        self.check_enough()

    def left_out(self) -> list[str]:
        """What a user has to be told about the folder: rows that were skipped, and pictures without a row."""
        lines = super().left_out()
        if self.without_row:
            lines.append(f"not used, {counted(self.without_row, 'picture')} of {self.folder} without a row")
        return lines

    def picture(self, row: int) -> Image.Image:
        """The picture of a row, RGB, upright and on white."""
        return on_white(read_picture(self.folder / self.file_names[row], self.max_pixels))

    def mask(self, row: int, column: str) -> Image.Image | None:
        """The mask that a column names for a row, "L" and of the picture's size; `None` where it names none.

        Raises:
            DataError: The column names no picture of this folder, or one of another size.
        """
        name = self.columns[column][row]
        if name is None:
            return None
        path = self.folder / str(name)
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise LeavesFolderError(f"{path} leaves the folder {self.folder}, expected a mask inside it")
        mask = as_mask(read_picture(path, self.max_pixels))
        return check_size(mask, str(path), self.sizes[row], self.file_names[row], MASK)

    def _further(self, row: int, column: str) -> Image.Image:
        return read_picture(self.folder / self.beside[column][row].name, self.max_pixels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The row: "pixel_values" (3, size, size) float32 in [-1, 1], "text", "captions" and "file_name"."""
        captions = self.captions[index]
        return {
            "pixel_values": self._pixels(index),
            "text": captions[0] if captions else "",
            "captions": captions,
            "file_name": self.file_names[index],
        }

    def load_pixels(self, indices: Sequence[int]) -> torch.Tensor:
        """Pictures at `indices`, (B, 3, size, size) float32 in [-1, 1]; raises `DataError` where their sizes differ."""
        pictures = [self._pixels(index) for index in indices]
        shapes = {tuple(picture.shape) for picture in pictures}
        if len(shapes) != 1:
            raise DataError(f"{self.folder}: got pictures of {sorted(shapes)}, expected one shape; give a size")
        return torch.stack(pictures)

    def _pixels(self, row: int) -> torch.Tensor:
        picture = self.picture(row)
        if self.size is not None:
            picture = square_view(self.sizes[row], self.size).of(picture)
        return pixels_of(picture)

    # ---- checks ----

    def _skip(self, problem: DataError) -> None:
        if self.on_error == "fail":
            raise problem
        self.skipped.append(str(problem))

    def _checked(self, row: Row) -> tuple[bytes, Size]:
        """The bytes of a row's picture, which is one that can be used, and its size."""
        content, picture = self._decoded(row, row.file_name)
        if min(picture.size) < SHORTEST_SIDE:
            found = f"{picture.width}x{picture.height}"
            name = f"{row.place}: {self.folder / row.file_name}"
            raise DataError(f"{name}: got {found} pixels, expected at least {SHORTEST_SIDE} on each side")
        return content, (picture.height, picture.width)

    def _checked_beside(self, row: Row, file_name: str, size: Size) -> Beside:
        """A further picture of a row, which is one that can be used."""
        content, picture = self._decoded(row, file_name)
        check_size(picture, f"{row.place}: {self.folder / file_name}", size, row.file_name, BESIDE)
        return Beside(file_name, hashlib.sha256(content).hexdigest())

    def _decoded(self, row: Row, file_name: str) -> tuple[bytes, Image.Image]:
        """The bytes of a file that a row names, and the picture in them."""
        path = self.folder / file_name
        name = f"{row.place}: {path}"
        if not self.follow_links and not path.resolve().is_relative_to(self.folder.resolve()):
            raise LeavesFolderError(f"{name} is a link out of the folder, expected a file inside it")
        if not path.is_file():
            raise DataError(f"{name}: no such file, expected a picture")
        try:
            content = path.read_bytes()
        except OSError as problem:
            raise DataError(f"{name}: not readable ({problem.strerror}), expected a picture") from problem
        return content, decode_picture(content, name, self.max_pixels)


def _folder_of(root: Path, split: str | None, captioned: bool) -> Path:
    if not root.is_dir():
        raise DataError(f"{root}: no such folder, expected pictures with a metadata.jsonl")
    inner = sorted(path.name for path in root.iterdir() if path.is_dir())
    if split is None:
        splits = [name for name in inner if has_metadata(root / name)]
        if splits and not has_metadata(root) and captioned:
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
    if split == TRAIN and not known & set(inner) and (has_captions(root) or (not captioned and root.is_dir())):
        return root
    raise DataError(f"`split`: got {split!r}, expected a folder of {root}: {', '.join(inner) or 'it has none'}")
