"""Predictor-corrector sampling of the variance-exploding SDE.

"Score-Based Generative Modeling through Stochastic Differential Equations" (2011.13456), algorithm 2 and section 4.2:

    dx = sqrt(d sigma(t)^2 / dt) dw      x_t = data + sigma(t) noise      sigma(t) = sigma_min (sigma_max / sigma_min)^t

Time runs from t = 1, where x_t is noise of the standard deviation sigma_max, down to t = sampling_eps. Each step first
corrects x_t at its own noise level (`step_correct`, Langevin dynamics), then predicts the x of the next, lower one
(`step_pred`, the reverse SDE's discretisation). The model is told sigma(t) and returns the score, the gradient of
log p(x_t).
"""

import math

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_sde_ve import SdeVeOutput
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from hubgen.checks import whole
from hubgen.schedulers.compatibility import CompatibleScheduler

Generator = torch.Generator | list[torch.Generator] | None


class ScoreSdeVeScheduler(CompatibleScheduler):
    """The sampler of NCSN++ with the constructor, config and methods of diffusers' class of the same name.

    One difference: `set_timesteps` sets the noise levels, too, so that a loop which knows nothing of `set_sigmas` does
    not sample with those of another number of steps.

    Args:
        num_train_timesteps: the number of steps before `set_timesteps` says another.
        snr: signal-to-noise ratio of the corrector, positive: 0.16 (CIFAR-10), 0.075 (256 pixels), 0.15 (1024).
        sigma_min: the noise level at t = 0, positive.
        sigma_max: the noise level at t = 1 and the standard deviation of the noise to start from, above sigma_min.
        sampling_eps: the time at which sampling ends, in [0, 1).
        correct_steps: corrector steps before each predictor step, 0 or more.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 2000,
        snr: float = 0.15,
        sigma_min: float = 0.01,
        sigma_max: float = 1348.0,
        sampling_eps: float = 1e-5,
        correct_steps: int = 1,
    ) -> None:
        if not snr > 0:
            raise ValueError(f"`snr`: got {snr!r}, expected a number above 0")
        if not isinstance(correct_steps, int) or isinstance(correct_steps, bool) or correct_steps < 0:
            raise ValueError(f"`correct_steps`: got {correct_steps!r}, expected a whole number, at least 0")
        self.init_noise_sigma = sigma_max
        self.set_timesteps(num_train_timesteps)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """The sample itself: NCSN++ takes x_t unscaled."""
        return sample

    def set_timesteps(
        self,
        num_inference_steps: int,
        sampling_eps: float | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        """Spaces the times evenly from 1 to `sampling_eps`, and the noise levels accordingly.

        Args:
            num_inference_steps: at least 1.
            sampling_eps: in place of the config's.
            device: where `self.timesteps` goes.

        Raises ValueError for anything else.
        """
        steps = whole("num_inference_steps", num_inference_steps)
        end = self.config.sampling_eps if sampling_eps is None else sampling_eps
        if not 0 <= end < 1:
            raise ValueError(f"`sampling_eps`: got {end!r}, expected a time in [0, 1)")
        self.timesteps = torch.linspace(1, end, steps, device=device)  # (n,)
        self.set_sigmas(steps)

    def set_sigmas(
        self,
        num_inference_steps: int,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        sampling_eps: float | None = None,
    ) -> None:
        """Sets the noise levels of the grid of `set_timesteps`.

        `sigmas` (n,) are those of the times, which the model is told; `discrete_sigmas` (n,), ascending, are those that
        the predictor goes down, evenly spaced in the logarithm from sigma_min to sigma_max (2011.13456, appendix C).

        Args:
            num_inference_steps: that of `set_timesteps`.
            sigma_min, sigma_max: in place of the config's.
            sampling_eps: that of `set_timesteps`.

        Raises ValueError for anything else.
        """
        low = self.config.sigma_min if sigma_min is None else sigma_min
        high = self.config.sigma_max if sigma_max is None else sigma_max
        if not 0 < low < high:
            raise ValueError(f"`sigma_min`, `sigma_max`: got {low!r} and {high!r}, expected 0 < sigma_min < sigma_max")
        steps = whole("num_inference_steps", num_inference_steps)
        if steps != len(self.timesteps):
            raise ValueError(
                f"`num_inference_steps`: got {steps}, expected that of set_timesteps, {len(self.timesteps)}: each time "
                "has a noise level"
            )
        if sampling_eps is not None and steps > 1 and not math.isclose(sampling_eps, self.timesteps[-1], rel_tol=1e-5):
            raise ValueError(
                f"`sampling_eps`: got {sampling_eps!r}, expected that of set_timesteps, {self.timesteps[-1].item():g}"
            )
        self.sigma_min, self.sigma_max = low, high
        device = self.timesteps.device
        self.sigmas = self.sigma(self.timesteps)
        self.discrete_sigmas = torch.linspace(math.log(low), math.log(high), steps, device=device).exp()

    def sigma(self, timestep: torch.Tensor) -> torch.Tensor:
        """The noise level that the model is told, sigma_min (sigma_max / sigma_min)^t; any shape."""
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** timestep

    def get_adjacent_sigma(self, timesteps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The noise level below the one of each index in `discrete_sigmas`; none below the lowest.

        Args:
            timesteps: (B,) int64, indices.
            t: (B,), the times; only their dtype counts.
        """
        below = self.discrete_sigmas.to(timesteps.device)[(timesteps - 1).clamp(min=0)]
        return torch.where(timesteps == 0, torch.zeros_like(below), below).to(t.dtype)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: Generator = None,
        return_dict: bool = True,
    ) -> SdeVeOutput | tuple[torch.Tensor, torch.Tensor]:
        """`step_pred`, except that the last step of the grid ends in the mean.

        The noise of the last step, of the standard deviation sigma_min, would only be seen (2011.13456, appendix G).
        """
        out = self.step_pred(model_output, timestep, sample, generator)
        time = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device)
        last = (time <= self.timesteps[-1].to(sample.device)).reshape(-1, *(1,) * (sample.ndim - 1))
        out.prev_sample = torch.where(last, out.prev_sample_mean, out.prev_sample)
        return out if return_dict else (out.prev_sample, out.prev_sample_mean)

    def step_pred(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: Generator = None,
        return_dict: bool = True,
    ) -> SdeVeOutput | tuple[torch.Tensor, torch.Tensor]:
        """The predictor: one step of the reverse SDE to the next lower noise level (eq. 46).

        x' = x + (sigma^2 - sigma'^2) score + sqrt(sigma^2 - sigma'^2) noise

        Args:
            model_output: (B, C, ...), the score at x.
            timestep: an element of `self.timesteps`, or (B,) of them.
            sample: (B, C, ...), x.
            generator: source of the noise, one or a list of B.

        Returns prev_sample, x', and prev_sample_mean, x' without the noise.

        Raises ValueError where the score's shape is not the sample's.
        """
        self._check_score(model_output, sample)
        times = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device).expand(len(sample))  # (B,)
        # In float32, as diffusers and the paper's code do it: rounding moves some indices of long grids by one.
        indices = (times * (len(self.timesteps) - 1)).long()
        sigma = self.discrete_sigmas.to(sample.device)[indices]
        removed = sigma**2 - self.get_adjacent_sigma(indices, times) ** 2  # (B,)
        deviation = (removed**0.5).view(-1, *(1,) * (sample.ndim - 1))
        noise = randn_tensor(sample.shape, generator, device=sample.device, dtype=sample.dtype)
        mean = sample + deviation**2 * model_output
        prev_sample = mean + deviation * noise
        if not return_dict:
            return prev_sample, mean
        return SdeVeOutput(prev_sample=prev_sample, prev_sample_mean=mean)

    def step_correct(
        self,
        model_output: torch.Tensor,
        sample: torch.Tensor,
        generator: Generator = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """The corrector: one step of Langevin dynamics at the sample's own noise level (algorithm 4).

        x' = x + e score + sqrt(2 e) noise        e = 2 (snr |noise| / |score|)^2

        with the norms' means over the batch: a picture's result depends on its neighbours.

        Args:
            model_output: (B, C, ...), the score at x.
            sample: (B, C, ...), x.
            generator: source of the noise, one or a list of B.

        Raises ValueError where the score's shape is not the sample's.
        """
        self._check_score(model_output, sample)
        noise = randn_tensor(sample.shape, generator, device=sample.device, dtype=sample.dtype)
        score_norm, noise_norm = (values.flatten(1).norm(dim=-1).mean() for values in (model_output, noise))
        step_size = 2 * (self.config.snr * noise_norm / score_norm) ** 2
        prev_sample = sample + step_size * model_output + (2 * step_size) ** 0.5 * noise
        return SchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)

    @staticmethod
    def _check_score(model_output: torch.Tensor, sample: torch.Tensor) -> None:
        if model_output.shape != sample.shape:
            raise ValueError(
                f"`model_output`: got shape {tuple(model_output.shape)}, expected the sample's, {tuple(sample.shape)}"
            )

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t = data + sigma noise, with sigma of the indices `timesteps` (B,) in `discrete_sigmas`; (B, C, ...)."""
        if timesteps.is_floating_point():
            raise ValueError(f"`timesteps`: got {timesteps.dtype}, expected indices of discrete_sigmas, whole numbers")
        sigmas = self.discrete_sigmas.to(original_samples)[timesteps.to(original_samples.device)]
        return original_samples + sigmas.view(-1, *(1,) * (original_samples.ndim - 1)) * noise
