"""Inversion: the noise from which a pipeline makes a given picture, and the way back from it.

It is the pipeline's own call, from the picture's latents, with a scheduler whose grid ascends; the way back is the same
call on that grid from above. So both take whatever the call takes.

Shapes: B pictures, (B, C, h, w) latents, n steps.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from hubgen.autoencoders.latents import normalised, posterior
from hubgen.checks import is_number, whole
from hubgen.controls.control import Control, Prepared, Start, Target, check_controls
from hubgen.data.images import Canvas, Images
from hubgen.pipelines.checks import check_generator
from hubgen.pipelines.denoising import Generator
from hubgen.pipelines.starts import ImageArguments, ImageStart, start_of
from hubgen.schedulers.flow_match_controlled import Controller, check_span
from hubgen.schedulers.inversion import solver, towards_noise

# Arguments of the call that make no sense on the whole way from a picture to noise, or back on the same grid.
BEGINNINGS = ("latents", "mask_image", "strength", "masked_image_latents", "padding_mask_crop", "denoising_start")
UPWARDS = (*BEGINNINGS, "denoising_end", "output_type", "return_dict", "num_images_per_prompt", "num_images_per_label")
DOWNWARDS = (*BEGINNINGS, "image", "height", "width", "num_inference_steps", "timesteps", "sigmas")
# Arguments that belong to one call alone.
ONCE = ("controls", "callback_on_step_end", "callback_on_step_end_tensor_inputs")


@dataclass(frozen=True, eq=False)
class Inversion:
    """The noise of pictures, and what is needed to go back."""

    latents: torch.Tensor
    """(B, C, h, w), the noise"""
    data: torch.Tensor
    """(B, C, h, w), the pictures' latents, where the way began"""
    scheduler: Any
    """Goes back by the same method. A pipeline that is given it as its own scheduler samples by that method"""
    arguments: Mapping[str, Any]
    """Of the call that found the noise: prompts, guidance, size and grid"""
    trajectory: tuple[torch.Tensor, ...] | None = None
    """n + 1 states (B, C, h, w) from data to noise, of the method "euler"; `None` for others"""


@dataclass(frozen=True)
class RFStrengths:
    """How strongly RF-inversion (2410.10792) is drawn to noise on the way up and to the picture on the way back.

    Raises:
        ValueError: A number is out of its range.
    """

    gamma: float = 0.5
    """In [0, 1], towards noise"""
    eta: float = 0.9
    """In [0, 1], towards the picture"""
    eta_span: tuple[float, float] = (0.0, 0.25)
    """(start, end), the steps back that are drawn to the picture, as shares of them"""

    def __post_init__(self) -> None:
        for name in ("gamma", "eta"):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value <= 1:
                raise ValueError(f"`{name}`: got {value!r}, expected a number in [0, 1].")
        check_span("eta_span", self.eta_span)

    @staticmethod
    def of(method: str, **given: Any) -> "RFStrengths | None":
        """Those of a call, the defaults in place of `None`; `None` for other methods.

        Raises:
            ValueError: One is given for another method, or out of its range.
        """
        chosen = {name: value for name, value in given.items() if value is not None}
        if method == "rf":
            return RFStrengths(**chosen)
        for name, value in chosen.items():
            raise ValueError(f"`{name}`: got {value!r}, expected none: only the method 'rf' has it, not {method!r}.")
        return None


class Trail(Control):
    """Keeps the states of a call, where it begins included."""

    def prepare(self, target: Target, start: Start) -> Prepared:
        self.states = [start.x_t]
        return KeptStates(self.states)


class KeptStates(Prepared):
    """`Trail` in one call."""

    def __init__(self, states: list[torch.Tensor]):
        self.states = states

    def after_step(self, step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        self.states.append(latents)
        return latents


@dataclass(frozen=True)
class WayUp:
    """How pictures are taken to noise: arguments of `EditingMixin.invert` of the same names."""

    image: Images | None
    method: str = "euler"
    generator: Generator = None
    height: int | None = None
    width: int | None = None
    gamma: float | None = None
    eta: float | None = None
    eta_span: tuple[float, float] | None = None


def walk_up(pipe: Any, way: WayUp, call: Mapping[str, Any], told: str, count: int, per: str) -> Inversion:
    """From pictures to noise.

    Args:
        pipe: Whose call walks.
        way: Of the pictures.
        call: The other arguments of the pipeline's call.
        told: Which of them says what the pictures show ...
        count: ... of how many: one for all, or one each.
        per: Which says how many pictures there are of each.

    Raises:
        ValueError: No image, images and what they show of different numbers, an unknown method or one that does not
            suit the scheduler, a scheduler whose steps cannot be walked back, or an argument that makes no sense here.
        TypeError: The call does not take an argument.
        RuntimeError: It was interrupted.
    """
    down = solver(pipe.scheduler, way.method)
    strengths = RFStrengths.of(way.method, gamma=way.gamma, eta=way.eta, eta_span=way.eta_span)
    refuse(pipe, call, UPWARDS, "an inversion goes all the way from the picture to noise")
    if call.get("num_inference_steps") is not None:
        whole("num_inference_steps", call["num_inference_steps"])
    controls = check_controls(call.get("controls", ()))
    start = image_start(pipe, way.image, way.height, way.width)
    check_generator(way.generator, len(start.image))
    call = {**call, per: copies(told, count, len(start.image)), "height": start.size[0], "width": start.size[1]}
    up, trail, data = towards_noise(down), Trail(), image_latents(pipe, start)
    if strengths is not None:
        noise = randn_tensor(data.shape, way.generator, data.device, torch.float32)
        up.controller = Controller(noise, strengths.gamma)
        down.controller = Controller(data, strengths.eta, strengths.eta_span)
    with scheduled(pipe, up):
        given = {**call, "controls": [*controls, trail], "generator": way.generator, "latents": data}
        latents = pipe(**given, output_type="latent").images
    if len(trail.states) != pipe.num_timesteps + 1:
        raise RuntimeError(f"invert: interrupted after {len(trail.states) - 1} of {pipe.num_timesteps} steps.")
    kept = {name: value for name, value in call.items() if name not in ONCE}
    whole_steps = strengths is None and len(trail.states) == up.num_inference_steps + 1
    return Inversion(latents, data, down, kept, tuple(trail.states) if whole_steps else None)


def walk_down(pipe: Any, inversion: Inversion, call: Mapping[str, Any], pictures: int) -> Any:
    """What the pipeline's call makes of an inversion's noise, on its way back.

    Args:
        pipe: Whose call walks.
        inversion: Of B pictures.
        call: The other arguments of the pipeline's call.
        pictures: How many these make: a multiple of B, among which the noises go in turns.

    Raises:
        ValueError: The call does not take an argument, or makes no multiple of B.
    """
    found = len(inversion.latents)
    if pictures % found:
        raise ValueError(f"`inversion`: got one of {found} pictures, expected a number that divides {pictures}.")
    latents = inversion.latents.repeat(pictures // found, 1, 1, 1)
    with scheduled(pipe, inversion.scheduler):
        return pipe(**call, latents=latents)


def image_start(pipe: Any, image: Images | None, height: int | None, width: int | None) -> ImageStart:
    """The pictures that an edit is about, checked; they are the B.

    Raises:
        ValueError: There is none, or none that the model can work with.
    """
    if image is None:
        raise ValueError("`image`: got None, expected one or several pictures.")
    start = start_of(ImageArguments(image=image, height=height, width=width), pipe.family, pipe.latent_space, 1.0)
    assert isinstance(start, ImageStart)
    return start


def image_latents(pipe: Any, start: ImageStart) -> torch.Tensor:
    """The means of the autoencoder's posterior for the pictures, (B, C, h, w) in float32: nothing is drawn."""
    pixels = start.canvas.pixels(start.image, pipe._execution_device)
    return pixels if Canvas.is_latent(start.image) else normalised(posterior(pipe.vae, pixels)[0], pipe.vae)


def copies(name: str, told: int, pictures: int) -> int:
    """How many pictures there are of each prompt or label: one serves all pictures, several one each.

    Args:
        name: Of the argument with the prompts or labels.
        told: How many these are.
        pictures: B.

    Raises:
        ValueError: Neither one nor as many as pictures.
    """
    if told not in (1, pictures):
        raise ValueError(f"`image`: got {pictures}, expected one for each of the {told} in `{name}`.")
    return pictures // told


def refuse(pipe: Any, arguments: Mapping[str, Any], names: Sequence[str], reason: str) -> None:
    """Raises for arguments that would be handed on to the pipeline's call and should not be.

    Raises:
        TypeError: The call does not have the argument.
        ValueError: It is one of `names`.
    """
    known = inspect.signature(type(pipe).__call__).parameters
    for name, value in arguments.items():
        if name in names:
            found = f"a {type(value).__name__}" if torch.is_tensor(value) else f"{value!r:.100}"
            raise ValueError(f"`{name}`: got {found}, expected none: {reason}.")
        if name not in known:
            raise TypeError(f"`{name}`: got one, expected an argument of {type(pipe).__name__}'s call.")


@contextmanager
def scheduled(pipe: Any, scheduler: Any) -> Iterator[None]:
    """The pipeline has another scheduler inside."""
    own = pipe.scheduler
    try:
        pipe.scheduler = scheduler
        yield
    finally:
        pipe.scheduler = own
