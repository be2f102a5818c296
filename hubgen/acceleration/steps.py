"""What stays the same between the steps of a call: modulations of a known grid of times, keys and values of the text.

Rows are found by the number of the step, and texts by being the same tensor: nothing is compared by value, so that no
step waits for a device.

Shapes: n steps, b branches of B pictures, O features of a layer's answer.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from hubgen.acceleration.cpu.packing import identity

# A table may take so many values: more is computed step by step.
LARGEST = 2**26


class StepTables:
    """Answers of layers that depend on the time (and class and pooled text) alone, for every step of a grid.

    Args:
        answers: Each layer with what it answers to n * b * B rows, step after step, (n * b * B, O).
        steps: n.
        branches: Names of the b branches, in the order of the rows.
    """

    def __init__(self, answers: Iterable[tuple[nn.Module, torch.Tensor]], steps: int, branches: Sequence[str]):
        self.branches = tuple(branches)
        self.rows: dict[nn.Module, torch.Tensor] = {}
        values = 0
        for layer, out in answers:
            values += out.numel()
            if values > LARGEST:
                self.rows.clear()
                return
            self.rows[layer] = out.unflatten(0, (steps, len(branches), -1))  # (n, b, B, O)

    def answer(self, layer: nn.Module, step: int, branches: Sequence[str]) -> torch.Tensor | None:
        """A layer's rows of a step and some of the branches, (len(branches) * B, O); `None` where there are none."""
        table = self.rows.get(layer)
        if table is None or not 0 <= step < len(table) or not set(branches) <= set(self.branches):
            return None
        rows = table[step]
        if tuple(branches) == self.branches:
            return rows.flatten(0, 1).clone()
        return torch.cat([rows[self.branches.index(branch)] for branch in branches])


class TextAnswers:
    """Answers of layers that see the text alone; of each layer the last two, of steps with and without guidance."""

    KEPT = 2

    def __init__(self) -> None:
        self.answers: dict[nn.Module, list[tuple[torch.Tensor, torch.Tensor, list[Any]]]] = {}

    def recall(self, layer: nn.Module, text: Any) -> torch.Tensor | None:
        """The answer to the very same tensor, unless it, the answer or the layer has changed."""
        for given, out, marks in self.answers.get(layer, ()):
            if given is text and marks == self.marks(layer, given, out):
                return out
        return None

    def keep(self, layer: nn.Module, text: Any, out: Any) -> Any:
        """Remembers an answer, where tensors count their changes."""
        if not (text.is_inference() or out.is_inference()):
            kept = self.answers.setdefault(layer, [])
            kept.append((text, out, self.marks(layer, text, out)))
            del kept[: -self.KEPT]
        return out

    @staticmethod
    def marks(layer: nn.Module, *tensors: torch.Tensor) -> list[Any]:
        """What tells a change in place of tensors, and any of a layer's parameters that they count."""
        return [*(tensor._version for tensor in tensors), *map(identity, layer.parameters(recurse=False))]
