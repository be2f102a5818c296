"""Densities that training draws t from, with their resolution shift (SD3, 2403.03206, section 3.1 and 5.3.2).

Each density is a random variable u on (0, 1) sent through shift(u) = s u / (1 + (s - 1) u), which moves mass towards
noise for s > 1 (eq. 23: s = sqrt(tokens / base tokens); log-SNR falls by 2 log s). The velocity loss needs no further
weight: drawing from the density is the weighting.
"""

import math
from abc import ABC, abstractmethod

import torch


def shift_time(t: torch.Tensor, shift: float) -> torch.Tensor:
    """s t / (1 + (s - 1) t): [0, 1] onto itself, towards 1 for s > 1; the inverse is `shift_time(t, 1 / s)`."""
    return shift * t / (1 + (shift - 1) * t)


class TimestepDensity(ABC):
    """A probability density of t on (0, 1).

    Args:
        shift: the resolution shift s > 0; 1 leaves the density as it is.
    """

    def __init__(self, shift: float = 1.0) -> None:
        if not (math.isfinite(shift) and shift > 0):
            raise ValueError(f"`shift`: got {shift}, expected a finite number above 0")
        self.shift = shift

    @abstractmethod
    def _quantile(self, uniform: torch.Tensor) -> torch.Tensor:
        """t before the shift, from a uniform number in (0, 1)."""

    @abstractmethod
    def _density(self, t: torch.Tensor) -> torch.Tensor:
        """The density before the shift, at t in (0, 1)."""

    @abstractmethod
    def _cdf(self, t: torch.Tensor) -> torch.Tensor:
        """The distribution function before the shift, at t in (0, 1)."""

    def sample(
        self, n: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> torch.Tensor:
        """n draws, (n,) float32 on `device`, made where the generator lives, so that a seed means the same anywhere."""
        source = torch.device(generator.device if generator is not None else device or "cpu")
        dtype = torch.float32 if source.type == "mps" else torch.float64
        uniform = torch.rand(n, generator=generator, device=source, dtype=dtype)
        # rand includes 0, where some quantiles are infinite
        uniform = uniform.clamp(min=torch.finfo(dtype).eps / 2)
        return shift_time(self._quantile(uniform), self.shift).float().to(device)

    def density(self, t: torch.Tensor) -> torch.Tensor:
        """p(t) at t in (0, 1), in t's dtype and shape."""
        u = shift_time(t, 1 / self.shift)
        # du/dt of the inverse shift
        slope = self.shift / (self.shift + (1 - self.shift) * t) ** 2
        return self._density(u) * slope

    def cdf(self, t: torch.Tensor) -> torch.Tensor:
        """P(draw <= t) at t in (0, 1), in t's dtype and shape."""
        return self._cdf(shift_time(t, 1 / self.shift))


class UniformDensity(TimestepDensity):
    """Uniform on (0, 1), then shifted."""

    def _quantile(self, uniform: torch.Tensor) -> torch.Tensor:
        return uniform

    def _density(self, t: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(t)

    def _cdf(self, t: torch.Tensor) -> torch.Tensor:
        return t


class LogitNormalDensity(TimestepDensity):
    """t = sigmoid(mean + std * normal): 2403.03206, eq. 19; then shifted.

    Args:
        mean: location of logit(t); above 0 leans towards noise.
        std: width of logit(t), above 0.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0, shift: float = 1.0) -> None:
        super().__init__(shift)
        if not (math.isfinite(std) and std > 0):
            raise ValueError(f"`std`: got {std}, expected a finite number above 0")
        self.mean, self.std = mean, std

    def _quantile(self, uniform: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(uniform))

    def _density(self, t: torch.Tensor) -> torch.Tensor:
        z = (torch.logit(t) - self.mean) / self.std
        return torch.exp(-0.5 * z**2) / (self.std * math.sqrt(2 * math.pi) * t * (1 - t))

    def _cdf(self, t: torch.Tensor) -> torch.Tensor:
        return torch.special.ndtr((torch.logit(t) - self.mean) / self.std)


class CosMapDensity(TimestepDensity):
    """The density that gives rectified flow the log-SNR of the cosine schedule: 2403.03206, eq. 21; then shifted."""

    def _quantile(self, uniform: torch.Tensor) -> torch.Tensor:
        return 1 - 1 / (torch.tan(math.pi / 2 * uniform) + 1)

    def _density(self, t: torch.Tensor) -> torch.Tensor:
        return 2 / (math.pi - 2 * math.pi * t + 2 * math.pi * t**2)

    def _cdf(self, t: torch.Tensor) -> torch.Tensor:
        return torch.atan2(t, 1 - t) * (2 / math.pi)


class ModeDensity(TimestepDensity):
    """t = 1 - u - s (cos^2(pi u / 2) - 1 + u): 2403.03206, eq. 20; then shifted.

    The map from u to t has no closed inverse: `density` and `cdf` find u by bisection.

    Args:
        scale: s in [-1, 2 / (pi - 2)], about 1.75; above 0 favours the middle, below 0 the ends; 0 is uniform.
    """

    def __init__(self, scale: float = 1.29, shift: float = 1.0) -> None:
        super().__init__(shift)
        limit = 2 / (math.pi - 2)
        if not -1 <= scale <= limit:
            raise ValueError(f"`scale`: got {scale}, expected a number in [-1, {limit:.4f}], where the map is monotone")
        self.scale = scale

    def _quantile(self, uniform: torch.Tensor) -> torch.Tensor:
        return 1 - uniform - self.scale * (torch.cos(math.pi / 2 * uniform) ** 2 - 1 + uniform)

    def _uniform(self, t: torch.Tensor) -> torch.Tensor:
        low, high = torch.zeros_like(t), torch.ones_like(t)
        for _ in range(60):
            middle = (low + high) / 2
            above = self._quantile(middle) > t  # t falls as u grows
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        return (low + high) / 2

    def _density(self, t: torch.Tensor) -> torch.Tensor:
        u = self._uniform(t)
        return 1 / (1 + self.scale - self.scale * (math.pi / 2) * torch.sin(math.pi * u)).abs()

    def _cdf(self, t: torch.Tensor) -> torch.Tensor:
        return 1 - self._uniform(t)
