"""Small networks on the embeddings of pictures: how beautiful, how unsafe, how likely watermarked a picture is.

    head = read_head(Path("sac+logos+ava1-l14-linearMSE.pth"))
    head(embeddings)                     # (N, D) -> (N,)

Three layouts are known, by the names of their tensors; embeddings have length 1 in all of them.

linear      weight, bias: LAION's aesthetic predictor 1 (github.com/LAION-AI/aesthetic-predictor), one layer
layers      layers.0.weight, ...: linear layers at these places of an nn.Sequential. Places between them tell what
            stood there: one place is dropout, which does nothing here, and two are ReLU and dropout. So are LAION's
            aesthetic predictor 2 (0 2 4 6 7, D = 768; no activation;
            github.com/christophschuhmann/improved-aesthetic-predictor) and its detector of unsafe pictures for
            ViT-H/14 (0 3 6 9 12 15 16, D = 1024; github.com/LAION-AI/CLIP-based-NSFW-Detector)
normed      norm.mean, norm.variance, linear_1.weight, ...: the same for ViT-L/14 as PyTorch has it: inputs
            standardised, ReLU between the layers, a sigmoid at the end

A head belongs to one model: another with the same D gives numbers that mean nothing.
"""

import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from hubgen.data.errors import DataError
from hubgen.errors import one_line
from hubgen.formats.ip_adapter_files import weights_of

LAYOUTS = (
    "weight and bias; layers.0.weight, layers.0.bias, ...; or norm.mean, norm.variance, linear_1.weight, "
    "linear_1.bias, ..."
)
EPSILON = 1e-7
"""Least deviation of an input that is standardised, Keras' own"""


@dataclass(frozen=True)
class Head:
    """A network from embeddings to one number.

    Attributes:
        weights: Of the linear layers in order, each (out, in).
        biases: Of the same, each (out,).
        active: Whether ReLU follows a layer.
        mean: Subtracted from inputs, (D,).
        deviation: That inputs are divided by then, (D,).
        sigmoid: Whether the number is brought to [0, 1] by it.
    """

    weights: tuple[torch.Tensor, ...]
    biases: tuple[torch.Tensor, ...]
    active: tuple[bool, ...]
    mean: torch.Tensor | None = None
    deviation: torch.Tensor | None = None
    sigmoid: bool = False

    @property
    def dimension(self) -> int:
        """D, of the embeddings that it takes."""
        return self.weights[0].shape[1]

    @torch.inference_mode()
    def __call__(self, embeddings: Any) -> Any:
        """(N, D) -> (N,) float32, arrays of numpy."""
        x = torch.as_tensor(embeddings, dtype=torch.float32)
        if self.mean is not None and self.deviation is not None:
            x = (x - self.mean) / self.deviation
        for weight, bias, active in zip(self.weights, self.biases, self.active, strict=True):
            x = F.linear(x, weight, bias)
            x = F.relu(x) if active else x
        return (torch.sigmoid(x) if self.sigmoid else x)[:, 0].numpy()


def read_head(path: Path) -> Head:
    """A head from its file.

    Args:
        path: .safetensors, or .pth, .pt or .bin with tensors alone (no code of such a file is run).

    Raises:
        DataError: The file cannot be read, or has another layout; the message names the tensors.
    """
    try:
        tensors = dict(weights_of(path))
    except (ValueError, OSError) as problem:
        text = one_line(problem).removeprefix(f"{path}: ").rstrip(".")
        raise DataError(f"{path}: {text}; expected a head's weights: {LAYOUTS}") from problem
    wrong = [name for name, tensor in tensors.items() if not torch.is_tensor(tensor)]
    if wrong:
        raise DataError(f"{path}: found {wrong[0]!r}, which is no tensor, expected {LAYOUTS}")
    mean, variance = (tensors.pop(name, None) for name in ("norm.mean", "norm.variance"))
    normed = mean is not None and variance is not None
    pattern = r"linear_(\d+)\.(weight|bias)" if normed else r"(?:layers\.(\d+)\.)?(weight|bias)"
    found: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(pattern, name)
        if match is None:
            raise DataError(f"{path}: found a tensor {name}, expected {LAYOUTS}")
        found.setdefault(int(match[1] or 0), {})[match[2]] = tensor.float()
    places = sorted(found)
    gaps = [after - before for before, after in pairwise(places)]
    if not normed and not set(gaps) <= {1, 2, 3}:
        raise DataError(f"{path}: found layers at {places}, expected one to three places from one to the next")
    layers = [found[place] for place in places]
    _check(path, layers, mean if normed else None)
    return Head(
        tuple(layer["weight"] for layer in layers),
        tuple(layer["bias"] for layer in layers),
        (*(normed or gap == 3 for gap in gaps), False),
        mean.float() if normed else None,
        variance.float().sqrt().clamp_min(EPSILON) if normed else None,
        sigmoid=normed,
    )


def _check(path: Path, layers: list[dict[str, torch.Tensor]], mean: torch.Tensor | None) -> None:
    """Raises DataError unless the layers follow one on the other and end in one number."""
    width = None if mean is None else mean.numel()
    for layer in layers:
        shapes = {name: tuple(tensor.shape) for name, tensor in layer.items()}
        weight = shapes.get("weight", ())
        if len(weight) != 2 or shapes.get("bias") != weight[:1] or width not in (None, weight[1]):
            given = "" if width is None else f" of {width} inputs"
            raise DataError(f"{path}: found a layer with {shapes}, expected weight (out, in) and bias (out,){given}")
        if not all(bool(tensor.isfinite().all()) for tensor in layer.values()):
            raise DataError(f"{path}: found a weight that is no finite number, expected finite ones")
        width = weight[0]
    if width != 1:
        raise DataError(f"{path}: found {width or 'no'} outputs, expected 1")
