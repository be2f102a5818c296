"""Where a call begins: at noise, or at an image (image to image; SDEdit, 2108.01073), noised to a time on the way.

    start = start_of(arguments, family, space, strength)    # all checks
    timesteps = start.remaining(scheduler, timesteps)       # the part of the grid that is left to do
    begin = start.begin(target, latents)                    # the autoencoder encodes, noise is drawn

Random numbers are drawn as diffusers' pipelines draw them, so that a seed gives the same picture: the posterior of the
image, then the noise.

Shapes: B pictures, n images given (n divides B), H and W pixels, (B, C, h, w) latents as the backbone has them.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from hubgen.autoencoders.latents import LatentSpace, encode
from hubgen.checks import whole
from hubgen.conditioning.families import BackboneFamily, StartRules
from hubgen.controls.control import Control, Generator, Start, Target
from hubgen.controls.inpaint import Inpaint, is_shown_masks
from hubgen.controls.shown_picture import EditInput
from hubgen.data.images import Canvas, Images, crop_region, is_black, one_size, read_images, read_masks
from hubgen.pipelines.checks import check_share, check_strength
from hubgen.pipelines.shown import take_picture
from hubgen.pipelines.sizes import result_size
from hubgen.schedulers.times import noised, timestep_after

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageArguments:
    """The arguments of the same names of `TextToImagePipeline.__call__`."""

    image: Images | None = None
    mask_image: Images | None = None
    strength: float | None = None
    height: int | None = None
    width: int | None = None
    masked_image_latents: torch.Tensor | None = None
    padding_mask_crop: int | None = None
    denoising_start: float | None = None
    output_type: str = "pil"
    control_image: Images | None = None


def start_of(
    arguments: ImageArguments,
    family: BackboneFamily,
    space: LatentSpace,
    strength: float,
    shown: EditInput | None = None,
) -> "NoiseStart":
    """The start of a call, checked before any network runs.

    Args:
        arguments: Of the call.
        family: Of the backbone.
        space: Of its latents.
        strength: The default one, where there is an image.
        shown: What the backbone is shown beside x_t.

    Raises:
        ValueError: An argument is not one that the model can work with, makes no sense without `image` or `mask_image`,
            or these are missing, or what the model is shown is.
    """
    without = {"image": ("mask_image", "strength", "denoising_start"), "mask_image": ()}
    for needed, names in without.items():
        for name in (*names, "masked_image_latents", "padding_mask_crop"):
            if getattr(arguments, needed) is None and getattr(arguments, name) is not None:
                raise ValueError(f"`{name}`: got one without `{needed}`, expected both or none.")
    masks = is_shown_masks(family, space)
    if arguments.mask_image is None and masks:
        found = "`image`, `mask_image`: got none, expected both" if arguments.image is None else ""
        raise ValueError(
            f"{found or '`mask_image`: got None, expected a mask'}: this model inpaints, and is shown the mask and "
            "the masked image beside x_t."
        )
    if shown is None and not masks and family.channels != space.channels:
        raise ValueError(
            f"`image`: this call cannot show a picture to a backbone of {family.channels} channels, expected one of "
            f"{space.channels}, as the latents have."
        )
    if arguments.control_image is not None and (shown is None or shown.is_edited):
        raise ValueError(
            "`control_image`: got one, expected none: this model is not shown one (see `controls` for ControlNets)."
        )
    taken = None if shown is None else take_picture(arguments, shown, space)
    arguments = arguments if taken is None else taken.rest
    if arguments.image is None:
        start = NoiseStart(space.checked_size(arguments.height, arguments.width))
        canvas = Canvas(start.size, space.multiple, space.channels)
    else:
        start = image_start = ImageStart(arguments, family, space, strength, shown)
        canvas = image_start.canvas
    if taken is not None:
        start.shown = [taken.control(canvas)]
    return start


class NoiseStart:
    """A call that begins at noise.

    Args:
        size: (H, W) of the result.
    """

    def __init__(self, size: tuple[int, int]):
        self.size = size
        self.shown: list[Control] = []
        """The picture that the backbone is shown beside x_t"""

    def controls(self) -> list[Control]:
        """What the arguments mean beside where to begin."""
        return self.shown

    def check(self, target: Target) -> None:
        """Raises ValueError where the start and the call do not fit each other."""

    def remaining(self, scheduler: Any, timesteps: torch.Tensor) -> torch.Tensor:
        """All of the scheduler's timesteps."""
        return timesteps

    def begin(self, target: Target, latents: torch.Tensor | None = None) -> Start:
        """Noise, drawn or from `latents`, (B, C, h, w), standard normal."""
        return Start(starting_noise(target.scheduler, target.shape, target.generator, latents, target.device))

    def finished(self, pictures: Any) -> Any:
        """What the call returns of the decoded pictures."""
        return pictures


class ImageStart(NoiseStart):
    """An image to begin from, and what else a call says about it, checked before any network runs.

    Args:
        arguments: With an image, which is one or n images, n a divisor of the number of pictures B: PIL, arrays
            (n, H, W, 3) or tensors (n, 3, H, W) in [0, 1] or of uint8, or latents (n, C, h, w) as the backbone has
            them. A mask, of any size, is white (from 0.5 on) where the picture is to be made anew.
        family: Of the backbone.
        space: Of its latents.
        default_strength: Of diffusers' pipeline for this task.
        shown: What the backbone is shown beside x_t.

    Raises:
        ValueError: An argument is not one that the model can work with.
    """

    def __init__(
        self,
        arguments: ImageArguments,
        family: BackboneFamily,
        space: LatentSpace,
        default_strength: float,
        shown: EditInput | None = None,
    ):
        self.rules, self.space = family.starts, space
        # Kontext begins at the very latents that it is shown.
        self.encode = shown.encoded if shown is not None and shown.as_tokens else encode
        self.draws_first = shown is not None and shown.drawn
        self.denoising_start = check_share("denoising_start", arguments.denoising_start)
        if arguments.strength is not None and self.denoising_start is not None:
            logger.warning("`strength` has no effect beside `denoising_start`.")
        self.strength = check_strength(default_strength if arguments.strength is None else arguments.strength)
        self.image = read_images(arguments.image, space.channels)
        self.mask = None if arguments.mask_image is None else read_masks(arguments.mask_image)
        if self.mask is not None and arguments.padding_mask_crop is None and is_black(self.mask):
            logger.warning("`mask_image` is black everywhere: nothing of the image is made anew.")
        super().__init__(self._size(arguments.height, arguments.width))
        crop = self._crop(arguments.padding_mask_crop, arguments.output_type)
        self.canvas = Canvas(self.size, space.multiple, space.channels, crop)
        self.masked_image_latents = arguments.masked_image_latents
        self.needs_data = self.mask is None or not is_shown_masks(family, space)

    def controls(self) -> list[Control]:
        """What a mask means, and what the backbone is shown."""
        if self.mask is None:
            return self.shown
        masked = Inpaint(self.image, self.mask, self.canvas, self.masked_image_latents, self.draws_first)
        return [masked, *self.shown]

    def check(self, target: Target) -> None:
        """Raises ValueError unless the number of images divides that of the pictures."""
        if target.batch % len(self.image):
            raise ValueError(
                f"`image`: got {len(self.image)}, expected a number that divides the {target.batch} pictures."
            )

    def finished(self, pictures: Any) -> Any:
        """With `padding_mask_crop`, the image with the pictures in their place."""
        return self.canvas.pasted(pictures, self.image, self.mask)

    # ---- checks ----

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """(H, W) of the result: as was asked, or what the family takes from the image."""
        if self.mask is not None:
            one_size("mask_image", self.mask)  # it is resized as the image is
        keeps = self.rules.keeps_image_size and self.mask is None
        return result_size("image", self.image, self.space, height, width, keeps)

    def _crop(self, padding: int | None, output_type: str) -> tuple[int, int, int, int] | None:
        """(left, top, right, bottom) of the part to make, `None` for all of it."""
        if padding is None or self.mask is None:
            return None
        whole("padding_mask_crop", padding, least=0)
        for name, value in (("image", self.image), ("mask_image", self.mask)):
            if torch.is_tensor(value) or len(value) != 1:
                raise ValueError(f"`{name}`: got a tensor or several, expected one PIL image with `padding_mask_crop`.")
        if output_type != "pil":
            raise ValueError(f"`output_type`: got {output_type!r}, expected 'pil' with `padding_mask_crop`.")
        if is_black(self.mask):
            raise ValueError("`mask_image`: got a mask that is black everywhere, expected white where to crop.")
        self.mask = [self.mask[0].resize(self.image[0].size)]
        return crop_region(self.mask[0], self.size, self.space.multiple, int(padding))

    # ---- the start ----

    def remaining(self, scheduler: Any, timesteps: torch.Tensor) -> torch.Tensor:
        """The part of the scheduler's grid that is left to do; tells the scheduler where it begins.

        Args:
            scheduler: Its timesteps just set.
            timesteps: All of them, (n,).

        Raises:
            ValueError: No step is left.
        """
        steps, order = scheduler.num_inference_steps, getattr(scheduler, "order", 1)
        if self.denoising_start is not None:
            begin = len(timesteps) - int((timesteps < timestep_after(scheduler, self.denoising_start)).sum())
            begin -= begin % order  # not from the middle of a step, for which the model is called twice
            if begin >= len(timesteps):
                raise ValueError(f"`denoising_start`: got {self.denoising_start}, which leaves none of {steps} steps.")
        else:
            begin = skipped_steps(steps, self.strength, self.rules) * order
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        return timesteps[begin:]

    def begin(self, target: Target, latents: torch.Tensor | None = None) -> Start:
        """Encodes the image and draws the noise.

        Args:
            target: Of the call.
            latents: (B, C, h, w), instead of drawing: without a mask x_t itself, with one the noise.
        """
        if self.mask is not None:
            return self._begin_under_mask(target, latents)
        if latents is not None:
            return Start(latents.to(target.device, torch.float32))
        data = self._data(target)
        if self.denoising_start is not None:
            return Start(data, data)
        noise = randn_tensor(data.shape, target.generator, target.device, torch.float32)
        return Start(noised(target.scheduler, data, noise, target.timesteps[:1].expand(target.batch)), data, noise)

    def _begin_under_mask(self, target: Target, latents: torch.Tensor | None) -> Start:
        scheduler = target.scheduler
        # At strength 1 diffusers starts from noise alone. Flows get there by themselves: their first time is 1.
        from_noise = latents is not None or (self.strength == 1 and not hasattr(scheduler, "scale_noise"))
        from_noise = from_noise and self.denoising_start is None
        data = self._data(target) if self.needs_data or not from_noise else None
        if latents is None:
            noise = randn_tensor(target.shape, target.generator, target.device, torch.float32)
        else:
            noise = latents.to(target.device).float()
        if from_noise:
            return Start(noise * getattr(scheduler, "init_noise_sigma", 1.0), data, noise)
        assert data is not None
        if self.denoising_start is not None:
            return Start(data, data, noise)
        return Start(noised(scheduler, data, noise, target.timesteps[:1].expand(target.batch)), data, noise)

    def _data(self, target: Target) -> torch.Tensor:
        """The image's latents, (B, C, h, w), drawn from its posterior."""
        pixels = self.canvas.pixels(self.image, target.device)
        if isinstance(target.generator, list) and not self.rules.draws_per_image and self.mask is None:
            pixels = target.for_all(pixels)
        if not Canvas.is_latent(self.image):
            pixels = self.encode(target.vae, pixels, target.generator)
        return pixels if len(pixels) == target.batch else target.for_all(pixels)


def skipped_steps(steps: int, strength: float, rules: StartRules) -> int:
    """How many of the steps are left out at the beginning; raises ValueError where none is left."""
    skipped = steps - int(steps * strength) if rules.rounds_steps_down else int(steps - steps * strength)
    if skipped >= steps:
        least = f"at least {1 / steps:.3g}" if rules.rounds_steps_down else "above 0"
        raise ValueError(f"`strength`: got {strength}, which leaves none of {steps} steps; expected {least}.")
    return skipped


def until(scheduler: Any, timesteps: torch.Tensor, denoising_end: float | None) -> torch.Tensor:
    """Those of `timesteps` before `denoising_end`, a share in (0, 1] of the time from noise to data.

    What is left out is what a call with `denoising_start` of the same value does.

    Raises:
        ValueError: Not in (0, 1], or no step is left.
    """
    share = check_share("denoising_end", None if denoising_end == 1 else denoising_end)
    if share is None:
        return timesteps
    kept = timesteps[: int((timesteps >= timestep_after(scheduler, share)).sum())]
    if len(kept) == 0:
        raise ValueError(f"`denoising_end`: got {denoising_end}, which leaves none of {len(timesteps)} steps.")
    return kept


def starting_noise(
    scheduler: Any, shape: Sequence[int], generator: Generator, latents: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """Noise of the scheduler's scale, in float32: the same in whatever precision the networks compute.

    Args:
        scheduler: Ours or diffusers'.
        shape: (B, ...).
        generator: Its source.
        latents: Standard normal, instead of drawing it.
        device: Where it goes.
    """
    if latents is None:
        latents = randn_tensor(shape, generator, device, torch.float32)
    return latents.to(device, torch.float32) * getattr(scheduler, "init_noise_sigma", 1.0)
