"""Vector quantisation: each latent vector becomes the nearest of a codebook (VQ-VAE, 1711.00937).

Shapes: B batch, D features of a latent vector, h and w height and width of the latents, N = B * h * w vectors, K codes.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

ROWS_AT_ONCE = 4096
"""Vectors whose distances to all codes are in memory at the same time."""


class Codes(NamedTuple):
    """Which codes a batch became."""

    perplexity: torch.Tensor
    """exp of the entropy of the batch's codes, in [1, K], a scalar: how many codes it uses, by frequency."""
    min_encodings: None
    """Always `None`; has its place in the tuple because diffusers' quantizer returns it."""
    min_encoding_indices: torch.Tensor
    """(N,), or (B, h, w) with `sane_index_shape`."""


class VectorQuantizer(nn.Module):
    """The codebook, its loss, and how much of it is in use.

    Loss (1711.00937, equation 3, without the reconstruction): mean((z_q - sg[z])²) + beta · mean((sg[z_q] - z)²). The
    first term moves the codes to the encoder's outputs, the second, weighted, the outputs to the codes. The decoder's
    gradient passes straight through to the encoder (section 3.2).

    In training mode the assignments are counted in `counts`, on this process. A code that nothing is assigned to gets
    no gradient and stays dead; `revive_dead_codes_` moves such codes to where the encoder's outputs are.

    Args:
        n_e: Number of codes K.
        vq_embed_dim: Features D of a code.
        beta: Weight of the commitment, the term that trains the encoder.
        remap: Must be `None`: reduced codebooks are not supported.
        unknown_index: Part of diffusers' signature; only `remap` would read it.
        sane_index_shape: Whether the indices come as (B, h, w) rather than flat.
        legacy: Whether beta weighs the codebook's term instead, as in diffusers and the VQGAN code before it.

    Raises:
        ValueError: `remap` was given, or a size is below 1.
    """

    counts: torch.Tensor

    def __init__(
        self,
        n_e: int,
        vq_embed_dim: int,
        beta: float = 0.25,
        remap: Any = None,
        unknown_index: str = "random",
        sane_index_shape: bool = False,
        legacy: bool = False,
    ):
        super().__init__()
        if remap is not None:
            raise ValueError(f"`remap`: got {remap!r}, expected None (reduced codebooks are not supported).")
        for name, value in (("n_e", n_e), ("vq_embed_dim", vq_embed_dim)):
            if value < 1:
                raise ValueError(f"`{name}`: got {value}, expected at least 1.")
        self.n_e = n_e
        self.vq_embed_dim = vq_embed_dim
        self.beta = beta
        self.sane_index_shape = sane_index_shape
        self.legacy = legacy
        self.embedding = nn.Embedding(n_e, vq_embed_dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / n_e, 1.0 / n_e)
        # No part of the checkpoint, whose keys are those of diffusers.
        self.register_buffer("counts", torch.zeros(n_e, dtype=torch.long), persistent=False)

    def forward(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Codes]:
        """Latents (B, D, h, w) -> the nearest codes in their place (B, D, h, w), the loss (a scalar), which codes.

        Raises:
            ValueError: The latents do not have D channels.
        """
        if z.ndim != 4 or z.shape[1] != self.vq_embed_dim:
            raise ValueError(f"`z`: got {tuple(z.shape)}, expected (B, {self.vq_embed_dim}, h, w).")
        z = z.permute(0, 2, 3, 1)  # (B, h, w, D)
        indices = self.nearest(z.reshape(-1, self.vq_embed_dim))  # (N,)
        z_q = self.embedding(indices).view(z.shape)  # (B, h, w, D)

        commitment, codebook = F.mse_loss(z, z_q.detach()), F.mse_loss(z_q, z.detach())
        loss = commitment + self.beta * codebook if self.legacy else codebook + self.beta * commitment

        used = torch.zeros_like(self.counts).index_add_(0, indices, torch.ones_like(indices))  # (K,)
        if self.training:
            self.counts += used
        straight = z + (z_q - z).detach()  # forward the codes, backward the identity
        if self.sane_index_shape:
            indices = indices.view(z.shape[:3])
        return straight.permute(0, 3, 1, 2).contiguous(), loss, Codes(perplexity(used), None, indices)

    @torch.no_grad()
    def nearest(self, vectors: torch.Tensor) -> torch.Tensor:
        """Index of the code of least Euclidean distance to each vector: (N, D) -> (N,).

        In float32, whatever the model computes in, and a few thousand vectors at a time: all distances together are
        the largest tensor of a VQ autoencoder by far.
        """
        # By the layer's forward, which is where hooks of offloading bring the weight in.
        codes = self.embedding(torch.arange(self.n_e, device=vectors.device)).float()  # (K, D)
        return torch.cat([torch.cdist(part, codes).argmin(1) for part in vectors.float().split(ROWS_AT_ONCE)])

    def get_codebook_entry(self, indices: torch.Tensor, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """Codes by index: (...,) -> (..., D), or (B, D, h, w) where `shape` is (B, h, w, D)."""
        z_q = self.embedding(indices)
        return z_q if shape is None else z_q.view(shape).permute(0, 3, 1, 2).contiguous()

    @property
    def codebook_usage(self) -> float:
        """Share of the codes that were assigned at least once since the counts were reset, in [0, 1]."""
        return (self.counts > 0).float().mean().item()

    @property
    def codebook_perplexity(self) -> float:
        """As `Codes.perplexity`, of all assignments since the counts were reset."""
        return perplexity(self.counts).item()

    def reset_counts(self) -> None:
        """Starts counting anew."""
        self.counts.zero_()

    @torch.no_grad()
    def revive_dead_codes_(self, z: torch.Tensor, generator: torch.Generator | None = None) -> int:
        """Moves every code that was not assigned since the counts were reset onto a random latent vector of a batch.

        (Random restarts, Jukebox, 2005.00341, section 3.1.) The counts are reset. An optimizer's moments of these
        codes stay as they are; of dead codes they are close to zero.

        Args:
            z: The encoder's outputs, (B, D, h, w).
            generator: Draws the vectors; on the CPU.

        Returns:
            How many codes were moved.

        Raises:
            ValueError: Nothing was counted, so that all codes would seem dead; or `z` is of another shape.
        """
        if z.ndim != 4 or z.shape[1] != self.vq_embed_dim:
            raise ValueError(f"`z`: got {tuple(z.shape)}, expected (B, {self.vq_embed_dim}, h, w).")
        if not self.counts.any():
            raise ValueError("No assignments were counted: quantise in training mode before reviving codes.")
        dead = (self.counts == 0).nonzero()[:, 0]  # (dead,)
        vectors = z.permute(0, 2, 3, 1).reshape(-1, self.vq_embed_dim)  # (N, D)
        # As many different ones as there are, then from the start again.
        rounds = -(-len(dead) // len(vectors))
        order = [torch.randperm(len(vectors), generator=generator) for _ in range(rounds)]
        if order:
            chosen = torch.cat(order)[: len(dead)].to(z.device)
            self.embedding.weight[dead] = vectors[chosen].to(self.embedding.weight.dtype)
        self.reset_counts()
        return len(dead)


def perplexity(counts: torch.Tensor) -> torch.Tensor:
    """exp of the entropy of how often each of K codes was used: (K,) -> a scalar in [1, K], 1 where none was."""
    shares = counts.float() / counts.sum().clamp(min=1)
    return torch.exp(-torch.special.xlogy(shares, shares).sum())
