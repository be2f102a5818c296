"""Optimizers by name: torch's, and those of packages that are there."""

import importlib
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from hubgen.errors import one_line
from hubgen.training.kit.groups import Optim
from hubgen.training.kit.parse import SettingsError

TORCH = {"adamw": "AdamW", "adafactor": "Adafactor", "sgd": "SGD"}
EXTRA = {
    "adamw8bit": ("bitsandbytes.optim", "AdamW8bit"),
    "prodigy": ("prodigyopt", "Prodigy"),
    "schedule_free_adamw": ("schedulefree", "AdamWScheduleFree"),
}
OTHERS = "pytorch_optimizer"
LEAST_OF_PRODIGY = 0.05
"""Below this, a learning rate was meant for another optimizer"""


def optimizers_of(module: nn.Module, optim: Optim) -> dict[str, Optimizer]:
    """The optimizers of what is trained, by name; one but for muon, which leaves what is no matrix to AdamW.

    Raises:
        SettingsError: No such optimizer, its package is missing, or it does not take an argument.
    """
    check_rates(module, optim)
    learning = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    parameters = in_groups(learning, optim)
    if optim.optimizer == "muon":
        matrices = in_groups({name: one for name, one in learning.items() if one.ndim == 2}, optim)
        others = in_groups({name: one for name, one in learning.items() if one.ndim != 2}, optim)
        if not matrices:
            raise SettingsError("setting 'optim.optimizer': got 'muon', but no matrix is trained; expected another.")
        known: dict[str, Any] = {"lr": optim.learning_rate, "weight_decay": optim.weight_decay}
        # Scaled so that AdamW's learning rate suits it (2502.16982).
        muon = {"muon": _made(torch.optim.Muon, matrices, {**known, "adjust_lr_fn": "match_rms_adamw"}, optim)}
        plain: dict[str, Any] = {**known, "betas": optim.betas, "eps": optim.eps}
        return muon | ({"adamw": torch.optim.AdamW(others, fused=True, **plain)} if others else {})  # type: ignore[arg-type]
    cls = _class_of(optim.optimizer)
    if optim.optimizer == "prodigy" and optim.learning_rate < LEAST_OF_PRODIGY:
        raise SettingsError(
            f"setting 'optim.learning_rate': got {optim.learning_rate:g}, expected about 1: prodigy finds the rate, "
            "and this scales it."
        )
    known = {"lr": optim.learning_rate, "betas": optim.betas, "eps": optim.eps, "weight_decay": optim.weight_decay}
    if optim.optimizer == "adafactor":
        known.pop("eps")  # of another meaning there
    if optim.optimizer == "adamw":
        known["fused"] = True
    takes = inspect.signature(cls).parameters
    if "betas" in takes and len(takes["betas"].default) != len(optim.betas):
        known.pop("betas")  # of another number there (CAME has three): `optim.arguments` may name them
    return {optim.optimizer: _made(cls, parameters, {k: v for k, v in known.items() if k in takes}, optim)}


def in_groups(learning: Mapping[str, nn.Parameter], optim: Optim) -> list[dict[str, Any]]:
    """Parameters in the groups of an optimizer, one for each learning rate.

    Args:
        learning: Those that learn, by name.
        optim: The settings.
    """
    by_rate: dict[float, list[nn.Parameter]] = {}
    for name, parameter in learning.items():
        rates = [rate for pattern, rate in optim.learning_rates.items() if re.search(pattern, name)]
        by_rate.setdefault(rates[-1] if rates else optim.learning_rate, []).append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in by_rate.items()]


def check_rates(module: nn.Module, optim: Optim) -> None:
    """Raises SettingsError for a pattern of learning rates that is none, or means nothing that learns."""
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    if optim.optimizer == "prodigy" and optim.learning_rates:
        raise SettingsError("setting 'optim.learning_rates': got some with prodigy, expected none: it has one for all.")
    for pattern, rate in optim.learning_rates.items():
        try:
            found = any(re.search(pattern, name) for name in names)
        except re.error as error:
            raise SettingsError(
                f"setting 'optim.learning_rates': got {pattern!r}, expected a regular expression ({error})."
            ) from error
        if not found:
            raise SettingsError(
                f"setting 'optim.learning_rates': got {pattern!r}, which nothing that learns matches: "
                f"{', '.join(names[:4])}, ..."
            )
        if not isinstance(rate, int | float) or rate < 0:
            raise SettingsError(f"setting 'optim.learning_rates': got {rate!r} for {pattern!r}, expected a number.")


def _class_of(name: str) -> Any:
    if name in TORCH:
        return getattr(torch.optim, TORCH[name])
    package, attribute = EXTRA.get(name, (OTHERS, None))
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        known = ", ".join([*TORCH, "muon", *EXTRA])
        reason = f"{name} needs {package.split('.')[0]}: pip install 'hubgen[optimizers]'"
        if attribute is None:
            reason = (
                f"got '{name}', expected one of {known}, or one of pytorch-optimizer: pip install 'hubgen[optimizers]'"
            )
        raise SettingsError(f"setting 'optim.optimizer': {reason} ({one_line(error)}).") from error
    if attribute is not None:
        return getattr(module, attribute)
    try:
        return module.load_optimizer(name)
    except (NotImplementedError, ValueError) as error:
        known = ", ".join([*TORCH, "muon", *EXTRA])
        raise SettingsError(
            f"setting 'optim.optimizer': got '{name}', expected one of {known}, or one of pytorch-optimizer."
        ) from error


def _made(cls: Any, parameters: Sequence[dict[str, Any]], known: dict[str, Any], optim: Optim) -> Optimizer:
    try:
        return cls(parameters, **{**known, **optim.arguments})
    except (TypeError, ValueError) as error:
        raise SettingsError(f"setting 'optim.arguments': {optim.optimizer}: {one_line(error)}") from error
