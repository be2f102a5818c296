"""What a user's callback sees after a step, and what it may change.

The contract is that of diffusers' pipelines, so that callbacks written for them work: while a call is guided,
`prompt_embeds` and its like have the rows of the negative branch first, and a callback ends the guidance by handing
back the second half (or, as diffusers' own do, the last row) and setting `pipeline._guidance_scale`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hubgen.conditioning.guidance import ClassifierFreeGuidance
from hubgen.conditioning.predict import Predictor
from hubgen.pipelines.checks import check_tensor_names

Callback = Callable[..., dict[str, Any] | None]
Fields = Mapping[str, tuple[tuple[str, ...], str]]
"""By the name of a tensor, the branches whose rows it has, in their order, and the field of their conditions."""


class StepCallback:
    """diffusers' `callback_on_step_end` as an act after each step of the loop.

    Args:
        callback: `(pipeline, step, timestep, tensors) -> tensors`; those returned replace the old ones.
        pipeline: What it is shown first.
        tensor_names: Of the tensors that it asks for; a callback object of diffusers names them itself.
        predictor: Whose conditions it may change.
        fields: The tensors that there are, beside `latents`.
        needed: The branches that steps need now; of a tensor of several branches, only their rows are shown.
    """

    def __init__(
        self,
        callback: Callback,
        pipeline: Any,
        tensor_names: Sequence[str],
        predictor: Predictor,
        fields: Fields,
        needed: Callable[[], Sequence[str]],
    ):
        self.callback, self.pipeline = callback, pipeline
        self.tensor_names = getattr(callback, "tensor_inputs", tensor_names)
        self.predictor, self.fields, self.needed = predictor, fields, needed

    def __call__(self, step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """The latents, (B, ...), with which the next step begins.

        Raises:
            ValueError: The callback returned a tensor of a name that it may not change, or of another number of rows.
        """
        parts = {name: self._parts(name) for name in self.tensor_names if name != "latents"}
        shown: dict[str, Any] = {name: joined(list(rows.values())) for name, rows in parts.items()}
        if "latents" in self.tensor_names:
            shown["latents"] = latents
        versions = {name: version(value) for name, value in shown.items()}
        changed = dict(self.callback(self.pipeline, step, timestep, dict(shown)) or {})
        check_tensor_names("callback_on_step_end", changed, ("latents", *self.fields))
        latents = changed.pop("latents", latents)
        conditions = dict(self.predictor.conditions)
        for name, value in changed.items():
            before = shown.get(name)
            if value is None or (value is before and version(value) == versions[name]):
                continue
            field = self.fields[name][1]
            changes: dict[str, Any]
            for branch, rows in self._rows(name, value, parts.get(name) or self._parts(name), before).items():
                changes = {field: rows}
                conditions[branch] = dataclasses.replace(conditions[branch], **changes)
                self.predictor.conditions = conditions
        return latents

    def _parts(self, name: str) -> dict[str, torch.Tensor]:
        """By branch, the rows that a name stands for now; none for a name that this call does not have."""
        branches, field = self.fields.get(name, ((), ""))  # callbacks of diffusers may ask for more than there is
        conditions, needed = self.predictor.conditions, self.needed()
        chosen = [branch for branch in branches if branch in conditions and (len(branches) == 1 or branch in needed)]
        parts = {branch: getattr(conditions[branch], field) for branch in chosen}
        return {branch: rows for branch, rows in parts.items() if rows is not None}

    def _rows(
        self, name: str, value: torch.Tensor, parts: Mapping[str, torch.Tensor], shown: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """By branch, what a tensor that came back means: the rows of all branches, or those of the last one."""
        batch = len(next(iter(parts.values()))) if parts else 0
        if shown is not None and len(value) < len(shown) and torch.equal(value, shown[len(shown) - len(value) :]):
            return {}  # the end of what was shown, as `prompt_embeds[-1:]`: the rows that stay are as they were
        if parts and len(value) == batch * len(parts):
            return dict(zip(parts, value.chunk(len(parts)), strict=True))
        if parts and len(value) == batch:
            return {list(parts)[-1]: value}
        raise ValueError(
            f"`callback_on_step_end`: got `{name}` of {len(value)} rows, expected {batch * len(parts)}"
            + (f", or {batch} for the positive branch." if len(parts) > 1 else ".")
        )


def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The rows of all parts; a single part is itself, and not a copy."""
    return None if not parts else parts[0] if len(parts) == 1 else torch.cat(list(parts))


def version(value: Any) -> int:
    """How often a tensor was changed in place, where that is counted."""
    return value._version if torch.is_tensor(value) and not value.is_inference() else 0


@dataclass(frozen=True)
class LiveGuidance:
    """Classifier-free guidance whose strength a callback may change between two steps.

    Args:
        guidance: As the call began.
        scale: What its scale is now.
    """

    guidance: ClassifierFreeGuidance
    scale: Callable[[], float]

    @property
    def now(self) -> ClassifierFreeGuidance:
        """The guidance with the scale of this moment.

        Raises:
            ValueError: The scale is no number from 0, or guides a call that began without guidance.
        """
        scale = self.scale()
        if scale == self.guidance.scale:
            return self.guidance
        now = dataclasses.replace(self.guidance, scale=scale)
        if now.enabled and not self.guidance.enabled:
            raise ValueError(
                f"`_guidance_scale`: got {scale} from a callback, expected at most 1: the call began without guidance, "
                "and so without a negative branch."
            )
        return now

    @property
    def all_branches(self) -> tuple[str, ...]:
        """Those that some step needs from now on."""
        return self.now.all_branches

    def branches(self, t: float) -> tuple[str, ...]:
        """Those that the step at time t needs."""
        return self.now.branches(t)

    def combine(self, predictions: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(B, ...) each -> the guided prediction, (B, ...)."""
        return self.now.combine(predictions)
