"""Heun's method along a learned flow: dx/dt = velocity(x, t) from t = 1 (noise) to t = 0 (data), to second order.

A step from sigma to sigma_next takes two calls of the model (2206.00364, algorithm 1, for rectified flow):

    stage 1    x'     = x + (sigma_next - sigma) velocity(x, sigma)
    stage 2    x_next = x + (sigma_next - sigma) (velocity(x, sigma) + velocity(x', sigma_next)) / 2

The last step, to sigma = 0, has its first stage only.
"""

from collections.abc import Sequence

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from hubgen.checks import whole
from hubgen.schedulers.flow_match import FlowMatchScheduler


class FlowMatchHeunDiscreteScheduler(FlowMatchScheduler):
    """Heun's method for flow matching, with the constructor, config and methods of diffusers' class of that name.

    Args:
        num_train_timesteps: the models' timestep at sigma = 1; a timestep is num_train_timesteps * sigma, a float.
        shift: the fixed shift s of sigma to s sigma / (1 + (s - 1) sigma). As in diffusers, the lower end of the
            default grid is shifted twice; `sigmas` of `set_timesteps` are shifted once.
    """

    order = 2

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000, shift: float = 1.0) -> None:
        super().__init__(num_train_timesteps, shift)
        self._forget_stage()

    def _forget_stage(self) -> None:
        # diffusers' names: what the second stage needs from the first
        self.prev_derivative: torch.Tensor | None = None
        self.dt: torch.Tensor | None = None
        self.sample: torch.Tensor | None = None

    @property
    def state_in_first_order(self) -> bool:
        """Whether the next call of `step` is a first stage."""
        return self.dt is None

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | np.ndarray | None = None,
    ) -> None:
        """Lays the grid of n sigmas: `self.timesteps` (2 n - 1,), an entry for each call of the model, float32.

        `self.sigmas` (2 n,) has each sigma but the first and the end twice, so that entry i belongs to timestep i.

        Args:
            num_inference_steps: n, at least 1; may be left out where `sigmas` tell it.
            device: where both go.
            sigmas: (n,) in [0, 1], before shifting.

        Raises ValueError for anything else.
        """
        given = self._check_grid("sigmas", sigmas, 1.0)
        if given is not None and num_inference_steps not in (None, len(given)):
            raise ValueError(
                f"`num_inference_steps`: got {num_inference_steps} beside {len(given)} sigmas, expected them to agree"
            )
        steps = whole("num_inference_steps", len(given) if given is not None else num_inference_steps)
        grid = self._static_shift(self._even_sigmas(steps) if given is None else given)
        levels = torch.from_numpy(grid).to(device=device, dtype=torch.float32)
        levels = torch.cat([levels[:1], levels[1:].repeat_interleave(2)])
        self._lay(torch.cat([levels, levels.new_zeros(1)]), levels * self.config.num_train_timesteps)
        self.num_inference_steps = steps
        self._step_index = None
        self._begin_index = None
        self._forget_stage()

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> FlowMatchHeunDiscreteSchedulerOutput | tuple[torch.Tensor]:
        """One stage of a step.

        Args:
            model_output: (B, ...), the velocity noise - data at `sample`.
            timestep: an element of `self.timesteps`; read in the first call only, and there only where no
                `set_begin_index` came before. The calls after it count for themselves.
            sample: (B, ...), the previous call's result; summed in float32, returned in the dtype of `model_output`.
            s_churn: above 0, adds noise in each step, as diffusers' class does: the step then starts at
                sigma (1 + min(s_churn / number of calls, sqrt(2) - 1)). Such a step waits for the device.
            s_tmin, s_tmax: the sigmas between which noise is added.
            s_noise: the standard deviation of that noise.
            generator: source of that noise.

        Raises ValueError where a run begins at a second stage, and after the last step.
        """
        index = self._begin_step(timestep)
        first = self.state_in_first_order
        if first == bool(index % 2):
            raise ValueError(
                f"`begin_index`: got {index}, a second stage, expected an even number: two calls of `step` are one step"
            )
        start = index if first else index - 1
        sigma, sigma_next = self.sigmas[start], self.sigmas[start + 1]

        gamma = 0.0
        if s_churn > 0 and s_tmin <= sigma.item() <= s_tmax:
            gamma = min(s_churn / (len(self.sigmas) - 1), 2**0.5 - 1)
            # Drawn in the second stage too, where it changes nothing, so that a seed means what it means in diffusers.
            noise = randn_tensor(model_output.shape, generator, device=model_output.device, dtype=model_output.dtype)
        if first:
            self.sample = sample.float()
            if gamma > 0:
                self.sample = self.sample + s_noise * noise * ((sigma * (gamma + 1)) ** 2 - sigma**2) ** 0.5
            self.dt = sigma_next - sigma * (gamma + 1)
            self.prev_derivative = model_output.float() / (gamma + 1)
            prev_sample = self.sample + self.dt * self.prev_derivative
        else:
            assert self.sample is not None and self.dt is not None and self.prev_derivative is not None
            prev_sample = self.sample + self.dt * (0.5 * (self.prev_derivative + model_output.float()))
        if not first or index + 2 == len(self.sigmas):  # the last step has one stage
            self._forget_stage()

        self._step_index = index + 1
        prev_sample = prev_sample.to(model_output.dtype)
        if not return_dict:
            return (prev_sample,)
        return FlowMatchHeunDiscreteSchedulerOutput(prev_sample=prev_sample)
