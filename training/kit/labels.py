"""Classes of pictures, by a column of their table or by the folder that they lie in."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import torch

from hubgen.data.errors import DataError
from hubgen.data.examples import Examples
from hubgen.data.lazy import Lazy, each
from hubgen.data.order import Draw, generator_of
from hubgen.training.kit.groups import LabelledData
from hubgen.training.kit.pictures import Pictures


def _values(examples: Examples, column: str | None) -> Sequence[str]:
    """The class of each picture in words; raises DataError, of shards when it is asked for, where one has none."""
    if column is None:
        return each(examples.file_names, partial(_folder, examples))
    return each(examples.columns[column], partial(_value, examples, column))


def _folder(examples: Examples, row: int, name: str) -> str:
    return _checked(examples, name, PurePosixPath(name).parent.name or None, None)


def _value(examples: Examples, column: str, row: int, value: Any) -> str:
    return _checked(examples, examples.file_names[row], value, column)


def _checked(examples: Examples, name: str, value: Any, column: str | None) -> str:
    if value is None or isinstance(value, list | dict) or str(value) == "":
        what = "the name of a folder that the picture lies in" if column is None else f"a class in column {column!r}"
        raise DataError(f"{examples.place}: {name}: got {value!r}, expected {what}")
    return str(value)


def label_names(pictures: Pictures, column: str | None) -> list[str]:
    """Names of the classes, numbers in their order and words by the alphabet.

    Raises:
        DataError: A picture has no class.
    """
    examples = pictures.examples
    found: Iterable[str] = _values(examples, column)
    if column is not None:
        found = [_checked(examples, "a picture", value, column) for value in examples.distinct(column)]
    return sorted(set(found), key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name))


class Labels:
    """The number that a model knows each picture's class by.

    Args:
        pictures: Of a split.
        data: The settings.
        pipe: The model, with the names of its classes.

    Raises:
        DataError: The model has no such class.
    """

    def __init__(self, pictures: Pictures, data: LabelledData, pipe: Any) -> None:
        self.dropout, self.null = data.label_dropout, pipe.null_label
        values = _values(pictures.examples, data.label_column)
        self.numbers = each(values, partial(self._number, pipe, pictures))
        self._told = {"column": data.label_column, "classes": dict(pipe.labels)}

    def _number(self, pipe: Any, pictures: Pictures, row: int, name: str) -> int:
        if name in pipe.labels:
            return pipe.labels[name]
        if name.isdecimal() and int(name) < pipe.embedded_labels and int(name) != pipe.null_label:
            return int(name)
        raise DataError(f"{pictures.examples.place}: got the class {name!r}; {pipe.nearest_labels(name)}")

    @property
    def fingerprint(self) -> str:
        """Changes with the classes; those of shards follow from the pictures, the column and the model's names."""
        told = json.dumps(self._told if isinstance(self.numbers, Lazy) else self.numbers)
        return hashlib.sha256(told.encode()).hexdigest()

    @property
    def none(self) -> int:
        """The class that means none.

        Raises:
            DataError: The model has no such class.
        """
        if self.null is None:
            raise DataError("setting 'data.condition_dropout': the model has no class that means none, expected 0")
        return int(self.null)

    def drawn(self, seed: int, draw: Draw) -> int:
        """The class that a picture is shown with at a place: its own, or none."""
        if self.null is not None and torch.rand((), generator=generator_of(seed, draw.place, "label")) < self.dropout:
            return self.null
        return self.numbers[draw.row]
