"""One object a family of backbones: the only code that knows how each is called, and how it is sampled.

    unet      U-Nets: pixel space and class labels, Stable Diffusion 1 and 2, SDXL with its refiner, LCM
    dit       DiT: classes
    mmdit     SD3's transformer, and hubgen's own with any text encoder
    flux      FLUX.1

A new family is a file here and a line in `FAMILIES`.
"""

from typing import Any

from torch import nn

from hubgen.conditioning.families.dit import DiTFamily
from hubgen.conditioning.families.family import SHUT, BackboneFamily, Doors, FurtherTokens, StartRules
from hubgen.conditioning.families.flux import FluxFamily
from hubgen.conditioning.families.mmdit import MMDiTFamily
from hubgen.conditioning.families.unet import UNetFamily

__all__ = ["SHUT", "BackboneFamily", "Doors", "FurtherTokens", "StartRules", "family_of", "plain_backbone"]

# By a key that the configs of the family alone have, the first that fits.
FAMILIES: dict[str, type[BackboneFamily]] = {
    "axes_dims_rope": FluxFamily,
    "num_embeds_ada_norm": DiTFamily,
    "center_input_sample": UNetFamily,
    "joint_attention_dim": MMDiTFamily,
}


def family_of(backbone: nn.Module) -> BackboneFamily:
    """The family of a backbone of hubgen or diffusers, told by its config; a trainer's wrappers are looked through.

    Raises:
        ValueError: It is of none.
    """
    config: Any = plain_backbone(backbone).config
    for key, family in FAMILIES.items():
        if config.get(key) is not None:
            return family(config)
    raise ValueError(
        f"`backbone`: got a {type(backbone).__name__}, expected a model whose config has one of {', '.join(FAMILIES)}."
    )


def plain_backbone(backbone: nn.Module) -> Any:
    """A backbone without the wrappers of data parallelism, all of which hold it as `module`."""
    while isinstance(inner := getattr(backbone, "module", None), nn.Module):
        backbone = inner
    return backbone
