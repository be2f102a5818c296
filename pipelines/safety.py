"""Stable Diffusion's safety checker: looks at pictures and blackens those that it objects to."""

from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor


def blacken(pixels: torch.Tensor, checker: Any, extractor: Any, image_processor: VaeImageProcessor) -> list[bool]:
    """Makes pictures black in place, and tells for each whether it was.

    Args:
        pixels: (B, 3, H, W) about [-1, 1].
        checker: A `StableDiffusionSafetyChecker`.
        extractor: The `CLIPImageProcessor` through which it sees.
        image_processor: Makes pictures of pixels.
    """
    pictures = image_processor.postprocess(pixels, output_type="pil")
    seen = extractor(pictures, return_tensors="pt").pixel_values.to(pixels.device, checker.dtype)
    # It writes zeros, which are gray here, into the images that it is given.
    _, flags = checker(images=pixels.clone(), clip_input=seen)
    flagged = [bool(flag) for flag in flags]
    pixels[flagged] = -1.0
    return flagged
