"""Checks that the schedulers' timestep grids share."""

import numbers


def check_num_inference_steps(num_inference_steps: int | None, most: int | None = None) -> int:
    """Returns the number of steps as an int; raises ValueError unless it is a whole number from 1 to `most`."""
    if isinstance(num_inference_steps, numbers.Integral) and not isinstance(num_inference_steps, bool):
        if num_inference_steps >= 1 and (most is None or num_inference_steps <= most):
            return int(num_inference_steps)
    limit = "at least 1" if most is None else f"from 1 to {most} (num_train_timesteps)"
    raise ValueError(f"num_inference_steps: got {num_inference_steps!r}, expected a whole number {limit}")
