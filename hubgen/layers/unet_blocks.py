"""The levels of a U-Net: stacks of residual blocks, with or without a look at the context, down, in the middle and up.

A level with attention has a spatial transformer after every residual block (in the middle: after the first) and
nothing else besides, so each pair of classes is one forward and two names. Names, forward arguments and parameter
names are those of diffusers' blocks.

Shapes: B batch, C channels, H and W height and width, T features of the time embedding, S context tokens, E their
features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hubgen.layers.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from hubgen.layers.transformer import Transformer2DModel


@dataclass(frozen=True)
class LevelAttention:
    """What the spatial transformers of one level have in common."""

    heads: int
    """Number of heads; divides the level's channels."""
    context_dim: int
    """Features of a context token (E)."""
    layers: int | tuple[int, ...] = 1
    """Transformer blocks of each spatial transformer: one number for all, or one each."""
    use_linear_projection: bool = False
    """See `Transformer2DModel`."""
    upcast_attention: bool = False
    """See `Attention`."""

    def build(self, channels: int, groups: int, count: int) -> nn.ModuleList:
        """`count` spatial transformers for feature maps of `channels` channels."""
        layers = (self.layers,) * count if isinstance(self.layers, int) else self.layers
        return nn.ModuleList(
            [
                Transformer2DModel(
                    self.heads,
                    channels // self.heads,
                    channels,
                    layers[i],
                    self.context_dim,
                    groups,
                    self.use_linear_projection,
                    self.upcast_attention,
                )
                for i in range(count)
            ]
        )


class UNetLevel(nn.Module):
    """What all levels share: residual blocks, and spatial transformers where the level has attention."""

    has_cross_attention = False
    gradient_checkpointing = False

    attentions: nn.ModuleList | None
    resnets: nn.ModuleList
    _gradient_checkpointing_func: Callable[..., torch.Tensor]

    def residual(self, i: int, x: torch.Tensor, temb: torch.Tensor | None) -> torch.Tensor:
        """Residual block `i`, which the backward pass computes again under gradient checkpointing."""
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(self.resnets[i], x, temb)
        return self.resnets[i](x, temb)


class DownBlock2D(UNetLevel):
    """Residual blocks, then half the size; every intermediate feature map is kept for the way up.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        temb_channels: Features of the time embedding (T).
        num_layers: Number of residual blocks.
        attention: The spatial transformers after them; `None` for a level without.
        groups: Groups of all GroupNorms.
        eps: Epsilon of the residual blocks' GroupNorms.
        dropout: Probability of dropping a feature in a residual block.
        add_downsample: Whether the size is halved at the end.
        downsample_padding: See `Downsample2D`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        temb_channels: int,
        num_layers: int = 1,
        attention: LevelAttention | None = None,
        groups: int = 32,
        eps: float = 1e-5,
        dropout: float = 0.0,
        add_downsample: bool = True,
        downsample_padding: int = 1,
    ):
        super().__init__()
        widths = [in_channels] + [out_channels] * (num_layers - 1)
        self.attentions = None if attention is None else attention.build(out_channels, groups, num_layers)
        self.resnets = nn.ModuleList(
            [ResnetBlock2D(width, out_channels, temb_channels, groups, eps, dropout) for width in widths]
        )
        self.downsamplers = nn.ModuleList([Downsample2D(out_channels, downsample_padding)]) if add_downsample else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        temb: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        additional_residuals: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Returns the output and the feature maps for the way up, of which the last is the output.

        Args:
            hidden_states: (B, C_in, H, W).
            temb: Time embedding, (B, T).
            encoder_hidden_states: Context tokens, (B, S, E).
            attention_mask: Added to the scores of self-attention, (B, 1, H * W).
            cross_attention_kwargs: Further keywords of the attention processors.
            encoder_attention_mask: Added to the scores of cross-attention, (B, 1, S).
            additional_residuals: From a T2I-adapter (2302.08453). Added before the halving in a level with attention,
                (B, C, H, W), and after it in a level without, (B, C, H/2, W/2): adapters are trained for this.
        """
        x, skips = hidden_states, []  # (B, C_in, H, W)
        for i in range(len(self.resnets)):
            x = self.residual(i, x, temb)  # (B, C, H, W)
            if self.attentions is not None:
                x = self.attentions[i](
                    x, encoder_hidden_states, attention_mask, encoder_attention_mask, cross_attention_kwargs
                )
            skips.append(x)
        if self.has_cross_attention and additional_residuals is not None:
            x = skips[-1] = x + additional_residuals
        if self.downsamplers is not None:
            x = self.downsamplers[0](x)  # (B, C, H/2, W/2)
            skips.append(x)
        if not self.has_cross_attention and additional_residuals is not None:
            x = skips[-1] = x + additional_residuals
        return x, tuple(skips)


class CrossAttnDownBlock2D(DownBlock2D):
    """A `DownBlock2D` with `attention`."""

    has_cross_attention = True


class UNetMidBlock2D(UNetLevel):
    """One residual block at the lowest resolution; with attention a spatial transformer and a second one.

    Args:
        channels: Channels of input and output.
        temb_channels: Features of the time embedding (T).
        attention: The spatial transformer; `None` for a middle without.
        groups: Groups of all GroupNorms.
        eps: Epsilon of the residual blocks' GroupNorms.
        dropout: Probability of dropping a feature in a residual block.
        output_scale_factor: See `ResnetBlock2D`.
    """

    attentions: nn.ModuleList

    def __init__(
        self,
        channels: int,
        temb_channels: int,
        attention: LevelAttention | None = None,
        groups: int = 32,
        eps: float = 1e-5,
        dropout: float = 0.0,
        output_scale_factor: float = 1.0,
    ):
        super().__init__()
        self.attentions = nn.ModuleList() if attention is None else attention.build(channels, groups, 1)
        self.resnets = nn.ModuleList(
            [
                ResnetBlock2D(channels, channels, temb_channels, groups, eps, dropout, output_scale_factor)
                for _ in range(1 + len(self.attentions))
            ]
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        temb: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, H, W); the arguments are those of `DownBlock2D.forward`."""
        x = self.residual(0, hidden_states, temb)  # (B, C, H, W)
        for i, attention in enumerate(self.attentions):
            x = attention(x, encoder_hidden_states, attention_mask, encoder_attention_mask, cross_attention_kwargs)
            x = self.residual(i + 1, x, temb)  # (B, C, H, W)
        return x


class UNetMidBlock2DCrossAttn(UNetMidBlock2D):
    """A `UNetMidBlock2D` with `attention`."""

    has_cross_attention = True


class UpBlock2D(UNetLevel):
    """Residual blocks, each beside a feature map from the way down, then twice the size.

    Args:
        in_channels: Channels of the last feature map from the way down: those of the level that comes next.
        out_channels: Channels of the output and of the other feature maps from the way down.
        prev_output_channel: Channels of the input.
        temb_channels: Features of the time embedding (T).
        num_layers: Number of residual blocks.
        attention: The spatial transformers after them; `None` for a level without.
        groups: Groups of all GroupNorms.
        eps: Epsilon of the residual blocks' GroupNorms.
        dropout: Probability of dropping a feature in a residual block.
        add_upsample: Whether the size is doubled at the end.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        prev_output_channel: int,
        temb_channels: int,
        num_layers: int = 1,
        attention: LevelAttention | None = None,
        groups: int = 32,
        eps: float = 1e-5,
        dropout: float = 0.0,
        add_upsample: bool = True,
    ):
        super().__init__()
        widths = [prev_output_channel] + [out_channels] * (num_layers - 1)
        skip_widths = [out_channels] * (num_layers - 1) + [in_channels]
        self.attentions = None if attention is None else attention.build(out_channels, groups, num_layers)
        self.resnets = nn.ModuleList(
            [
                ResnetBlock2D(width + skip_width, out_channels, temb_channels, groups, eps, dropout)
                for width, skip_width in zip(widths, skip_widths, strict=True)
            ]
        )
        self.upsamplers = nn.ModuleList([Upsample2D(out_channels)]) if add_upsample else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        res_hidden_states_tuple: tuple[torch.Tensor, ...],
        temb: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        upsample_size: tuple[int, int] | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, C_in, H, W) -> (B, C, 2H, 2W), or (B, C, H, W) at the last level.

        Args:
            hidden_states: (B, C_in, H, W).
            res_hidden_states_tuple: Feature maps from the way down, one a residual block; the last is used first.
            upsample_size: Height and width of the output where they are not 2H and 2W because the way down rounded.

        The other arguments are those of `DownBlock2D.forward`.
        """
        x = hidden_states  # (B, C_in, H, W)
        for i, skip in enumerate(reversed(res_hidden_states_tuple)):
            x = self.residual(i, torch.cat([x, skip], dim=1), temb)  # (B, C, H, W)
            if self.attentions is not None:
                x = self.attentions[i](
                    x, encoder_hidden_states, attention_mask, encoder_attention_mask, cross_attention_kwargs
                )
        return x if self.upsamplers is None else self.upsamplers[0](x, upsample_size)  # (B, C, 2H, 2W)


class CrossAttnUpBlock2D(UpBlock2D):
    """An `UpBlock2D` with `attention`."""

    has_cross_attention = True
