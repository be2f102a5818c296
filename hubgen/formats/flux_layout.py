"""The transformer of FLUX.1 in the layout of Black Forest Labs' reference code (`img_` and `txt_` streams).

Queries, keys and values are one layer there, in the single blocks together with the MLP's first; the output's
modulation holds the shift first.
"""

from collections.abc import Mapping
from typing import Any

from hubgen.formats.headers import Shapes, TensorHeader
from hubgen.formats.key_maps import QKV, SWAPPED, Fused, Line, Rule, rules

OUTSIDE: tuple[Line, ...] = (
    ("img_in", "x_embedder"),
    ("txt_in", "context_embedder"),
    ("time_in.in_layer", "time_text_embed.timestep_embedder.linear_1"),
    ("time_in.out_layer", "time_text_embed.timestep_embedder.linear_2"),
    ("vector_in.in_layer", "time_text_embed.text_embedder.linear_1"),
    ("vector_in.out_layer", "time_text_embed.text_embedder.linear_2"),
    ("guidance_in.in_layer", "time_text_embed.guidance_embedder.linear_1"),
    ("guidance_in.out_layer", "time_text_embed.guidance_embedder.linear_2"),
    ("final_layer.adaLN_modulation.1", "norm_out.linear", SWAPPED),
    ("final_layer.linear", "proj_out"),
)
DOUBLE_BLOCK: tuple[Line, ...] = (
    ("{old}.img_mod.lin", "{new}.norm1.linear"),
    ("{old}.img_attn.qkv", ("{new}.attn.to_q", "{new}.attn.to_k", "{new}.attn.to_v"), QKV),
    ("{old}.img_attn.norm.query_norm.scale", "{new}.attn.norm_q.weight"),
    ("{old}.img_attn.norm.key_norm.scale", "{new}.attn.norm_k.weight"),
    ("{old}.img_attn.proj", "{new}.attn.to_out.0"),
    ("{old}.img_mlp.0", "{new}.ff.net.0.proj"),
    ("{old}.img_mlp.2", "{new}.ff.net.2"),
    ("{old}.txt_mod.lin", "{new}.norm1_context.linear"),
    ("{old}.txt_attn.qkv", ("{new}.attn.add_q_proj", "{new}.attn.add_k_proj", "{new}.attn.add_v_proj"), QKV),
    ("{old}.txt_attn.norm.query_norm.scale", "{new}.attn.norm_added_q.weight"),
    ("{old}.txt_attn.norm.key_norm.scale", "{new}.attn.norm_added_k.weight"),
    ("{old}.txt_attn.proj", "{new}.attn.to_add_out"),
    ("{old}.txt_mlp.0", "{new}.ff_context.net.0.proj"),
    ("{old}.txt_mlp.2", "{new}.ff_context.net.2"),
)
QKV_AND_MLP = Fused((1, 1, 1, 4))
SINGLE_BLOCK: tuple[Line, ...] = (
    ("{old}.modulation.lin", "{new}.norm.linear"),
    ("{old}.linear1", ("{new}.attn.to_q", "{new}.attn.to_k", "{new}.attn.to_v", "{new}.proj_mlp"), QKV_AND_MLP),
    ("{old}.norm.query_norm.scale", "{new}.attn.norm_q.weight"),
    ("{old}.norm.key_norm.scale", "{new}.attn.norm_k.weight"),
    ("{old}.linear2", "{new}.proj_out"),
)

ROTARY_SIXTEENTHS = (2, 7, 7)  # of a head's features for the index, row and column: 16, 56, 56 of 128


def key_map(config: Mapping[str, Any]) -> list[Rule]:
    """The map of a transformer with our config."""
    table = rules(OUTSIDE)
    for i in range(config["num_layers"]):
        table += rules(DOUBLE_BLOCK, old=f"double_blocks.{i}", new=f"transformer_blocks.{i}")
    for i in range(config["num_single_layers"]):
        table += rules(SINGLE_BLOCK, old=f"single_blocks.{i}", new=f"single_transformer_blocks.{i}")
    return table


def infer_config(tensors: Mapping[str, TensorHeader]) -> dict[str, Any]:
    """Our config of a file's transformer, from its keys and shapes.

    Args:
        tensors: The file's, without `model.diffusion_model.`.

    Raises:
        ValueError: A key is missing.
    """
    shape = Shapes("transformer", tensors)
    width, in_channels = shape("img_in.weight")
    head_width = shape("double_blocks.0.img_attn.norm.query_norm.scale")[0]
    return {
        "patch_size": 1,
        "in_channels": in_channels,
        "out_channels": shape("final_layer.linear.weight")[0],
        "num_layers": shape.count("double_blocks.{}.img_attn.qkv.weight"),
        "num_single_layers": shape.count("single_blocks.{}.linear1.weight"),
        "attention_head_dim": head_width,
        "num_attention_heads": max(width // head_width, 1),
        "joint_attention_dim": shape("txt_in.weight")[1],
        "pooled_projection_dim": shape("vector_in.in_layer.weight")[1],
        "guidance_embeds": "guidance_in.in_layer.weight" in tensors,
        "axes_dims_rope": [head_width * share // 16 for share in ROTARY_SIXTEENTHS],
    }
