"""`hubgen.optimize`: the same pictures in less time.

    pipe = hubgen.optimize(TextToImagePipeline.from_pretrained(...), packing=0.3)

On a CPU the weights of linear layers and convolutions are brought once into the order that the kernels want, large 3x3
convolutions of float32 are computed by Winograd's method, those of doubled pictures from the small ones, and feature
maps lie channels-last. On every device keys and values of the text are computed once a prompt, and what depends on the
time alone once a grid. Results differ from the plain ones by the rounding of the sums only: about 3e-6 of the output's
norm in float32 for Stable Diffusion's U-Net.

hubgen's pipelines do all this by themselves while they are called; `optimize` chooses otherwise, and `restore` turns it
off. A model of its own is accelerated by `optimize`, too: then each call of it is. Between calls models are plain:
modules, hooks, state dict, saving, copies and adapters are those of before, and whatever is done to a model, an edit of
a single value of a weight included, counts at the next call.

    hubgen.optimize(model)
    with accelerated(model) as fast:       # a loop of your own: weights are looked at once, and not at each step
        for step in range(20):
            with fast.network():
                model(...)
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from hubgen.acceleration.call import Acceleration, accelerate, current
from hubgen.acceleration.cpu import packing as cpu_packing
from hubgen.acceleration.cpu.packing import Packing

# Packed weights take at most this share of the memory of all weights: the peak stays below 1.6 times the plain one.
PACKED_SHARE = 0.68
# What a pipeline spends its time in; text encoders run once a prompt.
WORKING_PARTS = ("transformer", "unet", "vae", "vqvae")
# Methods by which a model is called.
CALLS = ("forward", "encode", "decode")

# Packed weights of models that were called or chosen; `None`: restored.
_packings: "WeakKeyDictionary[nn.Module, Packing | None]" = WeakKeyDictionary()


def optimize(
    model: Any,
    *,
    packing: bool | float = True,
    compile: bool = False,
    compile_mode: str | None = None,
    dtype: torch.dtype | None = None,
    step_cache: Any = None,
) -> Any:
    """Makes inference faster, and returns `model`.

    Args:
        model: A model, every call of which is accelerated from now on; or a pipeline, for whose calls the options of
            its backbone and autoencoder are chosen.
        packing: Whether weights are kept in a second order besides, or the share of their memory that this may take;
            `True` is 0.68. `False` keeps nothing at all between steps, keys of the text and modulations neither.
        compile: Whether the repeated blocks of backbones on a GPU are compiled, without graph breaks. The first call
            takes a minute.
        compile_mode: As `torch.compile` has it; `"reduce-overhead"` records CUDA graphs.
        dtype: Approximate: a type that all weights are converted to, `torch.bfloat16` for instance. Takes half the
            time; pictures change visibly in details.
        step_cache: Approximate: a configuration of diffusers' step caches (`FirstBlockCacheConfig` and the like), by
            which steps reuse what former steps computed.

    Raises:
        TypeError: `model` is neither a model nor a pipeline.
        ValueError: `packing` is negative, or `step_cache` is given where no part takes one.
    """
    share = PACKED_SHARE if packing is True else float(packing)
    if share < 0:
        raise ValueError(f"`packing`: got {packing}, expected True, False or a share of 0 or more.")
    modules = parts(model)
    cacheable = [module for module in modules if hasattr(module, "enable_cache")]
    if step_cache is not None and not cacheable:
        raise ValueError(f"`step_cache`: got {step_cache!r}, but no part of {type(model).__name__} takes one.")
    for module in modules:
        if dtype is not None:
            module.to(dtype)
        if step_cache is not None and module in cacheable:
            module.enable_cache(step_cache)
        on_cuda = any(parameter.is_cuda for parameter in module.parameters())
        if compile and on_cuda and getattr(module, "_repeated_blocks", None):
            module.compile_repeated_blocks(fullgraph=True, mode=compile_mode)
        _packings[module] = new_packing(module, share)
        if module is model:
            accelerate_calls(module)
    return model


def restore(model: Any) -> Any:
    """Undoes `optimize` (but for its approximate options), frees what was packed, and returns `model`."""
    for module in parts(model):
        _packings[module] = None
        for name in CALLS:
            if isinstance(module.__dict__.get(name), AcceleratedCall):
                del module.__dict__[name]
    return model


def optimized(model: Any) -> bool:
    """Whether calls of a model, or of a pipeline's backbone and autoencoder, have been or will be accelerated."""
    return any(_packings.get(module) is not None for module in parts(model))


def parts(model: Any) -> list[nn.Module]:
    """A model itself; a pipeline's backbone and autoencoder."""
    if isinstance(model, nn.Module):
        return [model]
    if not hasattr(model, "components"):
        raise TypeError(f"`model`: got {type(model).__name__}, expected a torch module or a pipeline.")
    found = [model.components.get(name) for name in WORKING_PARTS]
    return [module for module in found if isinstance(module, nn.Module)]


@contextmanager
def accelerated(*models: Any) -> Iterator[Acceleration]:
    """Accelerates the calls of networks inside, in `Acceleration.network`; see `hubgen.acceleration.call`.

    Args:
        models: Models, or pipelines, of which backbone and autoencoder count. One that `restore` was called on, or that
            is in training mode, is left alone.
    """
    packings = {}
    for module in (module for model in models for module in parts(model)):
        if module not in _packings and not module.training:
            _packings.setdefault(module, new_packing(module, PACKED_SHARE))  # another thread may have been faster
        packing = _packings.get(module)
        if packing is not None:
            packings[module] = packing
    with accelerate(packings) as fast:
        yield fast


def new_packing(module: nn.Module, share: float) -> Packing:
    """Nothing packed yet, and memory for this share of a model's weights."""
    parameters = list(module.parameters())
    half = next((parameter.dtype for parameter in parameters), None) == torch.bfloat16
    return Packing(
        budget=share * sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        worthwhile=cpu_packing.WORTHWHILE_BFLOAT16 if half else cpu_packing.WORTHWHILE,
    )


def accelerate_calls(module: nn.Module) -> None:
    """Has every call of a model accelerate itself."""
    for name in CALLS:
        if hasattr(type(module), name) and name not in module.__dict__:
            module.__dict__[name] = AcceleratedCall(module, name)


class AcceleratedCall:
    """A method of a bare model that accelerates its own calls; it looks like the method of its class.

    Copies of the model have one of their own, which is the plain method until `optimize` is called on them.
    """

    is_ours = True

    def __init__(self, module: nn.Module, name: str):
        functools.update_wrapper(self, getattr(type(module), name))
        self.module, self.name = module, name
        self.__wrapped__ = MethodType(getattr(type(module), name), module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call, outer = self.__wrapped__, current()
        chosen = _packings.get(self.module) is not None
        if torch.compiler.is_compiling() or not chosen or (outer is not None and outer.covers(self.module)):
            return call(*args, **kwargs)
        with accelerated(self.module) as fast, fast.network():
            return call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "AcceleratedCall":
        return AcceleratedCall(memo.get(id(self.module), self.module), self.name)

    def __reduce__(self) -> tuple[Any, ...]:
        return AcceleratedCall, (self.module, self.name)
