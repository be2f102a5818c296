"""A picture that the backbone itself was trained to be shown at every step, beside x_t.

    kind                      backbones                                    argument of the call
    INSTRUCTION               InstructPix2Pix (2211.09800), UltraEdit      image
    MASKED_INSTRUCTION        UltraEdit with a mask (2407.05282)           image, mask_image
    FLUX_CONTROL              FLUX.1 Canny and Depth                       control_image
    REFERENCE                 FLUX.1 Kontext (2506.15742)                  image

The first three have further input channels, by which they are known; Kontext has further tokens. Models that inpaint
are shown a mask and the masked picture: `hubgen.controls.inpaint`.

In training as in a call:

    kind = edit_input(family_of(backbone), LatentSpace(vae, backbone.config))
    shown = kind.encoded(vae, pixels)                                              # (B, C, h, w), what it is shown
    prediction = predict(backbone, x_t, t, condition, Doors(channels=[shown]))

Shapes: B pictures, n pictures to be shown, (B, C, h, w) latents, H x W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from PIL import Image

from hubgen.autoencoders.latents import LatentSpace, denormalised, encode, normalised, posterior
from hubgen.conditioning.families import BackboneFamily, FurtherTokens
from hubgen.conditioning.guidance import NEGATIVE, PICTURE
from hubgen.controls.control import Control, Generator, Prepared, Start, Target
from hubgen.data.images import Canvas


@dataclass(frozen=True)
class EditInput:
    """What a backbone is shown beside x_t, and how pictures become it."""

    name: str
    """Under which a pipeline's config may ask for it"""
    argument: str = "image"
    """Of the call, which holds the picture"""
    channels: int = 1
    """Pictures' latents beside x_t; 0: their tokens come after those of x_t"""
    drawn: bool = False
    """Whether latents are drawn from the autoencoder's posterior; otherwise they are its mode"""
    normalised: bool = False
    """Whether latents are brought to the mean and scale of x_t; otherwise they are as the autoencoder makes them"""
    guided: bool = False
    """Whether there is a guidance by the picture beside that by the prompt (`PictureGuidance`)"""

    @property
    def masked(self) -> bool:
        """Whether a mask follows, as a picture of its own."""
        return self.channels == 2

    @property
    def as_tokens(self) -> bool:
        """Whether tokens of the picture come after those of x_t."""
        return self.channels == 0

    @property
    def is_edited(self) -> bool:
        """Whether the picture is the one that is edited, `image`."""
        return self.argument == "image"

    def begins_at_noise(self, mask: bool) -> bool:
        """Whether a call's `image` is what is shown and no more, so that it says nothing about where to begin.

        Args:
            mask: Whether the call has a mask.
        """
        return self.is_edited and (self.masked or not mask)

    def encoded(self, vae: Any, pixels: torch.Tensor, generator: Generator = None) -> torch.Tensor:
        """What the backbone is shown of pictures.

        Args:
            vae: An autoencoder of hubgen or diffusers.
            pixels: (B, 3, H, W) in [-1, 1].
            generator: Source of what is drawn, where it is drawn.

        Returns:
            (B, C, h, w) in float32.
        """
        if self.drawn:
            latents = encode(vae, pixels, generator)
            return latents if self.normalised else denormalised(latents, vae)
        return self.of_mode(vae, posterior(vae, pixels)[0])

    def of_mode(self, vae: Any, mode: torch.Tensor) -> torch.Tensor:
        """What the backbone is shown, where it is not drawn, of the mode of the autoencoder's posterior."""
        return normalised(mode, vae) if self.normalised else mode

    def with_normalised(self, value: bool | None) -> Self:
        """The same with latents of another scale; `None` changes nothing."""
        return self if value is None else replace(self, normalised=value)


IMAGE_GUIDANCE_SCALE = 1.5
"""Of a call that names none, as in diffusers' pipelines"""

INSTRUCTION = EditInput("instruction", guided=True)
MASKED_INSTRUCTION = replace(INSTRUCTION, channels=2)
FLUX_CONTROL = EditInput("control", argument="control_image", drawn=True, normalised=True)
REFERENCE = EditInput("reference", channels=0, normalised=True)
KINDS = (INSTRUCTION, MASKED_INSTRUCTION, FLUX_CONTROL, REFERENCE)


def edit_input(
    family: BackboneFamily, space: LatentSpace, name: str | None = None, normalised: bool | None = None
) -> EditInput | None:
    """What a backbone is shown beside x_t; `None` where that is nothing, or a mask with the masked picture.

    Args:
        family: Of the backbone.
        space: Of its latents.
        name: Which kind it is, where the channels do not tell: "instruction" (the usual one, but for FLUX, where it is
            "control"), "control", or "reference", which has no further channels.
        normalised: Whether latents are brought to the mean and scale of x_t; `None` for what is usual with the kind.

    Raises:
        ValueError: There is no kind of this name, or the backbone has not its channels or takes no further tokens.
    """
    pictures = (family.channels - space.channels) / space.channels
    kinds: tuple[EditInput, ...]
    if name is None:
        kinds = (FLUX_CONTROL,) if family.shown.control else (INSTRUCTION, MASKED_INSTRUCTION)
    else:
        kinds = tuple(kind for kind in KINDS if kind.name == name)
        if not kinds:
            expected = ", ".join(sorted({repr(kind.name) for kind in KINDS}))
            raise ValueError(f"`edit_input`: got {name!r}, expected None or one of {expected}.")
    found = [kind for kind in kinds if kind.channels == pictures and (kind.channels or family.takes_tokens)]
    if name is not None and not found:
        needed = " or ".join(str((1 + kind.channels) * space.channels) for kind in kinds)
        tokens = ", and one that takes further tokens" if not kinds[0].channels else ""
        raise ValueError(
            f"`edit_input`: got {name!r} for a backbone of {family.channels} channels, expected one of {needed}"
            f"{tokens}."
        )
    return found[0].with_normalised(normalised) if found else None


def check_image_scale(kind: EditInput | None, scale: float | None) -> float | None:
    """The strength of the guidance by a shown picture; `None` where the model has no such guidance.

    Args:
        kind: What the model is shown.
        scale: `image_guidance_scale` of a call; `None` for the usual one.

    Raises:
        ValueError: There is one for a model without.
    """
    if kind is not None and kind.guided:
        return IMAGE_GUIDANCE_SCALE if scale is None else scale
    if scale is not None:
        raise ValueError(
            f"`image_guidance_scale`: got {scale!r}, expected none: this model is not guided by a picture."
        )
    return None


class ShownPicture(Control):
    """Shows the backbone a picture, as it was trained to be shown one.

    Args:
        kind: What the backbone takes.
        image: What `hubgen.data.images.read_images` gives; latents are shown as they are.
        canvas: How it is brought to the size at which it is shown: that of the result, unless its tokens follow those
            of x_t.
        mask: What `hubgen.data.images.read_masks` gives, white where the picture is edited, for backbones that are
            shown one; `None`: everywhere.
    """

    def __init__(self, kind: EditInput, image: Any, canvas: Canvas, mask: Any = None):
        self.kind, self.image, self.canvas, self.mask = kind, image, canvas, mask

    def check(self, target: Target) -> None:
        """Raises ValueError where the numbers of pictures do not divide, or the backbone takes no such picture."""
        images = [(self.kind.argument, self.image), *([] if self.mask is None else [("mask_image", self.mask)])]
        for name, one in images:
            if target.batch % len(one):
                raise ValueError(
                    f"`{name}`: got {len(one)}, expected a number that divides the {target.batch} pictures."
                )
        check_takes_tokens(target.family, "a picture as tokens" if self.kind.as_tokens else None)

    def prepare_first(self, target: Target) -> Prepared | None:
        """Where latents are drawn, diffusers' pipelines draw them before the noise, for each result anew."""
        return self.prepared(target) if self.kind.drawn else None

    def prepare(self, target: Target, start: Start) -> Prepared:
        return self.prepared(target)

    def prepared(self, target: Target) -> Prepared:
        """The picture as the backbone is shown it, for B results."""
        latents = self.latents(target, self.image)
        if self.kind.masked:
            mask = white_like(self.image) if self.mask is None else as_pictures(self.mask)
            latents = torch.cat([latents, self.latents(target, mask)], dim=1)
        return TokensBeside(latents) if self.kind.as_tokens else ChannelsBeside(latents, target)

    def latents(self, target: Target, image: Any) -> torch.Tensor:
        """Of a picture, (B, C, h, w)."""
        pixels = self.canvas.pixels(image, target.device)
        if Canvas.is_latent(image):
            return target.for_all(pixels)
        if self.kind.drawn:
            return self.kind.encoded(target.vae, target.for_all(pixels), target.generator)
        return target.for_all(self.kind.encoded(target.vae, pixels))


class ChannelsBeside(Prepared):
    """The picture in channels beside x_t; zeros in the branch that is guided away from it, where there is one.

    Args:
        shown: (B, C', h, w).
        target: Of the call.
    """

    def __init__(self, shown: torch.Tensor, target: Target):
        self.shown = shown
        self.nothing = torch.zeros_like(shown) if PICTURE in target.branches else shown

    def channels(self, branch: str) -> torch.Tensor:
        return self.nothing if branch == NEGATIVE else self.shown


class TokensBeside(Prepared):
    """The picture as tokens after those of x_t.

    Args:
        shown: (B, C, h', w').
    """

    def __init__(self, shown: torch.Tensor):
        self.shown = FurtherTokens(shown)

    def tokens(self, branch: str) -> FurtherTokens:
        return self.shown


def check_takes_tokens(family: BackboneFamily, what: str | None) -> None:
    """Raises ValueError for a family that takes no tokens beside x_t's, where a control has some.

    Args:
        family: Of the backbone.
        what: They are; `None` where the control has none.
    """
    if what is not None and not family.takes_tokens:
        raise ValueError(f"`controls`: got {what}, expected none: this backbone takes no tokens beside those of x_t.")


def as_pictures(masks: Sequence[Image.Image] | torch.Tensor) -> Any:
    """Masks as pictures of three channels."""
    if torch.is_tensor(masks):
        return masks.expand(-1, 3, -1, -1)
    return [mask.convert("RGB") for mask in masks]


def white_like(images: Sequence[Image.Image] | torch.Tensor) -> Any:
    """One white picture for all."""
    if torch.is_tensor(images):
        return torch.ones(1, 3, *images.shape[-2:])
    return [Image.new("RGB", images[0].size, "white")]
