"""A loss or gradient that is not finite stops a run before it reaches the weights."""

import math
from collections.abc import Callable, Sequence

import torch


class NonFiniteError(ArithmeticError):
    """A loss or a gradient became NaN or infinite; training stopped before the optimizer's step."""


def finite_or_stop(
    losses: Sequence[torch.Tensor],
    names: Sequence[Sequence[str]],
    norm: torch.Tensor | None,
    step: int,
    kept_steps: Callable[[], Sequence[int]],
) -> None:
    """Looks at what a step would move the weights by; the one moment that waits for the device.

    Args:
        losses: Of each batch of the step, scalars.
        names: Of the pictures of each batch.
        norm: Of the gradient; `None` where it may overflow now and then (float16, whose scaler skips such steps).
        step: Number of the step.
        kept_steps: Tells the steps of the checkpoints that there are; asked only if something is wrong.

    Raises:
        NonFiniteError: One of them is not finite; names the batch.
    """
    values = [*losses] if norm is None else [*losses, norm]
    found = torch.stack([value.detach().float().reshape(()) for value in values]).tolist()
    if all(math.isfinite(value) for value in found):
        return
    kept = kept_steps()
    bad = [number for number in range(len(losses)) if not math.isfinite(found[number])] or range(len(losses))
    what = f"the loss is {found[bad[0]]}" + ("" if norm is None else f" and the gradient's norm {found[-1]}")
    raise NonFiniteError(
        f"step {step}: {what}, expected finite numbers; the batch: "
        f"{', '.join(name for number in bad for name in names[number])}. "
        + (f"The checkpoint of step {kept[-1]} is kept." if kept else "There is no checkpoint yet.")
    )
