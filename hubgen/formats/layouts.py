"""Which layout a single file has, told from its keys, and which tensors are whose."""

import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hubgen.formats import (
    flux_controlnet_layout,
    flux_layout,
    ldm_controlnet,
    ldm_unet,
    sd3_controlnet_layout,
    sd3_layout,
)
from hubgen.formats.headers import TensorHeader, listing, read_header
from hubgen.formats.key_maps import Rule
from hubgen.formats.markers import NAMES, read_markers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layout:
    """The original layout of the single files of some models."""

    title: str
    backbone: str
    """Its component: `unet`, `transformer`, or `controlnet`, which stands beside one of them"""
    backbone_class: str
    key_map: Callable[[Mapping[str, Any]], list[Rule]]
    """Of the backbone"""
    infer_config: Callable[[Mapping[str, TensorHeader]], dict[str, Any]]
    latents: str
    """Key of `ldm_vae.LATENTS`"""
    text_encoders: Mapping[str, str]
    """Component -> prefix"""
    vae_prefix: str = "first_stage_model."
    """The one to write"""


UNET: dict[str, Any] = {
    "backbone": "unet",
    "backbone_class": "UNet2DConditionModel",
    "key_map": ldm_unet.key_map,
    "infer_config": ldm_unet.infer_config,
}
SD3: dict[str, Any] = {
    "backbone": "transformer",
    "backbone_class": "SD3Transformer2DModel",
    "key_map": sd3_layout.key_map,
    "infer_config": sd3_layout.infer_config,
}
FLUX: dict[str, Any] = {
    "backbone": "transformer",
    "backbone_class": "FluxTransformer2DModel",
    "key_map": flux_layout.key_map,
    "infer_config": flux_layout.infer_config,
}
CLIP_L, CLIP_G, T5 = (f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g", "t5xxl"))

LAYOUTS: dict[str, Layout] = {
    "sd1": Layout("Stable Diffusion 1.x", **UNET, latents="sd", text_encoders={
        "text_encoder": "cond_stage_model.transformer.",
    }),
    "sd2": Layout("Stable Diffusion 2.x", **UNET, latents="sd", text_encoders={
        "text_encoder": "cond_stage_model.model.",
    }),
    "sdxl": Layout("Stable Diffusion XL", **UNET, latents="sdxl", text_encoders={
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    }),
    "sdxl-refiner": Layout("Stable Diffusion XL's refiner", **UNET, latents="sdxl", text_encoders={
        "text_encoder_2": "conditioner.embedders.0.model.",
    }),
    "sd3": Layout("Stable Diffusion 3 and 3.5", **SD3, latents="sd3", text_encoders={
        "text_encoder": CLIP_L, "text_encoder_2": CLIP_G, "text_encoder_3": T5,
    }),
    "controlnet": Layout(
        "a ControlNet of Stable Diffusion 1.x, 2.x or XL", "controlnet", "ControlNetModel",
        ldm_controlnet.key_map, ldm_controlnet.infer_config, latents="sd", text_encoders={},
    ),
    "sd3-controlnet": Layout(
        "a ControlNet of Stable Diffusion 3.5 large", "controlnet", "SD3ControlNetModel",
        sd3_controlnet_layout.key_map, sd3_controlnet_layout.infer_config, latents="sd3", text_encoders={},
    ),
    "flux-controlnet": Layout(
        "a ControlNet of FLUX.1", "controlnet", "FluxControlNetModel",
        flux_controlnet_layout.key_map, flux_controlnet_layout.infer_config, latents="flux", text_encoders={},
    ),
    "flux": Layout("FLUX.1", **FLUX, latents="flux", vae_prefix="vae.", text_encoders={
        "text_encoder": CLIP_L, "text_encoder_2": T5,
    }),
}  # fmt: skip

BACKBONE_PREFIXES = ("model.diffusion_model.", "")
VAE_PREFIXES = ("first_stage_model.", "vae.", "")
CONTROLNET_PREFIX = "control_model."
# a backbone's key, after its prefix, that no other layout has
UNET_KEY = "input_blocks.0.0.weight"
CONTROLNET_KEY = "input_hint_block.0.weight"
SD3_KEY = "joint_blocks.0.x_block.attn.qkv.weight"
FLUX_KEY = "double_blocks.0.img_attn.qkv.weight"
SD3_CONTROLNET_KEY = "transformer_blocks.0.attn.qkv.weight"
TOKEN_CONTROLNET_KEY = "controlnet_blocks.0.weight"
VAE_KEY = "decoder.mid.block_1.conv1.weight"
REFINER_WIDTH = 1280  # of its text; the base has 2048

# What training leaves in a file beside the components: EMA copies, tables of the schedule, losses, temperatures.
LEFT_BY_TRAINING = re.compile(
    r"^(model_ema\.|first_stage_model\.loss\.|loss\.|alphas_cumprod|betas$|sqrt_|log_one_minus|posterior_|lvlb_weights"
    r"|logvar$|scale_factor$|denoiser\.sigmas|model_sampling\."
    r"|(cond_stage_model|conditioner\.embedders\.\d)\.(model\.|transformer\.)?logit_scale"
    r"|text_encoders\.\w+\.(transformer\.)?logit_scale|text_encoders\.t5xxl\.spiece_model)"
)
HINTS = (  # what else people have files of: (a pattern of keys, what it is)
    (r"^lllite_unet_", "a ControlLLLite of kohya's, which changes layers of the U-Net: no ControlNet, not read here"),
    (r"^lora_controlnet$", "a Control-LoRA, the difference of a ControlNet to its base, which is not read here"),
    (r"lora_(down|up|A|B)\.", "a LoRA, which is loaded onto a model"),
    (r"^(down_blocks|up_blocks)\.\d+\.resnets|^(single_)?transformer_blocks\.\d+\.attn|^encoder\.down_blocks\.",
     "one model in diffusers' layout: the model's class reads it, by `from_single_file` with a `config`"),
    (r"^control_model\.|^controlnet_|^input_hint_block", "a ControlNet"),
    (r"^(adapter\.)?body\.\d+\.", "a T2I-adapter"),
    (r"^text_model\.|^encoder\.block\.\d+\.layer\.", "a text encoder of transformers"),
)  # fmt: skip
# What quantised files have beside or in the place of weights: (a pattern of keys, what it is).
QUANTISED = (
    (r"\.quant_state\.|\.absmax$|\.quant_map$", "to 4 bits by bitsandbytes (nf4 or fp4)"),
    (r"\.SCB$", "to 8 bits by bitsandbytes"),
    (r"\.(qweight|wscales|qzeros)$", "to 4 bits (SVDQuant, AWQ or GPTQ)"),
    (r"\.weight_scale_2$", "to 4-bit floating point (NVFP4)"),
)
# ComfyUI's scaled float8: a weight, a number to multiply it with, and one for what enters the layer, of no use here.
SCALES, INPUT_SCALES = (".scale_weight", ".weight_scale"), (".scale_input", ".input_scale")
SCALED_MARKS = re.compile(r"(^|\.)scaled_fp8$|\.comfy_quant$")
FLOAT8 = tuple(getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2"))
EMA_PREFIX, TRAINED_PREFIX = "model_ema.", "model."
"""Of the averaged copy of the backbone in CompVis' files, whose names lose their other dots, and of the backbone"""


@dataclass(frozen=True)
class SingleFile:
    """What lies in a single file, read from its header."""

    path: Path
    layout: str | None
    """A key of `LAYOUTS`; None for an autoencoder alone"""
    parts: dict[str, dict[str, TensorHeader]]
    """Component -> its tensors, without prefix"""
    others: list[str]
    """Keys that belong to no component, and are not what training leaves"""
    keys: dict[str, dict[str, str]]
    """Component -> the key in the file of each of its tensors"""
    scales: dict[str, dict[str, str]]
    """Component -> of each of its weights in scaled float8, the key of the number to multiply it with"""
    markers: dict[str, list[float]]
    """See `hubgen.formats.markers`"""

    def describe(self) -> str:
        """For messages."""
        title = "an autoencoder" if self.layout is None else LAYOUTS[self.layout].title
        return f"{title} ({', '.join(sorted(self.parts))})"


def open_single_file(path: Path, extract_ema: bool = False) -> SingleFile:
    """Reads the header of a file in an original layout.

    Args:
        path: Of the file.
        extract_ema: Take the averaged copy of the backbone's weights, where the file has one.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is pickled, damaged, quantised in a way that is not read, or in no layout that is known; says
            what was found.
    """
    tensors = read_header(path)
    refuse_quantised(path, tensors)
    layout, backbone_prefix = detect(tensors)
    vae_prefix = next((prefix for prefix in VAE_PREFIXES if prefix + VAE_KEY in tensors), None)
    if layout is None and vae_prefix is None:
        raise unknown(path, tensors)
    prefixes: dict[str, str] = {}
    if vae_prefix is not None:
        prefixes["vae"] = vae_prefix
    if layout is not None:
        prefixes[LAYOUTS[layout].backbone] = backbone_prefix
        prefixes |= LAYOUTS[layout].text_encoders
        if CONTROLNET_PREFIX + CONTROLNET_KEY in tensors:
            prefixes["controlnet"] = CONTROLNET_PREFIX
    parts: dict[str, dict[str, TensorHeader]] = {}
    others = []
    longest_first = sorted(prefixes.items(), key=lambda item: -len(item[1]))
    keys: dict[str, dict[str, str]] = {}
    markers = read_markers(path, [name for name in NAMES if name in tensors])
    scales = scales_of(path, tensors)
    used = {*NAMES, *scales.values()}
    for key in tensors:
        if LEFT_BY_TRAINING.search(key) or SCALED_MARKS.search(key) or key.endswith(INPUT_SCALES) or key in used:
            continue
        owner = next((component for component, prefix in longest_first if key.startswith(prefix)), None)
        if owner is None:
            others.append(key)
        else:
            name = key.removeprefix(prefixes[owner])
            averaged = ema_key(key)
            source = averaged if extract_ema and averaged in tensors else key
            parts.setdefault(owner, {})[name] = tensors[source]
            keys.setdefault(owner, {})[name] = source
    if extract_ema and not any(key.startswith(EMA_PREFIX) for key in tensors):
        logger.warning(f"{path}: `extract_ema` has no effect: the file has no averaged weights.")
    by_part = {
        part: {name: scales[key] for name, key in names.items() if key in scales} for part, names in keys.items()
    }
    return SingleFile(path, layout, parts, others, keys, by_part, markers)


def refuse_quantised(path: Path, keys: Iterable[str]) -> None:
    """Raises ValueError for a file whose weights are packed in a way that only their packer reads."""
    for pattern, what in QUANTISED:
        found = next((key for key in keys if re.search(pattern, key)), None)
        if found is not None:
            raise ValueError(
                f"{path}: quantised {what}, as its {found!r} tells; expected whole or scaled float8 weights."
            )


def scales_of(path: Path, tensors: Mapping[str, TensorHeader]) -> dict[str, str]:
    """Key of each weight in scaled float8 -> key of the number to multiply it with.

    Raises:
        ValueError: A scale is of a weight of another type, or not a single number.
    """
    found = {}
    for key, header in tensors.items():
        ending = next((ending for ending in SCALES if key.endswith(ending)), None)
        if ending is None:
            continue
        weight = f"{key.removesuffix(ending)}.weight"
        if weight not in tensors or tensors[weight].dtype not in FLOAT8 or math.prod(header.shape) != 1:
            raise ValueError(
                f"{path}: quantised: {key!r} of shape {list(header.shape)} scales no float8 weight as a whole; "
                "expected whole or scaled float8 weights."
            )
        found[weight] = key
    return found


def ema_key(key: str) -> str:
    """Key of a tensor's averaged copy: `model_ema.diffusion_modelout0bias` of `model.diffusion_model.out.0.bias`."""
    return EMA_PREFIX + key.removeprefix(TRAINED_PREFIX).replace(".", "") if key.startswith(TRAINED_PREFIX) else ""


def detect(tensors: Mapping[str, TensorHeader]) -> tuple[str | None, str]:
    """The layout of a file, and the prefix of its backbone; (None, "") where it has no backbone."""
    if TOKEN_CONTROLNET_KEY in tensors:
        found = {SD3_CONTROLNET_KEY: "sd3-controlnet", FLUX_KEY: "flux-controlnet"}
        return next(((layout, "") for key, layout in found.items() if key in tensors), (None, ""))
    if CONTROLNET_KEY in tensors:
        return "controlnet", ""
    for prefix in BACKBONE_PREFIXES:
        if prefix + SD3_KEY in tensors:
            return "sd3", prefix
        if prefix + FLUX_KEY in tensors:
            return "flux", prefix
        if prefix + UNET_KEY in tensors:
            return detect_unet(tensors, prefix), prefix
    if CONTROLNET_PREFIX + CONTROLNET_KEY in tensors:
        return "controlnet", CONTROLNET_PREFIX
    return None, ""


def detect_unet(tensors: Mapping[str, TensorHeader], prefix: str) -> str:
    """Which Stable Diffusion: by its text encoders, or where it has none, by the U-Net itself."""
    by_length = sorted(
        (
            (text, name)
            for name in ("sd1", "sd2", "sdxl", "sdxl-refiner")
            for text in LAYOUTS[name].text_encoders.values()
        ),
        key=lambda item: ("embedders.1" not in item[0], item[0]),
    )
    for text, name in by_length:
        if any(key.startswith(text) for key in tensors):
            return name
    attention = f"{prefix}middle_block.1."
    text_width = tensors.get(f"{attention}transformer_blocks.0.attn2.to_k.weight")
    if f"{prefix}label_emb.0.0.weight" in tensors:
        return "sdxl-refiner" if text_width is not None and text_width.shape[-1] == REFINER_WIDTH else "sdxl"
    linear = tensors.get(f"{attention}proj_in.weight")
    return "sd2" if linear is not None and len(linear.shape) == 2 else "sd1"


def unknown(path: Path, tensors: Mapping[str, TensorHeader]) -> ValueError:
    """The error for a file in no layout that is known."""
    hint = next((what for pattern, what in HINTS if any(re.search(pattern, key) for key in tensors)), None)
    looks = f" It looks like {hint}." if hint else ""
    known = "; ".join(layout.title for layout in LAYOUTS.values())
    return ValueError(
        f"{path}: in no layout that is known.{looks} Known are the original layouts of {known}, "
        f"and of their autoencoders alone. Found {len(tensors)} tensors:{listing(sorted(tensors))}"
    )
