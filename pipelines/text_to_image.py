"""Text to image: prompt -> embeddings -> denoising loop -> decode, for MM-DiTs and U-Nets alike.

Shapes: B pictures (prompts times pictures of each), H and W pixels, (B, C, h, w) latents, L text tokens of D features.
"""

import inspect
import math
import numbers
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

from hubgen.autoencoders.autoencoder_kl import AutoencoderKL
from hubgen.conditioning.guidance import ClassifierFreeGuidance
from hubgen.conditioning.text import TextCondition, TextEmbeddings, condition_inputs
from hubgen.hub.registration import is_registered, loadable
from hubgen.pipelines.denoising import Generator, denoise, supported

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# A U-Net takes any size; above this one, memory runs out long before a picture is there.
LARGEST_SIDE = 8192
EMBEDDINGS = ("prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds")


@loadable
class TextToImagePipeline(DiffusionPipeline):
    """Pictures of prompts, by latent diffusion or flow matching.

    Components may be hubgen's or diffusers' classes of the same names, and schedulers any of diffusers'.

    Args:
        vae: Autoencoder between pixels and latents.
        text_encoder: Any transformers text encoder (see `TextCondition`).
        tokenizer: Its tokenizer; `model_max_length` is the number of tokens that the backbone is shown.
        scheduler: The way from noise to data.
        transformer: The backbone, if it is an MM-DiT ...
        unet: ... or if it is a U-Net: exactly one of the two.
        default_num_inference_steps: What a call does that names no number of steps; saved with the pipeline.
        default_guidance_scale: Likewise.

    Raises:
        ValueError: Both or neither of `transformer` and `unet` were given.
    """

    model_cpu_offload_seq = "text_encoder->transformer->unet->vae"
    _optional_components = ["transformer", "unet"]
    _callback_tensor_inputs = ["latents", *EMBEDDINGS]

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: torch.nn.Module,
        tokenizer: Any,
        scheduler: Any,
        transformer: torch.nn.Module | None = None,
        unet: torch.nn.Module | None = None,
        default_num_inference_steps: int = 28,
        default_guidance_scale: float = 4.0,
    ):
        super().__init__()
        if (transformer is None) == (unet is None):
            found = "neither" if unet is None else "both"
            raise ValueError(f"`transformer`, `unet`: got {found}, expected exactly one of them.")
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            scheduler=scheduler,
            transformer=transformer,
            unet=unet,
        )
        self.register_to_config(
            default_num_inference_steps=default_num_inference_steps, default_guidance_scale=default_guidance_scale
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._interrupt = False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "TextToImagePipeline":
        """As diffusers' `DiffusionPipeline.from_pretrained`: a pipeline's folder, or a repository on the Hub.

        Raises:
            ValueError: A folder that is no pipeline.
        """
        path = os.fspath(pretrained_model_name_or_path)
        if os.path.isdir(path) and not os.path.isfile(os.path.join(path, cls.config_name)):
            raise ValueError(f"{path} is no pipeline folder: it holds no {cls.config_name}.")
        if not os.path.isdir(path) and not is_registered():
            # diffusers would refuse our classes from the Hub, but not from a folder.
            from huggingface_hub import snapshot_download

            path = snapshot_download(path, **supported(snapshot_download, **kwargs), allow_patterns=SNAPSHOT)
        return super().from_pretrained(path, **kwargs)

    @property
    def backbone(self) -> Any:
        """The network that predicts: `transformer` or `unet`."""
        return self.transformer if self.transformer is not None else self.unet

    @property
    def vae_scale_factor(self) -> int:
        """Pixels of a picture's side per latent."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def size_multiple(self) -> int:
        """Height and width in pixels are multiples of it: pixels per latent times latents per token."""
        return self.vae_scale_factor * self.backbone.config.get("patch_size", 1)

    @property
    def largest_side(self) -> int:
        """The largest height and width in pixels."""
        positions = self.backbone.config.get("pos_embed_max_size")
        return LARGEST_SIDE if positions is None else positions * self.size_multiple

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels that the backbone was trained for."""
        size = self.backbone.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.vae_scale_factor, width * self.vae_scale_factor

    @property
    def guidance_scale(self) -> float:
        """That of the call in progress."""
        return self._guidance.scale

    @property
    def num_timesteps(self) -> int:
        """Steps of the call in progress."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` from a callback or another thread: the call ends with what it has."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: Generator = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Makes pictures.

        Args:
            prompt: One or several.
            height, width: Pixels; `None` for the size that the model was trained for.
            num_inference_steps: `None` for the model's default, or as many as `timesteps` or `sigmas` has.
            guidance_scale: Strength of classifier-free guidance; at most 1 is none, `None` the model's default.
            negative_prompt: What guidance moves away from: one for all prompts or one each; the empty prompt if `None`.
            num_images_per_prompt: Pictures of each prompt, next to each other in the result.
            generator: Source of the noise. A list has one for each picture, which then comes out the same in any batch.
            latents: The noise to start from, (B, C, h, w), instead of drawing it.
            prompt_embeds, negative_prompt_embeds: (prompts, L, D), instead of the prompts.
            pooled_prompt_embeds, negative_pooled_prompt_embeds: (prompts, P), beside them if the backbone takes pooled
                text.
            timesteps, sigmas: The scheduler's grid, instead of its own.
            guidance_rescale, guidance_interval: See `ClassifierFreeGuidance`.
            output_type: "pil"; "np", (B, H, W, 3) in [0, 1]; "pt", (B, 3, H, W) in [0, 1]; or "latent", (B, C, h, w).
            return_dict: Whether to return `ImagePipelineOutput` or a tuple of its `images`.
            callback_on_step_end: `(pipeline, step, timestep, tensors) -> tensors`; what it returns replaces the old.
            callback_on_step_end_tensor_inputs: What `tensors` has, of `_callback_tensor_inputs`.

        Raises:
            ValueError: An argument is not one that the model can work with; before any computation.
        """
        guidance_scale = self.config.default_guidance_scale if guidance_scale is None else guidance_scale
        guidance = ClassifierFreeGuidance(guidance_scale, guidance_rescale, guidance_interval)
        height, width = height or self.default_size[0], width or self.default_size[1]
"""
