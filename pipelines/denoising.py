"""The denoising loop, the only one of the project: from noise, step by step, to latents.

Shapes: B pictures, x_t and predictions (B, ...).
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from hubgen.conditioning.guidance import ClassifierFreeGuidance

Generator = torch.Generator | list[torch.Generator] | None
Predict = Callable[[torch.Tensor, torch.Tensor, bool], torch.Tensor]
OnStep = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
Correct = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def denoise(
    predict: Predict,
    scheduler: Any,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    guidance: ClassifierFreeGuidance,
    generator: Generator = None,
    on_step: OnStep | None = None,
    interrupted: Callable[[], bool] = lambda: False,
    step_options: Mapping[str, Any] | None = None,
    correct: Correct | None = None,
) -> torch.Tensor:
    """Walks from x_t at `timesteps[0]` to the data, without a wait for the device in between.

    A guided step is one call of the network on both halves; where guidance is off or outside its interval, the
    unconditional half is not computed.

    Args:
        predict: `(x_t, timesteps, guided) -> prediction`. Guided: on (2 B, ...), unconditional half first; else on
            (B, ...), conditional. `timesteps` is (B,) or (2 B,).
        scheduler: One of ours or of diffusers', its timesteps set.
        latents: (B, ...), where the scheduler starts. They keep their dtype: in float32, steps add up in float32
            whatever the network computes in.
        timesteps: (n,), the part of the scheduler's grid to walk, from its first step on.
        guidance: How two predictions become one.
        generator: For schedulers that add noise; a list has one for each of the B.
        on_step: `(step, timestep, latents) -> latents`, after each step.
        interrupted: Asked before each step whether to stop there.
        step_options: Further keywords of the scheduler's `step`.
        correct: `(latents, timestep) -> latents`, before each step: the corrector of predictor-corrector samplers.
    """
    options = {**supported(scheduler.step, generator=generator), **(step_options or {})}
    dtype = latents.dtype
    for step, (timestep, t) in enumerate(zip(timesteps, times(scheduler, timesteps), strict=True)):
        if interrupted():
            break
        if correct is not None:
            latents = correct(latents, timestep).to(dtype)
        guided = guidance.active(t)
        x = torch.cat([latents, latents]) if guided else latents
        if hasattr(scheduler, "scale_model_input"):
            x = scheduler.scale_model_input(x, timestep)
        prediction = predict(x, timestep.expand(len(x)), guided).to(dtype)
        if guided:
            prediction = guidance.combine(*prediction.chunk(2))
        latents = scheduler.step(prediction, timestep, latents, **options, return_dict=False)[0].to(dtype)
        if on_step is not None:
            latents = on_step(step, timestep, latents)
    return latents


def times(scheduler: Any, timesteps: torch.Tensor) -> list[float]:
    """The t in (0, 1] of each of a scheduler's timesteps: the one place where sampling leaves the discrete world.

    Flow matching: timestep = 1000 t, counted down from 1000 where the model's time is reversed. Schedules of betas: the
    timesteps 0 ... 999 are the times 1/1000 ... 1. The SDEs of scores: the timesteps are times. Schedulers whose models
    are told the logarithm of sigma instead (EDM's): the part of the grid that is still to walk, for want of a time.
    """
    config, values = scheduler.config, timesteps.tolist()
    if "sampling_eps" in config:
        return values
    continuous = config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction"
    if continuous or "sigma_data" in config:
        return [(len(values) - step) / len(scheduler.timesteps) for step in range(len(values))]
    total = config.num_train_timesteps
    if hasattr(scheduler, "alphas_cumprod") and not config.get("use_flow_sigmas", False):
        return [min((timestep + 1) / total, 1.0) for timestep in values]
    if config.get("invert_sigmas", False):
        return [1.0 - timestep / total for timestep in values]
    return [min(timestep / total, 1.0) for timestep in values]


def supported(function: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """Those of `options` that `function` takes: schedulers differ in what they need to be told."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in known}
