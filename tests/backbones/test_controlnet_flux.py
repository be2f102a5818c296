"""FluxControlNetModel: parity with diffusers on random weights, fresh networks of a base, single files, refusals."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file

import hubgen
from hubgen.backbones.flux import flux_dev
from hubgen.formats import flux_controlnet_layout, flux_layout
from hubgen.formats.key_maps import to_original
from hubgen.formats.layouts import detect
from tests.models import LIBRARIES, NETWORKS
from tests.parity import assert_parity, first_output, headers, plain, same, shapes

NET, BASE = NETWORKS["ControlNet, FLUX.1"], NETWORKS["FLUX.1 dev"]
ONE = {"num_mode": None}
XLABS = {**ONE, "num_single_layers": 0, "patch_size": 2, "conditioning_embedding_channels": 4}
VARIANTS: dict[str, dict[str, Any]] = {
    "2+3": ONE,
    "2+0": {**ONE, "num_single_layers": 0},
    "0+2": {**ONE, "num_layers": 0, "num_single_layers": 2},
    "mode": {},
    "mode, no guidance": {"guidance_embeds": False},
    "XLabs": XLABS,
}
FULL_SIZE: dict[str, tuple[dict[str, Any], int]] = {
    "5+10": ({"num_layers": 5, "num_single_layers": 10}, 3_301_925_888),
    "5+10, 10 modes": ({"num_layers": 5, "num_single_layers": 10, "num_mode": 10}, 3_301_956_608),
    "6+0": ({"num_layers": 6, "num_single_layers": 0}, 2_140_876_800),
    "5+0": ({"num_layers": 5, "num_single_layers": 0}, 1_791_605_248),
    "4+0": ({"num_layers": 4, "num_single_layers": 0}, 1_442_333_696),
    "XLabs": (
        {"num_layers": 2, "num_single_layers": 0, "patch_size": 2, "conditioning_embedding_channels": 16},
        743_807_280,
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_residuals_and_names_are_those_of_diffusers(variant: str) -> None:
    changes = VARIANTS[variant]
    ours, theirs = NET.pair(**changes)
    assert dict(ours.config) == dict(theirs.config) and shapes(ours) == shapes(theirs)
    inputs = NET.inputs((6, 8), **changes)
    assert_parity(ours, theirs, inputs)
    assert_parity(ours, theirs, {**inputs, "conditioning_scale": 0.3})
    with torch.no_grad():
        found, expected = ours(**inputs, return_dict=False), theirs(**inputs, return_dict=False)
        assert ours(**inputs).keys() == theirs(**inputs).keys()
    counts = [None if group is None else len(group) for group in found]
    assert counts == [ours.config.num_layers or None, ours.config.num_single_layers or None]
    assert counts == [None if group is None else len(group) for group in expected]


@torch.no_grad()
def test_modes_differ_and_those_of_diffusers_for_none_are_taken_for_none() -> None:
    net, inputs = NET.build(), NET.inputs()
    first = first_output(net(**{**inputs, "controlnet_mode": torch.tensor([[0], [0]])}))
    second = first_output(net(**{**inputs, "controlnet_mode": torch.tensor([[0], [1]])}))
    assert not torch.allclose(first, second, atol=1e-2)
    net, inputs = NET.build(**ONE), NET.inputs(**ONE)
    expected = first_output(net(**inputs))
    assert torch.equal(first_output(net(**inputs, controlnet_mode=torch.tensor([[-1], [-1]]))), expected)


@torch.no_grad()
def test_a_multi_controlnet_of_diffusers_takes_our_networks() -> None:
    nets = [NET.build(library) for library in LIBRARIES]
    inputs = NET.inputs()
    inputs["controlnet_cond"] = [inputs["controlnet_cond"], -inputs["controlnet_cond"]]
    inputs["controlnet_mode"] = [torch.tensor([0, 0]), torch.tensor([3, 3])]
    inputs |= {"conditioning_scale": [0.5, 0.7], "return_dict": False}
    found, expected = (diffusers.FluxMultiControlNetModel([net, net])(**inputs) for net in nets)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_networks_have_the_published_number_of_parameters_and_diffusers_keys(name: str) -> None:
    own, count = FULL_SIZE[name]
    with torch.device("meta"):
        ours, theirs = (library.FluxControlNetModel(**{**flux_dev(), **own}) for library in LIBRARIES.values())
    assert sum(parameter.numel() for parameter in ours.parameters()) == count
    assert shapes(ours) == shapes(theirs)


# from a base


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_network_of_a_base_is_the_one_that_diffusers_makes_and_leaves_the_base_alone(
    library: str, tmp_path: Path
) -> None:
    base = BASE.build(library)
    config, weights = dict(base.config), {name: value.clone() for name, value in base.state_dict().items()}
    heads = {"attention_head_dim": 16, "num_attention_heads": 2}
    for layers in ({"num_layers": 1, "num_single_layers": 2}, {"num_layers": 2, "num_single_layers": 0}):
        net = hubgen.FluxControlNetModel.from_transformer(base, **layers)
        theirs = diffusers.FluxControlNetModel.from_transformer(BASE.build("diffusers"), **layers, **heads)
        expected = plain(theirs.config)
        assert {**plain(net.config), "axes_dims_rope": [4, 6, 6]} == {
            name: [4, 6, 6] if name == "axes_dims_rope" else expected[name] for name in plain(net.config)
        }
        assert net.state_dict().keys() == theirs.state_dict().keys()
        assert all(torch.equal(net.state_dict()[name], value) for name, value in theirs.state_dict().items())
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.fill_(7.0)
        assert dict(base.config) == config
        assert all(torch.equal(value, weights[name]) for name, value in base.state_dict().items())
    base.save_pretrained(tmp_path)
    again = type(base).from_pretrained(tmp_path)
    assert all(torch.equal(value, weights[name]) for name, value in again.state_dict().items())


# files


@pytest.mark.parametrize("variant", ["mode", "XLabs"])
def test_a_saved_network_loads_in_diffusers_and_the_other_way_round(variant: str, tmp_path: Path) -> None:
    ours, theirs = NET.pair(**VARIANTS[variant])
    for model, other in ((ours, theirs), (theirs, ours)):
        folder = tmp_path / type(model).__module__
        model.save_pretrained(folder)
        for cls in (type(model), type(other)):
            assert_parity(cls.from_pretrained(folder), model, NET.inputs(**VARIANTS[variant]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_network_comes_back_from_either_layout_with_its_config_inferred(variant: str, tmp_path: Path) -> None:
    net = NET.build(**VARIANTS[variant])
    expected = {**plain(net.config), "axes_dims_rope": [2, 7, 7]}
    files = {"own": net.state_dict()}
    if net.config.num_layers:
        files["XLabs"] = net.to_original()
        assert {"controlnet_blocks.0.weight", "pos_embed_input.weight", "img_in.bias"} <= files["XLabs"].keys()
    for name, state in files.items():
        path = tmp_path / f"{name}.safetensors"
        save_file({key: value.contiguous() for key, value in state.items()}, path)
        axes = {"axes_dims_rope": [4, 6, 6]}  # narrower heads than those that were published have other shares
        again = hubgen.FluxControlNetModel.from_single_file(path, config=axes)
        assert same(again, net) and not again.training
        assert plain(again.config) == {**expected, **axes}
        assert_parity(again, net, NET.inputs(**VARIANTS[variant]))


def test_xlabs_files_are_told_from_those_of_bases_and_of_other_networks(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({name: value.contiguous() for name, value in NET.build(**XLABS).to_original().items()}, path)
    for cls in (hubgen.FluxTransformer2DModel, hubgen.ControlNetModel, hubgen.SD3ControlNetModel):
        with pytest.raises(ValueError, match=rf"holds a ControlNet of FLUX.1 \(controlnet\), no {cls.__name__}"):
            cls.from_single_file(path)
    with pytest.raises(ValueError, match=r"no pipeline; `FluxControlNetModel.from_single_file` reads it"):
        hubgen.TextToImagePipeline.from_single_file(path)
    save_file({name: value.contiguous() for name, value in BASE.build().to_original().items()}, path)
    with pytest.raises(ValueError, match=r"holds FLUX.1 \(transformer\), no FluxControlNetModel"):
        hubgen.FluxControlNetModel.from_single_file(path)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_a_full_size_network_is_recognised_and_tells_its_config(name: str) -> None:
    with torch.device("meta"):
        net = hubgen.FluxControlNetModel(**{**flux_dev(), **FULL_SIZE[name][0]})
    state = net.state_dict()
    original = to_original(state, flux_controlnet_layout.key_map(net.config))
    assert detect(headers(original)) == ("flux-controlnet", "")
    if name == "XLabs":  # as x-flux names them
        hints = {key for key in original if key.startswith("input_hint_block.") and key.endswith(".weight")}
        assert hints == {f"input_hint_block.{i}.weight" for i in range(0, 16, 2)}
    inferred = flux_controlnet_layout.infer_config(headers(original))
    assert inferred == flux_controlnet_layout.infer_own_config(headers(state))
    assert inferred == {**plain(net.config), "axes_dims_rope": [16, 56, 56]}
    with torch.device("meta"):
        base = hubgen.FluxTransformer2DModel(**{**flux_dev(), "num_layers": 1, "num_single_layers": 1})
    assert detect(headers(to_original(base.state_dict(), flux_layout.key_map(base.config))))[0] == "flux"


# what is refused


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"axes_dims_rope": (4, 6, 8)}, r"`axes_dims_rope`: got \(4, 6, 8\), expected .* = 16"),
        ({"conditioning_embedding_channels": 4}, "got 4 \\* 1², expected `in_channels` = 16"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NET.fresh(**config)


def test_what_does_not_fit_the_base_is_refused() -> None:
    make, base = hubgen.FluxControlNetModel.from_transformer, BASE.fresh()
    with pytest.raises(ValueError, match="`num_attention_heads`: got 24, expected 2, as the base has"):
        make(base, 1, 1, num_attention_heads=24)
    with pytest.raises(ValueError, match="`conditioning_embedding_channels` .*: got 5 .*, expected `in_channels` = 16"):
        make(base, 1, 1, conditioning_embedding_channels=5)


PIXELS = {"controlnet_cond": torch.zeros(2, 3, 64, 64)}


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ({}, {"controlnet_mode": None}, r"`controlnet_mode`: got None, expected whole numbers, \(2, 1\), for a union"),
        ({}, {"controlnet_mode": torch.tensor([1, 2])}, r"`controlnet_mode`: got \(2,\) of torch.int64, expected"),
        ({}, {"controlnet_mode": torch.tensor([[1.0], [2.0]])}, r"`controlnet_mode`: got \(2, 1\) of torch.float32"),
        ({}, {"controlnet_mode": torch.tensor([[1], [4]])}, r"`controlnet_mode`: got \[1, 4\], expected 0 to 3"),
        ({}, {"controlnet_mode": torch.tensor([[-1], [0]])}, r"`controlnet_mode`: got \[-1, 0\], expected 0 to 3"),
        (
            ONE,
            {"controlnet_mode": torch.tensor([[1], [2]])},
            "`controlnet_mode`: got a tensor, expected None: .* no union",
        ),
        (ONE, {"controlnet_cond": torch.zeros(2, 16, 8)}, r"`controlnet_cond`: got \(2, 16, 8\), .*\(2 or 1, 16, 16\)"),
        (ONE, {"controlnet_cond": torch.zeros(2, 15, 16)}, r"`controlnet_cond`: got \(2, 15, 16\)"),
        (ONE, {"controlnet_cond": torch.zeros(3, 16, 16)}, r"`controlnet_cond`: got \(3, 16, 16\)"),
        (ONE, {"controlnet_cond": None}, "`controlnet_cond`: got NoneType"),
        (ONE, PIXELS, r"`controlnet_cond`: got \(2, 3, 64, 64\), .*: as x_t, of `in_channels` = 16"),
        (XLABS, {"controlnet_cond": torch.zeros(2, 16, 16)}, r"`controlnet_cond`: got \(2, 16, 16\), .* pixels"),
        (XLABS, {"controlnet_cond": torch.zeros(2, 4, 64, 64)}, r"`controlnet_cond`: got \(2, 4, 64, 64\), .*1, 3, 64"),
        (
            XLABS,
            {"controlnet_cond": torch.zeros(2, 3, 64, 60)},
            "got 64 x 60, expected multiples of 16 that make up the 16",
        ),
        (
            XLABS,
            {"controlnet_cond": torch.zeros(2, 3, 64, 32)},
            "got 64 x 32, expected multiples of 16 that make up the 16",
        ),
        (
            ONE,
            {"hidden_states": torch.zeros(2, 16, 12)},
            r"`hidden_states`: got \(2, 16, 12\), expected \(2, tokens, 16",
        ),
        (ONE, {"guidance": None}, r"`guidance`: got None, expected \(2\)"),
        ({**ONE, "guidance_embeds": False}, {"guidance": torch.ones(2)}, "`guidance`: got a tensor, expected None"),
        (ONE, {"conditioning_scale": float("inf")}, "`conditioning_scale`: got inf, expected a finite number"),
    ],
)
def test_an_input_that_does_not_fit_is_refused_before_anything_is_computed(
    config: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    net = NET.fresh(**config)
    net.x_embedder.forward = net.time_text_embed.forward = None  # whoever calls them fails otherwise
    with pytest.raises(ValueError, match=message):
        net(**{**NET.inputs(**config), **change})
