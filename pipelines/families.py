"""What diffusers' pipelines do of themselves that differs from family to family: defaults, and their names."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hubgen.conditioning.prompts import ClipAndT5, OneEncoder, PromptCondition, TwoClips, TwoClipsAndT5


@dataclass(frozen=True)
class Defaults:
    """What a call does that is not told."""

    steps: int
    guidance_scale: float
    strength: float = 1.0
    """Of a call with an image"""


@dataclass(frozen=True)
class Family:
    """Defaults of a call, and the pipelines of diffusers that the components make."""

    text_to_image: Defaults
    image_to_image: Defaults
    inpaint: Defaults
    backbone: str = ""
    """Class of the backbone in diffusers' pipeline"""
    pipeline: str | None = None
    """diffusers' pipeline that makes pictures of prompts; `None`: none"""
    inpainting: str | None = None
    """diffusers' pipeline for a backbone that is shown mask and masked picture"""
    even_sigmas: bool = False
    """Whether the grid, before its shift, is 1, 1 - 1/n, ... 1/n, whatever the scheduler's own grid is"""
    max_shift: float = 1.15
    """Of the dynamic shift, where the scheduler's config has none"""

    def sigmas(self, steps: int, scheduler: Any) -> list[float] | None:
        """The grid of this many steps, before its shift; `None` for the scheduler's own."""
        if not self.even_sigmas or scheduler.config.get("use_flow_sigmas", False):
            return None
        return np.linspace(1.0, 1 / steps, steps).tolist()


OWN = Family(Defaults(28, 4.0), Defaults(28, 4.0, 0.6), Defaults(28, 4.0, 0.6))
STABLE_DIFFUSION = Family(
    *(Defaults(50, 7.5), Defaults(50, 7.5, 0.8), Defaults(50, 7.5, 1.0)),
    "UNet2DConditionModel",
    "StableDiffusionPipeline",
    "StableDiffusionInpaintPipeline",
)
SDXL = Family(
    *(Defaults(50, 5.0), Defaults(50, 5.0, 0.3), Defaults(50, 7.5, 0.9999)),
    "UNet2DConditionModel",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLInpaintPipeline",
)
SDXL_REFINER = replace(SDXL, pipeline="StableDiffusionXLImg2ImgPipeline")
SD3 = Family(
    *(Defaults(28, 7.0), Defaults(50, 7.0, 0.6), Defaults(50, 7.0, 0.6)),
    "SD3Transformer2DModel",
    "StableDiffusion3Pipeline",
    "StableDiffusion3InpaintPipeline",
    max_shift=1.16,
)
FLUX = Family(
    *(Defaults(28, 3.5), Defaults(28, 7.0, 0.6), Defaults(28, 7.0, 0.6)),
    "FluxTransformer2DModel",
    "FluxPipeline",
    even_sigmas=True,
)

READS = (
    *("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
    *("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
    *("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
    *("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline"),
)


def family_of(condition: PromptCondition, backbone: Any, refines: bool) -> Family:
    """The family of a pipeline, by its text encoders and its backbone.

    Args:
        condition: How the text encoders are joined.
        backbone: Of any class.
        refines: Whether the backbone is told an aesthetic score.
    """
    if isinstance(condition, ClipAndT5):
        return FLUX
    if isinstance(condition, TwoClipsAndT5):
        return SD3
    if isinstance(condition, TwoClips):
        return SDXL_REFINER if refines else SDXL
    encoder: Any = condition.encoders[0]
    clip = encoder is None or encoder.config.model_type in ("clip_text_model", "clip")
    told_text_alone = all(backbone.config.get(name) is None for name in ("class_embed_type", "addition_embed_type"))
    is_sd = isinstance(condition, OneEncoder) and clip and told_text_alone and "cross_attention_dim" in backbone.config
    return STABLE_DIFFUSION if is_sd else OWN
