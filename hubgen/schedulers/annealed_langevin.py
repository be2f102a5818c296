"""Annealed Langevin dynamics: NCSN's sampler (1907.05600, algorithm 1).

At each of L noise levels, from the highest to the lowest, some steps of Langevin dynamics with the score of that level:

    x' = x + a score + sqrt(2 a) noise        a = step_size (sigma_i / sigma_L)^2

This is what the authors' code does; the algorithm in the paper writes a / 2 and sqrt(a) for the same, so that its step
size is twice the one here.
"""

import math

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from hubgen.checks import whole
from hubgen.schedulers.compatibility import CompatibleScheduler

Generator = torch.Generator | list[torch.Generator] | None


class AnnealedLangevinScheduler(CompatibleScheduler):
    """The sampler of NCSN: a timestep is the number of a noise level, 0 for the highest; the model returns the score.

    Args:
        sigma_min: The lowest noise level, positive.
        sigma_max: The highest, above sigma_min; sampling starts at noise of this standard deviation.
        num_train_timesteps: L, the number of levels, at least 2, evenly spaced in the logarithm.
        steps_per_level: Steps at each level where `set_timesteps` does not say how many there are in all.
        step_size: a at the lowest level.
        denoise: Whether the last step adds no noise, and moves by sigma_L^2 score, to the mean of the data given x
            (2006.09011, section 3.4).
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        sigma_min: float = 0.01,
        sigma_max: float = 1.0,
        num_train_timesteps: int = 10,
        steps_per_level: int = 100,
        step_size: float = 2e-5,
        denoise: bool = True,
    ) -> None:
        if not 0 < sigma_min < sigma_max:
            raise ValueError(
                f"`sigma_min`, `sigma_max`: got {sigma_min!r} and {sigma_max!r}, expected 0 < sigma_min < sigma_max"
            )
        whole("num_train_timesteps", num_train_timesteps, least=2)
        whole("steps_per_level", steps_per_level)
        if not step_size > 0:
            raise ValueError(f"`step_size`: got {step_size!r}, expected a number above 0")
        self.sigmas = torch.linspace(math.log(sigma_max), math.log(sigma_min), num_train_timesteps).exp()  # (L,)
        self.init_noise_sigma = sigma_max
        self.set_timesteps(num_train_timesteps * steps_per_level)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def scale_model_input(self, sample: torch.Tensor, timestep: int | torch.Tensor | None = None) -> torch.Tensor:
        """The sample itself: NCSN takes x unscaled."""
        return sample

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Spreads the steps evenly over the levels.

        Args:
            num_inference_steps: In all; a multiple of the number of levels.
            device: Where `self.timesteps` goes.

        Raises:
            ValueError: Anything else.
        """
        steps, levels = whole("num_inference_steps", num_inference_steps), self.config.num_train_timesteps
        if steps % levels:
            raise ValueError(f"`num_inference_steps`: got {steps}, expected a multiple of the {levels} noise levels")
        self.num_inference_steps = steps
        self.timesteps = torch.arange(levels, device=device).repeat_interleave(steps // levels)  # (n,)
        self._step_index: int | None = None

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: Generator = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """One step of Langevin dynamics at a noise level.

        Args:
            model_output: (B, C, ...), the score at x.
            timestep: Number of the level.
            sample: (B, C, ...), x.
            generator: Source of the noise, one or a list of B.
            return_dict: Whether to return `SchedulerOutput` or a tuple.

        Raises:
            ValueError: The score's shape is not the sample's, or there is no such level.
        """
        if model_output.shape != sample.shape:
            raise ValueError(
                f"`model_output`: got shape {tuple(model_output.shape)}, expected the sample's, {tuple(sample.shape)}"
            )
        level = whole("timestep", int(timestep), 0, self.config.num_train_timesteps - 1)
        done = 0 if self._step_index is None else self._step_index
        self._step_index = done + 1
        sigma, last = self.sigmas[level].item(), self.sigmas[-1].item()
        if self.config.denoise and self._step_index == self.num_inference_steps:
            moved = sample + last**2 * model_output
        else:
            size = self.config.step_size * (sigma / last) ** 2
            noise = randn_tensor(sample.shape, generator, device=sample.device, dtype=sample.dtype)
            moved = sample + size * model_output + math.sqrt(2 * size) * noise
        return SchedulerOutput(prev_sample=moved) if return_dict else (moved,)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """data + sigma noise, with sigma of the levels `timesteps` (B,); (B, C, ...)."""
        sigmas = self.sigmas.to(original_samples)[timesteps.to(original_samples.device).long()]
        return original_samples + sigmas.view(-1, *(1,) * (original_samples.ndim - 1)) * noise
