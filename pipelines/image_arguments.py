"""Images and masks as callers hand them over, brought to one form; every check of them that needs no network.

Shapes: n images of H and W pixels, or n latents (n, C, h, w).
"""

import math
import numbers
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image

Images: TypeAlias = Image.Image | np.ndarray | torch.Tensor | list[Image.Image] | list[np.ndarray] | list[torch.Tensor]

EXPECTED = "a PIL image, an array (H, W, 3), a tensor (3, H, W), a batch or a list of these"
EXPECTED_MASK = "a PIL image, an array or a tensor (H, W), a batch or a list of these"


def check_strength(strength: float) -> float:
    """Raises ValueError unless it is a number in [0, 1]."""
    if not _is_number(strength) or not 0 <= strength <= 1:  # false for NaN
        raise ValueError(f"`strength`: got {strength!r}, expected a number in [0, 1].")
    return float(strength)


def check_share(name: str, share: float | None) -> float | None:
    """Raises ValueError unless it is `None` or a number in (0, 1)."""
    if share is not None and (not _is_number(share) or not 0 < share < 1):
        raise ValueError(
            f"`{name}`: got {share!r}, expected a number in (0, 1), a share of the time from noise to data."
        )
    return None if share is None else float(share)


def read_images(image: Any, latent_channels: int) -> list[Image.Image] | torch.Tensor:
    """PIL images, or a tensor: (n, 3, H, W) in [0, 1], or latents (n, latent_channels, h, w); else ValueError."""
    images = _gathered("image", image, EXPECTED)
    if not torch.is_tensor(images):
        for picture in images:
            if picture.mode != "RGB":
                raise ValueError(
                    f"`image`: got a PIL image of mode {picture.mode!r}, expected 'RGB': `image.convert('RGB')`, after "
                    "laying a transparent one on a background."
                )
        return images
    if images.ndim != 4 or images.shape[1] not in (3, latent_channels):
        raise ValueError(
            f"`image`: got shape {tuple(images.shape)} (batch, channels, height, width), expected {EXPECTED}, or "
            f"latents of {latent_channels} channels."
        )
    if images.shape[1] == 3:
        _check_values("image", images)
    elif not images.is_floating_point() or not torch.isfinite(images).all():
        raise ValueError("`image`: got latents that are not finite floating-point numbers, expected such.")
    return images


def read_masks(mask: Any) -> list[Image.Image] | torch.Tensor:
    """PIL images, or a tensor (n, 1, H, W) in [0, 1]; else ValueError."""
    masks = _gathered("mask_image", mask, EXPECTED_MASK, gray=True)
    if not torch.is_tensor(masks):
        return masks
    if masks.ndim != 4 or masks.shape[1] != 1:
        raise ValueError(f"`mask_image`: got shape {tuple(masks.shape)}, expected {EXPECTED_MASK}, of one channel.")
    masks = masks.float() if masks.dtype == torch.bool else masks
    _check_values("mask_image", masks)
    return masks


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
    if gray and (value.ndim == 2 or (value.ndim == 3 and value.shape[-1] != 1)):
        value = value[..., None]  # (H, W) or (n, H, W)
    value = value[None] if value.ndim == 3 else value
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(value, -1, 1) if value.ndim == 4 else value))


def _check_values(name: str, values: torch.Tensor) -> None:
    if not values.is_floating_point():
        raise ValueError(f"`{name}`: got numbers of {values.dtype}, expected floating-point ones in [0, 1].")
    low, high = values.min().item(), values.max().item()
    if not (low >= 0 and high <= 1):  # NaN compares false
        raise ValueError(f"`{name}`: got values from {low:.4g} to {high:.4g}, expected them in [0, 1].")


def one_size(name: str, images: Sequence[Image.Image] | torch.Tensor) -> tuple[int, int]:
    """(height, width) of all images; ValueError where they differ."""
    if torch.is_tensor(images):
        return images.shape[2], images.shape[3]
    sizes = {(picture.height, picture.width) for picture in images}
    if len(sizes) > 1:
        raise ValueError(f"`{name}`: got sizes {sorted(sizes)} (height, width), expected the same for all.")
    return sizes.pop()


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
