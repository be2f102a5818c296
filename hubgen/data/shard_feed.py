"""Shards of web data as training takes them: any number of pictures, shuffled without a buffer, read where they lie.

    kept = open_examples("kept", columns=["synthetic_caption"])      # by `hubgen.data.sources`; or "s3://bucket/kept"
    row = kept.endless_row(views.buckets, views.known, batch_size=256, seed=0)
    row.draws(1_000_000)                                             # any step, at once
    kept.picture(draw.row)

A row is a success; they are counted through all shards by the manifest (`hubgen.data.shard_store`). An epoch permutes
the shards, takes them in windows of W, and permutes the pictures inside of each window. All of it is a function of
(seed, epoch, window): a step is found in as much work as a window has pictures, there is nothing to save, and any
number of processes and workers reads the same. Where one window holds all shards, the order is that of a folder of the
same pictures.

A shard is checked when it is opened, and stays open while its window lasts. One for each process and worker.
"""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import torch
from PIL import Image
from tqdm.auto import tqdm

from hubgen.checks import whole
from hubgen.data.errors import DataError
from hubgen.data.examples import Examples
from hubgen.data.lazy import Lazy
from hubgen.data.order import EndlessRow, Order, generator_of, stream_of
from hubgen.data.pictures import MAX_PIXELS, decode_picture, on_white
from hubgen.data.shard_store import UNKNOWN, Store, open_store
from hubgen.data.views import Size
from hubgen.data.web.shards import PLACE, SUCCESS, TAR, StoredShard, read_table, table_columns

WINDOW = 16
"""Shards whose pictures are shuffled together"""

TEXT, CAPTION = "text", "caption"
"""Column of captions that is usual elsewhere, and the one that shards have"""


class Windows:
    """The order of the pictures of shards: windows of permuted shards, permuted inside (an `Order`).

    Args:
        counts: (S,), pictures of each shard.
        window: W, shards of a window.
        seed: Of the run.
        place: The row of the data of a shard's picture, by the numbers of both.
        stream: Name of the permutations; the order of shards has the same for all.
        repeats: How often each picture stands in an epoch.
        expect: Is told, at the beginning of a window, which shards it and the next one have.
    """

    def __init__(
        self,
        counts: np.ndarray,
        window: int,
        seed: int,
        place: Callable[[int, int], int],
        stream: str = "order",
        repeats: int = 1,
        expect: Callable[[Sequence[int]], None] | None = None,
    ) -> None:
        self.counts, self.window, self.seed, self.place = counts, whole("window", window), seed, place
        self.stream, self.repeats, self.expect = stream, whole("repeats", repeats), expect
        self._length = int(counts.sum(dtype=np.int64)) * repeats
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], tuple[np.ndarray, np.ndarray, torch.Tensor]] = OrderedDict()

    def __len__(self) -> int:
        return self._length

    def row(self, epoch: int, offset: int) -> int:
        _, begins = self._epoch(epoch)
        window = int(np.searchsorted(begins, offset, "right")) - 1
        shards, firsts, order = self._window(epoch, window)
        index = int(order[offset - int(begins[window])])
        which = int(np.searchsorted(firsts, index, "right")) - 1
        shard = int(shards[which])
        return self.place(shard, (index - int(firsts[which])) % int(self.counts[shard]))

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards of an epoch in their order (S,), and the offset at which each window begins."""

        def make() -> tuple[np.ndarray, np.ndarray]:
            generator = generator_of(self.seed, epoch, "shards")
            shards = torch.randperm(len(self.counts), generator=generator).numpy().astype(np.int32)
            behind = np.cumsum(self.counts[shards], dtype=np.int64)[self.window - 1 :: self.window] * self.repeats
            count = -(-len(shards) // self.window)
            return shards, np.concatenate(([0], behind))[:count]

        return _remembered(self._epochs, epoch, make)

    def _window(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
        """The shards of a window, its pictures before each of them, and its pictures in their order."""

        def make() -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
            shards = self._shards(epoch, window)
            behind = np.cumsum(self.counts[shards], dtype=np.int64) * self.repeats
            stream = self.stream if window == 0 else f"{self.stream}, window {window}"
            order = torch.randperm(int(behind[-1]), generator=generator_of(self.seed, epoch, stream))
            if self.expect is not None:
                last = (window + 1) * self.window >= len(self.counts)
                after = self._shards(epoch + last, 0 if last else window + 1)
                self.expect([*shards.tolist(), *after.tolist()])
            return shards, np.concatenate(([0], behind[:-1])), order

        return _remembered(self._windows, (epoch, window), make)

    def _shards(self, epoch: int, window: int) -> np.ndarray:
        """Those of a window, ascending."""
        return np.sort(self._epoch(epoch)[0][window * self.window : (window + 1) * self.window])


def _remembered(known: OrderedDict[Any, Any], key: Any, make: Callable[[], Any], most: int = 2) -> Any:
    """What is known of a key; the one that was asked for longest ago makes room."""
    if key in known:
        known.move_to_end(key)
    else:
        known[key] = make()
        while len(known) > most:
            known.popitem(last=False)
    return known[key]


@dataclass(frozen=True)
class Expected:
    """What a shard has to have."""

    rows: int
    pictures: int
    tar_bytes: int
    """-1: any"""
    captions: str | None
    """Column of which no row may be empty"""
    columns: Sequence[str]
    """Further ones"""


class OpenShard:
    """A shard whose table is in memory, of its successes alone, and whose tar is open.

    Args:
        shard: On the disk.
        expected: Of it.

    Raises:
        DataError: It has something else, or is damaged; the message names the file, what is there, what was expected.
    """

    def __init__(self, shard: StoredShard, expected: Expected) -> None:
        self.shard, self._tar = shard, -1
        self.captions = None if expected.captions is None else self._column_of(expected.captions)
        wanted = [*expected.columns, *([] if self.captions is None else [self.captions])]
        has_digest = "sha256" in table_columns(shard.table)
        own = ["key", "status", "width", "height", *(["sha256"] if has_digest else [])]
        table = shard.read(list(dict.fromkeys([*own, *wanted, *PLACE])))
        if len(table) != expected.rows:
            raise DataError(f"{shard.table}: got {len(table)} rows, expected {expected.rows} as its stats say")
        table = table.filter(pa.compute.equal(table.column("status"), SUCCESS)).combine_chunks()
        if len(table) != expected.pictures:
            raise DataError(f"{shard.table}: got {len(table)} successes, expected {expected.pictures} as its stats say")
        for name in (*PLACE, "width", "height"):
            if table.column(name).null_count:
                key = table.filter(pa.compute.is_null(table.column(name))).column("key")[0]
                raise DataError(f"{shard.table}: got no {name} of {key}, expected one of each success")
        self.offsets, self.lengths = (table.column(name).to_numpy() for name in PLACE)
        self.sizes = np.stack([table.column(name).to_numpy() for name in ("height", "width")], axis=1)
        self.keys = _whole_column(table, "key")
        self.columns = {name: _whole_column(table, name) for name in wanted}
        if self.captions is not None:
            self._check_captions(self.columns[self.captions])
        self.digest = _digest_of(table, (*own, *PLACE))
        self.members: dict[Hashable, np.ndarray] | None = None
        """By bucket, once they are known, places among the successes"""
        self._tar = os.open(shard.tar, os.O_RDONLY)
        length = os.fstat(self._tar).st_size
        least = int((self.offsets + self.lengths).max(initial=0))
        if length < least or expected.tar_bytes not in (UNKNOWN, length):
            told = f"at least {least}" if expected.tar_bytes == UNKNOWN else str(expected.tar_bytes)
            self.close()
            raise DataError(f"{shard.tar}: got {length} bytes, expected {told}; it is cut off or another one")

    def _column_of(self, captions: str) -> str:
        found = table_columns(self.shard.table)
        return CAPTION if captions == TEXT and TEXT not in found and CAPTION in found else captions

    def _check_captions(self, captions: Any) -> None:
        kind = captions.type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise DataError(f"{self.shard.table}: got {kind} in {self.captions!r}, expected captions")
        stripped = pa.compute.utf8_trim_whitespace(pa.compute.fill_null(captions, ""))
        empty = pa.compute.index(pa.compute.equal(stripped, ""), True).as_py()
        if empty >= 0:
            raise DataError(
                f"{self.shard.table}: got no words in {self.captions!r} of {self.keys[empty]}, expected a caption for "
                "each picture; `hubgen data filter` leaves rows out"
            )

    def picture(self, index: int) -> bytes:
        """The bytes of a picture.

        Raises:
            DataError: The tar ends before.
        """
        offset, length = int(self.offsets[index]), int(self.lengths[index])
        content = os.pread(self._tar, length, offset)
        if len(content) != length:
            raise DataError(f"{self.shard.tar}: is cut off at {offset + len(content)}, expected {length} more bytes")
        return content

    def name(self, index: int) -> str:
        """Of a picture, for messages."""
        return f"{self.shard.name}{TAR} {self.keys[index].as_py()}"

    def close(self) -> None:
        """Lets go of the tar."""
        if self._tar >= 0:
            os.close(self._tar)
            self._tar = -1

    def __del__(self) -> None:
        self.close()


def _digest_of(table: Any, names: Sequence[str]) -> str:
    """sha256 of some columns, of numbers or text."""
    digest = hashlib.sha256()
    for name in names:
        column = table.column(name)
        if pa.types.is_integer(column.type):
            digest.update(column.to_numpy().astype("<i8").tobytes())
        else:
            digest.update("\n".join(str(value) for value in column.to_pylist()).encode())
    return digest.hexdigest()


def _whole_column(table: Any, name: str) -> Any:
    """An array of a column."""
    column = table.column(name)
    return column.chunk(0) if column.num_chunks == 1 else pa.array([], column.type)


class ShardExamples(Examples):
    """The pictures of shards in img2dataset's layout, as `hubgen data` writes them.

    Args:
        source: Folder or URL.
        split: Name of a folder in it; without folders, all is "train".
        caption_column: Column of the caption; "text" also stands for `caption`. `None`: none is needed.
        columns: Further ones to read.
        max_pixels: Pixels of a picture at most.
        copies: Folder for manifests, and for the shards of a URL.
        window: Shards whose pictures are shuffled together.
        most: Shards of a URL that stay in `copies`; all if not given.

    Raises:
        DataError: There are no shards, or the first one is damaged or has not those columns.
    """

    def __init__(
        self,
        source: str,
        split: str = "train",
        *,
        caption_column: str | None = TEXT,
        columns: Sequence[str] = (),
        max_pixels: int = MAX_PIXELS,
        copies: Path,
        window: int = WINDOW,
        most: int | None = None,
    ) -> None:
        self.window, self.max_pixels = whole("window", window), max_pixels
        if most is not None and most < 2 * window:
            raise DataError(f"`most`: got {most} shards that stay, expected at least {2 * window}, two windows")
        self.store: Store = open_store(source, split, copies, most)
        self.manifest = self.store.manifest
        super().__init__(self.store.place, f"shards {caption_column} {sorted(columns)} {window}")
        self.caption_column, self._names = caption_column, tuple(columns)
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._most_open = window + 2
        count = int(self.manifest.starts[-1])
        self.file_names = Lazy(count, self._name)
        self.captions = Lazy(count, self._captions)
        self.sizes = Lazy(count, self._size)
        self.digests = Lazy(count, self._digest)
        self.repeats = Lazy(count, _once)
        self.columns = {name: Lazy(count, partial(self._value, name)) for name in columns}
        self.beside = {}
        self._at(0)  # what is wrong with all of them is said now

    def __getstate__(self) -> dict[str, Any]:
        """For data workers that are started anew: they open the shards themselves."""
        return {**self.__dict__, "_open": OrderedDict()}

    def _opened(self, number: int) -> OpenShard:
        def make() -> OpenShard:
            manifest = self.manifest
            rows, pictures, length = (
                int(values[number]) for values in (manifest.rows, manifest.pictures, manifest.tar_bytes)
            )
            with self.store.stored(number) as shard:
                return OpenShard(shard, Expected(rows, pictures, length, self.caption_column, self._names))

        opened: OpenShard = _remembered(self._open, number, make, self._most_open)
        return opened

    def _at(self, row: int) -> tuple[OpenShard, int]:
        """The shard of a row, and its place among its successes."""
        number = self.part_of(row)
        return self._opened(number), row - int(self.manifest.starts[number])

    def part_of(self, row: int) -> int:
        return int(np.searchsorted(self.manifest.starts, row, "right")) - 1

    @property
    def parts(self) -> Sequence[range]:
        return Lazy(len(self.manifest), self._part)

    def _part(self, number: int) -> range:
        return range(int(self.manifest.starts[number]), int(self.manifest.starts[number + 1]))

    # ---- of a row ----

    def _name(self, row: int) -> str:
        shard, index = self._at(row)
        return shard.name(index)

    def _captions(self, row: int) -> list[str]:
        shard, index = self._at(row)
        return [] if shard.captions is None else [shard.columns[shard.captions][index].as_py()]

    def _size(self, row: int) -> Size:
        shard, index = self._at(row)
        height, width = shard.sizes[index].tolist()
        return height, width

    def _digest(self, row: int) -> str:
        shard, index = self._at(row)
        return hashlib.sha256(f"{shard.digest} {index}".encode()).hexdigest()

    def _value(self, name: str, row: int) -> Any:
        shard, index = self._at(row)
        return shard.columns[name][index].as_py()

    def picture(self, row: int) -> Image.Image:
        shard, index = self._at(row)
        name = f"{shard.shard.folder / shard.name(index)}"
        picture = decode_picture(shard.picture(index), name, self.max_pixels)
        height, width = shard.sizes[index].tolist()
        if picture.size != (width, height):
            found = f"{picture.width}x{picture.height}"
            raise DataError(f"{name}: got {found} pixels, expected {width}x{height} as {shard.shard.table.name} says")
        return on_white(picture)

    def mask(self, row: int, column: str) -> Image.Image | None:
        raise self._lacks(column)

    def _further(self, row: int, column: str) -> Image.Image:
        raise self._lacks(column)

    def _lacks(self, column: str) -> DataError:
        return DataError(f"{self.place}: got the column {column!r} of pictures, expected none: shards have one a row")

    def drop(self, rows: Mapping[int, str]) -> None:
        raise DataError(f"{self.place}: got rows to leave out, expected none; `hubgen data filter` leaves rows out")

    # ---- of all ----

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.reading}\n{self.manifest.fingerprint}".encode()).hexdigest()

    def distinct(self, column: str) -> list[Any]:
        found: dict[Any, None] = {}
        for number in tqdm(range(len(self.manifest)), desc=f"values of {column}", disable=len(self.manifest) < 1000):
            with self.store.stored(number) as shard:
                table = read_table(shard.table, ["status", column])
            good = table.filter(pa.compute.equal(table.column("status"), SUCCESS))
            found |= dict.fromkeys(good.column(column).unique().to_pylist())
        return list(found)

    def endless_row(
        self,
        buckets: Sequence[Hashable],
        known: Sequence[Hashable],
        batch_size: int,
        seed: int,
        repeats: int = 1,
    ) -> EndlessRow:
        """See `Examples.endless_row`; with several buckets, the sizes of all pictures are read once."""
        pictures, expect = self.manifest.pictures, self.store.expect
        if len(known) == 1:
            order = Windows(pictures, self.window, seed, self._plain, stream_of(known[0], 1), repeats, expect)
            return EndlessRow({known[0]: order}, batch_size, seed)
        counts = self._counted(buckets)
        orders: dict[Hashable, Order] = {}
        for bucket, own in counts.items():
            place = partial(self._member, buckets, bucket)
            orders[bucket] = Windows(own, self.window, seed, place, stream_of(bucket, len(counts)), repeats, expect)
        self._most_open = 2 * self.window + 2  # buckets reach the end of a window one after the other
        return EndlessRow(orders, batch_size, seed)

    def _plain(self, shard: int, index: int) -> int:
        return int(self.manifest.starts[shard]) + index

    def _counted(self, buckets: Sequence[Hashable]) -> dict[Hashable, np.ndarray]:
        """How many pictures of each bucket each shard has, (S,)."""
        counts: dict[Hashable, np.ndarray] = {}
        shards = range(len(self.manifest))
        for number in tqdm(shards, desc="sizes of pictures", disable=len(shards) < 20, leave=False):
            for bucket, members in self._members(buckets, number).items():
                counts.setdefault(bucket, np.zeros(len(shards), np.int32))[number] = len(members)
        return counts

    def _members(self, buckets: Sequence[Hashable], number: int) -> dict[Hashable, np.ndarray]:
        """The pictures of a shard by bucket, each as its place among the successes."""
        sizes, first = self._opened(number).sizes, int(self.manifest.starts[number])
        _, examples, kinds = np.unique(sizes, axis=0, return_index=True, return_inverse=True)
        found: dict[Hashable, list[int]] = {}
        for kind, example in enumerate(examples.tolist()):
            found.setdefault(buckets[first + example], []).append(kind)
        return {bucket: np.flatnonzero(np.isin(kinds.reshape(-1), own)) for bucket, own in found.items()}

    def _member(self, buckets: Sequence[Hashable], bucket: Hashable, number: int, index: int) -> int:
        shard = self._opened(number)
        if shard.members is None:
            shard.members = self._members(buckets, number)
        return int(self.manifest.starts[number]) + int(shard.members[bucket][index])


def _once(row: int) -> int:
    return 1
