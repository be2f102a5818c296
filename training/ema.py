"""Exponential moving average of a model's weights."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class ExponentialMovingAverage(nn.Module):
    """A float32 copy of a model that follows it: `shadow += (1 - decay) * (model - shadow)` after each optimizer step.

    It is a module, so a checkpoint saves and restores it like one; `shadow` is a whole model, ready to be sampled
    from. Building, updating and saving it never touch a random number generator: training is the same at every
    cadence of saving.

    Args:
        module: The model to follow, as it is before training (not wrapped by Accelerate).
        decay: Weight of the past per step, in [0, 1).
        warmup: Whether update n uses min(decay, (1 + n) / (10 + n)), so that the random start is soon forgotten.

    Raises:
        ValueError: `decay` is outside [0, 1).
    """

    num_updates: torch.Tensor

    def __init__(self, module: nn.Module, decay: float = 0.9999, warmup: bool = True):
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"`decay`: got {decay}, expected a number of at least 0 and below 1.")
        self.decay, self.warmup = decay, warmup
        self.shadow = copy.deepcopy(module).float().eval().requires_grad_(False)
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        self._updates = 0  # num_updates on the host, so that an update never waits for the device

    def current_decay(self) -> float:
        """Decay of the next update."""
        n = self._updates + 1
        return min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards `module` (same architecture, unwrapped); buffers are copied."""
        weight = 1 - self.current_decay()
        averages: list[torch.Tensor] = list(self.shadow.parameters())
        parameters = [p.detach().to(a.dtype) for p, a in zip(module.parameters(), averages, strict=True)]
        if averages and averages[0].is_cuda:
            torch._foreach_lerp_(averages, parameters, weight)
        else:
            for average, parameter in zip(averages, parameters, strict=True):
                average.lerp_(parameter, weight)
        for kept, buffer in zip(self.shadow.buffers(), module.buffers(), strict=True):
            kept.copy_(buffer)
        self._updates += 1
        self.num_updates.fill_(self._updates)

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[nn.Module]:
        """Context in which `module` has the averaged weights; its own ones return, bit for bit, at the end."""
        own = {key: value.clone() for key, value in module.state_dict().items()}
        try:
            module.load_state_dict(self.shadow.state_dict())
            yield module
        finally:
            module.load_state_dict(own)

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[arg-type]
        self._updates = int(self.num_updates)
