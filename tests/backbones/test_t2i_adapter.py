"""T2IAdapter: parity with diffusers on random weights, the U-Net that takes its features, what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hubgen
from tests.models import LIBRARIES, NETWORKS
from tests.parity import randomize_

VARIANTS: dict[str, dict[str, Any]] = {
    "full": {"channels": [8, 16, 16], "downscale_factor": 2},
    "full, one residual block, grey": {
        "channels": [8, 8],
        "downscale_factor": 4,
        "num_res_blocks": 1,
        "in_channels": 1,
    },
    "xl": {"channels": [8, 16, 24, 24], "downscale_factor": 4, "adapter_type": "full_adapter_xl"},
    "xl, two levels": {"channels": [8, 16], "downscale_factor": 4, "adapter_type": "full_adapter_xl"},
    "light": {"channels": [8, 16, 16], "downscale_factor": 2, "adapter_type": "light_adapter", "num_res_blocks": 4},
}


def pair(variant: str) -> tuple[Any, Any]:
    ours, theirs = (library.T2IAdapter(**VARIANTS[variant]).eval() for library in LIBRARIES.values())
    ours.load_state_dict(randomize_(theirs).state_dict())
    return ours, theirs


def hint(variant: str, height: int = 24, width: int = 40) -> torch.Tensor:
    return torch.rand(2, VARIANTS[variant].get("in_channels", 3), height, width)


@torch.no_grad()
def assert_same(ours: nn.Module, theirs: nn.Module, x: torch.Tensor) -> None:
    found, expected = ours(x), theirs(x)
    assert isinstance(found, list) and [one.shape for one in found] == [one.shape for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() < 1e-4 * other.std()


@pytest.mark.parametrize("variant", VARIANTS)
def test_features_names_and_factors_are_those_of_diffusers(variant: str) -> None:
    ours, theirs = pair(variant)
    assert dict(ours.config) == dict(theirs.config)
    assert ours.total_downscale_factor == theirs.total_downscale_factor
    assert ours.downscale_factor == theirs.downscale_factor
    assert_same(ours, theirs, hint(variant))
    factor = ours.downscale_factor
    assert_same(ours, theirs, hint(variant, 3 * factor, 5 * factor))  # which does not halve evenly


@pytest.mark.parametrize("variant", ["full", "xl", "light"])
def test_a_saved_adapter_loads_in_diffusers_and_the_other_way_round(variant: str, tmp_path: Path) -> None:
    ours, theirs = pair(variant)
    for model, other in ((ours, theirs), (theirs, ours)):
        folder = tmp_path / type(model).__module__
        model.save_pretrained(folder)
        assert_same(type(other).from_pretrained(folder), model, hint(variant))


@pytest.mark.parametrize(
    ("config", "count"),
    [
        ({}, 77_369_280),
        ({"adapter_type": "full_adapter_xl", "downscale_factor": 16}, 79_028_160),
        ({"adapter_type": "light_adapter", "channels": [320, 640, 1280], "num_res_blocks": 4}, None),
    ],
)
def test_full_size_adapters_have_the_published_number_of_parameters_and_diffusers_keys(
    config: dict[str, Any], count: int | None
) -> None:
    with torch.device("meta"):
        ours, theirs = (library.T2IAdapter(**config) for library in LIBRARIES.values())
    shapes = [{k: v.shape for k, v in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1] and dict(ours.config) == dict(theirs.config)
    assert count is None or sum(p.numel() for p in ours.parameters()) == count


@torch.no_grad()
def test_a_u_net_takes_the_features_at_its_levels() -> None:
    unet, inputs = NETWORKS["SD 1.x"].build(), NETWORKS["SD 1.x"].inputs()
    adapter = randomize_(hubgen.T2IAdapter(channels=[8, 16], downscale_factor=2)).eval()
    features = adapter(torch.rand(2, 3, 16, 16))
    out = unet(**inputs, down_intrablock_additional_residuals=features).sample
    assert (out - unet(**inputs).sample).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"adapter_type": "heavy"}, "`adapter_type`: got 'heavy', expected one of"),
        ({"channels": []}, r"`channels`: got \[\]"),
        ({"channels": 8}, "`channels`: got 8"),
        ({"channels": [8, 0]}, "`channels`: got 0"),
        ({"channels": [2, 8], "adapter_type": "light_adapter"}, r"`channels`: got \[2, 8\], expected at least 4"),
        (
            {"channels": [8, 8, 8, 4], "adapter_type": "full_adapter_xl"},
            r"`channels`: got \[8, 8, 8, 4\], expected one w",
        ),
        ({"downscale_factor": 0}, "`downscale_factor`: got 0"),
        ({"num_res_blocks": -1}, "`num_res_blocks`: got -1"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hubgen.T2IAdapter(**config)


@pytest.mark.parametrize("shape", [(1, 1, 16, 16), (3, 16, 16), (1, 3, 17, 16), (1, 3, 16, 15)])
def test_a_hint_of_another_shape_is_refused_by_name(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"`x`: got \(.*\), expected \(batch, 3, height, width\) with `in_channels` = 3"
    ):
        hubgen.T2IAdapter(channels=[8], downscale_factor=2)(torch.zeros(shape))
