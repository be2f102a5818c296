"""Decoupled attention to a picture's tokens: the second half of IP-Adapters (2308.06721, section 3.2, equation 5).

    attention's output + scale * softmax(Q K_ip^T / sqrt(D)) V_ip

Q are the layer's own queries; keys and values of the picture's tokens have weights of their own, one module a layer:

    ImageKeysValues     as in the paper; where queries are turned by positions, those before it
    NormedKeysValues    with keys normalised (FLUX of InstantX)
    TimedKeysValues     with tokens modulated by the time, and queries that look at picture and image at once
                        (SD3.5 of InstantX)

An `ImageAttention` is all of them with the projection of `hubgen.layers.image_projection`. Parameter names are those of
the published files.

Shapes: n pictures, S tokens of a picture with D features, L image tokens, H heads, E features of the embedded time.
"""

from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from torch import nn
from torch.nn import functional as F

from hubgen.layers.attention import AttentionCall
from hubgen.layers.image_projection import Projection
from hubgen.layers.normalization import RMSNorm, modulate

Weights = Mapping[str, torch.Tensor]
KeyValue = tuple[torch.Tensor, torch.Tensor]


class ImageKeysValues(nn.Module):
    """Keys and values of a picture's tokens for one attention layer.

    Args:
        features: D.
        width: Features of all heads together.
        bias: Whether the two layers have one (FLUX of XLabs).
    """

    whole_stream: ClassVar[bool] = False
    """Whether text tokens that come in one stream with the image's look at the picture too"""

    def __init__(self, features: int, width: int, bias: bool = False):
        super().__init__()
        self.to_k_ip = nn.Linear(features, width, bias=bias)
        self.to_v_ip = nn.Linear(features, width, bias=bias)

    @classmethod
    def like(cls, weights: Weights) -> Self:
        """One of the sizes of these weights, by their names; KeyError where one is missing."""
        width, features = weights["to_k_ip.weight"].shape
        return cls(features, width, "to_k_ip.bias" in weights)

    def forward(self, tokens: torch.Tensor, heads: int, temb: torch.Tensor | None = None) -> KeyValue:
        """(n, S, D) -> keys and values, (n, S, H, features of a head) each."""
        key, value = (layer(tokens).unflatten(-1, (heads, -1)) for layer in (self.to_k_ip, self.to_v_ip))
        return key, value

    def query(self, call: AttentionCall) -> torch.Tensor:
        """What asks, (B, L, H, features of a head), or with text tokens in front."""
        return call.stream if self.whole_stream else call.query

    def among(self, call: AttentionCall, key: torch.Tensor, value: torch.Tensor) -> KeyValue:
        """The keys and values that are asked, given the picture's."""
        return key, value


class NormedKeysValues(ImageKeysValues):
    """With keys normalised, by no weight; in single blocks text tokens look at the picture as well."""

    whole_stream = True

    def forward(self, tokens: torch.Tensor, heads: int, temb: torch.Tensor | None = None) -> KeyValue:
        key, value = super().forward(tokens, heads)
        return F.rms_norm(key, key.shape[-1:], eps=1e-5), value


class Modulation(nn.Module):
    """A layer norm with shift and scale from the embedded time: (n, S, D), (n, E) -> (n, S, D)."""

    def __init__(self, time_features: int, features: int):
        super().__init__()
        self.linear = nn.Linear(time_features, 2 * features)

    def forward(self, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        shift, scale = self.linear(F.silu(temb)).chunk(2, dim=1)
        return modulate(F.layer_norm(x, x.shape[-1:], eps=1e-6), scale, shift)


class TimedKeysValues(ImageKeysValues):
    """With tokens modulated by the time; attends to the image's tokens and the picture's together, by norms of its own.

    Args:
        features: D.
        width: Features of all heads together.
        head: Features of a head.
        time_features: E.
    """

    def __init__(self, features: int, width: int, head: int, time_features: int):
        super().__init__(features, width)
        self.norm_ip = Modulation(time_features, features)
        self.norm_q = RMSNorm(head, eps=1e-6)
        self.norm_k = RMSNorm(head, eps=1e-6)
        self.norm_ip_k = RMSNorm(head, eps=1e-6)

    @classmethod
    def like(cls, weights: Weights) -> Self:
        width, features = weights["to_k_ip.weight"].shape
        return cls(features, width, len(weights["norm_q.weight"]), weights["norm_ip.linear.weight"].shape[1])

    def forward(self, tokens: torch.Tensor, heads: int, temb: torch.Tensor | None = None) -> KeyValue:
        assert temb is not None
        key, value = super().forward(self.norm_ip(tokens, temb), heads)
        return self.norm_ip_k(key), value

    def query(self, call: AttentionCall) -> torch.Tensor:
        return self.norm_q(call.projected[0])

    def among(self, call: AttentionCall, key: torch.Tensor, value: torch.Tensor) -> KeyValue:
        _, own_key, own_value = call.projected
        return torch.cat([self.norm_k(own_key), key], dim=1), torch.cat([own_value, value], dim=1)


class ImageAttention(nn.Module):
    """All weights of an IP-Adapter.

    Args:
        image_proj: Makes tokens of what an image encoder says.
        layers: Keys and values by the number of their attention layer in the adapter's file.
    """

    def __init__(self, image_proj: Projection, layers: Mapping[int, ImageKeysValues]):
        super().__init__()
        self.image_proj: Projection = image_proj
        self.ip_adapter = nn.ModuleDict({str(number): layers[number] for number in sorted(layers)})

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype

    def layer(self, number: int) -> ImageKeysValues:
        """The keys and values of one attention layer."""
        layer = self.ip_adapter[str(number)]
        assert isinstance(layer, ImageKeysValues)
        return layer

    @property
    def numbers(self) -> list[int]:
        """Those that there are."""
        return [int(number) for number in self.ip_adapter]

    def start_at_zero(self) -> None:
        """Values of 0, with which a fresh adapter changes nothing."""
        for number in self.numbers:
            layer = self.layer(number)
            for parameter in layer.to_v_ip.parameters():
                nn.init.zeros_(parameter)
