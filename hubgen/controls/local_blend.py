"""Where an edit may change a picture: only where source or target look at some words (2208.01626, "local editing").

    maps of the words' tokens, summed over layers and steps -> smoothed -> widened by one place -> over a threshold

Outside the latents are the source's after every step in which this is on.

Shapes: P prompts, the source first, n pictures of each, B = P n pictures, L image tokens, S text tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from hubgen.checks import is_number
from hubgen.controls.attention_maps import layer_grid
from hubgen.controls.control import Span

Share = float | Sequence[float]
"""Of the steps: up to where from the first on, or (start, end); see `Span`"""

RADIUS, SIGMA = 3, 1.0
"""Of the Gaussian that joint attention's maps are smoothed by, in tokens, as in 2508.07519's code"""


def span_of(name: str, share: Share) -> Span | None:
    """The steps that a share means; `None` for 0, which is none of them.

    Raises:
        ValueError: It is none from 0 to 1.
    """
    pair = tuple(share) if isinstance(share, list | tuple) else (0.0, share)
    if len(pair) == 2 and all(is_number(one) for one in pair):
        start, end = pair
        if start == end == 0:
            return None
        if 0 <= start < end <= 1:
            return Span(start, end)
    raise ValueError(f"`{name}`: got {share!r}, expected a number from 0 to 1, or (start, end) with start < end.")


def covers(span: Span | None, step: int, steps: int) -> bool:
    """Whether step number `step` of `steps` is among those of a span, which may be none."""
    return span is not None and span.covers(step, steps)


@dataclass(frozen=True)
class LocalBlend:
    """Keeps an edit to the places of some words.

    Args:
        words: Looked up in each prompt; each must be in one of them, and the source or each target must have one.
        threshold: In (0, 1): a place counts whose attention is more than this part of the strongest place's.
        steps: In which it is on; `None` for (0.2, 1), in joint attention (0, 0.5).
        blocks: Numbers of the blocks with joint attention whose maps are looked at; `None` for the five clearest of SD3
            and FLUX (2508.07519), and all of others. U-Nets have their coarsest maps outside the middle looked at, as
            in the paper's code.

    Raises:
        ValueError: A value is out of its range.
    """

    words: str | Sequence[str]
    threshold: float = 0.3
    steps: Share | None = None
    blocks: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if not self.names or not all(isinstance(word, str) and word for word in self.names):
            raise ValueError(f"`blend`: got {self.words!r}, expected a word, or a list of words.")
        if not is_number(self.threshold) or not 0 < self.threshold < 1:
            raise ValueError(f"`threshold`: got {self.threshold!r}, expected a number between 0 and 1.")
        if self.steps is not None:
            span_of("steps", self.steps)

    @property
    def names(self) -> list[str]:
        """The words."""
        return [self.words] if isinstance(self.words, str) else list(self.words)


class Blending:
    """A `LocalBlend` in one call.

    Args:
        columns: (P, S) of truth values: the words' tokens in each prompt.
        per_prompt: n.
        grid: The rows and columns of the pictures' tokens.
        smooth: Whether maps are smoothed.
        threshold: See `LocalBlend`.
        span: Of the steps in which it is on.
    """

    def __init__(
        self,
        columns: torch.Tensor,
        per_prompt: int,
        grid: tuple[int, int],
        smooth: bool,
        threshold: float,
        span: Span | None,
    ):
        self.columns = columns.repeat_interleave(per_prompt, 0)[:, :, None].float()  # (B, S, 1)
        self.per_prompt, self.grid, self.smooth = per_prompt, grid, smooth
        self.threshold, self.span = threshold, span
        self.sums: dict[tuple[int, int], torch.Tensor] = {}
        """By the grid of a layer: (B, L), summed over calls of layers"""

    def watches(self, step: int, steps: int) -> bool:
        """Whether the maps of a step are still of use."""
        return self.span is not None and (step + 1) / steps <= self.span.end

    def add(self, to_text: torch.Tensor) -> None:
        """Adds the maps of one layer, (B, L, S or more), the mean of its heads."""
        tokens = self.columns.shape[1]
        heat = (to_text[..., :tokens].float() @ self.columns)[..., 0]  # (B, L)
        grid = layer_grid(self.grid, heat.shape[1])
        self.sums[grid] = self.sums[grid] + heat if grid in self.sums else heat

    def mask(self, size: tuple[int, int]) -> torch.Tensor:
        """Where a picture may differ from its source, for latents of h x w: (B, 1, h, w) of truth values."""
        grid = min(self.sums)
        heat = self.sums[grid].unflatten(1, grid)[:, None]  # (B, 1, rows, columns)
        if self.smooth:
            heat = smoothed(heat)
        heat = F.interpolate(F.max_pool2d(heat, 3, 1, 1), size)
        hot = heat > self.threshold * heat.amax((2, 3), keepdim=True)
        return hot | of_source(hot, self.per_prompt)

    def blended(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, h, w) that are the source's outside the mask."""
        if not self.sums:
            return latents
        mask = self.mask((latents.shape[2], latents.shape[3]))
        return torch.where(mask, latents, of_source(latents, self.per_prompt))


def of_source(values: torch.Tensor, per_prompt: int) -> torch.Tensor:
    """For each of B pictures the values of its source's, (B, ...) -> (B, ...)."""
    return values[:per_prompt].repeat(len(values) // per_prompt, *[1] * (values.ndim - 1))


def smoothed(heat: torch.Tensor) -> torch.Tensor:
    """By a Gaussian, with zeros around: (B, 1, rows, columns) -> the same."""
    places = torch.arange(-RADIUS, RADIUS + 1, device=heat.device)
    line = torch.exp(-(places**2) / (2 * SIGMA**2))
    kernel = torch.outer(line, line)
    return F.conv2d(heat, (kernel / kernel.sum())[None, None], padding=RADIUS)
