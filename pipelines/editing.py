"""Edits of given pictures by a pipeline of prompts.

    inversion = pipe.invert(picture, "a red cat", method="midpoint", num_inference_steps=24)
    same = pipe.reconstruct(inversion).images[0]
    edited = pipe.reconstruct(inversion, "a blue cat", guidance_scale=4).images[0]

    inversion = pipe.invert(picture, "a red cat")  # DDIM, or Euler's method along a flow
    null = pipe.null_text(inversion, guidance_scale=7.5)
    edited = pipe.reconstruct(inversion, "a blue cat", guidance_scale=7.5, controls=[null]).images[0]

    edited = pipe.flow_edit(picture, "a red cat", "a blue cat").images[0]  # along a flow, without inversion

Shapes: B pictures, (B, C, h, w) latents, n steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from hubgen.acceleration.optimize import accelerated
from hubgen.checks import whole
from hubgen.conditioning.condition import Condition
from hubgen.conditioning.guidance import ClassifierFreeGuidance
from hubgen.conditioning.micro import MicroArguments
from hubgen.conditioning.predict import Predictor
from hubgen.conditioning.prompts import PromptCondition
from hubgen.controls.control import Control, Prepared, Start, Target, check_controls, open_doors, opened, prepare_all
from hubgen.controls.null_text import NullText, NullTextFit
from hubgen.data.images import Images
from hubgen.diffusers_contract import has_step_caches
from hubgen.pipelines.checks import check_generator, check_output
from hubgen.pipelines.denoising import Generator
from hubgen.pipelines.flow_edit import GuidedVelocity, VelocityDifference, edit_defaults
from hubgen.pipelines.inversion import (
    DOWNWARDS,
    Inversion,
    WayUp,
    copies,
    image_latents,
    image_start,
    refuse,
    scheduled,
    walk_down,
    walk_up,
)
from hubgen.pipelines.prompt_to_embeddings import (
    EMBEDDINGS,
    NEGATIVES,
    PROMPTS,
    Prompt,
    PromptArguments,
    scaled_adapters,
)
from hubgen.schedulers.inversion import is_flow, solver

# Arguments of the call under which null-text would not fit what it is used with, or that it sets itself.
FITTED = (
    *("controls", "guidance_rescale", "guidance_interval", "cross_attention_kwargs", "joint_attention_kwargs"),
    *("output_type", "return_dict", "callback_on_step_end", "num_images_per_prompt", "denoising_end"),
)
TEXTS = (*PROMPTS, *NEGATIVES, *EMBEDDINGS, "num_images_per_prompt")


class EditingMixin:
    """Adds edits of given pictures to a pipeline of prompts."""

    @torch.no_grad()
    def invert(
        self: Any,
        image: Images,
        prompt: Prompt = None,
        method: str = "euler",
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        generator: Generator = None,
        height: int | None = None,
        width: int | None = None,
        gamma: float | None = None,
        eta: float | None = None,
        eta_span: tuple[float, float] | None = None,
        **arguments: Any,
    ) -> Inversion:
        """The noise from which the model makes the given pictures: the call's way on the scheduler's grid, upwards.

        Args:
            image: One or several, as in the call.
            prompt: What they show: one for all, or one each.
            method: "euler", which on variance-preserving paths is DDIM (2010.02502); for flows also "midpoint", which
                is RF-Solver (2411.04746) and comes back with far less error for twice the work; "fireflow"
                (2412.07517), nearly as exact for the work of Euler's steps; or "rf", RF-inversion (2410.10792), whose
                noise looks more like noise, and whose way back is drawn to the picture.
            num_inference_steps: n; `None` for the model's default. The way back has the same.
            guidance_scale: As in the call. Without guidance, at 1, the way back is nearest.
            generator: Source of the noise that "rf" is drawn to, and of what controls draw.
            height: Pixels; `None` as in a call with an image.
            width: Pixels.
            gamma: In [0, 1], how strongly "rf" is drawn to noise; `None`: 0.5.
            eta: In [0, 1], how strongly its way back is drawn to the picture; `None`: 0.9.
            eta_span: (start, end), the share of the steps back that is drawn; `None`: (0, 0.25).
            **arguments: Others of the call: negative prompts, embeddings, `timesteps`, `sigmas`, `controls` (whose
                `start` and `end` count steps from the picture on) and so on.

        Raises:
            ValueError: No image, images and prompts of different numbers, an unknown method or one that does not suit
                the scheduler, a scheduler whose steps cannot be walked back, or an argument that makes no sense here.
            TypeError: The call does not have an argument.
            RuntimeError: It was interrupted.
        """
        given = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        call = {"prompt": prompt, **given, **arguments}
        way = WayUp(image, method, generator, height, width, gamma, eta, eta_span)
        return walk_up(self, way, call, "prompt", self.checked_prompts(call).count, "num_images_per_prompt")

    def reconstruct(self: Any, inversion: Inversion, prompt: Prompt = None, **arguments: Any) -> Any:
        """The pictures of an inversion again, or what other prompts and controls make of its noise.

        Args:
            inversion: Of B pictures.
            prompt: `None` for that of the inversion. One, for all pictures, or a multiple of B, among which the noises
                go in turns: `[source, target]` of a single picture for prompt-to-prompt.
            **arguments: Others of the call, in the place of the inversion's; without `guidance_scale` it is the
                inversion's. Controls have to be given anew.

        Returns:
            What the call returns.

        Raises:
            ValueError: Prompts that do not fit the number of pictures, or an argument that the way back has already.
            TypeError: The call does not have an argument.
        """
        refuse(self, arguments, DOWNWARDS, "the way back has the beginning and the grid of the inversion")
        call = dict(inversion.arguments)
        if prompt is not None or arguments.get("prompt_embeds") is not None:
            call = {name: value for name, value in call.items() if name not in TEXTS}
            call["prompt"] = prompt
        call.update(arguments)
        prompts = self.checked_prompts(call)
        if prompts.count == 1 and "num_images_per_prompt" not in call:
            call["num_images_per_prompt"] = len(inversion.latents)
        pictures = prompts.count * whole("num_images_per_prompt", call.get("num_images_per_prompt", 1))
        return walk_down(self, inversion, call, pictures)

    def null_text(
        self: Any,
        inversion: Inversion,
        prompt: Prompt = None,
        guidance_scale: float | None = None,
        true_cfg_scale: float | None = None,
        inner_steps: int = 10,
        learning_rate: float = 1e-2,
        early_stop: float = 1e-5,
        **arguments: Any,
    ) -> NullText:
        """Negative embeddings with which guided sampling leads back to the pictures of an inversion (2211.09794).

            null = pipe.null_text(inversion, guidance_scale=7.5)
            pipe.reconstruct(inversion, guidance_scale=7.5, controls=[null])

        It takes n `inner_steps` calls of the backbone with their gradients: best in float32 or bfloat16.

        Args:
            inversion: By the method "euler", without guidance.
            prompt: `None` for that of the inversion.
            guidance_scale: Above 1; `None` for the model's default. For FLUX an input of the model, as in the call.
            true_cfg_scale: FLUX's classifier-free guidance, above 1, with a `negative_prompt` to begin from.
            inner_steps: Adam's steps at each of the n steps, at most.
            learning_rate: Adam's, at the first of the n steps; it falls to the half.
            early_stop: See `NullTextFit`.
            **arguments: Others of the call, such as `negative_prompt`.

        Raises:
            ValueError: An inversion by another method, no guidance, a step cache, `torch.inference_mode`, or an
                argument that makes no sense here.
            TypeError: The call does not have an argument.
            RuntimeError: It was interrupted.
        """
        refuse(self, arguments, FITTED, "null-text is optimised for prompts and a guidance scale alone")
        if inversion.trajectory is None:
            raise ValueError("`inversion`: got one without a trajectory, expected one by the method 'euler'.")
        if self.family.distilled:
            scale, scales = true_cfg_scale, {"guidance_scale": guidance_scale, "true_cfg_scale": true_cfg_scale}
        elif true_cfg_scale is not None:
            raise ValueError(f"`true_cfg_scale`: got {true_cfg_scale!r}, expected none: this model has guidance_scale.")
        else:
            scale = self.defaults().guidance_scale if guidance_scale is None else guidance_scale
            scales = {"guidance_scale": scale}
        scales = {name: value for name, value in scales.items() if value is not None}
        fit = NullTextFit(inversion.trajectory, 1.0 if scale is None else scale, inner_steps, learning_rate, early_stop)
        self.reconstruct(inversion, prompt, **scales, **arguments, controls=[fit], output_type="latent")
        return fit.result

    @torch.no_grad()
    def flow_edit(
        self: Any,
        image: Images,
        source_prompt: Prompt,
        prompt: Prompt,
        num_inference_steps: int | None = None,
        n_max: int | None = None,
        n_min: int = 0,
        n_avg: int = 1,
        source_guidance_scale: float | None = None,
        guidance_scale: float | None = None,
        source_negative_prompt: Prompt = None,
        negative_prompt: Prompt = None,
        generator: Generator = None,
        height: int | None = None,
        width: int | None = None,
        max_sequence_length: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: Mapping[str, Any] | None = None,
        controls: Sequence[Control] = (),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Edits pictures by two prompts, without inversion: FlowEdit (2412.08629), for models of flows.

        Args:
            image: One or several, as in the call.
            source_prompt: What they show: one for all, or one each.
            prompt: What they are to show; as many.
            num_inference_steps: n; `None`: 50 for SD3, 28 for FLUX, the model's default for others.
            n_max: How many of the n steps are done, the last ones: the more, the further the edit may go. `None`: 33
                of 50 steps, for FLUX 24 of 28, and in proportion.
            n_min: How many of these, again the last ones, sample the edit's prompt alone, as image to image does: the
                more, the less the edit keeps of the picture's details. From 0 to n_max.
            n_avg: Draws of noise at each step, over which is averaged.
            source_guidance_scale: Of the source's prompt. `None`: 3.5 for SD3, 1.5 for others.
            guidance_scale: Of the edit's prompt. `None`: 13.5 for SD3, 5.5 for FLUX, the model's default for others.
            source_negative_prompt: What the source's guidance leads away from.
            negative_prompt: What the edit's guidance leads away from.
            generator: Source of the noise; a list has one for each picture.
            height: Pixels; `None` as in a call with an image.
            width: Pixels.
            max_sequence_length: Tokens that T5 reads.
            output_type: As in the call.
            return_dict: Whether to return `ImagePipelineOutput` or a tuple of its `images`.
            joint_attention_kwargs: Keywords for the attention processors.
            controls: What else steers both prompts, but for controls that change the latents after each step.

        Raises:
            ValueError: A model of another path than a flow, no image, images and prompts of different numbers, a step
                cache, or an argument that the model cannot work with.
        """
        if not is_flow(self.scheduler):
            raise ValueError(f"flow_edit: got a {type(self.scheduler).__name__}, expected a scheduler of a flow.")
        if has_step_caches(self.backbone):
            raise ValueError("flow_edit: got a backbone with a step cache, expected none (disable_cache()).")
        family, condition, own = self.family, self.condition, self.defaults()
        default = edit_defaults(self.family_defaults, own.steps, own.guidance_scale)
        steps = whole("num_inference_steps", default.steps if num_inference_steps is None else num_inference_steps)
        done = default.n_max(steps) if n_max is None else whole("n_max", n_max, most=steps)
        sampled = whole("n_min", n_min, least=0, most=done)
        whole("n_avg", n_avg)
        attention = self.attention_options(family, None, joint_attention_kwargs)
        start = image_start(self, image, height, width)
        batch = len(start.image)
        check_generator(generator, batch)
        check_output(output_type, None, (), ())
        sides = []
        for name, prompts, negative, scale in (
            ("source_prompt", source_prompt, source_negative_prompt, source_guidance_scale),
            ("prompt", prompt, negative_prompt, guidance_scale),
        ):
            standard = default.source_guidance_scale if name == "source_prompt" else default.guidance_scale
            sides.append(Side.of(self, name, prompts, negative, max_sequence_length, batch, scale, standard))
        steering, device = check_controls(controls), self._execution_device
        euler = solver(self.scheduler, "euler")
        with scheduled(self, euler):
            grid = self.prepare_timesteps(steps, None, None, start.size, device, steps)
            euler.set_begin_index(steps - done)
            target = Target(
                backbone=self.backbone,
                family=family,
                vae=self.vae,
                scheduler=euler,
                latents=self.latent_space,
                size=start.size,
                batch=batch,
                per_prompt=sides[1].prompts.num_images_per_prompt,
                branches=max((side.guidance.all_branches for side in sides), key=len),
                timesteps=grid[steps - done :],
                generator=list(generator) if isinstance(generator, tuple) else generator,
                image_encoder=self.image_encoder,
                feature_extractor=self.feature_extractor,
                prompts=sides[1].prompts.read_by_all,
                condition=condition,
                max_sequence_length=max_sequence_length,
            )
            for control in steering:
                control.check(target)
            self.begin_call(target.timesteps)
            with scaled_adapters(condition.encoders, (attention or {}).get("scale")):
                conditions = [side.conditions(self, condition, target) for side in sides]
            data = image_latents(self, start)
            begin = Start(torch.zeros_like(data), data)
            prepared = prepare_all(steering, target, lambda: begin)[1]
            check_no_steps(prepared)
            doors = open_doors(prepared, attention)
            source, edited = (
                GuidedVelocity(Predictor(self.backbone, one, family, doors), side.guidance)
                for one, side in zip(conditions, sides, strict=True)
            )
            difference = VelocityDifference(target, data, source, edited, n_avg, sampled)
            networks = [network for control in steering for network in control.networks]
            with accelerated(self, *networks) as fast, opened(self.backbone, prepared):
                found = self.denoise(
                    fast.around(difference),
                    begin.x_t,
                    target.timesteps,
                    ClassifierFreeGuidance(1.0),  # each of the two prompts has its own
                    target.generator,
                )
                with fast.network():
                    pictures = self.decode_latents(difference.edit(found), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=pictures) if return_dict else (pictures,)

    def checked_prompts(self: Any, call: Mapping[str, Any], guided: bool = False) -> PromptArguments:
        """The prompts among the arguments of a call; ValueError for wrong ones."""
        names = [field.name for field in fields(PromptArguments)]
        prompts = PromptArguments(**{name: call[name] for name in names if name in call})
        prompts.check(self.condition, self.family, guided)
        return prompts


@dataclass(frozen=True)
class Side:
    """One of the two prompts of FlowEdit, of which there are one or B."""

    prompts: PromptArguments
    guidance: ClassifierFreeGuidance
    scale: float
    """Of the guidance, or what distilled weights are given"""

    @staticmethod
    def of(
        pipe: Any,
        name: str,
        prompt: Prompt,
        negative_prompt: Prompt,
        max_sequence_length: int | None,
        pictures: int,
        scale: float | None,
        default: float,
    ) -> "Side":
        """A checked one.

        Args:
            pipe: That reads the prompts.
            name: Of the argument with the prompts.
            prompt: One or B.
            negative_prompt: What the guidance leads away from.
            max_sequence_length: Tokens that T5 reads.
            pictures: B.
            scale: Of the guidance.
            default: Of the guidance, for `None`.

        Raises:
            ValueError: One of them is wrong.
        """
        if prompt is None:
            raise ValueError(f"`{name}`: got None, expected a prompt.")
        scale = default if scale is None else scale
        guidance = ClassifierFreeGuidance(scale)
        if pipe.family.distilled:
            guidance = ClassifierFreeGuidance(1.0)
        call = {"prompt": prompt, "negative_prompt": negative_prompt, "max_sequence_length": max_sequence_length}
        prompts = pipe.checked_prompts(call, guidance.enabled)
        return Side(replace(prompts, num_images_per_prompt=copies(name, prompts.count, pictures)), guidance, scale)

    def conditions(self, pipe: Any, condition: PromptCondition, target: Target) -> dict[str, Condition]:
        """By branch, of B pictures."""
        pipe._guidance_scale = self.scale
        found: dict[str, Condition] = pipe.prepare_conditions(
            self.prompts, condition, MicroArguments(), self.guidance.enabled, target
        )
        return found


def check_no_steps(prepared: Sequence[Prepared]) -> None:
    """Raises ValueError for controls that change the latents after a step: FlowEdit's are the edit less the picture."""
    for one in prepared:
        if type(one).after_step is not Prepared.after_step:
            raise ValueError(
                f"`controls`: got one that changes the latents after each step ({type(one).__name__}), expected none: "
                "FlowEdit walks the difference of two pictures."
            )
