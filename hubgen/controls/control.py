"""Controls: what steers a call of a pipeline from outside, whatever the backbone.

    control.check(target)                       before any network runs
    prepared = control.prepare(target, start)   once a call: encodes, draws, computes what stays the same
    before_call, channels, after_step, parts    what it then does at every step

A control sees a `Target`, never the pipeline, and asks nothing of a backbone but through its family. A new control is a
file beside this one; the loop and the pipelines stay as they are.

Shapes: B pictures of H x W pixels, latents (B, C, h, w) as the backbone has them.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hubgen.autoencoders.latents import LatentSpace
from hubgen.conditioning.families import BackboneFamily, Doors
from hubgen.conditioning.predict import OpenDoors

Generator = torch.Generator | list[torch.Generator] | None


@dataclass(frozen=True, eq=False)
class Target:
    """What a control may know of a call."""

    backbone: nn.Module
    family: BackboneFamily
    vae: Any
    scheduler: Any
    latents: LatentSpace
    size: tuple[int, int]
    """(H, W) of the result"""
    batch: int
    """B"""
    per_prompt: int
    """pictures of a prompt, which lie next to each other among the B"""
    timesteps: torch.Tensor
    """(n,), those of the scheduler that are left to do; its device is where everything goes"""
    generator: Generator = None
    """one, or one for each of the B pictures"""

    @property
    def device(self) -> torch.device:
        """Where the call computes."""
        return self.timesteps.device

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, C, h, w)."""
        return self.latents.shape(self.batch, self.size)

    def for_all(self, values: torch.Tensor) -> torch.Tensor:
        """Values of n images, (n, ...), n a divisor of B, for all pictures: (B, ...).

        Where there are as many images as prompts, image i goes with prompt i (diffusers deals the images out in turns);
        any other number goes in turns.
        """
        if len(values) * self.per_prompt == self.batch:
            return values.repeat_interleave(self.per_prompt, 0)
        return values.repeat(self.batch // len(values), *[1] * (values.ndim - 1))


@dataclass(frozen=True, eq=False)
class Start:
    """Where a call begins, (B, C, h, w) each."""

    x_t: torch.Tensor
    """at the first of the timesteps"""
    data: torch.Tensor | None = None
    """the latents of the image that x_t was made of; `None` where there is none, or none was needed"""
    noise: torch.Tensor | None = None
    """the noise in x_t; `None` where it is not known"""


class Prepared:
    """A control in one call. It may open any of these doors; by default all stay shut."""

    def before_call(self, timestep: torch.Tensor, branches: Sequence[str]) -> None:
        """Told before each call of the backbone: its timesteps, and in which order the branches' rows lie, B each."""

    def channels(self, branch: str) -> torch.Tensor | None:
        """(B, C', h, w), joined to x_t in this branch before the backbone."""
        return None

    def after_step(self, step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """The latents, (B, C, h, w), with which the next step begins."""
        return latents

    def parts(self) -> Mapping[str, Any]:
        """Parts of attention (`hubgen.layers.attention.Part`), by the names of the backbone's processors."""
        return {}


class Control(ABC):
    """What a user hands to a call. It holds settings and inputs and no state of a call."""

    def check(self, target: Target) -> None:  # noqa: B027
        """Raises ValueError where the control and the call do not fit each other; before any network runs."""

    @abstractmethod
    def prepare(self, target: Target, start: Start) -> Prepared:
        """What it adds to this call. Random numbers are drawn here, after those of the start."""


def check_controls(controls: Any) -> Sequence[Control]:
    """The controls of a call; ValueError for anything else."""
    if not isinstance(controls, list | tuple) or not all(isinstance(control, Control) for control in controls):
        raise ValueError(f"`controls`: got {controls!r:.100}, expected a list of controls (hubgen.controls).")
    return controls


def open_doors(prepared: Sequence[Prepared], attention: Mapping[str, Any] | None = None) -> OpenDoors:
    """What all controls of a call put into one call of the backbone, in their order.

    Args:
        prepared: The controls.
        attention: Keywords for the backbone's attention processors.
    """

    def doors(x_t: torch.Tensor, timestep: torch.Tensor, branches: Sequence[str]) -> Doors:
        channels = []
        for control in prepared:
            control.before_call(timestep, branches)
            rows = [control.channels(branch) for branch in branches]
            given = [row for row in rows if row is not None]
            if given:
                channels.append(torch.cat(given))
        return Doors(channels, attention or {})

    return doors


@contextmanager
def opened(backbone: Any, prepared: Sequence[Prepared]) -> Iterator[None]:
    """The parts of attention of all controls, in their order, are in the backbone's processors inside.

    Raises:
        ValueError: A part is for a processor that there is not, or that takes no parts.
    """
    changed: dict[Any, tuple[Any, ...]] = {}
    wanted = [item for control in prepared for item in control.parts().items()]
    processors = backbone.attn_processors if wanted else {}
    try:
        for name, part in wanted:
            processor = processors.get(name)
            if not hasattr(processor, "parts"):
                raise ValueError(f"`controls`: got a part for {name!r}, expected a processor that takes parts there.")
            changed.setdefault(processor, processor.parts)
            processor.parts = (*processor.parts, part)
        yield
    finally:
        for processor, parts in changed.items():
            processor.parts = parts
