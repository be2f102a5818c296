"""Noise to pictures without a condition: denoising loop -> pixels, for DDPM, DDIM and NCSN++.

Shapes: B pictures of C channels, H and W pixels.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from hubgen.acceleration.optimize import accelerated
from hubgen.backbones.unet import UNet2DModel
from hubgen.checks import whole
from hubgen.conditioning.condition import Condition
from hubgen.conditioning.guidance import POSITIVE, ClassifierFreeGuidance
from hubgen.conditioning.predict import Predictor
from hubgen.hub.registration import loadable
from hubgen.pipelines.callbacks import Callback
from hubgen.pipelines.checks import check_generator, check_latents, check_output
from hubgen.pipelines.denoising import Generator, supported
from hubgen.pipelines.denoising_pipeline import DenoisingPipeline
from hubgen.pipelines.starts import starting_noise
from hubgen.schedulers.annealed_langevin import AnnealedLangevinScheduler
from hubgen.schedulers.score_sde_ve import ScoreSdeVeScheduler

DEFAULT_STEPS = {"DDIMPipeline": 50, "DDPMPipeline": 1000, "ScoreSdeVePipeline": 2000}
"""What diffusers' pipelines do where nobody names a number of steps."""


@loadable
class UnconditionalPipeline(DenoisingPipeline):
    """Pictures out of noise alone, in pixel space (DDPM, 2006.11239; DDIM, 2010.02502; NCSN++, 2011.13456).

    Reads the folders of diffusers' `DDPMPipeline` (`google/ddpm-cifar10-32`), `DDIMPipeline` and `ScoreSdeVePipeline`
    (`google/ncsnpp-ffhq-256`), and is saved as one of them. Components may be hubgen's or diffusers' classes of the
    same names, and schedulers any of diffusers'; with `ScoreSdeVeScheduler` a predictor's step follows a corrector's.

    Args:
        unet: The backbone, without class labels.
        scheduler: The way from noise to data.
        default_num_inference_steps: What a call does that names no number of steps; saved with the pipeline. `None` is
            50 for DDIM, 2000 for NCSN++ and 1000 for all others, at most as many as the model was trained with.

    Raises:
        ValueError: The U-Net wants class labels, or does not say the size of its pictures.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents"]
    reads = ("DDPMPipeline", "DDIMPipeline", "ScoreSdeVePipeline")

    def __init__(
        self,
        unet: UNet2DModel | diffusers.UNet2DModel,
        scheduler: SchedulerMixin,
        default_num_inference_steps: int | None = None,
    ):
        super().__init__()
        for name in ("class_embed_type", "num_class_embeds"):
            if unet.config.get(name) is not None:
                raise ValueError(
                    f"`unet`: got one with `{name}`={unet.config[name]!r}, expected one without class labels; classes "
                    "are for ClassToImagePipeline."
                )
        if unet.config.sample_size is None:
            raise ValueError("`unet`: got one without `sample_size`, expected the size of its pictures there.")
        if default_num_inference_steps is not None:
            whole("default_num_inference_steps", default_num_inference_steps)
        if hasattr(scheduler, "step_correct") and not isinstance(scheduler, ScoreSdeVeScheduler):
            scheduler = ScoreSdeVeScheduler.from_config(scheduler.config)  # diffusers' has two stages, but no `step`
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(default_num_inference_steps=default_num_inference_steps)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    def native_class(self) -> str | None:
        """By the scheduler: `ScoreSdeVePipeline`, `DDIMPipeline`, or `DDPMPipeline` for all others but NCSN's."""
        if self.is_score_sde:
            return "ScoreSdeVePipeline"
        if isinstance(self.scheduler, AnnealedLangevinScheduler):
            return None
        return "DDIMPipeline" if type(self.scheduler).__name__ == "DDIMScheduler" else "DDPMPipeline"

    @classmethod
    def with_our_classes(cls, index: Mapping[str, Any]) -> dict[str, Any]:
        """As in `NativePipeline`; a `DDIMPipeline` samples by DDIM, whatever scheduler the model was trained with."""
        if index.get("_class_name") == "DDIMPipeline" and "scheduler" in index:
            index = {**index, "scheduler": ["diffusers", "DDIMScheduler"]}
        return super().with_our_classes(index)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generator = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        latents: torch.Tensor | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Makes pictures. The first five arguments are those of diffusers' `DDPMPipeline`, in its order.

        Args:
            batch_size: Number of pictures.
            generator: Source of the noise. A list has one for each picture, which then comes out the same in any batch
                (but for NCSN++'s corrector, whose step is the batch's).
            num_inference_steps: `None` for the model's default, or for as many as `timesteps` or `sigmas` has.
            output_type: "pil"; "np", (B, H, W, C) in [0, 1]; "pt", (B, C, H, W) in [0, 1]; or "latent", what the loop
                ends with, (B, C, H, W): in [-1, 1], of NCSN++ in [0, 1], both about and not clipped.
            return_dict: Whether to return `ImagePipelineOutput` or a tuple of its `images`.
            eta: DDIM's share of noise, from 0 (none) to 1 (DDPM); for schedulers whose step takes it.
            use_clipped_model_output: See `DDIMScheduler.step`; for schedulers whose step takes it.
            timesteps: The scheduler's grid, instead of its own; or
            sigmas: the same in terms of noise; not every scheduler takes them.
            latents: The noise to start from, (B, C, H, W), standard normal, instead of drawing it.
            callback_on_step_end: `(pipeline, step, timestep, tensors) -> tensors`; those returned replace the old ones.
            callback_on_step_end_tensor_inputs: Names of `tensors`, of `_callback_tensor_inputs`.

        Raises:
            ValueError: An argument is not one that the model can work with; before anything is computed.
        """
        whole("batch_size", batch_size)
        shape = (batch_size, self.unet.config.in_channels, *self.size)
        check_generator(generator, batch_size)
        check_latents(latents, shape)
        check_output(
            output_type, callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs
        )
        step_options = self.check_step_options(eta, use_clipped_model_output)
        self.check_channels()
        device = self._execution_device
        grid = self.set_grid(num_inference_steps, timesteps, sigmas, self.default_steps, device)
        self.begin_call(grid)

        scheduler = self.scheduler
        predictor = Predictor(self.unet, {POSITIVE: Condition()})
        channels = shape[1] * (2 if self.scheduler_wants_variance else 1)

        def predict(x_t: torch.Tensor, t: torch.Tensor, branches: tuple[str, ...], step: int) -> torch.Tensor:
            time = scheduler.sigma(t) if self.is_score_sde else t
            return predictor(x_t, time, branches, step)[:, :channels]

        def correct(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            for _ in range(scheduler.config.correct_steps):
                with fast.network():
                    score = predict(x_t, t.expand(len(x_t)), (POSITIVE,), 0).to(x_t.dtype)
                x_t = scheduler.step_correct(score, x_t, generator=generator, return_dict=False)[0]
            return x_t

        latents = starting_noise(self.scheduler, shape, generator, latents, device)
        with accelerated(self) as fast:
            after_step = self.acts(callback_on_step_end, callback_on_step_end_tensor_inputs, predictor, {}, tuple, fast)
            latents = self.denoise(
                fast.around(predict),
                latents,
                grid,
                ClassifierFreeGuidance(1.0),
                generator,
                after_step,
                step_options=step_options,
                correct=correct if self.is_score_sde else None,
            )
        images = self.to_pictures(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def to_pictures(self, latents: torch.Tensor, output_type: str) -> Any:
        """Pictures of what the loop ends with, (B, C, H, W); see the call for `output_type`."""
        if output_type == "latent":
            return latents
        if self.learned_on_unit_range:
            latents = 2 * latents - 1
        return self.image_processor.postprocess(latents, output_type=output_type)

    @property
    def is_score_sde(self) -> bool:
        """Whether the network takes noise levels in the place of timesteps, and returns scores."""
        return isinstance(self.scheduler, ScoreSdeVeScheduler)

    @property
    def learned_on_unit_range(self) -> bool:
        """Whether pixels are in [0, 1] to the network, as those of scores have them; to others they are in [-1, 1]."""
        return self.is_score_sde or isinstance(self.scheduler, AnnealedLangevinScheduler)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the pictures in pixels."""
        side = self.unet.config.sample_size
        return (side, side) if isinstance(side, int) else tuple(side)

    @property
    def default_steps(self) -> int:
        """Steps of a call that names no number."""
        if self.config.default_num_inference_steps is not None:
            return self.config.default_num_inference_steps
        if isinstance(self.scheduler, AnnealedLangevinScheduler):
            return len(self.scheduler.sigmas) * self.scheduler.config.steps_per_level
        return min(DEFAULT_STEPS[self.native_class() or ""], self.scheduler.config.num_train_timesteps)

    def check_step_options(self, eta: float, use_clipped_model_output: bool | None) -> dict[str, Any]:
        """Options of the scheduler's steps; raises ValueError for those that it does not take."""
        options: dict[str, Any] = {}
        if eta:
            if not 0 <= eta <= 1:
                raise ValueError(f"`eta`: got {eta!r}, expected a number from 0 (DDIM) to 1 (DDPM).")
            options["eta"] = eta
        if use_clipped_model_output is not None:
            options["use_clipped_model_output"] = use_clipped_model_output
        for name in options.keys() - supported(self.scheduler.step, **options).keys():
            raise ValueError(f"`{name}`: got {options[name]}, but {type(self.scheduler).__name__} takes none.")
        return options

    def check_channels(self) -> None:
        """Raises ValueError where the U-Net predicts fewer channels than the scheduler's step takes."""
        config = self.unet.config
        wanted = config.in_channels * (2 if self.scheduler_wants_variance else 1)
        if config.out_channels < wanted:
            raise ValueError(
                f"`scheduler`: got `variance_type`={self.scheduler.config.get('variance_type')!r}, which takes "
                f"{wanted} channels of a prediction; the U-Net has `out_channels`={config.out_channels}."
            )
