"""Shapes that a model expects of its inputs, checked before it computes."""

import torch


def require_shape(name: str, value: torch.Tensor | None, expected: tuple[int | str, ...]) -> None:
    """Asserts the shape of an argument; a string in `expected` stands for a size that is free, and says what it is.

    Raises:
        ValueError: The argument is missing or of another shape.
    """
    shape = None if value is None else tuple(value.shape)
    if (
        shape is None
        or len(shape) != len(expected)
        or any(isinstance(e, int) and e != n for e, n in zip(expected, shape, strict=True))
    ):
        wanted = ", ".join(str(e) for e in expected)
        raise ValueError(f"`{name}` must have the shape ({wanted}), got {shape}.")
