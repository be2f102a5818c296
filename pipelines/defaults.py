"""Per-family defaults of diffusers' pipelines, and the names of these pipelines."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hubgen.conditioning.families import BackboneFamily
from hubgen.conditioning.prompts import ClipAndT5, OneEncoder, PromptCondition, TwoClips, TwoClipsAndT5
from hubgen.controls.shown_picture import FLUX_CONTROL, INSTRUCTION, REFERENCE, EditInput


@dataclass(frozen=True)
class Defaults:
    """Defaults of a call."""

    steps: int
    guidance_scale: float
    strength: float = 1.0
    """Of a call with an image"""


@dataclass(frozen=True)
class FamilyDefaults:
    """Defaults of a call for each task, and the pipelines of diffusers that the components make."""

    text_to_image: Defaults
    image_to_image: Defaults
    inpaint: Defaults
    backbone: str = ""
    """Class of the backbone in diffusers' pipeline"""
    pipeline: str | None = None
    """diffusers' pipeline that makes pictures of prompts; `None`: none"""
    inpainting: str | None = None
    """diffusers' pipeline for a backbone that is shown mask and masked picture"""
    controlled: str | None = None
    """diffusers' pipeline for the same with a ControlNet"""
    tells_safety: bool = False
    """Whether its calls return beside the pictures which of them a safety checker has blackened, `None` without one"""


OWN = FamilyDefaults(
    text_to_image=Defaults(28, 4.0), image_to_image=Defaults(28, 4.0, 0.6), inpaint=Defaults(28, 4.0, 0.6)
)
STABLE_DIFFUSION = FamilyDefaults(
    text_to_image=Defaults(50, 7.5),
    image_to_image=Defaults(50, 7.5, 0.8),
    inpaint=Defaults(50, 7.5, 1.0),
    backbone="UNet2DConditionModel",
    pipeline="StableDiffusionPipeline",
    inpainting="StableDiffusionInpaintPipeline",
    controlled="StableDiffusionControlNetPipeline",
    tells_safety=True,
)
SDXL = FamilyDefaults(
    text_to_image=Defaults(50, 5.0),
    image_to_image=Defaults(50, 5.0, 0.3),
    inpaint=Defaults(50, 7.5, 0.9999),
    backbone="UNet2DConditionModel",
    pipeline="StableDiffusionXLPipeline",
    inpainting="StableDiffusionXLInpaintPipeline",
    controlled="StableDiffusionXLControlNetPipeline",
)
SDXL_REFINER = replace(SDXL, pipeline="StableDiffusionXLImg2ImgPipeline", controlled=None)
SD3 = FamilyDefaults(
    text_to_image=Defaults(28, 7.0),
    image_to_image=Defaults(50, 7.0, 0.6),
    inpaint=Defaults(50, 7.0, 0.6),
    backbone="SD3Transformer2DModel",
    pipeline="StableDiffusion3Pipeline",
    inpainting="StableDiffusion3InpaintPipeline",
    controlled="StableDiffusion3ControlNetPipeline",
)
FLUX = FamilyDefaults(
    text_to_image=Defaults(28, 3.5),
    image_to_image=Defaults(28, 7.0, 0.6),
    inpaint=Defaults(28, 7.0, 0.6),
    backbone="FluxTransformer2DModel",
    pipeline="FluxPipeline",
    controlled="FluxControlNetPipeline",
)

FLUX_FILL = replace(FLUX, inpaint=Defaults(50, 30.0), inpainting="FluxFillPipeline", controlled=None)
# By what the backbone is shown beside x_t, and where it is shown nothing.
SHOWN: Mapping[tuple[str, str | None], FamilyDefaults] = {
    (INSTRUCTION.name, STABLE_DIFFUSION.pipeline): replace(
        STABLE_DIFFUSION,
        image_to_image=Defaults(100, 7.5),
        inpaint=Defaults(100, 7.5),
        pipeline="StableDiffusionInstructPix2PixPipeline",
        controlled=None,
    ),
    (INSTRUCTION.name, SDXL.pipeline): replace(
        SDXL,
        image_to_image=Defaults(100, 5.0),
        inpaint=Defaults(100, 5.0),
        pipeline="StableDiffusionXLInstructPix2PixPipeline",
        controlled=None,
    ),
    (INSTRUCTION.name, SD3.pipeline): replace(
        SD3, image_to_image=Defaults(28, 7.0), inpaint=Defaults(28, 7.0), pipeline=None, controlled=None
    ),
    (FLUX_CONTROL.name, FLUX.pipeline): replace(FLUX, pipeline="FluxControlPipeline", controlled=None),
    (REFERENCE.name, FLUX.pipeline): replace(
        FLUX,
        image_to_image=Defaults(28, 3.5),
        inpaint=Defaults(28, 3.5),
        pipeline="FluxKontextPipeline",
        controlled=None,
    ),
}

READS = (
    *("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
    *("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
    *("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
    *("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline"),
    *("StableDiffusionControlNetPipeline", "StableDiffusionControlNetImg2ImgPipeline"),
    *("StableDiffusionControlNetInpaintPipeline", "StableDiffusionXLControlNetPipeline"),
    *("StableDiffusionXLControlNetImg2ImgPipeline", "StableDiffusionXLControlNetInpaintPipeline"),
    *("StableDiffusionXLControlNetUnionPipeline", "StableDiffusionXLControlNetUnionImg2ImgPipeline"),
    *("StableDiffusionXLControlNetUnionInpaintPipeline", "StableDiffusion3ControlNetPipeline"),
    *("StableDiffusion3ControlNetInpaintingPipeline", "FluxControlNetPipeline", "FluxControlNetImg2ImgPipeline"),
    *("FluxControlNetInpaintPipeline", "StableDiffusionInstructPix2PixPipeline"),
    *("StableDiffusionXLInstructPix2PixPipeline", "StableDiffusion3InstructPix2PixPipeline", "FluxControlPipeline"),
    *("FluxControlImg2ImgPipeline", "FluxControlInpaintPipeline", "FluxFillPipeline", "FluxKontextPipeline"),
    "FluxKontextInpaintPipeline",
)
ELSEWHERE = {
    "FluxPriorReduxPipeline": "it has no backbone and steers another model, FLUX.1: "
    "`pipe(prompt, controls=[hubgen.Redux.from_pretrained(folder, image=picture)])`."
}
"""Pipelines whose folders hold no model that draws"""
ULTRA_EDIT = "StableDiffusion3InstructPix2PixPipeline"
"""Of which no version stands in diffusers itself; the folders are those of UltraEdit's authors (2407.05282)"""
KONTEXT = ("FluxKontextPipeline", "FluxKontextInpaintPipeline")
"""Whose backbones are those of text to image, so that nothing but the pipeline's name tells what they are shown"""


def defaults_of(
    condition: PromptCondition,
    family: BackboneFamily,
    refines: bool,
    shown: EditInput | None = None,
    masks: bool = False,
) -> FamilyDefaults:
    """The defaults of a pipeline, by its text encoders and its backbone.

    Args:
        condition: How the text encoders are joined.
        family: Of the backbone.
        refines: Whether the backbone is given an aesthetic score.
        shown: What the backbone is shown beside x_t.
        masks: Whether that is a mask and the masked picture.
    """
    found = plain_defaults(condition, family, refines)
    if masks and found is FLUX:
        return FLUX_FILL
    if shown is None:
        return found
    found = SHOWN.get((shown.name, found.pipeline), replace(found, pipeline=None, controlled=None))
    as_published = shown in (INSTRUCTION, FLUX_CONTROL, REFERENCE)
    return found if as_published else replace(found, pipeline=None)


def plain_defaults(condition: PromptCondition, family: BackboneFamily, refines: bool) -> FamilyDefaults:
    """The same where the backbone is shown nothing, or a mask; arguments as there."""
    if isinstance(condition, ClipAndT5):
        return FLUX
    if isinstance(condition, TwoClipsAndT5):
        return SD3
    if isinstance(condition, TwoClips):
        return SDXL_REFINER if refines else SDXL
    encoder: Any = condition.encoders[0]
    clip = encoder is None or encoder.config.model_type in ("clip_text_model", "clip")
    is_sd = isinstance(condition, OneEncoder) and clip and family.takes <= {"tokens", "guidance_scale"}
    return STABLE_DIFFUSION if is_sd else OWN
