"""ControlNetUnionModel: parity with diffusers on random weights, fresh networks for a base, files, what is refused."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import hubgen
from hubgen.backbones.unet_condition_config import stable_diffusion_xl
from tests.models import LIBRARIES, NETWORKS, UNION, hint
from tests.parity import assert_parity, first_output, randomize_

NET, BASE = NETWORKS["ControlNet Union, SDXL"], NETWORKS["SDXL"]
VARIANTS: dict[str, dict[str, Any]] = {
    "union": {},
    "promax": {"num_control_type": 8, "num_trans_layer": 2},
    "pooled": {"global_pool_conditions": True},
    "hint of one channel": {"conditioning_channels": 1},
}


def inputs_of(types: list[int], **config: Any) -> dict[str, Any]:
    """Of one hint a type."""
    full = {**UNION, **config}
    marks = torch.zeros(2, full["num_control_type"])
    marks[:, types] = 1
    hints = [hint(full, seed=kind) for kind in types]
    told = {"controlnet_cond": hints, "control_type": marks, "control_type_idx": types}
    return {**NET.inputs(**config), **told, "conditioning_scale": 1.0}


@pytest.mark.parametrize("types", [[2], [0, 5], [1, 3, 4]], ids=["one type", "two types", "three types"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_residuals_and_names_are_those_of_diffusers(variant: str, types: list[int]) -> None:
    config = VARIANTS[variant]
    ours, theirs = NET.pair(**config)
    assert dict(ours.config) == dict(theirs.config)
    inputs = inputs_of(types, **config)
    scales = [0.9, 0.5, 0.3][: len(types)]
    for options in (
        {},
        {"conditioning_scale": 0.7},
        {"conditioning_scale": scales, "guess_mode": True},
        {"conditioning_scale": scales, "from_multi": True},
        {"conditioning_scale": scales, "from_multi": True, "guess_mode": True},
    ):
        assert_parity(ours, theirs, {**inputs, **options})


@torch.no_grad()
def test_hints_may_be_given_in_any_order_and_one_for_the_whole_batch() -> None:
    model, inputs = NET.build(), inputs_of([4, 1])
    inputs["controlnet_cond"][0] = inputs["controlnet_cond"][0][:1].expand(2, -1, -1, -1)
    expected = first_output(model(**inputs))
    turned = {name: inputs[name][::-1] for name in ("controlnet_cond", "control_type_idx")}
    torch.testing.assert_close(first_output(model(**{**inputs, **turned})), expected, rtol=1e-4, atol=1e-5)
    inputs["controlnet_cond"][0] = inputs["controlnet_cond"][0][:1]
    torch.testing.assert_close(first_output(model(**inputs)), expected)


@pytest.mark.parametrize(("types", "count"), [(6, 1_257_287_280), (8, 1_257_943_280)])
def test_full_size_networks_have_the_published_number_of_parameters_and_diffusers_keys(types: int, count: int) -> None:
    left = {key: value for key, value in stable_diffusion_xl().items() if key not in ("sample_size", "up_block_types")}
    with torch.device("meta"):
        ours, theirs = (lib.ControlNetUnionModel(**left, num_control_type=types) for lib in LIBRARIES.values())
    assert sum(p.numel() for p in ours.parameters()) == count
    shapes = [{k: v.shape for k, v in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]


# from a base


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("base", ["SDXL", "SD 1.x"])
def test_a_fresh_network_of_a_base_adds_zero_and_leaves_the_base_alone(base: str, library: str, tmp_path: Path) -> None:
    unet = NETWORKS[base].build(library)
    config, weights = dict(unet.config), {name: value.clone() for name, value in unet.state_dict().items()}
    net = hubgen.ControlNetUnionModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8), num_control_type=8)
    copied = [name for name in net.state_dict() if name in weights]
    assert all(torch.equal(net.state_dict()[name], weights[name]) for name in copied)
    assert {name.split(".")[0] for name in net.state_dict() if name not in weights} == {
        *("controlnet_cond_embedding", "controlnet_down_blocks", "controlnet_mid_block", "task_embedding"),
        *("transformer_layes", "spatial_ch_projs", "control_add_embedding"),
    }

    marks = torch.eye(8)[[7, 7]]
    own = {"controlnet_cond": [hint(UNION)], "control_type": marks, "control_type_idx": [7]}
    out = first_output(net(**NETWORKS[base].inputs(), **own))
    assert torch.count_nonzero(out) == 0
    (out - 1).square().mean().backward()
    for name, parameter in net.named_parameters():
        grad = parameter.grad if parameter.grad is not None else torch.zeros(1)
        assert bool(grad.any()) == name.startswith(("controlnet_down_blocks.", "controlnet_mid_block.")), name

    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(7.0)
    assert dict(unet.config) == config
    unet.save_pretrained(tmp_path)
    again = type(unet).from_pretrained(tmp_path)
    for model in (unet, again):
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


# files


def test_a_saved_network_loads_in_diffusers_and_the_other_way_round(tmp_path: Path) -> None:
    ours, theirs = NET.pair()
    for model, other in ((ours, theirs), (theirs, ours)):
        folder = tmp_path / type(model).__module__
        model.save_pretrained(folder)
        assert_parity(type(other).from_pretrained(folder), model, NET.inputs())


def test_a_network_alone_in_a_file_tells_its_config(tmp_path: Path) -> None:
    net = NET.build(num_control_type=8, attention_head_dim=(1, 1))
    path = tmp_path / "promax.safetensors"
    save_file(net.state_dict(), path)
    unseen = {"norm_num_groups": 4, "num_trans_head": 2}
    again = hubgen.ControlNetUnionModel.from_single_file(path, config=unseen)
    assert again.config.num_control_type == 8 and again.config.addition_time_embed_dim == 8
    assert again.state_dict().keys() == net.state_dict().keys()
    assert_parity(again, net, inputs_of([7, 2], num_control_type=8))
    with pytest.raises(ValueError, match="does not fit the config of the ControlNetModel"):
        hubgen.ControlNetModel.from_single_file(path, config=unseen)
    with pytest.raises(ValueError, match="ControlNetUnionModel has no original layout"):
        net.to_original()
    NETWORKS["ControlNet, SDXL"].build().save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="config of a ControlNetModel, expected a ControlNetUnionModel"):
        hubgen.ControlNetUnionModel.from_pretrained(tmp_path / "plain")


# acceleration


@torch.no_grad()
def test_modulations_are_the_answers_of_the_layers_that_see_the_time() -> None:
    net, inputs = NET.build(), NET.inputs()
    table = dict(net.modulations(**{key: inputs[key] for key in ("timestep", "control_type", "added_cond_kwargs")}))
    seen: dict[nn.Module, torch.Tensor] = {}
    for layer in table:
        layer.register_forward_hook(lambda layer, args, out: seen.update({layer: out}))
    net(**inputs)
    assert table and seen.keys() == table.keys()
    assert all(torch.equal(seen[layer], out) for layer, out in table.items())
    assert net.control_add_embedding in net.time_embedders() and net.time_embedding in net.time_embedders()


# what is refused


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"controlnet_conditioning_channel_order": "bgr"}, "`controlnet_conditioning_channel_order`: got 'bgr'"),
        ({"num_trans_channel": 16}, "`num_trans_channel`: got 16, expected 8"),
        ({"num_proj_channel": 16}, "`num_proj_channel`: got 16, expected 8"),
        ({"num_trans_head": 3}, "`num_trans_head`: got 3, expected a divisor"),
        ({"num_control_type": 0}, "`num_control_type`: got 0"),
        ({"addition_time_embed_dim": None}, "`addition_time_embed_dim`: got None"),
        ({"encoder_hid_dim": 8}, "`encoder_hid_dim`: got 8"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NET.fresh(**config)


def test_what_is_no_base_is_refused() -> None:
    for other in (nn.Linear(1, 1), NET.fresh()):
        with pytest.raises(ValueError, match=f"`unet`: got a {type(other).__name__}, expected a UNet2DConditionModel"):
            hubgen.ControlNetUnionModel.from_unet(other)
    with pytest.raises(ValueError, match="'mid_block_type': 'UNetMidBlock2D'"):
        hubgen.ControlNetUnionModel.from_unet(BASE.fresh(mid_block_type="UNetMidBlock2D"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"controlnet_cond": torch.zeros(2, 3, 16, 16)}, r"`controlnet_cond`: got a tensor of .*, expected a list of"),
        ({"controlnet_cond": []}, r"`controlnet_cond`: got \[\]"),
        ({"controlnet_cond": [torch.zeros(2, 3, 16, 16)]}, r"`control_type_idx`: got \[3, 1\], expected 1 numbers"),
        (
            {"controlnet_cond": [torch.zeros(2, 3, 16, 16), torch.zeros(2, 1, 16, 16)]},
            r"`controlnet_cond\[1\]`: got \(2, 1, 16, 16\), expected \(2 or 1, 3, 16, 16\)",
        ),
        ({"control_type": torch.zeros(2, 8)}, r"`control_type`: got \(2, 8\), expected \(2, 6\)"),
        ({"control_type": torch.zeros(1, 6)}, r"`control_type`: got \(1, 6\)"),
        ({"control_type": None}, "`control_type`: got None"),
        ({"control_type_idx": [3]}, r"`control_type_idx`: got \[3\], expected 2 numbers"),
        ({"control_type_idx": [3, 6]}, r"`control_type_idx\[1\]`: got 6, expected a whole number, from 0 to 5"),
        ({"control_type_idx": [-1, 3]}, r"`control_type_idx\[0\]`: got -1"),
        ({"control_type_idx": 3}, "`control_type_idx`: got 3"),
        ({"conditioning_scale": [0.5] * 3}, "`conditioning_scale`: got 3 numbers, expected one, or 2"),
        ({"conditioning_scale": [0.5, float("inf")]}, "`conditioning_scale`: got inf"),
        ({"added_cond_kwargs": None}, r"`added_cond_kwargs`: got the keys \[\]"),
    ],
)
def test_an_input_that_does_not_fit_is_refused_before_anything_is_computed(
    change: dict[str, Any], message: str
) -> None:
    net = NET.fresh()
    net.conv_in.forward = net.time_embedding.forward = None  # whoever calls them fails otherwise
    with pytest.raises(ValueError, match=message):
        net(**{**NET.inputs(), **change})


def test_a_fresh_network_is_zero_where_that_of_diffusers_is() -> None:
    for library in (hubgen, diffusers):
        net = library.ControlNetUnionModel(**UNION)
        zero = {name for name, parameter in net.named_parameters() if not parameter.any()}
        ends = ("controlnet_down_blocks.", "controlnet_mid_block.", "spatial_ch_projs.")
        assert {
            name for name in net.state_dict() if name.startswith((*ends, "controlnet_cond_embedding.conv_out"))
        } < zero
        assert randomize_(net).task_embedding.any()
