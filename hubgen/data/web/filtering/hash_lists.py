"""Lists of files and addresses that data must not have, such as those of child protection; matched unseen.

    listed = HashList.read([Path("blocked.txt")])
    listed.names(table)         # (N,) whether a row is named

A file has an MD5, SHA-256 or SHA-512 in hexadecimal, or a URL, on each line (`#` begins a remark), or is parquet with
columns `md5`, `sha256`, `sha512` or `url`. Digests are those of the files that were downloaded, which shards have in
the column of `hubgen data download --compute-hash`; a picture that was brought to another size has another digest.

A list of 16 million entries takes 256 MB: of each, 16 bytes are kept.
"""

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from hubgen.data.errors import DataError
from hubgen.data.web.shards import table_schema

LENGTHS = {32: "md5", 64: "sha256", 128: "sha512"}
"""Hexadecimal digits of a digest"""
KINDS = (*LENGTHS.values(), "url")
EXPECTED = "an MD5, SHA-256 or SHA-512 in hexadecimal, or a URL"
KEPT = 16
"""Bytes of an entry, which is the MD5 of the text"""


@dataclass(frozen=True)
class HashList:
    """What is listed, as sorted entries of `KEPT` bytes of each kind."""

    entries: dict[str, Any]

    @classmethod
    def read(cls, files: Sequence[Path]) -> "HashList":
        """All files as one list.

        Raises:
            DataError: One cannot be read, has a line of no known kind, or has none at all.
        """
        found: dict[str, bytearray] = {}
        for path in files:
            before = sum(map(len, found.values()))
            for kind, entry in _parquet(path) if path.suffix == ".parquet" else _lines(path):
                found.setdefault(kind, bytearray()).extend(entry)
            if sum(map(len, found.values())) == before:
                raise DataError(f"{path}: found no line, expected {EXPECTED} on each")
        return cls({kind: np.unique(_sortable(bytes(found[kind]))) for kind in sorted(found)})

    def check(self, columns: Collection[str], name: str) -> None:
        """Raises DataError where a table (`name`) has not all columns that are listed, so that some would not match."""
        for kind in self.entries:
            if kind not in columns:
                how = "" if kind == "url" else f"; `hubgen data download --compute-hash {kind}` makes it"
                raise DataError(f"{name}: found no column {kind}, and the hash list names {kind}; expected it{how}")

    def names(self, table: Any) -> Any:
        """Whether each row of a table is listed: (N,), truth values."""
        listed = np.zeros(len(table), bool)
        for kind, entries in self.entries.items():
            values = table.column(kind).to_pylist()
            rows = np.array([row for row, value in enumerate(values) if value], np.int64)
            own = _sortable(b"".join(_entry(kind, values[row]) for row in rows))
            places = np.searchsorted(entries, own).clip(max=len(entries) - 1)
            listed[rows] |= entries[places] == own
        return listed


def _sortable(entries: bytes) -> Any:
    """(N,) of entries in one."""
    return np.frombuffer(entries, f"S{KEPT}") if entries else np.empty(0, f"S{KEPT}")


def _entry(kind: str, value: str) -> bytes:
    text = value.strip() if kind == "url" else value.strip().lower()
    return hashlib.md5(text.encode(), usedforsecurity=False).digest()


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                entry = line.strip()
                if not entry or entry.startswith("#"):
                    continue
                kind = _kind(entry)
                if kind is None:
                    raise DataError(f"{path}: line {number}: found {entry[:80]!r}, expected {EXPECTED}")
                yield kind, _entry(kind, entry)
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(f"{path}: cannot be read ({problem}), expected {EXPECTED} on each line") from problem


def _kind(entry: str) -> str | None:
    if entry.lower().startswith(("http://", "https://")):
        return "url"
    is_hexadecimal = all(letter in "0123456789abcdefABCDEF" for letter in entry)
    return LENGTHS.get(len(entry)) if is_hexadecimal else None


def _parquet(path: Path) -> Iterable[tuple[str, bytes]]:
    names = [name for name in table_schema(path).names if name in KINDS]
    if not names:
        raise DataError(f"{path}: found the columns {table_schema(path).names}, expected one of {', '.join(KINDS)}")
    try:
        with pa.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(columns=names):
                for name in names:
                    for value in batch.column(name).to_pylist():
                        if value:
                            if name != "url" and _kind(value.strip()) != name:
                                raise DataError(f"{path}: {name}: found {value!r}, expected {EXPECTED}")
                            yield name, _entry(name, value)
    except (pa.ArrowException, OSError) as problem:
        raise DataError(f"{path}: cannot be read ({' '.join(str(problem).split())[:200]})") from problem
