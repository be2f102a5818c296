"""Class to image: class labels -> denoising loop -> decode, for DiTs and class-conditional U-Nets.

Shapes: B pictures (labels times pictures of each), H and W pixels, (B, C, h, w) latents.
"""

import numbers
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from hubgen.acceleration.optimize import accelerated
from hubgen.autoencoders.autoencoder_kl import AutoencoderKL
from hubgen.autoencoders.latents import LatentSpace, decode
from hubgen.backbones.dit import DiTTransformer2DModel
from hubgen.backbones.unet import UNet2DModel
from hubgen.checks import whole
from hubgen.conditioning.condition import Condition
from hubgen.conditioning.families import BackboneFamily, family_of
from hubgen.conditioning.guidance import (
    NEGATIVE,
    PICTURE,
    POSITIVE,
    ClassifierFreeGuidance,
    GuidedNoise,
    PictureGuidance,
)
from hubgen.conditioning.predict import Predictor
from hubgen.controls.control import Control, Target, check_controls, open_doors, opened, prepare_all
from hubgen.controls.inpaint import is_shown_masks
from hubgen.controls.shown_picture import EditInput, check_image_scale, edit_input
from hubgen.data.images import Images
from hubgen.hub.registration import loadable
from hubgen.pipelines.adapters import AdapterMixin
from hubgen.pipelines.callbacks import Callback, LiveGuidance
from hubgen.pipelines.checks import check_generator, check_latents, check_output
from hubgen.pipelines.class_editing import ClassEditingMixin
from hubgen.pipelines.denoising import AfterStep, Generator
from hubgen.pipelines.denoising_pipeline import DenoisingPipeline
from hubgen.pipelines.starts import ImageArguments, start_of

# What a callback may change: whose branches' rows it has, and which field of their conditions.
LABELS = {"class_labels": ((POSITIVE,), "labels")}


IMAGE_STRENGTH = 0.8
"""Of a call with an image that names none, as in Stable Diffusion's pipelines"""


@loadable
class ClassToImagePipeline(DenoisingPipeline, AdapterMixin, ClassEditingMixin):
    """Pictures of classes, by latent diffusion (DiT, 2212.09748).

    Reads the folders of diffusers' `DiTPipeline` (`facebook/DiT-XL-2-256`), and is saved as one. Components may be
    hubgen's or diffusers' classes of the same names, and schedulers any of diffusers'.

    Args:
        vae: Autoencoder between pixels and latents.
        scheduler: The way from noise to data. One whose `variance_type` is learned is given the learned variance;
            for others it is cut off.
        transformer: The backbone, if it is a DiT ...
        unet: ... or if it is a class-conditional U-Net: exactly one of the two.
        id2label: Names of the classes by number; several for one class are separated by commas, as in ImageNet.
        null_label: Number of the class that means none, for guidance; `None` for the transformer's own. A U-Net has
            none unless this says so.
        default_num_inference_steps: What a call does that names no number of steps; saved with the pipeline.
        default_guidance_scale: Of a call that names none; without effect where there is no label that means none.
        edit_input_normalised: Of a backbone that is shown a picture beside x_t, by further input channels: whether that
            picture's latents have the mean and scale of x_t; `None` for what is usual.

    Raises:
        ValueError: Both or neither of `transformer` and `unet` were given, the U-Net knows no classes, the channels of
            backbone and autoencoder differ, or `id2label` names classes that there are not.
    """

    model_cpu_offload_seq = "transformer->unet->vae"
    _optional_components = ["transformer", "unet"]
    _callback_tensor_inputs = ["latents", "class_labels"]
    reads = ("DiTPipeline",)

    def __init__(
        self,
        vae: AutoencoderKL | diffusers.AutoencoderKL,
        scheduler: SchedulerMixin,
        transformer: DiTTransformer2DModel | diffusers.DiTTransformer2DModel | None = None,
        unet: UNet2DModel | diffusers.UNet2DModel | None = None,
        id2label: dict[int, str] | None = None,
        null_label: int | None = None,
        default_num_inference_steps: int = 50,
        default_guidance_scale: float = 4.0,
        edit_input_normalised: bool | None = None,
    ):
        super().__init__()
        if (transformer is None) == (unet is None):
            found = "neither" if unet is None else "both"
            raise ValueError(f"`transformer`, `unet`: got {found}, expected exactly one of them.")
        self.register_modules(vae=vae, scheduler=scheduler, transformer=transformer, unet=unet)
        self.register_to_config(
            id2label=id2label,
            null_label=null_label,
            default_num_inference_steps=default_num_inference_steps,
            default_guidance_scale=default_guidance_scale,
            edit_input_normalised=edit_input_normalised,
        )
        if unet is not None and not unet.config.get("num_class_embeds"):
            raise ValueError("`unet`: got one without `num_class_embeds`, expected a class-conditional one.")
        channels, known = self.backbone.config.in_channels, self.shown is not None
        if channels != vae.config.latent_channels and not known and not is_shown_masks(self.family, self.latent_space):
            raise ValueError(f"`vae`: got {vae.config.latent_channels} channels, expected the backbone's {channels}.")
        if null_label is not None and not 0 <= null_label < self.embedded_labels:
            raise ValueError(f"`null_label`: got {null_label}, expected one of 0 ... {self.embedded_labels - 1}.")
        self.labels = labels_by_name(id2label or {}, self.embedded_labels)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._guidance_scale = default_guidance_scale

    def native_class(self) -> str | None:
        """`DiTPipeline`, for a transformer and a scheduler of the kind that it was made for."""
        plain = self.backbone.config.in_channels == self.latent_space.channels
        fits = plain and self.transformer is not None and hasattr(self.scheduler, "scale_model_input")
        return "DiTPipeline" if fits else None

    @classmethod
    def with_our_classes(cls, index: Mapping[str, Any]) -> dict[str, Any]:
        """As in `NativePipeline`; the first DiTs were published under the name of a class that has since been split."""
        transformer = index.get("transformer")
        if transformer is not None and list(transformer) == ["diffusers", "Transformer2DModel"]:
            index = {**index, "transformer": ["diffusers", "DiTTransformer2DModel"]}
        return super().with_our_classes(index)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | torch.Tensor,
        guidance_scale: float | None = None,
        generator: Generator = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        height: int | None = None,
        width: int | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        num_images_per_label: int = 1,
        latents: torch.Tensor | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        image: Images | None = None,
        mask_image: Images | None = None,
        strength: float | None = None,
        padding_mask_crop: int | None = None,
        controls: Sequence[Control] = (),
        image_guidance_scale: float | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Makes pictures. The first six arguments are those of diffusers' `DiTPipeline`.

        Args:
            class_labels: One or several, each a number or a name of `labels`.
            guidance_scale: Strength of classifier-free guidance; at most 1 is none, `None` the model's default.
            generator: Source of the noise. A list has one for each picture, which then comes out the same in any batch.
            num_inference_steps: `None` for the model's default, or for as many as `timesteps` or `sigmas` has.
            output_type: "pil"; "np", (B, H, W, 3) in [0, 1]; "pt", (B, 3, H, W) in [0, 1]; or "latent", (B, C, h, w).
            return_dict: Whether to return `ImagePipelineOutput` or a tuple of its `images`.
            height: Pixels; `None` for what the model was trained for.
            width: Pixels; see `height`.
            timesteps: The scheduler's grid, instead of its own; or
            sigmas: the same in terms of noise; not every scheduler takes them.
            num_images_per_label: Pictures of each label, next to each other in the result.
            latents: The noise to start from, (B, C, h, w), standard normal, instead of drawing it.
            callback_on_step_end: `(pipeline, step, timestep, tensors) -> tensors`; those returned replace the old ones.
            callback_on_step_end_tensor_inputs: Names of `tensors`, of `_callback_tensor_inputs`.
            guidance_rescale: See `ClassifierFreeGuidance`.
            guidance_interval: See `ClassifierFreeGuidance`.
            image: One or n images to begin from, or to be shown at every step, as in `TextToImagePipeline`.
            mask_image: White (from 0.5 on) where the image is made anew.
            strength: In [0, 1], how far back towards noise an image goes; `None`: 0.8, or with a mask 1.
            padding_mask_crop: Pixels around the mask's bounding box: only this part of the one image is made.
            controls: What else steers the call (`hubgen.controls`), in this order.
            image_guidance_scale: As in `TextToImagePipeline`.

        Raises:
            ValueError: An argument is not one that the model can work with; before anything is computed.
        """
        space, backbone, family = self.latent_space, self.backbone, self.family
        shown = self.shown
        guidance = self.check_guidance(
            guidance_scale, guidance_rescale, guidance_interval, check_image_scale(shown, image_guidance_scale)
        )
        labels = self.check_labels(class_labels)
        whole("num_images_per_label", num_images_per_label)
        images = ImageArguments(
            image, mask_image, strength, height, width, padding_mask_crop=padding_mask_crop, output_type=output_type
        )
        start = start_of(images, family, space, IMAGE_STRENGTH if mask_image is None else 1.0, shown)
        shape = space.shape(len(labels) * num_images_per_label, start.size)
        check_generator(generator, shape[0])
        check_latents(latents, shape)
        check_output(
            output_type, callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs
        )
        self.check_variance()
        device = self._execution_device
        default_steps = self.config.default_num_inference_steps
        grid = self.set_grid(num_inference_steps, timesteps, sigmas, default_steps, device)
        target = Target(
            backbone=backbone,
            family=family,
            vae=self.vae,
            scheduler=self.scheduler,
            latents=space,
            size=start.size,
            batch=shape[0],
            per_prompt=num_images_per_label,
            branches=guidance.all_branches,
            timesteps=start.remaining(self.scheduler, grid),
            generator=list(generator) if isinstance(generator, tuple) else generator,
        )
        steering = [*start.controls(), *check_controls(controls)]
        start.check(target)
        for control in steering:
            control.check(target)
        self.begin_call(target.timesteps)
        self._guidance_scale = guidance.scale

        chosen = torch.tensor(labels, device=device).repeat_interleave(num_images_per_label)  # (B,)
        conditions = {POSITIVE: Condition(labels=chosen)}
        if guidance.enabled and self.null_label is not None:
            conditions[NEGATIVE] = Condition(labels=torch.full_like(chosen, self.null_label))
            conditions[PICTURE] = conditions[NEGATIVE]  # differs by what the backbone is shown
        begin, prepared = prepare_all(steering, target, partial(start.begin, target, latents))
        predictor = Predictor(backbone, conditions, family, open_doors(prepared))
        channels = space.channels * (2 if self.scheduler_wants_variance else 1)

        def predict(x_t: torch.Tensor, t: torch.Tensor, branches: tuple[str, ...], step: int) -> torch.Tensor:
            return predictor(x_t, t, branches, step)[:, :channels]

        networks = [network for control in steering for network in control.networks]
        after_step: list[AfterStep] = [control.after_step for control in prepared]
        with accelerated(self, *networks) as fast, opened(backbone, prepared):
            tabulate = partial(predictor.tabulate, fast, target.timesteps, guidance.all_branches)
            tabulate()
            live = LiveGuidance(guidance, lambda: self._guidance_scale)
            names, needed = callback_on_step_end_tensor_inputs, lambda: live.all_branches
            after_step += self.acts(callback_on_step_end, names, predictor, LABELS, needed, fast, tabulate)
            guided = GuidedNoise(live, space.channels)
            latents = self.denoise(
                fast.around(predict), begin.x_t, target.timesteps, guided, target.generator, after_step
            )
            with fast.network():
                pictures = start.finished(self.decode_latents(latents, output_type))
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=pictures) if return_dict else (pictures,)

    def decode_latents(self, latents: torch.Tensor, output_type: str = "pil") -> Any:
        """Pictures of latents, (B, C, h, w) as the backbone has them; see the call for `output_type`."""
        if output_type == "latent":
            return latents
        return self.image_processor.postprocess(decode(self.vae, latents), output_type=output_type)

    def get_label_ids(self, label: str | Sequence[str]) -> list[int]:
        """Numbers of the classes of these names.

        Raises:
            ValueError: A name that there is not; the nearest ones are in the message.
        """
        names = [label] if isinstance(label, str) else list(label)
        for name in names:
            if name not in self.labels:
                raise ValueError(f"`class_labels`: there is no class {name!r}; {self.nearest_labels(name)}.")
        return [self.labels[name] for name in names]

    def nearest_labels(self, name: str) -> str:
        """What to say about a name that there is not."""
        import difflib

        if not self.labels:
            return "the model names none (`id2label`), give numbers"
        near = difflib.get_close_matches(name, self.labels, n=5, cutoff=0.4)
        return f"the nearest: {', '.join(near)}" if near else f"`labels` has all {len(self.labels)} names"

    @property
    def backbone(self) -> Any:
        """The network that predicts: `transformer` or `unet`."""
        return self.transformer if self.transformer is not None else self.unet

    @property
    def embedded_labels(self) -> int:
        """How many labels the backbone has a vector for; of a DiT the last one is no class."""
        if self.transformer is not None:
            return self.transformer.config.num_embeds_ada_norm + 1
        return self.unet.config.num_class_embeds

    @property
    def null_label(self) -> int | None:
        """The label that means no class, 1000 for ImageNet's DiTs; `None` where there is none."""
        if self.config.null_label is None and self.transformer is not None:
            return self.transformer.config.num_embeds_ada_norm
        return self.config.null_label

    @property
    def family(self) -> BackboneFamily:
        """How the backbone is called."""
        return family_of(self.backbone)

    @property
    def latent_space(self) -> LatentSpace:
        """Shapes of latents and sizes of pictures."""
        return LatentSpace(self.vae, self.backbone.config, self.family.patch)

    @property
    def shown(self) -> EditInput | None:
        """What the backbone is shown beside x_t; `None` for nothing, or a mask with the masked picture."""
        return edit_input(self.family, self.latent_space, normalised=self.config.edit_input_normalised)

    @property
    def vae_scale_factor(self) -> int:
        """Pixels of a picture's side per latent."""
        return self.latent_space.factor

    @property
    def guidance_scale(self) -> float:
        """That of the last call."""
        return self._guidance_scale

    def check_guidance(
        self,
        scale: float | None,
        rescale: float,
        interval: tuple[float, float],
        image_scale: float | None = None,
    ) -> ClassifierFreeGuidance:
        """The guidance of a call; raises ValueError where there is no label to lead away from.

        Args:
            scale: `None` for the model's.
            rescale: See `ClassifierFreeGuidance`.
            interval: See `ClassifierFreeGuidance`.
            image_scale: See `PictureGuidance`; `None` without one.
        """
        if scale is None:
            scale = self.config.default_guidance_scale if self.null_label is not None else 1.0
        guidance = ClassifierFreeGuidance(scale, rescale, interval)
        if image_scale is not None:
            guidance = PictureGuidance(scale, rescale, interval, image_scale)
        if guidance.enabled and self.null_label is None:
            raise ValueError(f"`guidance_scale`: got {scale}, expected at most 1: no label means none (`null_label`).")
        return guidance

    def check_labels(self, class_labels: int | str | Sequence[int | str] | torch.Tensor) -> list[int]:
        """The labels as numbers; raises ValueError for what is no class."""
        given: Any = class_labels.tolist() if torch.is_tensor(class_labels) else class_labels
        given = list(given) if isinstance(given, list | tuple | range) else [given]
        if not given:
            raise ValueError("`class_labels`: got none, expected at least one.")
        labels = []
        for label in given:
            if isinstance(label, str):
                label = self.get_label_ids(label)[0]
            if not isinstance(label, numbers.Integral) or isinstance(label, bool):
                raise ValueError(f"`class_labels`: got {label!r}, expected whole numbers or names of `labels`.")
            if not 0 <= label < self.embedded_labels:
                raise ValueError(f"`class_labels`: got {label}, expected one of 0 ... {self.embedded_labels - 1}.")
            labels.append(int(label))
        return labels

    def check_variance(self) -> None:
        """Raises ValueError where the scheduler asks for a variance that the backbone does not predict."""
        config, needed = self.backbone.config, 2 * self.latent_space.channels
        if self.scheduler_wants_variance and config.out_channels != needed:
            raise ValueError(
                f"`scheduler`: got `variance_type`={self.scheduler.config.variance_type!r}, which needs a backbone of "
                f"{needed} output channels; this one has {config.out_channels or config.in_channels}."
            )


def labels_by_name(id2label: Mapping[Any, Any], count: int) -> dict[str, int]:
    """Numbers by name, in the order of the alphabet, of a table with one or more names, with commas, a number.

    Raises:
        ValueError: A number that is none of 0 ... `count` - 1, or a name that is no string.
    """
    labels: dict[str, int] = {}
    for key, names in id2label.items():
        if not str(key).isdecimal() or int(key) >= count or not isinstance(names, str):
            raise ValueError(f"`id2label`: got {key!r}: {names!r}, expected names of 0 ... {count - 1}.")
        labels |= {name.strip(): int(key) for name in names.split(",")}
    return dict(sorted(labels.items()))
