"""Ancestral sampling of the DDPM chain: "Denoising Diffusion Probabilistic Models" (2006.11239), algorithm 2.

The reverse of the discretised variance-preserving SDE dx = -beta x / 2 dt + sqrt(beta) dw: each step draws from the
Gaussian posterior q(x_prev | x_t, data) of eq. 6 and 7, with the network's estimate in the place of data.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from hubgen.paths.betas import make_betas
from hubgen.schedulers.grid import check_num_inference_steps

VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")
MODEL_PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
TIMESTEP_SPACINGS = ("linspace", "leading", "trailing")


class DDPMScheduler(SchedulerMixin, ConfigMixin):
    """DDPM with the constructor, config and methods of diffusers' class of the same name.

    Args:
        num_train_timesteps: N, the length of the chain that the model was trained on.
        beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: see `make_betas`.
        variance_type: the variance of a step. "fixed_small": the posterior's, eq. 7; "fixed_large": beta; the same
            two with "_log" (computed through the logarithm); "learned": the model's second half of channels;
            "learned_range": that half, in [-1, 1], interpolates between the logarithms of both (2102.09672, eq. 15).
        clip_sample, clip_sample_range: whether and to which magnitude the estimate of data is clipped in each step.
        prediction_type: what the model predicts: "epsilon", "sample" or "v_prediction".
        thresholding, dynamic_thresholding_ratio, sample_max_value: dynamic thresholding of the estimate of data in
            place of clipping (2205.11487, section 2.3).
        timestep_spacing, steps_offset: where fewer than N steps lie (2305.08891, table 2); the offset moves "leading".
    """

    _compatibles = [scheduler.name for scheduler in KarrasDiffusionSchedulers]
    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid"] = "linear",
        trained_betas: np.ndarray | Sequence[float] | None = None,
        variance_type: Literal[
            "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"
        ] = "fixed_small",
        clip_sample: bool = True,
        prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: Literal["linspace", "leading", "trailing"] = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        for name, value, known in (
            ("variance_type", variance_type, VARIANCE_TYPES),
            ("prediction_type", prediction_type, MODEL_PREDICTION_TYPES),
            ("timestep_spacing", timestep_spacing, TIMESTEP_SPACINGS),
        ):
            if value not in known:
                raise ValueError(f"{name}: got {value!r}, expected one of {list(known)}")
        # The tables stay on the CPU in float32, where diffusers has them: reading an entry never waits for a device,
        # and the same seed gives the same picture in both libraries.
        self.betas = make_betas(
            beta_schedule, beta_start, beta_end, num_train_timesteps, trained_betas, rescale_betas_zero_snr
        )
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)
        self.one = torch.tensor(1.0)
        self.variance_type = variance_type
        self.custom_timesteps = False
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)

    @property
    def timesteps(self) -> torch.Tensor:
        """(n,) int64, descending: the indices that the loop visits."""
        return self._timesteps

    @timesteps.setter
    def timesteps(self, timesteps: torch.Tensor) -> None:
        self._timesteps = timesteps
        self._visited: list[int] = timesteps.tolist()  # no step asks the device for it

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def scale_model_input(self, sample: torch.Tensor, timestep: int | torch.Tensor | None = None) -> torch.Tensor:
        """The sample itself: models of this chain take x_t unscaled."""
        return sample

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Chooses the indices to visit: `num_inference_steps` evenly spaced ones, or exactly `timesteps`.

        Args:
            num_inference_steps: 1 to num_train_timesteps; not together with `timesteps`.
            device: where `self.timesteps` goes.
            timesteps: descending whole numbers in [0, num_train_timesteps).

        Raises ValueError for anything else.
        """
        if (num_inference_steps is None) == (timesteps is None):
            found = "neither" if timesteps is None else "both"
            raise ValueError(f"num_inference_steps, timesteps: got {found}, expected exactly one of them")
        if timesteps is not None:
            grid = self._check_timesteps(timesteps)
        else:
            grid = self._spaced_timesteps(
                check_num_inference_steps(num_inference_steps, most=self.config.num_train_timesteps)
            )
        self.custom_timesteps = timesteps is not None
        self.num_inference_steps = len(grid)
        self._timesteps, self._visited = torch.from_numpy(grid).to(device), grid.tolist()

    def _check_timesteps(self, timesteps: Sequence[int]) -> np.ndarray:
        grid = np.asarray(timesteps)
        last = self.config.num_train_timesteps - 1
        if grid.ndim != 1 or grid.size == 0 or not np.issubdtype(grid.dtype, np.integer):
            raise ValueError(f"timesteps: got {timesteps!r}, expected a non-empty list of whole numbers")
        if (np.diff(grid) >= 0).any() or grid[0] > last or grid[-1] < 0:
            raise ValueError(f"timesteps: got {grid.tolist()}, expected descending numbers within [0, {last}]")
        return grid.astype(np.int64)

    def _spaced_timesteps(self, steps: int) -> np.ndarray:
        """(steps,) int64, descending: 2305.08891, table 2."""
        total = self.config.num_train_timesteps
        if self.config.timestep_spacing == "linspace":
            grid = np.linspace(0, total - 1, steps).round()[::-1]
        elif self.config.timestep_spacing == "leading":
            grid = np.arange(steps)[::-1] * (total // steps) + self.config.steps_offset
            if grid[0] >= total:
                raise ValueError(
                    f"steps_offset: got {self.config.steps_offset}, which starts {steps} steps at timestep {grid[0]}, "
                    f"expected a start below num_train_timesteps, {total}"
                )
        else:
            # not total - i * total / steps, which falls on the other side of some halves than diffusers' grid
            grid = np.arange(total, 0, -total / steps)[:steps].round() - 1
        return grid.astype(np.int64)

    def _index(self, timestep: int | torch.Tensor) -> int:
        """The timestep as a number, without a wait where it is an element of `self.timesteps` on a device."""
        if isinstance(timestep, torch.Tensor) and timestep.numel() == 1 and timestep.device.type != "cpu":
            if timestep.untyped_storage().data_ptr() == self.timesteps.untyped_storage().data_ptr():
                return self._visited[timestep.storage_offset() - self.timesteps.storage_offset()]
        return int(timestep)

    def previous_timestep(self, timestep: int | torch.Tensor) -> int:
        """The timestep that the step from `timestep` leads to; -1 is the data.

        Before `set_timesteps` that is the one below. Raises ValueError for a timestep that the grid does not visit.
        """
        index = self._index(timestep)
        if self.num_inference_steps is None:
            return index - 1
        if index not in self._visited:
            raise ValueError(f"timestep: got {index}, expected one of scheduler.timesteps, {self._visited}")
        position = self._visited.index(index)
        return self._visited[position + 1] if position + 1 < len(self._visited) else -1

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """One ancestral step from x_t at `timestep` to x_prev at `previous_timestep(timestep)`.

        Args:
            model_output: (B, C, ...) of the config's prediction type; (B, 2C, ...) with a learned variance.
            timestep: an element of `self.timesteps`; no step waits for the device where that is passed on as it is.
            sample: (B, C, ...), x_t.
            generator: source of the noise, one or a list of B. No noise is drawn at timestep 0.

        Returns prev_sample and pred_original_sample, the (clipped) estimate of data.
        """
        t = self._index(timestep)
        prev_t = self.previous_timestep(t)
        prediction, predicted_variance = self._split_variance(model_output, sample)

        alpha_bar = self.alphas_cumprod[t]
        alpha_bar_prev = self.alphas_cumprod[prev_t] if prev_t >= 0 else self.one
        alpha = alpha_bar / alpha_bar_prev  # 1 - beta of a step that may skip some timesteps
        beta = 1 - alpha

        data = self._limit(self._estimate_data(prediction, sample, alpha_bar, t))
        # eq. 7: the mean of q(x_prev | x_t, data)
        data_factor = alpha_bar_prev**0.5 * beta / (1 - alpha_bar)
        sample_factor = alpha**0.5 * (1 - alpha_bar_prev) / (1 - alpha_bar)
        prev_sample = data_factor * data + sample_factor * sample

        if t > 0:
            noise = randn_tensor(prediction.shape, generator, device=prediction.device, dtype=prediction.dtype)
            prev_sample = prev_sample + self._deviation(alpha_bar, alpha_bar_prev, beta, predicted_variance) * noise

        if not return_dict:
            return prev_sample, data
        return DDPMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=data)

    def _split_variance(
        self, model_output: torch.Tensor, sample: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        learned = self.variance_type in ("learned", "learned_range")
        expected = (sample.shape[0], sample.shape[1] * (2 if learned else 1), *sample.shape[2:])
        if model_output.shape != expected:
            raise ValueError(
                f"model_output: got shape {tuple(model_output.shape)}, expected {expected} for a sample of shape "
                f"{tuple(sample.shape)} and variance_type {self.variance_type!r}"
            )
        if not learned:
            return model_output, None
        prediction, variance = model_output.split(sample.shape[1], dim=1)
        return prediction, variance

    def _estimate_data(
        self, prediction: torch.Tensor, sample: torch.Tensor, alpha_bar: torch.Tensor, t: int
    ) -> torch.Tensor:
        """Data from x_t = sqrt(alpha_bar) data + sqrt(1 - alpha_bar) noise and the prediction: eq. 15."""
        if self.config.prediction_type == "sample":
            return prediction
        if self.config.prediction_type == "v_prediction":  # 2202.00512, appendix D
            return alpha_bar**0.5 * sample - (1 - alpha_bar) ** 0.5 * prediction
        if alpha_bar == 0:
            raise ValueError(
                f"prediction_type: 'epsilon' leaves data unknown at timestep {t}, where x_t is all noise "
                "(zero terminal SNR); expected 'v_prediction' or 'sample', or a timestep_spacing that skips it"
            )
        return (sample - (1 - alpha_bar) ** 0.5 * prediction) / alpha_bar**0.5

    def _limit(self, data: torch.Tensor) -> torch.Tensor:
        if self.config.thresholding:
            return self._threshold(data)
        if self.config.clip_sample:
            return data.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        return data

    def _threshold(self, data: torch.Tensor) -> torch.Tensor:
        """2205.11487, section 2.3: clip each picture to a quantile s >= 1 of its magnitudes, then divide by s."""
        flat = data.flatten(1)
        if flat.dtype not in (torch.float32, torch.float64):
            flat = flat.float()  # quantile takes nothing smaller
        s = torch.quantile(flat.abs(), self.config.dynamic_thresholding_ratio, dim=1, keepdim=True)
        s = s.clamp(min=1, max=self.config.sample_max_value)
        return (flat.clamp(-s, s) / s).view(data.shape).to(data.dtype)

    def _deviation(
        self,
        alpha_bar: torch.Tensor,
        alpha_bar_prev: torch.Tensor,
        beta: torch.Tensor,
        predicted_variance: torch.Tensor | None,
    ) -> torch.Tensor:
        """Standard deviation of a step's noise; a scalar, or (B, C, ...) where it is learned."""
        # eq. 7; the floor keeps its logarithm finite in a step that ends in data
        smallest = ((1 - alpha_bar_prev) / (1 - alpha_bar) * beta).clamp(min=1e-20)
        if self.variance_type == "fixed_small":
            return smallest**0.5
        if self.variance_type == "fixed_small_log":
            return (0.5 * smallest.log()).exp()
        if self.variance_type == "fixed_large":
            return beta**0.5
        if self.variance_type == "fixed_large_log":  # diffusers takes the root of the logarithm here, which is NaN
            return (0.5 * beta.log()).exp()
        assert predicted_variance is not None
        if self.variance_type == "learned":
            return predicted_variance**0.5
        share = (predicted_variance + 1) / 2
        return (0.5 * (share * beta.log() + (1 - share) * smallest.log())).exp()

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t = sqrt(alpha_bar) data + sqrt(1 - alpha_bar) noise (eq. 4) at `timesteps` (B,); (B, C, ...)."""
        signal, spread = self._factors(original_samples, timesteps)
        return signal * original_samples + spread * noise

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) data (2202.00512, appendix D); `sample` is the data."""
        signal, spread = self._factors(sample, timesteps)
        return signal * noise - spread * sample

    def _factors(self, like: torch.Tensor, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(sqrt(alpha_bar), sqrt(1 - alpha_bar)), each (B, 1, ...) in the dtype and on the device of `like`."""
        alpha_bar = self.alphas_cumprod.to(like)[timesteps.to(like.device)]
        alpha_bar = alpha_bar.view(-1, *(1,) * (like.ndim - 1))
        return alpha_bar**0.5, (1 - alpha_bar) ** 0.5
