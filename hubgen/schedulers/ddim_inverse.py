"""DDIM from data to noise: the noise from which DDIM makes a picture again (2010.02502; 2105.05233, appendix F)."""

from collections.abc import Sequence

import torch
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput

from hubgen.schedulers.ddim import DDIMScheduler


class DDIMInverseScheduler(DDIMScheduler):
    """The grid of `DDIMScheduler` in ascending order; `step` is its `invert_step`.

    Takes what `DDIMScheduler` takes; diffusers' class of this name knows no thresholding.
    """

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """As `DDIMScheduler.set_timesteps`: `timesteps` descend here too, and are visited from the last one up."""
        super().set_timesteps(num_inference_steps, device, timesteps)
        self._timesteps, self._visited = self._timesteps.flip(0), self._visited[::-1]

    def previous_timestep(self, timestep: int | torch.Tensor) -> int:
        """The timestep that the step to `timestep` comes from; -1 is the data. As in `DDIMScheduler` otherwise."""
        if not self.custom_timesteps:
            return super().previous_timestep(timestep)
        index = self._index(timestep)
        if index not in self._visited:
            raise ValueError(f"`timestep`: got {index}, expected one of scheduler.timesteps, {self._visited}")
        return [-1, *self._visited][self._visited.index(index)]

    def step(  # type: ignore[override]
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """One step up, to x_t at `timestep`: `DDIMScheduler.invert_step`; there is no `eta` on this way."""
        return self.invert_step(model_output, timestep, sample, return_dict)
