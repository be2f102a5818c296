"""What an image encoder (CLIP's or SigLIP's vision model of transformers) says of pictures.

Shapes: n pictures, (n, 3, h, w) pixels as the encoder takes them, P patches, F features.
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import nn

Pictures = list[Image.Image] | torch.Tensor
"""Read and checked: RGB, or (n, 3, H, W) in [0, 1]"""


def pixels_of(pictures: Pictures, encoder: nn.Module, extractor: Any = None) -> torch.Tensor:
    """Pictures as an encoder takes them, resized and normalised: (n, 3, h, w).

    Args:
        pictures: Of any size.
        encoder: Of transformers.
        extractor: Its image processor; `None` for the usual one of its kind.
    """
    extractor = usual_extractor(encoder) if extractor is None else extractor
    scaled = {"do_rescale": False} if torch.is_tensor(pictures) else {}
    pixels = extractor(list(pictures), return_tensors="pt", **scaled).pixel_values
    parameter = next(encoder.parameters())
    return pixels.to(parameter.device, parameter.dtype)


def usual_extractor(encoder: Any) -> Any:
    """An image processor as CLIP's and SigLIP's repositories have it."""
    from transformers import CLIPImageProcessor, SiglipImageProcessor

    side = encoder.config.image_size
    if "siglip" in encoder.config.model_type:
        return SiglipImageProcessor(size={"height": side, "width": side})
    return CLIPImageProcessor(size=side, crop_size=side)


def encode(encoder: Any, pixels: torch.Tensor, patches: bool) -> torch.Tensor:
    """The last hidden states but one, (n, P, F), for `patches`; else what stands for the whole picture, (n, F)."""
    if patches:
        return encoder(pixels, output_hidden_states=True).hidden_states[-2]
    out = encoder(pixels)
    return out.image_embeds if "image_embeds" in out else out.pooler_output


def features_of(encoder: Any, patches: bool) -> int:
    """F of `encode`; ValueError for what is no vision model."""
    config = getattr(encoder, "config", None)
    if not hasattr(config, "image_size") or not hasattr(config, "hidden_size"):
        raise ValueError(f"`image_encoder`: got {type(encoder).__name__}, expected a vision model of transformers.")
    projected = not patches and hasattr(encoder, "visual_projection")
    return config.projection_dim if projected else config.hidden_size


def black_like(pictures: Sequence[Any] | torch.Tensor) -> Pictures:
    """As many black pictures."""
    if torch.is_tensor(pictures):
        return torch.zeros_like(pictures)
    return [Image.new("RGB", picture.size) for picture in pictures]
