"""The blocks of DiT (2212.09748, figure 3), each with embedders of timestep and class of its own.

That every block owns a copy of them is how the published checkpoints are stored. Parameter names are diffusers'.

Shapes: B batch, T tokens, D features of a token.
"""

from typing import Any

import torch
from torch import nn

from hubgen.layers.attention import Attention
from hubgen.layers.embeddings import TimestepEmbedding, Timesteps
from hubgen.layers.feed_forward import FeedForward
from hubgen.layers.mmdit_blocks import add_gated
from hubgen.layers.normalization import AdaLayerNormZero, modulate


class LabelEmbedding(nn.Module):
    """A vector for each class, and one more, the last, for no class: (B,) -> (B, D)."""

    def __init__(self, num_classes: int, hidden_size: int):
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        return self.embedding_table(labels)


class CombinedTimestepLabelEmbeddings(nn.Module):
    """Embedded timestep plus embedded class; the lowest frequency is exactly 1/10000 here, unlike in an MM-DiT."""

    def __init__(self, num_classes: int, embedding_dim: int):
        super().__init__()
        self.time_proj = Timesteps(num_channels=256, flip_sin_to_cos=True, downscale_freq_shift=1)
        self.timestep_embedder = TimestepEmbedding(in_channels=256, time_embed_dim=embedding_dim)
        self.class_embedder = LabelEmbedding(num_classes, embedding_dim)

    def forward(self, timestep: torch.Tensor, class_labels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """(B,), (B,) -> (B, D)."""
        waves = self.time_proj(timestep).to(dtype)  # (B, 256)
        return self.timestep_embedder(waves) + self.class_embedder(class_labels)


class ClassAdaLayerNormZero(AdaLayerNormZero):
    """adaLN-Zero that owns the embedders of its condition."""

    def __init__(self, embedding_dim: int, num_classes: int):
        super().__init__(embedding_dim)
        self.emb = CombinedTimestepLabelEmbeddings(num_classes, embedding_dim)


class Embedded:
    """Carries the first block's embedded condition to the output, under group offloading.

    Not a list, because offloading hooks hand on copies of lists.
    """

    temb: torch.Tensor | None = None  # (B, D)


class DiTBlock(nn.Module):
    """Figure 3, "DiT Block with adaLN-Zero": modulated attention and MLP, both gated.

    Args:
        dim: Features of a token.
        num_attention_heads: Heads.
        attention_head_dim: Features of a head.
        num_classes: Classes, the one for no class not counted.
        dropout: Probability of dropping a feature of attention's output and inside the MLP.
        activation_fn: See `FeedForward`.
        attention_bias: Whether queries, keys and values have a bias.
        upcast_attention: See `Attention`.
        norm_elementwise_affine: Whether the MLP's norm has a weight and a bias.
        norm_eps: Epsilon of the MLP's norm; attention's is always 1e-6. (The paper's code has 1e-6 for both, the
            published configs 1e-5.)
    """

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        attention_head_dim: int,
        num_classes: int,
        dropout: float = 0.0,
        activation_fn: str = "gelu-approximate",
        attention_bias: bool = True,
        upcast_attention: bool = False,
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        self.norm1 = ClassAdaLayerNormZero(dim, num_classes)
        self.attn1 = Attention(
            dim,
            heads=num_attention_heads,
            dim_head=attention_head_dim,
            bias=attention_bias,
            dropout=dropout,
            upcast_attention=upcast_attention,
        )
        self.norm3 = nn.LayerNorm(dim, eps=norm_eps, elementwise_affine=norm_elementwise_affine)
        self.ff = FeedForward(dim, dropout=dropout, activation_fn=activation_fn)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        cross_attention_kwargs: dict[str, Any] | None = None,
        residual: torch.Tensor | None = None,
        embedded: Embedded | None = None,
    ) -> torch.Tensor:
        """(B, T, D), (B,), (B,) -> (B, T, D).

        Args:
            hidden_states: Tokens, (B, T, D).
            timestep: (B,).
            class_labels: (B,).
            cross_attention_kwargs: Further keywords of the attention's processor.
            residual: A ControlNet's, (B, T, D), added at the end; see `JointTransformerBlock.forward`.
            embedded: Receives the block's embedded condition.
        """
        x = hidden_states
        temb = self.norm1.emb(timestep, class_labels, x.dtype)  # (B, D)
        if embedded is not None:
            embedded.temb = temb
        x_in, gate, shift_mlp, scale_mlp, gate_mlp = self.norm1(x, temb)
        x = add_gated(x, gate, self.attn1(x_in, **(cross_attention_kwargs or {})))
        x = add_gated(x, gate_mlp, self.ff(modulate(self.norm3(x), scale_mlp, shift_mlp)))
        return x if residual is None else x + residual


def initialize_dit_(model: nn.Module) -> None:
    """adaLN-Zero (section 3.2) for a transformer of these blocks: each starts as the identity."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.flatten(1))  # the convolution is a linear layer on patches
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, CombinedTimestepLabelEmbeddings):
            nn.init.normal_(module.timestep_embedder.linear_1.weight, std=0.02)
            nn.init.normal_(module.timestep_embedder.linear_2.weight, std=0.02)
            nn.init.normal_(module.class_embedder.embedding_table.weight, std=0.02)
        elif isinstance(module, AdaLayerNormZero):
            nn.init.zeros_(module.linear.weight)
