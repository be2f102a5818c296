"""Where shards of web data lie, a folder or a URL, and how many pictures each has; see `hubgen.data.web.shards`.

    store = open_store("s3://bucket/kept", "train", cache_dir)
    store.manifest.pictures                                # (S,), of each shard: the successes of its `_stats.json`
    with store.stored(7) as shard: ...                     # on the disk: copied from the URL when first asked for

The manifest is made of all `_stats.json` once. Of many shards it is kept as one file of arrays, so that 585,000 of them
open in a moment; it counts as long as the folder, or what the URL lists, is unchanged.
"""

import fcntl
import hashlib
import json
import os
import queue
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from hubgen.data.errors import DataError
from hubgen.data.web.shards import STATS, TABLE, TAR, StoredShard
from hubgen.data.web.stages import STAGES
from hubgen.data.webdataset import has_counts
from hubgen.errors import FULL, one_line
from hubgen.formats.atomic import written

KEPT = 1000
"""Shards from which on the manifest is kept in a file: fewer are read faster than a user notices"""

TRAIN = "train"
"""Split that a folder without splits is"""

AT_ONCE = 256
"""Files that a URL is asked for together"""

UNKNOWN = -1

CHANGES = ("size", "ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created", "checksum")
"""What file systems say of a file that changes with its content; each says some of it"""


@dataclass(frozen=True)
class Manifest:
    """What is known of S shards without opening them, in the order of their numbers."""

    names: np.ndarray
    """(S,) bytes: b"00012\""""
    rows: np.ndarray
    """(S,) int32, of failures too"""
    pictures: np.ndarray
    """(S,) int32, the successes"""
    tar_bytes: np.ndarray
    """(S,) int64, lengths of the tars; -1 where the stats do not tell"""
    digests: np.ndarray
    """(S,) uint64, of what the stats say of the content"""

    def __len__(self) -> int:
        return len(self.names)

    def name(self, number: int) -> str:
        """Of a shard."""
        return bytes(self.names[number]).decode()

    @cached_property
    def starts(self) -> np.ndarray:
        """(S + 1,) int64, the pictures before each shard, and all of them."""
        return np.concatenate(([0], np.cumsum(self.pictures, dtype=np.int64)))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of all of it."""
        digest = hashlib.sha256()
        for field in fields(self):
            digest.update(np.ascontiguousarray(getattr(self, field.name)).data)
        return digest.hexdigest()

    @classmethod
    def of(cls, names: Sequence[str], contents: Iterable[tuple[str, bytes]], place: str) -> "Manifest":
        """Of the contents of the `_stats.json` of shards.

        Args:
            names: Of the shards.
            contents: Place, for messages, and content of each.
            place: Of all of them, for messages.

        Raises:
            DataError: A file is not one of counts, or there is no picture.
        """
        kinds = (np.int32, np.int32, np.int64, np.uint64)
        values = [np.zeros(len(names), kind) for kind in kinds]
        for number, one in enumerate(contents):
            for array, value in zip(values, _counts(*one), strict=True):
                array[number] = value
        if not values[1].any():
            raise DataError(f"{place}: {len(names)} shards have no picture, expected some")
        return cls(np.array([name.encode() for name in names]), *values)

    def save(self, path: Path) -> None:
        """Writes it to a file of arrays (npz)."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with written(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **{field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def load(cls, path: Path) -> "Manifest | None":
        """What `save` wrote; `None` if it is not there or damaged."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return cls(**{field.name: arrays[field.name] for field in fields(cls)})
        except (OSError, ValueError, KeyError, EOFError):
            return None


def _counts(place: str, content: bytes) -> tuple[int, int, int, int]:
    """Rows, pictures, bytes of the tar and digest, by a `_stats.json`."""
    try:
        stats = json.loads(content)
        rows, pictures = stats["count"], stats["successes"]
        length = stats.get("tar_bytes", UNKNOWN)
        if not all(type(number) is int for number in (rows, pictures, length)) or not 0 <= pictures <= rows:
            raise ValueError(f"count {rows!r}, successes {pictures!r}")
    except (ValueError, TypeError, KeyError, AttributeError) as problem:
        raise DataError(f"{place}: {one_line(problem)}, expected the counts of a shard") from problem
    # The records of stages hold digests of all that they made; without any, times tell one download from another.
    told = json.dumps([stats[STAGES], length], sort_keys=True).encode() if stats.get(STAGES) else content
    return rows, pictures, length, int.from_bytes(hashlib.sha256(told).digest()[:8], "little")


# ---- folders and URLs ----


class Store:
    """Shards in a folder.

    Args:
        folder: Of them.
        copies: Where the manifest of many shards is kept.

    Raises:
        DataError: A shard is not whole, or there are none.
    """

    def __init__(self, folder: Path, copies: Path) -> None:
        self.place, self.folder = str(folder), folder
        self.manifest = _kept(copies, key_of(folder), self._made)

    def _made(self) -> Manifest:
        with os.scandir(self.folder) as entries:
            names = whole_shards([entry.name for entry in entries], self.place)
        paths = (self.folder / f"{name}{STATS}" for name in _shown(names, self.place))
        return Manifest.of(names, ((str(path), path.read_bytes()) for path in paths), self.place)

    @contextmanager
    def stored(self, number: int) -> Iterator[StoredShard]:
        """A shard on the disk, which stays there until its files are open."""
        yield StoredShard(self.folder, self.manifest.name(number))

    def expect(self, numbers: Sequence[int]) -> None:
        """Says which shards will be asked for next."""


class RemoteStore(Store):
    """Shards at a URL of any file system that fsspec knows; each is copied whole when it is first asked for.

    Args:
        url: Of their folder, such as `s3://bucket/kept`.
        split: Name of a folder in it; without such, all is "train".
        copies: Where they, and the manifest, are kept.
        most: Shards that stay there; the one that was used longest ago makes room. All if not given.

    Raises:
        DataError: The URL cannot be read, a shard is not whole, or there are none.
    """

    def __init__(self, url: str, split: str, copies: Path, most: int | None = None) -> None:
        self.url, self.most = url.rstrip("/"), most
        self._systems: dict[int, tuple[Any, str]] = {}
        self._ahead: tuple[int, queue.SimpleQueue[int]] | None = None
        listed = self._list()
        if split in listed and listed[split].get("type") == "directory":
            self.url, self._systems = f"{self.url}/{split}", {}
            listed = self._list()
        elif split != TRAIN:
            raise DataError(f"{self.url}/{split}: no such folder, expected one of shards for the split {split!r}")
        self.place = self.url
        self.names = whole_shards(listed, self.place)
        digest = hashlib.sha256(self.url.encode())
        for name in self.names:
            told = listed[f"{name}{STATS}"]
            digest.update(repr([name, *(str(told.get(key)) for key in CHANGES)]).encode())
        self.manifest = _kept(copies, digest.hexdigest(), self._made, always=True)
        self.folder = copies / "shards" / hashlib.sha256(self.url.encode()).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def _system(self) -> Any:
        """fsspec's file system, one for each process: its connections do not survive a fork."""
        return self._opened()[0]

    def _opened(self) -> tuple[Any, str]:
        """The file system, and the folder in it."""
        if os.getpid() not in self._systems:
            import fsspec

            self._systems = {os.getpid(): fsspec.core.url_to_fs(self.url)}
        return self._systems[os.getpid()]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_systems": {}, "_ahead": None}

    def _path(self, name: str = "") -> str:
        _, inside = self._opened()
        return f"{inside}/{name}" if name else inside

    @contextmanager
    def _said(self, what: str) -> Iterator[None]:
        try:
            yield
        except DataError:
            raise
        except OSError as error:
            if error.errno in FULL:
                raise DataError(
                    f"{self.folder}: disk full; name another data.cache_dir, or keep fewer shards by data.cache_shards"
                ) from error
            raise DataError(f"{what}: {one_line(error) or 'not found'}, expected a shard folder") from error
        except Exception as error:  # file systems fail in every way there is; a missing package names itself
            raise DataError(f"{what}: {one_line(error)}") from error

    def _list(self) -> dict[str, Any]:
        """What the file system says of each file and folder, by name."""
        with self._said(self.url):
            listed = self._system.ls(self._path(), detail=True)
        return {str(one["name"]).rstrip("/").rpartition("/")[2]: one for one in listed}

    def _made(self) -> Manifest:
        def contents() -> Iterator[tuple[str, bytes]]:
            for first in _shown(range(0, len(self.names), AT_ONCE), self.place):
                paths = [self._path(f"{name}{STATS}") for name in self.names[first : first + AT_ONCE]]
                with self._said(self.url):
                    found = self._system.cat(paths, recursive=False)
                yield from ((path, found[path]) for path in paths)

        return Manifest.of(self.names, contents(), self.place)

    @contextmanager
    def stored(self, number: int) -> Iterator[StoredShard]:
        """A shard on the disk, which stays there until its files are open; it is copied there if it is not.

        Raises:
            DataError: The URL cannot be read, or the disk is full.
        """
        name = self.manifest.name(number)
        shard = StoredShard(self.folder / f"{name}-{int(self.manifest.digests[number]):016x}", name)
        with _alone(shard.folder):
            if not shard.folder.is_dir():
                with self._said(f"{self.url}/{name}"), written(shard.folder, durable=False) as temporary:
                    temporary.mkdir()
                    for ending in (TAR, TABLE, STATS):
                        self._system.get_file(self._path(f"{name}{ending}"), str(temporary / f"{name}{ending}"))
            os.utime(shard.folder)
            yield shard
        self._make_room(shard.folder)

    def _make_room(self, own: Path) -> None:
        """Removes what was used longest ago. Whoever has such a shard open reads on: the system keeps its bytes."""
        if self.most is None:
            return
        found = []
        for path in self.folder.glob("[0-9]*-*"):
            try:
                found.append((path.stat().st_mtime_ns, path))
            except FileNotFoundError:  # another process made room
                continue
        for _, path in sorted(found)[: -self.most]:
            if path != own:
                with _alone(path, wait=False) as alone:
                    if alone:
                        shutil.rmtree(path, ignore_errors=True)

    def expect(self, numbers: Sequence[int]) -> None:
        """Copies shards that will be asked for next, in a thread; what fails there is said when they are asked for."""
        if self._ahead is None or self._ahead[0] != os.getpid():
            self._ahead = os.getpid(), queue.SimpleQueue()
            threading.Thread(target=self._copy_ahead, args=(self._ahead[1],), daemon=True).start()
        for number in numbers:
            self._ahead[1].put(number)

    def _copy_ahead(self, numbers: "queue.SimpleQueue[int]") -> None:
        while True:
            try:
                with self.stored(numbers.get()):
                    pass
            except (DataError, OSError):
                continue


@contextmanager
def _alone(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Lets one of all processes and threads copy, open or remove a shard; whether it is this one."""
    with (folder.parent / f".{folder.name}.lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def key_of(folder: Path) -> str:
    """What tells a folder's shards from others: whatever comes or changes is renamed into its place, and so dated."""
    return f"{folder.resolve()} {folder.stat().st_mtime_ns}"


def manifest_file(copies: Path, key: str) -> Path:
    """Where a manifest is kept."""
    return copies / "manifests" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"


def _kept(copies: Path, key: str, make: Callable[[], Manifest], always: bool = False) -> Manifest:
    """The manifest of a key, made if it is not kept yet, and kept if it is long or `always`."""
    path = manifest_file(copies, key)
    manifest = Manifest.load(path)
    if manifest is None:
        manifest = make()
        if always or len(manifest) >= KEPT:
            manifest.save(path)
    return manifest


def _shown(values: Any, place: str) -> Any:
    """With a progress bar, if there are many."""
    return tqdm(values, desc=f"counts of {Path(place).name}", disable=len(values) < KEPT, leave=False)


def whole_shards(files: Iterable[str], place: str) -> list[str]:
    """The names of the shards among the names of files, in the order of their numbers.

    Raises:
        DataError: There are none, or one lacks a file.
    """
    known: Mapping[str, set[str]] = {ending: set() for ending in (TAR, TABLE, STATS)}
    for file in files:
        for ending, found in known.items():
            if file.endswith(ending) and file.isascii() and file.removesuffix(ending).isdecimal():
                found.add(file.removesuffix(ending))
    for ending, other in ((TAR, TABLE), (TABLE, TAR), (STATS, TAR), (TAR, STATS)):
        lacking = known[ending] - known[other]
        if lacking:
            name = min(lacking, key=int)
            why = ", so the shard is not whole; start the command that writes it again" if other == STATS else ""
            raise DataError(f"{place}/{name}{ending}: got no {name}{other} beside it, expected both{why}")
    if not known[STATS]:
        raise DataError(f"{place}: got no shard, expected 00000{TAR}, 00000{TABLE} and 00000{STATS}")
    return sorted(known[STATS], key=int)


def open_store(source: str, split: str, copies: Path, most: int | None = None) -> Store:
    """The shards of a folder or URL, or of the folder of a split in it.

    Args:
        source: Folder or URL.
        split: Name of a folder in it; without folders, all is "train".
        copies: Where manifests, and the shards of URLs, are kept.
        most: Shards of a URL that stay there.

    Raises:
        DataError: There are no such shards.
    """
    if "://" in source:
        return RemoteStore(source, split, copies, most)
    folder = Path(source).expanduser()
    if has_counts(folder / split):
        return Store(folder / split, copies)
    if split != TRAIN:
        raise DataError(f"{folder / split}: got no shards, expected a folder of them for the split {split!r}")
    return Store(folder, copies)
