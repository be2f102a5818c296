"""What every family of backbones answers: how it is called, and how it is sampled.

Everywhere else latents are (B, C, h, w), timesteps 0 ... 1000 as schedulers have them, and a condition is a
`Condition`. A family translates these at the door of its backbones.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from hubgen.conditioning.condition import Condition
from hubgen.conditioning.prompts import OneEncoder, PromptCondition


@dataclass(frozen=True, eq=False)
class FurtherTokens:
    """Latents whose tokens come after those of x_t, as those of a second picture beside it."""

    latents: torch.Tensor
    """(B, C, h', w'), of any size that makes up tokens, in the channels that the backbone takes"""
    index: int = 1
    """Place on the first axis of the positions, on which x_t is 0"""


@dataclass(frozen=True)
class Doors:
    """What controls put into one call of a backbone, for the same rows as x_t."""

    channels: Sequence[torch.Tensor] = ()
    """Each (B, C', h, w): joined to x_t before the backbone"""
    tokens: Sequence[FurtherTokens] = ()
    """After the tokens of x_t, for backbones that take them (`takes_tokens`)"""
    residuals: Mapping[str, Any] = field(default_factory=dict)
    """Features that are added inside the backbone, by the keywords under which its forward takes them"""
    attention: Mapping[str, Any] = field(default_factory=dict)
    """Keywords for the backbone's attention processors"""
    condition: Condition | None = None
    """Of all rows, in the place of the call's own, with what comes after the text; `None`: the call's own"""


SHUT = Doors()


@dataclass(frozen=True)
class StartRules:
    """How diffusers' pipelines of a family begin from an image: where they round, what they draw, which size they take.

    These are rules of reproduction: with them a seed gives the same picture in both libraries.
    """

    keeps_image_size: bool = False
    """Whether the result has the image's own size, cut to what the model can make"""
    rounds_steps_down: bool = False
    """Whether `strength` rounds the number of steps down; otherwise it rounds down the number of steps left out"""
    draws_per_image: bool = False
    """Whether an image that serves several pictures is encoded once, in place of a draw from its posterior for each"""


@dataclass(frozen=True)
class ShownRules:
    """What the further input channels of a family's published backbones hold, where they are those of a picture.

    These are rules of reproduction. The picture is the one that is edited, unless it is a control.
    """

    control: bool = False
    """Whether the picture is a control as the pictures of a ControlNet are: an argument of its own, drawn from the
    autoencoder's posterior; `image` then still is where to begin"""
    whole_mask: bool = False
    """Whether a mask comes in whole, each of its pixels in a channel, and after the masked picture"""


class BackboneFamily(ABC):
    """Base of the families; one object a backbone, made by `family_of`.

    Args:
        config: The backbone's.
    """

    takes: frozenset[str]
    """Fields of `Condition` that the backbone reads"""
    attention_argument: ClassVar[str]
    """The keyword by which its forward takes options for the attention processors"""
    starts: ClassVar[StartRules] = StartRules()
    shown: ClassVar[ShownRules] = ShownRules()
    takes_tokens: ClassVar[bool] = False
    """Whether tokens may come after those of x_t: x_t enters as a sequence of tokens with positions"""
    max_shift: ClassVar[float] = 1.15
    """Largest shift of the timesteps, for dynamic shifting where the scheduler's config has none"""

    def __init__(self, config: Any):
        self.config = config
        self.takes = self.fields()

    @abstractmethod
    def fields(self) -> frozenset[str]:
        """What `takes` holds."""

    @property
    def patch(self) -> int:
        """Latents of a token's side: height and width in latents are multiples of it."""
        return self.config.get("patch_size") or 1

    @property
    def channels(self) -> int:
        """Channels of the latents that enter, those of `Doors.channels` included."""
        return self.config.in_channels

    @property
    def distilled(self) -> bool:
        """Whether `guidance_scale` is an input of the weights, and classifier-free guidance has another name."""
        return False

    def prompt_condition(
        self, encoders: Sequence[nn.Module | None], tokenizers: Sequence[Any], zero_without_prompt: bool = True
    ) -> PromptCondition:
        """The way in which the backbone and up to three text encoders belong together.

        Args:
            encoders: `text_encoder`, `text_encoder_2`, `text_encoder_3`; `None` for one that is missing.
            tokenizers: Theirs.
            zero_without_prompt: See `PromptCondition`; of SDXL alone.
        """
        parts = (tuple(encoders), tuple(tokenizers))
        alone = encoders[0] is not None and all(encoder is None for encoder in encoders[1:])
        return OneEncoder(*parts) if alone else self.joined_encoders(*parts, zero_without_prompt)

    def joined_encoders(
        self, encoders: tuple[nn.Module | None, ...], tokenizers: tuple[Any, ...], zero_without_prompt: bool
    ) -> PromptCondition:
        """The same where there are several encoders, or none because embeddings will be given."""
        return OneEncoder(encoders, tokenizers)

    def sigmas(self, steps: int, scheduler: Any) -> list[float] | None:
        """The grid of this many steps, before its shift; `None` for the scheduler's own."""
        return None

    # ---- one call ----

    @abstractmethod
    def keywords(self, condition: Condition) -> dict[str, Any]:
        """The keywords of the backbone's forward for everything but x_t and the timestep.

        Raises:
            ValueError: The condition lacks something that the backbone takes, or has it in another size.
        """

    def timestep(self, timestep: torch.Tensor) -> torch.Tensor:
        """A scheduler's timesteps, (B,), as the backbone takes them."""
        return timestep

    def enter(self, x_t: torch.Tensor, doors: Doors) -> tuple[torch.Tensor, dict[str, Any]]:
        """x_t (B, C, h, w) with what comes in beside it, as the backbone takes it, and further keywords.

        Raises:
            ValueError: There are further tokens, and the backbone takes none.
        """
        if doors.tokens and not self.takes_tokens:
            raise ValueError("`doors.tokens`: got some, expected none: this backbone takes no tokens beside x_t's.")
        x = torch.cat([x_t, *(channels.to(x_t.dtype) for channels in doors.channels)], dim=1) if doors.channels else x_t
        attention = {self.attention_argument: dict(doors.attention)} if doors.attention else {}
        return x, {**attention, **doors.residuals}

    def leave(self, prediction: torch.Tensor, x_t: torch.Tensor) -> torch.Tensor:
        """The backbone's prediction in the shape of x_t, but for its channels."""
        return prediction

    @property
    def text_features(self) -> int | None:
        """D of the text's tokens; `None` where the backbone reads none."""
        return None

    def require(self, condition: Condition, name: str) -> Any:
        """A field of a condition; raises ValueError where it is missing."""
        value = getattr(condition, name)
        if value is None:
            argument = "guidance_scale" if name == "guidance_scale" else f"condition.{name}"
            raise ValueError(f"`{argument}`: got None, expected it: it is an input of this backbone.")
        return value


def even_sigmas(steps: int, scheduler: Any) -> list[float] | None:
    """1, 1 - 1/n, ... 1/n, whatever the scheduler's own grid is; `None` where the scheduler makes sigmas of its own."""
    if scheduler.config.get("use_flow_sigmas", False):
        return None
    return np.linspace(1.0, 1 / steps, steps).tolist()
