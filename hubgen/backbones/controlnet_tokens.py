"""What the ControlNets of transformers have in common: a trained copy of the first blocks, a zero layer behind each.

    hint ─> embedding ─┐
                       v
     x_t ─> embedding ─> + ─> block 0 ─> block 1 ─> ... ─> block N - 1     the copy, which is trained
                                 │          │                  │
                                 0          0                  0           linear layers that start at zero
                                 v          v                  v
                               what is added to the base's image tokens    the base, which is not trained

The idea is 2302.05543's; transformers have no way up, so that residuals go into the blocks themselves (PixArt's
ControlNet-Transformer, 2401.05252). Which block of the base gets which of them: `hubgen/layers/residuals.py`.

Shapes: B batch, T image tokens, D features of a token.
"""

import copy
import inspect
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import nn

from hubgen.backbones.base import Backbone
from hubgen.checks import whole
from hubgen.formats.plain import plain_model


class TokenControlNet(Backbone):
    """Base of the ControlNets of transformers; a subclass also is the stem of its base's class."""

    base_class: ClassVar[str]
    """Name of the class of its bases, hubgen's and diffusers'."""
    copied: ClassVar[tuple[str, ...]]
    """Parts that it has of its base, besides the blocks."""
    block_counts: ClassVar[Mapping[str, str]] = {"num_layers": "transformer_blocks"}
    """By the key of the config that counts them, the lists of blocks that it has the first of."""

    @classmethod
    def made_for(cls, transformer: Any, layers: Mapping[str, int | None], load_weights: bool, **own: Any) -> Self:
        """The network of a base, which is read and left as it is.

        Args:
            transformer: The base, compiled, offloaded or with adapters as it may be.
            layers: By the key of the config how many blocks the network has; `None`: as many as the base.
            load_weights: Whether it starts from the base's embedders and first blocks; else from fresh weights.
            own: Values of the config that no base has.

        Raises:
            ValueError: The base is of another class, or has fewer blocks.
        """
        base = plain_model(transformer)
        if cls.base_class not in {parent.__name__ for parent in type(base).__mro__}:
            raise ValueError(f"`transformer`: got a {type(base).__name__}, expected a {cls.base_class}.")
        counts = {}
        for name, wanted in layers.items():
            there = base.config[name]
            counts[name] = there if wanted is None else whole(name, wanted, 0, there)
        keys = inspect.signature(cls.__init__).parameters
        config = {name: copy.deepcopy(value) for name, value in base.config.items() if name in keys}
        net = cls(**{**config, **counts, **own})
        if load_weights:
            for name in cls.copied:
                getattr(net, name).load_state_dict(getattr(base, name).state_dict())
            for name in cls.block_counts.values():
                for block, other in zip(getattr(net, name), getattr(base, name), strict=False):  # the first ones
                    net.copy_block(block, other)
        return net

    def copy_block(self, block: nn.Module, other: nn.Module) -> None:
        """Gives a block the weights of the base's."""
        block.load_state_dict(other.state_dict())

    def enable_cache(self, config: Any) -> None:
        """Refuses step caches: every block has a residual of its own, so none can be skipped.

        Raises:
            ValueError: Always; the base can be cached.
        """
        raise ValueError(f"`config`: got a {type(config).__name__}, expected none: the base can be cached, not this.")


def require_hint(hint: Any, rows: int, shape: Iterable[int], why: str) -> None:
    """Raises ValueError unless `hint` has the shape, for each of the batch or one for all.

    Args:
        hint: What was given as `controlnet_cond`.
        rows: B.
        shape: Without the batch.
        why: Where it comes from, for the message.
    """
    expected = tuple(shape)
    found = tuple(hint.shape) if torch.is_tensor(hint) else None
    if found is None or found[:1] not in ((1,), (rows,)) or found[1:] != expected:
        got = type(hint).__name__ if found is None else found
        batch = "1" if rows == 1 else f"{rows} or 1"
        sizes = ", ".join(map(str, (batch, *expected)))
        raise ValueError(f"`controlnet_cond`: got {got}, expected ({sizes}): {why}.")
