"""Resampling by two with the binomial filter [1, 3, 3, 1], which lets no aliases through.

Zhang 2019 (https://arxiv.org/abs/1904.11486); StyleGAN2 (1912.04958) and NCSN++ (2011.13456, section 4.4) resample so.
Pixels outside of the image are zeros. Neither layer has weights.

Shapes: B batch, C channels, H and W height and width.
"""

import torch
import torch.nn.functional as F
from torch import nn

TAPS = (1.0, 3.0, 3.0, 1.0)


class FirResampler(nn.Module):
    """The two-dimensional filter as a buffer outside of the state dict; its sum is `gain`."""

    kernel: torch.Tensor

    def __init__(self, gain: float):
        super().__init__()
        taps = torch.tensor(TAPS) / sum(TAPS)
        self.register_buffer("kernel", gain * torch.outer(taps, taps)[None, None], persistent=False)  # (1, 1, 4, 4)

    def weight(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The filter once a channel, (C, 1, 4, 4), in the features' dtype."""
        return self.kernel.to(hidden_states.dtype).expand(hidden_states.shape[1], -1, -1, -1)


class FirDownsample2D(FirResampler):
    """Filters and takes every second pixel: (B, C, H, W) -> (B, C, H/2, W/2)."""

    def __init__(self) -> None:
        super().__init__(gain=1.0)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.conv2d(
            hidden_states, self.weight(hidden_states), stride=2, padding=1, groups=hidden_states.shape[1]
        )  # (B, C, H/2, W/2)


class FirUpsample2D(FirResampler):
    """Puts a zero after every pixel and filters: (B, C, H, W) -> (B, C, 2H, 2W).

    The gain of four makes up for the zeros.
    """

    def __init__(self) -> None:
        super().__init__(gain=4.0)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.conv_transpose2d(
            hidden_states, self.weight(hidden_states), stride=2, padding=1, groups=hidden_states.shape[1]
        )  # (B, C, 2H, 2W)
