"""Pictures with what is known of them, wherever they lie; `hubgen.data.sources` opens them."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from PIL import Image

from hubgen.data.errors import DataError
from hubgen.data.lazy import each
from hubgen.data.order import EndlessRow
from hubgen.data.pictures import on_white
from hubgen.data.views import Size

MASK, BESIDE = "whose mask it is", "beside which it stands"
SKIPPED_AT_MOST = 0.5
"""Share of rows that may be left out before a source as a whole counts as unusable."""


class Beside(NamedTuple):
    """A further picture of a row."""

    name: str
    """For messages"""
    digest: str
    """Of what it is made of, in hexadecimal or in words"""


class Examples(ABC):
    """Rows of pictures, counted from 0.

    Args:
        place: Of the source, for messages.
        reading: Whatever else its pictures and captions depend on, for the fingerprint.
    """

    file_names: Sequence[str]
    """Of each row, for messages and records"""
    captions: Sequence[Sequence[str]]
    """Wordings of each picture's caption, the caption first; none where none were asked for"""
    sizes: Sequence[Size]
    """(height, width) of each picture in pixels, upright"""
    digests: Sequence[str]
    """Hexadecimal, of what each picture is made of"""
    repeats: Sequence[int]
    """How often each picture stands in an epoch"""
    columns: Mapping[str, Sequence[Any]]
    """Values of each further column"""
    beside: dict[str, Sequence[Beside]]
    """The further pictures, by column"""

    def __init__(self, place: str, reading: str = "") -> None:
        self.place, self.reading = place, reading
        self._makers: dict[str, Callable[[Image.Image], Image.Image]] = {}
        self.skipped: list[str] = []
        """One line for each row that is left out: place, what was found, what was expected."""

    @abstractmethod
    def picture(self, row: int) -> Image.Image:
        """RGB, upright and on white."""

    @abstractmethod
    def mask(self, row: int, column: str) -> Image.Image | None:
        """The mask that a column names or holds, "L", of the picture's size; `None` where there is none.

        Raises:
            DataError: It is no mask of this picture.
        """

    @abstractmethod
    def _further(self, row: int, column: str) -> Image.Image:
        """The picture that a column of `beside` has for a row, as it is in its file."""

    def further(self, row: int, column: str) -> Image.Image:
        """The picture that a column of `beside` has for a row, RGB, upright and on white."""
        if column in self._makers:
            return self._makers[column](self.picture(row))
        return on_white(self._further(row, column))

    def make(self, column: str, maker: Callable[[Image.Image], Image.Image], description: str) -> None:
        """Has a column of `beside` whose pictures are made of the rows' own at each use.

        Args:
            column: Its name.
            maker: RGB to RGB of the same size.
            description: Of what it does, for fingerprints.
        """
        self._makers[column] = maker
        self.beside[column] = each(self.digests, partial(_described, description))

    # ---- as training takes them ----

    @property
    def parts(self) -> Sequence[range]:
        """The rows in parts, of which each has caches of its own: all in one, or those of each shard."""
        return [range(len(self))]

    def part_of(self, row: int) -> int:
        """The number of the part that a row is in."""
        return 0

    def endless_row(
        self,
        buckets: Sequence[Hashable],
        known: Sequence[Hashable],
        batch_size: int,
        seed: int,
        repeats: int = 1,
    ) -> EndlessRow:
        """The endless row of the pictures.

        Args:
            buckets: Of each picture, what it has to have in common with the others of a step.
            known: All that `buckets` may hold.
            batch_size: Pictures of a step.
            seed: Of the run.
            repeats: How often each picture stands in an epoch, beside `self.repeats`.

        Raises:
            DataError: There are several buckets, and one of them has fewer pictures than a step takes.
        """
        return EndlessRow(buckets, batch_size, seed, [repeats * own for own in self.repeats])

    def distinct(self, column: str) -> list[Any]:
        """The values of a further column, each once."""
        return list(dict.fromkeys(self.columns[column]))

    def __len__(self) -> int:
        return len(self.file_names)

    @property
    def texts(self) -> list[str]:
        """The caption of each picture, its first wording."""
        return [wordings[0] for wordings in self.captions]

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """sha256 of all that pictures, captions and columns follow from, in the order of rows."""

    def left_out(self) -> list[str]:
        """What a user has to be told about what is not used."""
        return []

    @abstractmethod
    def drop(self, rows: Mapping[int, str]) -> None:
        """Leaves rows out, each for a reason.

        Raises:
            DataError: Most of the rows are left out now, or this source cannot leave out rows.
        """


def _described(description: str, row: int, digest: str) -> Beside:
    return Beside(description, f"{description} of {digest}")


class CheckedExamples(Examples):
    """Rows that a source fills when it is opened, and has checked each of them then.

    Arguments are those of `Examples`, and:

    Args:
        columns: Further ones that are kept of each row.
        beside: Columns of further pictures, of which each row has one, of its picture's size.
    """

    file_names: list[str]
    captions: list[list[str]]
    sizes: list[Size]
    digests: list[str]
    repeats: list[int]
    columns: dict[str, list[Any]]

    def __init__(self, place: str, columns: Sequence[str] = (), reading: str = "", beside: Sequence[str] = ()) -> None:
        super().__init__(place, reading)
        self.file_names, self.captions, self.sizes, self.digests, self.repeats = [], [], [], [], []
        self.columns = {name: [] for name in columns}
        self.beside = {name: [] for name in beside}

    @property
    def fingerprint(self) -> str:
        """sha256 over captions, columns and the bytes of every picture, in the order of rows."""
        digest = hashlib.sha256(f"{self.reading}\n".encode())
        for row, name in enumerate(self.file_names):
            more = {column: values[row] for column, values in self.columns.items()}
            record = [name, self.digests[row], self.captions[row], self.repeats[row], more]
            if self.beside:
                record.append({column: values[row].digest for column, values in self.beside.items()})
            digest.update(json.dumps(record, ensure_ascii=False, sort_keys=True, default=str).encode() + b"\n")
        return digest.hexdigest()

    def left_out(self) -> list[str]:
        lines = [f"left out, {counted(len(self.skipped), 'row')} of {self.place}:"] if self.skipped else []
        return lines + [f"  {line}" for line in self.skipped]

    def drop(self, rows: Mapping[int, str]) -> None:
        """Leaves rows out, each for a reason.

        Raises:
            DataError: Most of the rows are left out now.
        """
        lists: list[list[Any]] = [self.file_names, self.captions, self.sizes, self.digests, self.repeats]
        beside: dict[str, list[Beside]] = {name: list(values) for name, values in self.beside.items()}
        self.beside = {**beside}
        for values in [*lists, *self.columns.values(), *beside.values()]:
            values[:] = [value for row, value in enumerate(values) if row not in rows]
        self.skipped += [rows[row] for row in sorted(rows)]
        self.check_enough()

    def check_enough(self) -> None:
        """Raises DataError where there are no rows, or most are left out."""
        total = len(self.skipped) + len(self.file_names)
        if not self.file_names or len(self.skipped) > SKIPPED_AT_MOST * total:
            first = f"; the first: {self.skipped[0]}" if self.skipped else ""
            raise DataError(f"{self.place}: {len(self.file_names)} of {total} rows can be used, expected most{first}")

    def _add(
        self,
        name: str,
        captions: Sequence[str],
        size: Size,
        digest: str,
        repeats: int = 1,
        columns: Mapping[str, Any] | None = None,
        beside: Mapping[str, Beside] | None = None,
    ) -> None:
        """One more row."""
        self.file_names.append(name)
        self.captions.append(list(captions))
        self.sizes.append(size)
        self.digests.append(digest)
        self.repeats.append(repeats)
        for column, values in self.columns.items():
            values.append((columns or {}).get(column))
        for column, further in self.beside.items():
            assert isinstance(further, list)
            further.append((beside or {})[column])


def counted(number: int, what: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def check_size(further: Image.Image, name: str, size: Size, picture: str, what: str) -> Image.Image:
    """What belongs to a picture and has its size; raises DataError for another size.

    Args:
        further: A mask, or a picture beside it.
        name: Of it, for the message.
        size: Of the picture.
        picture: Its name.
        what: It is to the picture: "whose mask it is".
    """
    if further.size != (size[1], size[0]):
        raise DataError(
            f"{name}: got {further.width}x{further.height} pixels, expected {size[1]}x{size[0]}, those of {picture}, "
            f"{what}"
        )
    return further
