"""The spatial transformer: what lets a convolutional U-Net look at text (2112.10752, section 3.3 and figure 3).

    feature map -> norm -> proj_in -> [self-attention, cross-attention, feed-forward] x N -> proj_out -> + feature map

Shapes: B batch, C channels, H and W height and width of the feature map, L = H * W its tokens, S context tokens,
E features of a context token. Parameter names are those of diffusers' classes of the same names.
"""

from typing import Any

import torch
from torch import nn

from hubgen.layers.attention import Attention
from hubgen.layers.checkpointing import Checkpointed
from hubgen.layers.feed_forward import FeedForward


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention and a gated feed-forward layer, each normalised before and added to its input.

    Args:
        dim: Features of a token; also `num_attention_heads * attention_head_dim`.
        num_attention_heads: Number of heads of both attentions.
        attention_head_dim: Features of a head.
        cross_attention_dim: Features of a context token (E).
        dropout: Probability of dropping a feature of the attentions' output and inside the feed-forward layer.
        upcast_attention: See `Attention`.
    """

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        attention_head_dim: int,
        cross_attention_dim: int,
        dropout: float = 0.0,
        upcast_attention: bool = False,
    ):
        super().__init__()
        heads: dict[str, Any] = {
            "heads": num_attention_heads,
            "dim_head": attention_head_dim,
            "dropout": dropout,
            "upcast_attention": upcast_attention,
        }
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, **heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, cross_attention_dim, **heads)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim, dropout=dropout, activation_fn="geglu")

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        """(B, L, C) -> (B, L, C).

        Args:
            hidden_states: Tokens of the feature map, (B, L, C).
            attention_mask: Added to the scores of the self-attention, (B, 1, L).
            encoder_hidden_states: Context tokens, (B, S, E).
            encoder_attention_mask: Added to the scores of the cross-attention, (B, 1, S).
            cross_attention_kwargs: Further keywords of both attentions' processors.
        """
        x, kwargs = hidden_states, cross_attention_kwargs or {}
        x = x + self.attn1(self.norm1(x), None, attention_mask, **kwargs)  # (B, L, C)
        x = x + self.attn2(self.norm2(x), encoder_hidden_states, encoder_attention_mask, **kwargs)  # (B, L, C)
        return x + self.ff(self.norm3(x))  # (B, L, C)


class Transformer2DModel(nn.Module, Checkpointed):
    """Transformer blocks on the pixels of a feature map, added to it: (B, C, H, W) -> (B, C, H, W).

    Args:
        num_attention_heads: Number of heads.
        attention_head_dim: Features of a head.
        in_channels: Channels of the feature map (C).
        num_layers: Number of transformer blocks.
        cross_attention_dim: Features of a context token (E).
        norm_num_groups: Groups of the GroupNorm before the projection; must divide `in_channels`.
        use_linear_projection: Linear layers in and out (SD 2.x, SDXL) in place of 1x1 convolutions (SD 1.x). They
            compute the same, but their weights have another shape in a checkpoint.
        upcast_attention: See `Attention`.
    """

    def __init__(
        self,
        num_attention_heads: int,
        attention_head_dim: int,
        in_channels: int,
        num_layers: int = 1,
        cross_attention_dim: int = 768,
        norm_num_groups: int = 32,
        use_linear_projection: bool = False,
        upcast_attention: bool = False,
    ):
        super().__init__()
        self.use_linear_projection = use_linear_projection
        width = num_attention_heads * attention_head_dim
        self.norm = nn.GroupNorm(norm_num_groups, in_channels, eps=1e-6)
        self.proj_in = nn.Linear(in_channels, width) if use_linear_projection else nn.Conv2d(in_channels, width, 1)
        self.transformer_blocks = nn.ModuleList(
            [
                BasicTransformerBlock(
                    width,
                    num_attention_heads,
                    attention_head_dim,
                    cross_attention_dim,
                    upcast_attention=upcast_attention,
                )
                for _ in range(num_layers)
            ]
        )
        self.proj_out = nn.Linear(width, in_channels) if use_linear_projection else nn.Conv2d(width, in_channels, 1)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, H, W); the arguments are those of `BasicTransformerBlock.forward`.

        Raises:
            ValueError: `attention_mask` is not for H * W tokens.
        """
        height, width = hidden_states.shape[-2:]
        if attention_mask is not None and attention_mask.shape[-1] != height * width:
            raise ValueError(
                f"`attention_mask`: got a mask of {attention_mask.shape[-1]} tokens, expected {height} x {width} = "
                f"{height * width}: it fits only a model whose attentions all have one size. The mask of the context "
                "tokens is `encoder_attention_mask`."
            )
        x = self.norm(hidden_states)  # (B, C, H, W)
        if self.use_linear_projection:
            x = self.proj_in(x.flatten(2).transpose(1, 2))  # (B, L, width)
        else:
            x = self.proj_in(x).flatten(2).transpose(1, 2)  # (B, L, width)
        for block in self.transformer_blocks:
            x = self.run(  # (B, L, width)
                block, x, attention_mask, encoder_hidden_states, encoder_attention_mask, cross_attention_kwargs
            )
        if self.use_linear_projection:
            x = self.proj_out(x).transpose(1, 2).unflatten(2, (height, width))  # (B, C, H, W)
        else:
            x = self.proj_out(x.transpose(1, 2).unflatten(2, (height, width)))  # (B, C, H, W)
        return x + hidden_states
