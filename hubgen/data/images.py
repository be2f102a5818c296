"""Images and masks as callers hand them over: read, checked, and brought to the size of a result.

Shapes: n images of H and W pixels, or n latents (n, C, h, w).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from hubgen.data.pictures import as_mask, on_white, standard

Images: TypeAlias = Image.Image | np.ndarray | torch.Tensor | list[Image.Image] | list[np.ndarray] | list[torch.Tensor]

EXPECTED = "a PIL image, an array (H, W, 3), a tensor (3, H, W), a batch or a list of these"
EXPECTED_MASK = "a PIL image, an array or a tensor (H, W), a batch or a list of these"
LUMA = (0.299, 0.587, 0.114)
"""Brightness of red, green and blue, as Pillow weighs them (ITU-R 601-2)."""


def read_images(image: Any, latent_channels: int, name: str = "image") -> list[Image.Image] | torch.Tensor:
    """RGB images, or a tensor: (n, 3, H, W) in [0, 1], or latents (n, latent_channels, h, w); else ValueError.

    PIL images of any mode are read as files are, transparent ones on white; numbers of uint8 are divided by 255.
    `name` is the argument's, for messages.
    """
    images = _gathered(name, image, EXPECTED)
    if not torch.is_tensor(images):
        return [on_white(standard(picture, f"`{name}`")) for picture in images]
    if images.ndim != 4 or images.shape[1] not in (3, latent_channels):
        raise ValueError(
            f"`{name}`: got shape {tuple(images.shape)} (batch, channels, height, width), expected {EXPECTED}, or "
            f"latents of {latent_channels} channels."
        )
    if images.shape[1] == 3:
        return _in_range(name, images)
    if not images.is_floating_point() or not torch.isfinite(images).all():
        raise ValueError(f"`{name}`: got latents that are not finite floating-point numbers, expected such.")
    return images


def read_hints(image: Any, channels: int) -> list[Image.Image] | torch.Tensor:
    """Pictures that a network is shown: RGB, or grey for one channel, or a tensor (n, channels, H, W) in [0, 1]."""
    images = _gathered("image", image, EXPECTED, gray=channels == 1)
    if not torch.is_tensor(images):
        pictures = [on_white(standard(picture, "`image`")) for picture in images]
        if channels not in (1, 3):
            raise ValueError(f"`image`: got PIL images, expected a tensor (n, {channels}, H, W) for this network.")
        return [picture.convert("L") for picture in pictures] if channels == 1 else pictures
    if images.ndim != 4 or images.shape[1] != channels:
        raise ValueError(
            f"`image`: got shape {tuple(images.shape)} (batch, channels, height, width), expected {channels} channels."
        )
    return _in_range("image", images)


def read_masks(mask: Any) -> list[Image.Image] | torch.Tensor:
    """Grey images, or a tensor (n, 1, H, W) in [0, 1]; else ValueError.

    Transparent PIL images are masks by their opacity (`as_mask`); numbers of uint8 are divided by 255.
    """
    masks = _gathered("mask_image", mask, EXPECTED_MASK, gray=True)
    if not torch.is_tensor(masks):
        return [as_mask(standard(picture, "`mask_image`")) for picture in masks]
    if masks.ndim != 4 or masks.shape[1] != 1:
        raise ValueError(f"`mask_image`: got shape {tuple(masks.shape)}, expected {EXPECTED_MASK}, of one channel.")
    return _in_range("mask_image", masks)


def is_black(masks: list[Image.Image] | torch.Tensor) -> bool:
    """Whether masks as `read_masks` gives them are white, from 0.5 on, nowhere."""
    if torch.is_tensor(masks):
        return bool((masks < 0.5).all())
    return all(mask.getextrema()[1] < 127.5 for mask in masks)


def _gathered(name: str, value: Any, expected: str, gray: bool = False) -> list[Image.Image] | torch.Tensor:
    """PIL images in a list; arrays and tensors, with channels in front, in one tensor of a batch."""
    values = list(value) if isinstance(value, list | tuple) else [value]
    kinds = {kind for item in values for kind in (Image.Image, np.ndarray, torch.Tensor) if isinstance(item, kind)}
    if not values or len(kinds) != 1 or not all(isinstance(item, tuple(kinds)) for item in values):
        found = sorted({type(item).__name__ for item in values}) or "nothing"
        raise ValueError(f"`{name}`: got {found}, expected {expected}.")
    if kinds == {Image.Image}:
        return values
    batches = [_batch(item, gray) for item in values]
    if len({tuple(batch.shape[1:]) for batch in batches}) > 1:
        found = [tuple(item.shape) for item in values]
        raise ValueError(f"`{name}`: got shapes {found}, expected the same one for all.")
    return torch.cat(batches)


def _batch(value: np.ndarray | torch.Tensor, gray: bool) -> torch.Tensor:
    """One array or tensor as (n, C, H, W); of another number of dimensions where it cannot be."""
    if torch.is_tensor(value):
        if gray and value.ndim in (2, 3):
            return value.reshape(-1, 1, *value.shape[-2:])
        return value[None] if value.ndim == 3 else value
    if gray and value.ndim == 3 and value.shape[-1] == 3:  # a picture of a mask, (H, W, 3)
        value = (value.astype(np.float32) / (255 if value.dtype == np.uint8 else 1)) @ np.array(LUMA, np.float32)
    if gray and (value.ndim == 2 or (value.ndim == 3 and value.shape[-1] != 1)):
        value = value[..., None]  # (H, W) or (n, H, W)
    value = value[None] if value.ndim == 3 else value
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(value, -1, 1) if value.ndim == 4 else value))


def _in_range(name: str, values: torch.Tensor) -> torch.Tensor:
    """Floating-point numbers in [0, 1]; ValueError for others than these, uint8 and truth values."""
    if values.dtype == torch.uint8:
        return values.float() / 255
    if values.dtype == torch.bool:
        return values.float()
    if not values.is_floating_point():
        raise ValueError(f"`{name}`: got numbers of {values.dtype}, expected uint8, or floating-point ones in [0, 1].")
    low, high = values.min().item(), values.max().item()
    if not (low >= 0 and high <= 1):  # NaN compares false
        hint = ": (x + 1) / 2" if -1 <= low < 0 and high <= 1 else ": x / 255" if low >= 0 and 1 < high <= 255 else ""
        raise ValueError(f"`{name}`: got values from {low:.4g} to {high:.4g}, expected them in [0, 1]{hint}.")
    return values


def one_size(name: str, images: Sequence[Image.Image] | torch.Tensor) -> tuple[int, int]:
    """(height, width) of all images; ValueError where they differ."""
    if torch.is_tensor(images):
        return images.shape[2], images.shape[3]
    sizes = {(picture.height, picture.width) for picture in images}
    if len(sizes) > 1:
        raise ValueError(f"`{name}`: got sizes {sorted(sizes)} (height, width), expected the same for all.")
    return sizes.pop()


@dataclass(frozen=True)
class Canvas:
    """How images and masks are brought to the size of the result."""

    size: tuple[int, int]
    """(H, W) of the result"""
    multiple: int
    """what height and width are multiples of"""
    latent_channels: int
    crop: tuple[int, int, int, int] | None = None
    """(left, top, right, bottom) of the part that is made; `None`: all of the image"""

    @staticmethod
    def is_latent(image: Any) -> bool:
        """Whether what `read_images` gave are latents."""
        return torch.is_tensor(image) and image.shape[1] != 3

    def pixels(self, image: Any, device: torch.device) -> torch.Tensor:
        """(n, 3, H, W) in [-1, 1] of images, float32; latents as they are, (n, C, h, w)."""
        if self.is_latent(image):
            return image.to(device, torch.float32)
        return self._fitted(self._image_processor, image, device)

    def mask(self, mask: Any, device: torch.device) -> torch.Tensor:
        """(n, 1, H, W) of 0 and 1, float32."""
        return self._fitted(mask_processor(self.multiple), mask, device)

    def pasted(self, pictures: Any, image: Any, mask: Any) -> Any:
        """The pictures; of a crop, the one image with each of them in its place, under the one mask."""
        if self.crop is None:
            return pictures
        overlay = self._image_processor.apply_overlay
        return [overlay(mask[0], image[0], picture, self.crop) for picture in pictures]

    @property
    def _image_processor(self) -> VaeImageProcessor:
        return VaeImageProcessor(vae_scale_factor=self.multiple, vae_latent_channels=self.latent_channels)

    def _fitted(self, processor: VaeImageProcessor, images: Any, device: torch.device) -> torch.Tensor:
        mode = "default" if self.crop is None else "fill"
        pixels = processor.preprocess(images, *self.size, resize_mode=mode, crops_coords=self.crop)
        return pixels.to(device, torch.float32)


def mask_processor(multiple: int) -> VaeImageProcessor:
    """Masks to 0 and 1 in one channel, at sizes that are multiples of `multiple`."""
    return VaeImageProcessor(vae_scale_factor=multiple, do_normalize=False, do_binarize=True, do_convert_grayscale=True)


def crop_region(mask: Image.Image, size: tuple[int, int], multiple: int, padding: int) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) around the white of a mask, with so many pixels around it, in the form of `size`."""
    return mask_processor(multiple).get_crop_region(mask, size[1], size[0], pad=padding)
