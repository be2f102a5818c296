"""Probability paths: how data becomes noise, and what a network learns about it.

    x_t = alpha(t) * data + sigma(t) * noise,    t from 0 (data) to 1 (noise)

Everything that a network can predict is a combination of data and noise with coefficients known from t:

    prediction   = a * data     + b * noise
    noise        = 0            + 1
    data         = 1            + 0
    v            = -sigma       + alpha          2202.00512, appendix D
    velocity     = alpha'       + sigma'         dx_t/dt; rectified flow (2209.03003): noise - data
    score        = 0            - 1 / sigma      grad log p(x_t | data)

x_t and one prediction are two equations in data and noise, so each prediction gives every other (`convert`).

Shapes: data, noise, x_t and predictions are (B, ...); t is (B,) float32 or float64.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hubgen.paths.betas import make_betas
from hubgen.paths.prediction import PredictionType, check_prediction_type


@dataclass
class PathSample:
    """One draw from a path: the network's input and what it should answer."""

    x_t: torch.Tensor
    """(B, ...) the noised data, in the data's dtype"""
    target: torch.Tensor
    """(B, ...) the path's `prediction_type`, in the data's dtype"""
    t: torch.Tensor
    """(B,) the time that x_t belongs to: the one given, moved to the grid where the path's model knows only a grid"""
    data: torch.Tensor
    """(B, ...) without noise"""


def _precise(t: torch.Tensor) -> torch.Tensor:
    """t in float64, so that the (B,) factors cost no accuracy; float32 on Apple's GPU, which has nothing finer."""
    return t.float() if t.device.type == "mps" else t.double()


class ProbabilityPath(ABC):
    """A path from data (t = 0) to noise (t = 1), and the quantity that its network predicts.

    Args:
        prediction_type: "noise", "data", "v", "velocity" or "score": what `sample` gives as target.
        num_train_timesteps: the number that the models' timesteps count up to, used by `timestep` and `time` alone.
    """

    def __init__(self, prediction_type: PredictionType, num_train_timesteps: int = 1000) -> None:
        if num_train_timesteps < 1:
            raise ValueError(f"`num_train_timesteps`: got {num_train_timesteps}, expected at least 1")
        self.prediction_type = check_prediction_type(prediction_type)
        self.num_train_timesteps = num_train_timesteps

    @abstractmethod
    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        """Factor of the data at t (B,) in [0, 1]; (B,) in t's dtype."""

    @abstractmethod
    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        """Factor of the noise at t (B,) in [0, 1]; (B,) in t's dtype."""

    @abstractmethod
    def alpha_derivative(self, t: torch.Tensor) -> torch.Tensor:
        """d alpha / dt at t; (B,) in t's dtype."""

    @abstractmethod
    def sigma_derivative(self, t: torch.Tensor) -> torch.Tensor:
        """d sigma / dt at t; (B,) in t's dtype."""

    @abstractmethod
    def timestep(self, t: torch.Tensor) -> torch.Tensor:
        """What a model of this path is given as its timestep at t (B,): the one door from t to the discrete world."""

    @abstractmethod
    def time(self, timestep: torch.Tensor) -> torch.Tensor:
        """The t (float32, in [0, 1]) of a model's timestep: the inverse of `timestep`."""

    def snap(self, t: torch.Tensor) -> torch.Tensor:
        """The time nearest to t that a model of this path can be told about; t itself where that is every time."""
        return t

    def log_snr(self, t: torch.Tensor) -> torch.Tensor:
        """log(alpha^2 / sigma^2) at t; +inf where sigma = 0, -inf where alpha = 0."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def interpolate(self, data: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_t (B, ...) at exactly t (never moved to a grid), in the data's dtype."""
        return self._combine(data, noise, self.alpha(_precise(t)), self.sigma(_precise(t)))

    def sample(self, data: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> PathSample:
        """Draws x_t and the target at `snap(t)`.

        Args:
            data, noise: (B, ...), of one shape and dtype.
            t: (B,) float32 or float64 in [0, 1]. Half precision cannot tell 1000 times apart and is refused.
        """
        if noise.shape != data.shape:
            raise ValueError(f"`noise`: got shape {tuple(noise.shape)}, expected that of data, {tuple(data.shape)}")
        self._check_time(t, data)
        t = self.snap(t)
        a, b = self.coefficients(self.prediction_type, _precise(t))
        return PathSample(self.interpolate(data, noise, t), self._combine(data, noise, a, b), t, data)

    def convert(
        self,
        prediction: torch.Tensor,
        x_t: torch.Tensor,
        t: torch.Tensor,
        source: PredictionType,
        target: PredictionType,
    ) -> torch.Tensor:
        """Turns a prediction of one type into the equivalent one of another type, at x_t and t.

        Args:
            prediction: (B, ...) of type `source`.
            x_t: (B, ...), the network's input.
            t: (B,) the time of x_t; after `sample`, the `t` that it returned.

        Exact, and defined at every t but these: "score" does not exist where sigma = 0 (t = 0); from "noise" or
        "score" nothing else follows where alpha = 0 (t = 1 of rectified flow and of zero-terminal-SNR schedules); from
        "data" nothing else follows where sigma = 0. There the result is not finite. Nearby, rounding errors grow as
        1 / alpha or 1 / sigma. "v" and "velocity" give data, noise and each other everywhere.
        """
        source, target = check_prediction_type(source, "source"), check_prediction_type(target, "target")
        self._check_time(t, x_t)
        if source == target:
            return prediction
        t = _precise(t)
        alpha, sigma = self.alpha(t), self.sigma(t)
        a, b = self.coefficients(source, t)
        c, d = self.coefficients(target, t)
        # Cramer's rule on x_t = alpha data + sigma noise, prediction = a data + b noise, put into c data + d noise
        determinant = alpha * b - sigma * a
        return self._combine(x_t, prediction, (b * c - a * d) / determinant, (alpha * d - sigma * c) / determinant)

    def coefficients(self, kind: PredictionType, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(a, b) of prediction = a data + b noise, each (B,)."""
        zero, one = torch.zeros_like(t), torch.ones_like(t)
        if kind == "noise":
            return zero, one
        if kind == "data":
            return one, zero
        if kind == "v":
            return -self.sigma(t), self.alpha(t)
        if kind == "velocity":
            return self.alpha_derivative(t), self.sigma_derivative(t)
        return zero, -1 / self.sigma(t)

    @staticmethod
    def _combine(x: torch.Tensor, y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """a x + b y with (B,) factors spread over (B, ...), summed in at least float32."""
        dtype = torch.promote_types(x.dtype, y.dtype)
        working = torch.promote_types(dtype, torch.float32)
        shape = (-1,) + (1,) * (x.ndim - 1)
        return (a.to(working).view(shape) * x + b.to(working).view(shape) * y).to(dtype)

    @staticmethod
    def _check_time(t: torch.Tensor, batch: torch.Tensor) -> None:
        if t.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"`t`: got dtype {t.dtype}, expected float32 or float64")
        if t.shape != batch.shape[:1]:
            raise ValueError(
                f"`t`: got shape {tuple(t.shape)}, expected one time per example, {tuple(batch.shape[:1])}"
            )


class RectifiedFlowPath(ProbabilityPath):
    """The straight path: alpha = 1 - t, sigma = t, velocity = noise - data (2209.03003; SD3, 2403.03206, eq. 13).

    The models' timestep is num_train_timesteps * t, a float.

    Args:
        prediction_type: See `ProbabilityPath`.
        num_train_timesteps: See `ProbabilityPath`.
        sigma_min: Noise that is left at t = 0, in [0, 1): sigma = sigma_min + (1 - sigma_min) t, the conditional
            optimal transport of Flow Matching (2210.02747, eq. 20; its time runs the other way).
    """

    def __init__(
        self,
        prediction_type: PredictionType = "velocity",
        num_train_timesteps: int = 1000,
        sigma_min: float = 0.0,
    ) -> None:
        super().__init__(prediction_type, num_train_timesteps)
        if not 0 <= sigma_min < 1:
            raise ValueError(f"`sigma_min`: got {sigma_min}, expected a number of at least 0 and below 1")
        self.sigma_min = sigma_min

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        return 1 - t

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        return t if self.sigma_min == 0 else self.sigma_min + (1 - self.sigma_min) * t

    def alpha_derivative(self, t: torch.Tensor) -> torch.Tensor:
        return -torch.ones_like(t)

    def sigma_derivative(self, t: torch.Tensor) -> torch.Tensor:
        return torch.full_like(t, 1 - self.sigma_min)

    def timestep(self, t: torch.Tensor) -> torch.Tensor:
        return t * self.num_train_timesteps

    def time(self, timestep: torch.Tensor) -> torch.Tensor:
        return timestep.float() / self.num_train_timesteps


class VariancePreservingPath(ProbabilityPath):
    """DDPM's path (2006.11239, eq. 4): alpha = sqrt(alpha_bar), alpha^2 + sigma^2 = 1, from a discrete table of betas.

    With alpha = cos(angle) and sigma = sin(angle), the path is a turn from data to noise, and v its derivative by the
    angle. The table fixes the angle at t_i = (i + 1) / N, i = 0 ... N - 1, and angle(0) = 0, so that t = 0 is the data
    itself. Between, a monotone cubic (Fritsch and Carlson 1980) carries it: x_t has a continuous, exactly known
    derivative, also at t = 0 and where the last step holds no signal.

    The models' timestep is the index i. `sample` moves t to the next grid time at or above it, so that the index and
    x_t agree, and t uniform in [0, 1] makes every index equally likely.

    Args: those of diffusers' scheduler configs (`make_betas`), and the prediction type.
    """

    def __init__(
        self,
        prediction_type: PredictionType = "noise",
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        num_train_timesteps: int = 1000,
        trained_betas: Sequence[float] | None = None,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        betas = make_betas(
            beta_schedule, beta_start, beta_end, num_train_timesteps, trained_betas, rescale_betas_zero_snr
        )
        super().__init__(prediction_type, len(betas))
        self.betas_config = {
            "beta_start": beta_start,
            "beta_end": beta_end,
            "beta_schedule": beta_schedule,
            "num_train_timesteps": num_train_timesteps,
            "trained_betas": None if trained_betas is None else list(trained_betas),
            "rescale_betas_zero_snr": rescale_betas_zero_snr,
        }
        """The betas, as schedulers' configs have them"""
        # The product is taken in float32, as samplers take it, so that training and sampling share one table.
        alpha_bar = torch.cumprod(1 - betas, dim=0).double()
        self.alpha_bars = alpha_bar
        """(N,) float64: alpha^2 at the times of the grid"""
        angle = torch.atan2((1 - alpha_bar).sqrt(), alpha_bar.sqrt())
        self._angles = torch.cat([torch.zeros(1, dtype=torch.float64), angle])  # (N + 1,)
        self._slopes = self._monotone_slopes(self._angles)  # (N + 1,), per grid cell

    @staticmethod
    def _monotone_slopes(values: torch.Tensor) -> torch.Tensor:
        """Slopes at the knots: the harmonic mean of the secants on both sides, at the ends the secant."""
        secants = values.diff()
        inner = 2 * secants[1:] * secants[:-1] / (secants[1:] + secants[:-1])
        return torch.cat([secants[:1], inner, secants[-1:]])

    def _angle(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The angle at t and its derivative by t, both (B,) float64: a cubic Hermite polynomial per grid cell."""
        position = _precise(t) * self.num_train_timesteps
        # moved once, at the first call on a device
        self._angles, self._slopes = self._angles.to(position), self._slopes.to(position)
        cell = position.detach().floor().long().clamp(0, self.num_train_timesteps - 1)
        s = position - cell
        left, right = self._angles[cell], self._angles[cell + 1]
        slope_left, slope_right = self._slopes[cell], self._slopes[cell + 1]
        rise = right - left
        square = slope_left + slope_right - 2 * rise  # the factor of s^3
        bend = 3 * rise - 2 * slope_left - slope_right  # the factor of s^2
        angle = left + s * (slope_left + s * (bend + s * square))
        derivative = slope_left + s * (2 * bend + 3 * s * square)
        return angle, derivative * self.num_train_timesteps

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        return self._angle(t)[0].cos().to(t.dtype)

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        return self._angle(t)[0].sin().to(t.dtype)

    def alpha_derivative(self, t: torch.Tensor) -> torch.Tensor:
        angle, derivative = self._angle(t)
        return (-angle.sin() * derivative).to(t.dtype)

    def sigma_derivative(self, t: torch.Tensor) -> torch.Tensor:
        angle, derivative = self._angle(t)
        return (angle.cos() * derivative).to(t.dtype)

    def timestep(self, t: torch.Tensor) -> torch.Tensor:
        """The index (B,) int64 in 0 ... N - 1 of the grid time that `snap` moves t to."""
        # The factor covers the rounding of (i + 1) / N in float32, so that grid times keep their own index.
        cells = (_precise(t) * self.num_train_timesteps * (1 - 1e-6)).ceil().long()
        return (cells - 1).clamp(0, self.num_train_timesteps - 1)

    def time(self, timestep: torch.Tensor) -> torch.Tensor:
        return (timestep.float() + 1) / self.num_train_timesteps

    def snap(self, t: torch.Tensor) -> torch.Tensor:
        """The grid time (index + 1) / N at or above t, in t's dtype."""
        return (self.timestep(t).to(t.dtype) + 1) / self.num_train_timesteps
