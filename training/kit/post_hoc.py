"""The length of the average chosen after the run: post-hoc EMA (2312.02696, section 3).

A run keeps averages of few lengths and stores them at its checkpoints; any other length, at any step before the last,
is a combination of these, whose weights follow from the lengths and steps alone. A length is relative: the standard
deviation of the average's profile over training time, as a share of the time so far.

    optim.ema_lengths: [0.05, 0.1]                                            # of the recipe
    python -m hubgen.training.choose_average runs/emoji --length 0.08 --out runs/emoji-0.08
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

from hubgen.formats.atomic import written
from hubgen.training.kit.ema import ExponentialMovingAverage
from hubgen.training.kit.parse import SettingsError

LONGEST = 0.28
"""Above 1 / sqrt(12), no profile of this kind is so wide"""
_STORED = re.compile(r"step-(\d{8,})\.safetensors")


def exponent_of(length: float) -> float:
    """The exponent of the power function whose profile has a relative length.

    Raises:
        SettingsError: The length is not in (0, 0.28].
    """
    if not 0 < length <= LONGEST:
        raise SettingsError(
            f"setting 'optim.ema_lengths': got {length}, expected numbers above 0 and at most {LONGEST}."
        )
    return float(np.roots([1, 7, 16 - length**-2, 12 - length**-2]).real.max())


class PowerFunctionAverage(ExponentialMovingAverage):
    """An average whose profile is t^gamma: it forgets its beginning in proportion to the time that has passed.

    Args:
        module: See `ExponentialMovingAverage`.
        length: Relative, see above.
    """

    def __init__(self, module: nn.Module, length: float) -> None:
        super().__init__(module, decay=0.0, warmup=False)
        self.length, self.exponent = length, exponent_of(length)

    def current_decay(self) -> float:
        """(1 - 1 / t)^(gamma + 1)."""
        return (1 - 1 / (self.num_updates + 1)) ** (self.exponent + 1)


def store(folder: Path, step: int, averages: Sequence[PowerFunctionAverage], writer: bool) -> None:
    """Writes the averages of a step, in float16; all processes gather sharded ones, and one writes."""
    tensors: dict[str, torch.Tensor] = {}
    for average in averages:
        for name, value in average.averages.items():
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            if writer:
                tensors[f"{average.length}/{name}"] = whole.to("cpu", torch.float16, copy=True).contiguous()
    if writer:
        folder.mkdir(parents=True, exist_ok=True)
        with written(folder / f"step-{step:08d}.safetensors") as temporary:
            save_file(tensors, temporary)


def combination(stored: Sequence[tuple[int, float]], step: int, length: float) -> np.ndarray:
    """How much of each stored average, (step, length), makes up the one of another length; by least squares."""
    steps = np.array([float(one) for one, _ in stored])
    exponents = np.array([exponent_of(one) for _, one in stored])
    ours, exponent = np.array([float(step)]), np.array([exponent_of(length)])
    gram = _products(steps[:, None], exponents[:, None], steps[None], exponents[None])
    wanted = _products(steps[:, None], exponents[:, None], ours[None], exponent[None])
    return np.linalg.lstsq(gram, wanted, rcond=None)[0][:, 0]


def _products(t_a: np.ndarray, gamma_a: np.ndarray, t_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """Inner products of profiles."""
    ratio = (t_a / t_b) ** np.where(t_a < t_b, gamma_b, -gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) * ratio / ((gamma_a + gamma_b + 1) * np.maximum(t_a, t_b))


def chosen(folder: Path, length: float, step: int | None = None) -> Mapping[str, torch.Tensor]:
    """The weights of an average of any length, float32.

    Args:
        folder: `averages` of a run.
        length: Relative.
        step: Of the average; the last that is stored if not given.

    Raises:
        SettingsError: Nothing is stored there, or not so late.
    """
    files = {int(match[1]): path for path in folder.glob("*") if (match := _STORED.fullmatch(path.name))}
    if not files:
        raise SettingsError(f"{folder}: got no stored averages, expected a run with optim.ema_lengths.")
    step = max(files) if step is None else step
    if step > max(files):
        raise SettingsError(f"step: got {step}, expected at most {max(files)}, the last that is stored in {folder}.")
    stored: list[tuple[int, float]] = []
    for number, path in sorted(files.items()):
        with safe_open(path, framework="pt") as file:
            stored += [(number, one) for one in sorted({float(key.partition("/")[0]) for key in file.keys()})]
    weights = combination(stored, step, length)
    found: dict[str, torch.Tensor] = {}
    for (number, one), weight in zip(stored, weights, strict=True):
        with safe_open(files[number], framework="pt") as file:
            for key in file.keys():
                kept, _, name = key.partition("/")
                if float(kept) == one:
                    part = float(weight) * file.get_tensor(key).float()
                    found[name] = found[name] + part if name in found else part
    return found
