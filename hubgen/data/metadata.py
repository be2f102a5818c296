"""Which pictures an image-text folder has, with which captions: rows of its metadata, in the forms people keep them in.

    metadata.jsonl      {"file_name": "blue-heart.png", "text": "blue heart", "captions": ["blue heart", "a heart"]}
    metadata.csv        file_name,text
    metadata.parquet    the same columns
    NAME.txt            beside NAME.png: the caption in the first line, other wordings in further ones
    10_NAME/            a folder of kohya's kind: each picture ten times an epoch, captioned NAME without a file

The first three are those of `datasets`' imagefolder: each folder may have one, for the files in and below it. Text
files (also NAME.caption) and folder names count where there are none. `captions` (other wordings) is optional, as is
every further column. A further picture stands in a column of its own, `conditioning_image_file_name` (which `datasets`
calls `conditioning_image`), as a path from the folder of its table.
"""

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from hubgen.data.errors import DataError

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
IMAGE = "image"
"""What `datasets` calls the picture of `file_name`"""
CAPTION_FILES = (".txt", ".caption")
REPEATED = re.compile(r"([1-9]\d*)_(.+)")
"""Name of a folder that says how often its pictures are repeated, and what they show"""


class LeavesFolderError(DataError):
    """A file name that points out of the folder: never skipped, because such a row is no accident."""


@dataclass(frozen=True)
class Row:
    """A picture and its captions."""

    place: str
    """Where it is written, for messages: file and row."""
    file_name: str
    """Relative to the data folder, with slashes."""
    captions: list[str]
    """Wordings; the first is the caption. None at all where captions were not asked for."""
    repeats: int = 1
    """How often the picture stands in an epoch"""
    columns: dict[str, Any] = field(default_factory=dict)
    """Values of the further columns that were asked for, `None` where the row has none"""
    beside: dict[str, str] = field(default_factory=dict)
    """File names of the further pictures that were asked for, by their columns; as `file_name`"""


def read_rows(
    folder: Path,
    caption_column: str | None,
    skip: Callable[[DataError], None],
    columns: Sequence[str] = (),
    beside: Sequence[str] = (),
    picture: str = IMAGE,
) -> tuple[list[Row], int]:
    """The rows that are in order, before any picture is opened; and how many pictures of the folder have no row.

    Args:
        folder: With metadata of any form, in it or in folders below.
        caption_column: Column of the caption; `captions` is read only beside "text". `None`: no captions are asked for,
            and without a table each picture is a row.
        skip: Given the error of each row that cannot be used; raises it, or notes it.
        columns: Further ones to read from tables.
        beside: Columns of further pictures, of which each row has one.
        picture: Column of the picture itself.

    Raises:
        DataError: There are no rows, a file of them is unreadable as a whole, or two name one picture.
        LeavesFolderError: A row names a file outside.
    """
    tables, pictures = _files_of(folder)
    if tables:
        asked = Asked(caption_column, columns, beside, picture)
        rows = [row for table in tables for row in _rows_of_table(folder, table, asked, skip)]
        what = tables[0]
    elif beside or picture != IMAGE:
        names = ", ".join(file_keys(column)[0] for column in (picture, *beside))
        raise DataError(f"{folder / METADATA[0]}: no such file, expected a row of {names} for each picture")
    else:
        rows = list(_rows_of_texts(folder, pictures, caption_column is not None, columns, skip))
        what = folder / METADATA[0]
        if not rows and caption_column is None:
            raise DataError(f"{folder}: got no pictures, expected some")
        if not rows:
            raise DataError(
                f"{what}: no such file, expected a row of file_name and {caption_column} for each picture (or "
                "metadata.csv, metadata.parquet, or a text file beside each picture)"
            )
    first: dict[str, Row] = {}
    once = []
    for row in rows:
        known = first.setdefault(row.file_name, row)
        if known is row:
            once.append(row)
        else:
            number = known.place.rsplit(" ", 1)[-1]
            skip(DataError(f"{row.place}: {row.file_name} stands in row {number} already, expected once"))
    return once, len(pictures - first.keys() - {name for row in once for name in row.beside.values()})


@dataclass(frozen=True)
class Asked:
    """What a table is asked for."""

    caption_column: str | None
    columns: Sequence[str]
    beside: Sequence[str]
    picture: str

    @property
    def keys(self) -> list[str]:
        """Every column that may be read."""
        files = [key for column in (self.picture, *self.beside) for key in file_keys(column)]
        return [*files, *([] if self.caption_column is None else [self.caption_column]), *self.columns]


def file_keys(column: str) -> tuple[str, ...]:
    """Columns of a table in which the file of a picture may stand, the usual one first."""
    return ("file_name",) if column == IMAGE else (f"{column}_file_name", column)


def has_metadata(folder: Path) -> bool:
    """Whether there is a table of captions in this very folder."""
    return any((folder / name).is_file() for name in METADATA)


def has_captions(folder: Path) -> bool:
    """Whether there is a table of captions, or a caption beside or above a picture, in or below a folder."""
    tables, pictures = _files_of(folder)
    return bool(tables) or any(_caption_file(folder / name) or _repeated(name) for name in pictures)


def _caption_file(picture: Path) -> Path | None:
    """The text file beside a picture."""
    return next((path for suffix in CAPTION_FILES if (path := picture.with_suffix(suffix)).is_file()), None)


def _repeated(name: str) -> tuple[int, str] | None:
    """Repeats and caption by the name of the folder that a picture lies in, relative to the data folder."""
    match = REPEATED.fullmatch(PurePosixPath(name).parent.name)
    return None if match is None else (int(match[1]), match[2])


def _files_of(folder: Path) -> tuple[list[Path], set[str]]:
    """Tables of captions, the uppermost first, and the names of all pictures, in and below a folder."""
    tables, pictures = [], set()
    suffixes = Image.registered_extensions().keys()
    seen: set[str] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        place = os.path.realpath(root)
        if place in seen:  # links may lead in circles
            folders.clear()
            continue
        seen.add(place)
        here = [Path(root, name) for name in METADATA if name in files]
        if len(here) > 1:
            raise DataError(f"{root}: got {' and '.join(path.name for path in here)}, expected one of them")
        tables += here
        inside = Path(root).relative_to(folder)
        pictures |= {
            (inside / name).as_posix()
            for name in files
            if os.path.splitext(name)[1].lower() in suffixes and not name.startswith(".")
        }
    return tables, pictures


def _rows_of_table(folder: Path, table: Path, asked: Asked, skip: Callable[[DataError], None]) -> Iterator[Row]:
    read = {".jsonl": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}[table.suffix]
    inside, count = table.parent.relative_to(folder).as_posix(), 0
    for number, value in read(table, asked.keys):
        count += 1
        place = f"{table} row {number}"
        try:
            if isinstance(value, DataError):
                raise value
            yield _row(place, inside, value, asked)
        except LeavesFolderError:
            raise
        except DataError as problem:
            skip(problem)
    if not count:
        raise DataError(f"{table}: got no rows, expected one for each picture")


def _json_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, Any]]:
    """(line number, object or error) of each line that is not empty."""
    for number, line in enumerate(_utf8(path).split(b"\n"), start=1):
        if not line.strip():
            continue
        place = f"{path} row {number}"
        try:
            row = json.loads(line.decode("utf-8"))
            yield number, row if isinstance(row, dict) else DataError(f"{place}: got {_kind(row)}, expected an object")
        except UnicodeDecodeError as problem:
            yield number, DataError(f"{place}: not UTF-8 (byte {problem.start + 1} of the row), expected a JSON object")
        except (ValueError, RecursionError) as problem:
            yield number, DataError(f"{place}: not JSON ({problem}), expected an object")


def _csv_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, Any]]:
    try:
        text = _utf8(path).decode("utf-8")
    except UnicodeDecodeError as problem:
        raise DataError(f"{path}: not UTF-8 (byte {problem.start + 1}), expected a table in it") from None
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for row in reader:
            yield reader.line_num, {name: value for name, value in row.items() if isinstance(name, str) and value != ""}
    except csv.Error as problem:
        raise DataError(f"{path} row {reader.line_num}: not CSV ({problem})") from None


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, Any]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise DataError(f"{path}: needs pyarrow to be read: pip install 'hubgen[train]'") from None
    try:
        with ParquetFile(path) as file:
            wanted = dict.fromkeys([*columns, "captions"])
            number = 0
            for batch in file.iter_batches(columns=[name for name in wanted if name in file.schema_arrow.names]):
                for row in batch.to_pylist():
                    number += 1
                    if row.get("captions", ()) is None:
                        del row["captions"]
                    yield number, row
    except (ArrowException, OSError) as problem:
        raise DataError(f"{path}: not a whole parquet file ({' '.join(str(problem).split())})") from problem


def _rows_of_texts(
    folder: Path,
    pictures: set[str],
    captioned: bool,
    columns: Sequence[str],
    skip: Callable[[DataError], None],
) -> Iterator[Row]:
    for name in sorted(pictures):
        path, of_folder = _caption_file(folder / name), _repeated(name)
        nothing = dict.fromkeys(columns)
        if not captioned or (path is None and of_folder is not None):
            repeats, caption = of_folder or (1, "")
            yield Row(str(folder / name), name, [caption] if captioned else [], repeats, nothing)
            continue
        if path is None:
            continue
        try:
            lines = [line.strip() for line in _utf8(path).decode("utf-8").splitlines() if line.strip()]
            row = {"text": lines[0] if lines else "", "captions": lines}
            captions = _captions(row, "text", str(path))
            yield Row(f"{path} row 1", name, captions, 1 if of_folder is None else of_folder[0], nothing)
        except UnicodeDecodeError as problem:
            skip(DataError(f"{path}: not UTF-8 (byte {problem.start + 1}), expected a caption"))
        except DataError as problem:
            skip(problem)


def _utf8(path: Path) -> bytes:
    """A file's bytes without the mark that some programs put before UTF-8."""
    try:
        content = path.read_bytes()
    except OSError as problem:
        raise DataError(f"{path}: not readable ({problem.strerror})") from problem
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path}: got UTF-16, expected UTF-8")
    return content.removeprefix(b"\xef\xbb\xbf")


def _row(place: str, inside: str, row: dict[str, Any], asked: Asked) -> Row:
    """A row of a table that lies in the folder `inside`."""
    file_name = _file_in(row, asked.picture, place, inside)
    captions = [] if asked.caption_column is None else _captions(row, asked.caption_column, place)
    further = {name: row.get(name) for name in asked.columns}
    beside = {name: _file_in(row, name, place, inside) for name in asked.beside}
    return Row(place, file_name, captions, columns=further, beside=beside)


def _file_in(row: dict[str, Any], column: str, place: str, inside: str) -> str:
    """The file of a picture, relative to the data folder."""
    keys = file_keys(column)
    key = next((key for key in keys if key in row), keys[0])
    file_name = _text_in(row, key, place).replace("\\", "/")
    pure = PurePosixPath(file_name)
    if pure.is_absolute() or ".." in pure.parts or Path(file_name).is_absolute() or file_name[1:2] == ":":
        raise LeavesFolderError(f"{place}: {key} {file_name!r} leaves the folder, expected a path inside it")
    return (PurePosixPath(inside) / pure).as_posix()


def _captions(row: dict[str, Any], caption_column: str, place: str) -> list[str]:
    text = _text_in(row, caption_column, place)
    others = row.get("captions") if caption_column == "text" else None
    if others is None:
        return [text]
    if not isinstance(others, list):
        raise DataError(f"{place}: captions is {_kind(others)}, expected a list of strings")
    for position, wording in enumerate(others):
        _text_in({f"captions[{position}]": wording}, f"captions[{position}]", place)
    return list(dict.fromkeys([text, *others]))


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
