"""Layers that see the embedded time, or the text, and nothing else: what a sampling loop may compute once.

A module says so itself: `time_layer` names its layer that sees the embedded time after SiLU, `context_layers()` gives
those that see the text as it comes in, `time_embedders()` those that embed the time and what is added to it.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import nn


def modulations(model: nn.Module, temb: torch.Tensor) -> Iterator[tuple[nn.Module, torch.Tensor]]:
    """Each layer of a model that sees the embedded time (B, D) alone, with what it answers, (B, O)."""
    inputs = F.silu(temb)
    for module in model.modules():
        name = getattr(type(module), "time_layer", None)
        layer = None if name is None else getattr(module, name)
        if layer is not None:
            yield layer, layer(inputs)


def context_layers(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Each layer among a model's modules that sees the text alone, the same tensor at every step."""
    for module in modules:
        if hasattr(type(module), "context_layers"):
            yield from module.context_layers()
