"""What all pipelines around the denoising loop share: where they start, callbacks and progress, and how one is stopped.

Shapes: B pictures, (B, ...) latents.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from hubgen.conditioning.guidance import ClassifierFreeGuidance
from hubgen.hub.native import NativePipeline
from hubgen.pipelines.calls import check_tensor_names
from hubgen.pipelines.denoising import Generator, Predict, denoise

Callback = Callable[..., dict[str, Any] | None]
LEARNED_VARIANCES = ("learned", "learned_range")


class DenoisingPipeline(NativePipeline):
    """A pipeline that walks from noise to data, with a scheduler as its component `scheduler`."""

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

    def starting_noise(
        self, shape: Sequence[int], generator: Generator, latents: torch.Tensor | None, device: torch.device
    ) -> torch.Tensor:
        """Noise of the scheduler's scale, in float32: the same in whatever precision the networks compute.

        Args:
            shape: (B, ...).
            generator: Its source.
            latents: Standard normal, instead of drawing it.
            device: Where it goes.
        """
        if latents is None:
            latents = randn_tensor(shape, generator, device, torch.float32)
        return latents.to(device, torch.float32) * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def walk(
        self,
        predict: Predict,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        guidance: ClassifierFreeGuidance,
        generator: Generator = None,
        callback: Callback | None = None,
        callback_tensors: Sequence[str] = ("latents",),
        conditions: dict[str, Any] | None = None,
        renew: Callable[[], None] = lambda: None,
        blend: Callable[[int, torch.Tensor], torch.Tensor] | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """The loop of `hubgen.pipelines.denoising` with this scheduler, a progress bar, and a callback after each step.

        Args:
            predict: See `denoise`.
            latents: Likewise, (B, ...).
            timesteps: Likewise, (n,).
            guidance: Likewise.
            generator: Likewise.
            callback: `(pipeline, step, timestep, tensors) -> tensors`; those returned replace the old ones.
            callback_tensors: Names of the tensors that it is shown.
            conditions: What it may see and change beside the latents, by name; changes are written there.
            renew: Called after it has changed conditions.
            blend: `(step, latents) -> latents`, before the callback.
            options: Further ones of `denoise`.
        """
        conditions = {} if conditions is None else conditions
        callback_tensors = getattr(callback, "tensor_inputs", callback_tensors)  # diffusers' callback objects

        def on_step(step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
            progress_bar.update()
            if blend is not None:
                latents = blend(step, latents)
            if callback is None:
                return latents
            shown = {"latents": latents, **conditions}
            changed = dict(callback(self, step, timestep, {name: shown.get(name) for name in callback_tensors}) or {})
            check_tensor_names("callback_on_step_end", changed, self._callback_tensor_inputs)
            latents = changed.pop("latents", latents)
            if changed:
                conditions.update(changed)
                renew()
            return latents

        with self.progress_bar(total=len(timesteps)) as progress_bar:
            return denoise(
                predict,
                self.scheduler,
                latents,
                timesteps,
                guidance,
                generator,
                on_step=on_step,
                interrupted=lambda: self._interrupt,
                **options,
            )
