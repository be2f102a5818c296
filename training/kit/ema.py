"""Exponential moving average of the weights that are trained."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

PREFIX = "average."


class ExponentialMovingAverage:
    """A float32 copy of what is trained that follows it: `average += (1 - decay) * (weight - average)` a step.

    Buffers, such as the statistics of a BatchNorm, are copied as they are. It has the `state_dict` of a module, so that
    a checkpoint saves and restores it like one. Building, updating and applying it never touch a random number
    generator: training is the same at every cadence of saving.

    Args:
        module: The model to follow, on its device and sharded as it trains; parameters that are frozen now are not
            followed.
        decay: Weight of the past per step, in [0, 1).
        warmup: Whether update n uses min(decay, (1 + n) / (10 + n)), so that the random start is soon forgotten.

    Raises:
        ValueError: `decay` is outside [0, 1).
    """

    def __init__(self, module: nn.Module, decay: float = 0.9999, warmup: bool = True):
        if not 0 <= decay < 1:
            raise ValueError(f"`decay`: got {decay}, expected a number of at least 0 and below 1.")
        self.decay, self.warmup, self.num_updates = decay, warmup, 0
        self.averages = {
            name: parameter.detach().clone().float()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }

    def current_decay(self) -> float:
        """Decay of the next update."""
        n = self.num_updates + 1
        return min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards `module`."""
        weight = 1 - self.current_decay()
        parameters = dict(module.named_parameters())
        averages = list(self.averages.values())
        current = [parameters[name].detach().to(average.dtype) for name, average in self.averages.items()]
        if averages and averages[0].is_cuda:
            torch._foreach_lerp_(averages, current, weight)
        else:
            for average, parameter in zip(averages, current, strict=True):
                average.lerp_(parameter, weight)
        self.num_updates += 1

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Gives `module` the averaged weights for good."""
        parameters = dict(module.named_parameters())
        for name, average in self.averages.items():
            parameters[name].copy_(average)

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[nn.Module]:
        """Context in which `module` has the averaged weights; its own ones return, bit for bit, at the end."""
        with restored(module, self.averages):
            self.copy_to(module)
            yield module

    def state_dict(self) -> dict[str, Any]:
        """The averages and the number of updates."""
        averages = {PREFIX + name: average for name, average in self.averages.items()}
        return {**averages, "num_updates": torch.tensor(self.num_updates)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        for name, average in self.averages.items():
            average.copy_(state[PREFIX + name])
        self.num_updates = int(state["num_updates"])


@contextmanager
def restored(module: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Context after which the parameters of these names are as they were before it, bit for bit."""
    parameters = dict(module.named_parameters())
    own = {name: parameters[name].detach().clone() for name in names}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in own.items():
                parameters[name].copy_(value)
