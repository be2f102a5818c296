"""What a shard is: pictures in a tar, a table of all rows beside it, and what was counted; img2dataset's layout.

    00000.tar           000000012.jpg, 000000012.json, 000000012.txt, ... of each row that has a picture, in row order
    00000.parquet       a line a row, of failures too: the columns that came in, `COLUMNS`, then `offset` and `size`
    00000_stats.json    counts, times, and a record of each stage that was done; written last, so it says "whole"

A key is 10^d · shard + row with d = ⌈log10(rows of a full shard)⌉, in d + 5 digits. `offset` and `size` tell where the
bytes of the row's picture lie in the tar, so that any of them is read at once. img2dataset, `datasets` and webdataset
read such a folder; `open_shards` reads img2dataset's too, whose tables lack `offset` and `size`.

Layout, columns and words of img2dataset 1.47 (https://github.com/rom1504/img2dataset).
"""

import io
import json
import math
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet

from hubgen.data.errors import DataError

SUCCESS, NOT_DOWNLOADED, NOT_RESIZED = "success", "failed_to_download", "failed_to_resize"
STATUSES = (SUCCESS, NOT_DOWNLOADED, NOT_RESIZED)

COLUMNS: dict[str, Any] = {
    "key": pa.string(),
    "status": pa.string(),
    "error_message": pa.string(),
    "width": pa.int32(),
    "height": pa.int32(),
    "original_width": pa.int32(),
    "original_height": pa.int32(),
    "exif": pa.string(),
}
"""Columns that a download adds; a digest of the file's bytes follows, named by its algorithm."""

PLACE: dict[str, Any] = {"offset": pa.int64(), "size": pa.int64()}
"""Where a picture's bytes begin in the tar, and how many there are; empty where a row has none."""

STATS, TABLE, TAR = "_stats.json", ".parquet", ".tar"
READY = ".ready-"
"""Beginning of a folder's name with the whole of a shard that is being moved to its place."""

DIGITS = 5
PICTURES = ("jpg", "png", "webp")


def shard_name(number: int) -> str:
    """`00012`, without an ending."""
    return f"{number:0{DIGITS}d}"


def key_of(number: int, row: int, rows: int) -> str:
    """The key of a row; `rows` are those of a full shard."""
    digits = math.ceil(math.log10(rows)) if rows > 1 else 0
    return f"{10**digits * number + row:0{digits + DIGITS}d}"


@dataclass(frozen=True)
class Outcome:
    """What became of a row."""

    status: str
    """One of `STATUSES`"""
    error_message: str | None = None
    picture: bytes | None = None
    """Encoded, of a success"""
    width: int | None = None
    height: int | None = None
    original_width: int | None = None
    original_height: int | None = None
    exif: str | None = None
    """JSON"""
    digest: str | None = None
    """Of the downloaded bytes, hexadecimal"""


def write_shard(
    folder: Path,
    number: int,
    rows: int,
    table: Any,
    outcomes: Iterable[Outcome],
    *,
    digest: str | None = "sha256",
    ending: str = "jpg",
) -> dict[str, Any]:
    """Writes a shard's tar and table, row by row; the same rows give the same bytes.

    Args:
        folder: Where to.
        number: Of the shard.
        rows: Of a full shard, for the keys.
        table: The columns that came in, such as `caption` and `url` (a `pyarrow.Table`).
        outcomes: Of each row, in their order. They may be made while they are asked for: a picture is not kept.
        digest: Algorithm that gave the outcomes' digests, and name of their column; `None`: no such column.
        ending: Of the pictures' names.

    Returns:
        Counts for `00000_stats.json`: count, successes, failed_to_download, failed_to_resize, status_dict, tar_bytes.

    Raises:
        ValueError: There are not as many outcomes as rows.
    """
    names = [*COLUMNS, *([digest] if digest else []), *PLACE]
    schema = pa.schema({name: {**COLUMNS, **PLACE}.get(name, pa.string()) for name in names})
    statuses, messages = Counter[str](), Counter[str]()
    columns: dict[str, list[Any]] = {name: [] for name in names}
    path = folder / f"{shard_name(number)}{TAR}"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for row, (given, outcome) in enumerate(zip(_rows_of(table), outcomes, strict=True)):
            values = {name: getattr(outcome, name, None) for name in COLUMNS} | {"key": key_of(number, row, rows)}
            if digest:
                values[digest] = outcome.digest
            place = {}
            if outcome.picture is not None:
                # The table's columns come first, as img2dataset has them.
                place = _add_row(tar, {**given, **values}, outcome.picture, ending)
            for name in names:
                columns[name].append((values | place).get(name))
            statuses[outcome.status] += 1
            messages[outcome.error_message or outcome.status] += 1
    added = pa.Table.from_pydict(columns, schema)
    for name in names:
        table = table.append_column(schema.field(name), added.column(name))
    write_table(folder / f"{shard_name(number)}{TABLE}", table)
    return _counts(statuses, messages, path)


def _counts(statuses: Counter[str], messages: Counter[str], tar: Path) -> dict[str, Any]:
    counts = {"count": statuses.total(), "successes": statuses[SUCCESS]}
    counts |= {status: statuses[status] for status in (NOT_DOWNLOADED, NOT_RESIZED)}
    return {**counts, "status_dict": dict(sorted(messages.items())), "tar_bytes": tar.stat().st_size}


def copy_rows(shard: "StoredShard", rows: Sequence[int], folder: Path) -> dict[str, Any]:
    """Writes some rows of a shard, in that order, as a shard of another folder.

    Keys and pictures stay as they are. What stands beside a picture in the tar is written from the table, with the
    columns that it has now.

    Args:
        shard: Where from.
        rows: Places in its table; each has a picture.
        folder: Where to; the name stays too.

    Returns:
        Counts as those of `write_shard`.

    Raises:
        DataError: The shard is damaged.
    """
    table = shard.read().take(pa.array(rows, pa.int64()))
    places: dict[str, list[int]] = {name: [] for name in PLACE}
    path = folder / shard.tar.name
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for row in _rows_of(table):
            offset, size = (row.pop(name) for name in PLACE)
            picture = shard.picture(offset, size)
            place = _add_row(tar, row, picture, _ending(shard, offset))
            for name in PLACE:
                places[name].append(place[name])
    for name, kind in PLACE.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(places[name], kind))
    write_table(folder / shard.table.name, table)
    counted = Counter(dict.fromkeys([SUCCESS], len(table)) if len(table) else {})
    return _counts(counted, counted, path)


def write_table(path: Path, table: Any) -> None:
    """Writes a shard's table: one group of rows, without notes of where its columns came from."""
    pa.parquet.write_table(table.replace_schema_metadata(None).combine_chunks(), path, row_group_size=2**20)


def _rows_of(table: Any) -> Iterator[dict[str, Any]]:
    for batch in table.to_batches(max_chunksize=256):
        yield from batch.to_pylist()


def _add_row(tar: tarfile.TarFile, row: Mapping[str, Any], picture: bytes, ending: str) -> dict[str, int]:
    """Adds a row's picture, its columns as JSON, and its caption; where the picture's bytes lie."""
    offset = _add(tar, f"{row['key']}.{ending}", picture)
    _add(tar, f"{row['key']}.json", json.dumps(row, indent=4, default=str).encode())
    if "caption" in row:
        _add(tar, f"{row['key']}.txt", (row["caption"] or "").encode())
    return {"offset": offset, "size": len(picture)}


def _ending(shard: "StoredShard", offset: int) -> str:
    """Of the name of the picture whose bytes begin there, from the header before them."""
    header = shard.picture(offset - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE)
    try:
        return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name.rpartition(".")[2]
    except tarfile.TarError as problem:
        raise DataError(f"{shard.tar}: got no header of a file before {offset} ({problem})") from problem


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> int:
    """Adds a file to a tar; where its bytes begin."""
    member = tarfile.TarInfo(name)  # of no user, and of 1970: nothing but the content makes the bytes
    member.size, member.mode = len(content), 0o444
    tar.addfile(member, io.BytesIO(content))
    return tar.offset - math.ceil(len(content) / tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


# ---- reading ----


@dataclass(frozen=True)
class StoredShard:
    """A shard on the disk, whole."""

    folder: Path
    name: str

    @property
    def number(self) -> int:
        return int(self.name)

    @property
    def tar(self) -> Path:
        return self.folder / f"{self.name}{TAR}"

    @property
    def table(self) -> Path:
        return self.folder / f"{self.name}{TABLE}"

    @cached_property
    def stats(self) -> dict[str, Any]:
        """The content of its `_stats.json`."""
        return read_stats(self.folder / f"{self.name}{STATS}")

    def read(self, columns: Iterable[str] | None = None) -> Any:
        """Its table in the order of the file, with `offset` and `size`; of `columns` alone if they are given.

        Raises:
            DataError: The table or the tar is damaged, or has not those columns.
        """
        found = table_columns(self.table)
        wanted = list(found if columns is None else columns)
        missing = sorted(set(wanted) - {*found, *PLACE})
        if missing:
            raise DataError(f"{self.table}: got the columns {found}, expected {missing[0]!r} too")
        places = [name for name in PLACE if name not in found and (columns is None or name in wanted)]
        reads = [name for name in wanted if name in found]
        table = read_table(self.table, [*reads, *(["key"] if places and "key" not in reads else [])])
        if places:
            known = self.places()
            for name, index in (("offset", 0), ("size", 1)):
                if name in places:
                    values = [known.get(key, (None, None))[index] for key in table.column("key").to_pylist()]
                    table = table.append_column(name, pa.array(values, PLACE[name]))
        return table.select([*wanted, *(name for name in places if name not in wanted)])

    def picture(self, offset: int, size: int) -> bytes:
        """The bytes of a picture.

        Raises:
            DataError: The tar ends before.
        """
        descriptor = os.open(self.tar, os.O_RDONLY)
        try:
            content = os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)
        if len(content) != size:
            raise _cut_off(self.tar, offset + len(content), f"{size} bytes at {offset}")
        return content

    def places(self) -> dict[str, tuple[int, int]]:
        """Key to where its picture begins in the tar, and its bytes; read from the headers of the tar, all of them.

        Raises:
            DataError: The tar is cut off or damaged, or a key comes twice.
        """
        found: dict[str, tuple[int, int]] = {}
        length, end = self.tar.stat().st_size, 0
        try:
            with tarfile.open(self.tar, "r:") as tar:
                for member in tar:
                    end = member.offset_data + member.size
                    if end > length:
                        raise _cut_off(self.tar, length, f"{member.name} up to {end}")
                    key, _, ending = os.path.basename(member.name).partition(".")
                    if ending in (*PICTURES, "jpeg"):
                        if key in found:
                            raise DataError(f"{self.tar}: got the key {key} twice, expected each key once")
                        found[key] = (member.offset_data, member.size)
        except (tarfile.TarError, OSError, EOFError) as problem:
            raise DataError(
                f"{self.tar}: got no header of a file at {end} ({' '.join(str(problem).split())}), expected a whole tar"
            ) from problem
        if end + 2 * tarfile.BLOCKSIZE > length:
            raise _cut_off(self.tar, length, f"two blocks of zeros behind {end}")
        return found


def _cut_off(tar: Path, offset: int, expected: str) -> DataError:
    return DataError(f"{tar}: is cut off at {offset}, expected {expected}")


def read_stats(path: Path) -> dict[str, Any]:
    """The content of a `_stats.json`.

    Raises:
        DataError: It cannot be read, or lacks a count.
    """
    try:
        stats = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise DataError(f"{path}: {' '.join(str(problem).split())}, expected the counts of a shard") from problem
    if not isinstance(stats, dict) or not isinstance(stats.get("count"), int):
        raise DataError(f"{path}: got no whole number `count`, expected the counts of a shard")
    return stats


def write_stats(path: Path, stats: Mapping[str, Any]) -> None:
    """Writes a `_stats.json`."""
    path.write_text(json.dumps(stats, indent=4) + "\n", encoding="utf-8")


def table_columns(path: Path) -> list[str]:
    """The names of a parquet file's columns, from its end alone.

    Raises:
        DataError: It is no parquet file.
    """
    return list(table_schema(path).names)


def table_rows(path: Path) -> int:
    """The rows of a parquet file, from its end alone.

    Raises:
        DataError: It is no parquet file.
    """
    try:
        return pa.parquet.read_metadata(path).num_rows
    except (pa.ArrowException, OSError) as problem:
        raise _no_table(path, problem) from problem


def table_schema(path: Path) -> Any:
    """The names and types of a parquet file's columns (`pyarrow.Schema`), from its end alone.

    Raises:
        DataError: It is no parquet file.
    """
    try:
        return pa.parquet.read_schema(path)
    except (pa.ArrowException, OSError) as problem:
        raise _no_table(path, problem) from problem


def read_table(path: Path, columns: Iterable[str] | None = None) -> Any:
    """The columns of a parquet file, in its order, as a `pyarrow.Table`.

    Raises:
        DataError: It is no parquet file, or damaged.
    """
    try:
        with pa.parquet.ParquetFile(path) as file:
            return file.read(columns=None if columns is None else list(columns))
    except (pa.ArrowException, OSError) as problem:
        raise _no_table(path, problem) from problem


def _no_table(path: Path, problem: Exception) -> DataError:
    return DataError(f"{path}: not a readable parquet file ({' '.join(str(problem).split())[:200]})")


def shard_names(folder: Path) -> list[str]:
    """Names of the shards whose `_stats.json` is there, in order."""
    if not folder.is_dir():
        return []
    names = (path.name.removesuffix(STATS) for path in folder.glob(f"*{STATS}"))
    return sorted((name for name in names if name.isascii() and name.isdecimal()), key=int)


def open_shards(folder: Path) -> list[StoredShard]:
    """The shards of a folder, checked from their tables and lengths; pictures are not read.

    Tables without `offset` and `size`, which img2dataset writes, are checked by the headers of the tar.

    Raises:
        DataError: There are none; a file of one is missing, damaged or cut off; rows and pictures differ in number; a
            key comes twice; or a run was killed while it moved a shard to its place.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder, expected one of shards (00000.tar, 00000.parquet, ...)")
    moving = sorted(folder.glob(f"{READY}*"))
    if moving:
        raise DataError(
            f"{moving[0]}: a run was stopped before this shard was in its place, expected a whole folder; start the "
            "same command again"
        )
    names = shard_names(folder)
    for ending, other in ((TAR, TABLE), (TABLE, TAR)):
        for path in sorted(folder.glob(f"[0-9]*{ending}")):
            if not path.with_suffix(other).is_file():
                raise DataError(f"{path}: got no {path.with_suffix(other).name} beside it, expected both")
            if path.stem not in names:
                raise DataError(
                    f"{path}: got no {path.stem}{STATS} beside it, so the shard is not whole; start the command that "
                    "writes it again"
                )
    if not names:
        raise DataError(f"{folder}: got no shard, expected 00000.tar, 00000.parquet and 00000{STATS}")
    shards = [StoredShard(folder, name) for name in names]
    ranges = [(*_check(shard), shard) for shard in shards]
    _check_keys(ranges)
    return shards


def _check(shard: StoredShard) -> tuple[str, str]:
    """Checks one shard; its least and its greatest key, "" without rows."""
    for path in (shard.tar, shard.table):
        if not path.is_file():
            raise DataError(f"{path}: no such file, expected it beside {shard.name}{STATS}")
    columns, rows = table_columns(shard.table), table_rows(shard.table)
    missing = [name for name in ("key", "status") if name not in columns]
    if missing:
        raise DataError(f"{shard.table}: got the columns {columns}, expected {missing[0]!r} too")
    if rows != shard.stats["count"]:
        raise DataError(f"{shard.table}: got {rows} rows, expected {shard.stats['count']} as {shard.name}{STATS} says")
    has_places = set(PLACE) <= set(columns)
    table = read_table(shard.table, ["key", "status", *(PLACE if has_places else ())])
    keys = table.column("key")
    if len(keys.unique()) != rows:
        twice = next(key for key, count in Counter(keys.to_pylist()).items() if count > 1)
        raise DataError(f"{shard.table}: got the key {twice} twice, expected each key once")
    good = pa.compute.sum(pa.compute.equal(table.column("status"), SUCCESS)).as_py() or 0
    if has_places:
        pictures = rows - table.column("offset").null_count
        length, expected = shard.tar.stat().st_size, shard.stats.get("tar_bytes")
        if expected is not None and length != expected:
            raise (
                _cut_off(shard.tar, length, f"{expected} bytes")
                if length < expected
                else DataError(f"{shard.tar}: got {length} bytes, expected {expected}")
            )
    else:
        pictures = len(shard.places())
    if pictures != good:
        raise DataError(f"{shard.tar}: got {pictures} pictures, expected {good}, the successes of {shard.table.name}")
    bounds = pa.compute.min_max(keys).as_py()
    return bounds["min"] or "", bounds["max"] or ""


def _check_keys(ranges: list[tuple[str, str, StoredShard]]) -> None:
    """Raises DataError where a key stands in two shards; keys are compared only where those of shards overlap."""
    ordered = sorted((entry for entry in ranges if entry[1]), key=lambda entry: entry[:2])
    highest: tuple[str, str, StoredShard] | None = None
    for entry in ordered:
        if highest is not None and entry[0] <= highest[1]:
            others = [other for other in ordered if other is not entry and other[:2] <= entry[:2]]
            for other in others:
                if other[1] < entry[0]:
                    continue
                mine = set(read_table(entry[2].table, ["key"]).column("key").to_pylist())
                both = mine.intersection(read_table(other[2].table, ["key"]).column("key").to_pylist())
                if both:
                    raise DataError(
                        f"{entry[2].table}: got the key {min(both)} of {other[2].table.name}, expected each key once"
                    )
        if highest is None or entry[1] > highest[1]:
            highest = entry
