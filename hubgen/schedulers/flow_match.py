"""What the flow-matching schedulers share: the grid of sigmas, where a run stands in it, and noising to it.

x_t = (1 - sigma) data + sigma noise,    sigma = t from 1 (noise) to 0 (data)          rectified flow (2209.03003)
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

from hubgen.schedulers.compatibility import FLOW_SCHEDULERS, CompatibleScheduler


class FlowMatchScheduler(CompatibleScheduler):
    """Base of the schedulers; a subclass registers its own arguments as the config, these among them.

    Args:
        num_train_timesteps: the models' timestep at sigma = 1; a timestep is num_train_timesteps * sigma, a float.
        shift: the fixed shift s of sigma to s sigma / (1 + (s - 1) sigma).
        shift_default: whether the default grid is shifted; dynamic shifting knows its shift only later.
        shift_once: whether `sigma_max` and `sigma_min`, between which `set_timesteps` lays a grid and shifts it, are
            the ends before the shift; diffusers has them after it, and so shifts the lower end twice.
    """

    _compatibles = FLOW_SCHEDULERS
    order = 1
    ascending = False
    """Whether grids are walked from data to noise, as inversion does; `set_timesteps` reads it"""

    def __init__(
        self, num_train_timesteps: int, shift: float, shift_default: bool = True, shift_once: bool = False
    ) -> None:
        if num_train_timesteps < 1:
            raise ValueError(f"`num_train_timesteps`: got {num_train_timesteps}, expected at least 1")
        self.set_shift(shift)
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self.num_inference_steps: int | None = None

        times = torch.arange(num_train_timesteps, 0, -1, dtype=torch.float32) / num_train_timesteps
        self.sigmas = shift * times / (1 + (shift - 1) * times) if shift_default else times
        self.timesteps = self.sigmas * num_train_timesteps
        ends = times if shift_once else self.sigmas
        self.sigma_max, self.sigma_min = ends[0].item(), ends[-1].item()

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    @property
    def shift(self) -> float:
        """The fixed shift that `set_timesteps` applies."""
        return self._shift

    def set_shift(self, shift: float) -> None:
        """Replaces the fixed shift from the next `set_timesteps` on; raises ValueError unless above 0."""
        if not (math.isfinite(shift) and shift > 0):
            raise ValueError(f"`shift`: got {shift}, expected a finite number above 0")
        self._shift = shift

    @property
    def step_index(self) -> int | None:
        """The index of the next step; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The index of the first step, where the caller has set it."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Starts the next run at this step (image to image starts late); saves the search, which waits for a device."""
        self._begin_index = begin_index

    def _even_sigmas(self, steps: int) -> np.ndarray:
        """(steps,) float64, evenly between `sigma_max` and `sigma_min`, before the shift."""
        total = self.config.num_train_timesteps
        return np.linspace(self.sigma_max * total, self.sigma_min * total, steps) / total

    def _static_shift(self, sigmas: np.ndarray) -> np.ndarray:
        return self.shift * sigmas / (1 + (self.shift - 1) * sigmas)

    def _lay(self, sigmas: torch.Tensor, timesteps: torch.Tensor) -> None:
        """Sets the grid of a run, or the same upside down.

        Args:
            sigmas: (m + 1,), one for each call of the model and the end, from noise to data.
            timesteps: (m,), what the model is told in each call.
        """
        if self.ascending:
            end = sigmas[-1:].to(timesteps) * self.config.num_train_timesteps
            sigmas, timesteps = sigmas.flip(0), torch.cat([end, timesteps[1:].flip(0)])
        self.sigmas, self.timesteps = sigmas, timesteps

    @staticmethod
    def _check_grid(name: str, values: Sequence[float] | np.ndarray | None, most: float) -> np.ndarray | None:
        if values is None:
            return None
        grid = np.asarray(values, dtype=np.float32)
        if grid.ndim != 1 or grid.size == 0 or not ((grid >= 0) & (grid <= most)).all():
            raise ValueError(f"`{name}`: got {values!r}, expected a non-empty list of numbers in [0, {most:g}]")
        return grid

    def index_for_timestep(self, timestep: float | torch.Tensor, schedule_timesteps: torch.Tensor | None = None) -> int:
        """The position of `timestep` in the grid, the second one where it stands there several times.

        Reads values back from the device. Raises ValueError for a timestep that is not in the grid.
        """
        grid = (self.timesteps if schedule_timesteps is None else schedule_timesteps).tolist()
        value = float(timestep) if not isinstance(timestep, torch.Tensor) else timestep.item()
        positions = [index for index, entry in enumerate(grid) if entry == value]
        if not positions:
            raise ValueError(f"`timestep`: got {value}, expected one of scheduler.timesteps, {grid}")
        return positions[min(1, len(positions) - 1)]

    def scale_noise(
        self, sample: torch.Tensor, timestep: float | torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x_t = (1 - sigma) data + sigma noise at `timestep`, one or (B,) elements of the grid; (B, C, ...).

        In a run of the sampler the sigma is that of the next step, whatever `timestep` holds: before the first step
        that of `begin_index` (image to image), afterwards that of `step_index` (inpainting).
        """
        if noise is None:
            raise ValueError("`noise`: got None, expected a tensor like sample")
        timesteps = torch.atleast_1d(torch.as_tensor(timestep))
        if self.begin_index is None:
            indices = [self.index_for_timestep(t) for t in timesteps]
        else:
            indices = [self.begin_index if self.step_index is None else self.step_index] * len(timesteps)
        sigma = self.sigmas.to(sample)[indices].view(-1, *(1,) * (sample.ndim - 1))
        return sigma * noise + (1.0 - sigma) * sample

    def _begin_step(self, timestep: float | torch.Tensor) -> int:
        """The index of the step that is to be done; `timestep` tells it where nothing else does."""
        if isinstance(timestep, int) or (isinstance(timestep, torch.Tensor) and not timestep.is_floating_point()):
            raise ValueError(f"`timestep`: got the whole number {timestep}, expected an element of scheduler.timesteps")
        if self._step_index is None:
            self._step_index = self.index_for_timestep(timestep) if self.begin_index is None else self.begin_index
        if self._step_index + 1 >= len(self.sigmas):
            raise ValueError(
                f"step: all {len(self.sigmas) - 1} steps are done, expected set_timesteps before another run"
            )
        return self._step_index
