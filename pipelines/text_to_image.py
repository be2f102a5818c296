"""Text to image: prompt -> embeddings -> denoising loop -> decode; from noise, from an image, or inside a mask.

One pipeline for every family: what differs between them are objects chosen from the components (how the backbone is
called and which text encoders belong to it, `hubgen.conditioning.families`; the shape of its latents, `LatentSpace`;
defaults of diffusers' pipelines, `hubgen.pipelines.defaults`).

Shapes: B pictures (prompts times pictures of each), H and W pixels, (B, C, h, w) latents, L text tokens of D features,
P features of pooled text.
"""

import inspect
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

from hubgen.acceleration.optimize import accelerated
from hubgen.autoencoders.autoencoder_kl import AutoencoderKL
from hubgen.autoencoders.latents import LatentSpace, decode
from hubgen.backbones.flux import FluxTransformer2DModel
from hubgen.backbones.sd3 import SD3Transformer2DModel
from hubgen.backbones.unet_condition import UNet2DConditionModel
from hubgen.checks import whole
from hubgen.conditioning.condition import Condition
from hubgen.conditioning.families import BackboneFamily, family_of
from hubgen.conditioning.guidance import (
    NEGATIVE,
    PICTURE,
    POSITIVE,
    ClassifierFreeGuidance,
    Guidance,
    PictureGuidance,
)
from hubgen.conditioning.micro import MicroArguments
from hubgen.conditioning.predict import Predictor
from hubgen.conditioning.prompts import ClipAndT5, PromptCondition
from hubgen.controls.control import Control, Target, check_controls, open_doors, opened, prepare_all
from hubgen.controls.inpaint import is_shown_masks
from hubgen.controls.shown_picture import REFERENCE, EditInput, check_image_scale, edit_input
from hubgen.data.images import Images
from hubgen.hub.registration import loadable
from hubgen.hub.single_file import SingleFilePipelineMixin
from hubgen.pipelines.adapters import AdapterMixin
from hubgen.pipelines.callbacks import Callback, LiveGuidance
from hubgen.pipelines.checks import (
    arguments_of,
    check_eta,
    check_generator,
    check_latents,
    check_output,
)
from hubgen.pipelines.defaults import (
    ELSEWHERE,
    KONTEXT,
    READS,
    ULTRA_EDIT,
    Defaults,
    FamilyDefaults,
    defaults_of,
)
from hubgen.pipelines.denoising import AfterStep, Generator
from hubgen.pipelines.denoising_pipeline import DenoisingPipeline
from hubgen.pipelines.editing import EditingMixin
from hubgen.pipelines.prompt_to_embeddings import (
    SHOWN,
    Prompt,
    PromptArguments,
    embed,
    encoding_arguments,
    scaled_adapters,
)
from hubgen.pipelines.safety import blacken
from hubgen.pipelines.starts import ImageArguments, start_of, until
from hubgen.pipelines.textual_inversion import TextualInversionMixin
from hubgen.schedulers.times import dynamic_shift

logger = logging.getLogger(__name__)

UNION_PIPELINE = "StableDiffusionXLControlNetUnionPipeline"
"""diffusers' pipeline for a ControlNet that tells several types of hints apart"""


@dataclass
class TextToImageOutput(ImagePipelineOutput):
    """What a call returns."""

    nsfw_content_detected: list[bool] | None = None
    """For each picture whether the safety checker has blackened it; `None` without one"""


@loadable
class TextToImagePipeline(
    DenoisingPipeline, SingleFilePipelineMixin, AdapterMixin, TextualInversionMixin, EditingMixin
):
    """Pictures of prompts, by latent diffusion or flow matching.

    Reads the folders of diffusers' pipelines for Stable Diffusion 1, 2, XL and 3 and FLUX.1 (text to image, image to
    image, inpainting, ControlNets, and models that are shown a picture: InstructPix2Pix, UltraEdit, FLUX.1 Canny,
    Depth, Fill and Kontext), and is saved as one of them where it can be. Components may be hubgen's or diffusers'
    classes of the same names, and schedulers any of diffusers'.

    Args:
        vae: Autoencoder between pixels and latents.
        text_encoder: Any transformers text encoder (see `TextCondition`), or the first of several (see
            `hubgen.conditioning.prompts`); `None` if embeddings are given in the call.
        tokenizer: Its tokenizer; `model_max_length` is the number of tokens that the backbone is shown.
        scheduler: The way from noise to data.
        transformer: The backbone, if it is an MM-DiT or FLUX ...
        unet: ... or if it is a U-Net: exactly one of the two.
        default_num_inference_steps: What a call does that names no number of steps; saved with the pipeline. `None`
            for what diffusers' pipeline of the family does.
        default_guidance_scale: Of a call that names none; `None` as above.
        text_encoder_2: The second text encoder of SDXL (CLIP), SD3 (CLIP) or FLUX (T5).
        tokenizer_2: Its tokenizer.
        text_encoder_3: SD3's T5, which may be missing.
        tokenizer_3: Its tokenizer.
        safety_checker: Looks at each picture with `feature_extractor`, and blackens what it objects to.
        feature_extractor: What the safety checker sees pictures through.
        image_encoder: Sees pictures for IP-Adapters, through `feature_extractor`.
        requires_safety_checker: Kept for diffusers' pipeline, which warns where it is true and there is none; `None`
            for whether there is one.
        force_zeros_for_empty_prompt: Whether, for SDXL, guidance without a negative prompt leads away from zeros.
        requires_aesthetics_score: Whether the backbone takes a score in place of the target size (SDXL's refiner).
        default_side: Height and width in pixels of a call that names none, for backbones that do not say what they were
            trained for (FLUX); `None` for 1024 with these.
        controlnet: A ControlNet, kept and saved with the rest; it steers the calls that are told so:
            `controls=[ControlNet(pipe.controlnet, image)]`.
        edit_input: What the backbone is shown at every step, where its channels do not tell: "instruction", the picture
            that is edited (InstructPix2Pix); "control", a hint; "reference", the picture that is edited, as further
            tokens (FLUX.1 Kontext). `None` for what the channels tell; see `hubgen.controls.shown_picture`.
        edit_input_normalised: Whether that picture's latents have the mean and scale of x_t; `None` for what is usual.
        latents_shifted: Whether x_t has the autoencoder's `shift_factor`. If not, as in UltraEdit's training, that
            factor is set to 0 in the autoencoder's config. For UltraEdit as trained by diffusers' community scripts,
            pass this and `edit_input_normalised` as true.

    Raises:
        ValueError: Both or neither of `transformer` and `unet` were given, or the backbone does not take the
            `edit_input`.
    """

    # The annotations of __init__ name classes one by one, because diffusers' `from_pipe` compares types with them.
    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->image_encoder->transformer->unet->vae"
    _optional_components = [
        *("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"),
        *("transformer", "unet", "safety_checker", "feature_extractor", "image_encoder", "controlnet"),
    ]
    _exclude_from_cpu_offload = ["safety_checker"]
    _callback_tensor_inputs = ["latents", *SHOWN]
    reads = READS
    elsewhere = ELSEWHERE

    def __init__(
        self,
        vae: AutoencoderKL | diffusers.AutoencoderKL,
        text_encoder: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase | None,
        scheduler: SchedulerMixin,
        transformer: SD3Transformer2DModel
        | FluxTransformer2DModel
        | diffusers.SD3Transformer2DModel
        | diffusers.FluxTransformer2DModel
        | None = None,
        unet: UNet2DConditionModel | diffusers.UNet2DConditionModel | None = None,
        default_num_inference_steps: int | None = None,
        default_guidance_scale: float | None = None,
        text_encoder_2: PreTrainedModel | None = None,
        tokenizer_2: PreTrainedTokenizerBase | None = None,
        text_encoder_3: PreTrainedModel | None = None,
        tokenizer_3: PreTrainedTokenizerBase | None = None,
        safety_checker: PreTrainedModel | None = None,
        feature_extractor: BaseImageProcessor | None = None,
        image_encoder: PreTrainedModel | None = None,
        requires_safety_checker: bool | None = None,
        force_zeros_for_empty_prompt: bool = True,
        requires_aesthetics_score: bool = False,
        default_side: int | None = None,
        controlnet: ModelMixin | None = None,
        edit_input: str | None = None,
        edit_input_normalised: bool | None = None,
        latents_shifted: bool = True,
    ):
        super().__init__()
        if (transformer is None) == (unet is None):
            found = "neither" if unet is None else "both"
            raise ValueError(f"`transformer`, `unet`: got {found}, expected exactly one of them.")
        if safety_checker is not None and feature_extractor is None:
            raise ValueError(
                "`feature_extractor`: got None, expected one: the safety checker sees pictures through it."
            )
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            text_encoder_3=text_encoder_3,
            tokenizer_3=tokenizer_3,
            scheduler=scheduler,
            transformer=transformer,
            unet=unet,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
            controlnet=controlnet,
        )
        if requires_safety_checker is None:
            requires_safety_checker = safety_checker is not None
        self.register_to_config(
            default_num_inference_steps=default_num_inference_steps,
            default_guidance_scale=default_guidance_scale,
            requires_safety_checker=requires_safety_checker,
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
            requires_aesthetics_score=requires_aesthetics_score,
            default_side=default_side,
            edit_input=edit_input,
            edit_input_normalised=edit_input_normalised,
            latents_shifted=latents_shifted,
        )
        if not latents_shifted:
            vae.register_to_config(shift_factor=0.0)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._guidance_scale = self.defaults().guidance_scale

    def native_class(self) -> str | None:
        """The pipeline of diffusers that can be made of these components; `None` where there is none."""
        family = self.family_defaults
        # diffusers' pipelines for U-Nets scale noise and inputs by the scheduler.
        fits = family.backbone != "UNet2DConditionModel" or hasattr(self.scheduler, "init_noise_sigma")
        if type(self.backbone).__name__ != family.backbone or not fits:
            return None
        if self.controlnet is not None:
            union = self.controlnet.config.get("num_control_type") is not None
            return UNION_PIPELINE if union else family.controlled
        return family.inpainting if is_shown_masks(self.family, self.latent_space) else family.pipeline

    @classmethod
    def with_our_classes(cls, index: Mapping[str, Any]) -> dict[str, Any]:
        """As in `NativePipeline`; of Kontext nothing but the pipeline's name tells that it is shown a picture.

        Nor does anything but the name tell UltraEdit's, whose name may stand behind that of a file.
        """
        ours = super().with_our_classes(index)
        name = ours.get("_class_name")
        if isinstance(name, list) and name[-1] in cls.reads:
            ours["_class_name"] = name = name[-1]
        if name == ULTRA_EDIT:
            return {"latents_shifted": False, **ours}
        return {"edit_input": REFERENCE.name, **ours} if name in KONTEXT else ours

    def native_arguments(self) -> Collection[str] | None:
        """The arguments of diffusers' pipeline for such components; `None` where there is none."""
        name = self.family_defaults.pipeline
        return None if name is None else inspect.signature(getattr(diffusers, name)).parameters

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompt = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        negative_prompt: Prompt = None,
        num_images_per_prompt: int = 1,
        generator: Generator = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        prompt_2: Prompt = None,
        prompt_3: Prompt = None,
        negative_prompt_2: Prompt = None,
        negative_prompt_3: Prompt = None,
        clip_skip: int | None = None,
        max_sequence_length: int | None = None,
        true_cfg_scale: float | None = None,
        image: Images | None = None,
        mask_image: Images | None = None,
        strength: float | None = None,
        masked_image_latents: torch.Tensor | None = None,
        padding_mask_crop: int | None = None,
        denoising_start: float | None = None,
        denoising_end: float | None = None,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] | None = None,
        target_size: tuple[int, int] | None = None,
        negative_original_size: tuple[int, int] | None = None,
        negative_crops_coords_top_left: tuple[int, int] | None = None,
        negative_target_size: tuple[int, int] | None = None,
        aesthetic_score: float | None = None,
        negative_aesthetic_score: float | None = None,
        eta: float = 0.0,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        joint_attention_kwargs: Mapping[str, Any] | None = None,
        controls: Sequence[Control] = (),
        control_image: Images | None = None,
        image_guidance_scale: float | None = None,
    ) -> TextToImageOutput | tuple[Any, ...]:
        """Makes pictures.

        Args:
            prompt: One or several.
            height: Pixels; `None` for what the model was trained for, or what suits `image`.
            width: Pixels; see `height`.
            num_inference_steps: `None` for the model's default, or for as many as `timesteps` or `sigmas` has.
            timesteps: The scheduler's grid, instead of its own; or
            sigmas: the same in terms of noise; not every scheduler takes them.
            guidance_scale: Strength of classifier-free guidance; at most 1 is none, `None` the model's default. For
                models that take it as an input (FLUX dev, LCM) it is that.
            negative_prompt: What guidance leads away from: one for all prompts or one each; `None` is the empty prompt,
                or for SDXL none at all (`force_zeros_for_empty_prompt`).
            num_images_per_prompt: Pictures of each prompt, next to each other in the result.
            generator: Source of the noise. A list has one for each picture, which then comes out the same in any batch.
            latents: The noise to start from, (B, C, h, w), standard normal, instead of drawing it. With `image` and no
                mask, x_t.
            prompt_embeds: (prompts, L, D), instead of the prompts.
            negative_prompt_embeds: (prompts, L, D), instead of `negative_prompt`.
            pooled_prompt_embeds: (prompts, P), beside `prompt_embeds` where the backbone takes pooled text.
            negative_pooled_prompt_embeds: (prompts, P), beside `negative_prompt_embeds` in the same case.
            output_type: "pil"; "np", (B, H, W, 3) in [0, 1]; "pt", (B, 3, H, W) in [0, 1]; or "latent", (B, C, h, w).
            return_dict: Whether to return `TextToImageOutput` or a tuple of its values that are not `None`; for Stable
                Diffusion 1 and 2, as diffusers' pipelines do, always of both.
            callback_on_step_end: `(pipeline, step, timestep, tensors) -> tensors`; those returned replace the old ones.
            callback_on_step_end_tensor_inputs: Names of `tensors`, of `_callback_tensor_inputs`. As in diffusers, those
                without `negative` in their names hold the rows of the negative branch too, first, while it is needed;
                a callback that sets `_guidance_scale` to 0 ends the guidance, and may hand back the second half.
            guidance_rescale: See `ClassifierFreeGuidance`.
            guidance_interval: See `ClassifierFreeGuidance`.
            prompt_2: For the second text encoder; `None` for `prompt`.
            prompt_3: For the third text encoder; `None` for `prompt`.
            negative_prompt_2: For the second text encoder; `None` for `negative_prompt`.
            negative_prompt_3: For the third text encoder; `None` for `negative_prompt`.
            clip_skip: Layers of CLIP left out at the end, for the prompts (not the negative ones, as in diffusers).
            max_sequence_length: Tokens that T5 reads: 256 for SD3, 512 for FLUX, if `None`.
            true_cfg_scale: Strength of classifier-free guidance for models that take `guidance_scale` as an input, if
                there is a negative prompt; it doubles the work.
            image: One or n images to begin from, n a divisor of the number of pictures: PIL (transparency becomes
                white), arrays (n, H, W, 3) or tensors (n, 3, H, W) in [0, 1] or of uint8, or latents (n, C, h, w).
                Models that edit (InstructPix2Pix, UltraEdit, FLUX.1 Kontext) are shown it at every step instead, and
                begin at noise.
            mask_image: White (from 0.5 on), or opaque in a picture with transparent parts, where the image is made
                anew; brought to the image's size. Of models that edit, the rest of the image stays as it is; UltraEdit
                for masks is shown the mask, in all its shades.
            strength: In [0, 1], the share of the grid that is done: how far back towards noise an image goes. `None`
                for the default of diffusers' pipeline.
            masked_image_latents: (n, C, h, w), in the place of the encoded masked image, for inpainting models.
            padding_mask_crop: Pixels around the mask's bounding box: only this part of the one image is made, at full
                size, and put back into it.
            denoising_start: In (0, 1), instead of `strength`: `image` holds latents that another model has brought to
                this share of the way (its `denoising_end`).
            denoising_end: In (0, 1): the share of the way from noise to data after which to stop, and leave the rest
                to another model (SDXL's refiner); with `output_type="latent"`.
            original_size: (height, width) of the picture before it was cropped, for SDXL; `None`: its own.
            crops_coords_top_left: Where the picture was cropped, for SDXL; `None`: (0, 0).
            target_size: (height, width) of the picture, for SDXL; `None`: its own.
            negative_original_size: `original_size` of the negative branch; `None` for that of the positive one.
            negative_crops_coords_top_left: `crops_coords_top_left` of the negative branch; `None` for the positive's.
            negative_target_size: `target_size` of the negative branch; `None` for that of the positive one.
            aesthetic_score: In the place of the target size, for SDXL's refiner; `None`: 6.
            negative_aesthetic_score: `aesthetic_score` of the negative branch; `None`: 2.5.
            eta: Noise added in each step, for schedulers that take it (DDIM).
            cross_attention_kwargs: Keywords for a U-Net's attention processors.
            joint_attention_kwargs: Keywords for a transformer's attention processors.
            controls: What else steers the call (`hubgen.controls`), in this order.
            control_image: One or n hints, given as `image` is, for models that are shown one at every step (FLUX.1
                Canny and Depth); `image` and `mask_image` beside it say where to begin.
            image_guidance_scale: How near the result stays to `image`, for InstructPix2Pix and UltraEdit; `None`: 1.5.
                Below 1, or without `guidance_scale` above 1, there is no guidance. See `PictureGuidance`.

        Raises:
            ValueError: An argument is not one that the model can work with; before anything is computed.
        """
        arguments = locals()
        prompts, images, micro = (
            arguments_of(PromptArguments, arguments),
            arguments_of(ImageArguments, arguments),
            arguments_of(MicroArguments, arguments),
        )
        family, condition, space = self.family, self.condition, self.latent_space
        defaults = self.defaults(image is not None, mask_image is not None)
        self._guidance_scale = defaults.guidance_scale if guidance_scale is None else guidance_scale
        attention = self.attention_options(family, cross_attention_kwargs, joint_attention_kwargs)
        shown = self.shown
        image_scale = check_image_scale(shown, image_guidance_scale)
        guidance = self.prepare_guidance(
            family, true_cfg_scale, guidance_rescale, guidance_interval, prompts.has_negative, image_scale
        )
        guided = NEGATIVE in guidance.all_branches
        prompts.check(condition, family, guided)
        start = start_of(images, family, space, defaults.strength, shown)
        micro.check("micro" in family.takes, self.config.requires_aesthetics_score)
        check_generator(generator, prompts.batch)
        check_latents(latents, space.shape(prompts.batch, start.size))
        check_output(
            output_type, callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs
        )
        step_options = check_eta(self.scheduler, eta)
        device = self._execution_device
        grid = self.prepare_timesteps(num_inference_steps, timesteps, sigmas, start.size, device, defaults.steps)
        target = Target(
            backbone=self.backbone,
            family=family,
            vae=self.vae,
            scheduler=self.scheduler,
            latents=space,
            size=start.size,
            batch=prompts.batch,
            per_prompt=num_images_per_prompt,
            branches=guidance.all_branches,
            timesteps=until(self.scheduler, start.remaining(self.scheduler, grid), denoising_end),
            generator=list(generator) if isinstance(generator, tuple) else generator,
            image_encoder=self.image_encoder,
            feature_extractor=self.feature_extractor,
            prompts=prompts.read_by_all,
            condition=condition,
            max_sequence_length=max_sequence_length,
        )
        steering = [*start.controls(), *check_controls(controls)]
        start.check(target)
        for control in steering:
            control.check(target)
        self.begin_call(target.timesteps)

        with scaled_adapters(condition.encoders, (attention or {}).get("scale")):
            conditions = self.prepare_conditions(prompts, condition, micro, guided, target)
        begin, prepared = prepare_all(steering, target, partial(start.begin, target, latents))
        predict = Predictor(self.backbone, conditions, family, open_doors(prepared, attention))
        after_step: list[AfterStep] = [control.after_step for control in prepared]
        networks = [network for control in steering for network in control.networks]
        with accelerated(self, *networks) as fast, opened(self.backbone, prepared):
            tabulate = partial(predict.tabulate, fast, target.timesteps, guidance.all_branches)
            tabulate()
            names, needed = callback_on_step_end_tensor_inputs, lambda: guidance.all_branches
            after_step += self.acts(callback_on_step_end, names, predict, SHOWN, needed, fast, tabulate)
            latents = self.denoise(
                fast.around(predict),
                begin.x_t,
                target.timesteps,
                guidance,
                target.generator,
                after_step,
                step_options=step_options,
            )
            with fast.network():
                pictures, flagged = self.decode_checked(latents, output_type)
        self.maybe_free_model_hooks()
        output = TextToImageOutput(images=start.finished(pictures), nsfw_content_detected=flagged)
        if return_dict:
            return output
        return (output.images, flagged) if self.family_defaults.tells_safety else output.to_tuple()

    # ---- the arrows ----

    def prepare_guidance(
        self,
        family: BackboneFamily,
        true_cfg_scale: float | None,
        rescale: float,
        interval: tuple[float, float],
        has_negative: bool,
        image_scale: float | None = None,
    ) -> Guidance:
        """How the predictions of a step become one; with distilled weights, `guidance_scale` is an input of theirs.

        Elsewhere it is read anew for each step: a callback may set `_guidance_scale`. With `image_scale` there also is
        a guidance by the picture that the backbone is shown.
        """
        kind: Callable[..., ClassifierFreeGuidance] = ClassifierFreeGuidance
        if image_scale is not None:
            kind = partial(PictureGuidance, image_scale=image_scale)
        guidance = kind(self.guidance_scale, rescale, interval)
        if not family.distilled:
            if true_cfg_scale is not None:
                raise ValueError(
                    f"`true_cfg_scale`: got {true_cfg_scale!r}, expected none: `guidance_scale` is this model's "
                    "classifier-free guidance."
                )
            return LiveGuidance(guidance, lambda: self._guidance_scale)
        guidance = kind(1.0 if true_cfg_scale is None else true_cfg_scale, rescale, interval)
        if guidance.enabled and not has_negative:
            logger.warning("`true_cfg_scale` has no effect without a negative prompt.")
            guidance = ClassifierFreeGuidance(1.0)
        return guidance

    @staticmethod
    def attention_options(
        family: BackboneFamily, cross: Mapping[str, Any] | None, joint: Mapping[str, Any] | None
    ) -> Mapping[str, Any] | None:
        """Keywords for the attention processors: a U-Net's `cross` or a transformer's `joint`.

        Raises:
            ValueError: The other one of the two was given.
        """
        for name, value in (("cross_attention_kwargs", cross), ("joint_attention_kwargs", joint)):
            if value is not None and name != family.attention_argument:
                raise ValueError(
                    f"`{name}`: got {value!r}, expected none: this model's backbone takes "
                    f"`{family.attention_argument}`."
                )
        return cross if joint is None else joint

    def prepare_timesteps(
        self,
        num_inference_steps: int | None,
        timesteps: Sequence[float] | None,
        sigmas: Sequence[float] | None,
        size: tuple[int, int],
        device: torch.device,
        default_steps: int,
    ) -> torch.Tensor:
        """Sets the scheduler's grid and returns its timesteps, (n,) on `device`; see `set_grid` for errors."""
        mu = self.dynamic_shift(size) if self.scheduler.config.get("use_dynamic_shifting", False) else None
        steps = default_steps if num_inference_steps is None else num_inference_steps
        if timesteps is None and sigmas is None:
            whole("num_inference_steps", steps)
            sigmas = self.family.sigmas(steps, self.scheduler)
        return self.set_grid(num_inference_steps, timesteps, sigmas, steps, device, mu)

    def dynamic_shift(self, size: tuple[int, int]) -> float:
        """mu of the timesteps' shift for pictures of this size."""
        return dynamic_shift(self.scheduler.config, self.latent_space.tokens(size), self.family.max_shift)

    def encode_prompt(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor | None, ...]:
        """Embeddings of prompts, for calls without text encoders; arguments and result as diffusers' pipeline has them.

        By position, of Stable Diffusion 1 and 2 and of hubgen's own models with one text encoder: `prompt`, `device`,
        `num_images_per_prompt`, `do_classifier_free_guidance`, `negative_prompt`, `prompt_embeds`,
        `negative_prompt_embeds`, `lora_scale`, `clip_skip`. Of SDXL, SD3 and FLUX `prompt_2` (and `prompt_3`) follow
        the prompt, and so on: `hubgen.pipelines.prompt_to_embeddings.SEVERAL_PROMPTS`. All may be named.

        Args:
            *args: As above.
            **kwargs: As above; see the call. `device` is the pipeline's, there is one picture of each prompt, and a
                negative branch, unless told otherwise; `lora_scale` is how much adapters of the text encoders count.

        Returns:
            `prompt_embeds` and `negative_prompt_embeds`, (B, L, D), `None` for the latter without guidance; where the
            backbone takes pooled text, `pooled_prompt_embeds` and `negative_pooled_prompt_embeds`, (B, P), behind them.
            Of FLUX `prompt_embeds`, `pooled_prompt_embeds` and the text's positions, (L, 3).

        Raises:
            TypeError: An argument that the family does not have.
            ValueError: Prompts, embeddings and options that do not fit the model or each other.
        """
        condition, family = self.condition, self.family
        given = {
            name: value for name, value in encoding_arguments(condition, args, kwargs).items() if value is not None
        }
        device = torch.device(given.pop("device", self._execution_device))
        joint = isinstance(condition, ClipAndT5)
        guided = bool(given.pop("do_classifier_free_guidance", not joint))
        scale = given.pop("lora_scale", None)
        prompts = PromptArguments(**given)
        prompts.check(condition, family, guided)
        with scaled_adapters(condition.encoders, scale):
            branches = embed(prompts, condition, family.takes, guided, device, self.backbone.dtype)
        positive, negative = branches[POSITIVE], branches.get(NEGATIVE, Condition())
        if joint:
            assert positive.tokens is not None
            return positive.tokens, positive.pooled, positive.tokens.new_zeros(positive.tokens.shape[1], 3)
        tokens = (positive.tokens, negative.tokens)
        return (*tokens, positive.pooled, negative.pooled) if "pooled" in family.takes else tokens

    def prepare_conditions(
        self,
        prompts: PromptArguments,
        condition: PromptCondition,
        micro: MicroArguments,
        guided: bool,
        target: Target,
    ) -> dict[str, Condition]:
        """What the backbone is given beside x_t and the time, for B pictures in each branch.

        Args:
            prompts: Checked.
            condition: The text encoders.
            micro: Checked.
            guided: Whether there is a negative branch.
            target: Of the call.
        """
        takes = target.family.takes
        changes: dict[str, Any] = {}
        branches = embed(prompts, condition, takes, guided, target.device, self.backbone.dtype)
        numbers = micro.branches(target.size, self.config.requires_aesthetics_score)
        for branch, one in branches.items():
            if "micro" in takes:
                changes["micro"] = numbers[branch].rows(target.batch, target.device)
            if "guidance_scale" in takes:
                changes["guidance_scale"] = self.guidance_scale
            branches[branch] = replace(one, **changes)
        if PICTURE in target.branches:  # differs from the negative branch by what the backbone is shown
            branches[PICTURE] = branches[NEGATIVE]
        return branches

    def decode_latents(self, latents: torch.Tensor, output_type: str = "pil") -> Any:
        """Pictures of latents, (B, C, h, w) as the backbone has them; see the call for `output_type`."""
        return self.decode_checked(latents, output_type)[0]

    def decode_checked(self, latents: torch.Tensor, output_type: str) -> tuple[Any, list[bool] | None]:
        """Pictures, and which of them the safety checker has blackened (`None` without one, and for latents)."""
        if output_type == "latent":
            return latents, None
        pixels, flagged = decode(self.vae, latents), None
        if self.safety_checker is not None:
            flagged = blacken(pixels, self.safety_checker, self.feature_extractor, self.image_processor)
        return self.image_processor.postprocess(pixels, output_type=output_type), flagged

    # ---- the parts ----

    @property
    def components(self) -> dict[str, Any]:
        """The models and their helpers by name: those that there are, and those that diffusers' pipeline wants.

        So that diffusers' pipelines for the family, one for each task, can be made of them.
        """
        found: dict[str, Any] = super().components
        wanted = self.native_arguments() or found
        return {name: part for name, part in found.items() if part is not None or name in wanted}

    @property
    def parameters(self) -> dict[str, Any]:
        """The arguments of the pipeline that are no components, as far as diffusers' pipeline has them."""
        found: dict[str, Any] = super().parameters
        wanted = self.native_arguments() or found
        return {name: value for name, value in found.items() if name in wanted}

    @property
    def backbone(self) -> Any:
        """The network that predicts: `transformer` or `unet`."""
        return self.transformer if self.transformer is not None else self.unet

    @property
    def condition(self) -> PromptCondition:
        """Prompts to embeddings."""
        return self.family.prompt_condition(
            (self.text_encoder, self.text_encoder_2, self.text_encoder_3),
            (self.tokenizer, self.tokenizer_2, self.tokenizer_3),
            self.config.force_zeros_for_empty_prompt,
        )

    @property
    def family(self) -> BackboneFamily:
        """How the backbone is called and sampled."""
        return family_of(self.backbone)

    @property
    def latent_space(self) -> LatentSpace:
        """Shapes of latents and sizes of pictures."""
        side = self.config.default_side
        return LatentSpace(self.vae, self.backbone.config, self.family.patch, None if side is None else (side, side))

    @property
    def family_defaults(self) -> FamilyDefaults:
        """Defaults, and the pipelines of diffusers that these components make."""
        family, masks = self.family, is_shown_masks(self.family, self.latent_space)
        return defaults_of(self.condition, family, self.config.requires_aesthetics_score, self.shown, masks)

    @property
    def shown(self) -> EditInput | None:
        """What the backbone is shown beside x_t; `None` for nothing, or a mask with the masked picture."""
        config = self.config
        return edit_input(self.family, self.latent_space, config.edit_input, config.edit_input_normalised)

    def defaults(self, image: bool = False, mask: bool = False) -> Defaults:
        """Defaults of a call without or with an image and a mask."""
        family, config = self.family_defaults, self.config
        task = family.inpaint if mask else family.image_to_image if image else family.text_to_image
        steps, scale = config.default_num_inference_steps, config.default_guidance_scale
        return replace(
            task,
            steps=task.steps if steps is None else steps,
            guidance_scale=task.guidance_scale if scale is None else scale,
        )

    @property
    def vae_scale_factor(self) -> int:
        """Pixels of a picture's side per latent."""
        return self.latent_space.factor

    @property
    def size_multiple(self) -> int:
        """Height and width in pixels are multiples of it: pixels per latent times latents per token."""
        return self.latent_space.multiple

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels that the backbone was trained for."""
        return self.latent_space.default_size

    @property
    def guidance_scale(self) -> float:
        """That of the last call."""
        return self._guidance_scale

    def enable_vae_slicing(self) -> None:
        """Decodes the pictures of a batch one by one: less memory."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Decodes all pictures of a batch at once."""
        self.vae.disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Decodes and encodes large pictures in overlapping tiles: less memory, other numbers at the seams."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Decodes and encodes pictures as a whole."""
        self.vae.disable_tiling()
