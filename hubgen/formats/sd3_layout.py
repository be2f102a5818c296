"""The transformer of Stable Diffusion 3 and 3.5 in the layout of Stability AI's reference code.

There, image (`x_block`) and text (`context_block`) keep their layers apart, queries, keys and values are one layer, and
the two places with a plain scale and shift (the last block's text, the output) hold the shift first.
"""

import math
from collections.abc import Mapping
from typing import Any

from hubgen.formats.headers import Shapes, TensorHeader
from hubgen.formats.key_maps import QKV, SWAPPED, Line, Rule, rules

OUTSIDE: tuple[Line, ...] = (
    ("pos_embed", "pos_embed.pos_embed"),
    ("x_embedder.proj", "pos_embed.proj"),
    ("t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1"),
    ("t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2"),
    ("y_embedder.mlp.0", "time_text_embed.text_embedder.linear_1"),
    ("y_embedder.mlp.2", "time_text_embed.text_embedder.linear_2"),
    ("context_embedder", "context_embedder"),
    ("final_layer.adaLN_modulation.1", "norm_out.linear", SWAPPED),
    ("final_layer.linear", "proj_out"),
)
BLOCK: tuple[Line, ...] = (
    ("{old}.x_block.adaLN_modulation.1", "{new}.norm1.linear"),
    ("{old}.x_block.attn.qkv", ("{new}.attn.to_q", "{new}.attn.to_k", "{new}.attn.to_v"), QKV),
    ("{old}.x_block.attn.ln_q", "{new}.attn.norm_q"),
    ("{old}.x_block.attn.ln_k", "{new}.attn.norm_k"),
    ("{old}.x_block.attn.proj", "{new}.attn.to_out.0"),
    ("{old}.x_block.attn2.qkv", ("{new}.attn2.to_q", "{new}.attn2.to_k", "{new}.attn2.to_v"), QKV),
    ("{old}.x_block.attn2.ln_q", "{new}.attn2.norm_q"),
    ("{old}.x_block.attn2.ln_k", "{new}.attn2.norm_k"),
    ("{old}.x_block.attn2.proj", "{new}.attn2.to_out.0"),
    ("{old}.x_block.mlp.fc1", "{new}.ff.net.0.proj"),
    ("{old}.x_block.mlp.fc2", "{new}.ff.net.2"),
    (
        "{old}.context_block.attn.qkv",
        ("{new}.attn.add_q_proj", "{new}.attn.add_k_proj", "{new}.attn.add_v_proj"),
        QKV,
    ),
    ("{old}.context_block.attn.ln_q", "{new}.attn.norm_added_q"),
    ("{old}.context_block.attn.ln_k", "{new}.attn.norm_added_k"),
    ("{old}.context_block.attn.proj", "{new}.attn.to_add_out"),
    ("{old}.context_block.mlp.fc1", "{new}.ff_context.net.0.proj"),
    ("{old}.context_block.mlp.fc2", "{new}.ff_context.net.2"),
)
TEXT_NORM: tuple[Line, ...] = (("{old}.context_block.adaLN_modulation.1", "{new}.norm1_context.linear"),)
LAST_TEXT_NORM: tuple[Line, ...] = (("{old}.context_block.adaLN_modulation.1", "{new}.norm1_context.linear", SWAPPED),)

HEAD_WIDTH = 64
SAMPLE_SIZE = 128  # latents per side, 1024 pixels


def key_map(config: Mapping[str, Any]) -> list[Rule]:
    """The map of a transformer with our config."""
    table = rules(OUTSIDE)
    for i in range(config["num_layers"]):
        norm = LAST_TEXT_NORM if i == config["num_layers"] - 1 else TEXT_NORM
        table += rules(BLOCK + norm, old=f"joint_blocks.{i}", new=f"transformer_blocks.{i}")
    return table


def infer_config(tensors: Mapping[str, TensorHeader]) -> dict[str, Any]:
    """Our config of a file's transformer, from its keys and shapes.

    Args:
        tensors: The file's, without `model.diffusion_model.`.

    Raises:
        ValueError: A key is missing.
    """
    shape = Shapes("transformer", tensors)
    layers = shape.count("joint_blocks.{}.x_block.attn.qkv.weight")
    width, in_channels, patch, _ = shape("x_embedder.proj.weight")
    text_width, joint_width = shape("context_embedder.weight")
    norm = "joint_blocks.0.x_block.attn.ln_q.weight"
    head_width = shape(norm)[0] if norm in tensors else HEAD_WIDTH
    return {
        "sample_size": SAMPLE_SIZE,
        "patch_size": patch,
        "in_channels": in_channels,
        "num_layers": layers,
        "attention_head_dim": head_width,
        "num_attention_heads": max(width // head_width, 1),
        "joint_attention_dim": joint_width,
        "caption_projection_dim": text_width,
        "pooled_projection_dim": shape("y_embedder.mlp.0.weight")[1],
        "out_channels": shape("final_layer.linear.weight")[0] // patch**2,
        "pos_embed_max_size": math.isqrt(shape("pos_embed")[1]),
        "dual_attention_layers": [i for i in range(layers) if f"joint_blocks.{i}.x_block.attn2.proj.weight" in tensors],
        "qk_norm": "rms_norm" if norm in tensors else None,
    }
