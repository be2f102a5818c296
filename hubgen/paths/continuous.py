"""Paths in continuous time whose alpha and sigma have a closed form, beside rectified flow.

Shapes are those of `hubgen.paths.path`: t is (B,), and so are alpha and sigma.
"""

import math
from abc import abstractmethod

import torch

from hubgen.paths.path import ProbabilityPath, _precise
from hubgen.paths.prediction import PredictionType


class AnglePath(ProbabilityPath):
    """A path of unit variance: alpha = cos(angle), sigma = sin(angle), the angle growing from 0 to pi / 2."""

    @abstractmethod
    def angle(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The angle at t and its derivative by t, both (B,) float64."""

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        return self.angle(_precise(t))[0].cos().to(t.dtype)

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        return self.angle(_precise(t))[0].sin().to(t.dtype)

    def alpha_derivative(self, t: torch.Tensor) -> torch.Tensor:
        angle, derivative = self.angle(_precise(t))
        return (-angle.sin() * derivative).to(t.dtype)

    def sigma_derivative(self, t: torch.Tensor) -> torch.Tensor:
        angle, derivative = self.angle(_precise(t))
        return (angle.cos() * derivative).to(t.dtype)


class CosinePath(AnglePath):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2): the cosine schedule in continuous time (SD3, 2403.03206, sec. 2).

    The models' timestep is num_train_timesteps * t - 1, a float: at the times of a schedule of so many betas, their
    index, so that schedulers of betas sample along it.
    """

    def __init__(self, prediction_type: PredictionType = "v", num_train_timesteps: int = 1000) -> None:
        super().__init__(prediction_type, num_train_timesteps)

    def angle(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return math.pi / 2 * t, torch.full_like(t, math.pi / 2)

    def timestep(self, t: torch.Tensor) -> torch.Tensor:
        return t * self.num_train_timesteps - 1

    def time(self, timestep: torch.Tensor) -> torch.Tensor:
        return (timestep.float() + 1) / self.num_train_timesteps

    def betas(self) -> list[float]:
        """The schedule of betas whose times lie on this path."""
        grid = torch.arange(self.num_train_timesteps + 1, dtype=torch.float64) / self.num_train_timesteps
        bars = self.alpha(grid).square()
        return (1 - bars[1:] / bars[:-1]).tolist()


class EdmPath(AnglePath):
    """EDM's preconditioned training (2206.00364, table 1 and section 5) on data of standard deviation 1.

    With s the noise level, EDM gives its network c_in (data + s noise), which is alpha data + sigma noise for
    alpha = 1 / sqrt(1 + s^2) and sigma = s alpha, and asks it for -v with the weight 1. Time is the share of noise
    levels below s, so that t uniform in (0, 1) draws ln s from the normal density of the paper:

        s(t) = exp(mean + std Phi^-1(t))        (SD3, 2403.03206, section 2)

    The models' timestep is c_noise = ln(s) / 4. At t = 0 and t = 1, where s is 0 and infinite, it and the derivatives
    are not finite.

    Args:
        prediction_type: "v" is what diffusers' EDM schedulers call v_prediction; what they call epsilon is its
            negative.
        mean: Of ln s.
        std: Of ln s, above 0.
    """

    def __init__(self, prediction_type: PredictionType = "v", mean: float = -1.2, std: float = 1.2) -> None:
        super().__init__(prediction_type)
        if not (math.isfinite(std) and std > 0):
            raise ValueError(f"`std`: got {std}, expected a finite number above 0")
        self.mean, self.std = mean, std

    def noise_level(self, t: torch.Tensor) -> torch.Tensor:
        """s, the ratio of noise to data at t (B,)."""
        return torch.exp(self.mean + self.std * torch.special.ndtri(t))

    def angle(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = torch.special.ndtri(t)
        s = torch.exp(self.mean + self.std * z)
        density = torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
        return torch.atan(s), self.std / density / (s + 1 / s)

    def timestep(self, t: torch.Tensor) -> torch.Tensor:
        return (self.noise_level(_precise(t)).log() / 4).float()

    def time(self, timestep: torch.Tensor) -> torch.Tensor:
        return torch.special.ndtr((4 * timestep.double() - self.mean) / self.std).float()


class VarianceExplodingPath(ProbabilityPath):
    """The data stays, the noise grows: alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t.

    NCSN++'s (2011.13456, appendix C) in continuous time, whose models' timestep is sigma itself; NCSN's (1907.05600)
    with `levels`, whose models are told the number of the level, 0 for the noisiest. At t = 0 a noise of sigma_min is
    left, and at t = 1 x_t has a standard deviation of about sigma_max.

    Args:
        prediction_type: "score" for both.
        sigma_min: Above 0.
        sigma_max: Above sigma_min.
        levels: Number of noise levels, at least 2; `None` for all of them.
    """

    def __init__(
        self,
        prediction_type: PredictionType = "score",
        sigma_min: float = 0.01,
        sigma_max: float = 50.0,
        levels: int | None = None,
    ) -> None:
        super().__init__(prediction_type)
        if not 0 < sigma_min < sigma_max < math.inf:
            raise ValueError(
                f"`sigma_min`, `sigma_max`: got {sigma_min} and {sigma_max}, expected 0 < the first < second"
            )
        if levels is not None and levels < 2:
            raise ValueError(f"`levels`: got {levels}, expected at least 2, or None")
        self.sigma_min, self.sigma_max, self.levels = sigma_min, sigma_max, levels
        self._growth = math.log(sigma_max / sigma_min)

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(t)

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        return self.sigma_min * torch.exp(self._growth * t)

    def alpha_derivative(self, t: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(t)

    def sigma_derivative(self, t: torch.Tensor) -> torch.Tensor:
        return self._growth * self.sigma(t)

    def timestep(self, t: torch.Tensor) -> torch.Tensor:
        if self.levels is None:
            return self.sigma(_precise(t)).float()
        return ((1 - _precise(t)) * self.levels).floor().long().clamp(0, self.levels - 1)

    def time(self, timestep: torch.Tensor) -> torch.Tensor:
        if self.levels is None:
            return ((timestep.double() / self.sigma_min).log() / self._growth).float()
        return 1 - timestep.float() / (self.levels - 1)

    def snap(self, t: torch.Tensor) -> torch.Tensor:
        """t itself; or with `levels` the time of the level whose share of [0, 1] t falls into, each as large."""
        return t if self.levels is None else self.time(self.timestep(t)).to(t.dtype)
