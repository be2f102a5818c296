"""`hubgen.optimize`: the same pictures in less time.

    pipe = hubgen.optimize(TextToImagePipeline.from_pretrained(...))

On a CPU the weights of linear layers and convolutions are brought once into the order that the kernels want, large 3x3
convolutions of float32 are computed by Winograd's method, those of doubled pictures from the small ones, feature maps
lie channels-last, keys and values of the text are computed once a prompt, and what depends on the time alone once a
grid. Results differ from the plain ones by the rounding of the sums only: about 3e-6 of the output's norm in float32
for Stable Diffusion's U-Net.

Nothing of a model changes but the classes of its linear layers, convolutions and activations, and `restore` undoes it:
parameters, state dict, saving, `to` and copies are those of before. The plain path is taken whenever something else is
wanted of a layer: gradients, autocast, `torch.compile`, another device, offloading or casting hooks. Weights that are
edited, loaded, or have an adapter fused into them are seen before the next use, and are packed again. Only an edit of
single values behind a tensor's back (`weight.data[0, 0] = 1`) can pass unseen; call `optimize` again after one.

hubgen's pipelines do this by themselves at their first call; `hubgen.optimize(pipe, packing=False)` beforehand chooses
otherwise, and `hubgen.restore(pipe)` turns it off.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import nn

from hubgen.acceleration.layers import (
    FAST_CONVOLUTIONS,
    FAST_OTHERS,
    WORTHWHILE,
    WORTHWHILE_BFLOAT16,
    FastConv2d,
    FastLinear,
    Plan,
    Record,
    Swapped,
)

# Packed weights take at most this share of the memory of all weights: the peak stays below 1.6 times the plain one.
PACKED_SHARE = 0.68
# What a pipeline spends its time in; text encoders run once a prompt.
WORKING_PARTS = ("transformer", "unet", "vae", "vqvae")
# Layers that see the text, which is the same tensor at every step.
TEXT_LAYERS = ("attn2.to_k", "attn2.to_v", "context_embedder", "encoder_hid_proj")
# Layers that see the embedded timestep, after SiLU, and nothing else.
MODULATIONS = ("norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear", "time_emb_proj")
# Models that `optimize` or `restore` has been called on.
CHOSEN: "WeakSet[nn.Module]" = WeakSet()
# A table of modulations may take so many values.
LARGEST_TABLE = 2**26


def optimize(
    model: Any,
    *,
    packing: bool | float = True,
    compile: bool = False,
    compile_mode: str | None = None,
    dtype: torch.dtype | None = None,
    step_cache: Any = None,
) -> Any:
    """Makes inference faster, in place, and returns `model`.

    Args:
        model: A model, or a pipeline, of which backbone and autoencoder are optimized.
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
        speed_up(module, share)
    return model


def restore(model: Any) -> Any:
    """Undoes `optimize` (but for its approximate options), frees what was packed, and returns `model`."""
    for module in parts(model):
        CHOSEN.add(module)
        for layer in module.modules():
            if isinstance(layer, Swapped):
                layer.__class__ = layer.plain_class  # type: ignore[assignment]
                layer.__dict__.pop("_fast", None)
    return model


def optimized(model: Any) -> bool:
    """Whether any layer of a model or of a pipeline's backbone and autoencoder is a fast one."""
    return any(isinstance(layer, Swapped) for module in parts(model) for layer in module.modules())


def parts(model: Any) -> list[nn.Module]:
    """A model itself; a pipeline's backbone and autoencoder."""
    if isinstance(model, nn.Module):
        return [model]
    if not hasattr(model, "components"):
        raise TypeError(f"`model`: got {type(model).__name__}, expected a torch module or a pipeline.")
    found = [model.components.get(name) for name in WORKING_PARTS]
    return [module for module in found if isinstance(module, nn.Module)]


def optimize_unless_chosen(pipeline: Any) -> None:
    """What pipelines do when they are called: `optimize`, unless the user chose otherwise or is training a part."""
    for module in parts(pipeline):
        if module not in CHOSEN and not module.training:
            speed_up(module, PACKED_SHARE)


def speed_up(module: nn.Module, share: float) -> None:
    """Gives every convolution its fast class and, where anything may be kept, every linear layer."""
    restore(module)
    budget = share * sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
    half = next((parameter.dtype for parameter in module.parameters()), None) == torch.bfloat16
    plan = Plan(budget, WORTHWHILE_BFLOAT16 if half else WORTHWHILE)
    classes = FAST_CONVOLUTIONS | (FAST_OTHERS if share > 0 else {})
    for name, layer in module.named_modules():
        if type(layer) in classes:
            layer.__class__ = classes[type(layer)]
        if isinstance(layer, FastLinear | FastConv2d):
            layer._fast = Record(plan, lasting=name.endswith(TEXT_LAYERS))


@contextmanager
def prepared(backbone: Any, timesteps: torch.Tensor, conditions: Mapping[str, Any]) -> Iterator[None]:
    """Computes the modulations of a whole grid of timesteps in one product a layer, for the walk inside.

    Every layer that sees the timestep only (and pooled text or class) has its answers at hand then. Layers look
    whether an input is, bit by bit, one of those that were announced, so that another one is simply computed. On a CPU
    alone: elsewhere that look would wait for the device.

    Args:
        backbone: SD3's, FLUX's or DiT's transformer, or hubgen's text-conditional U-Net; for others nothing is done.
        timesteps: (n,), as the scheduler has them.
        conditions: Arguments of the backbone's calls, of B pictures, or of 2 B with the unconditional ones first.
    """
    embed = next((embed for part, embed in EMBED.items() if hasattr(backbone, part)), None)
    filled: list[FastLinear] = []
    try:
        if embed is not None and backbone.device.type == "cpu" and not torch.is_grad_enabled():
            filled = fill_tables(backbone, timesteps, conditions, embed)
        yield
    finally:
        for layer in filled:
            layer._fast.table = None


def fill_tables(
    backbone: Any, timesteps: torch.Tensor, conditions: Mapping[str, Any], embed: Callable[..., None]
) -> list[FastLinear]:
    """Gives every layer that `embed` calls its table; returns these layers."""
    batch = len(next(value for value in conditions.values() if torch.is_tensor(value)))
    layers = {name: layer for name, layer in backbone.named_modules() if isinstance(layer, FastLinear)}
    features = sum(layer.out_features for name, layer in layers.items() if name.endswith(MODULATIONS))
    if not layers or len(timesteps) * batch * features > LARGEST_TABLE:
        return []
    taken: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}

    def take(layer: nn.Module, given: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:
        if torch.equal(given[0], given[0][:batch].repeat(len(timesteps), 1)):  # the same at every step, to the last bit
            out = out[:batch].repeat(len(timesteps), 1)
        taken[layer] = given[0], out
        return out

    hooks = [layer.register_forward_hook(take) for layer in layers.values()]
    for layer in layers.values():  # these rows are not those that memory is planned for
        layer._fast.enabled = False
    try:
        embed(backbone, timesteps.repeat_interleave(batch), conditions, len(timesteps))
    finally:
        for layer in layers.values():
            layer._fast.enabled = True
        for hook in hooks:
            hook.remove()
    for layer, table in taken.items():
        layer._fast.refresh(layer.weight, layer.bias)
        layer._fast.table, layer._fast.row = table, 0
    return list(taken)


def embed_pooled(backbone: Any, timesteps: torch.Tensor, conditions: Mapping[str, Any], count: int) -> None:
    """Calls all layers of an MM-DiT or of FLUX that see the time and pooled text alone, for (n * B,) timesteps."""
    scales, guidance = [timesteps], conditions.get("guidance")
    if (
        backbone.config.get("axes_dims_rope") is not None
    ):  # as the backbone has them: in [0, 1] and rounded before they grow again
        scales = [timesteps / 1000, *([guidance.repeat(count)] if guidance is not None else [])]
        scales = [1000 * scale.to(backbone.dtype) for scale in scales]
    call_modulations(backbone, backbone.time_text_embed(*scales, conditions["pooled_projections"].repeat(count, 1)))


def embed_sum(backbone: Any, timesteps: torch.Tensor, conditions: Mapping[str, Any], count: int) -> None:
    """The same of a U-Net, which adds what it is told to the embedded time."""

    def repeated(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: repeated(part) for name, part in value.items()}
        return None if value is None else value.repeat(count, *[1] * (value.ndim - 1))

    told = [repeated(conditions.get(name)) for name in ("class_labels", "timestep_cond", "added_cond_kwargs")]
    like = torch.empty(len(timesteps), dtype=backbone.dtype)
    call_modulations(backbone, backbone.embed_conditions(like, timesteps, *told))


def call_modulations(backbone: Any, temb: torch.Tensor) -> None:
    """Calls all layers that take the embedded conditions, (n * B, D), after SiLU."""
    inputs = F.silu(temb)
    for name, layer in backbone.named_modules():
        if isinstance(layer, FastLinear) and name.endswith(MODULATIONS) and layer.in_features == inputs.shape[1]:
            layer(inputs)


def embed_classes(backbone: Any, timesteps: torch.Tensor, conditions: Mapping[str, Any], count: int) -> None:
    """The same of a DiT, each of whose blocks has embedders of its own."""
    labels = conditions["class_labels"].repeat(count)
    for block in backbone.transformer_blocks:
        block.norm1.linear(F.silu(block.norm1.emb(timesteps, labels, backbone.dtype)))
    first = backbone.transformer_blocks[0].norm1.emb(timesteps, labels, backbone.dtype)
    backbone.proj_out_1(F.silu(first))


# By a part that such backbones have, how the layers that see conditions alone are called.
EMBED: dict[str, Callable[..., None]] = {
    "time_text_embed": embed_pooled,
    "proj_out_1": embed_classes,
    "embed_conditions": embed_sum,
}
