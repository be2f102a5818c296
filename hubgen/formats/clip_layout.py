"""CLIP's text encoder in the layout of open_clip: that of Stable Diffusion 2, the large one of XL.

The other encoders in single files (1.x, the small one of XL, SD3, FLUX) have the names of transformers.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import torch

from hubgen.formats.key_maps import QKV, TRANSPOSED, Line, Rule, rules

OUTSIDE: tuple[Line, ...] = (
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("token_embedding", "text_model.embeddings.token_embedding"),
    ("ln_final", "text_model.final_layer_norm"),
    ("text_projection", "text_projection.weight", TRANSPOSED),
)
LAYER: tuple[Line, ...] = (
    ("{old}.ln_1", "{new}.layer_norm1"),
    ("{old}.attn.in_proj_weight", tuple(f"{{new}}.self_attn.{x}_proj.weight" for x in "qkv"), QKV),
    ("{old}.attn.in_proj_bias", tuple(f"{{new}}.self_attn.{x}_proj.bias" for x in "qkv"), QKV),
    ("{old}.attn.out_proj", "{new}.self_attn.out_proj"),
    ("{old}.ln_2", "{new}.layer_norm2"),
    ("{old}.mlp.c_fc", "{new}.mlp.fc1"),
    ("{old}.mlp.c_proj", "{new}.mlp.fc2"),
)


def key_map(config: Mapping[str, Any]) -> list[Rule]:
    """The map from open_clip to transformers' names with `text_model.`."""
    table = rules(OUTSIDE)
    for i in range(config["num_hidden_layers"]):
        table += rules(LAYER, old=f"transformer.resblocks.{i}", new=f"text_model.encoder.layers.{i}")
    return table


def is_open_clip(keys: Mapping[str, Any]) -> bool:
    """Whether the tensors are named as OpenCLIP names them."""
    return "positional_embedding" in keys


def unused(key: str, config: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    """Whether a file's text encoder may have this tensor although the model does without it.

    These are CLIP's temperature, the layers after the one that is read (Stable Diffusion 2 drops the last), the
    projection of a model that has none, and the table 0, 1, 2, ... of positions.
    """
    parts = key.split(".")
    last = config["num_hidden_layers"]
    behind = [int(n) for before, n in itertools.pairwise(parts) if before in ("resblocks", "layers")]
    return (
        key in ("logit_scale", "attn_mask")
        or key.endswith("embeddings.position_ids")
        or any(number >= last for number in behind)
        or (parts[0] == "text_projection" and "text_projection.weight" not in expected)
    )


def with_prefix(tensors: Mapping[str, torch.Tensor], expected: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Gives or takes the `text_model.` of the names, as the model at hand wants it.

    transformers dropped it from one of its two classes in version 5.6.
    """
    wanted = any(name.startswith("text_model.") for name in expected)
    plain = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    if not wanted:
        return plain
    return {
        name if name == "text_projection.weight" else f"text_model.{name}": tensor for name, tensor in plain.items()
    }
