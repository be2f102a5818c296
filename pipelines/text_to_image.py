"""Text to image: prompt -> embeddings -> denoising loop -> decode, for MM-DiTs and U-Nets alike.

Shapes: B pictures (prompts times pictures of each), H and W pixels, (B, C, h, w) latents, L text tokens of D features,
P features of pooled text.
"""

import inspect
import logging
import numbers
import os
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hubgen.autoencoders.autoencoder_kl import AutoencoderKL
from hubgen.backbones.mmdit import SD3Transformer2DModel
from hubgen.backbones.unet_condition import UNet2DConditionModel
from hubgen.conditioning.guidance import ClassifierFreeGuidance
from hubgen.conditioning.text import TextCondition, TextEmbeddings, condition_inputs, takes_pooled
from hubgen.hub.registration import is_registered, loadable
from hubgen.pipelines.denoising import Generator, denoise, supported

logger = logging.getLogger(__name__)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# A U-Net takes any size; well above this one, memory runs out before there is a picture.
LARGEST_SIDE = 8192
EMBEDDINGS = ("prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds")
# What a pipeline's folder holds; no pickled weights.
PIPELINE_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


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

    # The annotations of __init__ name classes one by one, because diffusers' `from_pipe` compares types with them.
    model_cpu_offload_seq = "text_encoder->transformer->unet->vae"
    _optional_components = ["transformer", "unet"]
    _callback_tensor_inputs = ["latents", *EMBEDDINGS]

    def __init__(
        self,
        vae: AutoencoderKL | diffusers.AutoencoderKL,
        text_encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        scheduler: SchedulerMixin,
        transformer: SD3Transformer2DModel | diffusers.SD3Transformer2DModel | None = None,
        unet: UNet2DConditionModel | diffusers.UNet2DConditionModel | None = None,
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
        self._guidance = ClassifierFreeGuidance(default_guidance_scale)
        self._num_timesteps = 0
        self._interrupt = False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "TextToImagePipeline":
        """As diffusers' `DiffusionPipeline.from_pretrained`: a pipeline's folder, or a repository on the Hub.

        Raises:
            ValueError: A folder that is no pipeline.
            OSError: Neither a folder nor a repository that can be reached.
        """
        path = os.fspath(pretrained_model_name_or_path)
        if os.path.isdir(path) and not os.path.isfile(os.path.join(path, cls.config_name)):
            raise ValueError(f"{path} is no pipeline folder: it holds no {cls.config_name}.")
        if not os.path.isdir(path) and not is_registered():
            # A diffusers that hubgen cannot register with refuses our classes from the Hub, but not from a folder.
            from huggingface_hub import snapshot_download

            path = snapshot_download(path, allow_patterns=PIPELINE_FILES, **supported(snapshot_download, **kwargs))
        return super().from_pretrained(path, **kwargs)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: Generator = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Makes pictures.

        Args:
            prompt: One or several.
            height: Pixels; `None` for what the model was trained for.
            width: Likewise.
            num_inference_steps: `None` for the model's default, or for as many as `timesteps` or `sigmas` has.
            timesteps: The scheduler's grid, instead of its own; or
            sigmas: the same in terms of noise; not every scheduler takes them.
            guidance_scale: Strength of classifier-free guidance; at most 1 is none, `None` the model's default.
            negative_prompt: What guidance leads away from: one for all prompts or one each; `None` is the empty prompt.
            num_images_per_prompt: Pictures of each prompt, next to each other in the result.
            generator: Source of the noise. A list has one for each picture, which then comes out the same in any batch.
            latents: The noise to start from, (B, C, h, w), standard normal, instead of drawing it.
            prompt_embeds: (prompts, L, D), instead of the prompts.
            negative_prompt_embeds: Likewise, instead of `negative_prompt`.
            pooled_prompt_embeds: (prompts, P), beside `prompt_embeds` where the backbone takes pooled text.
            negative_pooled_prompt_embeds: Likewise.
            output_type: "pil"; "np", (B, H, W, 3) in [0, 1]; "pt", (B, 3, H, W) in [0, 1]; or "latent", (B, C, h, w).
            return_dict: Whether to return `ImagePipelineOutput` or a tuple of its `images`.
            callback_on_step_end: `(pipeline, step, timestep, tensors) -> tensors`; those returned replace the old ones.
            callback_on_step_end_tensor_inputs: Names of `tensors`, of `_callback_tensor_inputs`.
            guidance_rescale: See `ClassifierFreeGuidance`.
            guidance_interval: See `ClassifierFreeGuidance`.

        Raises:
            ValueError: An argument is not one that the model can work with; before anything is computed.
        """
        scale = self.config.default_guidance_scale if guidance_scale is None else guidance_scale
        guidance = ClassifierFreeGuidance(scale, guidance_rescale, guidance_interval)
        size = self.check_size(height, width)
        embeds = (prompt_embeds, pooled_prompt_embeds, negative_prompt_embeds, negative_pooled_prompt_embeds)
        batch = self.check_prompts(prompt, negative_prompt, num_images_per_prompt, embeds)
        self.check_noise(batch, size, generator, latents)
        self.check_output(output_type, callback_on_step_end, callback_on_step_end_tensor_inputs)
        device = self._execution_device
        steps = self.prepare_timesteps(num_inference_steps, timesteps, sigmas, size, device)
        self._guidance, self._num_timesteps, self._interrupt = guidance, len(steps), False

        positive, negative = self.encode_prompt(
            prompt, negative_prompt, num_images_per_prompt, guidance.enabled, embeds, device
        )
        latents = self.prepare_latents(batch, size, generator, latents, device)
        latents = self.denoise(
            latents,
            steps,
            positive,
            negative,
            size,
            generator,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        images = self.decode_latents(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def prepare_timesteps(
        self,
        num_inference_steps: int | None,
        timesteps: Sequence[float] | None,
        sigmas: Sequence[float] | None,
        size: tuple[int, int],
        device: torch.device,
    ) -> torch.Tensor:
        """Sets the scheduler's grid and returns its timesteps, (n,) on `device`.

        Raises:
            ValueError: Not a whole number of steps above 0, or a grid that the scheduler does not take.
        """
        own = timesteps is None and sigmas is None
        if num_inference_steps is None and own:
            num_inference_steps = self.config.default_num_inference_steps
        if num_inference_steps is not None:
            require_whole("num_inference_steps", num_inference_steps)
        grid: dict[str, Any] = {"timesteps": timesteps, "sigmas": sigmas}
        grid = {name: value for name, value in grid.items() if value is not None}
        for name, value in grid.items():
            if num_inference_steps is not None and len(value) != num_inference_steps:
                raise ValueError(f"`{name}`: got {len(value)}, expected `num_inference_steps`={num_inference_steps}.")
        if self.scheduler.config.get("use_dynamic_shifting", False):
            grid["mu"] = self.dynamic_shift(size)
        known = inspect.signature(self.scheduler.set_timesteps).parameters
        for name in grid:
            if name not in known:
                raise ValueError(f"`{name}`: {type(self.scheduler).__name__} takes none, only a number of steps.")
        self.scheduler.set_timesteps(num_inference_steps if own else None, device=device, **grid)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)  # saves the scheduler a search that waits for the device
        return self.scheduler.timesteps

    def dynamic_shift(self, size: tuple[int, int]) -> float:
        """mu of the timesteps' shift, on a line by the number of image tokens (SD3, 2403.03206, section 5.3.2)."""
        config = self.scheduler.config
        tokens = (size[0] // self.size_multiple) * (size[1] // self.size_multiple)
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        return config.base_shift + slope * (tokens - config.base_image_seq_len)

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        num_images_per_prompt: int,
        guided: bool,
        embeds: Sequence[torch.Tensor | None],
        device: torch.device,
    ) -> tuple[TextEmbeddings, TextEmbeddings | None]:
        """Embeddings of B prompts and of what guidance leads away from (`None` if nothing is guided).

        Args:
            prompt: As in the call.
            negative_prompt: As in the call.
            num_images_per_prompt: How often each prompt is repeated.
            guided: Whether the second embeddings are needed.
            embeds: The four of `EMBEDDINGS`; those not `None` take the place of prompts.
            device: Where the text encoder runs and the embeddings go.
        """
        tokens, pooled, negative_tokens, negative_pooled = embeds
        if tokens is None:
            positive = self.condition.encode([prompt] if isinstance(prompt, str) else list(prompt or ()), device)
            tokens, pooled = positive.tokens, positive.pooled
        positive = self.for_backbone(tokens, pooled, device)
        if not guided:
            if negative_prompt is not None or negative_tokens is not None:
                logger.warning("The negative prompt has no effect without guidance.")
            return positive.repeat_interleave(num_images_per_prompt), None

        if negative_tokens is None:
            if isinstance(negative_prompt, list | tuple):
                negative = self.condition.encode(list(negative_prompt), device)
            else:
                negative = self.condition.encode([negative_prompt or ""], device).repeat_interleave(len(positive))
            negative_tokens, negative_pooled = negative.tokens, negative.pooled
        negative = self.for_backbone(negative_tokens, negative_pooled, device)
        if negative.tokens.shape != positive.tokens.shape:
            raise ValueError(
                f"`negative_prompt_embeds`: got {tuple(negative.tokens.shape)}, expected the shape of the prompts' "
                f"embeddings, {tuple(positive.tokens.shape)}."
            )
        return (
            positive.repeat_interleave(num_images_per_prompt),
            negative.repeat_interleave(num_images_per_prompt),
        )

    def for_backbone(self, tokens: torch.Tensor, pooled: torch.Tensor | None, device: torch.device) -> TextEmbeddings:
        """Embeddings as the backbone takes them: in its dtype, and without pooled text where it takes none."""
        if pooled is None or not takes_pooled(self.backbone):
            pooled = tokens.new_zeros(len(tokens), 0)
        return TextEmbeddings(tokens, pooled).to(device, self.backbone.dtype)

    def prepare_latents(
        self,
        batch: int,
        size: tuple[int, int],
        generator: Generator,
        latents: torch.Tensor | None,
        device: torch.device,
    ) -> torch.Tensor:
        """The noise to start from, (B, C, h, w) in float32: the same in whatever precision the networks compute."""
        if latents is None:
            latents = randn_tensor(self.latents_shape(batch, size), generator, device, torch.float32)
        return latents.to(device, torch.float32) * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def denoise(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        positive: TextEmbeddings,
        negative: TextEmbeddings | None,
        size: tuple[int, int],
        generator: Generator = None,
        callback: Callable[..., dict[str, Any] | None] | None = None,
        callback_tensors: Sequence[str] = ("latents",),
    ) -> torch.Tensor:
        """From noise to latents, (B, C, h, w): the loop of `hubgen.pipelines.denoising` with this backbone."""
        backbone, dtype = self.backbone, self.backbone.dtype
        tensors: dict[str, Any] = {"prompt_embeds": positive.tokens, "pooled_prompt_embeds": positive.pooled}
        if negative is not None:
            tensors |= {"negative_prompt_embeds": negative.tokens, "negative_pooled_prompt_embeds": negative.pooled}
        callback_tensors = getattr(callback, "tensor_inputs", callback_tensors)  # diffusers' callback objects

        def conditions() -> dict[bool, dict[str, Any]]:
            """What the backbone is told beside x_t, by whether the step is guided."""
            cond = TextEmbeddings(tensors["prompt_embeds"], tensors["pooled_prompt_embeds"])
            told = {False: condition_inputs(backbone, cond, size)}
            if negative is not None:
                uncond = TextEmbeddings(tensors["negative_prompt_embeds"], tensors["negative_pooled_prompt_embeds"])
                told[True] = condition_inputs(backbone, TextEmbeddings.cat([uncond, cond]), size)
            return told

        def predict(x_t: torch.Tensor, t: torch.Tensor, guided: bool) -> torch.Tensor:
            return backbone(x_t.to(dtype), timestep=t, **told[guided], return_dict=False)[0]

        def on_step(step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
            nonlocal told
            progress_bar.update()
            if callback is None:
                return latents
            tensors["latents"] = latents
            changed = callback(self, step, timestep, {name: tensors.get(name) for name in callback_tensors}) or {}
            self.check_callback_tensors("callback_on_step_end", changed)
            tensors.update(changed)
            if set(changed) & set(EMBEDDINGS):
                told = conditions()
            return tensors["latents"]

        told = conditions()
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            return denoise(
                predict,
                self.scheduler,
                latents,
                timesteps,
                self._guidance,
                generator,
                on_step=on_step,
                interrupted=lambda: self._interrupt,
            )

    def decode_latents(self, latents: torch.Tensor, output_type: str = "pil") -> Any:
        """Pictures of latents, (B, C, h, w) as the backbone has them; see the call for `output_type`."""
        if output_type == "latent":
            return latents
        config, dtype = self.vae.config, self.vae.dtype
        latents = latents / config.scaling_factor + (config.shift_factor or 0.0)
        upcast = dtype == torch.float16 and config.force_upcast
        if upcast:
            self.vae.to(torch.float32)
        pixels = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]  # (B, 3, H, W) in [-1, 1]
        if upcast:
            self.vae.to(dtype)
        return self.image_processor.postprocess(pixels.float(), output_type=output_type)

    @property
    def backbone(self) -> Any:
        """The network that predicts: `transformer` or `unet`."""
        return self.transformer if self.transformer is not None else self.unet

    @property
    def condition(self) -> TextCondition:
        """Prompts to embeddings."""
        return TextCondition(self.text_encoder, self.tokenizer)

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
        side = self.backbone.config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        return height * self.vae_scale_factor, width * self.vae_scale_factor

    @property
    def guidance_scale(self) -> float:
        """That of the last call."""
        return self._guidance.scale

    @property
    def num_timesteps(self) -> int:
        """Steps of the last call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the call is to end with what it has; set `_interrupt`, from a callback or another thread."""
        return self._interrupt

    def latents_shape(self, batch: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """(B, C, h, w) for `size` in pixels."""
        factor = self.vae_scale_factor
        return batch, self.backbone.config.in_channels, size[0] // factor, size[1] // factor

    def check_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """(height, width) in pixels, defaults filled in; raises ValueError for what the model cannot make."""
        size = (
            self.default_size[0] if height is None else height,
            self.default_size[1] if width is None else width,
        )
        multiple, largest = self.size_multiple, self.largest_side
        for name, side in zip(("height", "width"), size, strict=True):
            require_whole(name, side)
            if side > largest:
                raise ValueError(
                    f"`{name}`: got {side}, expected at most {largest}, the largest that this model makes."
                )
            if side % multiple:
                below, above = side // multiple * multiple, (side // multiple + 1) * multiple
                nearest = " or ".join(str(n) for n in (below, above) if multiple <= n <= largest)
                raise ValueError(f"`{name}`: got {side}, expected a multiple of {multiple}; the nearest: {nearest}.")
        return size

    def check_prompts(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        num_images_per_prompt: int,
        embeds: Sequence[torch.Tensor | None],
    ) -> int:
        """The number of pictures; raises ValueError where prompts or embeddings are wrong or do not fit each other."""
        require_whole("num_images_per_prompt", num_images_per_prompt)
        given = dict(zip(EMBEDDINGS, embeds, strict=True))
        if (prompt is None) == (given["prompt_embeds"] is None):
            found = "neither" if prompt is None else "both"
            raise ValueError(f"`prompt`, `prompt_embeds`: got {found}, expected exactly one of them.")
        if negative_prompt is not None and given["negative_prompt_embeds"] is not None:
            raise ValueError("`negative_prompt`, `negative_prompt_embeds`: got both, expected at most one of them.")
        for name, value in (("prompt", prompt), ("negative_prompt", negative_prompt)):
            texts = [value] if isinstance(value, str) or value is None else value
            if not isinstance(texts, list | tuple) or not texts:
                raise ValueError(f"`{name}`: got {value!r}, expected a string or a non-empty list of strings.")
            for number, text in enumerate(texts if value is not None else ()):
                if not isinstance(text, str):
                    raise ValueError(f"`{name}`: got {text!r} as number {number}, expected a string.")
        embedded = given["prompt_embeds"]
        prompts = len(embedded) if embedded is not None else 1 if isinstance(prompt, str) else len(prompt or ())
        if isinstance(negative_prompt, list | tuple) and len(negative_prompt) != prompts:
            raise ValueError(
                f"`negative_prompt`: got {len(negative_prompt)}, expected one for all or one for each of the {prompts} "
                "prompts."
            )
        pools = takes_pooled(self.backbone)
        for tokens, pooled in (EMBEDDINGS[:2], EMBEDDINGS[2:]):
            if given[pooled] is not None and given[tokens] is None:
                raise ValueError(f"`{pooled}`: got a tensor without `{tokens}`, expected both or none.")
            if given[tokens] is not None and given[pooled] is None and pools:
                raise ValueError(
                    f"`{pooled}`: got None beside `{tokens}`, expected both: the backbone takes pooled text."
                )
        for name, ndim in zip(EMBEDDINGS, (3, 2, 3, 2), strict=True):
            tensor = given[name]
            if tensor is not None and (not torch.is_tensor(tensor) or tensor.ndim != ndim or len(tensor) != prompts):
                found = str(tuple(tensor.shape)) if torch.is_tensor(tensor) else repr(tensor)
                features = "tokens, features" if ndim == 3 else "features"
                raise ValueError(f"`{name}`: got {found}, expected a tensor of shape ({prompts}, {features}).")
        return prompts * num_images_per_prompt

    def check_noise(
        self, batch: int, size: tuple[int, int], generator: Generator, latents: torch.Tensor | None
    ) -> None:
        """Raises ValueError where generators or given latents do not fit B pictures of `size`."""
        generators = generator if isinstance(generator, list | tuple) else [generator] * batch
        if len(generators) != batch:
            raise ValueError(
                f"`generator`: got a list of {len(generators)}, expected one for each of {batch} pictures."
            )
        for one in generators:
            if not (isinstance(one, torch.Generator) or (one is None and generator is None)):
                raise ValueError(f"`generator`: got {one!r}, expected a torch.Generator or a list of them.")
        shape = self.latents_shape(batch, size)
        if latents is not None and (not torch.is_tensor(latents) or tuple(latents.shape) != shape):
            found = tuple(latents.shape) if torch.is_tensor(latents) else repr(latents)
            raise ValueError(f"`latents`: got {found}, expected a tensor of shape {shape}.")

    def check_output(self, output_type: str, callback: Any, callback_tensors: Sequence[str]) -> None:
        """Raises ValueError for an unknown `output_type` or a callback that cannot be served."""
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type`: got {output_type!r}, expected one of {OUTPUT_TYPES}.")
        if callback is not None and not callable(callback):
            raise ValueError(f"`callback_on_step_end`: got {callback!r}, expected something to call.")
        self.check_callback_tensors("callback_on_step_end_tensor_inputs", callback_tensors)

    def check_callback_tensors(self, argument: str, names: Sequence[str] | dict[str, Any]) -> None:
        """Raises ValueError for names that are not of `_callback_tensor_inputs`."""
        unknown = [name for name in names if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(f"`{argument}`: got {unknown}, expected names of {self._callback_tensor_inputs}.")


def require_whole(name: str, value: object) -> None:
    """Raises ValueError unless `value` is a whole number above 0."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{name}`: got {value!r}, expected a whole number, at least 1.")
