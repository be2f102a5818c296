"""What the timesteps of any scheduler mean, ours or diffusers': the time t of each, and x_t there.

Timesteps are what schedulers and models count in, 1000 t or indices of a schedule of betas; t is from 0 (data) to 1
(noise), as paths have it. Sampling crosses from one to the other here alone; training by `ProbabilityPath.timestep`.
"""

import math
from typing import Any

import torch


def times(scheduler: Any, timesteps: torch.Tensor) -> list[float]:
    """The t in (0, 1] of each of a scheduler's timesteps, (n,).

    Flow matching: timestep = 1000 t, counted down from 1000 where the model's time is reversed. Schedules of betas: the
    timesteps 0 ... 999 are the times 1/1000 ... 1. The SDEs of scores: the timesteps are times. Schedulers whose models
    are given the logarithm of sigma instead (EDM's) have no such time: there it is the share of the grid that is left.
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


def dynamic_shift(config: Any, tokens: int, max_shift: float = 1.15) -> float:
    """mu, the shift of a flow's timesteps, on a line by the number of image tokens (SD3, 2403.03206, section 5.3.2).

    Args:
        config: Of the scheduler.
        tokens: Of a picture.
        max_shift: Where the config names none.
    """
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, top = config.get("base_shift", 0.5), config.get("max_shift", max_shift)
    return base + (top - base) / (high - low) * (tokens - low)


def shift_by_tokens(tokens: int) -> float:
    """The factor by which FLUX shifts the times of pictures of so many tokens."""
    return math.exp(dynamic_shift({}, tokens))


def timestep_after(scheduler: Any, share: float) -> int:
    """The timestep at which a share of the time from noise to data is over: steps from it on are of the first part."""
    total = scheduler.config.num_train_timesteps
    return round(total - share * total)


def noised(scheduler: Any, data: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """x_t of data and noise, (B, C, h, w) each, at timesteps (B,) or (1,), by the scheduler's own path.

    The formula is a method of every scheduler, beside `ProbabilityPath.interpolate`, because it equals diffusers' there
    to the last bit.
    """
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(data, timesteps, noise)
    return scheduler.add_noise(data, noise, timesteps)
