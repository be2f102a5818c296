"""What an image encoder says of pictures.

    CLIP's, SigLIP's or another vision model of transformers
    EfficientNetLite0     (hubgen.autoencoders.efficientnet) small, an ImageNet classifier: one vector, no patches
    PooledLatents         the autoencoder of the model itself, which needs no further weights

The last two are hubgen's own. An adapter that was trained with one of them says so in its file (`described`), by which
a call has it again (`encoder_of`).

Shapes: n pictures, (n, 3, h, w) pixels as the encoder takes them, P patches, F features.
"""

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import nn

from hubgen.autoencoders.efficientnet import EfficientNetLite0
from hubgen.autoencoders.latents import LARGEST_SIDE, normalised, posterior
from hubgen.checks import whole

Pictures = list[Image.Image] | torch.Tensor
"""Read and checked: RGB, or (n, 3, H, W) in [0, 1]"""


class PooledLatents(nn.Module):
    """Colours and coarse layout of pictures: the means of an autoencoder's latents over a few places.

    Args:
        vae: The autoencoder.
        places: Along each side.
        size: Pixels of a side that pictures are brought to, a multiple of the autoencoder's pixels per latent.
    """

    def __init__(self, vae: Any, places: int = 4, size: int = 64):
        super().__init__()
        self.vae, self.places, self.image_size = vae, places, size

    @property
    def pooled_features(self) -> int:
        """F: channels of the latents times places."""
        return int(self.vae.config.latent_channels) * self.places**2

    def forward_pooled(self, pixels: torch.Tensor) -> torch.Tensor:
        """(n, F) of the posterior's means, as the backbone has them, for pixels (n, 3, h, w) in [-1, 1]."""
        latents = normalised(posterior(self.vae, pixels)[0], self.vae)  # (n, C, h', w')
        return nn.functional.adaptive_avg_pool2d(latents, self.places).flatten(1)


def is_pooling(encoder: Any) -> bool:
    """Whether an encoder is one of hubgen's, which take pixels in [-1, 1] and give one vector each."""
    return hasattr(encoder, "forward_pooled")


def described(encoder: Any) -> str | None:
    """One of hubgen's encoders in a line of JSON, by which `encoder_of` makes it again; `None` for any other."""
    if isinstance(encoder, PooledLatents):
        return json.dumps({"name": "PooledLatents", "places": encoder.places, "size": encoder.image_size})
    if isinstance(encoder, EfficientNetLite0):
        return json.dumps({"name": "EfficientNetLite0"})
    return None


def encoder_of(description: str, vae: Any, device: torch.device) -> nn.Module:
    """The encoder of a description.

    Args:
        description: What `described` gave, read from a file.
        vae: The model's autoencoder, in which an encoder may see.
        device: Where an encoder with weights of its own goes.

    Raises:
        ValueError: It describes none, or one that cannot be had here.
    """
    try:
        said = json.loads(description)
        name, sizes = said.pop("name"), said
        if name == "PooledLatents" and sizes.keys() == {"places", "size"}:
            size = whole("size", sizes["size"], 1, LARGEST_SIDE)
            places = whole("places", sizes["places"], 1, size)
        elif name != "EfficientNetLite0" or sizes:
            raise ValueError("unknown")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"`image_encoder`: got None, and the adapter's file names {description!r:.100}, expected an image encoder: "
            "that one is not known here."
        ) from error
    if name == "EfficientNetLite0":
        return efficientnet(device)
    if not hasattr(getattr(vae, "config", None), "latent_channels"):
        raise ValueError(
            f"`image_encoder`: got None, and the adapter sees with the model's autoencoder (PooledLatents), expected "
            f"one of latents, got {type(vae).__name__}."
        )
    return PooledLatents(vae, places, size)


@cache
def efficientnet(device: torch.device) -> EfficientNetLite0:
    """The ImageNet classifier on a device, read once; ValueError where its package is not installed."""
    try:
        return EfficientNetLite0.from_pretrained().to(device)
    except ImportError as error:
        raise ValueError(f"`image_encoder`: got None, and the adapter sees with EfficientNetLite0: {error}") from error


def pixels_of(
    pictures: Pictures, encoder: nn.Module, extractor: Any = None, device: torch.device | None = None
) -> torch.Tensor:
    """Pictures as an encoder takes them, resized and normalised: (n, 3, h, w).

    Args:
        pictures: Of any size.
        encoder: Of transformers or of hubgen.
        extractor: Its image processor; `None` for the usual one of its kind.
        device: Where it computes; `None`: where its weights are, which those of an offloaded model are not.
    """
    parameter = next(encoder.parameters())
    device = parameter.device if device is None else device
    if is_pooling(encoder) and extractor is None:
        side = encoder.image_size
        scaled = VaeImageProcessor(vae_scale_factor=1).preprocess(pictures, side, side)  # [-1, 1]
        return scaled.to(device, parameter.dtype)
    extractor = usual_extractor(encoder) if extractor is None else extractor
    scaled = {"do_rescale": False} if torch.is_tensor(pictures) else {}
    pixels = extractor(list(pictures), return_tensors="pt", **scaled).pixel_values
    return pixels.to(device, parameter.dtype)


def usual_extractor(encoder: Any) -> Any:
    """An image processor as CLIP's and SigLIP's repositories have it."""
    from transformers import CLIPImageProcessor, SiglipImageProcessor

    side = encoder.config.image_size
    if "siglip" in encoder.config.model_type:
        return SiglipImageProcessor(size={"height": side, "width": side})
    return CLIPImageProcessor(size=side, crop_size=side)


def encode(encoder: Any, pixels: torch.Tensor, patches: bool) -> torch.Tensor:
    """The last hidden states but one, (n, P, F), for `patches`; else what stands for the whole picture, (n, F)."""
    if is_pooling(encoder):
        return encoder.forward_pooled(pixels)
    if patches:
        return encoder(pixels, output_hidden_states=True).hidden_states[-2]
    out = encoder(pixels)
    return out.image_embeds if "image_embeds" in out else out.pooler_output


def features_of(encoder: Any, patches: bool) -> int:
    """F of `encode`; ValueError for what is no vision model."""
    if is_pooling(encoder):
        if patches:
            raise ValueError(f"`image_encoder`: got {type(encoder).__name__}, expected one that tells patches apart.")
        return encoder.pooled_features
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
