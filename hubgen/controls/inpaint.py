"""Inpainting: what lies under the white part of a mask is made anew, the rest of the picture stays.

Where the backbone has inputs for them, it is shown the mask and the masked picture beside x_t at every step (Stable
Diffusion's inpainting models, 2112.10752, section 4.5). Any other backbone has the known part put back after each
step, noised to the time reached (RePaint, 2201.09865, without its resampling).

Random numbers are drawn as diffusers' pipelines draw them, so that a seed gives the same picture.
"""

import logging
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch.nn import functional as F

from hubgen.autoencoders.latents import LatentSpace, encode
from hubgen.conditioning.families import BackboneFamily
from hubgen.controls.control import Control, Generator, Prepared, Start, Target
from hubgen.data.images import Canvas
from hubgen.schedulers.times import noised

logger = logging.getLogger(__name__)


def is_shown_masks(family: BackboneFamily, space: LatentSpace) -> bool:
    """Whether a backbone has inputs for mask and masked picture beside x_t.

    These are 2 C + 1 channels, or 2 C + f² where a mask comes in whole (FLUX.1 Fill), with its f x f pixels a latent.
    """
    return family.channels == 2 * space.channels + (space.factor**2 if family.shown.whole_mask else 1)


def shown_mask(family: BackboneFamily, space: LatentSpace, mask: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """The channels beside x_t, (B, C', h, w): mask, masked picture; or the masked picture and all pixels of the mask.

    Args:
        family: Of a backbone that is shown them.
        space: Of its latents.
        mask: (B, 1, H, W), 1 where the picture is made anew, else 0.
        masked: (B, C, h, w), latents of the picture that is black there.
    """
    if not family.shown.whole_mask:
        return torch.cat([F.interpolate(mask, size=masked.shape[2:]), masked], dim=1)
    return torch.cat([masked, F.pixel_unshuffle(mask, space.factor)], dim=1)


class Inpaint(Control):
    """Makes a part of an image anew.

    Args:
        image: What `hubgen.data.images.read_images` gives.
        mask: What `hubgen.data.images.read_masks` gives: 1 (from 0.5 on) where the image is to be made anew.
        canvas: How both are brought to the size of the result.
        masked_image_latents: (n, C, h, w), in the place of the encoded masked image, for backbones that are shown it.
        draws_first: Whether it takes its random numbers before those of the start, as diffusers' pipeline does it for
            FLUX.1 Canny and Depth.
    """

    def __init__(
        self,
        image: Any,
        mask: Any,
        canvas: Canvas,
        masked_image_latents: torch.Tensor | None = None,
        draws_first: bool = False,
    ):
        self.image, self.mask, self.canvas = image, mask, canvas
        self.masked_image_latents, self.draws_first = masked_image_latents, draws_first

    def check(self, target: Target) -> None:
        """Raises ValueError unless mask and masked latents fit the picture's size and number, and the backbone."""
        shown, latents = is_shown_masks(target.family, target.latents), self.masked_image_latents
        if latents is None and shown and self.canvas.is_latent(self.image):
            raise ValueError(
                "`masked_image_latents`: got None, expected them beside an `image` of latents: latents cannot be "
                "masked, and this model is shown the masked image."
            )
        if latents is not None:
            if not shown:
                logger.warning("`masked_image_latents` have no effect: this model is not shown the masked image.")
            expected = target.shape[1:]
            if not torch.is_tensor(latents) or tuple(latents.shape[1:]) != expected:
                found = tuple(latents.shape) if torch.is_tensor(latents) else type(latents).__name__
                raise ValueError(
                    f"`masked_image_latents`: got {found}, expected a tensor of shape (n, {str(expected)[1:]}."
                )
        for name, value in (("mask_image", self.mask), ("masked_image_latents", latents)):
            if value is not None and target.batch % len(value):
                raise ValueError(
                    f"`{name}`: got {len(value)}, expected a number that divides the {target.batch} pictures."
                )

    def prepare_first(self, target: Target) -> Prepared | None:
        if self.draws_first:
            self.draw_unused(target)
        return None

    def prepare(self, target: Target, start: Start) -> Prepared:
        pixels = self.canvas.pixels(self.image, target.device)
        mask = self.canvas.mask(self.mask, target.device)  # (n, 1, H, W), 1 where to make anew, else 0
        if is_shown_masks(target.family, target.latents):
            latents = self.masked_image_latents
            if latents is None:
                latents = encode(target.vae, pixels * (mask < 0.5), target.generator)
            masked = target.for_all(latents.to(target.device, torch.float32))
            return ShownMask(shown_mask(target.family, target.latents, target.for_all(mask), masked))
        if not self.draws_first:
            self.draw_unused(target)
        return KeptOutside(target, target.for_all(F.interpolate(mask, size=target.shape[2:])), start)

    def draw_unused(self, target: Target) -> None:
        """Takes the random numbers of the masked image, which diffusers encodes for backbones that are not shown it."""
        if not self.canvas.is_latent(self.image) and self.masked_image_latents is None:
            count = max(len(self.image), len(self.mask))
            draw_posterior((count, *target.shape[1:]), target.generator, target.device)


class ShownMask(Prepared):
    """The backbone is shown mask and masked picture beside x_t.

    Args:
        shown: (B, C', h, w), see `shown_mask`.
    """

    def __init__(self, shown: torch.Tensor):
        self.shown = shown

    def channels(self, branch: str) -> torch.Tensor:
        return self.shown


class KeptOutside(Prepared):
    """The part outside the mask is that of the image after each step, noised to the time reached.

    Args:
        target: Of the call.
        mask: (B, 1, h, w), 1 inside and 0 outside.
        start: With data and noise.
    """

    def __init__(self, target: Target, mask: torch.Tensor, start: Start):
        assert start.data is not None and start.noise is not None
        self.target, self.mask = target, mask
        self.data, self.noise = start.data, start.noise

    def after_step(self, step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        outside, timesteps = self.data, self.target.timesteps
        if step + 1 < len(timesteps):
            outside = noised(self.target.scheduler, self.data, self.noise, timesteps[step + 1 : step + 2])
        return (1 - self.mask) * outside + self.mask * latents


def draw_posterior(shape: tuple[int, ...], generator: Generator, device: torch.device) -> None:
    """Takes from the generators what the posterior of (n, C, h, w) latents would."""
    if isinstance(generator, list):
        for one in generator[: shape[0]]:
            randn_tensor((1, *shape[1:]), one, device, torch.float32)
    else:
        randn_tensor(shape, generator, device, torch.float32)
