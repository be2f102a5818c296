"""Discrete variance schedules beta_0 ... beta_{N-1} of diffusion models, under diffusers' names.

linear             DDPM (2006.11239): evenly spaced betas
scaled_linear      latent diffusion (2112.10752): evenly spaced sqrt(beta), squared
squaredcos_cap_v2  improved DDPM (2102.09672, eq. 17): cosine alpha_bar, betas capped at 0.999
laplace            Laplace-distributed log-SNR (2407.03297)
sigmoid            GeoDiff (2203.02923)
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid")


def make_betas(
    beta_schedule: str = "linear",
    beta_start: float = 0.0001,
    beta_end: float = 0.02,
    num_train_timesteps: int = 1000,
    trained_betas: Sequence[float] | np.ndarray | None = None,
    rescale_betas_zero_snr: bool = False,
) -> torch.Tensor:
    """The betas of a schedule: (N,) float32, each in (0, 1], N = num_train_timesteps.

    `trained_betas` replaces the named schedule. `beta_start` and `beta_end` are read by linear, scaled_linear and
    sigmoid only. `rescale_betas_zero_snr` applies `rescale_zero_terminal_snr`. Raises ValueError for an unknown
    schedule, a size below 1, `trained_betas` of another length or betas outside (0, 1].
    """
    if trained_betas is not None:
        betas = torch.as_tensor(np.asarray(trained_betas), dtype=torch.float32)
        if betas.shape != (num_train_timesteps,):
            raise ValueError(
                f"`trained_betas`: got shape {tuple(betas.shape)}, expected one for each of the {num_train_timesteps} "
                "num_train_timesteps"
            )
    else:
        if beta_schedule not in BETA_SCHEDULES:
            raise ValueError(f"`beta_schedule`: got {beta_schedule!r}, expected one of {list(BETA_SCHEDULES)}")
        if num_train_timesteps < 1:
            raise ValueError(f"`num_train_timesteps`: got {num_train_timesteps}, expected at least 1")
        betas = _named_betas(beta_schedule, beta_start, beta_end, num_train_timesteps)
    if not bool(((betas > 0) & (betas <= 1)).all()):
        raise ValueError(
            f"`betas`: got values from {betas.min().item():.3g} to {betas.max().item():.3g}, expected all in (0, 1]"
        )
    return rescale_zero_terminal_snr(betas) if rescale_betas_zero_snr else betas


def _named_betas(name: str, start: float, end: float, n: int) -> torch.Tensor:
    if name == "linear":
        return torch.linspace(start, end, n, dtype=torch.float32)
    if name == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, n, dtype=torch.float32) ** 2
    if name == "sigmoid":
        return start + (end - start) * torch.sigmoid(torch.linspace(-6, 6, n))
    t = torch.linspace(0, 1, n + 1, dtype=torch.float64)
    if name == "squaredcos_cap_v2":
        alpha_bar = torch.cos((t + 0.008) / 1.008 * (math.pi / 2)) ** 2
    else:  # laplace: the log-SNR at quantile t; diffusers takes the square root of alpha_bar here, and so do we
        half_log_snr = -0.5 * torch.where(t <= 0.5, 1.0, -1.0) * torch.log(1 - 2 * (0.5 - t).abs() + 1e-6)
        alpha_bar = torch.sigmoid(half_log_snr).sqrt()
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999).float()


def rescale_zero_terminal_snr(betas: torch.Tensor) -> torch.Tensor:
    """Betas (N,) whose last step holds no signal: sqrt(alpha_bar) is moved to end at 0, stretched to begin as before.

    Algorithm 1 of "Common Diffusion Noise Schedules and Sample Steps are Flawed" (2305.08891).
    """
    root = torch.cumprod(1 - betas, dim=0).sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    alpha_bar = root**2
    return 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
