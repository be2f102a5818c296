"""T2I-Adapter: a small network that turns a hint into features of each level of a U-Net, once for all steps.

Mou et al. 2023 (https://arxiv.org/abs/2302.08453, figure 3):

    hint ─> pixel unshuffle ─> convolution ─> body 0 ─> body 1 ─> body 2 ─> body 3
                                                │         │         │         │
                                                v         v         v         v       added inside the down levels

It sees no sample, no timestep and no text. Parameter names are those of diffusers' class.

Shapes: B batch, H and W height and width of the hint in pixels, c its channels (`in_channels`), f pixels a feature of
the first level (`downscale_factor`), C_i `channels` of level i.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import nn

from hubgen.formats.loading import StrictModelMixin
from hubgen.layers.checks import require_all_positive

TYPES = ("full_adapter", "full_adapter_xl", "light_adapter")


class AdapterResnetBlock(nn.Module):
    """Two convolutions beside a skip connection: (B, C, H, W) -> (B, C, H, W). The second is 3x3 in light adapters."""

    def __init__(self, channels: int, last_kernel: int = 1):
        super().__init__()
        self.block1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.block2 = nn.Conv2d(channels, channels, last_kernel, padding=last_kernel // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.block2(F.relu(self.block1(x)))


class AdapterBlock(nn.Module):
    """One level: half the size, another width, residual blocks. (B, C_in, H, W) -> (B, C_out, H / 2, W / 2), or H, W.

    Args:
        in_channels: C_in.
        out_channels: C_out.
        num_res_blocks: Residual blocks.
        down: Whether the size is halved, rounded up.
        light: Whether the residual blocks are narrower, a quarter of C_out, between two 1x1 convolutions.
    """

    def __init__(
        self, in_channels: int, out_channels: int, num_res_blocks: int, down: bool = False, light: bool = False
    ):
        super().__init__()
        width = out_channels // 4 if light else out_channels
        self.downsample = nn.AvgPool2d(2, ceil_mode=True) if down else None
        self.in_conv = nn.Conv2d(in_channels, width, 1) if light or in_channels != width else None
        blocks = [AdapterResnetBlock(width, 3 if light else 1) for _ in range(num_res_blocks)]
        self.resnets = nn.Sequential(*blocks)
        self.out_conv = nn.Conv2d(width, out_channels, 1) if light else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.downsample, self.in_conv, self.resnets, self.out_conv):
            x = x if layer is None else layer(x)
        return x


class Adapter(nn.Module):
    """The levels of one of the three types: (B, c, H, W) -> one feature map a level.

    - `full_adapter`: each level after the first halves the size.
    - `full_adapter_xl`: the third alone does, for SDXL, whose hint is made 16 times smaller at once.
    - `light_adapter`: as the first with narrower blocks, no convolution in front, and a level more than `channels`,
      which has the width of the last.
    """

    def __init__(
        self, kind: str, in_channels: int, channels: Sequence[int], num_res_blocks: int, downscale_factor: int
    ):
        super().__init__()
        light = kind == "light_adapter"
        self.unshuffle = nn.PixelUnshuffle(downscale_factor)
        pixels = in_channels * downscale_factor**2
        self.conv_in = None if light else nn.Conv2d(pixels, channels[0], 3, padding=1)
        outs = [*channels, channels[-1]] if light else list(channels)
        ins = [pixels if light else channels[0], *outs[:-1]]
        halved = [i == 2 if kind == "full_adapter_xl" else i > 0 for i in range(len(outs))]
        self.body = nn.ModuleList(
            [
                AdapterBlock(width_in, width_out, num_res_blocks, down, light)
                for width_in, width_out, down in zip(ins, outs, halved, strict=True)
            ]
        )
        # as published adapters have it: SDXL's type counts its halving even where it has no third level
        halvings = 1 if kind == "full_adapter_xl" else len(outs) - 1
        self.total_downscale_factor = downscale_factor * 2**halvings

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = self.unshuffle(x)  # (B, c f^2, H / f, W / f)
        if self.conv_in is not None:
            x = self.conv_in(x)
        features = []
        for block in self.body:
            x = block(x)  # (B, C_i, H / (f 2^i), W / (f 2^i)), rounded up
            features.append(x)
        return features


class T2IAdapter(StrictModelMixin, ConfigMixin):
    """A T2I-adapter; arguments and weights are those of diffusers' class.

    Args:
        in_channels: Channels of the hint (c): 3, or 1 for edges.
        channels: Channels of the levels, those of the U-Net.
        num_res_blocks: Residual blocks a level.
        downscale_factor: Pixels a feature of the first level (f): 8, in SDXL's 16.
        adapter_type: `"full_adapter"`, `"full_adapter_xl"` or `"light_adapter"`, see `Adapter`.

    Raises:
        ValueError: An argument has a value that cannot be built, or does not fit another.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        channels: Sequence[int] = [320, 640, 1280, 1280],
        num_res_blocks: int = 2,
        downscale_factor: int = 8,
        adapter_type: str = "full_adapter",
    ):
        super().__init__()
        if adapter_type not in TYPES:
            raise ValueError(f"`adapter_type`: got {adapter_type!r}, expected one of {list(TYPES)}.")
        if not isinstance(channels, list | tuple) or not channels:
            raise ValueError(f"`channels`: got {channels!r}, expected a number for each level.")
        for name in ("in_channels", "channels", "num_res_blocks", "downscale_factor"):
            require_all_positive(name, self.config[name])
        if adapter_type == "light_adapter" and min(channels) < 4:
            raise ValueError(f"`channels`: got {list(channels)}, expected at least 4 each of a light adapter.")
        if adapter_type == "full_adapter_xl" and len(set(channels[2:])) > 1:
            raise ValueError(f"`channels`: got {list(channels)}, expected one width from the third on in SDXL's type.")
        self.adapter = Adapter(adapter_type, in_channels, channels, num_res_blocks, downscale_factor)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Features for each down level of the U-Net, and in SDXL's type a last one for its middle.

        Args:
            x: The hint, (B, c, H, W), in [0, 1]; H and W multiples of `downscale_factor`. Those of
                `total_downscale_factor` fit the U-Net's levels.

        Raises:
            ValueError: The hint has another shape.
        """
        channels, factor = self.config.in_channels, self.config.downscale_factor
        if x.ndim != 4 or x.shape[1] != channels or x.shape[2] % factor or x.shape[3] % factor:
            raise ValueError(
                f"`x`: got {tuple(x.shape)}, expected (batch, {channels}, height, width) with `in_channels` = "
                f"{channels} and sides that are multiples of `downscale_factor` = {factor}."
            )
        return self.adapter(x)

    @property
    def total_downscale_factor(self) -> int:
        """Pixels a feature of the last level, each way."""
        return self.adapter.total_downscale_factor

    @property
    def downscale_factor(self) -> int:
        """Pixels a feature of the first level, each way."""
        return self.config.downscale_factor
