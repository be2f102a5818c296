"""The latents of an autoencoder and a backbone: their shape, and the sizes of pictures that they can be of.

Shapes: B pictures of H x W pixels, latents (B, C, h, w).
"""

import math
from typing import Any

from hubgen.conditioning.inputs import PACKED, takes_tokens

# A U-Net takes any size; well above this one, memory runs out before there is a picture.
LARGEST_SIDE = 8192
# Latents of a side where the backbone does not say what it was trained for: FLUX, at 1024 pixels.
TRAINED_SIDE = 128


class LatentSpace:
    """What sizes there are between pixels, latents and tokens.

    Args:
        vae: Between pixels and latents.
        backbone: Between latents and tokens.
    """

    def __init__(self, vae: Any, backbone: Any):
        self.channels: int = vae.config.latent_channels
        """C"""
        self.factor: int = 2 ** (len(vae.config.block_out_channels) - 1)
        """Pixels of a picture's side per latent"""
        patch = PACKED if takes_tokens(backbone) else backbone.config.get("patch_size") or 1
        self.multiple: int = self.factor * patch
        """Height and width in pixels are multiples of it: pixels per latent times latents per token"""
        positions = backbone.config.get("pos_embed_max_size")
        self.largest: int = LARGEST_SIDE if positions is None else positions * self.multiple
        """The largest height and width in pixels"""
        side = backbone.config.get("sample_size") or TRAINED_SIDE
        height, width = (side, side) if isinstance(side, int) else side
        self.default_size: tuple[int, int] = (height * self.factor, width * self.factor)
        """Height and width in pixels that the backbone was trained for"""
        self.patch: int = patch

    def shape(self, batch: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """(B, C, h, w) for `size`, height and width in pixels."""
        return batch, self.channels, size[0] // self.factor, size[1] // self.factor

    def tokens(self, size: tuple[int, int]) -> int:
        """T, the number of tokens of a picture."""
        return math.prod(side // self.multiple for side in size)
