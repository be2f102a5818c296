"""Another patch size for a trained transformer: finer tokens, at the cost of more of them.

A transformer of large patches learns fast and draws softly. Cut into smaller patches, it goes on from what its blocks
have learnt: only the layers that read and write patches are new, and these are made of the old ones (as FlexiViT does
with the embedding of an encoder, 2212.08013).

Shapes: D features of a token, C channels of the latents, patches of p x p latents that become p / r x p / r.
"""

from typing import Any

import torch
from torch import nn

from hubgen.layers.embeddings import PatchEmbed, sincos_position_embedding


@torch.no_grad()
def with_patch_size(transformer: nn.Module, patch_size: int) -> nn.Module:
    """A transformer of the same blocks with smaller patches; the given one stays as it is.

    A small patch is embedded as the large one would be in which every latent of it is repeated r x r times; it lies at
    its own fraction of the old positions; and what is predicted for it is the mean of what was predicted for its r x r
    shares of the large one.

    Args:
        transformer: A `SD3Transformer2DModel`, which has the table of its positions among its weights.
        patch_size: Side in latents; it divides the old one.

    Raises:
        ValueError: It does not, or the transformer is another.
    """
    model: Any = transformer
    embed = getattr(model, "pos_embed", None)
    if not isinstance(embed, PatchEmbed) or embed.pos_embed_max_size is None or not hasattr(model, "proj_out"):
        raise ValueError(
            f"`transformer`: got a {type(model).__name__}, expected one with a table of positions among its weights."
        )
    old = embed.patch_size
    if patch_size < 1 or old % patch_size:
        raise ValueError(f"`patch_size`: got {patch_size}, expected a divisor of the transformer's {old}.")
    ratio, side = old // patch_size, embed.pos_embed_max_size
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    new: Any = type(model)(**{**config, "patch_size": patch_size, "pos_embed_max_size": side * ratio})
    new.to(device=model.device, dtype=model.dtype).train(model.training)

    state = dict(model.state_dict())
    kernel = state["pos_embed.proj.weight"].unflatten(3, (patch_size, ratio)).unflatten(2, (patch_size, ratio))
    state["pos_embed.proj.weight"] = kernel.sum((3, 5))  # (D, C, p / r, p / r)
    for name in ("proj_out.weight", "proj_out.bias"):
        shares = state[name].unflatten(0, (patch_size, ratio, patch_size, ratio, -1))
        state[name] = shares.mean((1, 3)).flatten(0, 2)  # (p / r * p / r * C, ...)
    places = torch.arange(side * ratio, device=model.device) / ratio / (side / embed.height) / embed.interpolation_scale
    table = sincos_position_embedding(kernel.shape[0], places, places)
    state["pos_embed.pos_embed"] = table[None].to(state["pos_embed.pos_embed"].dtype)
    new.load_state_dict(state)
    return new
