"""Which block of a transformer gets which of a ControlNet's residuals, where there are fewer of them than blocks.

Each rule takes the residuals, (B, T, D) each, and the number of blocks, and returns one entry a block; `None` for
a block that gets none. As many residuals as blocks are one each by every rule.
"""

from collections.abc import Sequence

import torch

Residuals = list[torch.Tensor | None]


def shared_by_neighbours(residuals: Sequence[torch.Tensor] | None, blocks: int) -> Residuals:
    """FLUX's rule: each residual serves as many neighbouring blocks, rounded up, so that the last may serve none."""
    if not residuals:
        return [None] * blocks
    neighbours = -(-blocks // len(residuals))
    return [residuals[i // neighbours] for i in range(blocks)]


def in_turns(residuals: Sequence[torch.Tensor] | None, blocks: int) -> Residuals:
    """The rule of XLabs' ControlNets for FLUX: the residuals again and again."""
    if not residuals:
        return [None] * blocks
    return [residuals[i % len(residuals)] for i in range(blocks)]


def spread_evenly(residuals: Sequence[torch.Tensor] | None, blocks: int) -> Residuals:
    """SD3's rule: in fractional steps; the last block, behind which there is no text, gets none."""
    if not residuals:
        return [None] * blocks
    interval = blocks / len(residuals)
    return [*(residuals[int(i / interval)] for i in range(blocks - 1)), None]


def added_to_first(tokens: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    """A residual (B, T, D) on the first T of the tokens (B, T or more, D): those behind are of pictures beside x_t."""
    if residual is None:
        return tokens
    count = residual.shape[1]
    if count == tokens.shape[1]:
        return tokens + residual
    return torch.cat([tokens[:, :count] + residual, tokens[:, count:]], dim=1)
