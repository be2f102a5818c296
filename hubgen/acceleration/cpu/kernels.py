"""Matrix products and convolutions whose weights are brought into oneDNN's own order once, not at every call.

These are private operators of torch (those that its compiler emits), used here alone. Where one is missing, or does
not do what it should, `available` is false and nobody asks for a packed weight.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Geometry(NamedTuple):
    """What a convolution does besides multiplying."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


@lru_cache(maxsize=8)
def available(dtype: torch.dtype) -> bool:
    """Whether this torch has the packed kernels for `dtype` on this CPU, and they compute what the plain ones do."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    try:
        with torch.no_grad():
            x, weight, bias = (torch.linspace(-1, 1, n).sin().to(dtype) for n in (8 * 16 * 9, 16 * 16 * 9, 16))
            pictures = x.view(2, 16, 6, 6).contiguous(memory_format=torch.channels_last)
            kernel, geometry = weight.view(16, 16, 3, 3), Geometry((1, 1), (1, 1), (1, 1), 1)
            tokens, matrix = x.view(-1, 16), kernel[..., 1, 1].contiguous()
            pairs = [
                (convolve(pictures, pack_convolution(kernel, geometry, pictures.shape), bias, geometry),
                 F.conv2d(pictures, kernel, bias, padding=1)),
                (multiply(tokens, pack_linear(matrix), bias), F.linear(tokens, matrix, bias)),
                (multiply(tokens, pack_linear(matrix), bias, "tanh"),
                 F.gelu(F.linear(tokens, matrix, bias), approximate="tanh")),
                (multiply_gated(tokens, pack_linear(matrix), bias, multiply(tokens, pack_linear(matrix), bias, "none")),
                 F.linear(tokens, matrix, bias) * F.gelu(F.linear(tokens, matrix, bias))),
            ]  # fmt: skip
            tolerance = 1e-5 if dtype == torch.float32 else 0.1
            return all(torch.allclose(packed, plain, rtol=tolerance, atol=tolerance) for packed, plain in pairs)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False


def pack_linear(weight: torch.Tensor) -> torch.Tensor:
    """(O, I) in oneDNN's order, as an opaque tensor."""
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def multiply(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, gelu: str | None = None) -> torch.Tensor:
    """(..., I) -> (..., O); `gelu`, "none" or "tanh", applies GELU to the sums before they are rounded."""
    if gelu is None:
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "gelu", [], gelu)


def multiply_gated(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, gate: torch.Tensor
) -> torch.Tensor:
    """(..., I), gate (..., O) -> gate times the product, (..., O)."""
    return torch.ops.mkldnn._linear_pointwise.binary(x, gate, packed, bias, "mul")


def pack_convolution(weight: torch.Tensor, geometry: Geometry, shape: torch.Size) -> torch.Tensor:
    """(O, I, h, w) in oneDNN's order for inputs of `shape`; other shapes are right as well, but may be slower."""
    return torch.ops.mkldnn._reorder_convolution_weight(
        weight, geometry.padding, geometry.stride, geometry.dilation, geometry.groups, list(shape)
    )


def convolve(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, geometry: Geometry) -> torch.Tensor:
    """(B, I, H, W) -> (B, O, H', W')."""
    return torch.ops.mkldnn._convolution_pointwise(
        x, packed, bias, geometry.padding, geometry.stride, geometry.dilation, geometry.groups, "none", [], ""
    )


def convolve_columns(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, geometry: Geometry
) -> torch.Tensor:
    """A convolution as one matrix product, kernels (O, I * h * w) by columns of neighbours (I * h * w, B * H' * W').

    For few pixels and many channels, where ordering the weights would take longer than multiplying by them: here they
    are read as they lie. One group.
    """
    (vertical, horizontal), (top, left), (down, right) = geometry.stride, geometry.padding, geometry.dilation
    out_channels, channels, height, width = weight.shape
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, left, left, top, top)).contiguous()  # (B, H, W, I)
    batch = len(x)
    rows = (padded.shape[1] - down * (height - 1) - 1) // vertical + 1
    columns = (padded.shape[2] - right * (width - 1) - 1) // horizontal + 1
    image, line, pixel, channel = padded.stride()
    neighbours = padded.as_strided(
        (height, width, batch, rows, columns, channels),
        (line * down, pixel * right, image, line * vertical, pixel * horizontal, channel),
    ).reshape(-1, channels)  # whole pixels are copied, and the matrix turned after that
    neighbours = neighbours.t().contiguous().view(channels * height * width, batch * rows * columns)
    kernel = weight.view(out_channels, -1)
    out = torch.mm(kernel, neighbours) if bias is None else torch.addmm(bias[:, None], kernel, neighbours)
    out = out.view(out_channels, batch, rows, columns).transpose(0, 1)
    return out.contiguous(memory_format=torch.channels_last)
