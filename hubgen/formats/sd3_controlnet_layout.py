"""Stability AI's ControlNets for Stable Diffusion 3.5 large in their own layout; other networks tell their config, too.

The layout is diffusers' but for the inside of the blocks, where queries, keys and values are one layer. One more number
in these files, `control_type`, says which hint a network was made for: 0 a blurred picture, 1 edges, 2 depths. It goes
into the config as `_control_type` (`hubgen.formats.markers`).
"""

import math
from collections.abc import Mapping
from typing import Any

from hubgen.formats.headers import Shapes, TensorHeader
from hubgen.formats.key_maps import QKV, Line, Rule, rules
from hubgen.formats.sd3_layout import HEAD_WIDTH, SAMPLE_SIZE

OUTSIDE: tuple[Line, ...] = tuple(
    (name, name) for name in ("time_text_embed", "pos_embed_input.proj", "controlnet_blocks")
)
BLOCK: tuple[Line, ...] = (
    ("{block}.adaLN_modulation.1", "{block}.norm1.linear"),
    ("{block}.attn.qkv", ("{block}.attn.to_q", "{block}.attn.to_k", "{block}.attn.to_v"), QKV),
    ("{block}.attn.proj", "{block}.attn.to_out.0"),
    ("{block}.mlp.fc1", "{block}.ff.net.0.proj"),
    ("{block}.mlp.fc2", "{block}.ff.net.2"),
)


def key_map(config: Mapping[str, Any]) -> list[Rule]:
    """The map of a network with our config.

    Raises:
        ValueError: The layout has no place for such a network.
    """
    if config["joint_attention_dim"] is not None or config["use_pos_embed"]:
        raise ValueError(
            f"`joint_attention_dim`: got {config['joint_attention_dim']}, expected None, and `use_pos_embed`: got "
            f"{config['use_pos_embed']}, expected False: networks that see text have no layout but diffusers'."
        )
    table = rules(OUTSIDE)
    for i in range(config["num_layers"]):
        table += rules(BLOCK, block=f"transformer_blocks.{i}")
    return table


def infer_config(tensors: Mapping[str, TensorHeader]) -> dict[str, Any]:
    """Our config of a file's network in Stability's layout, from its keys and shapes.

    Raises:
        ValueError: A key is missing.
    """
    shape = Shapes("ControlNet", tensors)
    return {**sizes(shape), "num_layers": shape.count("transformer_blocks.{}.attn.qkv.weight")}


def infer_own_config(tensors: Mapping[str, TensorHeader]) -> dict[str, Any] | None:
    """The same for a file in diffusers' layout; `None` for another network.

    Not to be seen are the size of latents that the positions are scaled for, the heads of a network without norms of
    queries and keys (of 64 features in all that were published), and `force_zeros_for_pooled_projection`, which is
    true for networks with text.
    """
    if "pos_embed_input.proj.weight" not in tensors:
        return None
    shape = Shapes("ControlNet", tensors)
    layers = shape.count("transformer_blocks.{}.attn.to_q.weight")
    config = {**sizes(shape), "num_layers": layers}
    norm = "transformer_blocks.0.attn.norm_q.weight"
    if norm in tensors:
        head_width = shape(norm)[0]
        width = shape("pos_embed_input.proj.weight")[0]
        config |= {
            "qk_norm": "rms_norm",
            "attention_head_dim": head_width,
            "num_attention_heads": max(width // head_width, 1),
        }
    dual = [i for i in range(layers) if f"transformer_blocks.{i}.attn2.to_q.weight" in tensors]
    return {**config, "dual_attention_layers": dual}


def sizes(shape: Shapes) -> dict[str, Any]:
    """What is outside the blocks, in either layout."""
    width, hint_channels, patch, _ = shape("pos_embed_input.proj.weight")
    head_width = min(HEAD_WIDTH, width)
    config: dict[str, Any] = {
        "sample_size": SAMPLE_SIZE,
        "patch_size": patch,
        "attention_head_dim": head_width,
        "num_attention_heads": max(width // head_width, 1),
        "pooled_projection_dim": shape("time_text_embed.text_embedder.linear_1.weight")[1],
    }
    in_channels, embedded = hint_channels, "pos_embed.proj.weight" in shape.tensors
    if embedded:
        in_channels = shape("pos_embed.proj.weight")[1]
    table = "pos_embed.pos_embed" in shape.tensors
    with_text = "context_embedder.weight" in shape.tensors
    return {
        **config,
        "in_channels": in_channels,
        "out_channels": in_channels,
        "extra_conditioning_channels": hint_channels - in_channels,
        "use_pos_embed": embedded,
        "pos_embed_type": "sincos" if embedded else None,
        "pos_embed_max_size": math.isqrt(shape("pos_embed.pos_embed")[1]) if table else None,
        "joint_attention_dim": shape("context_embedder.weight")[1] if with_text else None,
        "caption_projection_dim": shape("context_embedder.weight")[0] if with_text else 2048,
        "force_zeros_for_pooled_projection": with_text,
    }
