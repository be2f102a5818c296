"""ControlNets of FLUX.1 in the layout of XLabs' code (x-flux); those in diffusers' layout tell their config, too.

XLabs name embedders and blocks as Black Forest Labs do (`flux_layout.py`), and number the layers of the network that
embeds pixels. A network without it, of latents, is written in the same layout.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hubgen.formats import flux_layout
from hubgen.formats.flux_layout import ROTARY_SIXTEENTHS
from hubgen.formats.headers import Shapes, TensorHeader
from hubgen.formats.key_maps import Line, Rule, rules

OWN: tuple[Line, ...] = (
    ("pos_embed_input", "controlnet_x_embedder"),
    ("controlnet_blocks", "controlnet_blocks"),
    ("controlnet_single_blocks", "controlnet_single_blocks"),
    ("controlnet_mode_embedder", "controlnet_mode_embedder"),
    ("input_hint_block.0", "input_hint_block.conv_in"),
    *((f"input_hint_block.{2 * i + 2}", f"input_hint_block.blocks.{i}") for i in range(6)),
    ("input_hint_block.14", "input_hint_block.conv_out"),
)
"""What a network has that its base has not"""


def key_map(config: Mapping[str, Any]) -> list[Rule]:
    """The map of a network with our config."""
    return [*flux_layout.key_map(config), *rules(OWN)]


@dataclass(frozen=True)
class Names:
    """Tensors that tell a network's config, as a layout calls them; `{}` stands for the number of a block."""

    image: str
    text: str
    pooled: str
    guidance: str
    double: str
    """The norm of queries in a double block"""
    single: str
    """The same in a single block"""
    hint: str
    """The last layer of the network that embeds pixels"""


XLABS = Names(
    image="img_in.weight",
    text="txt_in.weight",
    pooled="vector_in.in_layer.weight",
    guidance="guidance_in.in_layer.weight",
    double="double_blocks.{}.img_attn.norm.query_norm.scale",
    single="single_blocks.{}.norm.query_norm.scale",
    hint="input_hint_block.14.weight",
)
DIFFUSERS = Names(
    image="x_embedder.weight",
    text="context_embedder.weight",
    pooled="time_text_embed.text_embedder.linear_1.weight",
    guidance="time_text_embed.guidance_embedder.linear_1.weight",
    double="transformer_blocks.{}.attn.norm_q.weight",
    single="single_transformer_blocks.{}.attn.norm_q.weight",
    hint="input_hint_block.conv_out.weight",
)


def infer_config(tensors: Mapping[str, TensorHeader], names: Names = XLABS) -> dict[str, Any]:
    """Our config of a file's network, from its keys and shapes.

    Args:
        tensors: The file's.
        names: What its layout calls those that matter.

    Raises:
        ValueError: A key is missing.
    """
    shape = Shapes("ControlNet", tensors)
    width, in_channels = shape(names.image)
    double, single = shape.count(names.double), shape.count(names.single)
    (head_width,) = shape((names.double if double else names.single).format(0))
    embedded = shape(names.hint)[0] if names.hint in tensors else None
    mode = "controlnet_mode_embedder.weight"
    return {
        "patch_size": 1 if embedded is None else math.isqrt(in_channels // max(embedded, 1)),
        "in_channels": in_channels,
        "num_layers": double,
        "num_single_layers": single,
        "attention_head_dim": head_width,
        "num_attention_heads": max(width // max(head_width, 1), 1),
        "joint_attention_dim": shape(names.text)[1],
        "pooled_projection_dim": shape(names.pooled)[1],
        "guidance_embeds": names.guidance in tensors,
        "axes_dims_rope": [head_width * share // 16 for share in ROTARY_SIXTEENTHS],
        "num_mode": shape(mode)[0] if mode in tensors else None,
        "conditioning_embedding_channels": embedded,
    }


def infer_own_config(tensors: Mapping[str, TensorHeader]) -> dict[str, Any] | None:
    """The same for a file in diffusers' layout; `None` for another network."""
    return infer_config(tensors, DIFFUSERS) if "controlnet_x_embedder.weight" in tensors else None
