"""What a network learns: a path, the times that are drawn, the weights of the errors, in one object.

    sample = objective.draw(latents, random)                       # x_t, its time and the target
    prediction = predict(backbone, sample.x_t, objective.timestep(sample), condition)
    loss = objective.loss(prediction, sample).mean()

`objective_of(scheduler)` is what a model was trained for that is sampled by that scheduler, and
`scheduler_of(objective)` what samples along the path of an objective.

Shapes: B pictures, latents and predictions (B, ...).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch

from hubgen.paths.continuous import CosinePath, EdmPath, VarianceExplodingPath
from hubgen.paths.path import PathSample, ProbabilityPath, RectifiedFlowPath, VariancePreservingPath
from hubgen.paths.prediction import from_diffusers, to_diffusers
from hubgen.paths.timesteps import LogitNormalDensity, TimestepDensity, UniformDensity
from hubgen.paths.variational import variational_bound
from hubgen.paths.weighting import MinSnrWeighting, Weighting, noise_error_weighting, uniform_weighting
from hubgen.schedulers.annealed_langevin import AnnealedLangevinScheduler
from hubgen.schedulers.ddpm import DDPMScheduler
from hubgen.schedulers.flow_match_euler import FlowMatchEulerDiscreteScheduler
from hubgen.schedulers.score_sde_ve import ScoreSdeVeScheduler
from hubgen.schedulers.times import dynamic_shift

Random = torch.Generator | Sequence[torch.Generator]


@dataclass(frozen=True)
class Objective:
    """How a batch of latents becomes a loss.

    Args:
        path: From data to noise, and what the network predicts.
        density: Of the times that are drawn.
        weighting: Of the errors, by time.
        huber: c of the pseudo-Huber error 2 c (sqrt(e^2 + c^2) - c), which is the square of errors well below c and
            grows with the magnitude of those above; `None` for the square of all.
        noise_offset: Standard deviation of a noise that is the same for a whole channel, added to the noise, so that
            the network learns to move a picture's brightness; 0 for none.
        learns_variance: Whether the network predicts, in as many channels again, the variance of a step, which it
            learns by the variational bound; the mean does not move by it (2102.09672; DiT, 2212.09748).

    Raises:
        ValueError: The weighting has no finite value somewhere on the path, or a number is out of its range.
    """

    path: ProbabilityPath
    density: TimestepDensity = field(default_factory=UniformDensity)
    weighting: Weighting = uniform_weighting
    huber: float | None = None
    noise_offset: float = 0.0
    learns_variance: bool = False

    def __post_init__(self) -> None:
        if self.huber is not None and not (math.isfinite(self.huber) and self.huber > 0):
            raise ValueError(f"`huber`: got {self.huber}, expected a finite number above 0, or None")
        if not (math.isfinite(self.noise_offset) and self.noise_offset >= 0):
            raise ValueError(f"`noise_offset`: got {self.noise_offset}, expected a finite number, at least 0")
        steps = isinstance(self.path, VariancePreservingPath) and self.path.prediction_type == "noise"
        if self.learns_variance and not steps:
            raise ValueError(
                f"`learns_variance`: got True with a {type(self.path).__name__} of {self.path.prediction_type!r}, "
                "expected a VariancePreservingPath of 'noise'"
            )
        blind = isinstance(self.path, VariancePreservingPath) and self.path.prediction_type in ("noise", "score")
        if blind and isinstance(self.weighting, MinSnrWeighting) and self.path.alpha(torch.ones(1)).item() < 1e-4:
            raise ValueError(
                f"`weighting`: got min-SNR with the prediction {self.path.prediction_type!r} on a path that ends "
                "without signal, where its weight is 0 / 0; expected the prediction 'v' or 'data'"
            )

    def draw(self, latents: torch.Tensor, random: Random) -> PathSample:
        """x_t and the target at drawn times.

        Args:
            latents: (B, ...), the data as the backbone has it.
            random: One generator for the batch, or one for each of B, so that a picture's time and noise do not depend
                on the batch that it is in. Draws the time, then the noise.
        """
        if isinstance(random, torch.Generator):
            t = self.density.sample(len(latents), generator=random, device=latents.device)  # (B,)
            noise = self._noise(latents.shape, random)
        else:
            if len(random) != len(latents):
                raise ValueError(f"`random`: got {len(random)} generators, expected {len(latents)}, one a picture")
            drawn = [
                (self.density.sample(1, generator=one), self._noise((1, *latents.shape[1:]), one)) for one in random
            ]
            t = torch.cat([time for time, _ in drawn]).to(latents.device)
            noise = torch.cat([noise for _, noise in drawn])
        return self.path.sample(latents, noise.to(latents.device), t)

    def _noise(self, shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
        noise = torch.randn(shape, generator=generator, device=generator.device)
        if self.noise_offset:
            flat = torch.randn((*shape[:2], *[1] * (len(shape) - 2)), generator=generator, device=generator.device)
            noise = noise + self.noise_offset * flat
        return noise

    def timestep(self, sample: PathSample) -> torch.Tensor:
        """What the backbone is given as the time of a sample, (B,)."""
        return self.path.timestep(sample.t)

    def loss(self, prediction: torch.Tensor, sample: PathSample, mask: torch.Tensor | None = None) -> torch.Tensor:
        """The weighted error of each picture, (B,), in float32.

        Args:
            prediction: (B, ...); where the variance is learnt, of twice the channels.
            sample: What it is the prediction for.
            mask: (B, 1, h, w) in [0, 1]: how much each place counts; the mean is over all places, so that a mask of
                ones changes nothing.

        Raises:
            ValueError: Shapes do not fit.
        """
        variance = None
        if self.learns_variance and prediction.shape[1] == 2 * sample.target.shape[1]:
            prediction, variance = prediction.chunk(2, dim=1)
        if prediction.shape != sample.target.shape:
            found, expected = tuple(prediction.shape), tuple(sample.target.shape)
            raise ValueError(f"`prediction`: got shape {found}, expected the target's, {expected}")
        error = (prediction.float() - sample.target).square()
        if self.huber is not None:
            error = 2 * self.huber * ((error + self.huber**2).sqrt() - self.huber)
        if variance is not None:
            assert isinstance(self.path, VariancePreservingPath)
            bound = variational_bound(self.path, sample, prediction.detach().float(), variance.float())
            error = error + bound * (self.path.num_train_timesteps / 1000)
        if mask is not None:
            places = (len(prediction), 1, *prediction.shape[2:])
            if tuple(mask.shape) != places:
                raise ValueError(f"`mask`: got shape {tuple(mask.shape)}, expected {places}")
            error = error * mask
        return self.weighting(self.path, sample.t) * error.mean(dim=tuple(range(1, error.ndim)))


def objective_of(scheduler: Any, tokens: int | None = None) -> Objective:
    """What a model learned that is sampled by this scheduler, with the published recipe of its kind.

    Schedules of betas: the squared error of what the config says is predicted, at uniform timesteps (2006.11239). Flow
    matching: that of the velocity at logit-normal times, shifted as the scheduler shifts (SD3, 2403.03206). Scores: the
    squared error of the noise that they stand for (1907.05600, 2011.13456).

    Args:
        scheduler: Ours or diffusers'.
        tokens: Image tokens of the training's pictures, for a scheduler whose shift depends on them (FLUX.1 dev).

    Raises:
        ValueError: The scheduler is of a kind that no path here belongs to, or `tokens` is needed.
    """
    config = scheduler.config
    if "sampling_eps" in config:
        path: ProbabilityPath = VarianceExplodingPath("score", config.sigma_min, config.sigma_max)
        return Objective(path, weighting=noise_error_weighting)
    if "steps_per_level" in config:
        levels = {"sigma_min": config.sigma_min, "sigma_max": config.sigma_max, "levels": config.num_train_timesteps}
        return Objective(VarianceExplodingPath("score", **levels), weighting=noise_error_weighting)
    if "sigma_data" in config:
        if config.prediction_type != "v_prediction":
            raise ValueError(
                f"`scheduler`: got {type(scheduler).__name__} with the prediction {config.prediction_type!r}, expected "
                "'v_prediction', its negative"
            )
        return Objective(EdmPath())
    if hasattr(scheduler, "alphas_cumprod") and not config.get("use_flow_sigmas", False):
        names = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "trained_betas")
        betas = {name: config[name] for name in (*names, "rescale_betas_zero_snr") if config.get(name) is not None}
        return Objective(VariancePreservingPath(from_diffusers(config.prediction_type), **betas))
    if type(scheduler).__name__.startswith("FlowMatch"):
        path = RectifiedFlowPath(num_train_timesteps=config.num_train_timesteps)
        return Objective(path, LogitNormalDensity(shift=shift_of(config, tokens)))
    raise ValueError(f"`scheduler`: got {type(scheduler).__name__}, which no path here belongs to")


def shift_of(config: Any, tokens: int | None) -> float:
    """By how much a flow's times are shifted towards noise; see `objective_of`."""
    if not config.get("use_dynamic_shifting", False):
        return config.shift
    if tokens is None:
        raise ValueError("`tokens`: got None, expected the number of image tokens, which this scheduler's shift is of")
    mu = dynamic_shift(config, tokens)
    return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu


def scheduler_of(objective: Objective) -> Any:
    """The scheduler that samples along the path of an objective, shifted as its density is.

    Raises:
        ValueError: There is none for this path.
    """
    path = objective.path
    if isinstance(path, RectifiedFlowPath):
        return FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=path.num_train_timesteps, shift=objective.density.shift
        )
    if isinstance(path, VariancePreservingPath):
        predicted = to_diffusers(path.prediction_type)
        return DDPMScheduler(
            **path.betas_config,
            prediction_type=predicted,
            clip_sample=False,
            timestep_spacing="trailing",
            variance_type="learned_range" if objective.learns_variance else "fixed_small",
        )
    if isinstance(path, CosinePath) and path.prediction_type in ("noise", "data", "v"):
        return DDPMScheduler(
            trained_betas=path.betas(),
            num_train_timesteps=path.num_train_timesteps,
            prediction_type=to_diffusers(path.prediction_type),
            clip_sample=False,
            timestep_spacing="trailing",
        )
    if isinstance(path, VarianceExplodingPath) and path.prediction_type == "score":
        levels = {"sigma_min": path.sigma_min, "sigma_max": path.sigma_max}
        if path.levels is None:
            return ScoreSdeVeScheduler(**levels)
        return AnnealedLangevinScheduler(**levels, num_train_timesteps=path.levels)
    if isinstance(path, EdmPath) and path.prediction_type == "v":
        return diffusers.EDMEulerScheduler(sigma_data=1.0, prediction_type="v_prediction")
    raise ValueError(
        f"`objective`: got a {type(path).__name__} of {path.prediction_type!r}, which no scheduler samples"
    )
