"""The kernels compute what torch's do."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hubgen.acceleration.cpu import kernels, winograd
from hubgen.acceleration.cpu.packing import SUMS, checksum
from hubgen.acceleration.cpu.upsampling import convolve_doubled, phase_kernels


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("size", [(4, 4), (3, 5), (1, 2)])
def test_a_doubled_picture_is_convolved_from_the_small_one(size: tuple[int, int]) -> None:
    weight, bias, x = torch.randn(5, 3, 3, 3).double(), torch.randn(5).double(), torch.randn(2, 3, *size).double()
    exact = F.conv2d(F.interpolate(x, scale_factor=2.0), weight, bias, padding=1)
    small = [kernel.double() for kernel in phase_kernels(weight)]
    fast = convolve_doubled(
        x.contiguous(memory_format=torch.channels_last), lambda window, phase: F.conv2d(window, small[phase], bias)
    )
    assert fast.shape == exact.shape
    assert relative(fast, exact) < 1e-6  # kernels are summed in float32


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (4, 5), (1, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_winograds_convolution_is_the_convolution(size: tuple[int, int], bias: bool) -> None:
    conv = nn.Conv2d(24, 20, 3, padding=1, bias=bias)
    x = torch.randn(3, 24, *size)
    with torch.no_grad():
        fast = winograd.convolve(x, winograd.transform_kernel(conv.weight), conv.bias)
        exact = copy.deepcopy(conv).double()(x.double())
    assert fast.shape == exact.shape
    assert relative(fast.double(), exact) < 5e-6


@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 1, 1), (2, 1, 1), (1, 0, 2), (2, 0, 1)])
def test_a_convolution_by_columns_is_the_convolution(stride: int, padding: int, dilation: int) -> None:
    conv = nn.Conv2d(6, 8, 3, stride=stride, padding=padding, dilation=dilation)
    x = torch.randn(2, 6, 9, 11)
    geometry = kernels.Geometry((stride,) * 2, (padding,) * 2, (dilation,) * 2, 1)
    with torch.no_grad():
        assert relative(kernels.convolve_columns(x, conv.weight, conv.bias, geometry), conv(x)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (64, 2 * SUMS + 1), (90, 91)])
def test_any_change_of_a_weight_changes_the_sums_over_its_bits(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape).to(dtype)
    before = checksum(weight)
    assert torch.equal(checksum(weight.clone()), before)
    assert len(before) < 2 * SUMS
    for change in (
        lambda w: w[1:2, 3:4].mul_(1.01),  # a single value
        lambda w: w.copy_(w[torch.arange(len(w)).roll(1)].clone()),  # rows change places
        lambda w: w.copy_(w.flip(1).clone()),  # columns change places
        lambda w: w.neg_(),
    ):
        changed = weight.clone()
        change(changed)
        assert not torch.equal(checksum(changed), before)
