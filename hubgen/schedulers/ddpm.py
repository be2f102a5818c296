"""Ancestral sampling of the DDPM chain: "Denoising Diffusion Probabilistic Models" (2006.11239), algorithm 2.

The reverse of the discretised variance-preserving SDE dx = -beta x / 2 dt + sqrt(beta) dw: each step draws from the
Gaussian posterior q(x_prev | x_t, data) of eq. 6 and 7, with the network's estimate in the place of data.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from hubgen.paths.betas import make_betas
from hubgen.schedulers.variance_preserving import VariancePreservingScheduler, check_choice

VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")


class DDPMScheduler(VariancePreservingScheduler):
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
        check_choice("variance_type", variance_type, VARIANCE_TYPES)
        betas = make_betas(
            beta_schedule, beta_start, beta_end, num_train_timesteps, trained_betas, rescale_betas_zero_snr
        )
        super().__init__(betas, prediction_type, timestep_spacing)
        self.one = torch.tensor(1.0)
        self.variance_type = variance_type

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
                f"`model_output`: got shape {tuple(model_output.shape)}, expected {expected} for a sample of shape "
                f"{tuple(sample.shape)} and variance_type {self.variance_type!r}"
            )
        if not learned:
            return model_output, None
        prediction, variance = model_output.split(sample.shape[1], dim=1)
        return prediction, variance

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
