"""Faster ways of linear layers, convolutions and what stands around them, and when not to take them.

Each function stands for the `forward` of a layer while a network of an accelerated call runs (`hubgen.acceleration.
walk`). It is given what the model's weights were packed to, and falls back on the layer's own `forward`.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as torch_module

from hubgen.acceleration.cpu import kernels, winograd
from hubgen.acceleration.cpu.packing import Packing, Record
from hubgen.acceleration.cpu.upsampling import convolve_doubled, phase_kernels
from hubgen.layers.feed_forward import GEGLU, GELU
from hubgen.layers.resnet import Upsample2D

# Below this many multiplications, Python's share of a call is larger than what a kernel could save.
SMALL = 2**21
# Convolutions of at least so many pixels and channels are computed by Winograd's method, from this many on even if the
# kernels have to be transformed at every call.
WINOGRAD_PIXELS, WINOGRAD_PIXELS_UNPACKED, WINOGRAD_CHANNELS = 500, 1600, 192
# Up to so many pixels a convolution is faster as a matrix product than with its weights ordered at every call; the
# second number holds for weights of so many values.
FEW_PIXELS, FEW_PIXELS_LARGE, LARGE = 320, 640, 2**23
# Largest product of channels whose transformed kernels (144 bytes each) are made anew at every call; of convolutions of
# so many pixels all are, where memory may be spent.
WINOGRAD_KERNELS_UNPACKED, WINOGRAD_PIXELS_ANY = 2**18, 4096
# A convolution of a doubled picture of at least so many pixels is computed from the small one.
DOUBLED_PIXELS = 100
DOUBLING = ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")
WINDOW = kernels.Geometry((1, 1), (0, 0), (1, 1), 1)

Answer = Callable[..., Any]


def usable(layer: Any, x: Any, packs: bool) -> bool:
    """Whether a call may leave the plain path: plain inference on the CPU in the weights' own type."""
    weight = layer.weight
    if not (plain_tensor(x) and plain_tensor(weight)) or x.device.type != "cpu" or weight.device.type != "cpu":
        return False
    dense = weight.is_contiguous() or (weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last))
    if x.dtype != weight.dtype or not dense:
        return False
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    if torch.is_autocast_enabled("cpu") or torch._C._are_functorch_transforms_active():
        return False
    return kernels.available(x.dtype) if packs else x.dtype in (torch.float32, torch.bfloat16)


def plain_tensor(x: Any) -> bool:
    """Whether it is a tensor and of no subclass."""
    return type(x) in (torch.Tensor, nn.Parameter)


def fusable(layer: Any, plain_class: type) -> bool:
    """Whether what calls a layer may compute it along: it is the plain layer, and nobody else listens to its calls."""
    if type(layer) is not plain_class or layer._forward_hooks or layer._forward_pre_hooks:  # type: ignore[attr-defined]
        return False
    forward = layer.__dict__.get("forward")
    listened = torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
    return not listened and (forward is None or getattr(forward, "is_ours", False))


# ---- linear layers ----


def linear(packing: Packing, layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """(..., I) -> (..., O), by the packed weight."""
    rows = x.numel() // max(layer.in_features, 1)
    if rows * layer.weight.numel() < SMALL or not usable(layer, x, packing.budget > 0):
        return nn.Linear.forward(layer, x)
    record = packing.record(layer)
    if not granted_linear(packing, record, layer, rows) or isinstance(record.packed, tuple):  # two halves, of `gegelu`
        return nn.Linear.forward(layer, x)
    return kernels.multiply(x, packed_linear(packing, record, layer), layer.bias)


def granted_linear(packing: Packing, record: Record, layer: nn.Linear, rows: int) -> bool:
    """Whether there is memory to pack the weight, as is decided at the first call."""
    if record.granted is None:
        # Products of a few rows gain by the order, those of many by the better kernel.
        wide = 0.3 if layer.out_features > 4 * layer.in_features and rows < 1024 else 0.0
        size = layer.weight.numel() * layer.weight.element_size()
        record.granted = rows >= 16 and packing.grant(0.05 + wide + 1e-3 * rows, size, rows)
    return record.granted


def packed_linear(packing: Packing, record: Record, layer: nn.Linear) -> torch.Tensor:
    """The weight in the kernels' order."""
    if record.packed is None:
        packing.keep(record, layer.weight, kernels.pack_linear(layer.weight.detach().contiguous()))
    return record.packed


def ready(packing: Packing, layer: nn.Linear, x: torch.Tensor) -> Record | None:
    """The record of a layer whose packed weight a block may multiply by itself, with more done on the way."""
    rows = x.numel() // max(layer.in_features, 1)
    if not fusable(layer, nn.Linear) or rows * layer.weight.numel() < SMALL:
        return None
    if not usable(layer, x, packing.budget > 0):
        return None
    record = packing.record(layer)
    return record if granted_linear(packing, record, layer, rows) else None


def gelu(packing: Packing, block: GELU, x: torch.Tensor) -> torch.Tensor:
    """(..., dim_in) -> (..., dim_out): GELU on the sums of a linear layer while they are in registers."""
    proj: Any = block.proj
    record = ready(packing, proj, x)
    if record is None:
        return GELU.forward(block, x)
    return kernels.multiply(x, packed_linear(packing, record, proj), proj.bias, gelu=block.approximate)


def geglu(packing: Packing, block: GEGLU, x: torch.Tensor) -> torch.Tensor:
    """(..., dim_in) -> (..., dim_out): two products, of which the first is multiplied by the second on the way."""
    proj: Any = block.proj
    record = None if proj.bias is None else ready(packing, proj, x)
    if record is None:
        return GEGLU.forward(block, x)
    if not isinstance(record.packed, tuple):
        halves = proj.weight.detach().contiguous().chunk(2)
        packing.keep(record, proj.weight, tuple(map(kernels.pack_linear, halves)))
    value, gate = record.packed
    value_bias, gate_bias = proj.bias.chunk(2)
    return kernels.multiply_gated(x, value, value_bias, kernels.multiply(x, gate, gate_bias, gelu="none"))


# ---- convolutions ----


def convolution(packing: Packing, layer: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """(B, I, H, W) -> (B, O, H', W') in channels-last order: by Winograd's method, packed, or as a matrix product."""
    weight, bias = layer.weight, layer.bias
    if x.ndim != 4 or not x.numel() or not usable(layer, x, packing.budget > 0):
        return nn.Conv2d.forward(layer, x)
    x = x.contiguous(memory_format=torch.channels_last)
    pixels = x.shape[0] * x.shape[2] * x.shape[3] // (layer.stride[0] * layer.stride[1])
    if pixels * weight.numel() < SMALL or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return nn.Conv2d.forward(layer, x)
    geometry = geometry_of(layer)
    record = packing.record(layer)
    fits = suits_winograd(layer, pixels, x.dtype, geometry)
    passing = fits and suits_passing_kernels(packing, layer, pixels)
    granted = granted_convolution(packing, record, layer, pixels, fits, passing)
    if record.doubling:  # what is packed is for `doubling`
        return nn.Conv2d.forward(layer, x)
    if fits and granted and record.winograd:
        if record.packed is None:
            packing.keep(record, weight, winograd.transform_kernel(weight.detach()))
        return winograd.convolve(x, record.packed, bias)
    if passing:
        return winograd.convolve(x, winograd.transform_kernel(weight), bias)
    if layer.kernel_size == (1, 1) and geometry == ((1, 1), (0, 0), (1, 1), 1):
        tokens, matrix = x.permute(0, 2, 3, 1), weight.detach().flatten(1)
        if granted:
            if record.packed is None:
                packing.keep(record, weight, kernels.pack_linear(matrix.contiguous()))
            return kernels.multiply(tokens, record.packed, bias).permute(0, 3, 1, 2)
        return F.linear(tokens, matrix, bias).permute(0, 3, 1, 2)
    if granted and not record.winograd:
        if record.packed is None:
            packed = kernels.pack_convolution(weight.detach().contiguous(), geometry, x.shape)
            packing.keep(record, weight, packed)
        return kernels.convolve(x, record.packed, bias, geometry)
    few = FEW_PIXELS if weight.numel() < LARGE else FEW_PIXELS_LARGE
    if pixels <= few and layer.groups == 1 and weight.is_contiguous():
        return kernels.convolve_columns(x, weight, bias, geometry)
    return nn.Conv2d.forward(layer, x)


def geometry_of(layer: nn.Conv2d) -> kernels.Geometry:
    """What a convolution does besides multiplying."""
    return kernels.Geometry(layer.stride, layer.padding, layer.dilation, layer.groups)  # type: ignore[arg-type]


def granted_convolution(
    packing: Packing, record: Record, layer: nn.Conv2d, pixels: int, fits: bool, passing: bool
) -> bool:
    """Whether there is memory to pack the weight, and in which of the two ways; decided at the first call.

    Where Winograd's method `fits`, it comes first; kernels transformed in `passing` are better than none.
    """
    size = layer.weight.numel() * layer.weight.element_size()
    if record.granted is None:
        record.winograd = fits and packing.grant(0.15 + 2e-4 * pixels, 4 * size, pixels)
        record.granted = record.winograd
        if layer.kernel_size == (1, 1):
            record.granted = packing.grant(0.05 + 1e-3 * pixels, size, pixels)
        elif not record.winograd and not passing:
            record.granted = packing.grant(0.24 + 2e-4 * pixels if pixels >= 64 else 0.1, size, pixels)
    return bool(record.granted)


def suits_passing_kernels(packing: Packing, layer: nn.Conv2d, pixels: int) -> bool:
    """Whether Winograd's method is the fastest even if it transforms the kernels at every call."""
    small = layer.in_channels * layer.out_channels <= WINOGRAD_KERNELS_UNPACKED
    enough = pixels >= WINOGRAD_PIXELS_ANY or (small and pixels >= WINOGRAD_PIXELS_UNPACKED)
    return enough and packing.budget > 0


def suits_winograd(layer: nn.Conv2d, pixels: int, dtype: torch.dtype, geometry: kernels.Geometry) -> bool:
    """Whether Winograd's method can compute a convolution, and is worth it."""
    return (
        dtype == torch.float32
        and pixels >= WINOGRAD_PIXELS
        and layer.kernel_size == (3, 3)
        and geometry == ((1, 1), (1, 1), (1, 1), 1)
        and min(layer.in_channels, layer.out_channels) >= WINOGRAD_CHANNELS
    )


def doubling(
    packing: Packing, block: Upsample2D, x: torch.Tensor, output_size: tuple[int, int] | None = None
) -> torch.Tensor:
    """(B, C, H, W) -> (B, C, 2 H, 2 W): doubling and convolution in one, 4 multiplications in the place of 9."""
    conv: Any = block.conv
    height, width = x.shape[2:]
    doubled = output_size is None or tuple(output_size) == (2 * height, 2 * width)
    record = ready_to_double(packing, conv, x) if doubled and fusable(conv, nn.Conv2d) else None
    if record is None:
        return Upsample2D.forward(block, x, output_size)
    x = x.contiguous(memory_format=torch.channels_last)
    if record.packed is None:
        window = torch.Size((*x.shape[:2], height + 1, width + 1))
        small = phase_kernels(conv.weight.detach())
        packed = tuple(kernels.pack_convolution(kernel, WINDOW, window) for kernel in small)
        packing.keep(record, conv.weight, packed)
    phases = record.packed
    return convolve_doubled(x, lambda window, phase: kernels.convolve(window, phases[phase], conv.bias, WINDOW))


def ready_to_double(packing: Packing, conv: Any, x: torch.Tensor) -> Record | None:
    """The record of a convolution that `doubling` may compute by the phases of its kernel, which need memory of it."""
    pixels, weight = 4 * x.shape[0] * x.shape[2] * x.shape[3], conv.weight
    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    if geometry != DOUBLING or pixels < DOUBLED_PIXELS or pixels * weight.numel() < SMALL:
        return None
    if not usable(conv, x, packing.budget > 0):
        return None
    record = packing.record(conv)
    size = 16 * weight.numel() * weight.element_size() // 9
    if record.granted is None and packing.grant(1.0, size, pixels):
        record.granted = record.doubling = True
    return record if record.doubling else None


# By the exact class of a layer. Those of `ALWAYS` gain by what a call computes; the others by what is packed alone.
ALWAYS: dict[type, Answer] = {nn.Conv2d: convolution}
PACKED: dict[type, Answer] = {nn.Linear: linear, GELU: gelu, GEGLU: geglu, Upsample2D: doubling}
