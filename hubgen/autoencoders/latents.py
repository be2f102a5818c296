"""Latents as backbones have them: encoded and normalised on the way in, decoded on the way out.

An autoencoder's own latents have any mean and scale. Its config says how they are brought to about mean 0 and standard
deviation 1: by `shift_factor` and `scaling_factor` (2112.10752, section 4.3.2 and appendix G), or channel by channel by
`latents_mean` and `latents_std` with `scaling_factor` (Playground v2.5, 2402.17245). Everything that crosses between
the two goes through this file.

Shapes: B pictures of H x W pixels, latents (B, C, h, w).
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from hubgen.checks import whole

# A U-Net takes any size; well above this one, memory runs out before there is a picture.
LARGEST_SIDE = 8192
# Latents of a side where the backbone does not say what it was trained for: FLUX, at 1024 pixels.
TRAINED_SIDE = 128


def normalised(latents: torch.Tensor, vae: Any) -> torch.Tensor:
    """An autoencoder's latents as the backbone has them, (B, C, h, w) -> the same."""
    statistics = channel_statistics(latents, vae)
    if statistics is not None:
        mean, std = statistics
        return (latents - mean) * vae.config.scaling_factor / std
    return (latents - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor


def denormalised(latents: torch.Tensor, vae: Any) -> torch.Tensor:
    """The backbone's latents as the autoencoder has them, the inverse of `normalised`."""
    statistics = channel_statistics(latents, vae)
    if statistics is not None:
        mean, std = statistics
        return latents * std / vae.config.scaling_factor + mean
    return latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)


def channel_statistics(latents: torch.Tensor, vae: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Mean and standard deviation of each channel, (C, 1, 1), in the latents' type; `None` where there are none."""
    config = vae.config
    if config.get("latents_mean") is None or config.get("latents_std") is None:
        return None
    mean, std = (latents.new_tensor(config[name])[:, None, None] for name in ("latents_mean", "latents_std"))
    return mean, std


@contextmanager
def in_safe_precision(vae: Any) -> Iterator[None]:
    """An autoencoder that overflows in float16 (`force_upcast`) is in float32 inside, and in float16 again after it."""
    dtype = vae.dtype
    upcast = dtype == torch.float16 and vae.config.get("force_upcast", False)
    if upcast:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if upcast:
            vae.to(dtype)


def encode(
    vae: Any, pixels: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None = None
) -> torch.Tensor:
    """The backbone's latents of pictures, drawn from the autoencoder's posterior where it has one.

    Args:
        vae: An autoencoder of hubgen or diffusers, with or without a posterior (VQ).
        pixels: (B, 3, H, W) in [-1, 1], of any floating-point type.
        generator: Source of the draws; a list has one for each picture.

    Returns:
        (B, C, h, w) in float32.
    """
    with in_safe_precision(vae):
        pixels = pixels.to(vae.dtype)
        if isinstance(generator, list):
            drawn = [draw(vae, picture[None], one) for picture, one in zip(pixels, generator, strict=False)]
            latents = torch.cat(drawn)
        else:
            latents = draw(vae, pixels, generator)
    return normalised(latents.float(), vae)


def draw(vae: Any, pixels: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """The autoencoder's own latents of pixels in its own type: drawn from its posterior, if it has one."""
    encoded = vae.encode(pixels)
    return encoded.latent_dist.sample(generator) if hasattr(encoded, "latent_dist") else encoded.latents


def posterior(vae: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation (0 without a posterior) of the autoencoder's own latents, both (B, C, h, w) in float32.

    Args:
        vae: As for `encode`.
        pixels: (B, 3, H, W) in [-1, 1], of any floating-point type.
    """
    with in_safe_precision(vae):
        encoded = vae.encode(pixels.to(vae.dtype))
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mean.float(), encoded.latent_dist.std.float()
    return encoded.latents.float(), torch.zeros_like(encoded.latents, dtype=torch.float32)


def decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Pictures, (B, 3, H, W) in float32 and about [-1, 1], of the backbone's latents, (B, C, h, w)."""
    latents = denormalised(latents, vae)
    with in_safe_precision(vae):
        return vae.decode(latents.to(vae.dtype), return_dict=False)[0].float()


class LatentSpace:
    """What sizes there are between pixels, latents and tokens.

    Args:
        vae: Between pixels and latents.
        config: Of the backbone, which says what it was trained for.
        patch: Latents of a token's side: sizes in latents are multiples of it.
        default_size: Height and width in pixels that it was trained for, where the config does not say so.
    """

    def __init__(
        self, vae: Any, config: Mapping[str, Any], patch: int = 1, default_size: tuple[int, int] | None = None
    ):
        self.channels: int = vae.config.latent_channels
        """C"""
        self.factor: int = 2 ** (len(vae.config.block_out_channels) - 1)
        """Pixels of a picture's side per latent"""
        self.multiple: int = self.factor * patch
        """Height and width in pixels are multiples of it: pixels per latent times latents per token"""
        positions = config.get("pos_embed_max_size")
        self.largest: int = LARGEST_SIDE if positions is None else positions * self.multiple
        """The largest height and width in pixels"""
        side = config.get("sample_size") or TRAINED_SIDE
        height, width = (side, side) if isinstance(side, int) else side
        self.default_size: tuple[int, int] = default_size or (height * self.factor, width * self.factor)
        """Height and width in pixels that the backbone was trained for"""

    def shape(self, batch: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """(B, C, h, w) for `size`, height and width in pixels."""
        return batch, self.channels, size[0] // self.factor, size[1] // self.factor

    def tokens(self, size: tuple[int, int]) -> int:
        """T, the number of tokens of a picture."""
        return math.prod(side // self.multiple for side in size)

    def checked_size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """(height, width) in pixels, `None` filled in by what the backbone was trained for.

        Raises:
            ValueError: A side is no whole number above 0, too large, or no multiple of what the model makes; the
                nearest ones that are stand in the message.
        """
        size = (self.default_size[0] if height is None else height, self.default_size[1] if width is None else width)
        for name, side in zip(("height", "width"), size, strict=True):
            side = whole(name, side)
            if side > self.largest:
                raise ValueError(
                    f"`{name}`: got {side}, expected at most {self.largest}, the largest that this model makes."
                )
            if side % self.multiple:
                below, above = side // self.multiple * self.multiple, (side // self.multiple + 1) * self.multiple
                nearest = " or ".join(str(n) for n in (below, above) if n)
                raise ValueError(
                    f"`{name}`: got {side}, expected a multiple of {self.multiple}; the nearest: {nearest}."
                )
        return int(size[0]), int(size[1])
