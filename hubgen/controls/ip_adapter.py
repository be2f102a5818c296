"""IP-Adapter (2308.06721): a picture beside the prompt, to whose tokens the backbone attends.

    pipe("a cat", controls=[IPAdapter("ip-adapter_sd15.safetensors", image=cat, scale=0.5, image_encoder=clip)])

One control for all published layouts (`hubgen.formats.ip_adapter_files`) and all backbones, which it knows by their
attention layers alone. Several add up. One that is off, or of scale 0, is not run.

FaceID's files hold LoRA layers besides. They change the model, which no control does, so the pipeline loads them as any
others, and takes them off again (a call that lacks them says so):

    adapter = IPAdapter("ip-adapter-faceid_sd15.bin", image_embeds=face)          # (1, 512) of a face recogniser
    pipe.load_lora_weights(adapter.lora(pipe.unet), adapter_name="faceid")
    pipe("a woman in a garden", controls=[adapter])

To train one, with the base frozen:

    adapter = IPAdapter.fresh(backbone, image_features=768)
    with adapter.attached(backbone, image_embeds):                     # (B, 768)
        prediction = predict(backbone, x_t, timestep, condition)
    adapter.save("ip-adapter.safetensors")

Shapes: B pictures to be made, n pictures to be shown, F features of the image encoder, P patches, S tokens of a picture
with D features, L image tokens.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from hubgen.conditioning.guidance import POSITIVE
from hubgen.controls.control import Control, Prepared, Span, Start, Target, opened
from hubgen.controls.image_attention import Adapter, Scale, check_scale, check_takes_parts, layer_scales
from hubgen.controls.image_encoders import (
    PooledLatents,
    black_like,
    described,
    encode,
    encoder_of,
    features_of,
    pixels_of,
)
from hubgen.controls.seen_pictures import InCall, InTraining
from hubgen.data.images import mask_processor, read_hints, read_masks

logger = logging.getLogger(__name__)

Embeds = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
WITHOUT_LORA = (
    "This IP-Adapter's file holds LoRA layers (FaceID's), which are not on the model: faces will be less alike. Put "
    'them on it once: pipe.load_lora_weights(adapter.lora(pipe.unet), adapter_name="faceid")'
)


class IPAdapter(Control):
    """Shows the backbone pictures.

    Args:
        weights: An adapter's file (safetensors, or .bin of weights alone), a folder or owner/name on the Hub that holds
            `ip-adapter.safetensors`, its tensors by name, or an `Adapter`, which several controls may share.
        image: What is shown, one or n pictures (PIL, arrays, or tensors (n, 3, H, W) in [0, 1]), to all results alike.
        image_embeds: What an image encoder says of them, instead: (n, F), or (n, P, F) for layouts that see patches;
            with a first dimension more for results that are shown different ones, which divides their number. A pair
            has the embeddings of the positive and of the negative branch; alone, the negative one is zeros.
        scale: How much it counts: a number; a list with one for each of its layers; or for a U-Net by blocks, as in
            InstantStyle (2404.02733), `{"up": {"block_0": [0, 1, 0]}}`.
        start: Share of the steps after which it begins ...
        end: ... and ends, see `Span`.
        mask: White where a picture is to be seen, one mask for each picture, which then does not share its place.
        image_encoder: CLIP's or SigLIP's vision model, or another, whatever the adapter was trained with; `None`: the
            one of hubgen's own that its file names, else the pipeline's.
        feature_extractor: Its image processor; `None`: the pipeline's for the pipeline's encoder, or the usual one.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A value is out of its range, or the weights are not those of an adapter.
    """

    def __init__(
        self,
        weights: str | Path | Mapping[str, Any] | Adapter,
        image: Any = None,
        image_embeds: Embeds | None = None,
        scale: Scale = 1.0,
        start: float = 0.0,
        end: float = 1.0,
        mask: Any = None,
        image_encoder: nn.Module | None = None,
        feature_extractor: Any = None,
    ):
        check_scale(scale)
        self.span, self.scale = Span(start, end), scale
        self.adapter = weights if isinstance(weights, Adapter) else Adapter.read(weights)
        if image is not None and image_embeds is not None:
            raise ValueError("`image`, `image_embeds`: got both, expected one of them.")
        if image is not None and not self.adapter.kind.reads_pictures:
            raise ValueError(
                "`image`: got pictures, expected `image_embeds`: IP-Adapter FaceID is shown a face recogniser's "
                "embeddings, (n, 512)."
            )
        self.images = None if image is None else read_hints(image, 3)
        self.embeds = None if image_embeds is None else self.checked(image_embeds)
        self.mask = None if mask is None else read_masks(mask)
        if self.mask is not None and len(self.mask) != self.count:
            raise ValueError(f"`mask`: got {len(self.mask)}, expected {self.count}, one for each picture.")
        self.image_encoder, self.feature_extractor = image_encoder, feature_extractor

    @classmethod
    def fresh(cls, backbone: nn.Module, image_features: int, tokens: int = 4, **shown: Any) -> Self:
        """A new one, of which the picture stays as it is until it is trained; see `Adapter.fresh`.

        Args:
            backbone: Of any family.
            image_features: F.
            tokens: S.
            **shown: Further arguments.
        """
        return cls(Adapter.fresh(backbone, image_features, tokens), **shown)

    @property
    def network(self) -> nn.Module:
        """Its weights, to train."""
        return self.adapter.network

    def save(self, path: str | Path) -> None:
        """Writes the adapter as a safetensors file, in the layout in which it came.

        If `image_encoder` is one of hubgen's own, the file names it.
        """
        replace(self.adapter, seen_by=described(self.image_encoder) or self.adapter.seen_by).save(path)

    def lora(self, backbone: Any) -> dict[str, torch.Tensor]:
        """FaceID's LoRA layers, which belong to its adapter: `pipe.load_lora_weights(adapter.lora(pipe.unet))`.

        Of other layouts there are none: an empty dict.
        """
        return self.adapter.lora_of(backbone)

    @property
    def patches(self) -> bool:
        """Whether it sees the encoder's tokens, (n, P, F)."""
        return self.adapter.network.image_proj.reads_patches

    @property
    def features(self) -> int:
        """F."""
        return self.adapter.network.image_proj.image_features

    @property
    def count(self) -> int:
        """n; 0 where nothing is shown yet."""
        if self.images is not None:
            return len(self.images)
        return 0 if self.embeds is None else self.embeds[0].shape[1]

    def checked(self, embeds: Embeds) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of the positive and the negative branch, (b, n, F) or (b, n, P, F) each."""
        pair = tuple(embeds) if isinstance(embeds, list | tuple) else (embeds,)
        ndim, shape = (3, "n, P, F") if self.patches else (2, "n, F")
        for one in pair:
            if not torch.is_tensor(one) or not one.is_floating_point() or one.ndim not in (ndim, ndim + 1):
                got = tuple(one.shape) if torch.is_tensor(one) else type(one).__name__
                raise ValueError(f"`image_embeds`: got {got}, expected numbers ({shape}) or (b, {shape}), or a pair.")
            if not one.isfinite().all():
                raise ValueError("`image_embeds`: got NaN or infinity, expected finite numbers.")
            if one.shape[-1] != self.features:
                raise ValueError(f"`image_embeds`: got {one.shape[-1]} features, expected {self.features}.")
        found = [one[None] if one.ndim == ndim else one for one in pair]
        if len({one.shape for one in found}) != 1 or len(found) > 2:
            shapes = [tuple(one.shape) for one in found]
            raise ValueError(f"`image_embeds`: got {shapes}, expected one, or a pair of the same shape.")
        return found[0], found[1] if len(found) == 2 else torch.zeros_like(found[0])

    def check(self, target: Target) -> None:
        """Raises ValueError where adapter, pictures and call do not fit each other."""
        names = self.adapter.names(target.backbone)
        scales = layer_scales(self.scale, names)
        check_takes_parts(target.backbone, names)
        if any(scales.values()) and not self.adapter.wears_lora(target.backbone):
            logger.warning(WITHOUT_LORA)
        if self.embeds is not None:
            if target.batch % len(self.embeds[0]):
                raise ValueError(
                    f"`image_embeds`: got {len(self.embeds[0])} sets of pictures, expected a number that divides the "
                    f"{target.batch} results."
                )
            return
        if self.images is None:
            raise ValueError("`image`, `image_embeds`: got neither, expected one of them.")
        encoder = self.encoder(target)
        if encoder is None:
            raise ValueError("`image_encoder`: got None, and the pipeline has none, expected one to see `image` with.")
        found = features_of(encoder, self.patches)
        if found != self.features:
            raise ValueError(f"`image_encoder`: got one of {found} features, expected {self.features}.")

    def encoder(self, target: Target) -> Any:
        """The image encoder of a call; ValueError where the adapter's file names one that cannot be had."""
        if self.image_encoder is None and self.adapter.seen_by is not None:
            return encoder_of(self.adapter.seen_by, target.vae, target.device)
        return target.image_encoder if self.image_encoder is None else self.image_encoder

    def prepare(self, target: Target, start: Start) -> Prepared:
        names, steps = self.adapter.names(target.backbone), len(target.timesteps)
        scales = {number: scale for number, scale in layer_scales(self.scale, names).items() if scale}
        if not scales or not any(self.span.covers(step, steps) for step in range(steps)):
            return Prepared()
        backbone: Any = target.backbone
        self.network.to(target.device, backbone.dtype)
        places = {names[number]: (number, scale) for number, scale in scales.items()}
        return InCall(self.adapter, places, target, self.span, self.embeds_of(target), self.masks(target))

    @torch.no_grad()
    def embeds_of(self, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of the positive and of any other branch, (b, n, F) or (b, n, P, F) each."""
        if self.embeds is not None:
            return self.embeds
        encoder, without = self.encoder(target), self.adapter.kind.without
        extractor = self.feature_extractor
        if self.image_encoder is None and self.adapter.seen_by is None and extractor is None:
            extractor = target.feature_extractor
        assert self.images is not None
        its_own = self.image_encoder is None or (isinstance(encoder, PooledLatents) and encoder.vae is target.vae)
        device = target.device if its_own else None  # of the pipeline, which may be offloaded
        pixels = pixels_of(self.images, encoder, extractor, device)
        shown = encode(encoder, pixels, self.patches)
        if target.branches == (POSITIVE,) or without == "zeros":
            return shown[None], torch.zeros_like(shown)[None]
        nothing = torch.zeros_like(pixels)
        if without == "black":
            nothing = pixels_of(black_like(self.images), encoder, extractor, device)
        return shown[None], encode(encoder, nothing, self.patches)[None]

    def masks(self, target: Target) -> torch.Tensor | None:
        """(n, 1, H, W) of 0 and 1 at the size of the result."""
        if self.mask is None:
            return None
        pixels = mask_processor(target.latents.multiple).preprocess(self.mask, *target.size)
        return pixels.to(target.device, torch.float32)

    @contextmanager
    def attached(
        self, backbone: nn.Module, image_embeds: torch.Tensor, timestep: torch.Tensor | None = None
    ) -> Iterator[None]:
        """The backbone sees pictures inside, with gradients for the adapter: for training.

        With gradient checkpointing the backward pass belongs inside too, since it computes the blocks once more.

        Args:
            backbone: Its rows are B pictures.
            image_embeds: (B, F) or (B, P, F), one picture each.
            timestep: (B,), as the backbone takes it, for adapters that are told the time.
        """
        seen = self.in_training(backbone)
        seen.show(image_embeds, timestep)
        with opened(backbone, [seen]):
            yield

    def in_training(self, backbone: nn.Module) -> InTraining:
        """What `attached` opens, for those who open it themselves and show it one batch after another."""
        names = self.adapter.names(backbone)
        places = {names[number]: (number, scale) for number, scale in layer_scales(self.scale, names).items()}
        return InTraining(self.adapter, places)
