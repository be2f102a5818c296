"""A loss or gradient that is not finite stops a run before it reaches the weights."""

import math
from collections.abc import Sequence

import torch

from hubgen.training.checkpoints import Checkpoints


class NonFiniteError(ArithmeticError):
    """A loss or a gradient became NaN or infinite; training stopped before the optimizer's step."""


def finite_or_stop(checked: Sequence[torch.Tensor], step: int, names: Sequence[str], checkpoints: Checkpoints) -> float:
    """The loss, first of `checked`, as a number.

    Raises:
        NonFiniteError: The loss or the gradient's norm, second of `checked`, is not finite.
    """
    found = torch.stack([value.detach().float() for value in checked]).tolist()  # the one wait for the device
    if all(math.isfinite(value) for value in found):
        return found[0]
    kept = checkpoints.steps()
    raise NonFiniteError(
        f"step {step}: the loss is {found[0]}"
        + (f" and the gradient's norm {found[1]}" if len(found) > 1 else "")
        + f", expected finite numbers; the batch: {', '.join(names)}. "
        + (f"The checkpoint of step {kept[-1]} is kept." if kept else "There is no checkpoint yet.")
    )
