"""Checks of a model: of its config before anything is built, of its inputs before it computes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hubgen.checks import whole


def require_supported(config: Any, supported: Mapping[str, Sequence[Any]]) -> None:
    """Raises ValueError unless every argument that `supported` names has one of the values there."""
    for name, values in supported.items():
        if config[name] not in values:
            raise ValueError(f"`{name}`: got {config[name]!r}, expected one of {list(values)}.")


def require_all_positive(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is a whole number above 0, or a sequence (of sequences) of them."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        for entry in value:
            require_all_positive(name, entry)
    else:
        whole(name, value)


def per_level(name: str, value: Any, levels: int) -> tuple[Any, ...]:
    """`value` once a level, or `value` itself where it already has an entry a level.

    Raises:
        ValueError: It has another number of entries.
    """
    if not isinstance(value, Sequence):
        return (value,) * levels
    if len(value) != levels:
        raise ValueError(f"`{name}`: got {len(value)} values {tuple(value)}, expected one, or {levels}, one a level.")
    return tuple(value)


def require_shape(name: str, value: torch.Tensor | None, expected: tuple[int | str, ...]) -> None:
    """Raises ValueError unless `value` has the shape `expected`, where a string names a size that is free."""
    shape = None if value is None else tuple(value.shape)
    if (
        shape is None
        or len(shape) != len(expected)
        or any(isinstance(e, int) and e != n for e, n in zip(expected, shape, strict=True))
    ):
        wanted = ", ".join(str(e) for e in expected)
        raise ValueError(f"`{name}`: got {shape}, expected ({wanted}).")
