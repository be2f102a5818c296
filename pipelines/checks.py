"""Checks that the calls of all pipelines share, before any heavy work."""

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch

from hubgen.checks import is_number

Record = TypeVar("Record", bound=Any)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


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


def check_eta(scheduler: Any, eta: float) -> dict[str, Any]:
    """`eta` as an option of the scheduler's `step`, whose own default may be another than 0.

    Raises:
        ValueError: It is no number, or not 0 where the scheduler takes none.
    """
    if not is_number(eta):
        raise ValueError(f"`eta`: got {eta!r}, expected a finite number.")
    if "eta" in inspect.signature(scheduler.step).parameters:
        return {"eta": float(eta)}
    if eta:
        raise ValueError(f"`eta`: got {eta!r}, expected 0: {type(scheduler).__name__} takes none.")
    return {}


def check_strength(strength: float) -> float:
    """Raises ValueError unless it is a number in [0, 1]."""
    if not is_number(strength) or not 0 <= strength <= 1:  # false for NaN
        raise ValueError(f"`strength`: got {strength!r}, expected a number in [0, 1].")
    return float(strength)


def check_share(name: str, share: float | None) -> float | None:
    """Raises ValueError unless it is `None` or a number in (0, 1)."""
    if share is not None and (not is_number(share) or not 0 < share < 1):
        raise ValueError(
            f"`{name}`: got {share!r}, expected a number in (0, 1), a share of the time from noise to data."
        )
    return None if share is None else float(share)


def arguments_of(record: type[Record], arguments: Mapping[str, Any]) -> Record:
    """A record of those of a call's arguments that are its fields, each by its name."""
    return record(**{field.name: arguments[field.name] for field in dataclasses.fields(record)})
