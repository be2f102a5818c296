"""What all pipelines around the denoising loop share: the grid, where they start, progress, and how one is stopped.

Shapes: B pictures, (B, ...) latents.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hubgen.acceleration.call import Acceleration
from hubgen.checks import whole
from hubgen.conditioning.guidance import Guidance
from hubgen.conditioning.predict import Predictor
from hubgen.diffusers_contract import reset_step_hooks
from hubgen.hub.native import NativePipeline
from hubgen.pipelines.callbacks import Callback, Fields, StepCallback
from hubgen.pipelines.denoising import AfterStep, Generator, Predict, denoise

LEARNED_VARIANCES = ("learned", "learned_range")


class DenoisingPipeline(NativePipeline):
    """A pipeline from noise to data, with a scheduler as its component `scheduler`."""

    _callback_tensor_inputs: list[str]
    _num_timesteps = 0
    _interrupt = False

    @property
    def num_timesteps(self) -> int:
        """Steps of the last call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the call is to end with what it has; set `_interrupt`, from a callback or another thread."""
        return self._interrupt

    @property
    def scheduler_wants_variance(self) -> bool:
        """Whether the scheduler's step takes a learned variance beside the prediction."""
        return self.scheduler.config.get("variance_type") in LEARNED_VARIANCES

    def begin_call(self, timesteps: torch.Tensor) -> None:
        """Notes that a call of as many steps begins."""
        self._num_timesteps, self._interrupt = len(timesteps), False

    def set_grid(
        self,
        num_inference_steps: int | None,
        timesteps: Sequence[float] | None,
        sigmas: Sequence[float] | None,
        default_steps: int,
        device: torch.device,
        mu: float | None = None,
    ) -> torch.Tensor:
        """Sets the scheduler's grid and returns its timesteps, (n,) on `device`.

        Args:
            num_inference_steps: `None` for `default_steps`, or for as many as `timesteps` or `sigmas` has.
            timesteps: The grid, instead of the scheduler's own; or
            sigmas: the same in terms of noise.
            default_steps: See `num_inference_steps`.
            device: Where the grid goes.
            mu: Shift of the timesteps, for schedulers with dynamic shifting.

        Raises:
            ValueError: Not a whole number of steps above 0, or a grid that the scheduler does not take.
        """
        scheduler, own = self.scheduler, timesteps is None and sigmas is None
        if num_inference_steps is None and own:
            num_inference_steps = default_steps
        if num_inference_steps is not None:
            whole("num_inference_steps", num_inference_steps)
        grid: dict[str, Any] = {"timesteps": timesteps, "sigmas": sigmas}
        grid = {name: value for name, value in grid.items() if value is not None}
        for name, value in grid.items():
            if num_inference_steps is not None and len(value) != num_inference_steps:
                raise ValueError(f"`{name}`: got {len(value)}, expected `num_inference_steps`={num_inference_steps}.")
        if mu is not None:
            grid["mu"] = mu
        known = inspect.signature(scheduler.set_timesteps).parameters
        for name in grid:
            if name not in known:
                raise ValueError(f"`{name}`: {type(scheduler).__name__} takes none, only a number of steps.")
        scheduler.set_timesteps(num_inference_steps if own else None, device=device, **grid)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)  # saves the scheduler a search that waits for the device
        return scheduler.timesteps

    def acts(
        self,
        callback: Callback | None,
        tensor_names: Sequence[str],
        predictor: Predictor,
        fields: Fields,
        needed: Callable[[], Sequence[str]],
        fast: Acceleration,
        tabulate: Callable[[], None] = lambda: None,
    ) -> list[AfterStep]:
        """What a user's callback adds to the end of a step.

        Args:
            callback: `None` adds nothing. This and the next arguments: see `StepCallback`.
            tensor_names: Of the tensors that it asks for.
            predictor: Whose conditions it may change.
            fields: The tensors that there are.
            needed: The branches that steps need now.
            fast: Of the call; the callback may change the models.
            tabulate: Has `fast` compute its tables anew, after a change of models or conditions.
        """
        if callback is None:
            return []
        act = StepCallback(callback, self, tensor_names, predictor, fields, needed)

        def guarded(step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
            conditions = predictor.conditions
            with fast.user_code():
                latents = act(step, timestep, latents)
            if predictor.conditions is not conditions or not fast.tabulated:
                tabulate()
            return latents

        return [guarded]

    def maybe_free_model_hooks(self) -> None:
        """As diffusers', which leaves a registry of hooks on every model, also on one without hooks."""
        for component in self.components.values():
            reset_step_hooks(component)
        if getattr(self, "_all_hooks", None):
            super().maybe_free_model_hooks()

    def denoise(
        self,
        predict: Predict,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        guidance: Guidance,
        generator: Generator = None,
        after_step: Sequence[AfterStep] = (),
        **options: Any,
    ) -> torch.Tensor:
        """The loop of `hubgen.pipelines.denoising` with this scheduler, a progress bar, and a stop by `_interrupt`.

        Arguments are those of `hubgen.pipelines.denoising.denoise`.
        """
        with self.progress_bar(total=len(timesteps)) as progress_bar:

            def advance(step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
                progress_bar.update()
                return latents

            return denoise(
                predict,
                self.scheduler,
                latents,
                timesteps,
                guidance,
                generator,
                after_step=(advance, *after_step),
                interrupted=lambda: self._interrupt,
                **options,
            )
