"""How two predictions become one.

Classifier-free guidance (Ho and Salimans, 2207.12598), its rescaling (Lin et al., 2305.08891, section 3.4) and its
interval (Kynkäänniemi et al., 2404.07724).
"""

import math
import numbers
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ClassifierFreeGuidance:
    """Moves the prediction away from the unconditional one: uncond + scale * (cond - uncond).

    Args:
        scale: At least 0; at most 1 means no guidance (the conditional prediction alone), as in diffusers' pipelines.
        rescale: In [0, 1]: how far the guided prediction gets the conditional one's standard deviation back, against
            the over-exposure of large scales.
        interval: (low, high) in [0, 1], from data (0) to noise (1): the times low < t <= high are guided.

    Raises:
        ValueError: A value is out of its range or not finite.
    """

    scale: float
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        # Written so that NaN, which compares false, fails.
        if not _is_number(self.scale) or not (self.scale >= 0 and math.isfinite(self.scale)):
            raise ValueError(f"`guidance_scale` must be a finite number, at least 0, got {self.scale!r}.")
        if not _is_number(self.rescale) or not (0 <= self.rescale <= 1):
            raise ValueError(f"`guidance_rescale` must be a number in [0, 1], got {self.rescale!r}.")
        interval = self.interval
        pair = isinstance(interval, tuple | list) and len(interval) == 2 and all(_is_number(end) for end in interval)
        if not pair or not (0 <= interval[0] <= interval[1] <= 1):
            raise ValueError(f"`guidance_interval` must be (low, high) with 0 <= low <= high <= 1, got {interval!r}.")

    @property
    def enabled(self) -> bool:
        """Whether there is a time that is guided, so that an unconditional prompt is needed."""
        return self.scale > 1 and self.interval[0] < self.interval[1]

    def active(self, t: float) -> bool:
        """Whether time t in [0, 1] is guided; elsewhere only the conditional prediction is needed."""
        return self.scale > 1 and self.interval[0] < t <= self.interval[1]

    def combine(self, uncond: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        """(B, ...), (B, ...) -> the guided prediction, (B, ...)."""
        guided = torch.lerp(uncond, cond, self.scale)
        if self.rescale == 0:
            return guided
        # 2305.08891, equations 15 and 16: phi = rescale
        dims = tuple(range(1, cond.ndim))
        ratio = cond.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
        return torch.lerp(guided, guided * ratio, self.rescale)


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
