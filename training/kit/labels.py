"""Classes of pictures, by a column of their table or by the folder that they lie in."""

import hashlib
import json
from pathlib import PurePosixPath
from typing import Any

import torch

from hubgen.data.errors import DataError
from hubgen.data.order import Draw, generator_of
from hubgen.training.kit.groups import LabelledData
from hubgen.training.kit.pictures import Pictures


def _values(pictures: Pictures, column: str | None) -> list[str]:
    examples = pictures.examples
    if column is None:
        values: list[Any] = [PurePosixPath(name).parent.name or None for name in examples.file_names]
    else:
        values = examples.columns[column]
    for row, value in enumerate(values):
        if value is None or isinstance(value, list | dict) or str(value) == "":
            what = (
                "the name of a folder that the picture lies in" if column is None else f"a class in column {column!r}"
            )
            raise DataError(f"{examples.place}: {examples.file_names[row]}: got {value!r}, expected {what}")
    return [str(value) for value in values]


def label_names(pictures: Pictures, column: str | None) -> list[str]:
    """Names of the classes, numbers in their order and words by the alphabet.

    Raises:
        DataError: A picture has no class.
    """
    names = set(_values(pictures, column))
    return sorted(names, key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name))


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
        self.numbers = [self._number(name, pipe, pictures) for name in _values(pictures, data.label_column)]

    def _number(self, name: str, pipe: Any, pictures: Pictures) -> int:
        if name in pipe.labels:
            return pipe.labels[name]
        if name.isdecimal() and int(name) < pipe.embedded_labels and int(name) != pipe.null_label:
            return int(name)
        raise DataError(f"{pictures.examples.place}: got the class {name!r}; {pipe.nearest_labels(name)}")

    @property
    def fingerprint(self) -> str:
        """Changes with the classes."""
        return hashlib.sha256(json.dumps(self.numbers).encode()).hexdigest()

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
