"""The feed-forward layer of a transformer block, and activations by name.

Parameter names are those of diffusers' `FeedForward`.
"""

import torch
import torch.nn.functional as F
from torch import nn

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "mish": nn.Mish,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
}


def activation(name: str) -> nn.Module:
    """The activation that a config calls `name`.

    Raises:
        ValueError: There is none of that name.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"`act_fn`: got {name!r}, expected one of {sorted(ACTIVATIONS)}.")
    return ACTIVATIONS[name]()


class GELU(nn.Module):
    """Linear layer with a Gaussian error linear unit (1606.08415): (..., dim_in) -> (..., dim_out)."""

    def __init__(self, dim_in: int, dim_out: int, approximate: str = "none"):
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out)
        self.approximate = approximate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(self.proj(x), approximate=self.approximate)


class GEGLU(nn.Module):
    """Linear layer of which one half gates the other (2002.05202): (..., dim_in) -> (..., dim_out)."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.proj = nn.Linear(dim_in, 2 * dim_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """Two linear layers on every token: (..., dim) -> (..., dim_out).

    Args:
        dim: Features of a token.
        dim_out: Features of the output; `dim` by default.
        mult: Features between the two layers, as a multiple of `dim`.
        dropout: Probability of dropping a feature between the two layers.
        activation_fn: `"geglu"` (the UNets), `"gelu"` or `"gelu-approximate"` (the transformers).

    Raises:
        ValueError: `activation_fn` is none of these.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int | None = None,
        mult: int = 4,
        dropout: float = 0.0,
        activation_fn: str = "geglu",
    ):
        super().__init__()
        inner_dim = mult * dim
        if activation_fn == "geglu":
            first: nn.Module = GEGLU(dim, inner_dim)
        elif activation_fn in ("gelu", "gelu-approximate"):
            first = GELU(dim, inner_dim, approximate="none" if activation_fn == "gelu" else "tanh")
        else:
            raise ValueError(f"`activation_fn`: got {activation_fn!r}, expected 'geglu', 'gelu' or 'gelu-approximate'.")
        second = nn.Linear(inner_dim, dim if dim_out is None else dim_out)
        self.net = nn.ModuleList([first, nn.Dropout(dropout), second])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.net:
            x = layer(x)
        return x
