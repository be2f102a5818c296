"""The learning rate as a function of the step alone, so that nothing of it needs saving."""

import math
from typing import Literal


def learning_rate_factor(
    step: int, schedule: Literal["constant", "cosine"], warmup_steps: int, max_train_steps: int
) -> float:
    """Share in [0, 1] of the peak learning rate for the optimizer step after `step` steps.

    It rises linearly over `warmup_steps`, then stays ("constant") or falls along half a cosine to 0 at
    `max_train_steps` ("cosine").
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    share = (step - warmup_steps) / max(max_train_steps - warmup_steps, 1)
    return 0.5 * (1.0 + math.cos(math.pi * min(share, 1.0)))
