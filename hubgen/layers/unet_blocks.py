"""The levels of a U-Net: stacks of residual blocks, with or without a look at the context, down, in the middle and up.

A level with attention has it after every residual block (in the middle: after the first) and nothing else besides, so
each level is one forward with several names: `CrossAttn` looks at a context by a spatial transformer, `Attn` at the
feature map's own pixels. The `Skip` levels of NCSN++ are in `unet_skip_blocks.py`. Names, forward arguments and
parameter names are those of diffusers' blocks.

Shapes: B batch, C channels, H and W height and width, T features of the time embedding, S context tokens, E their
features.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hubgen.layers.attention import SpatialAttention
from hubgen.layers.checkpointing import Checkpointed
from hubgen.layers.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from hubgen.layers.spatial_transformer import Transformer2DModel


@dataclass(frozen=True)
class LevelAttention:
    """What the spatial transformers of one level have in common."""

    heads: int
    """Number of heads, at most the level's channels; a head has `channels // heads` features."""
    context_dim: int
    """Features of a context token (E)."""
    layers: int | tuple[int, ...] = 1
    """Transformer blocks of each spatial transformer: one number for all, or one each."""
    use_linear_projection: bool = False
    """See `Transformer2DModel`."""
    upcast_attention: bool = False
    """See `Attention`."""
    groups: int = 32
    """Groups of their GroupNorms."""

    def build(self, channels: int, count: int) -> nn.ModuleList:
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
                    self.groups,
                    self.use_linear_projection,
                    self.upcast_attention,
                )
                for i in range(count)
            ]
        )


@dataclass(frozen=True)
class PixelAttention:
    """What the attention layers of one level without a context have in common; see `SpatialAttention`."""

    dim_head: int | None = None
    """Features of a head; `None` for a single head."""
    groups: int | None = 32
    """Groups of their GroupNorms; `None` for no norm."""
    eps: float = 1e-6
    """Epsilon of the same."""
    output_scale_factor: float = 1.0
    """What the sum of a layer's input and its attention is divided by."""

    def build(self, channels: int, count: int) -> nn.ModuleList:
        """`count` layers for feature maps of `channels` channels."""
        return nn.ModuleList(
            [
                SpatialAttention(channels, self.groups, self.eps, self.dim_head, self.output_scale_factor)
                for _ in range(count)
            ]
        )


def start_at_zero(model: nn.Module) -> None:
    """Zeroes the last layer of every residual branch of a U-Net and of the U-Net itself, so that it predicts zero.

    As in the code of 2006.11239, 2105.05233 and 2112.10752; all else keeps torch's default.
    """
    for module in model.modules():
        last: Any = None
        if isinstance(module, ResnetBlock2D):
            last = module.conv2
        elif isinstance(module, Transformer2DModel):
            last = module.proj_out
        elif isinstance(module, SpatialAttention):
            last = module.to_out[0]
        elif module is model:
            last = module.conv_out
        for parameter in () if last is None else last.parameters():
            nn.init.zeros_(parameter)


class UNetLevel(nn.Module, Checkpointed):
    """What all levels share: residual blocks, and attention layers where the level has them."""

    has_cross_attention = False

    attentions: nn.ModuleList
    """Only of levels that have attention: diffusers looks whether there is such an attribute"""
    resnets: nn.ModuleList

    def attend(self, i: int, x: torch.Tensor, *context: Any) -> torch.Tensor:
        """Attention layer `i`, if there is one; `context` is what spatial transformers look at, and their masks."""
        attentions = getattr(self, "attentions", ())
        if i >= len(attentions):
            return x
        return attentions[i](x, *context) if self.has_cross_attention else attentions[i](x)


class DownBlock2D(UNetLevel):
    """Residual blocks, then half the size; every intermediate feature map is kept for the way up.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        temb_channels: Features of the time embedding (T).
        num_layers: Number of residual blocks.
        attention: The attention layers after them; `None` for a level without.
        groups: Groups of the residual blocks' GroupNorms.
        eps: Epsilon of the residual blocks' GroupNorms.
        dropout: Probability of dropping a feature in a residual block.
        add_downsample: Whether the size is halved at the end.
        downsample_padding: See `Downsample2D`.
        scale_shift: See `ResnetBlock2D`.
        resnet_resample: Whether a residual block halves the size instead of a `Downsample2D`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        temb_channels: int,
        num_layers: int = 1,
        attention: LevelAttention | PixelAttention | None = None,
        groups: int = 32,
        eps: float = 1e-5,
        dropout: float = 0.0,
        add_downsample: bool = True,
        downsample_padding: int = 1,
        scale_shift: bool = False,
        resnet_resample: bool = False,
    ):
        super().__init__()
        widths = [in_channels] + [out_channels] * (num_layers - 1)
        if attention is not None:
            self.attentions = attention.build(out_channels, num_layers)
        options: dict[str, Any] = {"groups": groups, "eps": eps, "dropout": dropout, "scale_shift": scale_shift}
        self.resnets = nn.ModuleList([ResnetBlock2D(width, out_channels, temb_channels, **options) for width in widths])
        halve: nn.Module | None = None
        if add_downsample and resnet_resample:
            halve = ResnetBlock2D(out_channels, out_channels, temb_channels, resample=nn.AvgPool2d(2), **options)
        elif add_downsample:
            halve = Downsample2D(out_channels, downsample_padding)
        self.downsamplers = None if halve is None else nn.ModuleList([halve])

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
            x = self.run(self.resnets[i], x, temb)  # (B, C, H, W)
            x = self.attend(i, x, encoder_hidden_states, attention_mask, encoder_attention_mask, cross_attention_kwargs)
            skips.append(x)
        if self.has_cross_attention and additional_residuals is not None:
            x = skips[-1] = x + additional_residuals
        if self.downsamplers is not None:
            halve = self.downsamplers[0]
            x = halve(x, temb) if isinstance(halve, ResnetBlock2D) else halve(x)  # (B, C, H/2, W/2)
            skips.append(x)
        if not self.has_cross_attention and additional_residuals is not None:
            x = skips[-1] = x + additional_residuals
        return x, tuple(skips)


class CrossAttnDownBlock2D(DownBlock2D):
    """A `DownBlock2D` with `LevelAttention`."""

    has_cross_attention = True


class AttnDownBlock2D(DownBlock2D):
    """A `DownBlock2D` with `PixelAttention`."""


class ResnetDownsampleBlock2D(DownBlock2D):
    """A `DownBlock2D` with `resnet_resample`."""


class UNetMidBlock2D(UNetLevel):
    """One residual block at the lowest resolution; with attention an attention layer and a second one.

    Args:
        channels: Channels of input and output.
        temb_channels: Features of the time embedding (T).
        attention: The attention layer; `None` for a middle without.
        groups: Groups of the residual blocks' GroupNorms.
        eps: Epsilon of the residual blocks' GroupNorms.
        dropout: Probability of dropping a feature in a residual block.
        output_scale_factor: See `ResnetBlock2D`.
        scale_shift: See `ResnetBlock2D`.
        num_layers: Residual blocks; `None` for two with attention and one without.
    """

    attentions: nn.ModuleList

    def __init__(
        self,
        channels: int,
        temb_channels: int,
        attention: LevelAttention | PixelAttention | None = None,
        groups: int = 32,
        eps: float = 1e-5,
        dropout: float = 0.0,
        output_scale_factor: float = 1.0,
        scale_shift: bool = False,
        num_layers: int | None = None,
    ):
        super().__init__()
        self.attentions = nn.ModuleList() if attention is None else attention.build(channels, 1)
        options: dict[str, Any] = {"groups": groups, "eps": eps, "dropout": dropout, "scale_shift": scale_shift}
        self.resnets = nn.ModuleList(
            [
                ResnetBlock2D(channels, channels, temb_channels, output_scale_factor=output_scale_factor, **options)
                for _ in range(1 + len(self.attentions) if num_layers is None else num_layers)
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
        x = self.run(self.resnets[0], hidden_states, temb)  # (B, C, H, W)
        for i in range(1, len(self.resnets)):
            x = self.attend(
                i - 1, x, encoder_hidden_states, attention_mask, encoder_attention_mask, cross_attention_kwargs
            )
            x = self.run(self.resnets[i], x, temb)  # (B, C, H, W)
        return x


class UNetMidBlock2DCrossAttn(UNetMidBlock2D):
    """A `UNetMidBlock2D` with `LevelAttention`."""

    has_cross_attention = True


class UpBlock2D(UNetLevel):
    """Residual blocks, each beside a feature map from the way down, then twice the size.

    Args:
        in_channels: Channels of the last feature map from the way down: those of the level that comes next.
        out_channels: Channels of the output and of the other feature maps from the way down.
        prev_output_channel: Channels of the input.
        temb_channels: Features of the time embedding (T).
        num_layers: Number of residual blocks.
        attention: The attention layers after them; `None` for a level without.
        groups: Groups of the residual blocks' GroupNorms.
        eps: Epsilon of the residual blocks' GroupNorms.
        dropout: Probability of dropping a feature in a residual block.
        add_upsample: Whether the size is doubled at the end.
        scale_shift: See `ResnetBlock2D`.
        resnet_resample: Whether a residual block doubles the size instead of an `Upsample2D`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        prev_output_channel: int,
        temb_channels: int,
        num_layers: int = 1,
        attention: LevelAttention | PixelAttention | None = None,
        groups: int = 32,
        eps: float = 1e-5,
        dropout: float = 0.0,
        add_upsample: bool = True,
        scale_shift: bool = False,
        resnet_resample: bool = False,
    ):
        super().__init__()
        widths = [prev_output_channel] + [out_channels] * (num_layers - 1)
        skip_widths = [out_channels] * (num_layers - 1) + [in_channels]
        if attention is not None:
            self.attentions = attention.build(out_channels, num_layers)
        options: dict[str, Any] = {"groups": groups, "eps": eps, "dropout": dropout, "scale_shift": scale_shift}
        self.resnets = nn.ModuleList(
            [
                ResnetBlock2D(width + skip_width, out_channels, temb_channels, **options)
                for width, skip_width in zip(widths, skip_widths, strict=True)
            ]
        )
        double: nn.Module | None = None
        if add_upsample and resnet_resample:
            double = ResnetBlock2D(
                out_channels, out_channels, temb_channels, resample=nn.Upsample(scale_factor=2.0), **options
            )
        elif add_upsample:
            double = Upsample2D(out_channels)
        self.upsamplers = None if double is None else nn.ModuleList([double])

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
            x = self.run(self.resnets[i], torch.cat([x, skip], dim=1), temb)  # (B, C, H, W)
            x = self.attend(i, x, encoder_hidden_states, attention_mask, encoder_attention_mask, cross_attention_kwargs)
        if self.upsamplers is None:
            return x
        double = self.upsamplers[0]
        return double(x, temb) if isinstance(double, ResnetBlock2D) else double(x, upsample_size)  # (B, C, 2H, 2W)


class CrossAttnUpBlock2D(UpBlock2D):
    """An `UpBlock2D` with `LevelAttention`."""

    has_cross_attention = True


class AttnUpBlock2D(UpBlock2D):
    """An `UpBlock2D` with `PixelAttention`."""


class ResnetUpsampleBlock2D(UpBlock2D):
    """An `UpBlock2D` with `resnet_resample`."""
