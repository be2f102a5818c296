"""Rows that stand twice: the first stays, that is the one of the least (shard, row).

Exact, for any number of rows: each shard writes the keys of its rows, sorted (`write_keys`). Keys with the same first
bits are a bucket; what repeats in a bucket is found by itself (`repeats_in`), so memory holds one bucket, and workers
do not share anything. For a crawl that has no end, `Bloom` (1970) remembers in fixed memory what came, and drops some
rows that did not.

A key is MurmurHash3's 128 bits of the row's columns. Among 50 billion rows, the chance that any two different ones have
the same key is below 10^-17.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hubgen.checks import is_number, whole
from hubgen.data.web.crawling.text import needed

KEY = np.dtype([("high", "<u8"), ("low", "<u8"), ("row", "<u4")])
"""A line of a file of keys: the key's halves, and the row that has it"""
ROWS_IN_BUCKET = 16_000_000
"""Rows that a bucket has at most, about, which are 1 GB while it is sorted"""


def row_key(values: Iterable[Any]) -> int:
    """The key of a row's values, a number of 128 bits; `None` counts as ""."""
    return int(needed("mmh3").hash128("\0".join(_texts(values)).encode(), signed=False))


def laion_hash(url: str | None, text: str | None) -> int:
    """LAION's `hash` of a pair, by which its tables of scores are joined: signed, of 64 bits; `None` counts as ""."""
    return int(needed("mmh3").hash64("".join(_texts((url, text))).encode(), signed=True)[0])


def _texts(values: Iterable[Any]) -> list[str]:
    return ["" if value is None else str(value) for value in values]


def write_keys(path: Path, keys: Sequence[int]) -> None:
    """Writes a shard's keys, sorted; they are given in the order of its rows."""
    lines = np.empty(len(keys), KEY)
    lines["high"] = [key >> 64 for key in keys]
    lines["low"] = [key & (1 << 64) - 1 for key in keys]
    lines["row"] = np.arange(len(keys))
    lines[np.lexsort((lines["row"], lines["low"], lines["high"]))].tofile(path)


def buckets_for(rows: int) -> int:
    """How many buckets so many rows are parted into, a power of two; the rows that repeat do not depend on it."""
    return 1 << max(0, math.ceil(math.log2(max(rows, 1) / ROWS_IN_BUCKET)))


def repeats_in(files: Sequence[Path], bucket: int, buckets: int) -> tuple[Any, Any]:
    """The rows of a bucket whose key an earlier row has.

    Args:
        files: The shards' keys, as `write_keys` wrote them, in the shards' order.
        bucket: Its number, from 0.
        buckets: How many there are: a power of two.

    Returns:
        Numbers of the shards (places in `files`), and of the rows in them, two arrays (N,), sorted by shard and row.
    """
    parts, shards = [], []
    for number, path in enumerate(files):
        lines = _lines(path)
        first, last = (_place(lines["high"], edge, buckets) for edge in (bucket, bucket + 1))
        parts.append(np.array(lines[first:last]))
        shards.append(np.full(last - first, number, np.uint32))
    keys = np.concatenate(parts) if parts else np.empty(0, KEY)
    shard = np.concatenate(shards) if shards else np.empty(0, np.uint32)
    order = np.lexsort((keys["row"], shard, keys["low"], keys["high"]))
    keys, shard = keys[order], shard[order]
    again = np.zeros(len(keys), bool)
    again[1:] = (keys["high"][1:] == keys["high"][:-1]) & (keys["low"][1:] == keys["low"][:-1])
    shard, row = shard[again], keys["row"][again]
    order = np.lexsort((row, shard))
    return shard[order], row[order]


def _lines(path: Path) -> Any:
    if path.stat().st_size == 0:  # which cannot be mapped
        return np.empty(0, KEY)
    return np.memmap(path, KEY, "r")


def _place(high: Any, edge: int, buckets: int) -> int:
    """Where a bucket begins among sorted keys."""
    return len(high) if edge == buckets else bisect_left(high, np.uint64(edge * (2**64 // buckets)))


def check_bloom(capacity: int, error: float) -> None:
    """Looks at what `Bloom` is given.

    Raises:
        ValueError: It is out of range.
    """
    whole("capacity", capacity, most=10**12)
    if not is_number(error) or not 0 < error < 1:
        raise ValueError(f"`error`: got {error!r}, expected a number above 0 and below 1.")


class Bloom:
    """Keys that came, in fixed memory: it never forgets one, and takes some for known that are not.

    Args:
        capacity: How many keys it is made for.
        error: Share of new keys that it takes for known when it has so many.
        file: One that `save` wrote with the same capacity and error, to go on from.

    Raises:
        ValueError: See `check_bloom`.
        DataError: rbloom is not installed.
    """

    def __init__(self, capacity: int, error: float, file: Path | None = None) -> None:
        check_bloom(capacity, error)
        kind = needed("rbloom").Bloom
        self._filter = kind(capacity, error, _as_it_is) if file is None else kind.load(str(file), _as_it_is)
        self._hashes = max(1, int(self._filter.size_in_bits / capacity * math.log(2)))

    def add(self, key: int) -> bool:
        """Remembers a key of 128 bits; whether it is new."""
        key -= 1 << 127  # rbloom's numbers have signs
        new = key not in self._filter
        if new:
            self._filter.add(key)
        return new

    def save(self, path: Path) -> None:
        """Writes it to a file."""
        self._filter.save(str(path))

    def expected_error(self) -> float:
        """Share of new keys that it takes for known now: (1 - e^(-kn/m))^k of k hashes, n keys, m bits."""
        filled = -math.expm1(-self._hashes * self._filter.approx_items / self._filter.size_in_bits)
        return float(filled**self._hashes)


def _as_it_is(key: int) -> int:
    return key
