"""Norms of tokens: RMS norm, and layer norms with scale and shift from a condition (adaLN; DiT, 2212.09748).

Parameter names are those of diffusers' classes of the same name.

Shapes: B batch, T tokens, D features, E features of the condition.
"""

import torch
import torch.nn.functional as F
from torch import nn


def modulate(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """x * (1 + scale) + shift, the same for all tokens: (B, T, D), (B, D), (B, D) -> (B, T, D)."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm (1910.07467) whose weight follows the input's precision, as fused kernels demand."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D)."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class AdaLayerNormZero(nn.Module):
    """adaLN-Zero: normalises and modulates for attention, and hands on what the rest of the block needs."""

    time_layer = "linear"

    def __init__(self, embedding_dim: int):
        super().__init__()
        self.linear = nn.Linear(embedding_dim, 6 * embedding_dim)
        self.norm = nn.LayerNorm(embedding_dim, elementwise_affine=False, eps=1e-6)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(B, T, D), (B, D) -> modulated x (B, T, D); attention's gate, MLP's shift, scale and gate, each (B, D)."""
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.linear(F.silu(emb)).chunk(6, dim=1)
        return modulate(self.norm(x), scale, shift), gate, shift_mlp, scale_mlp, gate_mlp


class AdaLayerNormZeroSingle(nn.Module):
    """adaLN-Zero for a block whose attention and MLP stand side by side and share all (FLUX's single blocks)."""

    time_layer = "linear"

    def __init__(self, embedding_dim: int):
        super().__init__()
        self.linear = nn.Linear(embedding_dim, 3 * embedding_dim)
        self.norm = nn.LayerNorm(embedding_dim, elementwise_affine=False, eps=1e-6)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T, D), (B, D) -> modulated x (B, T, D), the gate (B, D)."""
        shift, scale, gate = self.linear(F.silu(emb)).chunk(3, dim=1)
        return modulate(self.norm(x), scale, shift), gate


class SD35AdaLayerNormZeroX(nn.Module):
    """adaLN-Zero for a block of two attentions (SD3.5 medium), each with a scale, shift and gate of its own."""

    time_layer = "linear"

    def __init__(self, embedding_dim: int):
        super().__init__()
        self.linear = nn.Linear(embedding_dim, 9 * embedding_dim)
        self.norm = nn.LayerNorm(embedding_dim, elementwise_affine=False, eps=1e-6)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """As `AdaLayerNormZero`, and behind it x modulated for the second attention and that attention's gate."""
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, shift2, scale2, gate2 = self.linear(F.silu(emb)).chunk(9, 1)
        x = self.norm(x)
        return modulate(x, scale, shift), gate, shift_mlp, scale_mlp, gate_mlp, modulate(x, scale2, shift2), gate2


class AdaLayerNormContinuous(nn.Module):
    """Layer norm with scale and shift from a condition; scale first, where SD3's own file format has shift first."""

    time_layer = "linear"

    def __init__(
        self,
        embedding_dim: int,
        conditioning_embedding_dim: int,
        elementwise_affine: bool = True,
        eps: float = 1e-5,
    ):
        super().__init__()
        self.linear = nn.Linear(conditioning_embedding_dim, 2 * embedding_dim)
        self.norm = nn.LayerNorm(embedding_dim, eps=eps, elementwise_affine=elementwise_affine)

    def forward(self, x: torch.Tensor, conditioning_embedding: torch.Tensor) -> torch.Tensor:
        """(B, T, D), (B, E) -> (B, T, D)."""
        scale, shift = self.linear(F.silu(conditioning_embedding)).chunk(2, dim=1)
        return modulate(self.norm(x), scale, shift)
