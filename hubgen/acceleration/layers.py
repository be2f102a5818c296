"""Linear layers and convolutions that know a faster way to the same result, and when not to take it.

`FastLinear` and `FastConv2d` take the place of torch's classes on the very same module objects (`module.__class__`):
parameters, names, hooks and state dicts are those of before. What they keep besides lies in one attribute that no copy
and no file ever contains.
"""

import math
import weakref
import zlib
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hubgen.acceleration import kernels, winograd
from hubgen.acceleration.upsampling import convolve_doubled, phase_kernels
from hubgen.layers.feed_forward import GEGLU, GELU
from hubgen.layers.resnet import Upsample2D

# How many values of a weight are looked at before each use. `weight.data += delta`, as adapters are fused, leaves no
# trace in a tensor's version counter, so the values themselves have to tell.
SAMPLES = 64
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
# Least gain in milliseconds a megabyte, as measured on AVX-512, for which a weight is packed, where the model's first
# large layer sees so many pixels or tokens. It grows with the square root of their number, so that what gains most,
# late in a U-Net, finds memory left.
WORTHWHILE, WORTHWHILE_BFLOAT16, PIXELS = 0.2, 0.15, 2048
# Layers that gain much and are no larger (bytes) are packed even where the budget is spent: a few percent of a model.
MUCH, SMALL_LAYER = 0.5, 2**23


@dataclass(eq=False)
class Plan:
    """How much memory a model's packed weights may take.

    It is granted at a layer's first call, so that the second call computes what the first did, to the last bit.
    """

    budget: float
    """Bytes."""
    worthwhile: float = 0.0
    """Least gain, see `WORTHWHILE`."""
    least: float | None = None
    """The same for the pictures that this model sees; `None` before its first call."""
    spent: int = 0

    def grant(self, gain: float, size: int, rows: int) -> bool:
        """Whether a layer that sees `rows` pixels or tokens may pack `size` bytes that save `gain` ms a megabyte."""
        if self.least is None:
            self.least = self.worthwhile * math.sqrt(rows / PIXELS)
        small = self.budget > 0 and gain >= MUCH and size <= SMALL_LAYER
        granted = gain >= self.least and (self.spent + size <= self.budget or small)
        self.spent += size if granted else 0
        return granted


@dataclass(eq=False)
class Record:
    """What a fast layer remembers."""

    plan: Plan
    enabled: bool = True
    granted: bool | None = None
    """Whether the plan has memory for this layer; `None` before its first call."""
    stamp: tuple[Any, ...] = ()
    """Of the weight at the last call."""
    sample: torch.Tensor | None = None
    packed: Any = None
    winograd: bool = False
    """Whether `packed` are Winograd's transformed kernels."""
    doubling: bool = False
    """Whether `packed` are the kernels of the phases of a doubled picture."""
    lasting: bool = False
    """Whether the layer sees the same tensor again and again, as a projection of the text does."""
    answers: dict[int, tuple[Any, int, torch.Tensor, int]] = field(default_factory=dict)
    """Of inputs, by their identity, that may come again: (weak reference, version, output, version)."""
    table: tuple[torch.Tensor, torch.Tensor] | None = None
    """Inputs (n, I) that will come, and their outputs (n, O): those of a known grid of timesteps."""
    row: int = 0
    """Where in the table the last input was found."""

    def forget(self) -> None:
        self.packed = self.sample = self.table = None
        self.stamp = ()
        self.answers.clear()

    def recall(self, x: torch.Tensor) -> torch.Tensor | None:
        """The output for an input that has been here: the same tensor, or the same rows of the table."""
        if self.lasting and not x.is_inference():
            found = self.answers.get(id(x))
            if found is not None and found[0]() is x and (found[1], found[3]) == (x._version, found[2]._version):
                return found[2]
        if self.table is not None and x.ndim == 2:
            inputs, outputs = self.table
            first = self.row - self.row % len(x)
            for start in range(first, first + len(inputs), len(x)):
                start %= len(inputs)
                rows = slice(start, start + len(x))
                if torch.equal(inputs[rows], x):
                    self.row = start
                    return outputs[rows].clone()
        return None

    def keep(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Remembers an answer; the last two, of the guided and the other steps."""
        if self.lasting and not x.is_inference() and not out.is_inference():
            while len(self.answers) >= 2:
                self.answers.pop(next(iter(self.answers)))
            self.answers[id(x)] = weakref.ref(x), x._version, out, out._version
        return out

    def refresh(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Forgets all if the parameters are not those of the last call: memory, version and, by samples, values.

        Packed weights are the weight's alone; the bias matters to outputs that are kept.
        """
        stamp, sample = identity(weight), sampled(weight)
        if bias is not None:
            stamp, sample = stamp + identity(bias), torch.cat([sample, sampled(bias)])
        if stamp != self.stamp or self.sample is None or not torch.equal(sample, self.sample):
            self.forget()
            self.stamp, self.sample = stamp, sample


def identity(weight: torch.Tensor) -> tuple[Any, ...]:
    version = 0 if weight.is_inference() else weight._version
    return id(weight), weight.data_ptr(), weight.dtype, weight.shape, version


@lru_cache(maxsize=512)
def positions(count: int) -> torch.Tensor:
    """Indices of `SAMPLES` values among `count`, spread without a pattern, always the same."""
    generator = torch.Generator().manual_seed(zlib.crc32(str(count).encode()))
    with torch.inference_mode(False):
        return torch.randint(count, (SAMPLES,), generator=generator)


def sampled(weight: torch.Tensor) -> torch.Tensor:
    """Some values of a weight, as bits, so that NaN equals itself."""
    values = weight.as_strided((weight.numel(),), (1,)).index_select(0, positions(weight.numel()))
    return values.view(torch.int32 if weight.dtype == torch.float32 else torch.int16)


def plain_tensor(x: Any) -> bool:
    return type(x) in (torch.Tensor, nn.Parameter)


def usable(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether a call may leave the plain path: plain inference on the CPU in the weights' own type."""
    weight, packs = module.weight, module._fast.plan.budget > 0
    if not (plain_tensor(x) and plain_tensor(weight)) or x.device.type != "cpu" or weight.device.type != "cpu":
        return False
    dense = weight.is_contiguous() or (weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last))
    if x.dtype != weight.dtype or not dense:
        return False
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    if torch.is_autocast_enabled("cpu") or torch._C._are_functorch_transforms_active():
        return False
    # Hooks of accelerate and diffusers bring weights and take them away between calls (offloading, casting).
    if "_hf_hook" in module.__dict__ or "_diffusers_hook" in module.__dict__:
        return False
    return kernels.available(x.dtype) if packs else x.dtype in (torch.float32, torch.bfloat16)


def new_plain(plain_class: type[nn.Module]) -> nn.Module:
    """A module without its state, as unpickling starts from."""
    return plain_class.__new__(plain_class)


class Swapped:
    """A module's faster class. Copies and pickles of the module are of its plain class."""

    plain_class: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = {name: value for name, value in self.__dict__.items() if name != "_fast"}
        return new_plain, (self.plain_class,), state

    def _get_name(self) -> str:
        return self.plain_class.__name__


class FastLinear(Swapped, nn.Linear):
    """A linear layer that packs its weight once, and computes the same input once."""

    plain_class = nn.Linear
    _fast: Record

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., I) -> (..., O)."""
        if torch.compiler.is_compiling():
            return super().forward(input)
        record, weight = self._fast, self.weight
        rows = input.numel() // max(self.in_features, 1)
        recalls = record.lasting or record.table is not None
        if not record.enabled or not (recalls or rows * weight.numel() >= SMALL) or not usable(self, input):
            return super().forward(input)
        record.refresh(weight, self.bias if recalls else None)
        if recalls:
            answer = record.recall(input)
            if answer is not None:
                return answer
        if not self.granted(rows) or isinstance(record.packed, tuple):  # two halves, packed by `FastGEGLU`
            return record.keep(input, super().forward(input))
        return record.keep(input, kernels.multiply(input, self.packed(), self.bias))

    def granted(self, rows: int) -> bool:
        """Whether there is memory to pack the weight, as is decided at the first call."""
        record = self._fast
        if record.granted is None:
            # Products of a few rows gain by the order, those of many by the better kernel. What the model computes once
            # a prompt or once a grid need not be fast.
            wide = 0.3 if self.out_features > 4 * self.in_features and rows < 1024 else 0.0
            size, packs = self.weight.numel() * self.weight.element_size(), rows >= 16 and not record.lasting
            record.granted = packs and record.plan.grant(0.05 + wide + 1e-3 * rows, size, rows)
        return record.granted

    def packed(self) -> torch.Tensor:
        if self._fast.packed is None:
            self._fast.packed = kernels.pack_linear(self.weight.detach().contiguous())
        return self._fast.packed

    def ready(self, x: torch.Tensor) -> bool:
        """Whether a block may multiply by the packed weight itself, with more done on the way."""
        record, rows = self._fast, x.numel() // max(self.in_features, 1)
        if torch.compiler.is_compiling() or self._forward_hooks or self._forward_pre_hooks or not record.enabled:
            return False
        if rows * self.weight.numel() < SMALL or not usable(self, x):
            return False
        record.refresh(self.weight)
        return self.granted(rows)


class FastGELU(Swapped, GELU):
    """GELU on the sums of a linear layer while they are in registers."""

    plain_class = GELU

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., dim_in) -> (..., dim_out)."""
        proj = self.proj
        if type(proj) is not FastLinear or not proj.ready(x):
            return super().forward(x)
        return kernels.multiply(x, proj.packed(), proj.bias, gelu=self.approximate)


class FastGEGLU(Swapped, GEGLU):
    """Value and gate as two products, of which the first is multiplied by the second as it is computed."""

    plain_class = GEGLU

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., dim_in) -> (..., dim_out)."""
        proj = self.proj
        if type(proj) is not FastLinear or proj.bias is None or not proj.ready(x):
            return super().forward(x)
        if not isinstance(proj._fast.packed, tuple):
            proj._fast.packed = tuple(map(kernels.pack_linear, proj.weight.detach().contiguous().chunk(2)))
        value, gate = proj._fast.packed
        value_bias, gate_bias = proj.bias.chunk(2)
        return kernels.multiply_gated(x, value, value_bias, kernels.multiply(x, gate, gate_bias, gelu="none"))


class FastConv2d(Swapped, nn.Conv2d):
    """A convolution in channels-last order: by Winograd's method, packed, or as a matrix product, whichever is best."""

    plain_class = nn.Conv2d
    _fast: Record

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(B, I, H, W) -> (B, O, H', W')."""
        if torch.compiler.is_compiling():
            return super().forward(input)
        record, weight, bias = self._fast, self.weight, self.bias
        if not record.enabled or input.ndim != 4 or not input.numel() or not usable(self, input):
            return super().forward(input)
        x = input.contiguous(memory_format=torch.channels_last)
        pixels = x.shape[0] * x.shape[2] * x.shape[3] // (self.stride[0] * self.stride[1])
        if pixels * weight.numel() < SMALL or self.padding_mode != "zeros" or isinstance(self.padding, str):
            return super().forward(x)
        geometry = kernels.Geometry(self.stride, self.padding, self.dilation, self.groups)  # type: ignore[arg-type]
        record.refresh(weight)
        fits = self.suits_winograd(pixels, x.dtype, geometry)
        passing = fits and self.suits_passing_kernels(pixels)
        granted = self.granted(pixels, fits, passing)
        if record.doubling:  # what is packed is for `FastUpsample2D`
            return super().forward(x)
        if fits and granted and record.winograd:
            if record.packed is None:
                record.packed = winograd.transform_kernel(weight.detach())
            return winograd.convolve(x, record.packed, bias)
        if passing:
            return winograd.convolve(x, winograd.transform_kernel(weight), bias)
        if self.pointwise(geometry):
            tokens, matrix = x.permute(0, 2, 3, 1), weight.detach().flatten(1)
            if granted:
                if record.packed is None:
                    record.packed = kernels.pack_linear(matrix.contiguous())
                return kernels.multiply(tokens, record.packed, bias).permute(0, 3, 1, 2)
            return F.linear(tokens, matrix, bias).permute(0, 3, 1, 2)
        if granted and not record.winograd:
            if record.packed is None:
                record.packed = kernels.pack_convolution(weight.detach().contiguous(), geometry, x.shape)
            return kernels.convolve(x, record.packed, bias, geometry)
        few = FEW_PIXELS if weight.numel() < LARGE else FEW_PIXELS_LARGE
        if pixels <= few and self.groups == 1 and weight.is_contiguous():
            return kernels.convolve_columns(x, weight, bias, geometry)
        return super().forward(x)

    def granted(self, pixels: int, fits: bool, passing: bool) -> bool:
        """Whether there is memory to pack the weight, and in which of the two ways; decided at the first call.

        Where Winograd's method `fits`, it comes first; kernels transformed in `passing` are better than none.
        """
        record, size = self._fast, self.weight.numel() * self.weight.element_size()
        if record.granted is None:
            record.winograd = fits and record.plan.grant(0.15 + 2e-4 * pixels, 4 * size, pixels)
            record.granted = record.winograd
            if self.kernel_size == (1, 1):
                record.granted = record.plan.grant(0.05 + 1e-3 * pixels, size, pixels)
            elif not record.winograd and not passing:
                record.granted = record.plan.grant(0.24 + 2e-4 * pixels if pixels >= 64 else 0.1, size, pixels)
        return bool(record.granted)

    def ready_to_double(self, x: torch.Tensor) -> bool:
        """Whether `FastUpsample2D` may convolve by the phases of the kernel: memory for them is granted as for it."""
        record, weight = self._fast, self.weight
        pixels = 4 * x.shape[0] * x.shape[2] * x.shape[3]
        geometry = (self.kernel_size, self.stride, self.padding, self.dilation, self.groups, self.padding_mode)
        if torch.compiler.is_compiling() or self._forward_hooks or self._forward_pre_hooks or not record.enabled:
            return False
        if geometry != DOUBLING or pixels < DOUBLED_PIXELS or pixels * weight.numel() < SMALL or not usable(self, x):
            return False
        record.refresh(weight)
        size = 16 * weight.numel() * weight.element_size() // 9
        if record.granted is None and record.plan.grant(1.0, size, pixels):
            record.granted = record.doubling = True
        return record.doubling

    def phases(self, shape: torch.Size) -> tuple[torch.Tensor, ...]:
        """The packed kernels of `PHASES`, for pictures of `shape` before they are doubled."""
        if self._fast.packed is None:
            window = torch.Size((*shape[:2], shape[2] + 1, shape[3] + 1))
            small = phase_kernels(self.weight.detach())
            self._fast.packed = tuple(kernels.pack_convolution(kernel, WINDOW, window) for kernel in small)
        return self._fast.packed

    def pointwise(self, geometry: kernels.Geometry) -> bool:
        return self.kernel_size == (1, 1) and geometry == ((1, 1), (0, 0), (1, 1), 1)

    def suits_passing_kernels(self, pixels: int) -> bool:
        """Whether Winograd's method is the fastest even if it transforms the kernels at every call."""
        small = self.in_channels * self.out_channels <= WINOGRAD_KERNELS_UNPACKED
        enough = pixels >= WINOGRAD_PIXELS_ANY or (small and pixels >= WINOGRAD_PIXELS_UNPACKED)
        return enough and self._fast.plan.budget > 0

    def suits_winograd(self, pixels: int, dtype: torch.dtype, geometry: kernels.Geometry) -> bool:
        return (
            dtype == torch.float32
            and pixels >= WINOGRAD_PIXELS
            and self.kernel_size == (3, 3)
            and geometry == ((1, 1), (1, 1), (1, 1), 1)
            and min(self.in_channels, self.out_channels) >= WINOGRAD_CHANNELS
        )


class FastUpsample2D(Swapped, Upsample2D):
    """Doubling and convolution in one, with 4 multiplications in the place of 9."""

    plain_class = Upsample2D

    def forward(self, hidden_states: torch.Tensor, output_size: tuple[int, int] | None = None) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, 2 H, 2 W), or (B, C, *output_size)."""
        conv, (height, width) = self.conv, hidden_states.shape[2:]
        doubled = output_size is None or tuple(output_size) == (2 * height, 2 * width)
        if not doubled or type(conv) is not FastConv2d or not conv.ready_to_double(hidden_states):
            return super().forward(hidden_states, output_size)
        x = hidden_states.contiguous(memory_format=torch.channels_last)
        phases = conv.phases(x.shape)
        return convolve_doubled(x, lambda window, phase: kernels.convolve(window, phases[phase], conv.bias, WINDOW))


# The second ones gain by what is kept between calls alone.
FAST_CONVOLUTIONS: dict[type[nn.Module], type] = {nn.Conv2d: FastConv2d}
FAST_OTHERS: dict[type[nn.Module], type] = {
    nn.Linear: FastLinear,
    GELU: FastGELU,
    GEGLU: FastGEGLU,
    Upsample2D: FastUpsample2D,
}
