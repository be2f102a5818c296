"""The one call of a backbone: sampling, training and measuring ask it alike.

    prediction = predict(backbone, x_t, timestep, condition)

Shapes: B pictures, x_t and predictions (B, C, h, w), timesteps (B,) as schedulers and paths have them.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from hubgen.conditioning.condition import Condition
from hubgen.conditioning.families import SHUT, BackboneFamily, Doors, family_of, plain_backbone
from hubgen.diffusers_contract import has_step_hooks


class Tables(Protocol):
    """Where answers of a backbone to a known grid of times are kept."""

    def tabulate(
        self,
        backbone: Any,
        timesteps: torch.Tensor,
        keywords: Mapping[str, Any],
        rows: int,
        branches: Sequence[str],
    ) -> None:
        """For timesteps (n,) as the backbone takes them, and keywords of one call of it, of so many rows."""


@dataclass(frozen=True, eq=False)
class BackboneCall:
    """One call of a backbone in the denoising loop, of the rows of b branches, as controls see it."""

    x_t: torch.Tensor
    """(b * B, C, h, w), the rows of the first branch first; without what controls join to it"""
    timestep: torch.Tensor
    """(b * B,), as the scheduler has it"""
    branches: tuple[str, ...]
    """Their names"""
    condition: Condition
    """Of all rows; the same tensors at every step that has these branches"""
    step: int = 0
    """Number of the step in the call's grid"""

    def rows(self, branch: str) -> slice:
        """Where the rows of a branch lie."""
        size, first = len(self.x_t) // len(self.branches), self.branches.index(branch)
        return slice(first * size, (first + 1) * size)


OpenDoors = Callable[[BackboneCall], Doors]


def predict(
    backbone: nn.Module,
    x_t: torch.Tensor,
    timestep: torch.Tensor,
    condition: Condition,
    doors: Doors = SHUT,
    family: BackboneFamily | None = None,
) -> torch.Tensor:
    """What a backbone predicts of x_t.

    Args:
        backbone: Of any family, of hubgen or of diffusers; a trainer may have wrapped it.
        x_t: (B, C, h, w), of any floating-point type.
        timestep: (B,), 0 ... 1000 as the path or the scheduler has it.
        condition: Of the same B.
        doors: What controls add.
        family: The backbone's, where it is at hand.

    Returns:
        (B, C', h, w): noise, velocity or whatever the backbone predicts; C' is larger than C with a learned variance.

    Raises:
        ValueError: The backbone is of no known family, or the condition lacks something that it takes.
    """
    family = family_of(backbone) if family is None else family
    return call(backbone, family, x_t, timestep, family.keywords(condition), doors)


def call(
    backbone: nn.Module,
    family: BackboneFamily,
    x_t: torch.Tensor,
    timestep: torch.Tensor,
    keywords: Mapping[str, Any],
    doors: Doors = SHUT,
) -> torch.Tensor:
    """`predict` with the family's keywords of a condition."""
    x, more = family.enter(x_t.to(plain_backbone(backbone).dtype), doors)
    out = backbone(x, timestep=family.timestep(timestep), **keywords, **more, return_dict=False)[0]
    return family.leave(out, x_t)


class Predictor:
    """A backbone with the conditions of a call, as the denoising loop asks it.

    Args:
        backbone: See `predict`.
        conditions: By branch, each of B pictures.
        family: The backbone's.
        doors: What controls add to a call; `None`: nothing.
    """

    def __init__(
        self,
        backbone: nn.Module,
        conditions: Mapping[str, Condition],
        family: BackboneFamily | None = None,
        doors: OpenDoors | None = None,
    ):
        self.backbone = backbone
        self.family = family_of(backbone) if family is None else family
        self.doors = doors
        self.conditions = conditions
        # Step caches are hooks of diffusers. They tell apart, by the branches' names, what they keep of other batches.
        self._cached = hasattr(backbone, "cache_context") and has_step_hooks(backbone)

    @property
    def conditions(self) -> Mapping[str, Condition]:
        """By branch. They may be replaced between two steps."""
        return self._conditions

    @conditions.setter
    def conditions(self, conditions: Mapping[str, Condition]) -> None:
        self._conditions = dict(conditions)
        # Made once, so that tensors are known again.
        self._joined: dict[tuple[str, ...], Condition] = {}
        self._keywords: dict[tuple[str, ...], dict[str, Any]] = {}
        self._changed: dict[tuple[str, ...], tuple[Condition, dict[str, Any]]] = {}

    def keywords(self, branches: Sequence[str]) -> dict[str, Any]:
        """Keywords of the backbone's forward for the rows of all branches, the first branch's first."""
        key = tuple(branches)
        if key not in self._keywords:
            self._keywords[key] = self.family.keywords(self.condition(key))
        return self._keywords[key]

    def changed_keywords(self, branches: Sequence[str], condition: Condition) -> dict[str, Any]:
        """The same of a condition that a control has put in the place of the call's; made anew when it changes."""
        key = tuple(branches)
        if key not in self._changed or self._changed[key][0] is not condition:
            self._changed[key] = condition, self.family.keywords(condition)
        return self._changed[key][1]

    def condition(self, branches: Sequence[str]) -> Condition:
        """The conditions of several branches in one batch."""
        key = tuple(branches)
        if key not in self._joined:
            self._joined[key] = Condition.cat([self._conditions[branch] for branch in key])
        return self._joined[key]

    def tabulate(self, tables: Tables, timesteps: torch.Tensor, branches: Sequence[str]) -> None:
        """Has `tables` compute what the backbone answers to the times of a grid, (n,), in all of these branches."""
        rows = len(self._conditions[branches[0]]) * len(branches)
        tables.tabulate(self.backbone, self.family.timestep(timesteps), self.keywords(branches), rows, branches)

    def __call__(self, x_t: torch.Tensor, timestep: torch.Tensor, branches: Sequence[str], step: int) -> torch.Tensor:
        """The predictions of all branches in one call.

        Args:
            x_t: (b * B, C, h, w), for each of b branches the rows of all pictures.
            timestep: (b * B,), as the scheduler has it.
            branches: Names, in the order of the rows.
            step: Number of the step, for controls that end or begin in the middle.
        """
        backbone: Any = self.backbone
        doors = SHUT
        if self.doors is not None:
            doors = self.doors(BackboneCall(x_t, timestep, tuple(branches), self.condition(branches), step))
        changed = doors.condition
        keywords = self.keywords(branches) if changed is None else self.changed_keywords(branches, changed)
        with backbone.cache_context("+".join(branches)) if self._cached else nullcontext():
            return call(backbone, self.family, x_t, timestep, keywords, doors)
