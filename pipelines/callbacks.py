"""What a user's callback sees after a step, and what it may change."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from hubgen.conditioning.predict import Predictor
from hubgen.pipelines.checks import check_tensor_names

Callback = Callable[..., dict[str, Any] | None]


class StepCallback:
    """diffusers' `callback_on_step_end` as an act after each step of the loop.

    Args:
        callback: `(pipeline, step, timestep, tensors) -> tensors`; those returned replace the old ones.
        pipeline: What it is shown first.
        tensor_names: Of the tensors that it asks for; a callback object of diffusers names them itself.
        predictor: Whose conditions it may change.
        fields: By name, the branch and the field of its condition that a tensor is; beside these there is `latents`.
    """

    def __init__(
        self,
        callback: Callback,
        pipeline: Any,
        tensor_names: Sequence[str],
        predictor: Predictor,
        fields: Mapping[str, tuple[str, str]],
    ):
        self.callback, self.pipeline = callback, pipeline
        self.tensor_names = getattr(callback, "tensor_inputs", tensor_names)
        self.predictor, self.fields = predictor, fields

    def __call__(self, step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """The latents, (B, ...), with which the next step begins.

        Raises:
            ValueError: The callback returned a tensor of a name that it may not change.
        """
        shown = {name: latents if name == "latents" else self._shown(name) for name in self.tensor_names}
        changed = dict(self.callback(self.pipeline, step, timestep, shown) or {})
        check_tensor_names("callback_on_step_end", changed, ("latents", *self.fields))
        latents = changed.pop("latents", latents)
        conditions = dict(self.predictor.conditions)
        for name, value in changed.items():
            branch, field = self.fields[name]
            if branch in conditions and getattr(conditions[branch], field) is not value:
                conditions[branch] = dataclasses.replace(conditions[branch], **{field: value})
                self.predictor.conditions = conditions
        return latents

    def _shown(self, name: str) -> torch.Tensor | None:
        branch, field = self.fields.get(name, ("", ""))  # callbacks of diffusers may ask for more than there is
        condition = self.predictor.conditions.get(branch)
        return None if condition is None else getattr(condition, field)
