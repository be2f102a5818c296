"""Euler steps along a learned flow: dx/dt = velocity(x, t) from t = 1 (noise) to t = 0 (data).

Rectified flow (2209.03003) with sigma = t, on a grid that SD3 (2403.03206, section 5.3.2) shifts towards noise and FLUX
shifts by resolution. One step: x_next = x + (sigma_next - sigma) velocity. With `stochastic_sampling` each step goes
to the estimate of data instead and noises it again to sigma_next.
"""

import importlib.util
import json
import logging
import math
from collections.abc import Sequence
from typing import Literal, TypeVar

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from hubgen.checks import whole
from hubgen.schedulers.flow_match import FlowMatchScheduler

Grid = TypeVar("Grid", np.ndarray, torch.Tensor)

logger = logging.getLogger(__name__)


class FlowMatchEulerDiscreteScheduler(FlowMatchScheduler):
    """Euler's method for flow matching, with the constructor, config and methods of diffusers' class of that name.

    Args:
        num_train_timesteps: the models' timestep at sigma = 1; a timestep is num_train_timesteps * sigma, a float.
        shift: the fixed shift s of sigma to s sigma / (1 + (s - 1) sigma), where `use_dynamic_shifting` is off.
        use_dynamic_shifting: shift by `mu` of `set_timesteps` instead, which the caller derives from the resolution.
        base_shift, max_shift, base_image_seq_len, max_image_seq_len: the line from the number of image tokens to mu,
            kept in the config for callers; the scheduler does not read them.
        invert_sigmas: run from sigma 0 to 1, for models whose time is reversed.
        shift_terminal: stretch the grid so that its last sigma before the end has this value.
        use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas: respace between the grid's ends by 2206.00364 eq. 5,
            evenly in log sigma, or by quantiles of Beta(0.6, 0.6) (2407.12173); at most one.
        time_shift_type: "exponential" shifts by e^mu, "linear" by mu itself.
        stochastic_sampling: noise the estimate of data again in each step.
        shift_once: diffusers shifts the lower end of the default grid twice (its issue 13243): at shift 3 the last
            sigma is 0.00893 where the shift of 1 / 1000 is 0.00299. False keeps that grid, and so the pictures; True
            shifts once, so that num_train_timesteps steps visit exactly the times of training. diffusers does not
            know this key and goes on without it, so that a pipeline with it is saved with hubgen's code.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: Literal["exponential", "linear"] = "exponential",
        stochastic_sampling: bool = False,
        shift_once: bool = False,
    ) -> None:
        if time_shift_type not in ("exponential", "linear"):
            raise ValueError(f"`time_shift_type`: got {time_shift_type!r}, expected 'exponential' or 'linear'")
        if use_beta_sigmas and importlib.util.find_spec("scipy") is None:
            raise ImportError(
                "use_beta_sigmas: scipy is not installed, expected it for the quantiles of Beta(0.6, 0.6)"
            )
        if use_karras_sigmas + use_exponential_sigmas + use_beta_sigmas > 1:
            raise ValueError(
                "`use_karras_sigmas`, `use_exponential_sigmas`, `use_beta_sigmas`: got several, expected at most one"
            )
        super().__init__(num_train_timesteps, shift, not use_dynamic_shifting, shift_once)

    def to_json_string(self) -> str:
        """The config as JSON; without `shift_once` where it is off, since diffusers does not know it."""
        config = json.loads(super().to_json_string())
        if not config.get("shift_once"):
            config.pop("shift_once", None)
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def time_shift(self, mu: float, sigma: float, t: Grid) -> Grid:
        """FLUX's shift of times t in (0, 1]: s / (s + (1 / t - 1)^sigma), s = e^mu or mu by `time_shift_type`.

        At sigma = 1 this is `shift` with the value s.
        """
        s = math.exp(mu) if self.config.time_shift_type == "exponential" else mu
        return s / (s + (1 / t - 1) ** sigma)

    def stretch_shift_to_terminal(self, t: Grid) -> Grid:
        """Stretches a descending grid t (n,) about 1 to end in `shift_terminal`; ValueError where it ends in 1."""
        if t[-1] == 1:
            raise ValueError(
                f"`shift_terminal`: got {self.config.shift_terminal} for a grid that ends in sigma 1, expected "
                "a grid that can be stretched: more steps, or a last sigma below 1"
            )
        return 1 - (1 - t) * ((1 - self.config.shift_terminal) / (1 - t[-1]))

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | np.ndarray | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | np.ndarray | None = None,
    ) -> None:
        """Lays the grid: `self.sigmas` (n + 1,), the last one the end, and `self.timesteps` (n,), both float32.

        Args:
            num_inference_steps: n, at least 1; may be left out where `sigmas` or `timesteps` tell it.
            sigmas: (n,) in [0, 1], before shifting.
            mu: the logarithm (or, "linear", the value) of the shift; needed for, and read by, dynamic shifting only.
            timesteps: (n,) what the model is told, used as given; alone, they stand for the sigmas before shifting.

        Raises ValueError for anything else.
        """
        if self.config.use_dynamic_shifting and mu is None:
            raise ValueError("`mu`: got None, expected a number, since use_dynamic_shifting is on")
        total = self.config.num_train_timesteps
        given_sigmas = self._check_grid("sigmas", sigmas, 1.0)
        given_timesteps = self._check_grid("timesteps", timesteps, float(total))
        steps = self._count_steps(num_inference_steps, given_sigmas, given_timesteps)

        if given_sigmas is not None:
            grid = given_sigmas
        elif given_timesteps is not None:
            grid = given_timesteps / total
            if self.config.use_dynamic_shifting or self.shift != 1:
                logger.warning(
                    "timesteps without sigmas: the model is told these timesteps, while the sigmas derived from them "
                    "are shifted. Pass sigmas, or both."
                )
        else:
            grid = self._even_sigmas(steps)
        grid = self._respace(self._shifted(grid, mu), steps)

        levels = torch.from_numpy(grid).to(device=device, dtype=torch.float32)
        if given_timesteps is not None and not self.config.invert_sigmas:
            model_times = torch.from_numpy(given_timesteps).to(device=device)
        else:
            if self.config.invert_sigmas:
                levels = 1.0 - levels
            model_times = levels * total
        end = 1.0 if self.config.invert_sigmas else 0.0
        self._lay(torch.cat([levels, levels.new_full((1,), end)]), model_times)
        self.num_inference_steps = steps
        self._step_index = None
        self._begin_index = None

    @staticmethod
    def _count_steps(steps: int | None, sigmas: np.ndarray | None, timesteps: np.ndarray | None) -> int:
        counts = {name: len(grid) for name, grid in (("sigmas", sigmas), ("timesteps", timesteps)) if grid is not None}
        if steps is not None:
            counts["num_inference_steps"] = whole("num_inference_steps", steps)
        if not counts:
            raise ValueError("`num_inference_steps`, `sigmas`, `timesteps`: got none, expected at least one of them")
        if len(set(counts.values())) > 1:
            names = ", ".join(f"`{name}`" for name in counts)
            raise ValueError(f"{names}: got lengths {list(counts.values())}, expected them to agree")
        return next(iter(counts.values()))

    def _shifted(self, sigmas: np.ndarray, mu: float | None) -> np.ndarray:
        if self.config.use_dynamic_shifting:
            assert mu is not None
            with np.errstate(divide="ignore"):  # sigma = 0 stays 0
                sigmas = self.time_shift(mu, 1.0, sigmas)
        else:
            sigmas = self._static_shift(sigmas)
        return self.stretch_shift_to_terminal(sigmas) if self.config.shift_terminal else sigmas

    def _respace(self, sigmas: np.ndarray, steps: int) -> np.ndarray:
        """Another spacing between the grid's two ends, where the config asks for one."""
        first, last = sigmas[0].item(), sigmas[-1].item()
        ramp = np.linspace(0, 1, steps)
        if self.config.use_karras_sigmas:
            rho = 7.0  # 2206.00364, eq. 5
            return (first ** (1 / rho) + ramp * (last ** (1 / rho) - first ** (1 / rho))) ** rho
        if self.config.use_exponential_sigmas:
            if last <= 0:
                raise ValueError(
                    "`sigmas`: got 0 as the last one, expected it above 0, since use_exponential_sigmas is on"
                )
            return np.exp(np.linspace(math.log(first), math.log(last), steps))
        if self.config.use_beta_sigmas:
            import scipy.stats  # heavy, and only needed here

            return last + scipy.stats.beta.ppf(1 - ramp, 0.6, 0.6) * (first - last)
        return sigmas

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
        per_token_timesteps: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[torch.Tensor]:
        """One Euler step from the current sigma to the next one.

        Args:
            model_output: (B, ...), the velocity noise - data at x_t.
            timestep: an element of `self.timesteps`; read in the first step only, and there only where no
                `set_begin_index` came before. The steps after it count for themselves.
            sample: (B, ...), x_t; summed in float32, returned in the dtype of `model_output`.
            s_churn, s_tmin, s_tmax, s_noise: of diffusers' signature, where they have no effect; an s_churn other
                than 0 is refused.
            generator: source of the noise of `stochastic_sampling`.
            per_token_timesteps: refused; in diffusers they serve video models whose frames have noise levels of
                their own, and turn the sign of `model_output`.
        """
        if s_churn != 0:
            raise ValueError(f"`s_churn`: got {s_churn}, expected 0; for noise in each step set stochastic_sampling")
        if per_token_timesteps is not None:
            raise ValueError("`per_token_timesteps`: got a tensor, expected None: all tokens share one timestep here")
        index = self._begin_step(timestep)
        prev_sample = self._advance(index, model_output, sample.float(), generator).to(model_output.dtype)
        self._step_index = index + 1
        if not return_dict:
            return (prev_sample,)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=prev_sample)

    def _advance(
        self,
        index: int,
        velocity: torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        """What the model is shown in call `index` + 1, or the end: (B, ...) float32, of the velocity at `sample`."""
        sigma, sigma_next = self.sigmas[index], self.sigmas[index + 1]
        if not self.config.stochastic_sampling:
            return sample + (sigma_next - sigma) * velocity
        data = sample - sigma * velocity
        noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
        return (1.0 - sigma_next) * data + sigma_next * noise
