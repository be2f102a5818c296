"""Files of adapters as other programs write them: an independent writer, which knows nothing of hubgen's.

    known = adapter("sd3", models, seed=1)                 component -> layer -> factors, by diffusers' names
    tensors = LAYOUTS["kohya"].write("sd3", known)         the file
    of_kind(KINDS["LoHa"], "sd3", models)                  a file of another kind, and what it comes to

Names and conventions are written out here from what is public: diffusers' and transformers' classes, the reference
codes of SDXL, SD3 and FLUX, kohya's sd-scripts, LyCORIS. Tables of blocks are those of the tiny pipelines of
tests/official.py. What a file comes to is computed in float64.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

Tensors = dict[str, torch.Tensor]
BACKBONE = {"sd1": "unet", "sd2": "unet", "sdxl": "unet", "sd3": "transformer", "sd3.5": "transformer"}
BACKBONE["flux-dev"] = "transformer"
U_NETS, MMDITS = ("sd1", "sd2", "sdxl"), ("sd3", "sd3.5", "flux-dev")


@dataclass(frozen=True)
class Factors:
    """A LoRA of one layer."""

    down: torch.Tensor
    """(r, in) or (r, in, kh, kw)"""
    up: torch.Tensor
    """(out, r) or (out, r, 1, 1)"""
    alpha: float

    @property
    def rank(self) -> int:
        return len(self.down)

    def delta(self) -> torch.Tensor:
        """What it adds to the weight, float64."""
        made = self.up.double().flatten(1) @ self.down.double().flatten(1)
        return (made * self.alpha / self.rank).reshape(len(self.up), *self.down.shape[1:])


Known = dict[str, dict[str, Factors]]


def drawn(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator) * 0.3


def adapter(family: str, models: Mapping[str, nn.Module], seed: int, shared: bool = False, rank: int = 4) -> Known:
    """Random factors for all layers of some models, CLIP's by the names with `text_model.`.

    Args:
        family: Of the models.
        models: By component.
        seed: Of the numbers.
        shared: Whether layers that are one in the original layout have the first factor and alpha in common.
        rank: Of each.
    """
    found: Known = {}
    generator = torch.Generator().manual_seed(seed)
    for component, model in models.items():
        spelled = ORIGINAL.get(family, {}) if component == BACKBONE[family] else {}
        common: dict[str, tuple[torch.Tensor, float]] = {}
        for name, module in adapted(model):
            out, *inputs = module.weight.shape
            down, alpha = drawn(generator, rank, *inputs), float(torch.rand((), generator=generator)) + 0.5
            if shared:
                down, alpha = common.setdefault(spelled.get(name, (name, 0, 1))[0], (down, alpha))
            up = drawn(generator, out, rank, *[1] * len(inputs[1:]))
            found.setdefault(component, {})[written(component, name)] = Factors(down, up, alpha)
    return found


def only(known: Known, pattern: str) -> Known:
    """The layers whose whole name fits a pattern."""
    found: Known = {}
    for component, layers in known.items():
        kept = {name: one for name, one in layers.items() if re.fullmatch(pattern, name)}
        found |= {component: kept} if kept else {}
    return found


def thinned(family: str, known: Known, every: int) -> Known:
    """A few of the layers; those that are one in the original layout stay together."""
    found: Known = {}
    for component, layers in known.items():
        spelled = ORIGINAL.get(family, {}) if component == BACKBONE[family] else {}
        groups = {name: spelled.get(name, (name, 0, 1))[0] for name in layers}
        kept = sorted(set(groups.values()))[::every]
        found[component] = {name: one for name, one in layers.items() if groups[name] in kept}
    return found


def adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that get something: all but the projection behind a text encoder."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and name != "text_projection":
            yield name, module


def written(component: str, name: str) -> str:
    """A layer's name in files, where CLIP's has `text_model.` in front whatever the version of transformers."""
    clip = component.startswith("text_encoder") and name.startswith("encoder.layers.")
    return f"text_model.{name}" if clip else name


# ---- names of layers in the original layouts: diffusers' name -> (the original's, which part of it, of how many) ----

Spelled = dict[str, tuple[str, int, int]]
SWAPPED = ("final_layer.adaLN_modulation.1", "joint_blocks.2.context_block.adaLN_modulation.1")
"""Layers with the halves of their outputs the other way round: FLUX, SD3 and the last block of the tiny SD3"""


def fused(original: str, *parts: str) -> Spelled:
    return {part: (original, number, len(parts)) for number, part in enumerate(parts)}


def alone(names: Mapping[str, str]) -> Spelled:
    return {ours: (original, 0, 1) for ours, original in names.items()}


def sdxl_names() -> Spelled:
    blocks = {
        "down_blocks.0.resnets.0": "input_blocks.1.0",
        "down_blocks.1.resnets.0": "input_blocks.3.0",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.resnets.1": "middle_block.2",
        "up_blocks.0.resnets.0": "output_blocks.0.0",
        "up_blocks.0.resnets.1": "output_blocks.1.0",
        "up_blocks.1.resnets.0": "output_blocks.2.0",
        "up_blocks.1.resnets.1": "output_blocks.3.0",
    }
    attentions = {
        ("down_blocks.1.attentions.0", "input_blocks.3.1"),
        ("mid_block.attentions.0", "middle_block.1"),
        ("up_blocks.0.attentions.0", "output_blocks.0.1"),
        ("up_blocks.0.attentions.1", "output_blocks.1.1"),
    }
    in_block = {"conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "conv2": "out_layers.3"}
    in_block["conv_shortcut"] = "skip_connection"
    of_attention = [f"attn{n}.{part}" for n in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")]
    in_attention = [f"transformer_blocks.{n}.{part}" for n in (0, 1) for part in (*of_attention, *FEED_FORWARD)]
    return alone(
        {
            "conv_in": "input_blocks.0.0",
            "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
            "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
            "conv_out": "out.2",
            "time_embedding.linear_1": "time_embed.0",
            "time_embedding.linear_2": "time_embed.2",
            "add_embedding.linear_1": "label_emb.0.0",
            "add_embedding.linear_2": "label_emb.0.2",
            **{f"{new}.{a}": f"{old}.{b}" for new, old in blocks.items() for a, b in in_block.items()},
            **{f"{new}.{a}": f"{old}.{a}" for new, old in attentions for a in ("proj_in", "proj_out", *in_attention)},
        }
    )


FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")


def sd3_names() -> Spelled:
    found = alone(
        {
            "pos_embed.proj": "x_embedder.proj",
            "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
            "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
            "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
            "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
            "context_embedder": "context_embedder",
            "norm_out.linear": "final_layer.adaLN_modulation.1",
            "proj_out": "final_layer.linear",
        }
    )
    for n in range(3):
        ours, image, text = f"transformer_blocks.{n}", f"joint_blocks.{n}.x_block", f"joint_blocks.{n}.context_block"
        for attention in ("attn", "attn2"):
            found |= fused(f"{image}.{attention}.qkv", *(f"{ours}.{attention}.to_{part}" for part in "qkv"))
            found |= alone({f"{ours}.{attention}.to_out.0": f"{image}.{attention}.proj"})
        found |= fused(f"{text}.attn.qkv", *(f"{ours}.attn.add_{part}_proj" for part in "qkv"))
        found |= alone(
            {
                f"{ours}.attn.to_add_out": f"{text}.attn.proj",
                f"{ours}.norm1.linear": f"{image}.adaLN_modulation.1",
                f"{ours}.norm1_context.linear": f"{text}.adaLN_modulation.1",
                f"{ours}.ff.net.0.proj": f"{image}.mlp.fc1",
                f"{ours}.ff.net.2": f"{image}.mlp.fc2",
                f"{ours}.ff_context.net.0.proj": f"{text}.mlp.fc1",
                f"{ours}.ff_context.net.2": f"{text}.mlp.fc2",
            }
        )
    return found


def flux_names() -> Spelled:
    embedders = {"timestep_embedder": "time_in", "text_embedder": "vector_in", "guidance_embedder": "guidance_in"}
    found = alone(
        {
            "x_embedder": "img_in",
            "context_embedder": "txt_in",
            **{f"time_text_embed.{ours}.linear_1": f"{theirs}.in_layer" for ours, theirs in embedders.items()},
            **{f"time_text_embed.{ours}.linear_2": f"{theirs}.out_layer" for ours, theirs in embedders.items()},
            "norm_out.linear": "final_layer.adaLN_modulation.1",
            "proj_out": "final_layer.linear",
        }
    )
    for n in range(2):
        ours, double = f"transformer_blocks.{n}", f"double_blocks.{n}"
        found |= fused(f"{double}.img_attn.qkv", *(f"{ours}.attn.to_{part}" for part in "qkv"))
        found |= fused(f"{double}.txt_attn.qkv", *(f"{ours}.attn.add_{part}_proj" for part in "qkv"))
        found |= alone(
            {
                f"{ours}.attn.to_out.0": f"{double}.img_attn.proj",
                f"{ours}.attn.to_add_out": f"{double}.txt_attn.proj",
                f"{ours}.norm1.linear": f"{double}.img_mod.lin",
                f"{ours}.norm1_context.linear": f"{double}.txt_mod.lin",
                f"{ours}.ff.net.0.proj": f"{double}.img_mlp.0",
                f"{ours}.ff.net.2": f"{double}.img_mlp.2",
                f"{ours}.ff_context.net.0.proj": f"{double}.txt_mlp.0",
                f"{ours}.ff_context.net.2": f"{double}.txt_mlp.2",
            }
        )
        ours, single = f"single_transformer_blocks.{n}", f"single_blocks.{n}"
        found |= fused(f"{single}.linear1", *(f"{ours}.attn.to_{part}" for part in "qkv"), f"{ours}.proj_mlp")
        found |= alone({f"{ours}.proj_out": f"{single}.linear2", f"{ours}.norm.linear": f"{single}.modulation.lin"})
    return found


ORIGINAL: dict[str, Spelled] = {"sdxl": sdxl_names(), "sd3": sd3_names(), "flux-dev": flux_names()}
ORIGINAL["sd3.5"] = ORIGINAL["sd3"]


def halves_turned(tensor: torch.Tensor) -> torch.Tensor:
    half = len(tensor) // 2
    return torch.cat([tensor[half:], tensor[:half]])


def in_original(family: str, layers: Mapping[str, Factors], blocks: bool) -> dict[str, Factors]:
    """Layers by the names of the original layout, those that are one there put together.

    Args:
        family: Of the models.
        layers: By diffusers' names.
        blocks: Whether as blocks, each with terms of its own, of as many times the rank and alpha; else the parts must
            have the first factor in common.
    """
    found: dict[str, Factors] = {}
    groups: dict[str, dict[int, Factors]] = {}
    for name, one in layers.items():
        original, number, _ = ORIGINAL[family][name]
        groups.setdefault(original, {})[number] = one
    for original, parts in groups.items():
        first = parts[0]
        ups = [parts[number].up for number in range(len(parts))]
        if len(parts) == 1:
            up = halves_turned(first.up) if original in SWAPPED else first.up
            found[original] = Factors(first.down, up, first.alpha)
        elif not blocks:
            assert all(torch.equal(part.down, first.down) and part.alpha == first.alpha for part in parts.values())
            found[original] = Factors(first.down, torch.cat(ups), first.alpha)
        else:
            # one alpha for all of them, so what differs from the first one's scale goes into the second factor
            scale = first.alpha / first.rank
            ups = [parts[n].up * (parts[n].alpha / parts[n].rank / scale) for n in range(len(parts))]
            down = torch.cat([parts[number].down for number in range(len(parts))])
            found[original] = Factors(down, torch.block_diag(*ups), scale * len(down))
    return found


# ---- layouts ----

TE, TE_2, TE_3 = "text_encoder", "text_encoder_2", "text_encoder_3"
KOHYA_TEXT = {
    "sd1": {TE: "lora_te"},
    "sd2": {TE: "lora_te"},
    "sdxl": {TE: "lora_te1", TE_2: "lora_te2"},
    "sd3": {TE: "lora_te1", TE_2: "lora_te2", TE_3: "lora_te3"},
    "sd3.5": {TE: "lora_te1", TE_2: "lora_te2", TE_3: "lora_te3"},
    "flux-dev": {TE: "lora_te1", TE_2: "lora_te3"},
}
COMFYUI_TEXT = {
    "sdxl": {TE: "clip_l", TE_2: "clip_g"},
    "sd3": {TE: "clip_l", TE_2: "clip_g", TE_3: "t5xxl"},
    "sd3.5": {TE: "clip_l", TE_2: "clip_g", TE_3: "t5xxl"},
    "flux-dev": {TE: "clip_l", TE_2: "t5xxl"},
}


def with_alpha(key: str, one: Factors) -> Tensors:
    """Kohya's three tensors."""
    alpha = torch.tensor(one.alpha)
    return {f"{key}.lora_down.weight": one.down, f"{key}.lora_up.weight": one.up, f"{key}.alpha": alpha}


def without_alpha(key: str, one: Factors, first: str = "lora_A.weight", second: str = "lora_B.weight") -> Tensors:
    """Two tensors, the scale in the second."""
    return {f"{key}.{first}": one.down, f"{key}.{second}": one.up * (one.alpha / one.rank)}


def flat(name: str) -> str:
    return name.replace(".", "_")


def kohya(family: str, known: Known, blocks: bool = False, backbone: str = "lora_unet") -> Tensors:
    found: Tensors = {}
    for component, layers in known.items():
        prefix = backbone if component == BACKBONE[family] else KOHYA_TEXT[family][component]
        original = component == BACKBONE[family] and family in ORIGINAL
        named = in_original(family, layers, blocks) if original else layers
        for name, one in named.items():
            found |= with_alpha(f"{prefix}_{flat(name)}", one)
    return found


def kohya_blocks(family: str, known: Known) -> Tensors:
    return kohya(family, known, blocks=True)


def comfyui(family: str, known: Known) -> Tensors:
    found: Tensors = {}
    for component, layers in known.items():
        if component == BACKBONE[family]:
            for name, one in in_original(family, layers, blocks=False).items():
                found |= without_alpha(f"diffusion_model.{name}", one)
        else:
            prefix = f"text_encoders.{COMFYUI_TEXT[family][component]}.transformer"
            for name, one in layers.items():
                found |= without_alpha(f"{prefix}.{name}", one)
    return found


def black_forest(family: str, known: Known) -> Tensors:
    """The names of the reference code alone."""
    layers = in_original(family, known["transformer"], blocks=True)
    return {key: value for name, one in layers.items() for key, value in without_alpha(name, one).items()}


def diffusers_names(family: str, known: Known) -> Tensors:
    """As today's scripts save them, without metadata."""
    named = {f"{component}.{name}": one for component, layers in known.items() for name, one in layers.items()}
    return {key: value for name, one in named.items() for key, value in without_alpha(name, one).items()}


def diffusers_names_alpha(family: str, known: Known) -> Tensors:
    """Kohya's tensors by diffusers' names."""
    named = {f"{component}.{name}": one for component, layers in known.items() for name, one in layers.items()}
    return {key: value for name, one in named.items() for key, value in with_alpha(name, one).items()}


def diffusers_before_peft(family: str, known: Known) -> Tensors:
    """Version 0.20: `.lora.down` and, in text encoders, `.lora_linear_layer.down`."""
    found: Tensors = {}
    for component, layers in known.items():
        between = "lora" if component == "unet" else "lora_linear_layer"
        for name, one in layers.items():
            found |= without_alpha(f"{component}.{name}", one, f"{between}.down.weight", f"{between}.up.weight")
    return found


def processors(family: str, known: Known, prefix: str = "unet.") -> Tensors:
    """Versions up to 0.16: adapters belonged to the attentions' processors."""
    found: Tensors = {}
    for component, layers in known.items():
        for name, one in layers.items():
            owner, _, layer = name.removesuffix(".0").rpartition(".")
            layer = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}.get(layer, layer)
            key = f"{prefix}{owner}.processor" if component == "unet" else f"{component}.{owner}"
            found |= without_alpha(key, one, f"{layer}_lora.down.weight", f"{layer}_lora.up.weight")
    return found


def processors_alone(family: str, known: Known) -> Tensors:
    """The very first files, of a U-Net only."""
    return processors(family, known, prefix="")


def xlabs(family: str, known: Known) -> Tensors:
    """Attentions of FLUX; a single block's `linear1` without the part of the MLP."""
    places = {"img_attn.qkv": "qkv_lora1", "img_attn.proj": "proj_lora1", "linear1": "qkv_lora", "linear2": "proj_lora"}
    places |= {"txt_attn.qkv": "qkv_lora2", "txt_attn.proj": "proj_lora2"}
    found: Tensors = {}
    for name, one in in_original(family, known["transformer"], blocks=False).items():
        kind, number, layer = name.split(".", 2)
        found |= without_alpha(f"{kind}.{number}.processor.{places[layer]}", one, "down.weight", "up.weight")
    return found


def one_trainer(family: str, known: Known) -> Tensors:
    """diffusers' names with underscores, for transformers behind `lora_transformer`."""
    prefixes = {**KOHYA_TEXT[family], "unet": "lora_unet", "transformer": "lora_transformer"}
    prefixes |= {"text_encoder_2": "lora_te2"} if family == "flux-dev" else {}
    found: Tensors = {}
    for component, layers in known.items():
        for name, one in layers.items():
            found |= with_alpha(f"{prefixes[component]}_{flat(name)}", one)
    return found


def simple_tuner(family: str, known: Known) -> Tensors:
    """LyCORIS wrapped around the backbone."""
    layers = known[BACKBONE[family]]
    return {key: v for name, one in layers.items() for key, v in with_alpha(f"lycoris_{flat(name)}", one).items()}


@dataclass(frozen=True)
class Layout:
    """How some program writes an adapter."""

    write: Callable[[str, Known], Tensors]
    families: tuple[str, ...]
    layers: str = ".*"
    """Pattern of the names of layers that it can have"""
    text: bool = True
    """Whether text encoders too"""
    shared: bool = False
    """Whether layers that are one in the original layout must have the first factor in common"""


ALL = (*U_NETS, *MMDITS)
ATTENTIONS = r".*(attn\d?\.(to_[qkv]|to_out\.0)|self_attn\.(\w+_proj))"
FLUX_ATTENTIONS = r"(single_)?transformer_blocks\.\d+\.(attn\..*|proj_out)"
LAYOUTS = {
    "diffusers": Layout(diffusers_names, ALL),
    "diffusers with kohya's tensors": Layout(diffusers_names_alpha, ALL),
    "diffusers 0.20": Layout(diffusers_before_peft, U_NETS),
    "diffusers 0.16": Layout(processors, U_NETS, layers=ATTENTIONS),
    "diffusers 0.15": Layout(processors_alone, ("sd1",), layers=ATTENTIONS, text=False),
    "kohya": Layout(kohya, ALL, shared=True),
    "kohya, blocks": Layout(kohya_blocks, MMDITS),
    "ComfyUI": Layout(comfyui, ("sdxl", *MMDITS), shared=True),
    "Black Forest Labs": Layout(black_forest, ("flux-dev",), text=False),
    "XLabs": Layout(xlabs, ("flux-dev",), layers=FLUX_ATTENTIONS, text=False, shared=True),
    "OneTrainer": Layout(one_trainer, ALL),
    "SimpleTuner": Layout(simple_tuner, ALL, text=False),
}


# ---- kinds of adapters: the tensors of a layer by what their keys end with, and what they add to its weight ----


@dataclass(frozen=True)
class Layer:
    """What a kind of adapter has for one layer."""

    tensors: Tensors
    delta: torch.Tensor
    """float64, in the shape of the weight"""


Kind = Callable[[torch.Tensor, torch.Generator], Layer | None]
"""Of the layer's weight; `None` where the kind has nothing for such a layer"""
ALPHA, RANK = 1.5, 2
SCALE = ALPHA / RANK


def lora(weight: torch.Tensor, generator: torch.Generator) -> Layer:
    out, *inputs = weight.shape
    one = Factors(drawn(generator, RANK, *inputs), drawn(generator, out, RANK, *[1] * len(inputs[1:])), ALPHA)
    return Layer({ending.removeprefix("."): value for ending, value in with_alpha("", one).items()}, one.delta())


def locon_tucker(weight: torch.Tensor, generator: torch.Generator) -> Layer | None:
    """down is 1x1, the kernel stands between; the ranks of its sides may differ."""
    if weight.ndim == 2 or weight.shape[2] == 1:
        return None
    out, inputs, *sides = weight.shape
    up, down = drawn(generator, out, RANK, 1, 1), drawn(generator, 3, inputs, 1, 1)
    middle = drawn(generator, RANK, 3, *sides)
    delta = torch.zeros(weight.shape, dtype=torch.float64)
    for i in range(RANK):
        for j in range(3):
            outer = up[:, i, 0, 0].double()[:, None] * down[j, :, 0, 0].double()
            delta += outer[:, :, None, None] * middle[i, j].double()
    tensors = {"lora_up.weight": up, "lora_down.weight": down, "lora_mid.weight": middle, "alpha": torch.tensor(ALPHA)}
    return Layer(tensors, delta * SCALE)


def loha(weight: torch.Tensor, generator: torch.Generator, rank: int = RANK) -> Layer:
    out, inputs = len(weight), weight[0].numel()
    found = {
        f"hada_w{n}_{side}": drawn(generator, *shape)
        for n in (1, 2)
        for side, shape in (("a", (out, rank)), ("b", (rank, inputs)))
    }
    first, second = (found[f"hada_w{n}_a"].double() @ found[f"hada_w{n}_b"].double() for n in (1, 2))
    delta = ALPHA / rank * first * second
    return Layer({**found, "alpha": torch.tensor(ALPHA)}, delta.reshape(weight.shape))


def loha_high(weight: torch.Tensor, generator: torch.Generator) -> Layer:
    """Of so high a rank that the product has more terms than the layer."""
    return loha(weight, generator, rank=5)


def loha_tucker(weight: torch.Tensor, generator: torch.Generator) -> Layer | None:
    """The first side of each kernel belongs to the outputs, the second to the inputs."""
    if weight.ndim == 2 or weight.shape[2] == 1:
        return None
    out, inputs, *sides = weight.shape
    found: Tensors = {"alpha": torch.tensor(ALPHA)}
    delta = torch.full(weight.shape, SCALE, dtype=torch.float64)
    for n in (1, 2):
        t, a, b = drawn(generator, RANK, RANK, *sides), drawn(generator, RANK, out), drawn(generator, RANK, inputs)
        found |= {f"hada_t{n}": t, f"hada_w{n}_a": a, f"hada_w{n}_b": b}
        made = torch.zeros(weight.shape, dtype=torch.float64)
        for i in range(RANK):
            for j in range(RANK):
                made += (a[i].double()[:, None] * b[j].double())[:, :, None, None] * t[i, j].double()
        delta *= made
    return Layer(found, delta)


def lokr(weight: torch.Tensor, generator: torch.Generator, first: str = "whole", second: str = "whole") -> Layer | None:
    """Sides are cut in two; `first` and `second` say whether a matrix is whole, factored or Tucker's."""
    out, inputs, *sides = weight.shape
    if second == "tucker" and (not sides or sides[0] == 1):
        return None
    found: Tensors = {"alpha": torch.tensor(ALPHA)}
    if first == "whole":
        one = found["lokr_w1"] = drawn(generator, 2, 2)
    else:
        found |= {"lokr_w1_a": drawn(generator, 2, RANK), "lokr_w1_b": drawn(generator, RANK, 2)}
        one = found["lokr_w1_a"].double() @ found["lokr_w1_b"].double()
    out, inputs = out // 2, inputs // 2
    if second == "whole":
        two = found["lokr_w2"] = drawn(generator, out, inputs, *sides)
    elif second == "factored":
        area = weight[0, 0].numel()
        found |= {"lokr_w2_a": drawn(generator, out, RANK), "lokr_w2_b": drawn(generator, RANK, inputs * area)}
        two = (found["lokr_w2_a"].double() @ found["lokr_w2_b"].double()).reshape(out, inputs, *sides)
    else:
        found |= {"lokr_w2_a": drawn(generator, RANK, out), "lokr_w2_b": drawn(generator, RANK, inputs)}
        t = found["lokr_t2"] = drawn(generator, RANK, RANK, *sides)
        a, b = found["lokr_w2_a"].double(), found["lokr_w2_b"].double()
        two = torch.zeros(out, inputs, *sides, dtype=torch.float64)
        for i in range(RANK):
            for j in range(RANK):
                two += (a[i][:, None] * b[j])[:, :, None, None] * t[i, j].double()
    scale = 1.0 if first == second == "whole" else SCALE  # LyCORIS does not scale where there is no rank
    kron = torch.kron(one.double().reshape(2, 2, *[1] * len(sides)), two.double())
    return Layer(found, scale * kron)


def full(weight: torch.Tensor, generator: torch.Generator) -> Layer:
    difference = drawn(generator, *weight.shape)
    return Layer({"diff": difference}, difference.double())


def decomposed(kind: Kind, inputs: bool) -> Kind:
    """DoRA, W + dW with the norms of its rows, or of its columns (`inputs`), set to learned ones."""

    def made(weight: torch.Tensor, generator: torch.Generator) -> Layer | None:
        plain = kind(weight, generator)
        if plain is None:
            return None
        new = weight.double() + plain.delta
        sides = [side for side in range(weight.ndim) if side != (1 if inputs else 0)]
        norm = new.pow(2).sum(dim=sides, keepdim=True).sqrt()
        scale = (norm * (1 + 0.3 * torch.rand(norm.shape, generator=generator))).float()
        return Layer({**plain.tensors, "dora_scale": scale}, new / norm * scale.double() - weight.double())

    return made


def named(kind: Callable[..., Layer | None], **options: Any) -> Kind:
    return lambda weight, generator: kind(weight, generator, **options)


KINDS: dict[str, Kind] = {
    "LoRA": lora,
    "LoCon with a kernel between": locon_tucker,
    "LoHa": loha,
    "LoHa of a high rank": loha_high,
    "LoHa, Tucker": loha_tucker,
    "LoKr, whole": lokr,
    "LoKr, second factored": named(lokr, second="factored"),
    "LoKr, first factored": named(lokr, first="factored"),
    "LoKr, both factored": named(lokr, first="factored", second="factored"),
    "LoKr, Tucker": named(lokr, second="tucker"),
    "full": full,
    "DoRA of the outputs": decomposed(lora, inputs=False),
    "DoRA of the inputs": decomposed(lora, inputs=True),
    "DoRA of the inputs, LoHa": decomposed(loha, inputs=True),
    "DoRA of the outputs, LoKr": decomposed(named(lokr, second="factored"), inputs=False),
}


@dataclass
class File:
    """A file of some kind, and what it comes to by the models' own names."""

    tensors: Tensors = field(default_factory=dict)
    deltas: dict[str, Tensors] = field(default_factory=dict)
    biases: dict[str, Tensors] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """A layer of an original layout, or of a text encoder."""

    component: str
    name: str
    parts: dict[str, Any]
    """The layers that it is in the model, by their names there, in their order"""
    turned: bool

    def kohya(self, family: str) -> str:
        prefix = "lora_unet" if self.component == BACKBONE[family] else KOHYA_TEXT[family][self.component]
        return f"{prefix}_{flat(written(self.component, self.name))}"

    def comfyui(self, family: str) -> str:
        if self.component == BACKBONE[family]:
            return f"diffusion_model.{self.name}"
        return f"text_encoders.{COMFYUI_TEXT[family][self.component]}.transformer.{written(self.component, self.name)}"

    def turn(self, tensor: torch.Tensor) -> torch.Tensor:
        """From the order of the model's outputs to the layout's, and back."""
        return halves_turned(tensor) if self.turned else tensor

    def cut(self, tensor: torch.Tensor) -> Tensors:
        """What belongs to each layer of the model."""
        sizes = [len(module.weight) for module in self.parts.values()]
        return dict(zip(self.parts, self.turn(tensor).split(sizes), strict=True))


def places(family: str, models: Mapping[str, nn.Module]) -> Iterator[Place]:
    """The layers of some models as kohya has them; the U-Nets of SD 1 and 2 by diffusers' names."""
    for component, model in models.items():
        backbone = component == BACKBONE[family]
        layers = dict(adapted(model))
        spelled = ORIGINAL[family] if backbone and family in ORIGINAL else alone({name: name for name in layers})
        groups: dict[str, dict[str, Any]] = {}
        for name in sorted(layers, key=lambda name: spelled[name][1]):
            groups.setdefault(spelled[name][0], {})[name] = layers[name]
        for original, parts in groups.items():
            yield Place(component, original, parts, backbone and original in SWAPPED)


def of_kind(kind: Kind, family: str, models: Mapping[str, nn.Module], every: int = 1, bias: bool = False) -> File:
    """Layers of some models with a kind of adapter, by kohya's names.

    Args:
        kind: Which.
        family: Of the models.
        models: By component.
        every: Which layer is the next to have one.
        bias: Whether with differences of biases.
    """
    file, generator = File(), torch.Generator().manual_seed(0)
    for place in list(places(family, models))[::every]:
        layers = place.parts.values()
        made = kind(place.turn(torch.cat([layer.weight.detach() for layer in layers])), generator)
        if made is None:
            continue
        key = place.kohya(family)
        file.tensors |= {f"{key}.{ending}": value for ending, value in made.tensors.items()}
        file.deltas.setdefault(place.component, {}).update(place.cut(made.delta))
        if bias and all(layer.bias is not None for layer in layers):
            difference = file.tensors[f"{key}.diff_b"] = drawn(generator, sum(len(layer.weight) for layer in layers))
            file.biases.setdefault(place.component, {}).update(place.cut(difference.double()))
    return file


def deltas_in(tensors: Tensors, layout: str, family: str, models: Mapping[str, nn.Module]) -> dict[str, Tensors]:
    """What a file of LoRA adds as kohya's scripts or ComfyUI understand it, by the models' own names.

    Args:
        tensors: Of the file; all must be for some layer.
        layout: `kohya` or `comfyui`.
        family: Of the models.
        models: By component.
    """
    rest = dict(tensors)
    found: dict[str, Tensors] = {}
    for place in places(family, models):
        key = getattr(place, layout)(family)
        first, second = ("lora_down", "lora_up") if layout == "kohya" else ("lora_A", "lora_B")
        if f"{key}.{first}.weight" not in rest:
            continue
        down, up = rest.pop(f"{key}.{first}.weight"), rest.pop(f"{key}.{second}.weight")
        alpha = float(rest.pop(f"{key}.alpha")) if layout == "kohya" else float(len(down))
        found.setdefault(place.component, {}).update(place.cut(Factors(down, up, alpha).delta()))
    assert not rest, sorted(rest)
    return found
