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
from hubgen.adaptation.attach import adaptable, config_of
from hubgen.adaptation.low_rank import LowRank
from hubgen.adaptation.spellings import (
    BACKBONES,
    COMFYUI,
    KOHYA_BACKBONE,
    Names,
    Place,
    comfyui_encoder,
    kohya_encoders,
    names_of,
    original_names,
    sizes_of,
    underscored,
)
from hubgen.formats.headers import listing
from hubgen.formats.key_maps import SWAPPED

Layers = dict[str, dict[str, LowRank]]
"""Component -> layer -> what is added to it"""
Tensors = Mapping[str, torch.Tensor]

METADATA = "lora_adapter_metadata"
"""Under which diffusers' files have PEFT's config, as JSON, in their header"""

ROLES: dict[str, str] = {
    **{f".lora_A{name}.weight": "down" for name in ("", ".default", ".default_0")},
    **{f".lora_B{name}.weight": "up" for name in ("", ".default", ".default_0")},
    **{f"{between}.down.weight": "down" for between in (".lora", "_lora", ".lora_linear_layer", "")},
    **{f"{between}.up.weight": "up" for between in (".lora", "_lora", ".lora_linear_layer", "")},
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "middle",
    ".lora_B.bias": "bias",
    ".alpha": "alpha",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector.default.weight": "magnitude",
    ".dora_scale": "magnitude",
    ".diff": "difference",
    ".diff_b": "bias_difference",
    **{f".hada_{part}": part for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{part}": f"kron_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
}
"""What a key ends with, and what such a tensor is"""
KINDS: tuple[tuple[str, set[str], set[str]], ...] = (
    ("LoRA", {"down", "up"}, {"middle", "alpha", "magnitude", "bias", "bias_difference"}),
    ("LoHa", {"w1_a", "w1_b", "w2_a", "w2_b"}, {"t1", "t2", "alpha", "magnitude", "bias_difference"}),
    ("difference", {"difference"}, {"bias_difference", "alpha"}),
    ("difference of a bias", {"bias_difference"}, {"alpha"}),
)
"""Kinds of adapters: what each must have, and may have"""
LARGEST_SCALE = 1e4
"""Of alpha / r; more is no training but damage"""


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
    grouped, left = group(tensors, names)
    if not grouped:
        known = ", ".join(f"{name} ({type(model).__name__})" for name, model in models.items())
        raise AdapterError(
            f"is for other models: none of its {len(tensors)} tensors is for a layer of {known}:{listing(sorted(tensors))}"
        )
    found = AdapterFile({}, {}, left)
    alphas = Alphas(header)
    for name, roles in grouped.items():
        place = names[name]
        try:
            check(roles)
            made = assembled(roles, place, layers[place.component], alphas)
        except ValueError as error:
            found.left.append(f"{name}: {error}")
            continue
        found.layers.setdefault(place.component, {}).update(made)
        found.taken[place.component] = found.taken.get(place.component, 0) + len(roles)
    damaged = [line for line in found.left if not line.endswith(UNKNOWN)]
    if damaged or (strict and found.left):
        lines = damaged or found.left
        raise AdapterError(f"{len(lines)} of {len(tensors)} tensors or layers cannot be used:{listing(lines)}")
    return found


UNKNOWN = "for no layer of these models"


def group(tensors: Tensors, names: Names) -> tuple[dict[str, dict[str, torch.Tensor]], list[str]]:
    """Tensors by the name of their layer and what they are; and a line for each that belongs nowhere."""
    endings = sorted(ROLES, key=len, reverse=True)
    grouped: dict[str, dict[str, torch.Tensor]] = {}
    left = []
    for key, tensor in tensors.items():
        for ending in endings:
            if key.endswith(ending) and key.removesuffix(ending) in names:
                grouped.setdefault(key.removesuffix(ending), {})[ROLES[ending]] = tensor
                break
        else:
            left.append(f"{key}: {UNKNOWN}")
    return grouped, left


def check(roles: Tensors) -> None:
    """Raises ValueError for what no adapter has, whatever its layer."""
    kind(roles)
    for role, tensor in roles.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{role} has {tensor.dtype}, expected floating-point numbers")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{role} has numbers that are not finite")
        if tensor.numel() == 0:
            raise ValueError(f"{role} has shape {list(tensor.shape)}, expected some numbers in it")


def kind(roles: Tensors) -> str:
    """What kind of adapter has these tensors."""
    given = set(roles)
    if any(role.startswith("kron_") for role in given):
        for number in "12":
            whole, parts = {f"kron_w{number}"}, {f"kron_w{number}_a", f"kron_w{number}_b"}
            if not (whole <= given or parts <= given):
                raise ValueError(f"has {', '.join(sorted(given))}, expected w{number} or both its factors")
        return "LoKr"
    for name, needed, allowed in KINDS:
        if needed <= given and given <= needed | allowed:
            return name
    for name, needed, _ in KINDS:
        if given & needed:
            raise ValueError(f"has {', '.join(sorted(given))} without {', '.join(sorted(needed - given))} ({name})")
    raise ValueError(f"has {', '.join(sorted(given))} alone, expected factors beside it")


def assembled(roles: Tensors, place: Place, layers: Mapping[str, nn.Module], alphas: "Alphas") -> dict[str, LowRank]:
    """What the tensors of one name add to the layers that it stands for."""
    sizes = sizes_of(place, layers)
    weights = [layers[name].weight for name in place.layers]
    whole = torch.Size([sum(sizes), *weights[0].shape[1:]])  # type: ignore[misc]
    if kind(roles) == "difference of a bias":
        width = whole[1:].numel()
        zeros = torch.zeros(1, width)
        layer = LowRank(zeros, torch.zeros(whole[0], 1), 1.0)
    else:
        layer = product_of(roles, place, alphas)
        if layer.rank > 2 * max(whole[0], whole[1:].numel()):
            raise ValueError(f"has rank {layer.rank}, expected at most the width of the layer, {list(whole)}")
    layer = layer.of_shape(whole)
    magnitude = roles.get("magnitude")
    if magnitude is not None and magnitude.ndim > 1 and magnitude.shape[0] == 1 and magnitude.numel() != whole[0]:
        if magnitude.numel() != whole[1]:
            raise ValueError(f"has magnitudes {list(magnitude.shape)}, expected {whole[0]} or (1, {whole[1]})")
        together = torch.cat([weight.detach().float().cpu() for weight in weights])  # type: ignore[misc]
        layer = low_rank.by_columns(layer, magnitude, together)
    elif magnitude is not None:
        if magnitude.numel() != whole[0]:
            raise ValueError(f"has magnitudes {list(magnitude.shape)}, expected {whole[0]} numbers")
        layer = replace(layer, magnitude=magnitude.flatten())
    for role, scale in (("bias", layer.scale), ("bias_difference", 1.0)):
        if role in roles:
            if roles[role].numel() != whole[0]:
                raise ValueError(f"has a {role} {list(roles[role].shape)}, expected {whole[0]} numbers")
            layer = replace(layer, bias=roles[role].flatten().float() * scale)
    if place.how is SWAPPED:
        layer = swapped(layer)
    return dict(zip(place.layers, low_rank.split(layer, sizes) if len(sizes) > 1 else [layer], strict=True))


def swapped(layer: LowRank) -> LowRank:
    """A layer whose halves of outputs change places."""
    turn = lambda tensor: None if tensor is None else torch.cat(tensor.chunk(2)[::-1])  # noqa: E731
    return replace(layer, up=turn(layer.up), magnitude=turn(layer.magnitude), bias=turn(layer.bias))


def product_of(roles: Tensors, place: Place, alphas: "Alphas") -> LowRank:
    """The product that the tensors of one name make, without magnitude and bias."""
    if kind(roles) == "difference":
        return low_rank.of_difference(roles["difference"].float())
    if kind(roles) == "LoHa":
        rank = roles["w1_b"].shape[0]
        alpha = alphas.of(roles, place, rank)
        kernels = (roles["t1"], roles["t2"]) if {"t1", "t2"} <= set(roles) else None
        return low_rank.of_hadamard((roles["w1_a"], roles["w1_b"]), (roles["w2_a"], roles["w2_b"]), alpha, kernels)
    if kind(roles) == "LoKr":
        return kronecker(roles, place, alphas)
    down, up = roles["down"], roles["up"]
    middle = roles.get("middle")
    inner = down.shape[0] if middle is None else middle.shape[0]
    if down.ndim < 2 or up.ndim < 2 or up.shape[1] != inner:
        raise ValueError(
            f"has factors of shapes {list(up.shape)} and {list(down.shape)}, expected (out, r) and (r, in)"
        )
    alpha = alphas.of(roles, place, inner)
    if middle is not None:
        return low_rank.of_kernel(middle, down, up, alpha)
    return LowRank(down, up, alpha)


def kronecker(roles: Tensors, place: Place, alphas: "Alphas") -> LowRank:
    """LoKr's product; LyCORIS scales by the rank of the factors, and not at all where both are whole."""
    factors = []
    ranks = []
    for number in "12":
        if f"kron_w{number}" in roles:
            factors.append([roles[f"kron_w{number}"]])
            continue
        a, b = roles[f"kron_w{number}_a"], roles[f"kron_w{number}_b"]
        ranks.append(b.shape[0])
        if number == "2" and "kron_t2" in roles:  # Tucker's: a (r, out2), b (r, in2), t (r, r, kh, kw)
            factors.append([torch.einsum("ijhw,io,jr->orhw", roles["kron_t2"].float(), a.float(), b.float())])
        else:
            factors.append([a, b])
    scale = 1.0
    if ranks:
        scale = alphas.of(roles, place, ranks[-1]) / ranks[-1]
    return low_rank.of_kronecker(factors[0], factors[1], scale)


class Alphas:
    """What a file says about the scale of its products.

    Args:
        header: Metadata of the file; of PEFT's config in it only alphas are read, since shapes tell the rest.

    Raises:
        AdapterError: The config is damaged, or asks for what is not a name or a number.
    """

    def __init__(self, header: Mapping[str, str]) -> None:
        self.config: dict[str, Any] = {}
        text = header.get(METADATA)
        if text is None:
            return
        try:
            self.config = json.loads(text)
        except ValueError:
            self.config = {}
        if not isinstance(self.config, dict) or not self.config:
            raise AdapterError(f"its header's {METADATA} is {text!r:.60}, expected a JSON object.")
        for key, value in self.config.items():
            if key.endswith("lora_alpha") and value is not None:
                _number(key, value)
            if key.endswith("alpha_pattern"):
                if not isinstance(value, dict):
                    raise AdapterError(f"its header's {key} is {value!r:.60}, expected names with numbers.")
                for name, alpha in value.items():
                    if not re.fullmatch(r"\^?[\w.\-]+\$?", name):
                        raise AdapterError(f"its header's {key} has {name!r:.60}, expected the name of a layer.")
                    _number(f"{key} of {name}", alpha)

    def of(self, roles: Tensors, place: Place, rank: int) -> float:
        """alpha of a layer, such that its product counts alpha / r.

        Args:
            roles: Tensors of the layer.
            place: Where it belongs.
            rank: r.

        Raises:
            ValueError: It is none.
        """
        alpha: float | None = None
        if "alpha" in roles:
            if roles["alpha"].numel() != 1:
                raise ValueError(f"alpha has shape {list(roles['alpha'].shape)}, expected one number")
            alpha = roles["alpha"].item()
        elif self.config:
            alpha = self._configured(place, rank)
        if alpha is None:
            return float(rank)
        if not 0 < alpha / rank <= LARGEST_SCALE:
            raise ValueError(
                f"has alpha {alpha:g} at rank {rank}, expected more than 0 and at most {LARGEST_SCALE:g} r"
            )
        return alpha

    def _configured(self, place: Place, rank: int) -> float | None:
        # diffusers writes one config with the names of components before the keys; PEFT one for each model
        prefix = f"{place.component}." if any(key.startswith(f"{place.component}.") for key in self.config) else ""
        alpha = self.config.get(f"{prefix}lora_alpha")
        for name, value in (self.config.get(f"{prefix}alpha_pattern") or {}).items():
            bare = name.strip("^$")
            layer = place.layers[0]
            if layer == bare or (not name.startswith("^") and layer.endswith(f".{bare}")):
                alpha = value
                break
        if alpha is None:
            return None
        return float(alpha) * math.sqrt(rank) if self.config.get(f"{prefix}use_rslora") else float(alpha)


def _number(name: str, value: Any) -> None:
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
    tensors, config, alphas = {}, {}, {}
    for component, added in layers.items():
        folded = {name: layer.folded() for name, layer in added.items()}
        made = config_of(folded)
        known = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_dora", "lora_bias")
        values = {key: getattr(made, key) for key in known}
        values["target_modules"] = sorted(made.target_modules or [])
        config |= {f"{component}.{key}": value for key, value in values.items() if value or key != "lora_bias"}
        alphas[component] = {name: layer.alpha for name, layer in added.items() if layer.alpha != layer.rank}
        for name, layer in folded.items():
            key = written_name(component, name)
            tensors[f"{key}.lora_A.weight"] = layer.down
            tensors[f"{key}.lora_B.weight"] = layer.up
            if layer.magnitude is not None:
                tensors[f"{key}.lora_magnitude_vector"] = layer.magnitude
            if layer.bias is not None:
                tensors[f"{key}.lora_B.bias"] = layer.bias
    extra = {"hubgen_alpha": json.dumps(alphas, sort_keys=True)} if any(alphas.values()) else {}
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
    alone = "text_encoder_2" not in models
    for component, added in layers.items():
        model = models[component]
        if component in BACKBONES:
            original = getattr(model, "config", {}).get("addition_embed_type") == "text_time" or component != "unet"
            named = in_original(component, model, added) if original else added
            named = {KOHYA_BACKBONE + underscored(name): layer for name, layer in named.items()}
        else:
            prefixes = kohya_encoders(component, model)
            prefix = next((one for one in prefixes if one == "lora_te1_" and not alone), prefixes[0])
            named = {
                prefix + underscored(written_name(component, name).removeprefix(f"{component}.")): layer
                for name, layer in added.items()
            }
        for name, layer in named.items():
            tensors[f"{name}.lora_down.weight"] = layer.down
            tensors[f"{name}.lora_up.weight"] = layer.up
            tensors[f"{name}.alpha"] = torch.tensor(float(layer.alpha))
            if layer.magnitude is not None:
                shape = (-1, *[1] * (layer.down.ndim - 1))
                tensors[f"{name}.dora_scale"] = layer.magnitude.reshape(shape)
            if layer.bias is not None:
                tensors[f"{name}.diff_b"] = layer.bias
    backbone = {name: layer for part in BACKBONES for name, layer in layers.get(part, {}).items()}
    usual = config_of(backbone or next(iter(layers.values())))
    return contiguous(tensors), {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(usual.r),
        "ss_network_alpha": f"{usual.lora_alpha:g}",
        **(header or {}),
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
            prefix = f"text_encoders.{comfyui_encoder(model)}.transformer."
            named = {
                prefix + written_name(component, name).removeprefix(f"{component}."): layer
                for name, layer in added.items()
            }
        for name, layer in named.items():
            folded = layer.folded()
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = folded.down, folded.up
            if folded.magnitude is not None:
                tensors[f"{name}.dora_scale"] = folded.magnitude.reshape(-1, *[1] * (folded.down.ndim - 1))
            if folded.bias is not None:
                tensors[f"{name}.diff_b"] = folded.bias
    return contiguous(tensors), {"format": "pt", **(header or {})}


def in_original(component: str, model: nn.Module, added: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """What is added to a backbone's layers, by the names of its original layout; its own where it has none."""
    layers, found = adaptable(model), {}
    for original, place in original_names(component, model, added):
        parts = [added.get(name) for name in place.layers]
        sizes = sizes_of(place, layers)
        weights = [layers[name].weight for name in place.layers]
        whole = low_rank.joined(parts, weights) if len(sizes) > 1 else parts[0]  # type: ignore[arg-type]
        assert whole is not None
        found[original] = swapped(whole) if place.how is SWAPPED else whole
    return found or dict(added)


def contiguous(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Tensors as files have them: on the CPU, each with storage of its own."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def written_name(component: str, name: str) -> str:
    """A layer's name in diffusers' files; CLIP's has `text_model.`, which ComfyUI and older versions expect."""
    if component.startswith("text_encoder") and name.startswith("encoder.layers."):
        name = f"text_model.{name}"
    return f"{component}.{name}"
