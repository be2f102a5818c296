"""What an adapter adds to one layer, as two factors: LoRA itself, and everything else that can be written so.

A layer maps (in) to (out) features; a convolution's kernel is a matrix (out, in * kh * kw). LoRA (2106.09685) adds

    alpha / r * up @ down

to it, with up (out, r) and down (r, in). Products of other kinds are sums of such terms too, exactly:

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
from torch.nn.functional import pad

Matrix = torch.Tensor
"""Of two sides; a convolution's kernel lies in the columns, (out, in * kh * kw)"""


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

    @property
    def shape(self) -> torch.Size:
        """Of the weight that it is added to, (out, in) or (out, in, kh, kw)."""
        return torch.Size([self.up.shape[0], *self.down.shape[1:]])

    def product(self) -> torch.Tensor:
        """What is added to the weight, before DoRA's magnitude: (out, in) or (out, in, kh, kw), in float32."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return (self.scale * product).reshape(self.shape)

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
        factor = (self.magnitude.float() / norm).reshape(-1, *[1] * (weight.ndim - 1))
        return factor * new - weight.float()

    def scaled(self, scale: float) -> "LowRank":
        """The same with another alpha / r, the rest of which goes into `up`; with 1, alpha is r."""
        if scale == self.scale:
            return self
        return replace(self, up=(self.up.float() * (self.scale / scale)).to(self.up.dtype), alpha=scale * self.rank)

    def padded(self, rank: int) -> "LowRank":
        """The same with more terms, which add nothing."""
        more = rank - self.rank
        if not more:
            return self
        down = pad(self.down, (*[0, 0] * (self.down.ndim - 1), 0, more))
        up = pad(self.up, (*[0, 0] * (self.up.ndim - 2), 0, more))
        return replace(self, down=down, up=up, alpha=self.scale * rank)


def nothing(weight: torch.Size, rank: int = 1, dtype: torch.dtype = torch.float32) -> LowRank:
    """What adds nothing to a layer.

    Args:
        weight: Shape of its weight.
        rank: r.
        dtype: Of the factors.
    """
    up, down = torch.zeros(weight[0], rank, dtype=dtype), torch.zeros(rank, weight[1:].numel(), dtype=dtype)
    return of_matrices(up, down, float(rank), weight)


def of_matrices(up: Matrix, down: Matrix, alpha: float, weight: torch.Size) -> LowRank:
    """A product of two matrices.

    Args:
        up: (out, r).
        down: (r, in * kh * kw).
        alpha: The product counts alpha / r.
        weight: Shape of the layer's weight.
    """
    return LowRank(down.reshape(down.shape[0], *weight[1:]), up.reshape(*up.shape, *[1] * (len(weight) - 2)), alpha)


def of_kernel(up: Matrix, middle: torch.Tensor, down: Matrix, alpha: float, weight: torch.Size) -> LowRank:
    """A LoRA whose kernel stands between the factors (Tucker): up (out, r), middle (r, s, kh, kw), down (s, in)."""
    joined = torch.einsum("rshw,si->rihw", middle.float(), down.float())
    return of_matrices(up, joined.flatten(1), alpha, weight)


def tucker(kernel: torch.Tensor, outputs: Matrix, inputs: Matrix) -> Matrix:
    """The matrix of LoHa's and LoKr's three factors: (r, s, kh, kw), (r, out) and (s, in) -> (out, in * kh * kw)."""
    return torch.einsum("rshw,ro,si->oihw", kernel.float(), outputs.float(), inputs.float()).flatten(1)


def of_hadamard(first: Sequence[Matrix], second: Sequence[Matrix], scale: float, weight: torch.Size) -> LowRank:
    """LoHa's elementwise product of two matrices.

    Args:
        first: The one, whole or as factors, (out, r) and (r, in * kh * kw).
        second: The same of the other.
        scale: That the product counts.
        weight: Shape of the layer's weight.
    """
    if len(first) == len(second) == 2:
        (a1, b1), (a2, b2) = ([factor.float() for factor in given] for given in (first, second))
        rank = len(b1) * len(b2)
        if rank < min(weight[0], weight[1:].numel()):
            up = (a1[:, :, None] * a2[:, None, :]).flatten(1)  # (out, r1 * r2)
            down = (b1[:, None, :] * b2[None, :, :]).flatten(0, 1)  # (r1 * r2, in * kh * kw)
            return of_matrices(up, down, scale * rank, weight)
    return of_difference(scale * multiplied(first) * multiplied(second), weight)


def of_kronecker(first: Sequence[Matrix], second: Sequence[Matrix], scale: float, weight: torch.Size) -> LowRank:
    """LoKr's Kronecker product of two matrices.

    Args:
        first: The one (out1, in1), whole or as factors, (out1, r) and (r, in1).
        second: The other (out2, in2 * kh * kw), in the same way.
        scale: That the product counts.
        weight: Shape of the layer's weight, (out1 * out2, in1 * in2) or (out1 * out2, in1 * in2, kh, kw).
    """
    (a1, b1), (a2, b2) = factored(first), factored(second)
    rank = len(b1) * len(b2)
    if rank < min(weight[0], weight[1:].numel()):
        return of_matrices(torch.kron(a1, a2), torch.kron(b1, b2), scale * rank, weight)
    return of_difference(scale * torch.kron(multiplied(first), multiplied(second)), weight)


def multiplied(given: Sequence[Matrix]) -> Matrix:
    """A matrix, from itself or its two factors, in float32."""
    return given[0].float() @ given[1].float() if len(given) == 2 else given[0].float()


def factored(given: Sequence[Matrix]) -> tuple[Matrix, Matrix]:
    """Two factors of a matrix, from themselves or the whole, of which one then is the identity; in float32."""
    if len(given) == 2:
        return given[0].float(), given[1].float()
    matrix = given[0].float()
    rows, columns = matrix.shape
    return (torch.eye(rows), matrix) if rows <= columns else (matrix, torch.eye(columns))


def of_difference(delta: torch.Tensor, weight: torch.Size) -> LowRank:
    """A full difference, as the product with an identity.

    Args:
        delta: As a matrix, or in the shape of the weight.
        weight: Shape of the layer's weight.
    """
    up, down = factored([delta.flatten(1)])
    return of_matrices(up, down, float(len(down)), weight)


def by_columns(layer: LowRank, magnitude: torch.Tensor, weight: torch.Tensor) -> LowRank:
    """A DoRA whose magnitudes are those of the inputs, as kohya's tools and LyCORIS have it by default.

    PEFT has magnitudes of the outputs, so what it comes to is taken as a whole.

    Args:
        layer: Without its magnitude.
        magnitude: The norm of each input's column of the layer's new weight, (in,).
        weight: Of the layer.
    """
    new = weight.double() + layer.product()
    norm = new.transpose(0, 1).flatten(1).norm(dim=1)
    factor = (magnitude.double() / norm).reshape(1, -1, *[1] * (weight.ndim - 2))
    return of_difference((factor * new - weight).float(), layer.shape)


def with_magnitude(layer: LowRank, weight: torch.Tensor) -> LowRank:
    """The same with a magnitude: where it has none, the norms that the rows have anyway."""
    if layer.magnitude is not None:
        return layer
    return replace(layer, magnitude=(weight.detach().float().cpu() + layer.product()).flatten(1).norm(dim=1))


def split(layer: LowRank, sizes: Sequence[int]) -> list[LowRank]:
    """What a layer that is several below each other is given, cut into those.

    Where each part has terms of its own (`up` is block-diagonal), it gets these alone; else all of them.

    Args:
        layer: Of the whole.
        sizes: Outputs of each part.
    """
    ups = layer.up.split(list(sizes))
    terms = _own_terms(ups)
    nones = [None] * len(ups)
    magnitudes = nones if layer.magnitude is None else layer.magnitude.split(list(sizes))
    biases = nones if layer.bias is None else layer.bias.split(list(sizes))
    return [
        LowRank(layer.down[own].clone(), up[:, own].clone(), layer.scale * len(layer.down[own]), magnitude, bias)
        for up, own, magnitude, bias in zip(ups, terms, magnitudes, biases, strict=True)
    ]


def _own_terms(ups: Sequence[torch.Tensor]) -> list[slice]:
    """For each part the terms that reach it: equal shares in their order, or all where parts share any."""
    share, rest = divmod(ups[0].shape[1], len(ups))
    shares = [slice(number * share, (number + 1) * share) for number in range(len(ups))]
    if rest or any(up.count_nonzero() != up[:, own].count_nonzero() for up, own in zip(ups, shares, strict=True)):
        return [slice(None)] * len(ups)
    return shares


def joined(parts: Sequence[LowRank | None], weights: Sequence[torch.Tensor]) -> LowRank:
    """What several linear layers are given, as one that has them below each other; `split` undoes it.

    Args:
        parts: Of each layer; `None` where nothing is added. One alone may be of a convolution.
        weights: Of each layer, (out, in).
    """
    given = [part for part in parts if part is not None]
    if len(parts) == 1:
        return given[0]
    first, rank = given[0], max(part.rank for part in given)
    whole = [part or nothing(weight.shape, 1, first.up.dtype) for part, weight in zip(parts, weights, strict=True)]
    magnitude = bias = None
    if any(part.magnitude is not None for part in given):
        whole = [with_magnitude(part, weight) for part, weight in zip(whole, weights, strict=True)]
        magnitude = torch.cat([part.magnitude for part in whole])
    if any(part.bias is not None for part in given):
        bias = torch.cat([torch.zeros(len(part.up)) if part.bias is None else part.bias for part in whole])
    if all(torch.equal(part.down, first.down) and part.alpha == first.alpha for part in whole):
        return LowRank(first.down, torch.cat([part.up for part in whole]), first.alpha, magnitude, bias)
    alike = [part.padded(rank).scaled(first.scale) for part in whole]
    down = torch.cat([part.down for part in alike])
    up = torch.block_diag(*[part.up for part in alike])
    return LowRank(down, up, first.scale * len(down), magnitude, bias)
