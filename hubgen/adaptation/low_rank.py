"""What an adapter adds to one layer, as two factors: LoRA itself, and everything else that can be written so.

A layer maps (in) to (out) features; a convolution's kernel is a matrix (out, in * kh * kw). LoRA (2106.09685) adds

    alpha / r * up @ down

to it, with up (out, r) and down (r, in). Products of other kinds are sums of r such terms too, exactly:

- LoHa (2108.06098), (a1 @ b1) * (a2 @ b2), has r1 * r2 terms: the columns of a1 times those of a2, the rows of b1
  times those of b2;
- LoKr (2309.14859), kron(w1, w2), has the products of their terms: kron(a1 @ b1, a2 @ b2) is
  kron(a1, a2) @ kron(b1, b2);
- a full difference has as many as the smaller side of the matrix, one factor being the identity.

So every file becomes the same kind of adapter, which can be weighted, fused, swapped and saved like any other.
DoRA (2402.09353) is a LoRA with a magnitude for each row of the layer's weight.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class LowRank:
    """What is added to one layer."""

    down: torch.Tensor
    """(r, in), or of a convolution (r, in, kh, kw)"""
    up: torch.Tensor
    """(out, r), or of a convolution (out, r, 1, 1)"""
    alpha: float
    """The product counts alpha / r"""
    magnitude: torch.Tensor | None = None
    """DoRA's norm of each row of the layer's new weight, (out,)"""
    bias: torch.Tensor | None = None
    """Added to the layer's bias, (out,); not scaled"""

    @property
    def rank(self) -> int:
        """r."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank

    def product(self) -> torch.Tensor:
        """What is added to the weight, before DoRA's magnitude: (out, in) or (out, in, kh, kw), in float32."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return (self.scale * product).reshape(len(self.up), *self.down.shape[1:])

    def delta(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        """What is added to the weight, (out, in) or (out, in, kh, kw), in float32.

        Args:
            weight: Of the layer, which a magnitude needs.
        """
        if self.magnitude is None:
            return self.product()
        assert weight is not None
        new = weight.float() + self.product()
        norm = new.flatten(1).norm(dim=1)
        factor = (self.magnitude.float().flatten() / norm).reshape(-1, *[1] * (weight.ndim - 1))
        return factor * new - weight.float()

    def of_shape(self, weight: torch.Size) -> "LowRank":
        """The same for a layer whose weight has another number of sides: a 1x1 convolution is a linear layer.

        Args:
            weight: Shape of the layer's weight.

        Raises:
            ValueError: The factors do not make such a weight.
        """
        made = (self.up.shape[0], *self.down.shape[1:])
        if tuple(made) == tuple(weight):
            return self
        if made[0] != weight[0] or made[1:].numel() != weight[1:].numel():
            raise ValueError(f"makes a weight of {list(made)}, expected {list(weight)}")
        up = self.up.reshape(*self.up.shape[:2], *[1] * (len(weight) - 2))
        return replace(self, down=self.down.reshape(self.rank, *weight[1:]), up=up)

    def folded(self) -> "LowRank":
        """The same with the scale in `up`, so that alpha is r."""
        if self.alpha == self.rank:
            return self
        return replace(self, up=(self.up.float() * self.scale).to(self.up.dtype), alpha=float(self.rank))


def of_kernel(middle: torch.Tensor, down: torch.Tensor, up: torch.Tensor, alpha: float) -> LowRank:
    """A LoRA whose kernel stands between the factors (Tucker): up (out, r), middle (r, s, kh, kw), down (s, in)."""
    joined = torch.einsum("rshw,si->rihw", middle.float(), down.float().flatten(1)).to(down.dtype)
    return LowRank(joined, up.reshape(*up.shape[:2], 1, 1), alpha)


def of_hadamard(
    first: tuple[torch.Tensor, torch.Tensor],
    second: tuple[torch.Tensor, torch.Tensor],
    alpha: float,
    kernels: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> LowRank:
    """LoHa's elementwise product of two matrices.

    Args:
        first: a1 (out, r) and b1 (r, in * kh * kw).
        second: The same of the other.
        alpha: The product counts alpha / r.
        kernels: t1 and t2 (r, r, kh, kw), if both are Tucker's: then a is (r, out), b is (r, in) and each matrix is
            the sum over i, j of t[i, j] a[j] b[i], as LyCORIS has it.
    """
    rank = first[1].shape[0]
    if kernels is not None:
        made = [
            torch.einsum("ijhw,jo,ir->orhw", kernel.float(), a.float(), b.float())
            for kernel, (a, b) in zip(kernels, (first, second), strict=True)
        ]
        return of_difference(alpha / rank * made[0] * made[1])
    (a1, b1), (a2, b2) = ((a.float(), b.float().flatten(1)) for a, b in (first, second))
    up = (a1[:, :, None] * a2[:, None, :]).flatten(1)  # (out, r * r)
    down = (b1[:, None, :] * b2[None, :, :]).flatten(0, 1)  # (r * r, in)
    if down.shape[0] >= min(up.shape[0], down.shape[1]):
        return of_difference(alpha / rank * (up @ down))
    return LowRank(down, up, alpha / rank * down.shape[0])


def of_kronecker(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor], scale: float) -> LowRank:
    """LoKr's Kronecker product of two matrices.

    Args:
        first: w1 (out1, in1), or its factors (out1, r) and (r, in1).
        second: w2 (out2, in2) or (out2, in2, kh, kw), or its factors (out2, r) and (r, in2 * kh * kw).
        scale: That the product counts.
    """
    kernel = second[0].shape[2:] if len(second) == 1 else torch.Size()
    one, two = _factors(first), _factors(second)
    up, down = torch.kron(one[0], two[0]), _kron_kernel(one[1], two[1], kernel)
    rank = down.shape[0]
    if rank >= min(up.shape[0], down.flatten(1).shape[1]):
        product = up @ down.flatten(1)
        return of_difference(scale * product.reshape(len(up), *down.shape[1:]))
    return LowRank(down, up.reshape(*up.shape, *[1] * len(kernel)), scale * rank)


def _factors(given: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix as two factors, one of which may be the identity; the second one's kernel is flat."""
    if len(given) == 2:
        return given[0].float(), given[1].float().flatten(1)
    matrix = given[0].float().flatten(1)
    if matrix.shape[0] <= matrix.shape[1]:
        return torch.eye(matrix.shape[0]), matrix
    if given[0].ndim > 2:  # the kernel stays with the inputs
        return torch.eye(matrix.shape[0]), matrix
    return matrix, torch.eye(matrix.shape[1])


def _kron_kernel(first: torch.Tensor, second: torch.Tensor, kernel: torch.Size) -> torch.Tensor:
    """kron of (r1, in1) and (r2, in2 * kh * kw), the kernel last: (r1 * r2, in1 * in2[, kh, kw])."""
    area = kernel.numel() if kernel else 1
    second = second.reshape(second.shape[0], -1, area)  # (r2, in2, area)
    made = torch.einsum("ai,bjk->abijk", first, second)
    made = made.reshape(first.shape[0] * second.shape[0], first.shape[1] * second.shape[1], area)
    return made.reshape(*made.shape[:2], *kernel)


def of_difference(delta: torch.Tensor) -> LowRank:
    """A full difference (out, in) or (out, in, kh, kw), as the product with an identity."""
    flat = delta.flatten(1)
    kernel = delta.shape[2:]
    if flat.shape[0] <= flat.shape[1] or kernel:
        identity = torch.eye(flat.shape[0], dtype=delta.dtype)
        return LowRank(delta, identity.reshape(*identity.shape, *[1] * len(kernel)), float(flat.shape[0]))
    return LowRank(torch.eye(flat.shape[1], dtype=delta.dtype), delta, float(flat.shape[1]))


def by_columns(layer: LowRank, magnitude: torch.Tensor, weight: torch.Tensor) -> LowRank:
    """A DoRA whose magnitudes are those of the inputs, as kohya's tools and LyCORIS have it by default.

    PEFT has magnitudes of the outputs, so what it comes to is taken as a whole.

    Args:
        layer: Without its magnitude.
        magnitude: (1, in) or (1, in, 1, 1), the norm of each input's column of the layer's new weight.
        weight: Of the layer.
    """
    new = weight.float() + layer.product().reshape(weight.shape)
    norm = new.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *[1] * (weight.ndim - 2))
    return of_difference(new * (magnitude.float().reshape(norm.shape) / norm) - weight.float())


def split(layer: LowRank, sizes: Sequence[int]) -> list[LowRank]:
    """What a layer that is several below each other is given, cut into those.

    Where each part has terms of its own (`up` is block-diagonal), it gets these alone; else all of them.

    Args:
        layer: Of the whole.
        sizes: Outputs of each part.
    """
    ups = layer.up.split(list(sizes))
    own = _own_terms(layer, ups)
    found = []
    for number, up in enumerate(ups):
        terms = own[number]
        down, alpha = layer.down[terms].clone(), layer.alpha * len(terms) / layer.rank
        rows = slice(sum(sizes[:number]), sum(sizes[: number + 1]))
        magnitude = None if layer.magnitude is None else layer.magnitude.flatten()[rows].clone()
        bias = None if layer.bias is None else layer.bias[rows].clone()
        found.append(LowRank(down, up[:, terms].clone(), alpha, magnitude, bias))
    return found


def _own_terms(layer: LowRank, ups: Sequence[torch.Tensor]) -> list[list[int]]:
    """For each part the terms that reach it; all, where parts share any."""
    every = list(range(layer.rank))
    share, rest = divmod(layer.rank, len(ups))
    if rest:
        return [every] * len(ups)
    blocks = [every[number * share : (number + 1) * share] for number in range(len(ups))]
    for up, block in zip(ups, blocks, strict=True):
        others = [term for term in every if term not in block]
        if torch.any(up[:, others] != 0):
            return [every] * len(ups)
    return blocks


def joined(parts: Sequence[LowRank | None], weights: Sequence[torch.Tensor]) -> LowRank:
    """What several linear layers are given, as one that has them below each other; `split` undoes it.

    Args:
        parts: Of each layer; `None` where nothing is added.
        weights: Of each layer, (out, in).
    """
    given = [part for part in parts if part is not None]
    first, rank = given[0], max(part.rank for part in given)
    whole = [_padded(part, rank, weight, first) for part, weight in zip(parts, weights, strict=True)]
    magnitude = bias = None
    if any(part.magnitude is not None for part in given):
        magnitude = torch.cat([_magnitude(part, weight) for part, weight in zip(whole, weights, strict=True)])
    if any(part.bias is not None for part in given):
        bias = torch.cat([torch.zeros(len(part.up)) if part.bias is None else part.bias for part in whole])
    if len(given) == len(parts) and all(
        part.down.shape == first.down.shape and torch.equal(part.down, first.down) and part.alpha == first.alpha
        for part in given
    ):
        return LowRank(first.down, torch.cat([part.up for part in given]), first.alpha, magnitude, bias)
    ups = [part.up if part.scale == first.scale else part.up * (part.scale / first.scale) for part in whole]
    down = torch.cat([part.down for part in whole])
    return LowRank(down, torch.block_diag(*ups), first.alpha / first.rank * len(down), magnitude, bias)


def _padded(part: LowRank | None, rank: int, weight: torch.Tensor, like: LowRank) -> LowRank:
    """A layer's part with `rank` terms, some of which add nothing."""
    if part is None:
        down = torch.zeros(rank, weight.shape[1], dtype=like.down.dtype)
        return LowRank(down, torch.zeros(weight.shape[0], rank, dtype=like.up.dtype), like.scale * rank)
    more = rank - part.rank
    if not more:
        return part
    down, up = torch.nn.functional.pad(part.down, (0, 0, 0, more)), torch.nn.functional.pad(part.up, (0, more))
    return replace(part, down=down, up=up, alpha=part.scale * rank)


def _magnitude(part: LowRank, weight: torch.Tensor) -> torch.Tensor:
    if part.magnitude is not None:
        return part.magnitude.flatten()
    return (weight.detach().float().cpu() + part.product()).norm(dim=1)
