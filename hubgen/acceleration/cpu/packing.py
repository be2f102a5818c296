"""Packed weights: which layers of a model have them, in how much memory, and whether they still are the weights.

They lie beside the model, in tables that hold neither the model nor its layers: what is dropped elsewhere is dropped
here, and no copy, file or state dict ever contains them.
"""

import math
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

# Least gain in milliseconds a megabyte, as measured on AVX-512, for which a weight is packed, where the model's first
# large layer sees so many pixels or tokens. It grows with the square root of their number, so that what gains most,
# late in a U-Net, finds memory left.
WORTHWHILE, WORTHWHILE_BFLOAT16, PIXELS = 0.2, 0.15, 2048
# Layers that gain much and are no larger (bytes) are packed even where the budget is spent: a few percent of a model.
MUCH, SMALL_LAYER = 0.5, 2**23
# A prime, so that the same place in two rows of a weight falls into two sums.
SUMS = 2039


@dataclass(eq=False)
class Record:
    """What is known of one layer."""

    granted: bool | None = None
    """Whether the plan has memory for it; `None` before its first call."""
    packed: Any = None
    winograd: bool = False
    """Whether `packed` are Winograd's transformed kernels."""
    doubling: bool = False
    """Whether `packed` are the kernels of the phases of a doubled picture."""
    stamp: tuple[Any, ...] = ()
    """Of the weight that was packed, see `identity`."""
    sums: torch.Tensor | None = None
    """Of its bits, see `checksum`."""

    def forget(self) -> None:
        """Drops what was packed."""
        self.packed = self.sums = None
        self.stamp = ()


@dataclass(eq=False)
class Packing:
    """The packed weights of one model.

    Memory is granted at a layer's first call, so that the second call computes what the first did, to the last bit.
    """

    budget: float
    """Bytes."""
    worthwhile: float = 0.0
    """Least gain, see `WORTHWHILE`."""
    least: float | None = None
    """The same for the pictures that this model sees; `None` before its first call."""
    spent: int = 0
    records: "WeakKeyDictionary[nn.Module, Record]" = field(default_factory=WeakKeyDictionary)

    def grant(self, gain: float, size: int, rows: int) -> bool:
        """Whether a layer that sees `rows` pixels or tokens may pack `size` bytes that save `gain` ms a megabyte."""
        if self.least is None:
            self.least = self.worthwhile * math.sqrt(rows / PIXELS)
        small = self.budget > 0 and gain >= MUCH and size <= SMALL_LAYER
        granted = gain >= self.least and (self.spent + size <= self.budget or small)
        self.spent += size if granted else 0
        return granted

    def record(self, layer: Any) -> Record:
        """Of a layer, whose packed weight is dropped where it is plainly of another tensor."""
        record = self.records.get(layer)
        if record is None:
            record = self.records[layer] = Record()
        elif record.packed is not None and record.stamp != identity(layer.weight):
            record.forget()
        return record

    def keep(self, record: Record, weight: torch.Tensor, packed: Any) -> Any:
        """Remembers the packed form of a weight."""
        record.stamp, record.sums, record.packed = identity(weight), checksum(weight), packed
        return packed

    def verify(self) -> None:
        """Drops every packed weight whose layer has other values by now, by reading all of them."""
        records: list[tuple[Any, Record]] = list(self.records.items())  # other threads may add some
        for layer, record in records:
            if record.packed is None:
                continue
            same = record.stamp == identity(layer.weight)
            if not same or record.sums is None or not torch.equal(record.sums, checksum(layer.weight)):
                record.forget()


def identity(weight: torch.Tensor) -> tuple[Any, ...]:
    """Another tensor, other memory, or a change that a tensor counts gives another identity."""
    version = 0 if weight.is_inference() else weight._version
    return id(weight), weight.data_ptr(), weight.dtype, weight.shape, version


def checksum(weight: torch.Tensor) -> torch.Tensor:
    """Sums over all bits of a dense weight on the CPU, (at most 2 * `SUMS`,): a change of values or of places shows.

    `weight.data += delta`, as adapters are fused, leaves no trace in a tensor's version, so the values have to tell.
    """
    flat = weight.detach().as_strided((weight.numel(),), (1,))
    size = flat.element_size()
    if weight.numel() * size % 8 == 0 and flat.storage_offset() * size % 8 == 0:
        words = flat.view(torch.int64)
    else:
        words = flat.view(torch.int32 if size == 4 else torch.int16).long()
    rows = len(words) // SUMS
    return torch.cat([words[: rows * SUMS].view(rows, SUMS).sum(0), words[rows * SUMS :]])
