"""Key maps: how the tensors of an original layout are called, cut and laid in ours, and back.

A map is a table of rules, which reads in both directions. A rule names a module (or a whole key) on each side.
`x_block.attn.proj` -> `attn.to_out.0` takes `.weight` and `.bias` along; of several rules that fit a key, the one with
the longest name holds. `how` says what happens to the tensor.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from hubgen.formats.headers import listing


class How(Protocol):
    """A tensor of the original layout <-> its parts in ours."""

    def split(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]: ...

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor: ...


class Same:
    """The tensor as it is."""

    def split(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        return [tensor]

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        return parts[0]


@dataclass(frozen=True)
class Fused:
    """Several layers' outputs in one matrix, below each other; `ratio` are their relative sizes.

    Raises:
        ValueError: On `split`: the rows do not divide so.
    """

    ratio: tuple[int, ...]

    def split(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        unit, rest = divmod(tensor.shape[0], sum(self.ratio)) if tensor.ndim else (0, 1)
        if rest:
            raise ValueError(f"shape {list(tensor.shape)} does not divide into parts of {self.ratio}")
        return [part.clone() for part in tensor.split([unit * r for r in self.ratio])]

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(parts))


class Swapped:
    """The halves change places: the original's (shift, scale) is our (scale, shift)."""

    def split(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        if tensor.ndim == 0 or tensor.shape[0] % 2:
            raise ValueError(f"shape {list(tensor.shape)} does not divide into halves")
        first, second = tensor.chunk(2)
        return [torch.cat([second, first])]

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        return self.split(parts[0])[0]


class Transposed:
    """`x @ W` in the original, `x @ W.T` in ours."""

    def split(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        return [tensor.t().contiguous()]

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        return parts[0].t().contiguous()


class Pointwise:
    """A 1x1 convolution in the original, (D, D, 1, 1), a linear layer in ours, (D, D). Biases stay as they are."""

    def split(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        return [tensor.reshape(tensor.shape[:2]) if tensor.shape[2:].numel() == 1 and tensor.ndim > 2 else tensor]

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        return parts[0][:, :, None, None] if parts[0].ndim == 2 else parts[0]


SAME, SWAPPED, TRANSPOSED, POINTWISE = Same(), Swapped(), Transposed(), Pointwise()
QKV = Fused((1, 1, 1))

# a line of a table: original, ours (several of a fused layer), and how unless it is the same tensor
Line = tuple[str, str | tuple[str, ...]] | tuple[str, str | tuple[str, ...], How]


@dataclass(frozen=True)
class Rule:
    """One line of a map."""

    original: str
    ours: tuple[str, ...]
    how: How = SAME


def rules(table: Iterable[Line], **numbers: object) -> list[Rule]:
    """The lines of a table, with `{name}` in them replaced by the numbers given."""
    found = []
    for original, ours, *how in table:
        parts = (ours,) if isinstance(ours, str) else ours
        found.append(Rule(original.format(**numbers), tuple(part.format(**numbers) for part in parts), *how))
    return found


def leading(key: str) -> Iterable[tuple[str, str]]:
    """All ways to cut a key into a module's name and the rest, the longest name first: `a.b`, ``; `a`, `.b`."""
    yield key, ""
    end = key.rfind(".")
    while end > 0:
        yield key[:end], key[end:]
        end = key.rfind(".", 0, end)


def to_ours(tensors: Mapping[str, torch.Tensor], table: Sequence[Rule]) -> dict[str, torch.Tensor]:
    """A state dict of the original layout in ours.

    Args:
        tensors: Without the prefix of the component.
        table: The map.

    Raises:
        ValueError: Keys that the map does not know, or a tensor that does not divide as it says; all are listed.
    """
    by_name = {rule.original: rule for rule in table}
    found: dict[str, torch.Tensor] = {}
    wrong = []
    for key, tensor in tensors.items():
        rule, rest = next(((by_name[name], rest) for name, rest in leading(key) if name in by_name), (None, ""))
        if rule is None:
            wrong.append(f"{key}: unknown")
            continue
        try:
            found.update(zip((name + rest for name in rule.ours), rule.how.split(tensor), strict=True))
        except ValueError as error:
            wrong.append(f"{key}: {error}")
    refuse(wrong, "the layout's key map does not take")
    return found


def to_original(tensors: Mapping[str, torch.Tensor], table: Sequence[Rule]) -> dict[str, torch.Tensor]:
    """Our state dict in the original layout: the inverse of `to_ours`.

    Raises:
        ValueError: Keys that the map does not know, or parts of a fused tensor that are missing; all are listed.
    """
    by_name = {name: rule for rule in table for name in rule.ours}
    found: dict[str, torch.Tensor] = {}
    wrong = []
    for key in tensors:
        rule, rest = next(((by_name[name], rest) for name, rest in leading(key) if name in by_name), (None, ""))
        if rule is None:
            wrong.append(f"{key}: unknown")
            continue
        missing = [name + rest for name in rule.ours if name + rest not in tensors]
        if missing:
            wrong.append(f"{key}: without {', '.join(missing)}")
        elif rule.original + rest not in found:
            found[rule.original + rest] = rule.how.join([tensors[name + rest] for name in rule.ours])
    refuse(wrong, "the layout's key map does not take")
    return found


def refuse(lines: Sequence[str], what: str) -> None:
    """Raises ValueError with `what` and the keys, if there are any."""
    if lines:
        raise ValueError(f"{what} {len(lines)} tensors:{listing(sorted(lines), 50)}")
