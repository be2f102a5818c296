"""Image-text folders: pictures beside a `metadata.jsonl` with a row for each.

    {"file_name": "blue-heart-1f499.png", "text": "blue heart", "captions": ["blue heart", "a blue heart"]}

The layout is that of `datasets`' imagefolder. `captions` (other wordings, the first is the text) is optional, and so is
every further column.
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
from hubgen.data.pictures import MAX_PIXELS, crop_to_square, decode_picture, on_white, scale

METADATA = "metadata.jsonl"

# `datasets` finds splits by folder names that it knows, and "held_out" is none of them: builders write "test".
SPLIT_FOLDERS = {"held_out": ("held_out", "test")}

SKIPPED_AT_MOST = 0.5
"""Share of rows that on_error="skip" leaves out before the folder as a whole counts as unusable."""

_TRANSFORM = "on white, central square, LANCZOS, 1"  # part of the fingerprint: how a file becomes pixels


class ImageTextFolder(Dataset):
    """Map-style data set of an image-text folder, all of it checked when it is opened.

    Each row has to name a picture inside the folder that no other row names, with a caption that is a non-empty string;
    each picture is decoded once. What fails raises `DataError` with the row's line number, or, with `on_error="skip"`,
    is left out and listed in `skipped`. A path that leaves the folder is an error always.

    Args:
        root: The folder.
        split: Name of a folder inside `root` to read instead; "held_out" also finds "test".
        size: Side of the square that pictures are brought to (central square, LANCZOS); None keeps them as they are.
        caption_column: Column of the caption; `captions` is read only beside "text".
        on_error: "fail" or "skip".
        max_pixels: Pixels of a picture at most.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str | None = None,
        size: int | None = None,
        caption_column: str = "text",
        on_error: str = "fail",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        if on_error not in ("fail", "skip"):
            raise DataError(f"`on_error`: got {on_error!r}, expected 'fail' or 'skip'")
        if size is not None and not is_whole(size):
            raise DataError(f"`size`: got {size!r}, expected a positive integer or None")
        self.size = size
        self.max_pixels = max_pixels
        self.folder = _folder_of(Path(root), split)
        self.skipped: list[str] = []
        """One line for each row that was left out: file, row, what was found, what was expected."""
        self.file_names: list[str] = []
        self.texts: list[str] = []
        self.captions: list[list[str]] = []
        """Wordings of each picture's caption, the text first; a picture without others has one."""

        rows = self._read_rows(caption_column, on_error)
        digest = hashlib.sha256(f"{_TRANSFORM} {size} {caption_column}\n".encode())
        bar = tqdm(rows, desc=f"check {self.folder.name}", disable=len(rows) < 5000, leave=False)
        for number, file_name, wordings in bar:
            try:
                content = self._read_file(number, file_name)
                decode_picture(content, self._place(number, file_name), self.max_pixels)
            except _LeavesFolder:
                raise
            except DataError as problem:
                self._fail(problem, on_error)
                continue
            self.file_names.append(file_name)
            self.texts.append(wordings[0])
            self.captions.append(wordings)
            row = json.dumps([file_name, hashlib.sha256(content).hexdigest(), wordings], ensure_ascii=False)
            digest.update(row.encode() + b"\n")
        self.fingerprint = digest.hexdigest()
        """sha256 over size, captions and the bytes of every picture, in the order of rows."""

        total = len(self.skipped) + len(self.file_names)
        if not self.file_names or len(self.skipped) > SKIPPED_AT_MOST * total:
            first = f"; the first: {self.skipped[0]}" if self.skipped else ""
            raise DataError(
                f"{self.folder / METADATA}: {len(self.file_names)} of {total} rows can be used, expected most{first}"
            )

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
        path = self.folder / file_name
        try:
            picture = on_white(decode_picture(path.read_bytes(), str(path), self.max_pixels))
        except OSError as problem:
            raise DataError(f"{path}: no longer readable ({problem.strerror})") from problem
        if self.size is not None:
            picture = scale(crop_to_square(picture), self.size)
        values = torch.from_numpy(np.array(picture))  # (H, W, 3) uint8
        return values.permute(2, 0, 1).float().div_(127.5).sub_(1.0).contiguous()

    # ---- checks ----

    def _place(self, number: int, file_name: str | None = None) -> str:
        place = f"{self.folder / METADATA} row {number}"
        return place if file_name is None else f"{place}: {self.folder / file_name}"

    def _fail(self, problem: DataError, on_error: str) -> None:
        if on_error == "fail":
            raise problem
        self.skipped.append(str(problem))

    def _read_rows(self, caption_column: str, on_error: str) -> list[tuple[int, str, list[str]]]:
        """(line number, file name, wordings) of the rows that are in order, before any picture is opened."""
        path = self.folder / METADATA
        if not path.is_file():
            raise DataError(f"{path}: no such file, expected a row of file_name and {caption_column} for each picture")
        rows: list[tuple[int, str, list[str]]] = []
        first_row: dict[str, int] = {}
        for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
            if not line.strip():
                continue
            try:
                file_name, wordings = self._read_row(number, line, caption_column)
                known = first_row.setdefault(file_name, number)
                if known != number:
                    raise DataError(f"{self._place(number)}: {file_name} stands in row {known} already, expected once")
            except _LeavesFolder:
                raise
            except DataError as problem:
                self._fail(problem, on_error)
                continue
            rows.append((number, file_name, wordings))
        if not rows and not self.skipped:
            raise DataError(f"{path}: got no rows, expected one for each picture")
        return rows

    def _read_row(self, number: int, line: bytes, caption_column: str) -> tuple[str, list[str]]:
        place = self._place(number)
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as problem:
            raise DataError(
                f"{place}: not UTF-8 (byte {problem.start + 1} of the row), expected a JSON object"
            ) from None
        except (ValueError, RecursionError) as problem:
            raise DataError(f"{place}: not JSON ({problem}), expected an object") from None
        if not isinstance(row, dict):
            raise DataError(f"{place}: got {_kind(row)}, expected a JSON object")
        file_name = self._inside(place, _text_in(row, "file_name", place))
        text = _text_in(row, caption_column, place)
        others = row.get("captions") if caption_column == "text" else None
        if others is None:
            return file_name, [text]
        if not isinstance(others, list):
            raise DataError(f"{place}: captions is {_kind(others)}, expected a list of strings")
        for position, wording in enumerate(others):
            _text_in({f"captions[{position}]": wording}, f"captions[{position}]", place)
        return file_name, list(dict.fromkeys([text, *others]))

    def _inside(self, place: str, file_name: str) -> str:
        """The file name in its plain form; two spellings of one path come out the same."""
        pure = PurePosixPath(file_name)
        if pure.is_absolute() or ".." in pure.parts or Path(file_name).is_absolute() or "\\" in file_name:
            raise _LeavesFolder(f"{place}: file_name {file_name!r} leaves the folder, expected a path inside it")
        return str(pure)

    def _read_file(self, number: int, file_name: str) -> bytes:
        place, path = self._place(number, file_name), self.folder / file_name
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise _LeavesFolder(f"{place} is a link out of the folder, expected a file inside it")
        if not path.is_file():
            raise DataError(f"{place}: no such file, expected a picture")
        try:
            return path.read_bytes()
        except OSError as problem:
            raise DataError(f"{place}: not readable ({problem.strerror}), expected a picture") from problem


class _LeavesFolder(DataError):
    """Never skipped: such a row is no accident."""


def _folder_of(root: Path, split: str | None) -> Path:
    if not root.is_dir():
        raise DataError(f"{root}: no such folder, expected pictures with a {METADATA}")
    if split is None:
        inner = sorted(path.parent.name for path in root.glob(f"*/{METADATA}"))
        if inner and not (root / METADATA).is_file():
            raise DataError(f"{root}: holds no {METADATA}, but splits: {', '.join(inner)}; name one of them as split")
        return root
    if PurePosixPath(split).name != split or split in ("", ".", ".."):
        raise DataError(f"`split`: got {split!r}, expected the name of a folder in {root}")
    for name in SPLIT_FOLDERS.get(split, (split,)):
        if (root / name).is_dir():
            return root / name
    found = sorted(path.name for path in root.iterdir() if path.is_dir())
    raise DataError(f"`split`: got {split!r}, expected a folder of {root}: {', '.join(found) or 'it has none'}")


def _text_in(row: dict[str, Any], column: str, place: str) -> str:
    if column not in row:
        raise DataError(f"{place}: got {', '.join(map(repr, row)) or 'nothing'}, expected {column!r} too")
    value = row[column]
    if not isinstance(value, str):
        raise DataError(f"{place}: {column} is {_kind(value)}, expected a string")
    if not value.strip():
        raise DataError(f"{place}: {column} is empty, expected text")
    if "\0" in value:
        raise DataError(f"{place}: {column} holds a NUL character, expected text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{place}: {column} holds half a character (a lone surrogate), expected text") from None
    return value


def _kind(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} {value!r:.40}"
