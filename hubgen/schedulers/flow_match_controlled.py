"""Euler steps along a flow that is drawn to where it is to end: RF-inversion (Rout et al., 2410.10792).

The velocity u of the model at x and sigma is mixed with the one that leads straight to an anchor a at the end of the
way, sigma_end:

    u + strength ((a - x) / (sigma_end - sigma) - u)

Upwards the anchor is noise and the strength is the paper's gamma (algorithm 1); downwards the anchor is the picture and
the strength its eta (algorithm 2). At strength 0 it is Euler's method, at 1 a straight line.
"""

from dataclasses import dataclass

import torch

from hubgen.checks import is_number
from hubgen.schedulers.flow_match_euler import FlowMatchEulerDiscreteScheduler


@dataclass(frozen=True, eq=False)
class Controller:
    """What draws a walk to its end.

    Raises:
        ValueError: A number is out of its range.
    """

    anchor: torch.Tensor
    """(b, ...), where the B rows of a walk are drawn to, row by row; b divides B, and the anchors serve in turns"""
    strength: float
    """In [0, 1]"""
    span: tuple[float, float] = (0.0, 1.0)
    """(start, end) with 0 <= start <= end <= 1: step i of n is drawn if start <= i / n and (i + 1) / n <= end"""

    def __post_init__(self) -> None:
        if not is_number(self.strength) or not 0 <= self.strength <= 1:
            raise ValueError(f"`strength`: got {self.strength!r}, expected a number in [0, 1]")
        check_span("span", self.span)

    def covers(self, step: int, steps: int) -> bool:
        """Whether step number `step` of `steps` is drawn."""
        return self.span[0] <= step / steps and (step + 1) / steps <= self.span[1]


def check_span(name: str, span: tuple[float, float]) -> None:
    """Raises ValueError unless it is (start, end), numbers with 0 <= start <= end <= 1."""
    pair = isinstance(span, tuple | list) and len(span) == 2 and all(is_number(end) for end in span)
    if not pair or not 0 <= span[0] <= span[1] <= 1:
        raise ValueError(f"`{name}`: got {span!r}, expected (start, end) with 0 <= start <= end <= 1")


class FlowMatchControlledScheduler(FlowMatchEulerDiscreteScheduler):
    """Euler steps, drawn to an end by `controller`, on the grids and with the arguments of Euler's scheduler."""

    controller: Controller | None = None
    """Set it before a run; it is not saved"""

    def _advance(
        self,
        index: int,
        velocity: torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        controller = self.controller
        if controller is not None and controller.covers(index, len(self.sigmas) - 1):
            copies = len(sample) // len(controller.anchor)
            anchor = controller.anchor.to(sample).repeat(copies, *[1] * (sample.ndim - 1))
            straight = (anchor - sample) / (self.sigmas[-1] - self.sigmas[index])
            velocity = torch.lerp(velocity.to(sample), straight, controller.strength)
        return super()._advance(index, velocity, sample, generator)
