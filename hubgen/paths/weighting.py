"""Weights w(t) of the loss w(t) * |prediction - target|^2, as callables of (path, t).

A weight belongs to what the network predicts: the same training has another weight in another prediction type. So
SD3's w^pi = t / (1 - t) * pi(t) (2403.03206, eq. 18) is the noise-loss form of *drawing* t from pi under the plain
velocity loss: whoever draws t from a density does not multiply by it as well.
"""

import math
from collections.abc import Callable

import torch

from hubgen.paths.path import ProbabilityPath

Weighting = Callable[[ProbabilityPath, torch.Tensor], torch.Tensor]


def uniform_weighting(path: ProbabilityPath, t: torch.Tensor) -> torch.Tensor:
    """1 at every t (B,): the plain loss of what the network predicts; (B,)."""
    return torch.ones_like(t)


class MinSnrWeighting:
    """min(SNR, gamma) on the squared error of the data (2303.09556, eq. 4), whatever the path's network predicts.

    An error e of the prediction is an error sigma e / D of the data, D being the determinant of `ProbabilityPath`'s two
    equations, so the weight is min(SNR, gamma) sigma^2 / D^2: min(SNR, gamma) / SNR for noise, / (SNR + 1) for v.

    Args:
        gamma: the cap on SNR = alpha^2 / sigma^2, above 0; the paper's choice is 5.
    """

    def __init__(self, gamma: float = 5.0) -> None:
        if not (math.isfinite(gamma) and gamma > 0):
            raise ValueError(f"`gamma`: got {gamma}, expected a finite number above 0")
        self.gamma = gamma

    def __call__(self, path: ProbabilityPath, t: torch.Tensor) -> torch.Tensor:
        """w (B,) in t's dtype, for the squared error of `path.prediction_type` at t (B,)."""
        # At both ends the factors are limits of the form 0 * inf.
        inside = t.clamp(1e-6, 1 - 1e-6)
        alpha, sigma = path.alpha(inside), path.sigma(inside)
        a, b = path.coefficients(path.prediction_type, inside)
        determinant = alpha * b - sigma * a
        return (alpha / sigma).square().clamp(max=self.gamma) * (sigma / determinant).square()


def noise_error_weighting(path: ProbabilityPath, t: torch.Tensor) -> torch.Tensor:
    """The squared error of the noise (DDPM's L_simple, 2006.11239, eq. 14), whatever the path's network predicts.

    An error e of the prediction is an error alpha e / D of the noise, D being the determinant of `ProbabilityPath`'s
    two equations, so the weight is (alpha / D)^2: 1 for noise, sigma^2 for the score, as NCSN has it (1907.05600, eq.
    6).

    Args:
        path: With its prediction type.
        t: (B,).

    Returns:
        (B,) in t's dtype.
    """
    inside = t.clamp(1e-6, 1 - 1e-6)
    alpha, sigma = path.alpha(inside), path.sigma(inside)
    a, b = path.coefficients(path.prediction_type, inside)
    return (alpha / (alpha * b - sigma * a)).square()
