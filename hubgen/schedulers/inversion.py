"""Which scheduler walks from data to noise, and which one goes back the same way.

    down = solver(scheduler, "midpoint")    # the grid of a pipeline's scheduler, the steps of a method
    up = towards_noise(down)                # the same grid from below

A way there and back needs an ordinary differential equation: a flow, or DDIM along a variance-preserving path.
"""

from typing import Any

from hubgen.schedulers.ddim import DDIMScheduler
from hubgen.schedulers.ddim_inverse import DDIMInverseScheduler
from hubgen.schedulers.flow_match import FlowMatchScheduler
from hubgen.schedulers.flow_match_controlled import FlowMatchControlledScheduler
from hubgen.schedulers.flow_match_euler import FlowMatchEulerDiscreteScheduler
from hubgen.schedulers.flow_match_midpoint import FlowMatchFireFlowScheduler, FlowMatchMidpointScheduler
from hubgen.schedulers.variance_preserving import MODEL_PREDICTION_TYPES

METHODS: dict[str, type[FlowMatchEulerDiscreteScheduler]] = {
    "euler": FlowMatchEulerDiscreteScheduler,
    "midpoint": FlowMatchMidpointScheduler,
    "fireflow": FlowMatchFireFlowScheduler,
    "rf": FlowMatchControlledScheduler,
}
"""By the name of a method, its steps along a flow"""
# diffusers' classes for flows whose grid is that of Euler's steps
FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
# what config keys say that a schedule of betas is not the path of the weights, or not one of DDIM's
FOREIGN = ("use_flow_sigmas", "sigma_data", "original_inference_steps")


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler, ours or diffusers', walks along a flow on sigmas from 1 to 0."""
    known = isinstance(scheduler, FlowMatchScheduler) or type(scheduler).__name__ in FLOWS
    return known and not scheduler.config.get("stochastic_sampling", False)


def is_variance_preserving(scheduler: Any) -> bool:
    """Whether the weights that a scheduler, ours or diffusers', samples can be sampled by DDIM as well."""
    config = scheduler.config
    known = hasattr(scheduler, "alphas_cumprod") and config.get("prediction_type") in MODEL_PREDICTION_TYPES
    return known and "beta_schedule" in config and not any(config.get(key) for key in FOREIGN)


def solver(scheduler: Any, method: str) -> Any:
    """A new scheduler with the grids of `scheduler` and the steps of a method, from noise to data.

    DDIM's estimate of data is neither clipped nor thresholded, since that cannot be undone.

    Args:
        scheduler: Any, ours or diffusers'; it stays as it is.
        method: A key of `METHODS`; for variance-preserving paths "euler", which there is DDIM.

    Raises:
        ValueError: There is no such method, or none for this scheduler.
    """
    name = type(scheduler).__name__
    if method not in METHODS:
        raise ValueError(f"`method`: got {method!r}, expected one of {list(METHODS)}.")
    if is_flow(scheduler):
        found = METHODS[method].from_config(scheduler.config)
        found.set_shift(scheduler.shift)
        return found
    if not is_variance_preserving(scheduler):
        raise ValueError(
            f"`scheduler`: got a {name}, expected one of a flow ({', '.join(FLOWS)}, without stochastic sampling) "
            "or of weights that DDIM samples too: on other ways nothing is inverted."
        )
    if method != "euler":
        raise ValueError(
            f"`method`: got {method!r}, expected 'euler' with a {name}: on a variance-preserving path it is DDIM, and "
            "the others are for flows."
        )
    config = {key: value for key, value in scheduler.config.items() if key != "variance_type"}  # DDIM needs none
    return DDIMScheduler.from_config(config, clip_sample=False, thresholding=False)


def towards_noise(down: Any) -> Any:
    """A new scheduler that walks the grids of a `solver` from data to noise."""
    if isinstance(down, DDIMScheduler):
        return DDIMInverseScheduler.from_config(down.config)
    up = type(down).from_config(down.config)
    up.set_shift(down.shift)
    up.ascending = True
    return up
