"""What a frozen encoder says about the data, computed once: tensors by key, in shards that are read by mmap.

A key names all that a value follows from about its example (the bytes of a picture and the part that is shown, or the
words of a caption); the cache's own `content` names all that is common (the encoder's weights and config, its lengths).
A shard holds the keys whose digests begin alike, and its name is a digest of both. So when an encoder, a picture or a
caption changes, so does a name, and a stale file is never read; the order of rows plays no part, and one more picture
costs one shard.

Every process makes shards of its own, of which each is written under another name and renamed: a run that is killed
goes on behind the last whole shard. A shard whose bytes rotted is made anew.
"""

import fcntl
import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from tqdm.auto import tqdm

from hubgen.data.errors import DataError
from hubgen.errors import FULL
from hubgen.formats.atomic import written

LAYOUT = 2
"""Version of the files' content; part of every name."""

SHARD = 256
"""Keys of a shard, about."""

WAIT_SECONDS = 0.2
OPEN_FILES = 256

Encoded = Iterable[tuple[str, Mapping[str, torch.Tensor]]]
Encode = Callable[[Sequence[str]], Encoded]
V = TypeVar("V")


class TensorCache:
    """Tensors by key.

    Args:
        folder: Of the files; made when the first is written.
        content: What it holds ("latents", "text"), with what all values follow from, as JSON values.
        keys: Of all values; any order, repetitions allowed.
        whole: Whether all stand in one file, however many they are.
    """

    def __init__(
        self, folder: str | Path, content: Mapping[str, Any], keys: Iterable[str], whole: bool = False
    ) -> None:
        self.folder = Path(folder)
        self.content = {**content, "layout": LAYOUT}
        self.name = str(content["content"])
        digests = {key: hashlib.sha256(key.encode()).hexdigest() for key in keys}
        # Shards are the keys of one beginning, so that other keys do not move a key to another shard.
        bits = max((len(digests) - 1).bit_length() - (SHARD - 1).bit_length(), 0)
        bits = 0 if whole else bits
        shards: dict[int, list[str]] = {}
        for key in sorted(digests, key=digests.__getitem__):
            shards.setdefault(int(digests[key][:16], 16) >> (64 - bits) if bits else 0, []).append(key)
        self._shards = list(shards.values())
        self._place = {key: (number, row) for number, keys in enumerate(self._shards) for row, key in enumerate(keys)}
        self._open: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self._place)

    def __contains__(self, key: str) -> bool:
        return key in self._place

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        digest = hashlib.sha256(self._description(shard).encode()).hexdigest()[:24]
        return self.folder / f"{self.name}-{digest}.safetensors"

    def __getitem__(self, key: str) -> dict[str, torch.Tensor]:
        """The tensors of a key, which lie in the file until they are used.

        Raises:
            DataError: There is no such key.
        """
        try:
            number, row = self._place[key]
        except KeyError:
            raise DataError(f"{self.name}: {key!r} is not among the {len(self)} that were cached.") from None
        if number not in self._open:
            if len(self._open) >= OPEN_FILES:
                self._open.pop(next(iter(self._open)))
            self._open[number] = safe_open(self.path(number), framework="pt")
        file = self._open[number]
        names = self._names(number)
        return {name: file.get_tensor(f"{row}.{name}") for name in names}

    def _names(self, number: int) -> list[str]:
        return json.loads(self._open[number].metadata()["names"])

    def __getstate__(self) -> dict[str, Any]:
        """For data workers that are started anew: they open the files themselves."""
        return {**self.__dict__, "_open": {}}

    def fill(
        self, encode: Encode, rank: int = 0, world_size: int = 1, show_progress: bool = True, number: int = 0
    ) -> None:
        """Makes the shards that are not there, in turns with other processes that do the same; returns when all are.

        Processes that cannot see each other's files make all of them; no process waits for another in a collective.

        Args:
            encode: Gives the tensors of keys of one shard, in any order.
            rank: Of this process.
            world_size: Processes.
            show_progress: Whether a progress bar shows how much is made here.
            number: Of this cache, where each process fills several: each reads all of some to check them.

        Raises:
            DataError: An encoder gave NaN or infinite values, or the disk is full; what is made already stays.
        """
        count = len(self._shards)
        first = rank * count // world_size
        pending = [(first + index) % count for index in range(count)] if count else []
        missing = [one for one in pending if not self._whole(one, deep=(number + one) % world_size == rank)]
        total = sum(len(self._shards[one]) for one in missing)
        with tqdm(total=total, desc=f"encoding {self.name}", disable=not show_progress or not total) as progress:
            while missing:
                for one in list(missing):
                    with self._mine(one) as mine:
                        if mine:
                            if not self._whole(one, deep=True):
                                self._make(one, encode, progress)
                            missing.remove(one)
                if missing:  # another process is at them
                    time.sleep(WAIT_SECONDS)
                    missing = [one for one in missing if not self._whole(one, deep=False)]

    # ---- files ----

    def _description(self, number: int) -> str:
        keys = hashlib.sha256("\0".join(self._shards[number]).encode()).hexdigest()
        return json.dumps({**self.content, "keys": keys}, sort_keys=True)

    def _whole(self, number: int, deep: bool) -> bool:
        """Whether a shard is there; `deep` reads all of it."""
        try:
            with safe_open(self.path(number), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("key") != self._description(number):
                    return False
                if not deep:
                    return True
                tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        except (FileNotFoundError, SafetensorError):
            return False  # not there, or not whole
        return metadata.get("sha256") == digest_of(tensors)

    def _make(self, number: int, encode: Encode, progress: tqdm) -> None:
        tensors: dict[str, torch.Tensor] = {}
        names: list[str] = []
        for key, values in encode(self._shards[number]):
            row = self._place[key][1]
            names = sorted(values)
            for name, value in values.items():
                if not value.isfinite().all():
                    raise DataError(
                        f"{self.name}: the encoder's {name} holds NaN or infinite values for {key!r}; expected finite "
                        "ones."
                    )
                tensors[f"{row}.{name}"] = value.detach().to("cpu", copy=True).contiguous()
            progress.update()
        metadata = {"key": self._description(number), "names": json.dumps(names)}
        metadata["sha256"] = digest_of(dict(sorted(tensors.items())))
        try:
            with written(self.path(number), durable=False) as temporary:  # its digest tells a damaged one
                save_file(tensors, temporary, metadata=metadata)
        except OSError as error:
            if error.errno not in FULL:
                raise
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            need = size / len(self._shards[number]) * len(self) / 1e9
            raise DataError(
                f"{self.folder}: disk full; the cache of {len(self)} {self.name} needs about {need:.3g} GB there. What "
                "is made stays: free some space, or name another folder, and start the same command again"
            ) from error

    @contextmanager
    def _mine(self, number: int) -> Iterator[bool]:
        """Whether this process may make a shard; another one that does so holds its lock."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(number).with_suffix(".lock")
        with path.open("ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            try:
                yield True
            finally:
                path.unlink(missing_ok=True)


class PartCaches(Generic[V]):
    """The caches of the parts of a source (`Examples.parts`): the keys of a part are known when it is opened.

    A source in one part has the files of one `TensorCache`; of several parts, such as shards, each has one file.

    Args:
        folder: Of the files.
        content: See `TensorCache`.
        parts: How many there are.
        keys: Of a part, by its number; each with what `fill` hands on.
        most: Parts that stay open.
    """

    def __init__(
        self,
        folder: str | Path,
        content: Mapping[str, Any],
        parts: int,
        keys: Callable[[int], Mapping[str, V]],
        most: int = 32,
    ) -> None:
        self.folder, self.content, self.parts, self.keys, self.most = folder, content, parts, keys, most
        self._open: OrderedDict[int, tuple[TensorCache, Mapping[str, V]]] = OrderedDict()

    def of(self, part: int) -> TensorCache:
        """The cache of a part."""
        return self._opened(part)[0]

    def __getitem__(self, key: str) -> dict[str, torch.Tensor]:
        """The tensors of a key of the first part, which is all of most sources; see `TensorCache`."""
        return self.of(0)[key]

    def _opened(self, part: int) -> tuple[TensorCache, Mapping[str, V]]:
        if part in self._open:
            self._open.move_to_end(part)
        else:
            keys = self.keys(part)
            self._open[part] = TensorCache(self.folder, self.content, keys, whole=self.parts > 1), keys
            if len(self._open) > self.most:
                self._open.popitem(last=False)
        return self._open[part]

    def fill(
        self,
        encode: Callable[[Mapping[str, V], Sequence[str]], Encoded],
        rank: int = 0,
        world_size: int = 1,
        show_progress: bool = True,
    ) -> None:
        """Makes what is not there, in turns with other processes that do the same; see `TensorCache.fill`.

        Args:
            encode: Is also given the keys of the part, with what `keys` gave for each.
            rank: Of this process.
            world_size: Processes.
            show_progress: Whether a progress bar shows how much is made here.
        """
        several = self.parts > 1
        first = rank * self.parts // world_size
        order = [(first + index) % self.parts for index in range(self.parts)] if several else [0]
        name = f"encoding {self.content['content']}, shards"
        for part in tqdm(order, desc=name, disable=not (show_progress and several)):
            cache, keys = self._opened(part)
            cache.fill(partial(encode, keys), rank, world_size, show_progress and not several, part)


def module_digest(module: nn.Module) -> str:
    """Hex sha256 of a model's config, and of the name, shape, dtype and bytes of each of its tensors."""
    digest = hashlib.sha256()
    config = getattr(module, "config", None)
    if config is not None:
        values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        # Where a model lies (_name_or_path) and which version wrote it does not change what it says.
        values = {k: v for k, v in values.items() if not k.startswith("_") and k != "transformers_version"}
        digest.update(json.dumps(values, sort_keys=True, default=str).encode())
    digest.update(digest_of(module.state_dict()).encode())
    return digest.hexdigest()


def digest_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hex sha256 of the name, shape, dtype and bytes of each tensor."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        for part in packed_parts(tensor.detach()):
            digest.update(part.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def packed_parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors that a quantised one holds (torchao's); of a plain one, itself."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from packed_parts(getattr(tensor, name))


def tokenizer_digest(tokenizer: Any) -> str:
    """Hex sha256 of how a tokenizer reads words, whatever it was called with last."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        content["padding"] = content["truncation"] = None
    else:
        content = tokenizer.get_vocab()
    description = f"{type(tokenizer).__name__} {tokenizer.padding_side} {json.dumps(content, sort_keys=True)}"
    return hashlib.sha256(description.encode()).hexdigest()
