"""Which scheduler classes understand a scheduler's config: hubgen's and diffusers' of the same names.

`X.from_config(other.config)` builds X from what it knows of the config and keeps the rest, so that a config goes from
class to class and back without a loss. diffusers looks for the classes of `_compatibles` in itself only; here the same
names are looked for in hubgen as well.
"""

import importlib
from typing import Any

from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin

BETA_SCHEDULERS = [scheduler.name for scheduler in KarrasDiffusionSchedulers]
FLOW_SCHEDULERS = ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"]


def named(library: Any, name: str) -> Any:
    """A library's class of a name; `None` where it has none, or where a model has brought hubgen's code without it."""
    try:
        return getattr(library, name, None)
    except ModuleNotFoundError:
        return None


class CompatibleScheduler(SchedulerMixin, ConfigMixin):
    """diffusers' scheduler mixins, with hubgen's classes among the `compatibles`."""

    @classmethod
    def _get_compatibles(cls) -> list[Any]:
        """hubgen's classes first, then diffusers', in the order of `_compatibles`, the class itself at the front."""
        names = list(dict.fromkeys([cls.__name__, *cls._compatibles]))
        # the roots by name: both load their classes when first asked for them
        libraries = [importlib.import_module(name) for name in ("hubgen", "diffusers")]
        found = [named(library, name) for library in libraries for name in names]
        # diffusers stands something in for a class whose package is missing, which fails when it is used
        missing = "diffusers.utils.dummy_"
        return [cls for cls in found if cls is not None and not cls.__module__.startswith(missing)]
