"""The denoising loop, the only one of the project: from noise, step by step, to latents.

Shapes: B pictures, x_t and predictions (B, ...).
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from hubgen.conditioning.guidance import Guidance
from hubgen.schedulers.times import times

Generator = torch.Generator | list[torch.Generator] | None
Predict = Callable[[torch.Tensor, torch.Tensor, tuple[str, ...], int], torch.Tensor]
AfterStep = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
Correct = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def denoise(
    predict: Predict,
    scheduler: Any,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    guidance: Guidance,
    generator: Generator = None,
    after_step: Sequence[AfterStep] = (),
    interrupted: Callable[[], bool] = lambda: False,
    step_options: Mapping[str, Any] | None = None,
    correct: Correct | None = None,
) -> torch.Tensor:
    """Goes from x_t at `timesteps[0]` to the data, without a wait for the device in between.

    Args:
        predict: `(x_t, timesteps, branches, step) -> prediction`, for b branches at once: x_t and prediction are
            (b * B, ...), the rows of the first branch first, and `timesteps` (b * B,).
        scheduler: One of ours or of diffusers', its timesteps set.
        latents: (B, ...), where the scheduler starts. They keep their dtype: in float32, steps add up in float32
            whatever the network computes in.
        timesteps: (n,), the part of the scheduler's grid to do, from its first step on.
        guidance: Which branches a step needs, and how their predictions become one.
        generator: For schedulers that add noise; a list has one for each of the B.
        after_step: Each `(step, timestep, latents) -> latents`, in this order after each step.
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
        branches = guidance.branches(t)
        x = torch.cat([latents] * len(branches))  # (b * B, ...)
        if hasattr(scheduler, "scale_model_input"):
            x = scheduler.scale_model_input(x, timestep)
        rows = predict(x, timestep.expand(len(x)), branches, step).to(dtype).chunk(len(branches))
        prediction = guidance.combine(dict(zip(branches, rows, strict=True)))  # (B, ...)
        latents = scheduler.step(prediction, timestep, latents, **options, return_dict=False)[0].to(dtype)
        for act in after_step:
            latents = act(step, timestep, latents)
    return latents


def supported(function: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """Those of `options` that `function` takes: schedulers differ in what they ask for."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in known}
