"""What is learned, from the settings and the scheduler of the base."""

from typing import Any

from hubgen.paths.continuous import CosinePath, EdmPath, VarianceExplodingPath
from hubgen.paths.path import ProbabilityPath, RectifiedFlowPath, VariancePreservingPath
from hubgen.paths.timesteps import LogitNormalDensity, TimestepDensity, UniformDensity
from hubgen.paths.weighting import MinSnrWeighting, noise_error_weighting, uniform_weighting
from hubgen.schedulers import objective as objectives
from hubgen.schedulers.objective import objective_of, scheduler_of
from hubgen.schedulers.times import shift_by_tokens
from hubgen.training.kit.groups import Objective
from hubgen.training.kit.parse import SettingsError

PREDICTIONS: dict[str, tuple[str, ...]] = {
    "rectified_flow": ("velocity",),
    "ddpm": ("noise", "data", "v"),
    "cosine": ("v", "noise", "data"),
    "edm": ("v",),
    "variance_exploding": ("score",),
    "ncsn": ("score",),
}
"""What networks of each path predict; the first if nothing else is said"""

NCSN_LEVELS = 10


def objective_from(
    settings: Objective, scheduler: Any = None, tokens: int | None = None, learns_variance: bool = False
) -> objectives.Objective:
    """The objective that the settings describe.

    Args:
        settings: What is not given in them is as the scheduler says, or usual for the path.
        scheduler: Of the base; `None` from scratch.
        tokens: Image tokens of a picture, for a shift that depends on them.
        learns_variance: Whether the network predicts the variance of a step too.

    Raises:
        SettingsError: Settings that do not go together.
    """
    try:
        base = None if scheduler is None or settings.path is not None else objective_of(scheduler, tokens)
        path = _path(settings) if base is None else base.path
        if base is not None and settings.prediction not in (None, path.prediction_type):
            raise SettingsError(
                f"setting 'objective.prediction': got '{settings.prediction}', expected '{path.prediction_type}', what "
                "the base predicts, or objective.path too."
            )
        density = None if base is None else base.density
        shift = _shift(settings, tokens, 1.0 if density is None else density.shift)
        weighting: Any = uniform_weighting if base is None else base.weighting
        if isinstance(path, VarianceExplodingPath):
            weighting = noise_error_weighting
        if settings.weighting == "min_snr":
            weighting = MinSnrWeighting(settings.min_snr_gamma)
        drawn = _density(settings, path, density, shift)
        return objectives.Objective(
            path, drawn, weighting, settings.huber, settings.noise_offset, learns_variance=learns_variance
        )
    except SettingsError:
        raise
    except ValueError as error:
        raise SettingsError(f"settings of 'objective': {error}") from error


def sampler_of(settings: Objective, objective: objectives.Objective, scheduler: Any = None) -> Any:
    """The scheduler that a trained model is published with: the base's, unless the settings changed what it samples."""
    changed = settings.path is not None or settings.shift is not None or scheduler is None
    return scheduler_of(objective) if changed else scheduler


def _path(settings: Objective) -> ProbabilityPath:
    kind = settings.path or "rectified_flow"
    predicted: Any = settings.prediction or PREDICTIONS[kind][0]
    if predicted not in PREDICTIONS[kind]:
        expected = " or ".join(f"'{name}'" for name in PREDICTIONS[kind])
        raise SettingsError(f"setting 'objective.prediction': got '{predicted}', expected {expected} with {kind}.")
    if settings.sigma_max is not None and kind not in ("variance_exploding", "ncsn"):
        raise SettingsError(f"setting 'objective.sigma_max': got {settings.sigma_max}, expected none with {kind}.")
    if kind == "rectified_flow":
        return RectifiedFlowPath(sigma_min=settings.sigma_min or 0.0)
    if settings.sigma_min is not None and kind not in ("variance_exploding", "ncsn"):
        raise SettingsError(f"setting 'objective.sigma_min': got {settings.sigma_min}, expected none with {kind}.")
    if kind == "ddpm":
        betas: dict[str, Any] = {
            "beta_schedule": settings.beta_schedule,
            "rescale_betas_zero_snr": settings.zero_terminal_snr,
        }
        if settings.beta_schedule == "scaled_linear":  # Stable Diffusion's
            betas |= {"beta_start": 0.00085, "beta_end": 0.012}
        return VariancePreservingPath(predicted, **betas)
    if kind == "cosine":
        return CosinePath(predicted)
    if kind == "edm":
        return EdmPath(predicted)
    levels: dict[str, Any] = {"sigma_min": settings.sigma_min, "sigma_max": settings.sigma_max}
    given = {name: value for name, value in levels.items() if value is not None}
    if kind == "ncsn":
        return VarianceExplodingPath(predicted, **{"sigma_min": 0.01, "sigma_max": 1.0, **given}, levels=NCSN_LEVELS)
    return VarianceExplodingPath(predicted, **given)


def _shift(settings: Objective, tokens: int | None, usual: float) -> float:
    if settings.shift is None:
        return usual
    if settings.shift != "auto":
        return settings.shift
    if tokens is None:
        raise SettingsError("setting 'objective.shift': got 'auto', expected a number: the pictures have no tokens.")
    return shift_by_tokens(tokens)


def _density(settings: Objective, path: ProbabilityPath, base: TimestepDensity | None, shift: float) -> TimestepDensity:
    kind = settings.density
    if kind is None and base is not None and settings.shift is None:
        return base
    if kind is None:
        flow = isinstance(path, RectifiedFlowPath) if base is None else isinstance(base, LogitNormalDensity)
        kind = "logit_normal" if flow else "uniform"
    if kind == "logit_normal":
        return LogitNormalDensity(settings.logit_mean, settings.logit_std, shift=shift)
    return UniformDensity(shift=shift)
