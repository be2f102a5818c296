"""The U-Net of Stable Diffusion 1.x, 2.x, XL and XL's refiner in the layout of CompVis' latent-diffusion.

The original numbers all blocks of a half in one row (`input_blocks.N.M`: M is 0 for the residual block, 1 for the
attention, and the last for the upsampling); ours numbers levels, and residual blocks and attentions within a level.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hubgen.formats.headers import Shapes, TensorHeader
from hubgen.formats.key_maps import Line, Rule, rules

OUTSIDE: tuple[Line, ...] = (
    ("time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embedding.linear_2"),
    ("input_blocks.0.0", "conv_in"),
    ("out.0", "conv_norm_out"),
    ("out.2", "conv_out"),
)
ADDED: tuple[Line, ...] = (  # pooled text and sizes (SDXL), or an image's embedding (unCLIP)
    ("label_emb.0.0", "{name}.linear_1"),
    ("label_emb.0.2", "{name}.linear_2"),
)
RESNET: tuple[Line, ...] = (
    ("{old}.in_layers.0", "{new}.norm1"),
    ("{old}.in_layers.2", "{new}.conv1"),
    ("{old}.emb_layers.1", "{new}.time_emb_proj"),
    ("{old}.out_layers.0", "{new}.norm2"),
    ("{old}.out_layers.3", "{new}.conv2"),
    ("{old}.skip_connection", "{new}.conv_shortcut"),
)
ATTENTION: tuple[Line, ...] = (("{old}", "{new}"),)  # all names within are the same
DOWNSAMPLE: tuple[Line, ...] = (("{old}.op", "{new}.conv"),)
UPSAMPLE: tuple[Line, ...] = (("{old}.conv", "{new}.conv"),)

HEAD_WIDTH = 64  # from Stable Diffusion 2 on; 1.x has 8 heads at every level
SAMPLE_SIZES = {768: 64, 1024: 96, 2048: 128, 1280: 128}  # text width -> latents per side in training
TIME_ID_WIDTH = 256


def key_map(config: Mapping[str, Any]) -> list[Rule]:
    """The map of a U-Net with our config."""
    table = rules(OUTSIDE)
    if config.get("addition_embed_type") == "text_time":
        table += rules(ADDED, name="add_embedding")
    if config.get("class_embed_type") in ("timestep", "projection"):
        table += rules(ADDED, name="class_embedding")
    elif config.get("num_class_embeds") is not None:
        table += [Rule("label_emb", ("class_embedding",))]
    for lines, old, new in blocks(config):
        table += rules(lines, old=old, new=new)
    return table


def blocks(config: Mapping[str, Any]) -> Iterator[tuple[tuple[Line, ...], str, str]]:
    """(kind, the original's name, ours) of every residual block, attention and resampling."""
    down, up = config["down_block_types"], config.get("up_block_types", ())  # a ControlNet has no way up
    layers = config.get("layers_per_block", 2)
    layers = [layers] * len(down) if isinstance(layers, int) else list(layers)
    number = 1
    for level, kind in enumerate(down):
        for layer in range(layers[level]):
            yield RESNET, f"input_blocks.{number}.0", f"down_blocks.{level}.resnets.{layer}"
            if "Attn" in kind:
                yield ATTENTION, f"input_blocks.{number}.1", f"down_blocks.{level}.attentions.{layer}"
            number += 1
        if level < len(down) - 1:
            yield DOWNSAMPLE, f"input_blocks.{number}.0", f"down_blocks.{level}.downsamplers.0"
            number += 1
    yield RESNET, "middle_block.0", "mid_block.resnets.0"
    yield ATTENTION, "middle_block.1", "mid_block.attentions.0"
    yield RESNET, "middle_block.2", "mid_block.resnets.1"
    number = 0
    for level, kind in enumerate(up):
        for layer in range(layers[-1 - level] + 1):
            yield RESNET, f"output_blocks.{number}.0", f"up_blocks.{level}.resnets.{layer}"
            if "Attn" in kind:
                yield ATTENTION, f"output_blocks.{number}.1", f"up_blocks.{level}.attentions.{layer}"
            number += 1
        if level < len(up) - 1:
            last = 2 if "Attn" in kind else 1
            yield UPSAMPLE, f"output_blocks.{number - 1}.{last}", f"up_blocks.{level}.upsamplers.0"


def infer_config(tensors: Mapping[str, TensorHeader]) -> dict[str, Any]:
    """Our config of a file's U-Net, from its keys and shapes.

    Two things leave no trace there and are taken from the families: the number of attention heads (8 in 1.x, one for 64
    features where projections are linear: 2.x, XL), and the size of training pictures.

    Args:
        tensors: The file's, without `model.diffusion_model.`.

    Raises:
        ValueError: A key is missing, or the levels are not those of such a U-Net.
    """
    shape = Shapes("U-Net", tensors)
    middle = transformer_layers(shape, "middle_block.1")
    if not middle:
        raise ValueError("no such U-Net: its middle has no attention")
    text_width = shape("middle_block.1.transformer_blocks.0.attn2.to_k.weight")[1]
    linear = len(shape("middle_block.1.proj_in.weight")) == 2
    encoder = encoder_config(*levels_down(shape), middle, text_width, linear)
    up = [kind.replace("Down", "Up") for kind in reversed(encoder["down_block_types"])]
    return {
        "sample_size": SAMPLE_SIZES.get(text_width, 64),
        "in_channels": shape("input_blocks.0.0.weight")[1],
        "out_channels": shape("out.2.weight")[0],
        "up_block_types": up,
        **encoder,
        **added_config(shape, "label_emb.0.0.weight"),
    }


def transformer_layers(shape: Shapes, name: str) -> int:
    """How many layers the attention at `name` has; 0 where there is none."""
    return shape.count(name + ".transformer_blocks.{}.norm1.weight")


def levels_down(shape: Shapes) -> tuple[list[list[int]], list[int]]:
    """Of each level of the way down, the transformer layers behind each residual block, and the channels."""
    levels: list[list[int]] = [[]]
    widths: list[int] = []
    number = 1
    while True:
        name = f"input_blocks.{number}"
        if f"{name}.0.op.weight" in shape.tensors:
            levels.append([])
        elif f"{name}.0.in_layers.2.weight" in shape.tensors:
            if not levels[-1]:
                widths.append(shape(f"{name}.0.in_layers.2.weight")[0])
            levels[-1].append(transformer_layers(shape, f"{name}.1"))
        else:
            return levels, widths
        number += 1


def encoder_config(
    levels: Sequence[Sequence[int]], widths: Sequence[int], middle: int, text_width: int, linear: bool
) -> dict[str, Any]:
    """The part of our config that a U-Net shares with its ControlNets.

    Args:
        levels: Of each level of the way down, the transformer layers behind each residual block.
        widths: Channels of each level.
        middle: Transformer layers of the middle; 0 where it has no attention.
        text_width: Features of a text token.
        linear: Whether transformers begin and end with linear layers.

    Raises:
        ValueError: The levels are not those of such a U-Net.
    """
    if any(len(set(level)) != 1 for level in levels) or len({len(level) for level in levels}) != 1:
        raise ValueError(f"no such U-Net: its levels have {[list(level) for level in levels]} attention layers")
    depths = [level[0] for level in levels]
    # what stands for a level without attention is read by nobody, but for the last one's: it is the middle's depth
    filled = [depth or ((middle or 1) if i == len(depths) - 1 else 1) for i, depth in enumerate(depths)]
    if middle and middle != filled[-1]:
        raise ValueError(f"no such U-Net: {middle} attention layers in its middle, {filled[-1]} in the level above")
    return {
        "down_block_types": [f"{'CrossAttn' if depth else ''}DownBlock2D" for depth in depths],
        "block_out_channels": list(widths),
        "layers_per_block": len(levels[0]),
        "transformer_layers_per_block": 1 if set(filled) == {1} else filled,
        "cross_attention_dim": text_width,
        "attention_head_dim": [max(width // HEAD_WIDTH, 1) for width in widths] if linear else 8,
        "use_linear_projection": linear,
    }


def added_config(shape: Shapes, name: str) -> dict[str, Any]:
    """The part of our config about pooled text and sizes, if there is a layer `name` that sees them."""
    if name not in shape.tensors:
        return {}
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": TIME_ID_WIDTH,
        "projection_class_embeddings_input_dim": shape(name)[1],
    }
