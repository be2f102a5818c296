"""The levels of NCSN++ for large images, which carry a small picture beside the features.

Song et al. 2021 (https://arxiv.org/abs/2011.13456, section 4.4): on the way down ("input skip") the noisy picture is
halved with every level and added to the features by a 1x1 convolution; on the way up ("output skip") every level but
the last one adds to a picture, which is doubled from level to level and is the prediction in the end. All resampling is
by the filter of `fir.py`, all sums of skip and residual are divided by the square root of 2. Names, forward arguments
and parameter names are those of diffusers' blocks.

Shapes: B batch, C channels, H and W height and width, T features of the time embedding.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hubgen.layers.fir import FirDownsample2D, FirUpsample2D
from hubgen.layers.resnet import ResnetBlock2D
from hubgen.layers.unet_blocks import PixelAttention, UNetLevel

OUTPUT_SCALE = 2.0**0.5
PICTURE_CHANNELS = 3
ATTENTION_GROUPS = 32


def skip_groups(channels: int) -> int:
    """Groups of a GroupNorm over `channels` channels: of four channels each, or 32."""
    return min(channels // 4, 32)


def joined_groups(channels: int, skip_channels: int, attention: bool) -> int:
    """Groups of the first norm on the way up, where a feature map from the way down is joined to the features.

    Levels with attention have another number as soon as both together are narrow: diffusers divides one of the two by
    four there, not the sum, and its checkpoints count on it.
    """
    return min(channels + skip_channels // 4, 32) if attention else skip_groups(channels + skip_channels)


class SkipDownBlock2D(UNetLevel):
    """Residual blocks, then half the size, of the features and of the picture.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output (C).
        temb_channels: Features of the time embedding (T).
        num_layers: Number of residual blocks.
        attention: The attention layers after them; `None` for a level without.
        eps: Epsilon of the GroupNorms.
        dropout: Probability of dropping a feature in a residual block.
        add_downsample: Whether the size is halved at the end.
        scale_shift: See `ResnetBlock2D`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        temb_channels: int,
        num_layers: int = 1,
        attention: PixelAttention | None = None,
        eps: float = 1e-6,
        dropout: float = 0.0,
        add_downsample: bool = True,
        scale_shift: bool = False,
    ):
        super().__init__()
        if attention is not None:
            self.attentions = attention.build(out_channels, num_layers)
        options: dict[str, Any] = {
            "eps": eps,
            "dropout": dropout,
            "output_scale_factor": OUTPUT_SCALE,
            "groups_out": skip_groups(out_channels),
            "scale_shift": scale_shift,
        }
        widths = [in_channels] + [out_channels] * (num_layers - 1)
        self.resnets = nn.ModuleList(
            [ResnetBlock2D(width, out_channels, temb_channels, skip_groups(width), **options) for width in widths]
        )
        self.resnet_down = self.skip_conv = None
        self.downsamplers: nn.ModuleList | None = None
        if add_downsample:
            self.resnet_down = ResnetBlock2D(
                out_channels,
                out_channels,
                temb_channels,
                skip_groups(out_channels),
                resample=FirDownsample2D(),
                conv_shortcut=True,
                **options,
            )
            self.downsamplers = nn.ModuleList([FirDownsample2D()])
            self.skip_conv = nn.Conv2d(PICTURE_CHANNELS, out_channels, 1)

    def forward(
        self, hidden_states: torch.Tensor, temb: torch.Tensor, skip_sample: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], torch.Tensor]:
        """Returns the output, the feature maps for the way up, of which the last is the output, and the picture.

        Args:
            hidden_states: (B, C_in, H, W).
            temb: Time embedding, (B, T).
            skip_sample: The picture, (B, 3, H, W).
        """
        x, maps = hidden_states, []  # (B, C_in, H, W)
        for i in range(len(self.resnets)):
            x = self.attend(i, self.run(self.resnets[i], x, temb))  # (B, C, H, W)
            maps.append(x)
        if self.downsamplers is not None:
            skip_sample = self.downsamplers[0](skip_sample)  # (B, 3, H/2, W/2)
            x = self.skip_conv(skip_sample) + self.resnet_down(x, temb)  # (B, C, H/2, W/2)
            maps.append(x)
        return x, tuple(maps), skip_sample


class AttnSkipDownBlock2D(SkipDownBlock2D):
    """A `SkipDownBlock2D` with `attention`."""


class SkipUpBlock2D(UNetLevel):
    """Residual blocks, each beside a feature map from the way down, then twice the size; adds to the picture.

    Args:
        in_channels: Channels of the last feature map from the way down: those of the level that comes next.
        out_channels: Channels of the output (C) and of the other feature maps from the way down.
        prev_output_channel: Channels of the input.
        temb_channels: Features of the time embedding (T).
        num_layers: Number of residual blocks.
        attention: The attention layer after the last of them; `None` for a level without.
        eps: Epsilon of the GroupNorms.
        dropout: Probability of dropping a feature in a residual block.
        add_upsample: Whether the features' size is doubled at the end; only such a level adds to the picture.
        scale_shift: See `ResnetBlock2D`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        prev_output_channel: int,
        temb_channels: int,
        num_layers: int = 1,
        attention: PixelAttention | None = None,
        eps: float = 1e-6,
        dropout: float = 0.0,
        add_upsample: bool = True,
        scale_shift: bool = False,
    ):
        super().__init__()
        if attention is not None:
            self.attentions = attention.build(out_channels, 1)
        groups = skip_groups(out_channels)
        options: dict[str, Any] = {
            "eps": eps,
            "dropout": dropout,
            "output_scale_factor": OUTPUT_SCALE,
            "groups_out": groups,
            "scale_shift": scale_shift,
        }
        widths = [prev_output_channel] + [out_channels] * (num_layers - 1)
        skip_widths = [out_channels] * (num_layers - 1) + [in_channels]
        self.resnets = nn.ModuleList(
            [
                ResnetBlock2D(
                    width + skip_width,
                    out_channels,
                    temb_channels,
                    joined_groups(width, skip_width, attention is not None),
                    **options,
                )
                for width, skip_width in zip(widths, skip_widths, strict=True)
            ]
        )
        self.upsampler = FirUpsample2D()
        self.resnet_up = self.skip_conv = self.skip_norm = None
        if add_upsample:
            self.resnet_up = ResnetBlock2D(
                out_channels,
                out_channels,
                temb_channels,
                groups,
                resample=FirUpsample2D(),
                conv_shortcut=True,
                **options,
            )
            self.skip_conv = nn.Conv2d(out_channels, PICTURE_CHANNELS, 3, padding=1)
            self.skip_norm = nn.GroupNorm(groups, out_channels, eps=eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        res_hidden_states_tuple: tuple[torch.Tensor, ...],
        temb: torch.Tensor,
        skip_sample: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the output, (B, C, 2H, 2W) or (B, C, H, W) at the last level, and the picture, (B, 3, H, W).

        Args:
            hidden_states: (B, C_in, H, W).
            res_hidden_states_tuple: Feature maps from the way down, one a residual block; the last is used first.
            temb: Time embedding, (B, T).
            skip_sample: The picture of the levels before, (B, 3, H/2, W/2); `None` before the first.
        """
        x = hidden_states  # (B, C_in, H, W)
        for i, skip in enumerate(reversed(res_hidden_states_tuple)):
            x = self.run(self.resnets[i], torch.cat([x, skip], dim=1), temb)  # (B, C, H, W)
        x = self.attend(0, x)
        if skip_sample is not None:
            skip_sample = self.upsampler(skip_sample)  # (B, 3, H, W)
        if self.resnet_up is not None:
            picture = self.skip_conv(F.silu(self.skip_norm(x)))  # (B, 3, H, W)
            skip_sample = picture if skip_sample is None else skip_sample + picture
            x = self.resnet_up(x, temb)  # (B, C, 2H, 2W)
        return x, skip_sample


class AttnSkipUpBlock2D(SkipUpBlock2D):
    """A `SkipUpBlock2D` with `attention`."""
