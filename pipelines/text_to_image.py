"""Text to image: prompt -> embeddings -> denoising loop -> decode; from noise, from an image, or inside a mask.

One pipeline for every family: what differs between them are objects chosen from the components (how text encoders are
joined, `hubgen.conditioning.prompts`; how the backbone is called, `hubgen.conditioning.inputs`; the shape of its
latents, `LatentSpace`; defaults, `Family`).

Shapes: B pictures (prompts times pictures of each), H and W pixels, (B, C, h, w) latents, L text tokens of D features,
P features of pooled text.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

from hubgen.acceleration.optimize import optimize_unless_chosen, prepared
from hubgen.autoencoders.autoencoder_kl import AutoencoderKL
from hubgen.backbones.flux import FluxTransformer2DModel
from hubgen.backbones.sd3 import SD3Transformer2DModel
from hubgen.backbones.unet_condition import UNet2DConditionModel
from hubgen.conditioning.guidance import ClassifierFreeGuidance
from hubgen.conditioning.inputs import (
    BackboneCall,
    takes_guidance,
    takes_pooled,
)
from hubgen.conditioning.prompts import PromptCondition, prompt_condition
from hubgen.conditioning.text import TextEmbeddings
from hubgen.hub.registration import loadable
from hubgen.hub.single_file import SingleFilePipelineMixin
from hubgen.pipelines.calls import (
    attention_options,
    check_eta,
    check_generator,
    check_latents,
    check_output,
    check_size,
    decode_pixels,
    require_whole,
    set_grid,
)
from hubgen.pipelines.denoising import Generator
from hubgen.pipelines.denoising_pipeline import Callback, DenoisingPipeline
from hubgen.pipelines.families import READS, Defaults, Family, family_of
from hubgen.pipelines.image_arguments import Images
from hubgen.pipelines.image_inputs import Begin, image_start, takes_mask, until
from hubgen.pipelines.latent_space import LatentSpace
from hubgen.pipelines.picture_inputs import PictureInputs
from hubgen.pipelines.prompt_inputs import EMBEDDINGS, NEGATIVES, PROMPTS, Prompt, PromptInputs
from hubgen.pipelines.safety import blacken

logger = logging.getLogger(__name__)


@dataclass
class TextToImageOutput(ImagePipelineOutput):
    """What a call returns."""

    nsfw_content_detected: list[bool] | None = None
    """For each picture whether the safety checker has blackened it; `None` without one"""


@loadable
class TextToImagePipeline(DenoisingPipeline, SingleFilePipelineMixin):
    """Pictures of prompts, by latent diffusion or flow matching.

    Reads the folders of diffusers' pipelines for Stable Diffusion 1, 2, XL and 3 and FLUX.1 (text to image, image to
    image, inpainting), and is saved as one of them where it can be. Components may be hubgen's or diffusers' classes of
    the same names, and schedulers any of diffusers'.

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
        default_guidance_scale: Likewise.
        text_encoder_2: The second text encoder of SDXL (CLIP), SD3 (CLIP) or FLUX (T5).
        tokenizer_2: Its tokenizer.
        text_encoder_3: SD3's T5, which may be missing.
        tokenizer_3: Its tokenizer.
        safety_checker: Looks at each picture with `feature_extractor`, and blackens what it objects to.
        feature_extractor: What the safety checker sees pictures through.
        image_encoder: Kept and saved with the rest; no use is made of it.
        requires_safety_checker: Kept for diffusers' pipeline, which warns where it is true and there is none; `None`
            for whether there is one.
        force_zeros_for_empty_prompt: Whether, for SDXL, guidance without a negative prompt leads away from zeros.
        requires_aesthetics_score: Whether the backbone is told a score in place of the target size (SDXL's refiner).

    Raises:
        ValueError: Both or neither of `transformer` and `unet` were given.
    """

    # The annotations of __init__ name classes one by one, because diffusers' `from_pipe` compares types with them.
    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->image_encoder->transformer->unet->vae"
    _optional_components = [
        *("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"),
        *("transformer", "unet", "safety_checker", "feature_extractor", "image_encoder"),
    ]
    _exclude_from_cpu_offload = ["safety_checker"]
    _callback_tensor_inputs = ["latents", *EMBEDDINGS]
    reads = READS

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
        )
        if requires_safety_checker is None:
            requires_safety_checker = safety_checker is not None
        self.register_to_config(
            default_num_inference_steps=default_num_inference_steps,
            default_guidance_scale=default_guidance_scale,
            requires_safety_checker=requires_safety_checker,
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
            requires_aesthetics_score=requires_aesthetics_score,
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._guidance_scale = self.defaults().guidance_scale

    def native_class(self) -> str | None:
        """The pipeline of diffusers that can be made of these components; `None` where there is none."""
        family = self.family
        # diffusers' pipelines for U-Nets scale noise and inputs by the scheduler.
        fits = family.backbone != "UNet2DConditionModel" or hasattr(self.scheduler, "init_noise_sigma")
        if type(self.backbone).__name__ != family.backbone or not fits:
            return None
        return family.inpainting if takes_mask(self.backbone, self.vae) else family.pipeline

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
    ) -> TextToImageOutput | tuple[Any, ...]:
        """Makes pictures.

        Args:
            prompt: One or several.
            height: Pixels; `None` for what the model was trained for, or what suits `image`.
            width: Likewise.
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
            negative_prompt_embeds: Likewise, instead of `negative_prompt`.
            pooled_prompt_embeds: (prompts, P), beside `prompt_embeds` where the backbone takes pooled text.
            negative_pooled_prompt_embeds: Likewise.
            output_type: "pil"; "np", (B, H, W, 3) in [0, 1]; "pt", (B, 3, H, W) in [0, 1]; or "latent", (B, C, h, w).
            return_dict: Whether to return `TextToImageOutput` or a tuple of its values that are not `None`.
            callback_on_step_end: `(pipeline, step, timestep, tensors) -> tensors`; those returned replace the old ones.
            callback_on_step_end_tensor_inputs: Names of `tensors`, of `_callback_tensor_inputs`.
            guidance_rescale: See `ClassifierFreeGuidance`.
            guidance_interval: See `ClassifierFreeGuidance`.
            prompt_2: For the second text encoder; `None` for `prompt`.
            prompt_3: For the third.
            negative_prompt_2: Likewise, in the place of `negative_prompt`.
            negative_prompt_3: Likewise.
            clip_skip: Layers of CLIP left out at the end, for the prompts (not the negative ones, as in diffusers).
            max_sequence_length: Tokens that T5 reads: 256 for SD3, 512 for FLUX, if `None`.
            true_cfg_scale: Strength of classifier-free guidance for models that take `guidance_scale` as an input, if
                there is a negative prompt; it doubles the work.
            image: To start from: see `ImageStart` for it and for
            mask_image: where it is to be made anew,
            strength: how far back towards noise,
            masked_image_latents: what inpainting models are shown,
            padding_mask_crop: the part of the image to make, and
            denoising_start: from which share of the way another model's latents are walked on.
            denoising_end: In (0, 1): the share of the way from noise to data after which to stop, and leave the rest
                to another model (SDXL's refiner); with `output_type="latent"`.
            original_size: (height, width) that SDXL is told the picture had before it was cropped; `None`: its own.
            crops_coords_top_left: Where SDXL is told the picture was cropped; `None`: (0, 0).
            target_size: (height, width) that SDXL is told the picture has; `None`: its own.
            negative_original_size: The same for the unconditional half; `None` for what the conditional one is told.
            negative_crops_coords_top_left: Likewise.
            negative_target_size: Likewise.
            aesthetic_score: What SDXL's refiner is told in the place of the target size; `None`: 6.
            negative_aesthetic_score: Likewise for the unconditional half; `None`: 2.5.
            eta: Noise added in each step, for schedulers that take it (DDIM).
            cross_attention_kwargs: Options for a U-Net's attention processors.
            joint_attention_kwargs: Likewise for a transformer's.

        Raises:
            ValueError: An argument is not one that the model can work with; before anything is computed.
        """
        prompts = PromptInputs(
            *(prompt, prompt_2, prompt_3, negative_prompt, negative_prompt_2, negative_prompt_3),
            *(prompt_embeds, pooled_prompt_embeds, negative_prompt_embeds, negative_pooled_prompt_embeds),
            *(num_images_per_prompt, clip_skip, max_sequence_length),
        )
        attention_kwargs = attention_options(self.backbone, cross_attention_kwargs, joint_attention_kwargs)
        defaults = self.defaults(image is not None, mask_image is not None)
        guidance_scale = defaults.guidance_scale if guidance_scale is None else guidance_scale
        guidance, told_scale = self.prepare_guidance(
            guidance_scale, true_cfg_scale, guidance_rescale, guidance_interval, prompts.has_negative
        )
        prompts.check(self.condition, self.backbone, guidance.enabled)
        start = image_start(
            *(self, image, mask_image, strength, height, width),
            *(masked_image_latents, padding_mask_crop, denoising_start, output_type),
        )
        size = self.check_size(height, width) if start is None else start.size
        numbers = PictureInputs(
            *(original_size, crops_coords_top_left, target_size),
            *(negative_original_size, negative_crops_coords_top_left, negative_target_size),
            *(aesthetic_score, negative_aesthetic_score),
        ).numbers(self.backbone, size, self.config.requires_aesthetics_score)
        check_generator(generator, prompts.batch)
        check_latents(latents, self.latents_shape(prompts.batch, size))
        check_output(
            output_type, callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs
        )
        step_options = check_eta(self.scheduler, eta)
        if start is not None:
            start.check_batch(prompts.batch)
        device = self._execution_device
        grid = self.prepare_timesteps(num_inference_steps, timesteps, sigmas, size, device, defaults.steps)
        grid = until(self.scheduler, grid if start is None else start.rest(grid), denoising_end)
        self.begin_call(grid)

        positive, negative = self.encode_prompt(prompts, guidance.enabled, device)
        if start is None:
            begin = Begin(self.starting_noise(self.latents_shape(prompts.batch, size), generator, latents, device))
        else:
            begin = start.begin(grid, prompts.batch, generator, latents, prompts.num_images_per_prompt)
        predict = BackboneCall(
            *(self.backbone, positive, negative, numbers, told_scale, attention_kwargs, begin.extra_channels)
        )
        optimize_unless_chosen(self)
        latents = self.denoise(
            *(predict, begin, grid, guidance, generator, step_options),
            *(callback_on_step_end, callback_on_step_end_tensor_inputs),
        )
        images, flagged = self.decode_checked(latents, output_type)
        if start is not None:
            images = start.finish(images)
        self.maybe_free_model_hooks()
        output = TextToImageOutput(images=images, nsfw_content_detected=flagged)
        return output if return_dict else output.to_tuple()

    # ---- the arrows ----

    def prepare_guidance(
        self,
        scale: float,
        true_cfg_scale: float | None,
        rescale: float,
        interval: tuple[float, float],
        has_negative: bool,
    ) -> tuple[ClassifierFreeGuidance, float | None]:
        """How two predictions become one, and the scale that is an input of the backbone, if it takes one."""
        guidance = ClassifierFreeGuidance(scale, rescale, interval)
        self._guidance_scale = scale
        if not takes_guidance(self.backbone):
            if true_cfg_scale is not None:
                raise ValueError(
                    f"`true_cfg_scale`: got {true_cfg_scale!r}, expected none: `guidance_scale` is this model's "
                    "classifier-free guidance."
                )
            return guidance, None
        guidance = ClassifierFreeGuidance(1.0 if true_cfg_scale is None else true_cfg_scale, rescale, interval)
        if guidance.enabled and not has_negative:
            logger.warning("`true_cfg_scale` has no effect without a negative prompt.")
            guidance = ClassifierFreeGuidance(1.0)
        return guidance, scale

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
            require_whole("num_inference_steps", steps)
            sigmas = self.family.sigmas(steps, self.scheduler)
        return set_grid(self.scheduler, num_inference_steps, timesteps, sigmas, steps, device, mu)

    def dynamic_shift(self, size: tuple[int, int]) -> float:
        """mu of the timesteps' shift, on a line by the number of image tokens (SD3, 2403.03206, section 5.3.2)."""
        config: Any = self.scheduler.config
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        base, top = config.get("base_shift", 0.5), config.get("max_shift", self.family.max_shift)
        return base + (top - base) / (high - low) * (self.latent_space.tokens(size) - low)

    def encode_prompt(
        self, prompts: PromptInputs, guided: bool, device: torch.device
    ) -> tuple[TextEmbeddings, TextEmbeddings | None]:
        """Embeddings of B prompts and of what guidance leads away from (`None` if nothing is guided).

        Args:
            prompts: Checked.
            guided: Whether the second embeddings are needed.
            device: Where the text encoders run and the embeddings go.
        """
        condition, count = self.condition, prompts.num_images_per_prompt
        if prompts.prompt_embeds is None:
            made = prompts.encode(condition, PROMPTS, device, prompts.clip_skip)
            positive = self.for_backbone(made.tokens, made.pooled, device)
        else:
            positive = self.for_backbone(prompts.prompt_embeds, prompts.pooled_prompt_embeds, device)
        if not guided:
            if prompts.has_negative:
                logger.warning("The negative prompt has no effect without guidance.")
            return positive.repeat_interleave(count), None

        if prompts.negative_prompt_embeds is not None:
            pooled = prompts.negative_pooled_prompt_embeds
            negative = self.for_backbone(prompts.negative_prompt_embeds, pooled, device)
        elif condition.zero_without_prompt and not prompts.has_negative:
            negative = TextEmbeddings(torch.zeros_like(positive.tokens), torch.zeros_like(positive.pooled))
        else:
            made = prompts.encode(condition, NEGATIVES, device)
            negative = self.for_backbone(made.tokens, made.pooled, device)
        if negative.tokens.shape != positive.tokens.shape:
            raise ValueError(
                f"`negative_prompt_embeds`: got {tuple(negative.tokens.shape)}, expected the shape of the prompts' "
                f"embeddings, {tuple(positive.tokens.shape)}."
            )
        return positive.repeat_interleave(count), negative.repeat_interleave(count)

    def for_backbone(self, tokens: torch.Tensor, pooled: torch.Tensor | None, device: torch.device) -> TextEmbeddings:
        """Embeddings as the backbone takes them: in its dtype, and without pooled text where it takes none."""
        if pooled is None or not takes_pooled(self.backbone):
            pooled = tokens.new_zeros(len(tokens), 0)
        return TextEmbeddings(tokens, pooled).to(device, self.backbone.dtype)

    def denoise(
        self,
        predict: BackboneCall,
        begin: Begin,
        timesteps: torch.Tensor,
        guidance: ClassifierFreeGuidance,
        generator: Generator = None,
        step_options: Mapping[str, Any] | None = None,
        callback: Callback | None = None,
        callback_tensors: Sequence[str] = ("latents",),
    ) -> torch.Tensor:
        """From noise to latents, (B, C, h, w): the loop of `hubgen.pipelines.denoising` with this backbone."""
        embeddings: dict[str, Any] = dict(zip(EMBEDDINGS, predict.embeddings, strict=True))

        def tell() -> None:
            predict.embeddings = tuple(embeddings[name] for name in EMBEDDINGS)

        with prepared(self.backbone, timesteps, predict.conditions):
            return self.walk(
                *(predict, begin.latents, timesteps, guidance, generator),
                *(callback, callback_tensors, embeddings, tell, begin.blend),
                step_options=step_options,
            )

    def decode_latents(self, latents: torch.Tensor, output_type: str = "pil") -> Any:
        """Pictures of latents, (B, C, h, w) as the backbone has them; see the call for `output_type`."""
        return self.decode_checked(latents, output_type)[0]

    def decode_checked(self, latents: torch.Tensor, output_type: str) -> tuple[Any, list[bool] | None]:
        """Pictures, and which of them the safety checker has blackened (`None` without one, and for latents)."""
        if output_type == "latent":
            return latents, None
        pixels, flagged = decode_pixels(self.vae, latents), None
        if self.safety_checker is not None:
            flagged = blacken(pixels, self.safety_checker, self.feature_extractor, self.image_processor)
        return self.image_processor.postprocess(pixels, output_type=output_type), flagged

    # ---- the parts ----

    @property
    def backbone(self) -> Any:
        """The network that predicts: `transformer` or `unet`."""
        return self.transformer if self.transformer is not None else self.unet

    @property
    def condition(self) -> PromptCondition:
        """Prompts to embeddings."""
        return prompt_condition(
            self.backbone,
            (self.text_encoder, self.text_encoder_2, self.text_encoder_3),
            (self.tokenizer, self.tokenizer_2, self.tokenizer_3),
            self.config.force_zeros_for_empty_prompt,
        )

    @property
    def family(self) -> Family:
        """Defaults, and the pipelines of diffusers that these components make."""
        return family_of(self.condition, self.backbone, self.config.requires_aesthetics_score)

    @property
    def latent_space(self) -> LatentSpace:
        """Shapes of latents and sizes of pictures."""
        return LatentSpace(self.vae, self.backbone)

    def defaults(self, image: bool = False, mask: bool = False) -> Defaults:
        """What a call does that is not told, without or with an image and a mask."""
        family, config = self.family, self.config
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

    def latents_shape(self, batch: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """(B, C, h, w) for `size` in pixels."""
        return self.latent_space.shape(batch, size)

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

    # ---- checks ----

    def check_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """(height, width) in pixels, defaults filled in; raises ValueError for what the model cannot make."""
        space = self.latent_space
        size = (
            space.default_size[0] if height is None else height,
            space.default_size[1] if width is None else width,
        )
        for name, side in zip(("height", "width"), size, strict=True):
            if isinstance(side, int) and side > space.largest:
                raise ValueError(
                    f"`{name}`: got {side}, expected at most {space.largest}, the largest that this model makes."
                )
            check_size(name, side, space.multiple)
        return size
