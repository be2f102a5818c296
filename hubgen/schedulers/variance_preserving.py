"""What every scheduler of the discrete variance-preserving chain shares.

    x_t = sqrt(alpha_bar_t) data + sqrt(1 - alpha_bar_t) noise          "DDPM" (2006.11239), eq. 4

for the timesteps t = 0 ... N - 1, with alpha_bar the running product of 1 - beta: the tables, the grids of timesteps,
the estimate of data in a prediction and its limits. What differs is the way back, `step`.
"""

from collections.abc import Sequence

import numpy as np
import torch

from hubgen.checks import whole
from hubgen.schedulers.compatibility import BETA_SCHEDULERS, CompatibleScheduler

MODEL_PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
TIMESTEP_SPACINGS = ("linspace", "leading", "trailing")


class VariancePreservingScheduler(CompatibleScheduler):
    """Base of the schedulers; a subclass registers its own arguments as the config, these among them.

    Args:
        betas: (N,), of `make_betas`.
        prediction_type: what the model predicts: "epsilon", "sample" or "v_prediction".
        timestep_spacing: where fewer than N steps lie, "linspace", "leading" or "trailing" (2305.08891, table 2).

    Read from the config: num_train_timesteps (N), steps_offset, prediction_type, timestep_spacing, clip_sample,
    clip_sample_range, thresholding, dynamic_thresholding_ratio, sample_max_value.
    """

    _compatibles = BETA_SCHEDULERS
    order = 1
    init_noise_sigma = 1.0

    def __init__(self, betas: torch.Tensor, prediction_type: str, timestep_spacing: str) -> None:
        check_choice("prediction_type", prediction_type, MODEL_PREDICTION_TYPES)
        check_choice("timestep_spacing", timestep_spacing, TIMESTEP_SPACINGS)
        # The tables stay on the CPU in float32, where diffusers has them: reading an entry never waits for a device,
        # and the same seed gives the same picture in both libraries.
        self.betas = betas
        self.alphas = 1.0 - betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)
        self.custom_timesteps = False
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(len(betas) - 1, -1, -1)

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
            raise ValueError(f"`num_inference_steps`, `timesteps`: got {found}, expected exactly one of them")
        if timesteps is not None:
            grid = self._check_timesteps(timesteps)
        else:
            grid = self._spaced_timesteps(
                whole("num_inference_steps", num_inference_steps, most=self.config.num_train_timesteps)
            )
        self.custom_timesteps = timesteps is not None
        self.num_inference_steps = len(grid)
        self._timesteps, self._visited = torch.from_numpy(grid).to(device), grid.tolist()

    def _check_timesteps(self, timesteps: Sequence[int]) -> np.ndarray:
        grid = np.asarray(timesteps)
        last = self.config.num_train_timesteps - 1
        if grid.ndim != 1 or grid.size == 0 or not np.issubdtype(grid.dtype, np.integer):
            raise ValueError(f"`timesteps`: got {timesteps!r}, expected a non-empty list of whole numbers")
        if (np.diff(grid) >= 0).any() or grid[0] > last or grid[-1] < 0:
            raise ValueError(f"`timesteps`: got {grid.tolist()}, expected descending numbers within [0, {last}]")
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
                    f"`steps_offset`: got {self.config.steps_offset}, which starts {steps} steps at {grid[0]}, "
                    f"expected a start below num_train_timesteps, {total}"
                )
        else:
            # not total - i * total / steps, which falls on the other side of some halves than diffusers' grid
            grid = np.arange(total, 0, -total / steps)[:steps].round() - 1
        return grid.astype(np.int64)

    def _index(self, timestep: int | torch.Tensor) -> int:
        """The timestep as a number, without a wait where it is an element of `self.timesteps` on a device."""
        if isinstance(timestep, torch.Tensor) and timestep.numel() != 1:
            raise ValueError(
                f"`timestep`: got a tensor of shape {tuple(timestep.shape)}, expected one timestep for all"
            )
        if isinstance(timestep, torch.Tensor) and timestep.device.type != "cpu":
            own = timestep.untyped_storage().data_ptr() == self.timesteps.untyped_storage().data_ptr()
            if own:
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
            raise ValueError(f"`timestep`: got {index}, expected one of scheduler.timesteps, {self._visited}")
        position = self._visited.index(index)
        return self._visited[position + 1] if position + 1 < len(self._visited) else -1

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


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    """Raises ValueError unless `value`, of the argument `name`, is one of `known`."""
    if value not in known:
        raise ValueError(f"`{name}`: got {value!r}, expected one of {list(known)}")
