"""Gradient checkpointing, for models and for their parts (1604.06174)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Checkpointed:
    """A module that runs its blocks by `run`, so that their activations need not be kept for the backward pass.

    `model.enable_gradient_checkpointing()` of diffusers sets both attributes on every module that has the first.
    """

    gradient_checkpointing: bool = False
    """Whether blocks are computed again in the backward pass."""
    _gradient_checkpointing_func: Callable[..., Any] | None = None
    """What computes them so: called with a block and its arguments, which are all positional."""

    def run(self, block: nn.Module, *args: Any) -> Any:
        """`block(*args)`, computed again in the backward pass where gradient checkpointing is on."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            assert self._gradient_checkpointing_func is not None  # set together
            return self._gradient_checkpointing_func(block, *args)
        return block(*args)
