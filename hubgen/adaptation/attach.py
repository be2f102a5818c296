"""Adapters on models: put on, read off, changed for others of the same shape. PEFT holds and computes them.

    attach(unet, "style", {"mid_block.attentions.0.transformer_blocks.0.attn1.to_q": LowRank(...), ...})
    layers_of(unet, "style")                          # the same again, trained since or not
    swap(unet, "style", {...})                        # others in the same place; compiled code stays valid

Models are hubgen's, diffusers' and transformers'. After `attach` their own methods see the adapter: `set_adapters`,
`fuse_lora`, `delete_adapters`. Names of layers are those of the model without adapters.
"""

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.loha.layer import LoHaLayer
from peft.tuners.lokr.layer import LoKrLayer
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import nn

from hubgen.adaptation.low_rank import LowRank, nothing, of_difference, of_hadamard, of_kronecker, with_magnitude
from hubgen.diffusers_contract import prepare_hotswap

BASE = "base_layer"
"""Under which PEFT holds the layer that it adds to"""


def adaptable(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a model that adapters may be put on, by name: linear ones and convolutions."""
    adapted = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if isinstance(layer, nn.Linear | nn.Conv2d) and not name.startswith(adapted):
            found[plain(name)] = layer
    return found


def shape_of(layer: Any) -> torch.Size:
    """Of a layer's weight, whose tensor may be packed: (out, in), or of a convolution (out, in, kh, kw)."""
    if isinstance(layer, nn.Linear):
        return torch.Size([layer.out_features, layer.in_features])
    return torch.Size([layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size])


def weight_of(layer: nn.Module) -> torch.Tensor:
    """A layer's weight; what it stands for, where it is quantised."""
    return dequantize_module_weight(layer)


def is_quantised(model: Any) -> bool:
    """Whether a package of quantisation holds a model's weights."""
    return getattr(model, "hf_quantizer", None) is not None


def plain(name: str) -> str:
    """The name of a layer without what adapters put around it."""
    return ".".join(part for part in name.split(".") if part != BASE)


def holders(model: nn.Module, adapter: str) -> Iterator[tuple[str, BaseTunerLayer]]:
    """The layers that an adapter is on, by their plain names."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and adapter in names_on(module):
            yield plain(name), module


def names_on(module: BaseTunerLayer) -> set[str]:
    """Of the adapters on a layer."""
    return {key for name in module.adapter_layer_names for key in getattr(module, name, {})}


def config_of(layers: Mapping[str, LowRank]) -> LoraConfig:
    """PEFT's config of an adapter with these layers."""
    rank = most_frequent([layer.rank for layer in layers.values()])
    alpha = most_frequent([layer.alpha for layer in layers.values() if layer.rank == rank])
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=sorted(layers),
        rank_pattern=pattern({name: layer.rank for name, layer in layers.items()}, rank),
        alpha_pattern=pattern({name: layer.alpha for name, layer in layers.items()}, alpha),
        use_dora=any(layer.magnitude is not None for layer in layers.values()),
        lora_bias=any(layer.bias is not None for layer in layers.values()),
    )


def most_frequent(values: Sequence[Any]) -> Any:
    """The value that there is most of."""
    return Counter(values).most_common(1)[0][0]


def pattern(values: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    """What PEFT's `rank_pattern` and `alpha_pattern` have to say where values are not the usual one.

    PEFT takes the first name of the pattern that a layer's name ends with. So longer names come first, and a layer that
    a shorter one would catch gets a line of its own.
    """
    found = {name: value for name, value in values.items() if value != usual}
    for name, value in values.items():
        if value == usual and any(name.endswith(f".{other}") for other in found):
            found[name] = value
    return {name: found[name] for name in sorted(found, key=lambda name: (-len(name), name))}


def attach(model: Any, adapter: str, layers: Mapping[str, LowRank]) -> None:
    """Puts an adapter on a model, and makes it the active one.

    Args:
        model: Of hubgen, diffusers or transformers.
        adapter: Its name, which the model has no adapter of.
        layers: By the names of `adaptable`, in the shapes of their weights.
    """
    if any(layer.magnitude is not None for layer in layers.values()):  # in PEFT, all have one or none
        known = adaptable(model)
        layers = {name: with_magnitude(layer, weight_of(known[name])) for name, layer in layers.items()}
    keys = {f"{name}.lora_A.weight": layer.down for name, layer in layers.items()}
    config = config_of(layers)
    config.lora_bias = False  # PEFT's would be on all layers, also those without a bias; `fill` adds it where it is
    try:
        with warnings.catch_warnings():  # that there are other adapters, and other layers whose names end alike
            warnings.simplefilter("ignore")
            inject_adapter_in_model(config, model, adapter_name=adapter, state_dict=keys)
        model._hf_peft_config_loaded = True
        for name, module in holders(model, adapter):
            fill(module, adapter, layers[name])
        prepare_hotswap(model)
    except BaseException:
        detach(model, adapter)
        raise


@torch.no_grad()
def fill(module: Any, adapter: str, layer: LowRank) -> None:
    """Gives a layer's adapter its tensors, in the precision of the layer; float32 where that is only for storing."""
    weight, last = module.get_base_layer().weight, module.lora_B[adapter]
    if layer.bias is not None and last.bias is None:
        last.bias = nn.Parameter(torch.empty(len(layer.bias), device=last.weight.device), requires_grad=False)
        module.lora_bias[adapter] = True
    for part in (module.lora_A[adapter], last):
        part.to(dtype=weight.dtype if weight.is_floating_point() and weight.itemsize > 1 else torch.float32)
    module.lora_A[adapter].weight.copy_(layer.down)
    last.weight.copy_(layer.up)
    if last.bias is not None:  # it is scaled with the product
        last.bias.zero_() if layer.bias is None else last.bias.copy_(layer.bias / layer.scale)
    if layer.magnitude is not None:
        magnitude = module.lora_magnitude_vector[adapter].weight
        magnitude.copy_(layer.magnitude.reshape(magnitude.shape))


def detach(model: Any, adapter: str) -> None:
    """Takes an adapter off a model, wherever it is on it; where it was alone, the model is what it was before."""
    for name, module in list(holders(model, adapter)):
        module.delete_adapter(adapter)
        if not names_on(module):
            model.set_submodule(name, module.get_base_layer())
    configs = getattr(model, "peft_config", {})
    configs.pop(adapter, None)
    if not configs and hasattr(model, "peft_config"):
        del model.peft_config
        model._hf_peft_config_loaded = False


def layers_of(model: nn.Module, adapter: str) -> dict[str, LowRank]:
    """What an adapter adds, by layer, on the CPU; whatever kind it is of.

    The weight that `set_adapters` gave it is left out.

    Raises:
        ValueError: The model has no such adapter.
    """
    found = {name: low_rank_of(module, adapter) for name, module in holders(model, adapter)}
    if not found:
        known = ", ".join(sorted(getattr(model, "peft_config", {}))) or "none"
        raise ValueError(f"`adapter_name`: got {adapter!r}, expected one of the adapters on the model: {known}.")
    return found


@torch.no_grad()
def low_rank_of(module: Any, adapter: str) -> LowRank:
    """What an adapter adds to one layer."""
    shape = shape_of(module.get_base_layer())

    def tensor(name: str) -> torch.Tensor:
        return getattr(module, name)[adapter].detach().cpu()

    if isinstance(module, LoraLayer):
        down, up = (part[adapter].weight.detach().cpu() for part in (module.lora_A, module.lora_B))
        rank, alpha = module.r[adapter], module.lora_alpha[adapter]
        scale = alpha / (rank**0.5 if module.use_rslora[adapter] else rank)
        magnitude = bias = None
        if adapter in module.lora_magnitude_vector:
            magnitude = module.lora_magnitude_vector[adapter].weight.detach().cpu().flatten()
        if module.lora_B[adapter].bias is not None:
            bias = module.lora_B[adapter].bias.detach().cpu() * scale
        return LowRank(down, up, scale * down.shape[0], magnitude, bias)
    if isinstance(module, LoHaLayer) and adapter not in module.hada_t1:
        first, second = ([tensor(f"hada_w{n}_a"), tensor(f"hada_w{n}_b")] for n in (1, 2))
        return of_hadamard(first, second, module.alpha[adapter] / module.r[adapter], shape)
    if isinstance(module, LoKrLayer) and adapter not in module.lokr_t2:
        whole = {name: adapter in getattr(module, name) for name in ("lokr_w1", "lokr_w2")}
        first, second = (
            [tensor(name).flatten(1)] if whole[name] else [tensor(f"{name}_a"), tensor(f"{name}_b")] for name in whole
        )
        return of_kronecker(first, second, module.alpha[adapter] / module.r[adapter], shape)
    if isinstance(module, LoHaLayer | LoKrLayer):  # with a kernel between the factors
        return of_difference(module.get_delta_weight(adapter).cpu(), shape)
    return of_difference(difference_of(module, adapter).cpu(), shape)


def difference_of(module: Any, adapter: str) -> torch.Tensor:
    """What an adapter of any kind adds to a layer's weight: how the weight differs where it is merged."""
    before = module.get_base_layer().weight.detach().clone()
    module.merge(adapter_names=[adapter])
    try:
        return module.get_base_layer().weight.detach() - before
    finally:
        module.unmerge()
        module.get_base_layer().weight.data.copy_(before)


@torch.no_grad()
def swap(model: nn.Module, adapter: str, layers: Mapping[str, LowRank]) -> None:
    """Puts other tensors in the place of an adapter's, whose layers and weight stay; `check_swap` comes first."""
    for name, module in holders(model, adapter):
        base = module.get_base_layer()
        own, new = low_rank_of(module, adapter), layers.get(name, nothing(shape_of(base)))
        if own.magnitude is not None:
            new = with_magnitude(new, weight_of(base))
        fill(module, adapter, new.padded(own.rank).scaled(own.scale))


def check_swap(model: nn.Module, adapter: str, layers: Mapping[str, LowRank], component: str) -> None:
    """Raises ValueError where an adapter has no room for these tensors."""
    now = dict(holders(model, adapter))
    for name, layer in layers.items():
        module: Any = now.get(name)
        where = f"`hotswap`: {component}.{name}"
        if not isinstance(module, LoraLayer):
            raise ValueError(f"{where}: adapter {adapter!r} is not on this layer; expected the same layers.")
        own = low_rank_of(module, adapter)
        if layer.rank > own.rank:
            raise ValueError(
                f"{where}: got rank {layer.rank}, expected at most {own.rank}, that of adapter {adapter!r}; call "
                f"enable_lora_hotswap(target_rank={layer.rank}) before the first adapter is loaded."
            )
        if (layer.magnitude is None) != (own.magnitude is None):
            raise ValueError(f"{where}: got an adapter with DoRA's magnitudes and one without, expected two alike.")
        if layer.bias is not None and own.bias is None:
            raise ValueError(f"{where}: got an adapter with a bias, expected none, as adapter {adapter!r} has none.")
