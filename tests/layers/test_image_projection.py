"""Sizes of the published IP-Adapters, exactly: what makes tokens of a picture, and keys and values for every layer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hubgen.layers.decoupled_attention import ImageKeysValues, TimedKeysValues
from hubgen.layers.image_projection import LinearProjection, MLPProjection, Resampler, TimeResampler, TokenProjection

SD1 = [320] * 5 + [640] * 5 + [1280] * 6
"""Features of SD1.5's 16 cross-attentions, and of SDXL's 70"""
SDXL = [640] * 10 + [1280] * 60


def count(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


PUBLISHED: list[tuple[str, Callable[[], list[nn.Module]], int]] = [
    ("SD1.5 tokens", lambda: [LinearProjection(1024, 768)], 3_150_336),
    ("SD1.5 keys and values", lambda: [ImageKeysValues(768, width) for width in SD1], 19_169_280),
    ("SD1.5 Plus tokens", lambda: [Resampler(1280, 768, 16, 768, 12)], 29_918_208),
    ("SDXL tokens, bigG", lambda: [LinearProjection(1280, 2048)], 10_498_048),
    ("SDXL tokens, ViT-H", lambda: [LinearProjection(1024, 2048)], 8_400_896),
    ("SDXL keys and values", lambda: [ImageKeysValues(2048, width) for width in SDXL], 340_787_200),
    ("SDXL Plus tokens", lambda: [Resampler(1280, 2048, 16, 1280, 20)], 82_961_664),
    ("XLabs tokens", lambda: [LinearProjection(768, 4096)], 12_607_488),
    ("XLabs tokens, v2", lambda: [LinearProjection(768, 4096, 16)], 50_405_376),
    ("XLabs keys and values", lambda: [ImageKeysValues(4096, 3072, True) for _ in range(19)], 478_267_392),
    ("SD3.5 tokens", lambda: [TimeResampler(1152, 2432, 64, 1280, 20)], 111_637_376),
    ("SD3.5 keys and values", lambda: [TimedKeysValues(2432, 2432, 64, 1280) for _ in range(38)], 686_288_512),
]


@pytest.mark.parametrize(("name", "made", "size"), PUBLISHED, ids=[name for name, *_ in PUBLISHED])
def test_sizes_are_the_published_ones(name: str, made: Callable[[], list[nn.Module]], size: int) -> None:
    with torch.device("meta"):
        assert count(*made()) == size


SMALL: list[Any] = [
    LinearProjection(6, 8, 3),
    MLPProjection(6, 8, 3),
    TokenProjection(6, 8),
    Resampler(6, 8, 3, 16, 2, 3),
    TimeResampler(6, 8, 3, 16, 2, 3, 10),
]


@pytest.mark.parametrize("network", SMALL, ids=lambda network: type(network).__name__)
def test_one_like_its_weights_takes_them(network: Any) -> None:
    again = type(network).like(network.state_dict())
    again.load_state_dict(network.state_dict())
    pictures = torch.randn(2, 5, 6) if network.reads_patches else torch.randn(2, 6)
    times = (torch.tensor([3.0, 3.0]),) if network.timed else ()
    found, expected = again(pictures, *times), network(pictures, *times)
    tokens = found[0] if network.timed else found
    assert tokens.shape == (2, 5 if isinstance(network, TokenProjection) else 3, 8)
    assert torch.equal(tokens, expected[0] if network.timed else expected)
