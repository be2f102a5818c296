"""Shards of a WebDataset: tar files in which the files of one example lie side by side and share a name.

    00000.tar: 000001.jpg, 000001.txt, 000001.json, 000002.jpg, ...

A picture is told by its suffix; its captions are the lines of `.txt` or `.caption`, or a field of `.json`, where
further columns stand too. The headers of a shard tell where everything lies, so that any example is read at once,
without the ones before it: order and resumption are those of a folder.
"""

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from hubgen.data.errors import DataError
from hubgen.data.examples import BESIDE, MASK, Beside, CheckedExamples, check_size
from hubgen.data.metadata import IMAGE
from hubgen.data.pictures import MAX_PIXELS, as_mask, decode_picture, on_white

BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
COUNTS = "_stats.json"
CAPTIONS = ("txt", "caption")
PICTURES = {suffix.removeprefix(".") for suffix in Image.registered_extensions()}


def is_shards(source: str) -> bool:
    """Whether a source names tar files: by a pattern, by name, or a folder with some in it and no pictures."""
    if source.endswith(".tar"):
        return True
    path = Path(source).expanduser()
    return "*" not in source and path.is_dir() and any(path.glob("*.tar"))


def has_counts(folder: Path) -> bool:
    """Whether a folder is one of shards with counts beside them, which `hubgen.data.shard_feed` reads."""
    if not folder.is_dir():
        return False
    with os.scandir(folder) as entries:  # of a million files, a few are looked at
        return any(one.name.endswith(COUNTS) and one.name.removesuffix(COUNTS).isdecimal() for one in entries)


def shards_of(source: str) -> list[Path]:
    """The tar files of `shards/{0000..0009}.tar`, `shards/*.tar`, one file, or a folder.

    Raises:
        DataError: One of them is not there, or there are none.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return sorted(path.glob("*.tar"))
    numbers = BRACES.search(source)
    if numbers is not None:
        width = len(numbers[1])
        names = [
            source[: numbers.start()] + str(number).zfill(width) + source[numbers.end() :]
            for number in range(int(numbers[1]), int(numbers[2]) + 1)
        ]
        found = [Path(name).expanduser() for name in names]
    elif "*" in path.name:
        found = sorted(path.parent.glob(path.name))
    else:
        found = [path]
    missing = [str(shard) for shard in found if not shard.is_file()]
    if missing or not found:
        raise DataError(f"{source}: no such file: {', '.join(missing[:3]) or 'any'}; expected shards of a WebDataset")
    return found


class WebDataset(CheckedExamples):
    """The examples of tar files, all of them checked when they are opened.

    Args:
        source: See `shards_of`; in a folder with folders, that of the split is taken.
        split: Name of a folder inside `source`, if there is one.
        caption_column: Field of an example's `.json` where it has no text file; `None`: no captions are needed.
        on_error: "fail" or "skip".
        max_pixels: Pixels of a picture at most.
        columns: Further fields of `.json`; a mask may be a file of the example, named by its suffix ("mask.png").
        beside: Columns of further pictures, files of the example such as `000001.conditioning_image.png`.
        picture: Column of the picture itself, if its file is named so too; else the one picture without such a name.

    Raises:
        DataError: A shard is damaged, or an example lacks something.
    """

    def __init__(
        self,
        source: str,
        split: str = "train",
        *,
        caption_column: str | None = "text",
        on_error: str = "fail",
        max_pixels: int = MAX_PIXELS,
        columns: Sequence[str] = (),
        beside: Sequence[str] = (),
        picture: str = IMAGE,
    ) -> None:
        inner = Path(source).expanduser() / split
        shards = shards_of(str(inner) if inner.is_dir() else source)
        super().__init__(source, columns, f"webdataset {caption_column}", beside)
        self.caption_column, self.max_pixels, self.column = caption_column, max_pixels, picture
        self._places: list[dict[str, tuple[Path, int, int]]] = []
        for shard in tqdm(shards, desc="check shards", disable=len(shards) < 20, leave=False):
            for name, files in _examples_of(shard):
                try:
                    self._take(f"{shard}: {name}", name, files)
                except DataError as problem:
                    if on_error == "fail":
                        raise
                    self.skipped.append(str(problem))
        self.check_enough()

    def _take(self, place: str, name: str, files: dict[str, tuple[Path, int, int]]) -> None:
        pictures = named_pictures(files, self.column) or [suffix for suffix in files if suffix in PICTURES]
        if len(pictures) != 1:
            raise DataError(f"{place}: got {sorted(files)}, expected one picture")
        content = _bytes(files[pictures[0]])
        picture = decode_picture(content, f"{place}.{pictures[0]}", self.max_pixels)
        record: dict[str, Any] = {}
        if "json" in files:
            try:
                record = json.loads(_bytes(files["json"]))
            except ValueError as error:
                raise DataError(f"{place}.json: not JSON ({error})") from error
            if not isinstance(record, dict):
                raise DataError(f"{place}.json: got {type(record).__name__}, expected an object")
        captions = [] if self.caption_column is None else self._captions(place, files, record)
        columns = {column: files[column] if column in files else record.get(column) for column in self.columns}
        size = (picture.height, picture.width)
        beside = {column: self._beside(place, files, column, size) for column in self.beside}
        self._places.append(files | {"picture": files[pictures[0]]})
        kept = {key: value if not isinstance(value, tuple) else key for key, value in columns.items()}
        self._add(name, captions, size, hashlib.sha256(content).hexdigest(), columns=kept, beside=beside)

    def _beside(self, place: str, files: dict[str, tuple[Path, int, int]], column: str, size: Any) -> Beside:
        """A further picture of an example."""
        found = named_pictures(files, column)
        if len(found) != 1:
            raise DataError(f"{place}: got {sorted(files)}, expected a picture {column}.png too")
        content, name = _bytes(files[found[0]]), f"{place}.{found[0]}"
        check_size(decode_picture(content, name, self.max_pixels), name, size, f"{place} itself", BESIDE)
        return Beside(found[0], hashlib.sha256(content).hexdigest())

    def _captions(self, place: str, files: dict[str, tuple[Path, int, int]], record: dict[str, Any]) -> list[str]:
        for suffix in CAPTIONS:
            if suffix in files:
                try:
                    text = _bytes(files[suffix]).decode("utf-8-sig")
                except UnicodeDecodeError as error:
                    raise DataError(f"{place}.{suffix}: not UTF-8 (byte {error.start + 1})") from error
                lines = [line.strip() for line in text.splitlines() if line.strip()]
                if not lines:
                    raise DataError(f"{place}.{suffix}: got an empty file, expected a caption")
                return list(dict.fromkeys(lines))
        value = record.get(str(self.caption_column))
        if not isinstance(value, str) or not value.strip():
            raise DataError(
                f"{place}: got {sorted(files)}, expected a caption in a .txt, or in {self.caption_column!r} of a .json"
            )
        return [value]

    def drop(self, rows: Any) -> None:
        """See `CheckedExamples.drop`."""
        self._places = [place for row, place in enumerate(self._places) if row not in rows]
        super().drop(rows)

    def picture(self, row: int) -> Image.Image:
        """RGB, upright and on white."""
        return on_white(decode_picture(_bytes(self._places[row]["picture"]), self.file_names[row], self.max_pixels))

    def mask(self, row: int, column: str) -> Image.Image | None:
        """The file of an example whose suffix the column names; `None` where there is none."""
        if self.columns[column][row] is None:
            return None
        name = f"{self.file_names[row]}.{column}"
        mask = as_mask(decode_picture(_bytes(self._places[row][column]), name, self.max_pixels))
        return check_size(mask, name, self.sizes[row], self.file_names[row], MASK)

    def _further(self, row: int, column: str) -> Image.Image:
        suffix = self.beside[column][row].name
        return decode_picture(_bytes(self._places[row][suffix]), f"{self.file_names[row]}.{suffix}", self.max_pixels)


def named_pictures(files: Iterable[str], column: str) -> list[str]:
    """Those of the suffixes of an example's files that are a picture of this column."""
    before = f"{column.lower()}."
    return [suffix for suffix in files if suffix.startswith(before) and suffix.removeprefix(before) in PICTURES]


def _examples_of(shard: Path) -> Iterator[tuple[str, dict[str, tuple[Path, int, int]]]]:
    """Name and files of each example: suffix to the tar file, where its bytes begin in it, and how many there are."""
    last, files = "", dict[str, tuple[Path, int, int]]()
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if not member.isfile() or os.path.basename(member.name).startswith("."):
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                name = f"{folder}/{stem}" if folder else stem
                if name != last and files:
                    yield last, files
                    files = {}
                last = name
                files[suffix.lower()] = (shard, member.offset_data, member.size)
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{shard}: not a whole tar file ({' '.join(str(error).split())})") from error
    if files:
        yield last, files


def _bytes(place: tuple[Path, int, int]) -> bytes:
    path, offset, size = place
    with path.open("rb") as file:
        file.seek(offset)
        content = file.read(size)
    if len(content) != size:
        raise DataError(f"{path}: got {len(content)} bytes at {offset}, expected {size}; the shard is cut off")
    return content
