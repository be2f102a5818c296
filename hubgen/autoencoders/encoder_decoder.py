"""The two halves of a convolutional autoencoder (2112.10752, appendix E), shared by the KL and the VQ autoencoder.

A level is a stack of residual blocks, with attention after each where its name says so, and, but for the last one, a
halving (encoder) or doubling (decoder) of the size; between the two lies a middle with attention. Parameter names are
those of diffusers' blocks of the same names.

Shapes: B batch, C channels of the latents, H and W pixels, h = H / f and w = W / f with f = 2 ** (levels - 1).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.utils import BaseOutput
from torch import nn

from hubgen.layers.attention import SpatialAttention
from hubgen.layers.checkpointing import Checkpointed
from hubgen.layers.resnet import Downsample2D, ResnetBlock2D, Upsample2D


@dataclass
class DecoderOutput(BaseOutput):
    """Pixels (B, 3, H, W), about in [-1, 1], and what quantising the latents cost, where they were quantised."""

    sample: torch.Tensor
    commit_loss: torch.Tensor | None = None


class Level(nn.Module):
    """`num_layers` residual blocks, each followed by attention over all pixels if `has_attention`."""

    has_attention = False

    def __init__(self, in_channels: int, out_channels: int, num_layers: int, groups: int):
        super().__init__()
        widths = [in_channels] + [out_channels] * num_layers
        self.resnets = nn.ModuleList([ResnetBlock2D(i, o, groups=groups) for i, o in itertools.pairwise(widths)])
        attentions = num_layers if self.has_attention else 0
        self.attentions = nn.ModuleList([SpatialAttention(out_channels, groups) for _ in range(attentions)])

    def residuals(self, x: torch.Tensor) -> torch.Tensor:
        """(B, D_in, h, w) -> (B, D_out, h, w)."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(x)
            if self.has_attention:
                x = self.attentions[i](x)
        return x


class DownEncoderBlock2D(Level):
    """A level, then half the size."""

    def __init__(self, in_channels: int, out_channels: int, num_layers: int, groups: int, downsample: bool):
        super().__init__(in_channels, out_channels, num_layers, groups)
        self.downsamplers = nn.ModuleList([Downsample2D(out_channels, padding=0)]) if downsample else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.residuals(x)
        return x if self.downsamplers is None else self.downsamplers[0](x)


class AttnDownEncoderBlock2D(DownEncoderBlock2D):
    """A `DownEncoderBlock2D` with attention."""

    has_attention = True


class UpDecoderBlock2D(Level):
    """A level, then twice the size."""

    def __init__(self, in_channels: int, out_channels: int, num_layers: int, groups: int, upsample: bool):
        super().__init__(in_channels, out_channels, num_layers, groups)
        self.upsamplers = nn.ModuleList([Upsample2D(out_channels)]) if upsample else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.residuals(x)
        return x if self.upsamplers is None else self.upsamplers[0](x)


class AttnUpDecoderBlock2D(UpDecoderBlock2D):
    """An `UpDecoderBlock2D` with attention."""

    has_attention = True


DOWN_BLOCKS: dict[str, type[DownEncoderBlock2D]] = {
    "DownEncoderBlock2D": DownEncoderBlock2D,
    "AttnDownEncoderBlock2D": AttnDownEncoderBlock2D,
}
UP_BLOCKS: dict[str, type[UpDecoderBlock2D]] = {
    "UpDecoderBlock2D": UpDecoderBlock2D,
    "AttnUpDecoderBlock2D": AttnUpDecoderBlock2D,
}


class MidBlock(nn.Module):
    """Residual block, attention over all pixels, residual block."""

    def __init__(self, channels: int, groups: int, add_attention: bool):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock2D(channels, channels, groups=groups) for _ in range(2)])
        self.attentions = nn.ModuleList([SpatialAttention(channels, groups)] if add_attention else [])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Encoder(nn.Module, Checkpointed):
    """Pixels (B, `in_channels`, H, W) -> features (B, `out_channels`, H / f, W / f).

    Args:
        in_channels: Channels of the pixels.
        out_channels: Channels of the result: those of the latents, or twice as many for a mean and a log variance.
        block_types: A name of `DOWN_BLOCKS` for each level, from the pixels inwards.
        block_out_channels: Width of each level.
        layers_per_block: Residual blocks of a level.
        groups: Groups of every GroupNorm.
        mid_block_add_attention: Whether the middle attends over all pixels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        block_types: Sequence[str],
        block_out_channels: Sequence[int],
        layers_per_block: int,
        groups: int,
        mid_block_add_attention: bool,
    ):
        super().__init__()
        widths = (block_out_channels[0], *block_out_channels)
        last = len(block_out_channels) - 1
        self.conv_in = nn.Conv2d(in_channels, block_out_channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            [
                DOWN_BLOCKS[name](widths[i], widths[i + 1], layers_per_block, groups, downsample=i < last)
                for i, name in enumerate(block_types)
            ]
        )
        self.mid_block = MidBlock(block_out_channels[-1], groups, mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(groups, block_out_channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(block_out_channels[-1], out_channels, 3, padding=1)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(sample)  # (B, D0, H, W)
        for block in [*self.down_blocks, self.mid_block]:  # (B, D, h, w)
            x = self.run(block, x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))  # (B, out, h, w)


class Decoder(nn.Module, Checkpointed):
    """Latents (B, `in_channels`, h, w) -> pixels (B, `out_channels`, h * f, w * f).

    Args:
        in_channels: Channels of the latents.
        out_channels: Channels of the pixels.
        block_types: A name of `UP_BLOCKS` for each level, from the latents outwards.
        block_out_channels: Width of each level, from the pixels inwards.
        layers_per_block: Residual blocks of a level of the encoder; the decoder has one more.
        groups: Groups of every GroupNorm.
        mid_block_add_attention: Whether the middle attends over all pixels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        block_types: Sequence[str],
        block_out_channels: Sequence[int],
        layers_per_block: int,
        groups: int,
        mid_block_add_attention: bool,
    ):
        super().__init__()
        widths = (block_out_channels[-1], *reversed(block_out_channels))
        last = len(block_out_channels) - 1
        self.conv_in = nn.Conv2d(in_channels, block_out_channels[-1], 3, padding=1)
        self.mid_block = MidBlock(block_out_channels[-1], groups, mid_block_add_attention)
        self.up_blocks = nn.ModuleList(
            [
                UP_BLOCKS[name](widths[i], widths[i + 1], layers_per_block + 1, groups, upsample=i < last)
                for i, name in enumerate(block_types)
            ]
        )
        self.conv_norm_out = nn.GroupNorm(groups, block_out_channels[0], eps=1e-6)
        self.conv_out = nn.Conv2d(block_out_channels[0], out_channels, 3, padding=1)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(sample)  # (B, D, h, w)
        for block in [self.mid_block, *self.up_blocks]:  # (B, D0, H, W)
            x = self.run(block, x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))  # (B, out, H, W)


def check_architecture(
    down_block_types: Sequence[str],
    up_block_types: Sequence[str],
    block_out_channels: Sequence[int],
    act_fn: str,
    norm_num_groups: int,
) -> None:
    """Raises ValueError for what no encoder or decoder is made of, by the name of the config's key."""
    levels = len(block_out_channels)
    for name, types, known in (
        ("down_block_types", down_block_types, DOWN_BLOCKS),
        ("up_block_types", up_block_types, UP_BLOCKS),
    ):
        if len(types) != levels or not set(types) <= set(known):
            raise ValueError(
                f"`{name}`: got {tuple(types)}, expected one of {', '.join(map(repr, known))} for each of the {levels} "
                "levels of `block_out_channels`."
            )
    if act_fn not in ("silu", "swish"):
        raise ValueError(f"`act_fn`: got {act_fn!r}, expected 'silu'.")
    if any(width % norm_num_groups for width in block_out_channels):
        raise ValueError(
            f"`norm_num_groups`: got {norm_num_groups}, expected a divisor of all of `block_out_channels` "
            f"{tuple(block_out_channels)}."
        )


def check_pixels(name: str, pixels: torch.Tensor, channels: int, multiple: int) -> None:
    """Raises ValueError unless `pixels` are (B, `channels`, H, W) with H and W multiples of `multiple`."""
    if pixels.ndim != 4 or pixels.shape[1] != channels or pixels.shape[2] % multiple or pixels.shape[3] % multiple:
        raise ValueError(
            f"`{name}`: got {tuple(pixels.shape)}, expected (B, {channels}, H, W) with H and W multiples of {multiple}."
        )
