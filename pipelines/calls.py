"""What the calls of all pipelines share: checks before any heavy work, the scheduler's grid, pixels to pictures."""

import inspect
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor

from hubgen.autoencoders.latents import decode
from hubgen.conditioning.inputs import attention_argument

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def require_whole(name: str, value: object) -> None:
    """Raises ValueError unless `value` is a whole number above 0."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{name}`: got {value!r}, expected a whole number, at least 1.")


def check_generator(generator: Any, batch: int) -> None:
    """Raises ValueError unless `generator` is None, one, or a list with one for each of `batch` pictures."""
    generators = generator if isinstance(generator, list | tuple) else [generator] * batch
    if len(generators) != batch:
        raise ValueError(f"`generator`: got a list of {len(generators)}, expected one for each of {batch} pictures.")
    for one in generators:
        if not (isinstance(one, torch.Generator) or (one is None and generator is None)):
            raise ValueError(f"`generator`: got {one!r}, expected a torch.Generator or a list of them.")


def check_latents(latents: Any, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless `latents` are None or a tensor of `shape`."""
    if latents is not None and (not torch.is_tensor(latents) or tuple(latents.shape) != shape):
        found = tuple(latents.shape) if torch.is_tensor(latents) else repr(latents)
        raise ValueError(f"`latents`: got {found}, expected a tensor of shape {shape}.")


def check_size(name: str, side: object, multiple: int) -> None:
    """Raises ValueError unless a side in pixels is a multiple of `multiple`; names the nearest that are."""
    require_whole(name, side)
    assert isinstance(side, int)
    if side % multiple:
        below, above = side // multiple * multiple, (side // multiple + 1) * multiple
        nearest = " or ".join(str(n) for n in (below, above) if n)
        raise ValueError(f"`{name}`: got {side}, expected a multiple of {multiple}; the nearest: {nearest}.")


def check_output(output_type: str, callback: Any, callback_tensors: Sequence[str], known: Sequence[str]) -> None:
    """Raises ValueError for an unknown `output_type` or a callback that cannot be served."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"`output_type`: got {output_type!r}, expected one of {OUTPUT_TYPES}.")
    if callback is not None and not callable(callback):
        raise ValueError(f"`callback_on_step_end`: got {callback!r}, expected something to call.")
    check_tensor_names("callback_on_step_end_tensor_inputs", callback_tensors, known)


def check_tensor_names(argument: str, names: Sequence[str] | dict[str, Any], known: Sequence[str]) -> None:
    """Raises ValueError for names of tensors that a callback may not ask for or change."""
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"`{argument}`: got {unknown}, expected names of {list(known)}.")


def attention_options(
    backbone: Any, cross: Mapping[str, Any] | None, joint: Mapping[str, Any] | None
) -> Mapping[str, Any] | None:
    """Options for the attention processors of a backbone: a U-Net's `cross` or a transformer's `joint`.

    Raises:
        ValueError: The other one of the two was given.
    """
    known = attention_argument(backbone)
    for name, value in (("cross_attention_kwargs", cross), ("joint_attention_kwargs", joint)):
        if value is not None and name != known:
            raise ValueError(f"`{name}`: got {value!r}, expected none: {type(backbone).__name__} takes `{known}`.")
    return cross if joint is None else joint


def check_eta(scheduler: Any, eta: float) -> dict[str, Any]:
    """`eta` as an option of the scheduler's `step`; raises ValueError if it is not 0 and the scheduler takes none."""
    if not eta:
        return {}
    if "eta" not in inspect.signature(scheduler.step).parameters:
        raise ValueError(f"`eta`: got {eta!r}, expected 0: {type(scheduler).__name__} takes none.")
    return {"eta": eta}


def set_grid(
    scheduler: Any,
    num_inference_steps: int | None,
    timesteps: Sequence[float] | None,
    sigmas: Sequence[float] | None,
    default_steps: int,
    device: torch.device,
    mu: float | None = None,
) -> torch.Tensor:
    """Sets the scheduler's grid and returns its timesteps, (n,) on `device`.

    Args:
        scheduler: One of ours or of diffusers'.
        num_inference_steps: `None` for `default_steps`, or for as many as `timesteps` or `sigmas` has.
        timesteps: The grid, instead of the scheduler's own; or
        sigmas: the same in terms of noise.
        default_steps: See `num_inference_steps`.
        device: Where the grid goes.
        mu: Shift of the timesteps, for schedulers with dynamic shifting.

    Raises:
        ValueError: Not a whole number of steps above 0, or a grid that the scheduler does not take.
    """
    own = timesteps is None and sigmas is None
    if num_inference_steps is None and own:
        num_inference_steps = default_steps
    if num_inference_steps is not None:
        require_whole("num_inference_steps", num_inference_steps)
    grid: dict[str, Any] = {"timesteps": timesteps, "sigmas": sigmas}
    grid = {name: value for name, value in grid.items() if value is not None}
    for name, value in grid.items():
        if num_inference_steps is not None and len(value) != num_inference_steps:
            raise ValueError(f"`{name}`: got {len(value)}, expected `num_inference_steps`={num_inference_steps}.")
    if mu is not None:
        grid["mu"] = mu
    known = inspect.signature(scheduler.set_timesteps).parameters
    for name in grid:
        if name not in known:
            raise ValueError(f"`{name}`: {type(scheduler).__name__} takes none, only a number of steps.")
    scheduler.set_timesteps(num_inference_steps if own else None, device=device, **grid)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # saves the scheduler a search that waits for the device
    return scheduler.timesteps


def to_pictures(vae: Any, latents: torch.Tensor, image_processor: VaeImageProcessor, output_type: str) -> Any:
    """Pictures of latents, (B, C, h, w) as the backbone has them: "pil", "np", "pt", or the latents themselves."""
    if output_type == "latent":
        return latents
    return image_processor.postprocess(decode(vae, latents), output_type=output_type)
