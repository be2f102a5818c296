"""What a file of an adapter is, told from its header: layout, kind, base, ranks, words. No model is needed.

    found = describe_adapter(Path("style.safetensors"))       None where it holds no adapter
    found.layout, found.base, found.ranks                     "kohya", "Stable Diffusion XL", {16: 722}
    describe_embeddings(Path("cat.safetensors"))              learned words of textual inversion

Which layers a file is for, and whether it can be used with a model, only the model's own names tell
(`hubgen.adaptation.lora_files`); here are guesses by patterns and widths, for people.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hubgen.adaptation.header_keys import A1111, ALPHAS, BASE, METADATA, PARTS, PEFT_CONFIG, PREFIX, PROMPT, WORD
from hubgen.adaptation.kinds import ROLES, kind_of
from hubgen.formats.headers import TensorHeader, read_header, read_metadata
from hubgen.formats.layouts import LAYOUTS
from hubgen.hub.bundled import bundled_model

Roles = dict[str, torch.Tensor]
"""Tensors of a layer, without storage, by what they are"""

SPELLINGS = (  # (what a name of a layer begins with or has, whose it is); the first that fits
    (r"^lycoris_", "LyCORIS, as SimpleTuner writes it"),
    (r"^lora_transformer_", "OneTrainer"),
    (r"^(lora_unet_|lora_te\d?_)", "kohya"),
    (r"^base_model\.model\.", "PEFT"),
    (r"^(diffusion_model|text_encoders)\.", "ComfyUI"),
    (r"^(double|single)_blocks\.\d+\.processor\.", "XLabs"),
    (r"^(double|single)_blocks\.", "Black Forest Labs"),
    (r"\.processor(\.|$)", "diffusers before 0.17"),
    (r"^(unet|transformer|text_encoder(_\d)?)\.", "diffusers"),
    (r"^(down_blocks|mid_block|up_blocks|(single_)?transformer_blocks)\.", "one model's own names"),
)
BEFORE_PEFT = re.compile(r"\.lora(_linear_layer)?\.(down|up)\.weight$")
"""Keys of diffusers before 0.21"""
COMPONENTS = (  # of a layer's name; what fits none is the backbone's
    (r"^(base_model\.model\.)?text_encoder_2\.|^lora_te2_|^text_encoders\.clip_g\.", "text_encoder_2"),
    (r"^(base_model\.model\.)?text_encoder_3\.|^lora_te3_|^text_encoders\.t5xxl\.", "text_encoder_3"),
    (r"^(base_model\.model\.)?text_encoder\.|^lora_te1?_|^lycoris_text_encoder_|^text_encoders\.", "text_encoder"),
)
FLUX_NAME = re.compile(r"(double|single)_blocks[._]\d|single_transformer_blocks[._]\d")
SD3_NAME = re.compile(r"joint_blocks[._]\d")
UNET_NAME = re.compile(r"(down|up|input|output)_blocks[._]\d|mid_block[._]|middle_block[._]\d")
XL_NAME = re.compile(r"(input|output)_blocks[._]\d|middle_block[._]\d|transformer_blocks[._][1-9]")
MMDIT_NAME = re.compile(r"(^|[._])transformer_blocks[._]\d")
OF_TEXT = re.compile(r"attn2[._](processor[._])?to_[kv]$")
OF_BLOCK = re.compile(r"attn[._](to_[qkv]|qkv)$")

UNETS = {768: "sd1", 1024: "sd2", 2048: "sdxl", 1280: "sdxl-refiner"}
"""By the width of the text that a U-Net attends to"""
MMDITS = {1536: "Stable Diffusion 3 or 3.5 medium", 2432: "Stable Diffusion 3.5 large", 3072: LAYOUTS["flux"].title}
"""By the width of their tokens"""
ENCODERS = {768: "sd1", 1024: "sd2"}
"""By the width of the only text encoder that a file is for"""
EMOJI = "hubgen's own emoji model"

WORDS = ("modelspec.trigger_phrase", PROMPT, PREFIX, "ss_tag_frequency")
"""Where headers have the words that an adapter was trained with"""
NAMED_BASES = (
    *("base_model_name_or_path", BASE, "base_model", "ss_base_model_version", "ss_sd_model_name"),
    *("modelspec.architecture", "modelspec.base_model"),
)
"""Where headers name the base"""
TAGS = 12
"""Of the tags of a data set, as many as are named"""


@dataclass(frozen=True)
class AdapterDescription:
    """What an adapter is."""

    layout: str
    """Whose names and conventions it has"""
    kinds: dict[str, int]
    """LoRA, LoHa, ..., with the number of layers"""
    base: str
    """The models that it is for; empty if names and widths do not tell"""
    components: dict[str, int]
    """With the number of layers, as they are called in the file"""
    ranks: dict[int, int]
    """With the number of layers; layers without factors have none"""
    alphas: tuple[float, ...] = ()
    """All there are; none where the file has none, and each counts as its rank"""
    words: dict[str, str] = field(default_factory=dict)
    """Where the header has them -> words that it was trained with"""
    named_bases: dict[str, str] = field(default_factory=dict)
    """Where the header has it -> the base"""
    unknown: list[str] = field(default_factory=list)
    """Keys of no kind that is known, or of layers that are not complete"""


@dataclass(frozen=True)
class EmbeddingDescription:
    """What learned embeddings are."""

    words: dict[str, tuple[int, int]]
    """Word, or text encoder -> vectors and features of each"""
    base: str
    """The models that they are for; empty if the widths do not tell"""
    word: str
    """What prompts call the first of them"""


def describe_adapter(path: Path) -> AdapterDescription | None:
    """What the adapter in a file is; `None` where it holds none.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is a pickle, or no whole safetensors file.
    """
    tensors = read_header(path)
    layers, unknown = layers_of(tensors)
    kinds: Counter[str] = Counter()
    for name, roles in list(layers.items()):
        try:
            kinds[kind_name(roles)] += 1
        except ValueError as error:
            unknown += [f"{name}: {error}"]
            del layers[name]
    taken = sum(len(roles) for roles in layers.values())
    if not layers or taken < len(tensors) / 2:
        return None
    header = header_of(path)
    base = base_title(layers)
    return AdapterDescription(
        layout=layout_name(layers, tensors, header),
        kinds=dict(kinds.most_common()),
        base=base,
        components=dict(Counter(component_of(name, base, layers) for name in sorted(layers))),
        ranks=dict(sorted(Counter(rank for roles in layers.values() if (rank := rank_of(roles))).items())),
        alphas=alphas_of(path, layers, tensors, header),
        words=dict(words_of(header)),
        named_bases={key: str(header[key]) for key in NAMED_BASES if header.get(key) not in (None, "", "None")},
        unknown=sorted(unknown),
    )


def describe_embeddings(path: Path) -> EmbeddingDescription | None:
    """What the learned words in a file are; `None` where it holds none.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is a pickle, or no whole safetensors file.
    """
    tensors = read_header(path)
    vectors = {key: one for key, one in tensors.items() if one.dtype.is_floating_point and len(one.shape) in (1, 2)}
    if not vectors or len(vectors) < len(tensors) or any("." in key or 0 in vectors[key].shape for key in vectors):
        return None
    sizes = {key: ((1, *one.shape)[-2], one.shape[-1]) for key, one in vectors.items()}
    if "clip_g" in sizes:
        base = LAYOUTS["sdxl"].title
    else:
        widths = {width for _, width in sizes.values()}
        base = LAYOUTS[ENCODERS[width]].title if len(widths) == 1 and (width := widths.pop()) in ENCODERS else ""
    name = str(read_metadata(path).get(WORD) or path.stem)
    words = {name if key == A1111 else key: size for key, size in sizes.items()}
    return EmbeddingDescription(words, base, name if sizes.keys() <= PARTS.keys() else next(iter(words)))


def base_of(path: Path) -> str:
    """The models that the adapter in a file is for; empty if that cannot be told."""
    found = describe_adapter(path)
    return "" if found is None else found.base


# ---- names ----


def layers_of(tensors: Mapping[str, TensorHeader]) -> tuple[dict[str, Roles], list[str]]:
    """Tensors by the name of their layer and by what they are, and the keys that are no part of an adapter."""
    endings = sorted(ROLES, key=len, reverse=True)
    found: dict[str, Roles] = {}
    unknown = []
    for key, header in tensors.items():
        ending = next((one for one in endings if key.endswith(one)), None)
        if ending is None:
            unknown.append(key)
        else:
            found.setdefault(key.removesuffix(ending), {})[ROLES[ending]] = header.meta()
    return found, unknown


def layout_name(layers: Mapping[str, Roles], tensors: Mapping[str, TensorHeader], header: Mapping[str, Any]) -> str:
    """Whose names the layers have: most of the backbone's, since several programs call text encoders alike."""
    found: Counter[str] = Counter()
    for name in [name for name in layers if not of_text(name)] or layers:
        found[next((title for pattern, title in SPELLINGS if re.search(pattern, name)), "unknown names")] += 1
    layout = found.most_common(1)[0][0]
    if layout == "diffusers" and any(BEFORE_PEFT.search(key) for key in tensors):
        return "diffusers before 0.21"
    if layout == "kohya" and str(header.get("ss_network_module", "")).startswith("lycoris"):
        return "kohya, by LyCORIS"
    return layout


def of_text(name: str) -> bool:
    """Whether a layer is a text encoder's."""
    return any(re.search(pattern, name) for pattern, _ in COMPONENTS)


def component_of(name: str, base: str, layers: Mapping[str, Roles]) -> str:
    """Which model of a pipeline a layer belongs to."""
    found = next((title for pattern, title in COMPONENTS if re.search(pattern, name)), None)
    if found == "text_encoder_3" and base == LAYOUTS["flux"].title:
        return "text_encoder_2"
    if found is not None:
        return found
    is_unet = UNET_NAME.search(name) or any(UNET_NAME.search(other) for other in layers)
    return "unet" if is_unet else "transformer"


def base_title(layers: Mapping[str, Roles]) -> str:
    """The models that layers of these names and widths belong to; empty if they do not tell."""
    text = {name: one for name, one in layers.items() if of_text(name)}
    backbone = {name: one for name, one in layers.items() if name not in text}
    if any(FLUX_NAME.search(name) for name in backbone):
        return LAYOUTS["flux"].title
    if any(UNET_NAME.search(name) for name in backbone):
        return unet_title(backbone, text)
    if any(SD3_NAME.search(name) or MMDIT_NAME.search(name) for name in backbone):
        width = next((inputs_of(one) for name, one in backbone.items() if OF_BLOCK.search(name)), None)
        if width == emoji_width():
            return EMOJI
        title = MMDITS.get(width or 0, LAYOUTS["sd3"].title)
        return "Stable Diffusion 3.5 medium" if any(re.search(r"attn2[._]", name) for name in backbone) else title
    return text_title(text)


def unet_title(backbone: Mapping[str, Roles], text: Mapping[str, Roles]) -> str:
    """Which Stable Diffusion with a U-Net."""
    width = next((inputs_of(one) for name, one in backbone.items() if OF_TEXT.search(name)), None)
    if width in UNETS:
        return LAYOUTS[UNETS[width]].title
    if any(XL_NAME.search(name) for name in backbone) or any(re.search(r"te2_|encoder_2|clip_g", n) for n in text):
        return LAYOUTS["sdxl"].title
    return text_title(text) or f"{LAYOUTS['sd1'].title} or 2.x"


def text_title(text: Mapping[str, Roles]) -> str:
    """Which models have such text encoders."""
    if any(re.search(r"te2_|encoder_2|clip_g", name) for name in text):
        return LAYOUTS["sdxl"].title
    queries = (inputs_of(one) for name, one in text.items() if re.search(r"(q_proj|to_q)$", name))
    width = next(queries, None)
    return LAYOUTS[ENCODERS[width]].title if width in ENCODERS else ""


def emoji_width() -> int:
    """Of the tokens of the model that comes with the package."""
    config = json.loads((bundled_model() / "transformer" / "config.json").read_text(encoding="utf-8"))
    return int(config["num_attention_heads"] * config["attention_head_dim"])


# ---- tensors ----


def kind_name(roles: Roles) -> str:
    """What kind of adapter a layer has; ValueError where it is none."""
    kind = kind_of(roles)
    if kind == "LoRA" and "middle" in roles:
        kind = "LoRA with a kernel (LoCon)"
    return f"{kind} with magnitudes (DoRA)" if {"dora_scale", "magnitude"} & roles.keys() else kind


def inputs_of(roles: Roles) -> int | None:
    """How many features a layer takes."""
    for role in ("down", "hada_w1_b", "diff"):
        if role in roles and "hada_t1" not in roles:
            return roles[role].shape[1] if roles[role].ndim > 1 else None
    if "lokr_w1" in roles or "lokr_w1_b" in roles:
        sides = [roles.get(f"lokr_w{number}", roles.get(f"lokr_w{number}_b")) for number in (1, 2)]
        if all(side is not None and side.ndim > 1 for side in sides):
            return sides[0].shape[1] * sides[1].shape[1]  # type: ignore[union-attr]
    return None


def rank_of(roles: Roles) -> int | None:
    """Terms of a layer's product; `None` where it has no factors."""
    role = next((one for one in ("down", "hada_t1", "hada_w1_b", "lokr_w2_b", "lokr_w1_b") if one in roles), None)
    return None if role is None or not roles[role].ndim else roles[role].shape[0]


def alphas_of(
    path: Path, layers: Mapping[str, Roles], tensors: Mapping[str, TensorHeader], header: Mapping[str, Any]
) -> tuple[float, ...]:
    """The alphas that the file was trained with, from its tensors or from what its header says."""
    from safetensors import safe_open

    keys = [key for key in tensors if key.endswith(".alpha") and tensors[key].shape in ((), (1,))]
    if keys:
        with safe_open(path, framework="pt") as file:
            return tuple(sorted({round(float(file.get_tensor(key)), 6) for key in keys}))
    trained = json_of(header, ALPHAS)
    if trained:
        return tuple(
            sorted({float(one) for layers in trained.values() if isinstance(layers, dict) for one in numbers(layers)})
        )
    config = json_of(header, METADATA)
    found = {value for key, value in config.items() if key.rpartition(".")[2] in ("lora_alpha", "alpha")}
    for key, value in config.items():
        if key.rpartition(".")[2] == "alpha_pattern" and isinstance(value, dict):
            found |= set(value.values())
    return tuple(sorted(float(one) for one in found if is_number(one)))


def numbers(values: Mapping[str, Any]) -> Iterator[Any]:
    """The values that are numbers."""
    return (value for value in values.values() if is_number(value))


def is_number(value: Any) -> bool:
    """Whether JSON has a number there."""
    return isinstance(value, int | float) and not isinstance(value, bool)


# ---- header ----


def header_of(path: Path) -> dict[str, Any]:
    """A file's header; beside a file of PEFT's lies its config, which then stands in it too."""
    header: dict[str, Any] = dict(read_metadata(path))
    beside = path.with_name(PEFT_CONFIG)
    if METADATA not in header and beside.is_file():
        header[METADATA] = beside.read_text(encoding="utf-8", errors="replace")
    base = json_of(header, METADATA).get("base_model_name_or_path")
    return {**({"base_model_name_or_path": base} if isinstance(base, str) else {}), **header}


def json_of(header: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A JSON object in a header; empty where there is none."""
    try:
        found = json.loads(header.get(key, "{}"))
    except (ValueError, TypeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def words_of(header: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Where the header has words, and those."""
    for key in WORDS:
        if key == "ss_tag_frequency":
            counted: Counter[str] = Counter()
            for tags in json_of(header, key).values():
                if isinstance(tags, dict):
                    counted.update({tag.strip(): int(count) for tag, count in tags.items() if is_number(count)})
            if counted:
                more = f", and {len(counted) - TAGS} more" if len(counted) > TAGS else ""
                yield key, ", ".join(f"{tag} ({count})" for tag, count in counted.most_common(TAGS)) + more
        elif header.get(key):
            yield key, " ".join(str(header[key]).split())
