"""Which pictures a training step takes and which random numbers belong to each: functions of the seed, not of history.

The pictures stand in an endless row, one permutation of the data after the other, and a step takes the next G of it,
the global batch. Everything random about a picture at a place of the row (its noise, time, crop, caption) derives from
(seed, place). So a resumed run draws what an uninterrupted one drew, on any number of processes, whatever was saved,
and however often validation drew random numbers in between. There is no state to save.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from hubgen.checks import whole
from hubgen.data.errors import DataError


def seed_of(seed: int, number: int, stream: str = "noise") -> int:
    """A 63-bit seed that differs for every (seed, number, stream)."""
    digest = hashlib.blake2b(f"{seed}/{stream}/{number}/0".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_of(seed: int, number: int, stream: str = "noise", device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator for one use.

    Args:
        seed: Seed of the run.
        number: What the use belongs to, such as a place in the row or a step.
        stream: Name of the use; two uses at the same place have different names ("noise", "caption", "crop").
        device: Where the numbers are drawn; the same seed draws other numbers on another kind of device.
    """
    return torch.Generator(device).manual_seed(seed_of(seed, number, stream))


@dataclass(frozen=True)
class Draw:
    """A picture at a place of the endless row."""

    place: int
    """0, 1, ...: two uses of a picture have different ones"""
    row: int
    """Of the data"""


class Order(Protocol):
    """The pictures of one bucket, in another order in each epoch; a function, which remembers only to save time."""

    def __len__(self) -> int:
        """Pictures of an epoch."""

    def row(self, epoch: int, offset: int) -> int:
        """The row of the data whose picture comes in an epoch behind `offset` others."""


class Shuffled:
    """One permutation of some rows after the other.

    Args:
        rows: Of the data.
        seed: Of the run.
        stream: Name of the permutations, see `generator_of`.
    """

    def __init__(self, rows: Sequence[int], seed: int, stream: str) -> None:
        self._rows, self.seed, self.stream = torch.tensor(rows), seed, stream
        self._permutations: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, epoch: int, offset: int) -> int:
        if epoch not in self._permutations:
            # A batch reads neighbouring epochs in ascending order, so older permutations are not asked for again.
            kept = {key: order for key, order in self._permutations.items() if key >= epoch - 1}
            order = torch.randperm(len(self._rows), generator=generator_of(self.seed, epoch, self.stream))
            self._permutations = {**kept, epoch: self._rows[order]}
        return int(self._permutations[epoch][offset])


def stream_of(bucket: Hashable, buckets: int) -> str:
    """Name of the permutations of a bucket, one of several."""
    return "order" if buckets == 1 else f"order {bucket}"


def orders_of(buckets: Sequence[Hashable], seed: int, repeats: Sequence[int] | None = None) -> dict[Hashable, Order]:
    """The order of each bucket's pictures; arguments are those of `EndlessRow`."""
    members: dict[Hashable, list[int]] = {}
    for row, bucket in enumerate(buckets):
        members.setdefault(bucket, []).extend([row] * (1 if repeats is None else whole("repeats", repeats[row])))
    return {bucket: Shuffled(rows, seed, stream_of(bucket, len(members))) for bucket, rows in members.items()}


class EndlessRow:
    """The pictures of each step: of one bucket, so that they have one size.

    Every bucket has an endless row of its own, of which a step takes the next G. An epoch is a shuffled sequence of
    steps in which each bucket comes as often as its pictures ask for; what is left of a bucket at its end is taken in a
    later epoch. No picture is dropped, and between two uses of one every other one of its bucket is used within two
    epochs.

    Args:
        buckets: Of each picture, what it has to have in common with the others of a step; or the order of the pictures
            by what they have in common.
        batch_size: G, the pictures of a step, of all processes and accumulated batches together.
        seed: Of the run.
        repeats: How often each picture stands in an epoch; once if not given.

    Raises:
        ValueError: A size below 1.
        DataError: There are several buckets, and one of them has fewer pictures than a step takes.
    """

    def __init__(
        self,
        buckets: Sequence[Hashable] | Mapping[Hashable, Order],
        batch_size: int,
        seed: int,
        repeats: Sequence[int] | None = None,
    ) -> None:
        whole("buckets", len(buckets))
        self.batch_size, self.seed = whole("batch_size", batch_size), seed
        orders = buckets if isinstance(buckets, Mapping) else orders_of(buckets, seed, repeats)
        self.buckets = sorted(orders, key=str)
        self._orders = [orders[bucket] for bucket in self.buckets]
        self._counts = [len(order) for order in self._orders]
        small = [f"{bucket} has {count}" for bucket, count in zip(self.buckets, self._counts, strict=True)]
        small = [text for text, count in zip(small, self._counts, strict=True) if count < batch_size]
        if small and len(self.buckets) > 1:
            raise DataError(
                f"buckets with fewer pictures than a batch, {batch_size}: {', '.join(small)}; expected at least "
                f"{batch_size} in each: make the batch smaller, repeat the pictures, or use fewer buckets"
            )
        self._epoch: tuple[int, list[int]] | None = None

    def __len__(self) -> int:
        """Pictures of an epoch, repeated ones counted as often."""
        return sum(self._counts)

    def draws(self, step: int, first: int = 0, count: int | None = None) -> list[Draw]:
        """The pictures of `step`, counted from 0: all, or `count` of them from the `first` on."""
        bucket, number = self._bucket(step)
        inside = range(first, self.batch_size if count is None else first + count)
        return [
            Draw(step * self.batch_size + index, self._row(bucket, number * self.batch_size + index))
            for index in inside
        ]

    def _steps(self, epochs: int) -> int:
        """Steps of the first epochs."""
        return sum(epochs * count // self.batch_size for count in self._counts)

    def _bucket(self, step: int) -> tuple[int, int]:
        """The bucket of a step, and how many steps had it before."""
        whole("step", step, 0)
        if len(self._counts) == 1:
            return 0, step
        # An epoch is at least a step, and never more than this many.
        epoch = bisect_right(range(step + 1), step, key=self._steps) - 1
        if self._epoch is None or self._epoch[0] != epoch:
            quotas = [[(epoch + more) * count // self.batch_size for more in (0, 1)] for count in self._counts]
            sequence = torch.tensor([k for k, (begin, end) in enumerate(quotas) for _ in range(end - begin)])
            order = torch.randperm(len(sequence), generator=generator_of(self.seed, epoch, "buckets"))
            self._epoch = epoch, sequence[order].tolist()
        sequence_, inside = self._epoch[1], step - self._steps(epoch)
        bucket = sequence_[inside]
        before = sequence_[:inside].count(bucket)
        return bucket, epoch * self._counts[bucket] // self.batch_size + before

    def _row(self, bucket: int, position: int) -> int:
        epoch, offset = divmod(position, self._counts[bucket])
        return self._orders[bucket].row(epoch, offset)
