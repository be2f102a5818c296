"""How the layers of a model are called in files of adapters: a table for each component, made of the model's own names.

Trainers and programs name the same layer in their own ways; the name of `attn.to_q` in the first block of SD3 is

    transformer.transformer_blocks.0.attn.to_q               diffusers
    base_model.model.transformer_blocks.0.attn.to_q          PEFT
    lora_unet_joint_blocks_0_x_block_attn_qkv                kohya's sd-scripts; one layer with to_k and to_v
    diffusion_model.joint_blocks.0.x_block.attn.qkv          ComfyUI, Stability AI's code
    lora_transformer_transformer_blocks_0_attn_to_q          OneTrainer
    lycoris_transformer_blocks_0_attn_to_q                   SimpleTuner

A name with underscores for dots cannot be read back, so names are looked up here and never taken apart.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from hubgen.adaptation.attach import adaptable, shape_of
from hubgen.formats import flux_layout, ldm_unet, sd3_layout
from hubgen.formats.key_maps import SAME, How, Rule, leading

BACKBONES = ("unet", "transformer")
KEY_MAPS: dict[str, Any] = {
    "UNet2DConditionModel": ldm_unet.key_map,
    "SD3Transformer2DModel": sd3_layout.key_map,
    "FluxTransformer2DModel": flux_layout.key_map,
}
"""By the class of a backbone, its map to the names of its original layout"""

PEFT = "base_model.model."
COMFYUI = "diffusion_model."
ORIGINAL = ("", "diffusion_model.", "model.diffusion_model.")
"""Before a name of a backbone's original layout"""
KOHYA_BACKBONE = "lora_unet_"
UNDERSCORED = ("lora_unet_", "lora_transformer_", "lycoris_", "lycoris_unet_", "lycoris_transformer_")
"""Before a backbone's name with underscores"""
CLIP_STACK = "text_model."
"""Before the layers of CLIP; transformers 5 leaves it out in `CLIPTextModel`"""
CLIP_H_WIDTH = 1024


@dataclass(frozen=True)
class Place:
    """What a name in a file stands for."""

    component: str
    layers: tuple[str, ...]
    """Of the model; several of a layer that is one in the original layout, as their outputs lie below each other"""
    how: How = SAME
    """What happens to the outputs"""


Names = dict[str, Place]


def names_of(models: Mapping[str, nn.Module]) -> Names:
    """Every name that a file may give to a layer of these models.

    Args:
        models: By component, `unet`, `transformer`, `text_encoder`, `text_encoder_2`, `text_encoder_3`.
    """
    found: Names = {}
    for component, model in models.items():
        spelled = backbone_names(component, model) if component in BACKBONES else text_encoder_names(component, models)
        for name, place in spelled:
            found.setdefault(name, place)
    return found


def backbone_names(component: str, model: nn.Module) -> Iterator[tuple[str, Place]]:
    """Names of the layers of a backbone."""
    layers = list(adaptable(model))
    for layer in layers:
        place = Place(component, (layer,))
        for prefix in (f"{component}.", PEFT, f"{PEFT}{component}.", COMFYUI, ""):
            yield prefix + layer, place
            for old in processor_names(layer):
                yield prefix + old, place
        for prefix in UNDERSCORED:
            yield prefix + underscored(layer), place
    for original, place in original_names(component, model, layers):
        yield KOHYA_BACKBONE + underscored(original), place
        spelled = [(original, place), *xlabs_names(original, place)]
        for prefix in ORIGINAL:
            yield from ((prefix + name, one) for name, one in spelled)


def original_names(component: str, model: nn.Module, layers: Iterable[str]) -> Iterator[tuple[str, Place]]:
    """Names of the layers of a backbone in its original layout; several of ours may be one there."""
    made = KEY_MAPS.get(type(model).__name__)
    if made is None:
        return
    table, seen = {name: rule for rule in made(_config(model)) for name in rule.ours}, set()
    for layer in layers:
        rule, rest = next(((table[name], rest) for name, rest in leading(layer) if name in table), (None, ""))
        if rule is not None and rule.original + rest not in seen:
            seen.add(rule.original + rest)
            yield rule.original + rest, place_of(component, rule, rest)


def place_of(component: str, rule: Rule, rest: str) -> Place:
    """What a rule of a key map says about a layer."""
    return Place(component, tuple(name + rest for name in rule.ours), rule.how)


def processor_names(layer: str) -> Iterator[str]:
    """Of an attention's layer when its processor held the adapter (diffusers 0.16, `..._lora` after it)."""
    owner, _, name = layer.rpartition(".")
    if name in ("to_q", "to_k", "to_v"):
        yield f"{owner}.processor.{name}"
    elif layer.endswith(".to_out.0"):
        yield f"{owner.removesuffix('.to_out')}.processor.to_out"


XLABS = (
    (r"(double_blocks\.\d+)\.img_attn\.(qkv|proj)", r"\1.processor.\2_lora1"),
    (r"(double_blocks\.\d+)\.txt_attn\.(qkv|proj)", r"\1.processor.\2_lora2"),
    (r"(single_blocks\.\d+)\.linear1", r"\1.processor.qkv_lora"),
    (r"(single_blocks\.\d+)\.linear2", r"\1.processor.proj_lora"),
)


def xlabs_names(original: str, place: Place) -> Iterator[tuple[str, Place]]:
    """Of FLUX's attentions in XLabs' files; a single block's has no part in the MLP's layer there."""
    for pattern, name in XLABS:
        if re.fullmatch(pattern, original):
            yield re.sub(pattern, name, original), replace(place, layers=place.layers[:3])


def text_encoder_names(component: str, models: Mapping[str, nn.Module]) -> Iterator[tuple[str, Place]]:
    """Names of the layers of a text encoder."""
    model = models[component]
    prefixes = (f"{component}.", comfyui_encoder(component, model))
    for layer in adaptable(model):
        place = Place(component, (layer,))
        plain = layer.removeprefix(CLIP_STACK)
        spelled = [CLIP_STACK + plain, plain] if is_clip(model) else [layer]
        spelled += [old for name in spelled for old in attention_names(name)]
        for name in spelled:
            yield from ((prefix + name, place) for prefix in prefixes)
            yield from ((prefix + underscored(name), place) for prefix in kohya_encoders(component, models))


def attention_names(layer: str) -> Iterator[str]:
    """Of a text encoder's attention when it was named as a U-Net's (diffusers 0.16)."""
    owner, _, name = layer.rpartition(".")
    old = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}.get(name)
    if old is not None:
        yield f"{owner}.{old}"


def is_clip(model: nn.Module) -> bool:
    """Whether a text encoder is CLIP's."""
    return type(model).__name__ in ("CLIPTextModel", "CLIPTextModelWithProjection")


def comfyui_encoder(component: str, model: nn.Module) -> str:
    """What ComfyUI puts before the names of a text encoder; Stable Diffusion 2 alone has CLIP H."""
    name = "t5xxl"
    if is_clip(model):
        first = "clip_h" if _config(model)["hidden_size"] == CLIP_H_WIDTH else "clip_l"
        name = first if component == "text_encoder" else "clip_g"
    return f"text_encoders.{name}.transformer."


def kohya_encoders(component: str, models: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """What kohya's tools put before the names of a text encoder; the first is the one to write.

    Where there is only one it is `te`; else they are counted, but T5 is always the third.
    """
    number = {"text_encoder": 1, "text_encoder_2": 2, "text_encoder_3": 3}[component]
    if not is_clip(models[component]):
        return tuple(dict.fromkeys(("lora_te3_", f"lora_te{number}_")))
    if number > 1:
        return (f"lora_te{number}_",)
    usual = ("lora_te_", "lora_te1_") if "text_encoder_2" not in models else ("lora_te1_", "lora_te_")
    return (*usual, "lycoris_text_encoder_")


def underscored(name: str) -> str:
    """A name with underscores for dots."""
    return name.replace(".", "_")


def sizes_of(place: Place, layers: Mapping[str, nn.Module]) -> list[int]:
    """Outputs of each layer of a place."""
    return [shape_of(layers[name])[0] for name in place.layers]


def _config(model: Any) -> Any:
    config = model.config
    return config if isinstance(config, Mapping) else config.to_dict()
