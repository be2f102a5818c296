"""Image to image and inpainting, whatever the family: where the walk begins, and what of the picture it keeps.

Image to image (SDEdit, 2108.01073) starts from the picture noised to a time in the middle of the grid. Inpainting also
puts the known part back after each step, noised to the time reached (RePaint, 2201.09865, without its resampling), or,
where the network has inputs for them, shows it the mask and the masked picture beside x_t.

    start = image_start(pipe, image, mask_image, strength=0.8)      # all checks; None without an image
    timesteps = start.rest(timesteps)                               # the part of the grid still to walk
    begin = start.begin(timesteps, batch, generator)                # the VAE encodes, noise is drawn

Random numbers are drawn as diffusers' pipelines draw them, so that a seed gives the same picture: the posterior of the
picture, the noise, the posterior of the masked picture.

Shapes: B pictures, n images given (n divides B), H and W pixels, (B, C, h, w) latents as the backbone has them.
"""

import logging
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor

from hubgen.autoencoders.latents import encode
from hubgen.conditioning.inputs import takes_tokens
from hubgen.pipelines.denoising import Generator
from hubgen.pipelines.image_arguments import Images, check_share, check_strength, one_size, read_images, read_masks

logger = logging.getLogger(__name__)

Blend: TypeAlias = Callable[[int, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Begin:
    """Where the walk begins and what accompanies it."""

    latents: torch.Tensor
    """(B, C, h, w), x_t at the first of the timesteps"""
    blend: Blend | None = None
    """`(step, latents) -> latents` after each step: puts the part outside the mask back; `None`: nothing to put back"""
    extra_channels: torch.Tensor | None = None
    """(B, 1 + C, h, w), mask and masked picture, joined to x_t before the network; `None`: it has no inputs for them"""


def image_start(
    pipe: Any,
    image: Images | None = None,
    mask_image: Images | None = None,
    strength: float | None = None,
    height: int | None = None,
    width: int | None = None,
    masked_image_latents: torch.Tensor | None = None,
    padding_mask_crop: int | None = None,
    denoising_start: float | None = None,
    output_type: str = "pil",
) -> "ImageStart | None":
    """The start of a call with an image, checked; `None` for a call without.

    Raises:
        ValueError: As `ImageStart`; or an argument was given, or is needed by the network, that has no sense without
            an image.
    """
    if image is not None:
        return ImageStart(
            pipe,
            image,
            mask_image,
            strength,
            height,
            width,
            masked_image_latents,
            padding_mask_crop,
            denoising_start,
            output_type,
        )
    lonely = {
        "mask_image": mask_image,
        "strength": strength,
        "masked_image_latents": masked_image_latents,
        "padding_mask_crop": padding_mask_crop,
        "denoising_start": denoising_start,
    }
    for name, value in lonely.items():
        if value is not None:
            raise ValueError(f"`{name}`: got one without `image`, expected both or none.")
    if takes_mask(pipe.backbone, pipe.vae):
        raise ValueError(
            "`image`, `mask_image`: got none, expected both: this model inpaints, and is shown the mask and the masked "
            "image beside x_t."
        )
    return None


class ImageStart:
    """An image to start from and perhaps a mask, checked before any network runs.

    Args:
        pipe: A pipeline with the components, sizes and defaults of `TextToImagePipeline`.
        image: One or n images, n a divisor of the number of pictures B: PIL (RGB), arrays (n, H, W, 3) or tensors
            (n, 3, H, W) in [0, 1], or latents (n, C, h, w) as the backbone has them.
        mask_image: White (from 0.5 on) where the picture is to be made anew; the size of the image. PIL, or arrays or
            tensors in [0, 1].
        strength: In [0, 1], the share of the grid that is walked; `None` for the default of diffusers' pipeline of
            this family.
        height: Pixels of the result, to which the images are resized. `None`: a U-Net without a mask takes the image's
            own size, cut to what it can make; else the size that the model was trained for, as in diffusers.
        width: Likewise.
        masked_image_latents: (n, C, h, w), in the place of the encoded masked image, for networks that are shown it.
        padding_mask_crop: Pixels around the mask's bounding box: only this part of the image is made, at full size,
            and put back into the image. One PIL image and mask, and `output_type="pil"`.
        denoising_start: In (0, 1), instead of `strength`: `image` holds latents on which another model has walked up
            to this part of the grid (its `denoising_end`); no noise is added.
        output_type: Of the call.

    Raises:
        ValueError: An argument is not one that the model can work with.
    """

    def __init__(
        self,
        pipe: Any,
        image: Images,
        mask_image: Images | None = None,
        strength: float | None = None,
        height: int | None = None,
        width: int | None = None,
        masked_image_latents: torch.Tensor | None = None,
        padding_mask_crop: int | None = None,
        denoising_start: float | None = None,
        output_type: str = "pil",
    ):
        self.vae, self.backbone, self.scheduler = pipe.vae, pipe.backbone, pipe.scheduler
        self.channels = self.vae.config.latent_channels
        self.factor = pipe.vae_scale_factor
        self.multiple = pipe.size_multiple
        self.is_unet = is_unet(self.backbone)
        self.denoising_start = check_share("denoising_start", denoising_start)
        if strength is not None and denoising_start is not None:
            logger.warning("`strength` has no effect beside `denoising_start`.")
        default = pipe.defaults(image=True, mask=mask_image is not None).strength
        self.strength = check_strength(default if strength is None else strength)

        self.image = read_images(image, self.channels)
        self.is_latent = torch.is_tensor(self.image) and self.image.shape[1] != 3
        self.mask = None if mask_image is None else read_masks(mask_image)
        if self.mask is None:
            for name, value in (
                ("masked_image_latents", masked_image_latents),
                ("padding_mask_crop", padding_mask_crop),
            ):
                if value is not None:
                    raise ValueError(f"`{name}`: got one without `mask_image`, expected both or none.")
            if takes_mask(self.backbone, self.vae):
                raise ValueError("`mask_image`: got None, expected a mask: this model inpaints and is shown it.")
        self.size = pipe.check_size(*self._check_sizes(pipe.default_size, height, width))
        self.masked_latents = self._check_masked_latents(masked_image_latents)
        self.crop = self._check_crop(padding_mask_crop, output_type)

    # ---- checks ----

    def _check_sizes(self, default: tuple[int, int], height: int | None, width: int | None) -> tuple[int, int]:
        """(H, W) of the result."""
        found = one_size("image", self.image)
        if self.is_latent:
            found = (found[0] * self.factor, found[1] * self.factor)
        if self.mask is not None and (sides := one_size("mask_image", self.mask)) != found:
            raise ValueError(
                f"`mask_image`: got {sides[0]}x{sides[1]} pixels (height x width), expected those of the image, "
                f"{found[0]}x{found[1]}."
            )
        if self.is_latent:
            own = found
        elif self.is_unet and self.mask is None:
            own = (
                max(found[0] // self.multiple, 1) * self.multiple,
                max(found[1] // self.multiple, 1) * self.multiple,
            )
        else:
            own = default
        size = (own[0] if height is None else height, own[1] if width is None else width)
        if self.is_latent and size != found:
            raise ValueError(
                f"`height`, `width`: got {size[0]}x{size[1]}, expected {found[0]}x{found[1]}, because `image` holds "
                "latents of that size, which cannot be resized."
            )
        if size != found:
            logger.warning(
                "The image of %dx%d pixels (height x width) is resized to %dx%d; `height` and `width` choose another "
                "size, in multiples of %d.",
                *found,
                *size,
                self.multiple,
            )
        return size

    def _check_masked_latents(self, latents: torch.Tensor | None) -> torch.Tensor | None:
        if latents is None:
            if self.is_latent and takes_mask(self.backbone, self.vae):
                raise ValueError(
                    "`masked_image_latents`: got None, expected them beside an `image` of latents: latents cannot be "
                    "masked, and this model is shown the masked image."
                )
            return None
        if not takes_mask(self.backbone, self.vae):
            logger.warning("`masked_image_latents` have no effect: this model is not shown the masked image.")
        expected = (self.channels, self.size[0] // self.factor, self.size[1] // self.factor)
        if not torch.is_tensor(latents) or tuple(latents.shape[1:]) != expected:
            found = tuple(latents.shape) if torch.is_tensor(latents) else type(latents).__name__
            raise ValueError(f"`masked_image_latents`: got {found}, expected a tensor of shape (n, *{expected}).")
        return latents

    def _check_crop(self, padding: int | None, output_type: str) -> tuple[int, int, int, int] | None:
        """(left, top, right, bottom) of the part to make, `None` for all of it."""
        if padding is None:
            return None
        if not isinstance(padding, numbers.Integral) or isinstance(padding, bool) or padding < 0:
            raise ValueError(f"`padding_mask_crop`: got {padding!r}, expected a whole number of pixels, at least 0.")
        for name, value in (("image", self.image), ("mask_image", self.mask)):
            if torch.is_tensor(value) or len(value) != 1:
                raise ValueError(f"`{name}`: got a tensor or several, expected one PIL image with `padding_mask_crop`.")
        if output_type != "pil":
            raise ValueError(f"`output_type`: got {output_type!r}, expected 'pil' with `padding_mask_crop`.")
        return self._mask_processor.get_crop_region(self.mask[0], self.size[1], self.size[0], pad=int(padding))

    def check_batch(self, batch: int) -> None:
        """Raises ValueError unless there is an image and a mask for each of B pictures, each as often as the others."""
        given = {"image": self.image, "mask_image": self.mask, "masked_image_latents": self.masked_latents}
        for name, value in given.items():
            if value is not None and batch % len(value):
                raise ValueError(f"`{name}`: got {len(value)}, expected a number that divides the {batch} pictures.")

    # ---- the walk ----

    def rest(self, timesteps: torch.Tensor) -> torch.Tensor:
        """The part of the scheduler's grid still to walk, and tells the scheduler where it begins.

        Args:
            timesteps: Those of the scheduler, just set.

        Raises:
            ValueError: No step is left.
        """
        steps, order = self.scheduler.num_inference_steps, getattr(self.scheduler, "order", 1)
        if self.denoising_start is not None:
            left = int((timesteps < cutoff(self.scheduler, self.denoising_start)).sum())
            if order == 2 and left % 2 == 0:
                left += 1  # not from the middle of a step: all timesteps but the highest come twice
            begin = len(timesteps) - left
            if begin >= len(timesteps):
                raise ValueError(f"`denoising_start`: got {self.denoising_start}, which leaves none of {steps} steps.")
        else:
            # diffusers' pipelines for U-Nets round the number of steps down, those for flows the number left out.
            skipped = steps - int(steps * self.strength) if self.is_unet else int(steps - steps * self.strength)
            if skipped >= steps:
                least = f"at least {1 / steps:.3g}" if self.is_unet else "above 0"
                raise ValueError(
                    f"`strength`: got {self.strength}, which leaves none of {steps} steps; expected {least}."
                )
            begin = skipped * order
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(begin)
        return timesteps[begin:]

    def begin(
        self,
        timesteps: torch.Tensor,
        batch: int,
        generator: Generator = None,
        latents: torch.Tensor | None = None,
        per_prompt: int = 1,
    ) -> Begin:
        """Encodes the image and draws the noise.

        Args:
            timesteps: (t,), those of `rest`, perhaps cut at the end.
            batch: B.
            generator: One, or one for each of the B pictures.
            latents: (B, C, h, w), instead of drawing: without a mask x_t itself, with one the noise.
            per_prompt: Pictures of a prompt, which lie next to each other. Where there are as many images as prompts,
                image i goes with prompt i (diffusers deals the images out in turns); any other number goes in turns.
        """
        generator = list(generator) if isinstance(generator, tuple) else generator

        def for_all(values: torch.Tensor) -> torch.Tensor:
            """(n, ...) to (B, ...)."""
            if len(values) * per_prompt == batch:
                return values.repeat_interleave(per_prompt, 0)
            return values.repeat(batch // len(values), *[1] * (values.ndim - 1))

        begin = self._begin_image_to_image if self.mask is None else self._begin_inpainting
        return begin(timesteps, batch, generator, latents, for_all)

    def _begin_image_to_image(
        self,
        timesteps: torch.Tensor,
        batch: int,
        generator: Generator,
        latents: torch.Tensor | None,
        for_all: Callable[[torch.Tensor], torch.Tensor],
    ) -> Begin:
        device = timesteps.device
        if latents is not None:
            return Begin(latents.to(device, torch.float32))
        pixels = self._pixels(device)
        if isinstance(generator, list) and not takes_tokens(self.backbone):
            pixels = for_all(pixels)  # a draw from the posterior for each picture; diffusers' FLUX draws for each image
        known = for_all(self._encode(pixels, generator))  # (B, C, h, w)
        if self.denoising_start is not None:
            return Begin(known)
        noise = randn_tensor(known.shape, generator, device, torch.float32)
        return Begin(noised(self.scheduler, known, noise, timesteps[:1].expand(batch)))

    def _begin_inpainting(
        self,
        timesteps: torch.Tensor,
        batch: int,
        generator: Generator,
        latents: torch.Tensor | None,
        for_all: Callable[[torch.Tensor], torch.Tensor],
    ) -> Begin:
        device, shown = timesteps.device, takes_mask(self.backbone, self.vae)
        shape = (batch, self.channels, self.size[0] // self.factor, self.size[1] // self.factor)
        # At strength 1 diffusers starts from noise alone. Flows get there by themselves: their first time is 1.
        pure = latents is not None or (self.strength == 1 and not hasattr(self.scheduler, "scale_noise"))
        pure = pure and self.denoising_start is None
        pixels = self._pixels(device)
        known = None if shown and pure else for_all(self._encode(pixels, generator))
        noise = randn_tensor(shape, generator, device, torch.float32) if latents is None else latents.to(device).float()
        if pure:
            x_t = noise * getattr(self.scheduler, "init_noise_sigma", 1.0)
        else:
            assert known is not None
            first = timesteps[:1].expand(batch)
            x_t = known if self.denoising_start is not None else noised(self.scheduler, known, noise, first)

        pixel_mask = self._fitted(self._mask_processor, self.mask, device)  # (n, 1, H, W), 1 where to make anew, else 0
        mask = for_all(torch.nn.functional.interpolate(pixel_mask, size=shape[2:]))
        if shown:
            masked = self.masked_latents
            if masked is None:
                masked = self._encode(pixels * (pixel_mask < 0.5), generator)
            return Begin(x_t, extra_channels=torch.cat([mask, for_all(masked.to(device, torch.float32))], dim=1))
        if not self.is_latent and self.masked_latents is None:
            # diffusers encodes the masked image here too; only its random numbers count, for steps that draw more.
            draw_posterior((max(len(pixels), len(pixel_mask)), *shape[1:]), generator, device)
        assert known is not None
        return Begin(x_t, blend=self._blend(timesteps, mask, known, noise))

    def _blend(self, timesteps: torch.Tensor, mask: torch.Tensor, known: torch.Tensor, noise: torch.Tensor) -> Blend:
        def blend(step: int, latents: torch.Tensor) -> torch.Tensor:
            outside = known
            if step + 1 < len(timesteps):
                outside = noised(self.scheduler, known, noise, timesteps[step + 1 : step + 2])
            return (1 - mask) * outside + mask * latents

        return blend

    def finish(self, pictures: Any) -> Any:
        """What the call returns: with `padding_mask_crop`, the whole images with the pictures in their place."""
        if self.crop is None:
            return pictures
        assert self.mask is not None
        overlay = self._image_processor.apply_overlay
        return [overlay(self.mask[0], self.image[0], picture, self.crop) for picture in pictures]

    # ---- images to tensors ----

    @property
    def _image_processor(self) -> VaeImageProcessor:
        return VaeImageProcessor(vae_scale_factor=self.multiple, vae_latent_channels=self.channels)

    @property
    def _mask_processor(self) -> VaeImageProcessor:
        return VaeImageProcessor(
            vae_scale_factor=self.multiple, do_normalize=False, do_binarize=True, do_convert_grayscale=True
        )

    def _fitted(self, processor: VaeImageProcessor, images: Any, device: torch.device) -> torch.Tensor:
        mode = "default" if self.crop is None else "fill"
        pixels = processor.preprocess(images, *self.size, resize_mode=mode, crops_coords=self.crop)
        return pixels.to(device, torch.float32)

    def _pixels(self, device: torch.device) -> torch.Tensor:
        """(n, 3, H, W) in [-1, 1], or the latents that were given, (n, C, h, w)."""
        if self.is_latent:
            return self.image.to(device, torch.float32)
        return self._fitted(self._image_processor, self.image, device)

    def _encode(self, pixels: torch.Tensor, generator: Generator) -> torch.Tensor:
        """`_pixels` to latents (n, C, h, w) as the backbone has them, drawn from the posterior."""
        if self.is_latent:
            return pixels
        return encode(self.vae, pixels, generator)


# ---- families ----


def is_unet(backbone: Any) -> bool:
    """Whether a backbone is a U-Net; the other ones are transformers, made for flows."""
    return "down_block_types" in backbone.config


def takes_mask(backbone: Any, vae: Any) -> bool:
    """Whether a backbone is shown mask and masked image beside x_t: 2 C + 1 input channels."""
    return backbone.config.in_channels == 2 * vae.config.latent_channels + 1


# ---- schedulers ----


def noised(scheduler: Any, data: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """x_t of data and noise, (B, C, h, w) each, at timesteps (B,) or (1,), by the scheduler's own path."""
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(data, timesteps, noise)
    return scheduler.add_noise(data, noise, timesteps)


def cutoff(scheduler: Any, share: float) -> int:
    """The timestep at which a share of the time from noise to data is over: steps from it on are of the first part."""
    total = scheduler.config.num_train_timesteps
    return round(total - share * total)


def until(scheduler: Any, timesteps: torch.Tensor, denoising_end: float | None) -> torch.Tensor:
    """Those of `timesteps` before `denoising_end`, a share in (0, 1] of the time from noise to data.

    What is left out is what `denoising_start` of the same value walks.

    Raises:
        ValueError: Not in (0, 1], or no step is left.
    """
    share = check_share("denoising_end", None if denoising_end == 1 else denoising_end)
    if share is None:
        return timesteps
    kept = timesteps[: int((timesteps >= cutoff(scheduler, share)).sum())]
    if len(kept) == 0:
        raise ValueError(f"`denoising_end`: got {denoising_end}, which leaves none of {len(timesteps)} steps.")
    return kept


def draw_posterior(shape: tuple[int, ...], generator: Generator, device: torch.device) -> None:
    """Takes from the generators what the posterior of (n, C, h, w) latents would."""
    if isinstance(generator, list):
        for one in generator[: shape[0]]:
            randn_tensor((1, *shape[1:]), one, device, torch.float32)
    else:
        randn_tensor(shape, generator, device, torch.float32)
