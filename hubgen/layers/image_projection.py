"""From what an image encoder says of a picture to tokens for attention: the first half of IP-Adapters (2308.06721).

    LinearProjection    a vector -> a few tokens                  SD1.5 and XL base, FLUX of XLabs, own
    TokenProjection     the encoder's tokens, one by one          SD1.5 full face
    MLPProjection       a vector -> tokens, with a layer between  FaceID, FLUX of InstantX
    Resampler           the encoder's tokens -> 16 queries        SD1.5 and XL Plus (Flamingo, 2204.14198, section 2.1)
    TimeResampler       the same, told the time at each step      SD3.5 of InstantX

Parameter names are those of the published files, and each class tells its sizes from them (`like`).

Shapes: n pictures, P patches, F features of the encoder, T tokens of D features.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import nn
from torch.nn import functional as F

from hubgen.layers.embeddings import TimestepEmbedding, Timesteps
from hubgen.layers.normalization import modulate

Weights = Mapping[str, torch.Tensor]
HEAD = 64
"""Features of a head of both resamplers"""


class Projection(nn.Module, ABC):
    """Base of the projections."""

    reads_patches: ClassVar[bool] = False
    """Whether it takes (n, P, F), the encoder's last hidden states but one; else (n, F)"""
    timed: ClassVar[bool] = False
    """Whether it takes the timestep too, (n,), and returns a pair of tokens and embedded time, (n, E)"""
    image_features: int
    """F"""
    features: int
    """D"""

    @classmethod
    @abstractmethod
    def like(cls, weights: Weights) -> Self:
        """One of the sizes of these weights, by their names; KeyError where one is missing."""


class LinearProjection(Projection):
    """One linear layer, cut into tokens, and a norm (2308.06721, section 3.2): (n, F) -> (n, T, D)."""

    def __init__(self, image_features: int, features: int, tokens: int = 4):
        super().__init__()
        self.image_features, self.features = image_features, features
        self.proj = nn.Linear(image_features, tokens * features)
        self.norm = nn.LayerNorm(features)

    @classmethod
    def like(cls, weights: Weights) -> Self:
        (out, image_features), (features,) = weights["proj.weight"].shape, weights["norm.weight"].shape
        return cls(image_features, features, out // features)

    def forward(self, embeds: torch.Tensor) -> torch.Tensor:
        return self.norm(self.proj(embeds).unflatten(1, (-1, self.features)))


class MLPProjection(Projection):
    """Two linear layers, cut into tokens, and a norm: (n, F) -> (n, T, D)."""

    def __init__(self, image_features: int, features: int, tokens: int = 4, inner: int | None = None):
        super().__init__()
        self.image_features, self.features = image_features, features
        inner = 2 * image_features if inner is None else inner
        self.proj = nn.Sequential(nn.Linear(image_features, inner), nn.GELU(), nn.Linear(inner, tokens * features))
        self.norm = nn.LayerNorm(features)

    @classmethod
    def like(cls, weights: Weights) -> Self:
        (inner, image_features), (features,) = weights["proj.0.weight"].shape, weights["norm.weight"].shape
        return cls(image_features, features, len(weights["proj.2.weight"]) // features, inner)

    def forward(self, embeds: torch.Tensor) -> torch.Tensor:
        return self.norm(self.proj(embeds).unflatten(1, (-1, self.features)))


class TokenProjection(Projection):
    """The same two layers and norm for each of the encoder's tokens: (n, P, F) -> (n, P, D)."""

    reads_patches = True

    def __init__(self, image_features: int, features: int):
        super().__init__()
        self.image_features, self.features = image_features, features
        self.proj = nn.Sequential(
            nn.Linear(image_features, image_features),
            nn.GELU(),
            nn.Linear(image_features, features),
            nn.LayerNorm(features),
        )

    @classmethod
    def like(cls, weights: Weights) -> Self:
        features, image_features = weights["proj.2.weight"].shape
        return cls(image_features, features)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return self.proj(patches)


class PerceiverAttention(nn.Module):
    """Queries look at the picture's patches and at each other: (n, P, W), (n, T, W) -> (n, T, W)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, inner = heads, heads * HEAD
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(
        self, x: torch.Tensor, latents: torch.Tensor, change: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """`change` are scale and shift of the queries' tokens after their norm, (n, W) each."""
        latents = self.norm2(latents) if change is None else modulate(self.norm2(latents), *change)
        seen = torch.cat([self.norm1(x), latents], dim=1)  # (n, P + T, W)
        projected = (self.to_q(latents), *self.to_kv(seen).chunk(2, dim=-1))
        query, key, value = (one.unflatten(-1, (self.heads, HEAD)).transpose(1, 2) for one in projected)
        return self.to_out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class FeedForward(nn.Sequential):
    """Norm and two layers without bias, which have numbers for names: (n, T, W) -> (n, T, W)."""

    def __init__(self, width: int):
        inner = 4 * width
        first, second = nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False)
        super().__init__(nn.LayerNorm(width), first, nn.GELU(), second)

    def forward(self, x: torch.Tensor, change: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        """`change` are scale and shift after the norm, (n, W) each."""
        norm, first, act, second = self
        x = norm(x) if change is None else modulate(norm(x), *change)
        return second(act(first(x)))


class Block(nn.ModuleList):
    """Attention and feed-forward layer, which have numbers for names: (n, P, W), (n, T, W) -> (n, T, W)."""

    def __init__(self, width: int, heads: int):
        super().__init__([PerceiverAttention(width, heads), FeedForward(width)])

    def forward(self, x: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        attention, mlp = self
        latents = attention(x, latents) + latents
        return mlp(latents) + latents


class TimeBlock(Block):
    """The same with the time, (n, W): what it makes of it modulates the queries before either layer."""

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads)
        self.append(nn.Sequential(nn.SiLU(), nn.Linear(width, 4 * width)))

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, latents: torch.Tensor, temb: torch.Tensor
    ) -> torch.Tensor:
        attention, mlp, modulation = self
        shift, scale, shift_mlp, scale_mlp = modulation(temb).chunk(4, dim=1)  # (n, W) each
        latents = attention(x, latents, (scale, shift)) + latents
        return mlp(latents, (scale_mlp, shift_mlp)) + latents


class Resampler(Projection):
    """Queries, learned, that gather what they want from the picture's patches: (n, P, F) -> (n, T, D).

    Args:
        image_features: F.
        features: D.
        tokens: T, the number of queries.
        width: Features of a query inside (W).
        heads: Of `HEAD` features each.
        depth: Number of blocks.
    """

    reads_patches = True
    block: ClassVar[type[Block]] = Block

    def __init__(self, image_features: int, features: int, tokens: int, width: int, heads: int, depth: int = 4):
        super().__init__()
        self.image_features, self.features = image_features, features
        self.latents = nn.Parameter(torch.randn(1, tokens, width) / width**0.5)
        self.proj_in = nn.Linear(image_features, width)
        self.layers = nn.ModuleList(self.block(width, heads) for _ in range(depth))
        self.proj_out = nn.Linear(width, features)
        self.norm_out = nn.LayerNorm(features)

    @classmethod
    def like(cls, weights: Weights) -> Self:
        (width, image_features), (features, _) = weights["proj_in.weight"].shape, weights["proj_out.weight"].shape
        heads, depth = len(weights["layers.0.0.to_q.weight"]) // HEAD, 1
        while f"layers.{depth}.0.to_q.weight" in weights:
            depth += 1
        tokens = weights["latents"].shape[1]
        return cls(image_features, features, tokens, width, heads, depth, **cls.more_sizes(weights))

    @classmethod
    def more_sizes(cls, weights: Weights) -> dict[str, Any]:
        """Further arguments of a subclass."""
        return {}

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        x, latents = self.proj_in(patches), self.latents.expand(len(patches), -1, -1)  # (n, P, W), (n, T, W)
        for block in self.layers:
            latents = block(x, latents)
        return self.norm_out(self.proj_out(latents))


class TimeResampler(Resampler):
    """A resampler whose blocks are modulated by the time, which is added to the patches too.

    (n, P, F), (n,) -> (n, T, D) and the embedded time, (n, W). `waves` are the sines and cosines of a time.
    """

    timed = True
    block = TimeBlock

    def __init__(
        self,
        image_features: int,
        features: int,
        tokens: int,
        width: int,
        heads: int,
        depth: int = 4,
        waves: int = 320,
    ):
        super().__init__(image_features, features, tokens, width, heads, depth)
        self.time_proj = Timesteps(waves, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(waves, width)

    @classmethod
    def more_sizes(cls, weights: Weights) -> dict[str, Any]:
        return {"waves": weights["time_embedding.linear_1.weight"].shape[1]}

    def forward(  # type: ignore[override]
        self, patches: torch.Tensor, timestep: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        temb = self.time_embedding(self.time_proj(timestep).to(patches.dtype))  # (n, W)
        x, latents = self.proj_in(patches) + temb[:, None], self.latents.expand(len(patches), -1, -1)
        for block in self.layers:
            latents = block(x, latents, temb)
        return self.norm_out(self.proj_out(latents)), temb
