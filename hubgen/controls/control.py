"""Controls: what steers a call of a pipeline from outside, whatever the backbone.

    control.check(target)                                 before any network runs
    start = control.begin(target, start)                  once a call: where it begins
    prepared = control.prepare(target, start)             once a call: encodes, draws, computes what stays the same
    before_call, condition, text_tokens,                  what it then does to every call of the backbone ...
    channels, tokens, residuals, parts
    after_step                                            ... and to the latents after it

A control sees a `Target`, never the pipeline, and asks nothing of a backbone but through its family. A new control is a
file beside this one; the loop and the pipelines stay as they are.

Shapes: B pictures of H x W pixels, latents (B, C, h, w) as the backbone has them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn

from hubgen.autoencoders.latents import LatentSpace
from hubgen.checks import is_number
from hubgen.conditioning.condition import Condition
from hubgen.conditioning.families import BackboneFamily, Doors, FurtherTokens
from hubgen.conditioning.predict import BackboneCall, OpenDoors
from hubgen.conditioning.prompts import PromptCondition

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
    branches: tuple[str, ...]
    """all that some step has (`Guidance.all_branches`)"""
    timesteps: torch.Tensor
    """(n,), those of the scheduler that are left to do; its device is where everything goes"""
    generator: Generator = None
    """one, or one for each of the B pictures"""
    image_encoder: Any = None
    """the pipeline's, which sees pictures for controls"""
    feature_extractor: Any = None
    """what it sees them through"""
    prompts: Sequence[str] = ()
    """one for each `per_prompt` pictures, if all text encoders read the same; none of embeddings and of classes"""
    condition: PromptCondition | None = None
    """the text encoders that read them"""
    max_sequence_length: int | None = None
    """tokens of T5; `None` for what is usual"""

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

    def before_call(self, call: BackboneCall) -> None:
        """Told before each call of the backbone."""

    def condition(self, call: BackboneCall) -> Condition | None:
        """What the backbone is given in this call instead of `call.condition`; `None`: no change."""
        return None

    def channels(self, branch: str) -> torch.Tensor | None:
        """(B, C', h, w), joined to x_t in this branch before the backbone."""
        return None

    def tokens(self, branch: str) -> FurtherTokens | None:
        """Latents of B pictures whose tokens come after those of x_t, in all branches or in none.

        For families that `takes_tokens`; a control asks them in `check`.
        """
        return None

    def text_tokens(self, branch: str) -> torch.Tensor | None:
        """(B, L', D), after the text's tokens, in all branches or in none; the same tensor while it stays the same.

        For families whose text has tokens of D features (`text_features`); a control asks them in `check`.
        """
        return None

    def residuals(self, call: BackboneCall) -> Mapping[str, Any]:
        """Features for the inside of the backbone, by the keywords of its forward: tensors, or lists of them.

        Lists have an entry for each place, `None` where nothing is added, so that those of several controls add up.
        """
        return {}

    def after_step(self, step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """The latents, (B, C, h, w), with which the next step begins."""
        return latents

    def parts(self) -> Mapping[str, Any]:
        """Parts of attention (`hubgen.layers.attention.Part`), by the names of the backbone's processors."""
        return {}


class Control(ABC):
    """What a user hands to a call. It holds settings and inputs and no state of a call."""

    networks: Sequence[nn.Module] = ()
    """Its own, that run at every step; they are accelerated as the backbone is"""
    alone: ClassVar[bool] = False
    """Whether a call takes only one of its class"""

    def check(self, target: Target) -> None:  # noqa: B027
        """Raises ValueError where the control and the call do not fit each other; before any network runs."""

    def prepare_first(self, target: Target) -> Prepared | None:
        """As `prepare`, for controls that draw their random numbers before those of the start; `None`: they do not."""
        return None

    def begin(self, target: Target, start: Start) -> Start:
        """Where the call begins, given where it would begin without this control."""
        return start

    @abstractmethod
    def prepare(self, target: Target, start: Start) -> Prepared:
        """What it adds to this call. Random numbers are drawn here, after those of the start."""


def check_controls(controls: Any) -> Sequence[Control]:
    """The controls of a call; ValueError for anything else."""
    if not isinstance(controls, list | tuple) or not all(isinstance(control, Control) for control in controls):
        raise ValueError(f"`controls`: got {controls!r:.100}, expected a list of controls (hubgen.controls).")
    for kind in {type(control) for control in controls if control.alone}:
        count = sum(isinstance(control, kind) for control in controls)
        if count > 1:
            raise ValueError(f"`controls`: got {count} {kind.__name__}, expected at most one of them in a call.")
    return controls


def prepare_all(
    controls: Sequence[Control], target: Target, begin: Callable[[], Start]
) -> tuple[Start, list[Prepared]]:
    """The start of a call and its controls, all prepared in the order in which they draw random numbers.

    Args:
        controls: Checked.
        target: Of the call.
        begin: Makes the start.
    """
    first = [control.prepare_first(target) for control in controls]
    start = begin()
    for control in controls:
        start = control.begin(target, start)
    later = (
        control.prepare(target, start) if early is None else early
        for control, early in zip(controls, first, strict=True)
    )
    return start, list(later)


def open_doors(prepared: Sequence[Prepared], attention: Mapping[str, Any] | None = None) -> OpenDoors:
    """What all controls of a call put into one call of the backbone, in their order.

    Args:
        prepared: The controls.
        attention: Keywords for the backbone's attention processors.
    """
    joined = Joined()

    def doors(call: BackboneCall) -> Doors:
        own = call.condition
        for control in prepared:
            control.before_call(call)
            if (changed := control.condition(call)) is not None:
                call = replace(call, condition=changed)
        text = [joined(control.text_tokens, call.branches) for control in prepared]
        call = replace(call, condition=joined.after_text(call, [one for one in text if one is not None]))
        channels, tokens, residuals = [], [], dict[str, Any]()
        for control in prepared:
            if (beside := joined(control.channels, call.branches)) is not None:
                channels.append(beside)
            if (further := further_tokens(control, call.branches)) is not None:
                tokens.append(further)
            for name, features in control.residuals(call).items():
                residuals[name] = added_up(residuals[name], features) if name in residuals else features
        return Doors(channels, tokens, residuals, attention or {}, None if call.condition is own else call.condition)

    return doors


class Joined:
    """Rows of several branches in one tensor, the same one as long as the parts are the same: it is known again."""

    def __init__(self) -> None:
        self._kept: dict[Any, tuple[list[Any], Any]] = {}

    def __call__(
        self, of_branch: Callable[[str], torch.Tensor | None], branches: tuple[str, ...]
    ) -> torch.Tensor | None:
        """What a control gives of each branch, in one tensor; `None` where it gives none.

        Args:
            of_branch: A method of the control.
            branches: In the order of the rows.
        """
        rows = [row for row in map(of_branch, branches) if row is not None]
        if not rows:
            return None
        kept: torch.Tensor = self._same((of_branch, branches), rows, lambda: torch.cat(rows))
        return kept

    def after_text(self, call: BackboneCall, more: Sequence[torch.Tensor]) -> Condition:
        """The condition of a call with further tokens, each (rows, L', D), after those of the text."""
        condition, tokens = call.condition, call.condition.tokens
        if not more or tokens is None:
            return condition

        def lengthened() -> Condition:
            return replace(condition, tokens=torch.cat([tokens, *(one.to(tokens) for one in more)], dim=1))

        kept: Condition = self._same(("text", call.branches), [condition, *more], lengthened)
        return kept

    def _same(self, key: Any, parts: list[Any], make: Callable[[], Any]) -> Any:
        known = self._kept[key][0] if key in self._kept else []
        if len(known) != len(parts) or any(one is not other for one, other in zip(known, parts, strict=True)):
            self._kept[key] = parts, make()
        return self._kept[key][1]


def further_tokens(control: Prepared, branches: Sequence[str]) -> FurtherTokens | None:
    """What a control puts after the tokens of x_t, for the rows of all branches."""
    found = [one for one in map(control.tokens, branches) if one is not None]
    return replace(found[0], latents=torch.cat([one.latents for one in found])) if found else None


def added_up(first: Any, second: Any) -> Any:
    """The sum of two residuals; of lists, each entry's, where `None` adds nothing."""
    if first is None or second is None:
        return second if first is None else first
    if torch.is_tensor(first):
        return first + second
    return [added_up(one, other) for one, other in zip(first, second, strict=True)]


@dataclass(frozen=True)
class Span:
    """Which steps of a call a control takes part in, counted as diffusers counts them.

    Of n steps the one of number i, from 0 on, is in it unless i / n < `start` or (i + 1) / n > `end`. The steps that
    `strength` leaves out do not count.

    Args:
        start: In [0, 1).
        end: In (0, 1], more than `start`.

    Raises:
        ValueError: They are not.
    """

    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not (is_number(self.start) and is_number(self.end) and 0 <= self.start < self.end <= 1):
            raise ValueError(
                f"`start`, `end`: got {self.start!r} and {self.end!r}, expected numbers with 0 <= start < end <= 1."
            )

    def covers(self, step: int, steps: int) -> bool:
        """Whether step number `step` of `steps` is in it."""
        return not (step / steps < self.start or (step + 1) / steps > self.end)


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
