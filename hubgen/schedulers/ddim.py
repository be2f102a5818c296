"""Steps that skip: "Denoising Diffusion Implicit Models" (2010.02502), eq. 12 and 16, and their inversion.

One family of ways back along the variance-preserving path. With eta = 0 a step is deterministic: an Euler step of the
probability-flow ODE in x / sqrt(alpha_bar) over sqrt(1 / alpha_bar - 1), which also goes from data to noise
(2105.05233, appendix F). With eta = 1 it is DDPM's ancestral step with the posterior's variance.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from hubgen.paths.betas import make_betas
from hubgen.schedulers.variance_preserving import VariancePreservingScheduler


class DDIMScheduler(VariancePreservingScheduler):
    """DDIM with the constructor, config and methods of diffusers' class of the same name.

    Args:
        num_train_timesteps: N, the length of the chain that the model was trained on.
        beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: see `make_betas`.
        clip_sample, clip_sample_range: whether and to which magnitude the estimate of data is clipped in each step.
        set_alpha_to_one: the last step ends in data (alpha_bar = 1); False: at the noise level of timestep 0.
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
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: Literal["leading", "trailing", "linspace"] = "leading",
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        betas = make_betas(
            beta_schedule, beta_start, beta_end, num_train_timesteps, trained_betas, rescale_betas_zero_snr
        )
        super().__init__(betas, prediction_type, timestep_spacing)
        self.final_alpha_cumprod = torch.tensor(1.0) if set_alpha_to_one else self.alphas_cumprod[0]

    def previous_timestep(self, timestep: int | torch.Tensor) -> int:
        """The timestep that the step from `timestep` leads to; -1 is the end, data.

        On an evenly spaced grid that is N // num_inference_steps further down, as in diffusers: the next entry of a
        "leading" grid, and of a "trailing" one that divides N; elsewhere up to a few timesteps beside it. On a grid
        that `set_timesteps` was given it is the next entry. Raises ValueError before `set_timesteps`, for a timestep
        outside [0, N), and for one that the given grid does not visit.
        """
        if self.num_inference_steps is None:
            raise ValueError("`num_inference_steps`: got None, expected set_timesteps before the first step")
        total = self.config.num_train_timesteps
        index = self._index(timestep)
        if not 0 <= index < total:
            raise ValueError(f"`timestep`: got {index}, expected a whole number in [0, {total - 1}]")
        if self.custom_timesteps:
            return super().previous_timestep(index)
        return max(index - total // self.num_inference_steps, -1)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """One step from x_t at `timestep` to x_prev at `previous_timestep(timestep)`.

        Args:
            model_output: (B, C, ...) of the config's prediction type.
            timestep: an element of `self.timesteps`; no step waits for the device where that is passed on as it is.
            sample: (B, C, ...), x_t.
            eta: in [0, 1], the share of DDPM's noise (its standard deviation): 0 draws none.
            use_clipped_model_output: derive the noise in x_t from the clipped estimate of data, so that both still
                add up to x_t.
            generator: source of the noise, one or a list of B.
            variance_noise: (B, C, ...), the noise itself, in place of a generator.

        Returns prev_sample and pred_original_sample, the (clipped) estimate of data. Raises ValueError for an eta
        outside [0, 1], a prediction of another shape, and where both a generator and noise were given.
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"`eta`: got {eta}, expected a number in [0, 1]")
        if generator is not None and variance_noise is not None:
            raise ValueError("`generator`, `variance_noise`: got both, expected at most one of them")
        t = self._index(timestep)
        alpha_bar_prev = self._alpha_bar(self.previous_timestep(t))
        alpha_bar = self._alpha_bar(t)
        data, noise = self._estimate(model_output, sample, alpha_bar, t)
        data = self._limit(data)
        if use_clipped_model_output:
            noise = (sample - alpha_bar**0.5 * data) / (1 - alpha_bar) ** 0.5

        # eq. 16
        variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)
        deviation = eta * variance**0.5
        # eq. 12; where alpha_bar = 0 and eta = 1 rounding takes the difference below 0
        noise_factor = (1 - alpha_bar_prev - deviation**2).clamp(min=0) ** 0.5
        prev_sample = alpha_bar_prev**0.5 * data + noise_factor * noise
        if eta > 0:
            if variance_noise is None:
                variance_noise = randn_tensor(
                    model_output.shape, generator, device=model_output.device, dtype=model_output.dtype
                )
            prev_sample = prev_sample + deviation * variance_noise

        if not return_dict:
            return prev_sample, data
        return DDIMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=data)

    def invert_step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """One step towards noise: from x_prev at `previous_timestep(timestep)` to x_t at `timestep`.

        A picture's noise, from which `step` with eta = 0 makes the picture again, to an error that falls with the
        number of steps:

            for t in scheduler.timesteps.flip(0):
                x = scheduler.invert_step(model(x, t), t, x).prev_sample

        The numbers are those of diffusers' DDIMInverseScheduler, whose timesteps are these in ascending order. For
        noise as the prediction, and without clipping, `invert_step` undoes `step` exactly where both are given the
        same prediction. Clipping and thresholding bend the way; switch them off to invert.

        Args:
            model_output: (B, C, ...) of the config's prediction type, at `sample` and `timestep`.
            timestep: as in `step`.
            sample: (B, C, ...), x_prev; the data itself in the first step.

        Returns x_t, under the name prev_sample, and pred_original_sample. Raises ValueError as `step` does, and
        where the prediction is data at the data itself, which says nothing about the noise.
        """
        t = self._index(timestep)
        source = self.previous_timestep(t)
        alpha_bar = self._alpha_bar(source)
        data, noise = self._estimate(model_output, sample, alpha_bar, source)
        data = self._limit(data)
        target = self._alpha_bar(t)
        inverted = target**0.5 * data + (1 - target) ** 0.5 * noise
        if not return_dict:
            return inverted, data
        return DDIMSchedulerOutput(prev_sample=inverted, pred_original_sample=data)

    def _alpha_bar(self, t: int) -> torch.Tensor:
        return self.alphas_cumprod[t] if t >= 0 else self.final_alpha_cumprod

    def _estimate(
        self, prediction: torch.Tensor, sample: torch.Tensor, alpha_bar: torch.Tensor, t: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(data, noise) of x_t and the prediction, before any clipping."""
        if prediction.shape != sample.shape:
            raise ValueError(
                f"`model_output`: got shape {tuple(prediction.shape)}, expected that of sample, {tuple(sample.shape)}"
            )
        data = self._estimate_data(prediction, sample, alpha_bar, t)
        if self.config.prediction_type == "epsilon":
            return data, prediction
        if self.config.prediction_type == "v_prediction":  # 2202.00512, appendix D
            return data, alpha_bar**0.5 * prediction + (1 - alpha_bar) ** 0.5 * sample
        if alpha_bar == 1:
            raise ValueError(
                "prediction_type: 'sample' leaves the noise unknown at the data itself; expected 'epsilon' or "
                "'v_prediction', or set_alpha_to_one=False, to invert"
            )
        return data, (sample - alpha_bar**0.5 * data) / (1 - alpha_bar) ** 0.5
