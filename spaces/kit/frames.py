"""What a picture looks like on its way: a control that sees each step of a call.

Between two steps of a sampler without fresh noise, x_t moves along one straight guess of data and noise:
x_t = alpha · data + sigma · noise before it and after it, two equations for two unknowns. So the data that the network
expects come out of what the loop hands to every control, whatever the network predicts. Where a sampler adds noise, or
its path is not known, x_t itself is shown.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch.nn import functional as F

from hubgen.controls.control import Control, Prepared, Start, Target
from hubgen.schedulers.objective import objective_of
from hubgen.schedulers.times import times

STRAIGHT = ("FlowMatchEulerDiscreteScheduler", "DDIMScheduler")
"""Schedulers whose step keeps the guess of data and noise"""


@dataclass(frozen=True, eq=False)
class Step:
    """One step of a call, just done."""

    number: int
    """from 1"""
    of: int
    x_t: torch.Tensor
    """(B, C, h, w) after it"""
    expected: torch.Tensor
    """(B, C, h, w): the data that the step aimed at, or x_t where that cannot be told"""


class Steps(Control):
    """Tells a function of every step.

    Args:
        tell: Called after each.
    """

    def __init__(self, tell: Callable[[Step], None]):
        self.tell = tell

    def prepare(self, target: Target, start: Start) -> Prepared:
        return Watched(self.tell, target, start)


class Watched(Prepared):
    """The steps of one call."""

    def __init__(self, tell: Callable[[Step], None], target: Target, start: Start):
        self.tell, self.before, self.of = tell, start.x_t, len(target.timesteps)
        self.factors = path_factors(target.scheduler, target.timesteps)

    def after_step(self, step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        expected = latents
        if self.factors is not None:
            (alpha, sigma), (alpha_after, sigma_after) = self.factors[step], self.factors[step + 1]
            scale = sigma * alpha_after - sigma_after * alpha
            if scale > 1e-6:
                expected = (sigma * latents - sigma_after * self.before) / scale
        self.before = latents
        self.tell(Step(step + 1, self.of, latents, expected))
        return latents


def path_factors(scheduler: Any, timesteps: torch.Tensor) -> list[tuple[float, float]] | None:
    """(alpha, sigma) of x_t before each of the steps and after the last; `None` where a step is no straight line.

    Args:
        scheduler: Its timesteps set.
        timesteps: (n,), those that are done.
    """
    config = scheduler.config
    odd = config.get("stochastic_sampling") or config.get("invert_sigmas") or config.get("clip_sample")
    if type(scheduler).__name__ not in STRAIGHT or odd or config.get("thresholding"):
        return None
    path = objective_of(scheduler, 1).path
    grid = torch.tensor(times(scheduler, timesteps))
    alphas, sigmas = path.alpha(grid).tolist(), path.sigma(grid).tolist()
    return [*zip(alphas, sigmas, strict=True), (1.0, 0.0)]


class Mosaic:
    """The colour of each place of a picture, straight from its latents: a linear map, which costs next to nothing.

    Args:
        decode: Latents (B, C, h, w) to pixels (B, 3, H, W) about [-1, 1].
        channels: C.
        side: Of the latents that the map is fitted on; as noise has all colours, noise will do.
        device: Where they are decoded.
    """

    def __init__(self, decode: Callable[[torch.Tensor], torch.Tensor], channels: int, side: int, device: Any):
        random = torch.Generator().manual_seed(0)
        latents = torch.randn(4, channels, side, side, generator=random)
        pixels = F.adaptive_avg_pool2d(decode(latents.to(device)).float().cpu(), (side, side))
        places = self.with_one(latents).flatten(0, 2)  # (4 h w, C + 1)
        self.colours = torch.linalg.lstsq(places, pixels.permute(0, 2, 3, 1).flatten(0, 2)).solution  # (C + 1, 3)

    def __call__(self, latents: torch.Tensor) -> list[Image.Image]:
        """A picture of h x w pixels of each of the latents, (B, C, h, w)."""
        colours = self.with_one(latents.float().cpu()) @ self.colours  # (B, h, w, 3)
        return [Image.fromarray(one.numpy()) for one in ((colours.clamp(-1, 1) + 1) * 127.5).round().byte()]

    @staticmethod
    def with_one(latents: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) -> (B, h, w, C + 1)."""
        return F.pad(latents.permute(0, 2, 3, 1), (0, 1), value=1.0)
