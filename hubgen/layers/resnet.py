"""Residual blocks and resampling of the convolutional models (U-Nets and autoencoders).

Shapes: (B, C, H, W) for features, (B, E) for the time embedding. Parameter names are those of diffusers' blocks of
the same names, so that checkpoints fit without a key map.
"""

import torch
import torch.nn.functional as F
from torch import nn


class ResnetBlock2D(nn.Module):
    """Two normalised 3x3 convolutions beside a skip connection, optionally shifted by a time embedding.

    The block of DDPM (https://arxiv.org/abs/2006.11239, appendix B) without its dropout at the default of 0. With
    `resample` it is that of BigGAN (1809.11096, figure 15), which also halves or doubles the size.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output; a 1x1 convolution joins the skip connection where they differ.
        temb_channels: Width of the time embedding; `None` for a block that sees none (autoencoders).
        groups: Groups of both GroupNorms; must divide `in_channels` and `out_channels`.
        eps: Epsilon of both GroupNorms.
        dropout: Probability of dropping a feature before the second convolution.
        output_scale_factor: The sum of skip and residual is divided by it.
        groups_out: Groups of the second GroupNorm where they are others than those of the first.
        scale_shift: Whether the time embedding scales and shifts the second norm's output (2105.05233, section 3)
            instead of being added before it.
        resample: Halves or doubles the features' size, between the first norm and the first convolution as well as in
            the skip connection.
        conv_shortcut: Whether a 1x1 convolution joins the skip connection even where the channels do not differ.
    """

    time_layer = "time_emb_proj"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        temb_channels: int | None = None,
        groups: int = 32,
        eps: float = 1e-6,
        dropout: float = 0.0,
        output_scale_factor: float = 1.0,
        groups_out: int | None = None,
        scale_shift: bool = False,
        resample: nn.Module | None = None,
        conv_shortcut: bool = False,
    ):
        super().__init__()
        self.output_scale_factor = output_scale_factor
        self.scale_shift = scale_shift
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = None
        if temb_channels is not None:
            self.time_emb_proj = nn.Linear(temb_channels, (2 if scale_shift else 1) * out_channels)
        self.norm2 = nn.GroupNorm(groups if groups_out is None else groups_out, out_channels, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.resample = resample
        joined = conv_shortcut or in_channels != out_channels
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if joined else None

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor | None = None) -> torch.Tensor:
        """Returns (B, out_channels, H, W) for `hidden_states` (B, in_channels, H, W) and `temb` (B, temb_channels).

        H and W are those after `resample`, if there is one.
        """
        x = F.silu(self.norm1(hidden_states))  # (B, in, H, W)
        if self.resample is not None:
            hidden_states, x = self.resample(hidden_states), self.resample(x)
        x, scale = self.conv1(x), None  # (B, out, H, W)
        if self.time_emb_proj is not None:
            if temb is None:
                raise ValueError(f"`temb`: got None, expected (B, {self.time_emb_proj.in_features}).")
            shift = self.time_emb_proj(F.silu(temb))[:, :, None, None]  # (B, out or 2 out, 1, 1)
            if self.scale_shift:
                scale, shift = shift.chunk(2, dim=1)
            else:
                x = x + shift
        x = self.norm2(x)
        if scale is not None:
            x = x * (1 + scale) + shift
        x = self.conv2(self.dropout(F.silu(x)))  # (B, out, H, W)
        skip = hidden_states if self.conv_shortcut is None else self.conv_shortcut(hidden_states)
        x = skip + x
        return x if self.output_scale_factor == 1 else x / self.output_scale_factor


class Downsample2D(nn.Module):
    """Halves height and width by a 3x3 convolution of stride 2.

    Args:
        channels: Channels of the input and the output.
        padding: 1 pads all sides (U-Nets); 0 pads only the right and the bottom (the autoencoder of latent diffusion).
    """

    def __init__(self, channels: int, padding: int = 1):
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Returns (B, C, H/2, W/2), rounded up where `padding` is 1."""
        if self.padding == 0:
            hidden_states = F.pad(hidden_states, (0, 1, 0, 1))
        return self.conv(hidden_states)


class Upsample2D(nn.Module):
    """Doubles height and width by nearest-neighbour interpolation and smooths with a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden_states: torch.Tensor, output_size: tuple[int, int] | None = None) -> torch.Tensor:
        """Returns (B, C, 2H, 2W), or (B, C, *output_size) where the size on the way down was odd."""
        if output_size is None:
            hidden_states = F.interpolate(hidden_states, scale_factor=2.0, mode="nearest")
        else:
            hidden_states = F.interpolate(hidden_states, size=output_size, mode="nearest")
        return self.conv(hidden_states)
