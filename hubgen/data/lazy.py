"""Sequences of what is read from shards, or made of it, when it is asked for; they may be longer than memory is large.

sizes = Lazy(5_850_000_000, shards.size)               # nothing is read
buckets = each(sizes, lambda row, size: bucket_of(size, known))
buckets[4_000_000_000]                                 # one row is read
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Generic, TypeVar, overload

T = TypeVar("T")
U = TypeVar("U")


class Lazy(Sequence[T], Generic[T]):
    """A sequence whose elements are read, or made, whenever they are asked for.

    Args:
        length: Of it.
        get: Gives the element at an index.
    """

    def __init__(self, length: int, get: Callable[[int], T]) -> None:
        self._length, self._get = length, get

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self._get(one) for one in range(*index.indices(self._length))]
        if not -self._length <= index < self._length:
            raise IndexError(f"index: got {index}, expected one below {self._length}")
        return self._get(index % self._length)


def each(values: Sequence[T], make: Callable[[int, T], U]) -> Sequence[U]:
    """What is made of each value: now, of a list, and whenever it is asked for, of a `Lazy`.

    Args:
        values: Some.
        make: Is given the index and the value.
    """
    if isinstance(values, Lazy):
        return Lazy(len(values), partial(_made, values, make))
    return [make(index, value) for index, value in enumerate(values)]


def _made(values: Sequence[T], make: Callable[[int, T], U], index: int) -> U:
    return make(index, values[index])
