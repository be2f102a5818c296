"""Checks of single values, the same in every part of the package; errors read "`name`: got X, expected Y."."""

import math
import numbers


def is_number(value: object) -> bool:
    """Whether it is a finite number; truth values are none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: object, least: int = 1, most: int | None = None) -> bool:
    """Whether it is a whole number in [least, most]; truth values are none."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        return False
    return least <= value and (most is None or value <= most)


def whole(name: str, value: object, least: int = 1, most: int | None = None) -> int:
    """`value` as a number.

    Args:
        name: Of the argument, for the message.
        value: Whatever was given.
        least: The smallest that is right.
        most: The largest; `None`: any.

    Raises:
        ValueError: It is no whole number in [least, most].
    """
    if not is_whole(value, least, most):
        limits = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"`{name}`: got {value!r}, expected a whole number, {limits}.")
    return int(value)  # type: ignore[call-overload]
