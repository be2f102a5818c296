"""What all schedulers share: whose configs they understand, and the check of the number of steps.

`X.from_config(other.config)` builds X from what it knows of the config and keeps the rest, so that a config goes from
class to class and back without a loss. diffusers looks for the classes of `_compatibles` in itself only; here the same
names are looked for in hubgen as well.
"""

import importlib
import numbers
from typing import Any

from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin

BETA_SCHEDULERS = [scheduler.name for scheduler in KarrasDiffusionSchedulers]
FLOW_SCHEDULERS = ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"]


class CompatibleScheduler(SchedulerMixin, ConfigMixin):
    """diffusers' scheduler mixins, with hubgen's classes among the `compatibles`."""

    @classmethod
    def _get_compatibles(cls) -> list[Any]:
        """hubgen's classes first, then diffusers', in the order of `_compatibles`, the class itself at the front."""
        names = list(dict.fromkeys([cls.__name__, *cls._compatibles]))
        # the roots by name: both load their classes when first asked for them
        libraries = [importlib.import_module(name) for name in ("hubgen", "diffusers")]
        found = [getattr(library, name, None) for library in libraries for name in names]
        return [scheduler for scheduler in found if scheduler is not None]


def check_num_inference_steps(num_inference_steps: int | None, most: int | None = None) -> int:
    """Returns the number of steps as an int; raises ValueError unless it is a whole number from 1 to `most`."""
    if isinstance(num_inference_steps, numbers.Integral) and not isinstance(num_inference_steps, bool):
        if num_inference_steps >= 1 and (most is None or num_inference_steps <= most):
            return int(num_inference_steps)
    limit = "at least 1" if most is None else f"from 1 to {most} (num_train_timesteps)"
    raise ValueError(f"num_inference_steps: got {num_inference_steps!r}, expected a whole number {limit}")
