"""Files of adapters, in the layouts that people exchange: read whatever it is, written as diffusers, kohya or ComfyUI.

    found = read_adapter(tensors, header, {"unet": unet, "text_encoder": text_encoder})
    found.layers["unet"]["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]         a LowRank
    tensors, header = as_diffusers(found.layers)

A key is a layer's name (see `spellings`) and what the tensor is in the adapter (`ROLES`). What is read is exact:
factors keep their values, and where a layout has one layer in the place of several, outputs are cut apart.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from hubgen.adaptation import low_rank
from hubgen.adaptation.attach import adaptable, config_of, shape_of, weight_of
from hubgen.adaptation.header_keys import ALPHAS, METADATA
from hubgen.adaptation.kinds import ROLES, Said, decomposed, low_rank_from
from hubgen.adaptation.low_rank import LowRank
from hubgen.adaptation.spellings import (
    BACKBONES,
    CLIP_STACK,
    COMFYUI,
    KOHYA_BACKBONE,
    Names,
    Place,
    comfyui_encoder,
    is_clip,
    kohya_encoders,
    names_of,
    original_names,
    sizes_of,
    underscored,
)
from hubgen.formats.headers import listing
from hubgen.formats.key_maps import SWAPPED, leading

Layers = dict[str, dict[str, LowRank]]
"""Component -> layer -> what is added to it"""
Tensors = Mapping[str, torch.Tensor]

SD2_WIDTH = 1024
"""Features of Stable Diffusion 2's text; 1 has 768"""


class AdapterError(ValueError):
    """A file of adapters cannot be used; the message says which of its keys, what was found and what was expected."""


@dataclass
class AdapterFile:
    """What was read."""

    layers: Layers
    """What is added, by component and layer"""
    taken: dict[str, int] = field(default_factory=dict)
    """How many tensors went to each component"""
    left: list[str] = field(default_factory=list)
    """What was not taken, a line each: key and why"""

    def __str__(self) -> str:
        went = [f"{count} to {len(self.layers[name])} layers of {name}" for name, count in self.taken.items()]
        text = f"{sum(self.taken.values())} tensors: {', '.join(went)}"
        return f"{text}; {len(self.left)} left:{listing(self.left)}" if self.left else text


def read_adapter(
    tensors: Tensors, header: Mapping[str, str], models: Mapping[str, nn.Module], strict: bool = True
) -> AdapterFile:
    """What a file adds to each layer of some models.

    Args:
        tensors: Of the file.
        header: Its metadata.
        models: By component, `unet`, `transformer`, `text_encoder`, `text_encoder_2`, `text_encoder_3`.
        strict: Whether a tensor that belongs nowhere is an error; else it is noted in `left`.

    Raises:
        AdapterError: No tensor is for these models, some are for none of them, a factor is missing, or something in
            the file makes no sense: shapes, ranks, alphas, numbers that are not finite.
    """
    if not tensors:
        raise AdapterError("holds no tensors, expected those of an adapter.")
    names = names_of(models)
    layers = {component: adaptable(model) for component, model in models.items()}
    config = Config(header)
    grouped, left, damaged = group(tensors, names)
    if not grouped:
        known = ", ".join(f"{name} ({type(model).__name__})" for name, model in models.items())
        raise AdapterError(f"is for other models: nothing in it is for a layer of {known}:{listing(left)}")
    found = AdapterFile({}, {}, left)
    for name, roles in grouped.items():
        place = names[name]
        given = found.layers.setdefault(place.component, {})
        try:
            made = assembled(roles, place, layers[place.component], config)
            if twice := sorted(given.keys() & made.keys()):
                raise ValueError(f"is for {twice[0]}, which another name in the file is for as well")
        except ValueError as error:
            damaged.append(f"{name}: {error}")
            continue
        given.update(made)
        found.taken[place.component] = found.taken.get(place.component, 0) + len(roles)
    wrong = damaged or (left if strict else [])
    if wrong:
        raise AdapterError(f"{len(wrong)} of its {len(tensors)} tensors or layers cannot be used:{listing(wrong)}")
    return found


def group(tensors: Tensors, names: Names) -> tuple[dict[str, dict[str, torch.Tensor]], list[str], list[str]]:
    """Tensors by the name of their layer and by what they are; lines for those that belong nowhere, or come twice."""
    endings = sorted(ROLES, key=len, reverse=True)
    grouped: dict[str, dict[str, torch.Tensor]] = {}
    left, damaged = [], []
    for key, tensor in sorted(tensors.items()):
        ending = next((one for one in endings if key.endswith(one) and key.removesuffix(one) in names), None)
        if ending is None:
            known = any(name in names for name, _ in leading(key))
            left.append(f"{key}: {'of no kind that is known' if known else 'for no layer of these models'}")
            continue
        roles = grouped.setdefault(key.removesuffix(ending), {})
        if ROLES[ending] in roles:
            damaged.append(f"{key}: there is another tensor of its kind for the layer")
        # float8 is only for storing: nothing is computed with it
        roles[ROLES[ending]] = tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor
    return grouped, left, damaged


def assembled(roles: Tensors, place: Place, layers: Mapping[str, nn.Module], config: "Config") -> dict[str, LowRank]:
    """What the tensors of one name add to the layers that it stands for.

    Raises:
        ValueError: They make no sense there.
    """
    sizes, shapes = sizes_of(place, layers), [shape_of(layers[name]) for name in place.layers]
    layer = low_rank_from(roles, torch.Size([sum(sizes), *shapes[0][1:]]), config.of(place))
    weights = [weight_of(layers[name]) for name in place.layers]
    if place.how is SWAPPED:
        weights = list(weights[0].chunk(2)[::-1])
    layer = decomposed(layer, roles, weights)
    if layer.bias is not None and any(layers[name].bias is None for name in place.layers):
        raise ValueError("has a bias, expected none: the layer has none")
    if place.how is SWAPPED:
        layer = swapped(layer)
    return dict(zip(place.layers, low_rank.split(layer, sizes) if len(sizes) > 1 else [layer], strict=True))


def swapped(layer: LowRank) -> LowRank:
    """A layer whose halves of outputs change places."""

    def turned(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat(tensor.chunk(2)[::-1])

    magnitude = None if layer.magnitude is None else turned(layer.magnitude)
    bias = None if layer.bias is None else turned(layer.bias)
    return replace(layer, up=turned(layer.up), magnitude=magnitude, bias=bias)


class Config:
    """PEFT's config in a file's header; of it only ranks and alphas are read, since the tensors tell the rest.

    Args:
        header: Metadata of the file.

    Raises:
        AdapterError: It is damaged, or asks for what is not a name or a number.
    """

    def __init__(self, header: Mapping[str, str]) -> None:
        text = header.get(METADATA, "{}")
        try:
            self.values: Any = json.loads(text)
        except ValueError:
            self.values = None
        if not isinstance(self.values, dict):
            raise AdapterError(f"its header's {METADATA} is {text!r:.60}, expected a JSON object.")
        for key, value in self.values.items():
            name = key.rpartition(".")[2]
            if name in ("r", "lora_alpha", "alpha") and value is not None:
                _check_number(key, value)
            if name in ("rank_pattern", "alpha_pattern") and value is not None:
                self._check_pattern(key, value)

    @staticmethod
    def _check_pattern(key: str, value: Any) -> None:
        if not isinstance(value, dict):
            raise AdapterError(f"its header's {key} is {value!r:.60}, expected names with numbers.")
        for name, number in value.items():
            if not re.fullmatch(r"\^?[\w.\-]+\$?", name):
                raise AdapterError(f"its header's {key} has {name!r:.60}, expected the name of a layer.")
            _check_number(f"{key} of {name}", number)

    def of(self, place: Place) -> Said:
        """What it says about a layer."""
        # diffusers writes one config with the names of components before the keys, PEFT one for each model
        prefix = f"{place.component}."
        values = {key.removeprefix(prefix): value for key, value in self.values.items() if key.startswith(prefix)}
        values = values or self.values
        usual_alpha = values.get("lora_alpha", values.get("alpha"))  # LoRA's name, that of LoHa and LoKr
        alpha = self._of_layer(place.layers[0], values.get("alpha_pattern"), usual_alpha)
        rank = self._of_layer(place.layers[0], values.get("rank_pattern"), values.get("r"))
        return Said(alpha, None if rank is None else int(rank), bool(values.get("use_rslora")))

    @staticmethod
    def _of_layer(layer: str, pattern: Mapping[str, float] | None, usual: float | None) -> float | None:
        """As in PEFT, the first name of a pattern that the layer's ends with counts."""
        layer = layer.removeprefix(CLIP_STACK)
        for name, value in (pattern or {}).items():
            bare = name.strip("^$").removeprefix(CLIP_STACK)
            if layer == bare or (not name.startswith("^") and layer.endswith(f".{bare}")):
                return float(value)
        return usual


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise AdapterError(f"its header's {name} is {value!r:.60}, expected a number.")


# ---- written ----


def as_diffusers(layers: Layers, header: Mapping[str, str] | None = None) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and header of a file as diffusers writes it, which ComfyUI and others read alike.

    alpha is folded into the second factor, so that every reader comes to the same product, also one that does not know
    alphas. The trained ones stand in the header under `hubgen_alpha`.

    Args:
        layers: What is added.
        header: More for the header.
    """
    tensors, alphas = {}, {}
    config: dict[str, Any] = {}
    for component, added in layers.items():
        folded = {name: layer.scaled(1.0) for name, layer in added.items()}
        made = config_of(folded)
        known = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_dora", "lora_bias")
        values = {key: getattr(made, key) for key in known}
        values["target_modules"] = sorted(made.target_modules or [])
        config |= {f"{component}.{key}": value for key, value in values.items() if value or key != "lora_bias"}
        alphas[component] = {name: layer.alpha for name, layer in added.items() if layer.alpha != layer.rank}
        for name, layer in folded.items():
            key = f"{component}.{written_name(component, name)}"
            tensors[f"{key}.lora_A.weight"] = layer.down
            tensors[f"{key}.lora_B.weight"] = layer.up
            if layer.magnitude is not None:
                tensors[f"{key}.lora_magnitude_vector"] = layer.magnitude
            if layer.bias is not None:
                tensors[f"{key}.lora_B.bias"] = layer.bias
    extra = {ALPHAS: json.dumps(alphas, sort_keys=True)} if any(alphas.values()) else {}
    return contiguous(tensors), {
        "format": "pt",
        METADATA: json.dumps(config, sort_keys=True),
        **extra,
        **(header or {}),
    }


def as_kohya(
    layers: Layers, models: Mapping[str, nn.Module], header: Mapping[str, str] | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and header of a file as kohya's sd-scripts write it, which A1111, Forge and ComfyUI read.

    Where the original layout has one layer in the place of several, the factors stand together as blocks of one with as
    many times the rank, and as many times the alpha.

    Args:
        layers: What is added.
        models: That it is for, by component.
        header: More for the header.
    """
    tensors = {}
    for component, added in layers.items():
        for name, layer in kohya_names(component, models, added).items():
            tensors[f"{name}.lora_down.weight"] = layer.down
            tensors[f"{name}.lora_up.weight"] = layer.up
            tensors[f"{name}.alpha"] = torch.tensor(float(layer.alpha))
            tensors |= beside(name, layer)
    backbone = {name: layer for part in BACKBONES for name, layer in layers.get(part, {}).items()}
    usual = config_of(backbone or next(iter(layers.values())))
    return contiguous(tensors), {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(usual.r),
        "ss_network_alpha": f"{usual.lora_alpha:g}",
        **family_header(models),
        **(header or {}),
    }


def family_header(models: Mapping[str, nn.Module]) -> dict[str, str]:
    """What a header of kohya's says about the base: its version, and the architecture by Stability AI's model spec."""
    backbone: Any = next((models[name] for name in BACKBONES if name in models), None)
    config: Any = {} if backbone is None else backbone.config
    known = {
        "SD3Transformer2DModel": ("sd3", "stable-diffusion-3"),
        "FluxTransformer2DModel": ("flux1", "flux-1-dev" if config.get("guidance_embeds") else "flux-1-schnell"),
    }
    version, architecture = known.get(type(backbone).__name__, ("", ""))
    if type(backbone).__name__ == "UNet2DConditionModel":
        version, architecture = ("sd_v1", "stable-diffusion-v1")
        if config.get("cross_attention_dim") == SD2_WIDTH:
            version, architecture = ("sd_v2", "stable-diffusion-v2-512")
        if config.get("addition_embed_type") == "text_time":
            version, architecture = ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base")
    own = "text_encoder" in models and not is_clip(models["text_encoder"])  # hubgen's, which no other program knows
    if not version or own:
        return {}
    return {
        "ss_base_model_version": version,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
    }


def as_comfyui(
    layers: Layers, models: Mapping[str, nn.Module], header: Mapping[str, str] | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and header of a file with the names of ComfyUI's own models, alpha folded in; see `as_kohya`."""
    tensors = {}
    for component, added in layers.items():
        model = models[component]
        if component in BACKBONES:
            named = {COMFYUI + name: layer for name, layer in in_original(component, model, added).items()}
        else:
            prefix = comfyui_encoder(component, model)
            named = {prefix + written_name(component, name): layer for name, layer in added.items()}
        for name, layer in named.items():
            folded = layer.scaled(1.0)
            tensors[f"{name}.lora_A.weight"] = folded.down
            tensors[f"{name}.lora_B.weight"] = folded.up
            tensors |= beside(name, folded)
    return contiguous(tensors), {"format": "pt", **(header or {})}


def kohya_names(component: str, models: Mapping[str, nn.Module], added: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """What is added to a model's layers, by kohya's names; Stable Diffusion 1 and 2 have diffusers' names there."""
    model: Any = models[component]
    if component not in BACKBONES:
        prefix = kohya_encoders(component, models)[0]
        return {prefix + underscored(written_name(component, name)): layer for name, layer in added.items()}
    original = component == "transformer" or model.config.get("addition_embed_type") == "text_time"
    named = in_original(component, model, added) if original else added
    return {KOHYA_BACKBONE + underscored(name): layer for name, layer in named.items()}


def beside(name: str, layer: LowRank) -> dict[str, torch.Tensor]:
    """What kohya's and ComfyUI's files have beside the factors of a layer."""
    tensors = {}
    if layer.magnitude is not None:
        tensors[f"{name}.dora_scale"] = layer.magnitude.reshape(-1, *[1] * (layer.down.ndim - 1))
    if layer.bias is not None:
        tensors[f"{name}.diff_b"] = layer.bias
    return tensors


def in_original(component: str, model: nn.Module, added: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """What is added to a backbone's layers, by the names of its original layout; its own where it has none.

    Raises:
        ValueError: Some layers have no name there.
    """
    layers, found, rest = adaptable(model), {}, set(added)
    for original, place in original_names(component, model, added):
        rest -= set(place.layers)
        parts = [added.get(name) for name in place.layers]
        whole = low_rank.joined(parts, [weight_of(layers[name]) for name in place.layers])
        found[original] = swapped(whole) if place.how is SWAPPED else whole
    if found and rest:
        raise ValueError(f"the original layout of {type(model).__name__} has no {', '.join(sorted(rest))}.")
    return found or dict(added)


def contiguous(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Tensors as files have them: on the CPU, each with storage of its own."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def written_name(component: str, name: str) -> str:
    """A layer's name in files; CLIP's has `text_model.`, which ComfyUI and older versions of diffusers expect."""
    clip = component.startswith("text_encoder") and name.startswith("encoder.layers.")
    return f"{CLIP_STACK}{name}" if clip else name
