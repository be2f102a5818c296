"""Means of what was noted since the last log line, over all processes."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator

BINS = 5
"""Of the time, in which losses are told apart"""


class Window:
    """Sums and counts by name; nothing waits for the device before they are asked for.

    Args:
        accelerator: Of the run.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._sums: dict[str, Any] = {}

    def note(self, name: str, value: torch.Tensor | float, count: float | torch.Tensor = 1) -> None:
        """Adds the sum of `count` values."""
        value = value.detach().double() if torch.is_tensor(value) and value.device.type != "mps" else value
        total, number = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (total + value, number + count)

    def note_losses(self, losses: torch.Tensor, t: torch.Tensor) -> None:
        """Adds the losses (B,) of pictures at times (B,) in [0, 1], as `loss`, and by time as `loss_t0.1`, ..."""
        losses = losses.detach().float()
        self.note("loss", losses.sum(), len(losses))
        bins = (t * BINS).long().clamp(0, BINS - 1).to(losses.device)
        for number in range(BINS):
            inside = bins == number
            self.note(f"loss_t{(number + 0.5) / BINS:.2g}", (losses * inside).sum(), inside.sum())

    def sums(self) -> dict[str, tuple[float, float]]:
        """Sum and count of each name, of all processes; each of them has to ask."""
        names = sorted(self._sums)
        if not names:
            return {}
        rows = [[torch.as_tensor(part).double().cpu() for part in self._sums[name]] for name in names]
        table = torch.stack([torch.stack(row) for row in rows])  # (N, 2)
        if self.accelerator.num_processes > 1:
            device = self.accelerator.device
            table = table.to(device, torch.float32 if device.type == "mps" else torch.float64)
            table = self.accelerator.reduce(table, "sum").cpu()
        return {name: (total, number) for name, (total, number) in zip(names, table.tolist(), strict=True)}

    def means(self) -> dict[str, float]:
        """The mean of each name that has any value, of all processes; begins anew."""
        sums, self._sums = self.sums(), {}
        return {name: total / number for name, (total, number) in sums.items() if number}

    def load(self, sums: Mapping[str, Any], writer: bool) -> None:
        """Goes on from `sums`, which one process has to take over for all."""
        self._sums = {
            name: (float(total), float(number)) if writer else (0.0, 0.0) for name, (total, number) in sums.items()
        }
