"""Names that checkpoints of before 2023 use, and what they are called now.

The attention of DDPM's U-Nets and of the KL and VQ autoencoders was a class of its own then, with 1x1 convolutions in
place of linear layers at first. Official repositories (Stable Diffusion 1.x's autoencoder, google/ddpm-*) still hold
such files.
"""

from collections.abc import Mapping, Sequence

# in an attention module: then -> now
ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def renamed(name: str) -> str:
    """`mid_block.attentions.0.query.weight` -> `mid_block.attentions.0.to_q.weight`; other names stay as they are."""
    path, _, leaf = name.rpartition(".")
    parent, _, layer = path.rpartition(".")
    return f"{parent}.{ATTENTION[layer]}.{leaf}" if parent and layer in ATTENTION else name


def current_name(name: str, expected: Mapping[str, object]) -> str:
    """What a tensor of a file is called in the model that has the names `expected`."""
    return renamed(name) if name not in expected and renamed(name) in expected else name


def is_attention_weight(name: str) -> bool:
    """Whether a tensor was stored under an older name of the attention's linear layers."""
    return any(name.endswith(f".{layer}.weight") for layer in ATTENTION.values())


def same_but_for_ones(name: str, found: Sequence[int], expected: Sequence[int]) -> bool:
    """Whether an attention weight is the same linear map: (D, D) and (D, D, 1, 1), either way round."""
    short, long = sorted((tuple(found), tuple(expected)), key=len)
    return is_attention_weight(name) and len(short) >= 2 and long == short + (1,) * (len(long) - len(short))
