"""ControlNets of Stable Diffusion 1.x, 2.x and XL in the layout of their first code (lllyasviel's, 2302.05543).

The encoder half is named as in CompVis' latent-diffusion (`ldm_unet.py`), with all keys under `control_model.` or under
nothing. Networks alone in a file in diffusers' layout tell their config, too.
"""

from collections.abc import Mapping
from typing import Any

from hubgen.formats.headers import Shapes, TensorHeader
from hubgen.formats.key_maps import Rule
from hubgen.formats.ldm_unet import added_config, encoder_config, levels_down, transformer_layers
from hubgen.formats.ldm_unet import key_map as unet_key_map

TEXT_WIDTHS = {True: 2048, False: 768}
"""Of XL and of 1.x, for a network without attention, which sees no text"""


def key_map(config: Mapping[str, Any]) -> list[Rule]:
    """The map of a ControlNet with our config."""
    hint, ours = "input_hint_block", "controlnet_cond_embedding"
    between = 2 * (len(config["conditioning_embedding_out_channels"]) - 1)
    table = unet_key_map(config)
    table += [Rule(f"{hint}.0", (f"{ours}.conv_in",)), Rule(f"{hint}.{2 * between + 2}", (f"{ours}.conv_out",))]
    table += [Rule(f"{hint}.{2 * i + 2}", (f"{ours}.blocks.{i}",)) for i in range(between)]
    levels, layers = len(config["down_block_types"]), config["layers_per_block"]
    maps = levels + (layers * levels if isinstance(layers, int) else sum(layers))  # the last level is not halved
    table += [Rule(f"zero_convs.{i}.0", (f"controlnet_down_blocks.{i}",)) for i in range(maps)]
    return [*table, Rule("middle_block_out.0", ("controlnet_mid_block",))]


def infer_config(tensors: Mapping[str, TensorHeader]) -> dict[str, Any]:
    """Our config of a file's ControlNet, from its keys and shapes; what they do not tell is as in `ldm_unet`.

    Args:
        tensors: The file's, without `control_model.`.

    Raises:
        ValueError: A key is missing, or the levels are not those of such a network.
    """
    shape = Shapes("ControlNet", tensors)
    middle = transformer_layers(shape, "middle_block.1")
    block = first(tensors, "input_blocks.", "middle_block.")
    hints = [name for name in (f"input_hint_block.{4 * i}.weight" for i in range(len(tensors))) if name in tensors]
    return {
        "in_channels": shape("input_blocks.0.0.weight")[1],
        **encoder_config(*levels_down(shape), middle, *of_text(shape, block, "label_emb.0.0.weight")),
        **added_config(shape, "label_emb.0.0.weight"),
        **middle_config(middle),
        "conditioning_channels": shape("input_hint_block.0.weight")[1],
        "conditioning_embedding_out_channels": [shape(name)[0] for name in hints],
    }


def infer_own_config(tensors: Mapping[str, TensorHeader]) -> dict[str, Any] | None:
    """The same for a file in diffusers' layout; `None` for another network. A union's is told, too."""
    if "controlnet_cond_embedding.conv_in.weight" not in tensors:
        return None
    shape, added, hint = Shapes("ControlNet", tensors), "add_embedding.linear_1.weight", "controlnet_cond_embedding"
    levels, widths = [], []
    for i in range(shape.count("down_blocks.{}.resnets.0.conv1.weight")):
        layers = shape.count(f"down_blocks.{i}.resnets.{{}}.conv1.weight")
        levels.append([transformer_layers(shape, f"down_blocks.{i}.attentions.{j}") for j in range(layers)])
        widths.append(shape(f"down_blocks.{i}.resnets.0.conv1.weight")[0])
    if not levels:
        raise ValueError("no such ControlNet: it has no levels")
    middle = transformer_layers(shape, "mid_block.attentions.0")
    block = first(tensors, "down_blocks.", "mid_block.")
    hint_layers = range(1, shape.count(f"{hint}.blocks.{{}}.weight"), 2)
    hint_widths = [shape(f"{hint}.conv_in.weight")[0], *(shape(f"{hint}.blocks.{i}.weight")[0] for i in hint_layers)]
    return {
        "in_channels": shape("conv_in.weight")[1],
        **encoder_config(levels, widths, middle, *of_text(shape, block, added)),
        **added_config(shape, added),
        "conditioning_channels": shape(f"{hint}.conv_in.weight")[1],
        "conditioning_embedding_out_channels": hint_widths,
        **(union_config(shape) if "task_embedding" in tensors else middle_config(middle)),
    }


def union_config(shape: Shapes) -> dict[str, Any]:
    """What only a union has; its transformer's heads are 8 in all that were published."""
    types, width = shape("task_embedding")
    return {
        "num_control_type": types,
        "num_trans_channel": width,
        "num_trans_layer": shape.count("transformer_layes.{}.ln_1.weight"),
        "num_proj_channel": shape("spatial_ch_projs.weight")[0],
        "addition_time_embed_dim": shape("control_add_embedding.linear_1.weight")[1] // types,
    }


def middle_config(layers: int) -> dict[str, Any]:
    """The middle's type, told by its transformer layers."""
    return {"mid_block_type": "UNetMidBlock2DCrossAttn" if layers else "UNetMidBlock2D"}


def first(tensors: Mapping[str, TensorHeader], *prefixes: str) -> str | None:
    """Name of some spatial transformer below these prefixes."""
    ending = ".proj_in.weight"
    found = (name.removesuffix(ending) for name in tensors if name.endswith(ending) and name.startswith(prefixes))
    return next(found, None)


def of_text(shape: Shapes, transformer: str | None, added: str) -> tuple[int, bool]:
    """Features of a text token, and whether transformers are linear at their ends."""
    if transformer is None:
        return TEXT_WIDTHS[added in shape.tensors], added in shape.tensors
    width = shape(f"{transformer}.transformer_blocks.0.attn2.to_k.weight")[1]
    return width, len(shape(f"{transformer}.proj_in.weight")) == 2
