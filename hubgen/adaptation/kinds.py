"""Kinds of adapters: what the tensors that a file has for one layer are, and what they come to.

    tensors = {"down": ..., "up": ..., "alpha": ...}            by what they are, see `ROLES`
    low_rank_from(tensors, layer.weight.shape, Said())          a LowRank

LoRA with or without a kernel of its own (kohya's `lora_mid`), LoHa, LoKr, full differences of weights and biases; each
with DoRA's magnitudes or without. The formulas are those of LyCORIS, where LoHa and LoKr come from.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from hubgen.adaptation import low_rank
from hubgen.adaptation.low_rank import LowRank, Matrix

Tensors = Mapping[str, torch.Tensor]
"""Of one layer, by their roles"""

HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
HADA_KERNELS = ("hada_t1", "hada_t2")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
ROLES: dict[str, str] = {
    **{f".lora_A{adapter}.weight": "down" for adapter in ("", ".default", ".default_0")},
    **{f".lora_B{adapter}.weight": "up" for adapter in ("", ".default", ".default_0")},
    **{f"{between}.down.weight": "down" for between in (".lora", "_lora", ".lora_linear_layer", "")},
    **{f"{between}.up.weight": "up" for between in (".lora", "_lora", ".lora_linear_layer", "")},
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "middle",
    ".lora_B.bias": "bias",
    ".alpha": "alpha",
    **{f".lora_magnitude_vector{rest}": "magnitude" for rest in ("", ".weight", ".default", ".default.weight")},
    ".dora_scale": "dora_scale",
    ".diff": "diff",
    ".diff_b": "diff_b",
    **{f".{role}": role for role in (*HADA, *HADA_KERNELS, *LOKR)},
}
"""What a key ends with after the name of its layer, and what the tensor is"""
BESIDE = {"alpha", "magnitude", "dora_scale", "bias", "diff_b"}
"""What any kind may have"""
LARGEST_SCALE = 1e4
"""Of alpha / r; more is no training but damage"""
KINDS: Mapping[str, tuple[set[str], set[str]]] = {
    "LoRA": ({"down", "up"}, {"middle"}),
    "LoHa": (set(HADA), set(HADA_KERNELS)),
    "LoKr": (set(), set(LOKR)),
    "difference": ({"diff"}, set()),
    "difference of a bias": ({"diff_b"}, set()),
}
"""What each must have, and may have; of LoKr one of two, see `kind_of`"""


def check(tensors: Tensors) -> None:
    """Raises ValueError for tensors that are in no adapter, whatever its layer."""
    for role, tensor in tensors.items():
        if not tensor.is_floating_point() and role != "alpha":
            raise ValueError(f"{role} has {tensor.dtype}, expected floating-point numbers")
        if tensor.numel() == 0:
            raise ValueError(f"{role} has shape {list(tensor.shape)}, expected some numbers in it")
        if tensor.ndim < 2 and role not in BESIDE:
            raise ValueError(f"{role} has shape {list(tensor.shape)}, expected a matrix")
        if not bool(tensor.float().isfinite().all()):
            raise ValueError(f"{role} has numbers that are not finite")


def kind_of(tensors: Tensors) -> str:
    """What kind of adapter has these tensors.

    Raises:
        ValueError: None; says what is missing or too much.
    """
    own = set(tensors) - BESIDE
    alone = "difference of a bias" if "diff_b" in tensors else "LoRA"
    kind = next((name for name, (needed, more) in KINDS.items() if own & (needed | more)), alone)
    needed, more = KINDS[kind]
    if kind == "LoKr":
        whole = {name for name in ("lokr_w1", "lokr_w2") if name in own}
        needed = whole | {f"{name}_{side}" for name in {"lokr_w1", "lokr_w2"} - whole for side in "ab"}
    if not needed <= set(tensors):
        raise ValueError(f"has {listed(set(tensors))} without {listed(needed - set(tensors))} ({kind})")
    if own - needed - more:
        raise ValueError(f"has {listed(own - needed - more)} beside {listed(needed)} ({kind})")
    return kind


def listed(roles: set[str]) -> str:
    """Roles, for messages."""
    return ", ".join(sorted(roles))


@dataclass(frozen=True)
class Said:
    """What a config beside the tensors says about a layer."""

    alpha: float | None = None
    rank: int | None = None
    stabilised: bool = False
    """Whether the product counts alpha / sqrt(r) (rsLoRA, 2312.03732)"""


def low_rank_from(tensors: Tensors, shape: torch.Size, said: Said) -> LowRank:
    """What the tensors of a layer add to it, but for DoRA's magnitudes (`decomposed`); exact.

    Args:
        tensors: By their roles.
        shape: Of the layer's weight.
        said: About the layer, beside the tensors.

    Raises:
        ValueError: They are of no kind, or have other shapes than the layer needs.
    """
    check(tensors)
    layer = {"LoRA": lora, "LoHa": loha, "LoKr": lokr}.get(kind_of(tensors), difference)(tensors, shape, said)
    for role, scale in (("bias", layer.scale), ("diff_b", 1.0)):
        if role in tensors:
            layer = replace(layer, bias=vector(tensors, role, shape[0]).float() * scale)
    return layer


def lora(tensors: Tensors, shape: torch.Size, said: Said) -> LowRank:
    """up @ down, or with a kernel between them."""
    out, inputs = shape[0], shape[1:].numel()
    if "middle" not in tensors:
        rank = rank_of(tensors, "down", shape)
        up, down = matrix(tensors, "up", out, rank), matrix(tensors, "down", rank, inputs)
        return low_rank.of_matrices(up, down, alpha_of(tensors, rank, said), shape)
    rank, inner = kernel(tensors, "middle", shape)
    up, down = matrix(tensors, "up", out, rank), matrix(tensors, "down", inner, shape[1])
    return low_rank.of_kernel(up, tensors["middle"], down, alpha_of(tensors, rank, said), shape)


def loha(tensors: Tensors, shape: torch.Size, said: Said) -> LowRank:
    """(w1_a @ w1_b) * (w2_a @ w2_b), times alpha / r."""
    rank = rank_of(tensors, "hada_w1_b", shape)
    first, second = (part(tensors, f"hada_w{number}", f"hada_t{number}", shape) for number in (1, 2))
    return low_rank.of_hadamard(first, second, alpha_of(tensors, rank, said) / rank, shape)


def lokr(tensors: Tensors, shape: torch.Size, said: Said) -> LowRank:
    """kron(w1, w2); LyCORIS scales it by the rank of the factors, and not at all where both are whole."""
    rows = tensors["lokr_w1" if "lokr_w1" in tensors else "lokr_w1_a"].shape[0]
    columns = tensors["lokr_w1" if "lokr_w1" in tensors else "lokr_w1_b"].shape[1]
    if shape[0] % rows or shape[1] % columns:
        raise ValueError(f"lokr_w1 is {[rows, columns]}, expected what divides the layer's {list(shape[:2])}")
    first = part(tensors, "lokr_w1", "", torch.Size([rows, columns]))
    second = part(tensors, "lokr_w2", "lokr_t2", torch.Size([shape[0] // rows, shape[1] // columns, *shape[2:]]))
    factors = [role for role in ("lokr_w2_b", "lokr_w1_b") if role in tensors]
    rank = rank_of(tensors, factors[0], shape) if factors else said.rank
    if rank is None or (not factors and "alpha" in tensors):
        return low_rank.of_kronecker(first, second, 1.0, shape)
    return low_rank.of_kronecker(first, second, alpha_of(tensors, rank, said) / rank, shape)


def difference(tensors: Tensors, shape: torch.Size, said: Said) -> LowRank:
    """A full difference, or that of a bias alone; neither is scaled."""
    if "diff" not in tensors:
        return low_rank.nothing(shape)
    return low_rank.of_difference(matrix(tensors, "diff", shape[0], shape[1:].numel()), shape)


def part(tensors: Tensors, name: str, middle: str, shape: torch.Size) -> list[Matrix]:
    """One of the two matrices of LoHa or LoKr: the whole, or its factors.

    Args:
        tensors: By their roles.
        name: Of the whole; that of its factors has `_a` or `_b` behind.
        middle: Name of the kernel between the factors (Tucker), which then have their ranks in front.
        shape: Of the matrix, or of the kernel (out, in, kh, kw) that it is.
    """
    rows, columns = shape[0], shape[1:].numel()
    if name in tensors:
        return [matrix(tensors, name, rows, columns)]
    if middle in tensors:
        outer, inner = kernel(tensors, middle, shape)
        factors = matrix(tensors, f"{name}_a", outer, rows), matrix(tensors, f"{name}_b", inner, shape[1])
        return [low_rank.tucker(tensors[middle], *factors)]
    rank = rank_of(tensors, f"{name}_b", shape)
    return [matrix(tensors, f"{name}_a", rows, rank), matrix(tensors, f"{name}_b", rank, columns)]


def decomposed(layer: LowRank, tensors: Tensors, weights: Sequence[torch.Tensor]) -> LowRank:
    """A layer with DoRA's magnitudes, if its tensors have any.

    PEFT's are those of the outputs. `dora_scale` may be that of the inputs: what it comes to depends on the weight.

    Args:
        layer: Without them.
        tensors: By their roles.
        weights: Of the layer, or of several whose outputs lie below each other.

    Raises:
        ValueError: There are not as many as outputs or inputs.
    """
    rows, columns = layer.shape[:2]
    if "magnitude" in tensors:
        return replace(layer, magnitude=vector(tensors, "magnitude", rows))
    scale = tensors.get("dora_scale")
    if scale is None:
        return layer
    if scale.numel() == rows and scale.ndim and scale.shape[0] == rows:
        return replace(layer, magnitude=scale.flatten())
    if scale.numel() != columns or tuple(scale.shape[:2]) != (1, columns):
        raise ValueError(f"dora_scale has shape {list(scale.shape)}, expected {[rows, 1]} or {[1, columns]}")
    together = torch.cat([weight.detach().float().cpu() for weight in weights])
    return low_rank.by_columns(layer, scale.flatten(), together)


def alpha_of(tensors: Tensors, rank: int, said: Said) -> float:
    """alpha, such that a product of a rank counts alpha / r: the tensors' own, else the config's, else r.

    Raises:
        ValueError: It is none.
    """
    if "alpha" in tensors:
        alpha = vector(tensors, "alpha", 1).item()
    elif said.alpha is not None:
        alpha = said.alpha * math.sqrt(rank) if said.stabilised else said.alpha
    else:
        return float(rank)
    if not 0 < alpha / rank <= LARGEST_SCALE:
        raise ValueError(f"has alpha {alpha:g} at rank {rank}, expected more than 0 and at most {LARGEST_SCALE:g} r")
    return alpha


def rank_of(tensors: Tensors, role: str, shape: torch.Size) -> int:
    """Rows of a factor.

    Raises:
        ValueError: They are more than any layer of that shape has a use for.
    """
    rank, most = tensors[role].shape[0], 2 * max(shape[0], shape[1:].numel())
    if rank > most:
        raise ValueError(f"{role} has rank {rank}, expected at most {most}, twice the width of the layer")
    return rank


def matrix(tensors: Tensors, role: str, rows: int, columns: int) -> Matrix:
    """A tensor as a matrix.

    Raises:
        ValueError: It is no such matrix.
    """
    flat = tensors[role].flatten(1)
    if tuple(flat.shape) != (rows, columns):
        raise ValueError(f"{role} has shape {list(tensors[role].shape)}, expected {[rows, columns]}")
    return flat


def kernel(tensors: Tensors, role: str, shape: torch.Size) -> tuple[int, int]:
    """Both ranks of a convolution's kernel that stands between factors.

    Raises:
        ValueError: It is no such kernel.
    """
    found = tensors[role].shape
    if len(shape) < 4 or found[2:] != shape[2:]:
        raise ValueError(f"{role} has shape {list(found)}, expected (r, s, kh, kw) for a kernel of {list(shape[2:])}")
    return found[0], found[1]


def vector(tensors: Tensors, role: str, length: int) -> torch.Tensor:
    """A tensor as a row of numbers.

    Raises:
        ValueError: They are not as many.
    """
    if tensors[role].numel() != length:
        raise ValueError(f"{role} has shape {list(tensors[role].shape)}, expected numbers: {length}")
    return tensors[role].flatten()
