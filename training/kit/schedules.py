"""The learning rate as a function of the step alone, so that nothing of it needs saving."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import SchedulerType, get_scheduler

from hubgen.errors import one_line
from hubgen.training.kit.parse import SettingsError

ENDLESS = ("constant", "constant_with_warmup", "inverse_sqrt")
"""Schedules that do not know where the run ends"""
WITH_STATE = ("reduce_lr_on_plateau", "greedy")
"""Of transformers, but functions of more than the step"""


def learning_rate_schedule(
    name: str, warmup_steps: int, max_train_steps: int, arguments: Mapping[str, Any] | None = None
) -> Callable[[int], float]:
    """A function of the number of steps done, to the share of the peak learning rate for the next one.

    It rises linearly over `warmup_steps`, from 1 / warmup_steps on so that the first step learns, and then goes as
    transformers' schedule of that name.

    Raises:
        SettingsError: No such schedule, or arguments that it does not take.
    """
    names = sorted(kind.value for kind in SchedulerType if kind.value not in WITH_STATE)
    if name not in names:
        raise SettingsError(f"setting 'optim.lr_schedule': got '{name}', expected one of {', '.join(names)}.")
    nothing = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    # "constant" of transformers has no warm-up; here it has, as every other.
    kind = "constant_with_warmup" if name == "constant" else name
    try:
        schedule: Any = get_scheduler(
            kind, nothing, warmup_steps, max_train_steps, scheduler_specific_kwargs=dict(arguments or {})
        )
        factor = schedule.lr_lambdas[0]
        factor(0), factor(max_train_steps)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise SettingsError(f"setting 'optim.lr_schedule_arguments': {name}: {one_line(error)}") from error
    return lambda step: float(factor(step + 1 if step < warmup_steps else step))
