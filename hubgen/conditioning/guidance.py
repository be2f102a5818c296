"""Which predictions a step needs, and how they become one.

Classifier-free guidance (Ho and Salimans, 2207.12598), its rescaling (Lin et al., 2305.08891, section 3.4) and its
interval (Kynkäänniemi et al., 2404.07724).

A guidance names branches: "positive" is the condition that is wanted, "negative" the one to lead away from, and for
models that are shown a picture "picture" is the negative condition beside the picture, where "negative" has none. The
denoising loop has the backbone predict for all branches of a step in one call, whatever their number.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from hubgen.checks import is_number

POSITIVE, NEGATIVE, PICTURE = "positive", "negative", "picture"


class Guidance(Protocol):
    """Turns the predictions of a step's branches into one."""

    @property
    def all_branches(self) -> tuple[str, ...]:
        """Every branch that some step needs, in the order of the rows of a step that needs them all."""

    def branches(self, t: float) -> tuple[str, ...]:
        """The branches that the step at time t in [0, 1] needs, in that order."""

    def combine(self, predictions: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Of the branches of one step, each (B, ...), to what the scheduler is given, (B, ...)."""


@dataclass(frozen=True)
class ClassifierFreeGuidance:
    """Moves the prediction away from the unconditional one: uncond + scale * (cond - uncond).

    Args:
        scale: At least 0; at most 1 means no guidance (the conditional prediction alone), as in diffusers' pipelines.
        rescale: In [0, 1]: how far the guided prediction gets the conditional one's standard deviation back, against
            the over-exposure of large scales.
        interval: (low, high) in [0, 1], from data (0) to noise (1): the times low < t <= high are guided, and
            0, where an inversion begins, with low = 0.

    Raises:
        ValueError: A value is out of its range or not finite.
    """

    scale: float
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not is_number(self.scale) or self.scale < 0:
            raise ValueError(f"`guidance_scale`: got {self.scale!r}, expected a finite number, at least 0.")
        if not is_number(self.rescale) or not (0 <= self.rescale <= 1):
            raise ValueError(f"`guidance_rescale`: got {self.rescale!r}, expected a number in [0, 1].")
        interval = self.interval
        pair = isinstance(interval, tuple | list) and len(interval) == 2 and all(is_number(end) for end in interval)
        if not pair or not (0 <= interval[0] <= interval[1] <= 1):
            raise ValueError(f"`guidance_interval`: got {interval!r}, expected (low, high) with 0 <= low <= high <= 1.")

    @property
    def enabled(self) -> bool:
        """Whether there is a time that is guided, so that there must be something to lead away from."""
        return self.scale > 1 and self.interval[0] < self.interval[1]

    @property
    def all_branches(self) -> tuple[str, ...]:
        """The negative one comes first, as in diffusers' pipelines."""
        return (NEGATIVE, POSITIVE) if self.enabled else (POSITIVE,)

    def branches(self, t: float) -> tuple[str, ...]:
        """Both inside the interval; elsewhere only the positive prediction is needed."""
        low, high = self.interval
        guided = self.enabled and (low < t <= high or low == t == 0)
        return (NEGATIVE, POSITIVE) if guided else (POSITIVE,)

    def combine(self, predictions: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(B, ...) each -> the guided prediction, (B, ...); the positive one where it is alone."""
        cond = predictions[POSITIVE]
        if NEGATIVE not in predictions:
            return cond
        guided = self.guided(predictions)
        if self.rescale == 0:
            return guided
        # 2305.08891, equations 15 and 16: phi = rescale
        dims = tuple(range(1, cond.ndim))
        ratio = cond.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
        return torch.lerp(guided, guided * ratio, self.rescale)

    def guided(self, predictions: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Of all branches, (B, ...) each, to (B, ...), before it is rescaled."""
        return torch.lerp(predictions[NEGATIVE], predictions[POSITIVE], self.scale)


@dataclass(frozen=True)
class PictureGuidance(ClassifierFreeGuidance):
    """Moves the prediction towards a picture that the model is shown, and from there towards the prompt.

    e(0, 0) + image_scale * (e(I, 0) - e(0, 0)) + scale * (e(I, T) - e(I, 0)), with the picture I and the prompt T
    (InstructPix2Pix, 2211.09800, equation 3). It is on where `scale` is above 1 and `image_scale` at least 1; elsewhere
    the conditional prediction e(I, T) is all, as in diffusers' pipelines.

    Args:
        scale: See `ClassifierFreeGuidance`.
        rescale: See `ClassifierFreeGuidance`.
        interval: See `ClassifierFreeGuidance`.
        image_scale: At least 0: how near the result stays to the picture.

    Raises:
        ValueError: A value is out of its range or not finite.
    """

    image_scale: float = 1.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.image_scale) or self.image_scale < 0:
            raise ValueError(f"`image_guidance_scale`: got {self.image_scale!r}, expected a finite number, at least 0.")

    @property
    def enabled(self) -> bool:
        """Whether there is a time that is guided."""
        return super().enabled and self.image_scale >= 1

    @property
    def all_branches(self) -> tuple[str, ...]:
        """Neither picture nor prompt, the picture, both."""
        return (NEGATIVE, PICTURE, POSITIVE) if self.enabled else (POSITIVE,)

    def branches(self, t: float) -> tuple[str, ...]:
        """All inside the interval; elsewhere only the positive prediction is needed."""
        return self.all_branches if NEGATIVE in super().branches(t) else (POSITIVE,)

    def guided(self, predictions: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See `ClassifierFreeGuidance.guided`."""
        neither, picture, both = (predictions[branch] for branch in (NEGATIVE, PICTURE, POSITIVE))
        return neither + self.scale * (both - picture) + self.image_scale * (picture - neither)


@dataclass(frozen=True)
class GuidedNoise:
    """Guides the predicted noise; what follows it, a learned variance, stays the positive branch's.

    As diffusers' pipeline of DiT does it. The code of the paper guides only the first three channels.

    Args:
        guidance: Of the noise.
        channels: Of the noise; the channels after these are the variance.
    """

    guidance: Guidance
    channels: int

    @property
    def all_branches(self) -> tuple[str, ...]:
        """Those of the noise's guidance."""
        return self.guidance.all_branches

    def branches(self, t: float) -> tuple[str, ...]:
        """Those of the noise's guidance."""
        return self.guidance.branches(t)

    def combine(self, predictions: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(B, C', h, w) each -> the same; C' is `channels` or more."""
        noise = {branch: prediction[:, : self.channels] for branch, prediction in predictions.items()}
        return torch.cat([self.guidance.combine(noise), predictions[POSITIVE][:, self.channels :]], dim=1)
