"""3x3 convolutions with a quarter of the multiplications (Winograd; Lavin and Gray, 1509.09308).

A tile of 4x4 outputs of a 3x3 kernel depends on 6x6 inputs. Both kernel and inputs are evaluated at six points per
axis, multiplied there (36 multiplications in place of 144), and the outputs read off:

    Y = A^T [(G g G^T) * (B^T d B)] A

With the points 0, ±2/3, ±3/2 and infinity the result is as near to the exact one as oneDNN's direct convolution is, in
float32; the usual points 0, ±1, ±2 lose one digit (Barabasz et al., 1803.10986, study the choice).

Shapes: B batch, I and O channels in and out, H and W height and width, T tiles, N = 36 products a tile.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F

TILE = 4
SPAN = TILE + 2
POINTS = (0.0, 2 / 3, -2 / 3, 3 / 2, -3 / 2)
# Tiles at a time: enough rows for a matrix product, few enough that transformed inputs stay in the cache until they
# are multiplied.
TILES_AT_A_TIME = 320


@lru_cache(maxsize=4)
def matrices(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two-dimensional transforms as float32 matrices: inputs (36, 36), kernels (36, 9), outputs (16, 36)."""

    def powers(count: int) -> torch.Tensor:
        rows = [[point**n for n in range(count)] for point in POINTS]
        return torch.tensor([*rows, [0.0] * (count - 1) + [1.0]], dtype=torch.float64)

    of_outputs, of_kernels = powers(TILE).T, powers(3)
    of_inputs = torch.linalg.inv(powers(SPAN)).T
    with torch.inference_mode(False):
        return tuple(torch.kron(m, m).float().to(device) for m in (of_inputs, of_kernels, of_outputs))  # type: ignore


def transform_kernel(weight: torch.Tensor) -> torch.Tensor:
    """(O, I, 3, 3) -> (N, I, O), float32."""
    out_channels, in_channels = weight.shape[:2]
    flat = weight.permute(2, 3, 1, 0).reshape(9, -1).float()  # (9, I * O)
    return (matrices(weight.device)[1] @ flat).view(SPAN**2, in_channels, out_channels)


def convolve(x: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """3x3 convolution with stride 1 and padding 1: (B, I, H, W) -> (B, O, H, W) in channels-last order.

    Args:
        x: Any floating-point type, which the output has too; computed in float32.
        kernel: From `transform_kernel`, (N, I, O).
        bias: (O,) or `None`.
    """
    batch, channels, height, width = x.shape
    rows, columns = -(-height // TILE), -(-width // TILE)
    of_inputs, _, of_outputs = matrices(x.device)
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, columns * TILE - width + 1, 1, rows * TILE - height + 1))
    image, row, column, _ = padded.stride()
    tiles = padded.as_strided(
        (SPAN, SPAN, batch, rows, columns, channels), (row, column, image, row * TILE, column * TILE, 1)
    )
    out = x.new_empty(batch, rows, TILE, columns, TILE, kernel.shape[2])
    # Rows of tiles at a time, all pictures together where one picture is small.
    step = max(1, TILES_AT_A_TIME // columns)
    images = max(1, step // rows)
    step = min(step, rows)
    for first in range(0, batch, images):
        for top in range(0, rows, step):
            part = tiles[:, :, first : first + images, top : top + step]
            values = of_inputs @ part.reshape(SPAN**2, -1).float()  # (N, T * I)
            products = torch.bmm(values.view(SPAN**2, -1, channels), kernel)  # (N, T, O)
            result = of_outputs @ products.view(SPAN**2, -1)  # (16, T * O)
            shape = (TILE, TILE, *part.shape[2:5], -1)
            result = result.view(shape).permute(2, 3, 0, 4, 1, 5)
            target = out[first : first + images, top : top + step]
            torch.add(result, bias, out=target) if bias is not None and bias.dtype == x.dtype == torch.float32 else (
                target.copy_(result if bias is None else result + bias)
            )
    out = out.view(batch, rows * TILE, columns * TILE, -1)[:, :height, :width]
    return out.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
