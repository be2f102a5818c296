"""Nearest-neighbour doubling and a 3x3 convolution, as four 2x2 convolutions of the small picture.

Among the nine pixels that an output pixel is computed from, only four differ: two rows by two columns of the small
picture. So the weights that fall on the same pixel can be summed beforehand, differently for even and odd rows and
columns, and 4 multiplications remain of 9. (The sub-pixel view of Shi et al., 1609.07009, read backwards.)

Shapes: B batch, I and O channels in and out, H and W height and width of the small picture.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

PHASES = ((0, 0), (0, 1), (1, 0), (1, 1))
"""Of output pixels: whether row and column are odd."""


def phase_kernels(weight: torch.Tensor) -> list[torch.Tensor]:
    """(O, I, 3, 3) -> for each of `PHASES`, (O, I, 2, 2) in the same type; sums are made in float32."""
    top, middle, bottom = weight.float().unbind(2)  # (O, I, 3) each
    rows = (torch.stack([top, middle + bottom], 2), torch.stack([top + middle, bottom], 2))  # (O, I, 2, 3)
    kernels = []
    for odd_row, odd_column in PHASES:
        left, centre, right = rows[odd_row].unbind(3)
        pair = [left + centre, right] if odd_column else [left, centre + right]
        kernels.append(torch.stack(pair, 3).to(weight.dtype))
    return kernels


def convolve_doubled(x: torch.Tensor, convolve: Callable[[torch.Tensor, int], torch.Tensor]) -> torch.Tensor:
    """(B, I, H, W) -> (B, O, 2 H, 2 W) in channels-last order, as the 3x3 convolution with padding 1 of the doubled x.

    Args:
        x: In channels-last order.
        convolve: `(pictures, phase) -> pictures`, (B, I, H + 1, W + 1) -> (B, O, H, W): the convolution without padding
            by the kernel of a phase.
    """
    batch, _, height, width = x.shape
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))  # (B, H + 2, W + 2, I)
    out: torch.Tensor | None = None
    for phase, (row, column) in enumerate(PHASES):
        window = padded[:, row : row + height + 1, column : column + width + 1].contiguous()
        part = convolve(window.permute(0, 3, 1, 2), phase).permute(0, 2, 3, 1)  # (B, H, W, O)
        if out is None:
            out = part.new_empty(batch, height, 2, width, 2, part.shape[3])
        out[:, :, row, :, column] = part
    assert out is not None
    return out.view(batch, 2 * height, 2 * width, -1).permute(0, 3, 1, 2)
