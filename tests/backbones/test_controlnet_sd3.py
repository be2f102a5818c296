"""SD3ControlNetModel: parity with diffusers on random weights, fresh networks of a base, single files, refusals."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FirstBlockCacheConfig
from safetensors.torch import save_file
from torch import nn

import hubgen
from hubgen.backbones.controlnet_sd3 import stable_diffusion_3_5_large_controlnet
from hubgen.backbones.sd3 import stable_diffusion_3_medium
from hubgen.formats import sd3_controlnet_layout
from hubgen.formats.key_maps import to_original
from hubgen.formats.layouts import detect
from tests.models import LIBRARIES, NETWORKS
from tests.parity import assert_parity, first_output, headers, plain, same, shapes

NET, IMAGE_NET, BASE = NETWORKS["ControlNet, SD 3"], NETWORKS["ControlNet, SD 3.5 large"], NETWORKS["SD 3"]
VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "text": (NET, {}),
    "text, no norms": (NET, {"qk_norm": None}),
    "a mask": (NET, {"extra_conditioning_channels": 1}),
    "dual attention": (NET, {"dual_attention_layers": (0, 1, 2)}),
    "no positions": (NET, {"pos_embed_type": None}),
    "no table": (NET, {"pos_embed_max_size": None}),
    "image alone": (IMAGE_NET, {}),
    "image alone, embedded": (IMAGE_NET, {"use_pos_embed": True, "pos_embed_type": "sincos"}),
}
FULL_SIZE: dict[str, tuple[dict[str, Any], int]] = {
    "6": ({**stable_diffusion_3_medium(), "num_layers": 6}, 538_805_760),
    "12": ({**stable_diffusion_3_medium(), "num_layers": 12}, 1_062_855_168),
    "23": ({**stable_diffusion_3_medium(), "num_layers": 23}, 2_023_612_416),
    "23 and a mask": (
        {**stable_diffusion_3_medium(), "num_layers": 23, "extra_conditioning_channels": 1},
        2_023_618_560,
    ),
    "SD3.5 large": (stable_diffusion_3_5_large_controlnet(), 2_153_518_976),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_residuals_and_names_are_those_of_diffusers(variant: str) -> None:
    network, changes = VARIANTS[variant]
    ours, theirs = network.pair(**changes)
    assert dict(ours.config) == dict(theirs.config) and shapes(ours) == shapes(theirs)
    inputs = network.inputs(**changes)
    assert_parity(ours, theirs, inputs)
    assert_parity(ours, theirs, {**inputs, "conditioning_scale": 0.3})
    with torch.no_grad():
        found, (residuals,) = ours(**inputs), ours(**inputs, return_dict=False)
    assert isinstance(found, type(theirs(**inputs)))
    assert [one.shape for one in residuals] == [(2, 16, 32)] * 2
    assert all(torch.equal(*pair) for pair in zip(residuals, found.controlnet_block_samples, strict=True))


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_networks_have_the_published_number_of_parameters_and_diffusers_keys(name: str) -> None:
    config, count = FULL_SIZE[name]
    with torch.device("meta"):
        ours, theirs = (library.SD3ControlNetModel(**config) for library in LIBRARIES.values())
    assert sum(parameter.numel() for parameter in ours.parameters()) == count
    assert shapes(ours) == shapes(theirs)


# from a base


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("changes", [{}, {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}])
def test_a_network_of_a_base_is_the_one_that_diffusers_makes_and_leaves_the_base_alone(
    changes: dict[str, Any], library: str, tmp_path: Path
) -> None:
    base = BASE.build(library, **changes)
    config, weights = dict(base.config), {name: value.clone() for name, value in base.state_dict().items()}
    for layers in (2, None):  # the whole base is more than diffusers can copy
        net = hubgen.SD3ControlNetModel.from_transformer(base, layers, num_extra_conditioning_channels=1)
        assert len(net.transformer_blocks) == (layers or 3)
        if layers:
            theirs = diffusers.SD3ControlNetModel.from_transformer(BASE.build("diffusers", **changes), layers, 1)
            assert plain(net.config) == {name: plain(theirs.config)[name] for name in plain(net.config)}
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


@torch.no_grad()
def test_copied_blocks_compute_what_the_base_computes_the_last_one_too() -> None:
    base = BASE.build()
    net = hubgen.SD3ControlNetModel.from_transformer(base, num_layers=None, num_extra_conditioning_channels=0)
    for zero in net.controlnet_blocks:  # makes each residual the block's output
        nn.init.eye_(zero.weight)
    seen: list[torch.Tensor] = []
    for block in base.transformer_blocks:
        block.register_forward_hook(lambda block, args, out: seen.append(out[1]))
    base(**BASE.inputs())
    (residuals,) = net(**{**NET.inputs(), **BASE.inputs()}, return_dict=False)
    torch.testing.assert_close(residuals, seen, rtol=1e-5, atol=1e-5)


def test_a_base_with_an_adapter_gives_its_own_weights() -> None:
    from peft import LoraConfig

    base = BASE.build()
    expected = hubgen.SD3ControlNetModel.from_transformer(base, 2).state_dict()
    base.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    found = hubgen.SD3ControlNetModel.from_transformer(base, 2).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


# files


@pytest.mark.parametrize("variant", ["a mask", "image alone"])
def test_a_saved_network_loads_in_diffusers_and_the_other_way_round(variant: str, tmp_path: Path) -> None:
    network, changes = VARIANTS[variant]
    ours, theirs = network.pair(**changes)
    for model, other in ((ours, theirs), (theirs, ours)):
        folder = tmp_path / type(model).__module__
        model.save_pretrained(folder)
        for cls in (type(model), type(other)):
            assert_parity(cls.from_pretrained(folder), model, network.inputs(**changes))


def test_an_embedding_that_diffusers_put_into_a_network_is_left_in_the_file(tmp_path: Path) -> None:
    ours, theirs = IMAGE_NET.pair()
    theirs.pos_embed = theirs._get_pos_embed_from_transformer(BASE.build("diffusers"))
    theirs.save_pretrained(tmp_path)
    assert same(hubgen.SD3ControlNetModel.from_pretrained(tmp_path), ours)


UNSEEN: dict[str, Any] = {"sample_size": 8, "attention_head_dim": 8, "num_attention_heads": 4}
"""What files do not tell of networks without norms, and all that were published have the same"""


def test_a_network_comes_back_from_stabilitys_layout(tmp_path: Path) -> None:
    net, path = IMAGE_NET.build(), tmp_path / "x.safetensors"
    original = net.to_original()
    shape = original["transformer_blocks.0.attn.qkv.weight"].shape
    assert shape == (96, 32) and "transformer_blocks.1.adaLN_modulation.1.bias" in original
    assert {"controlnet_blocks.0.weight", "pos_embed_input.proj.bias"} <= original.keys()
    save_file({**original, "control_type": torch.tensor([2], dtype=torch.int32)}, path)
    again = hubgen.SD3ControlNetModel.from_single_file(path, config=UNSEEN)
    assert same(again, net) and not again.training
    assert again.to_original()["control_type"].tolist() == [2] and "control_type" not in original
    again.save_pretrained(tmp_path / "saved")  # diffusers passes it over, and keeps it
    for cls in (diffusers.SD3ControlNetModel, hubgen.SD3ControlNetModel):
        assert cls.from_pretrained(tmp_path / "saved").config["_control_type"] == 2
    assert_parity(again, net, IMAGE_NET.inputs())
    for cls in (hubgen.ControlNetModel, hubgen.SD3Transformer2DModel, hubgen.FluxControlNetModel):
        with pytest.raises(ValueError, match=rf"holds a ControlNet of .* 3.5 large \(controlnet\), no {cls.__name__}"):
            cls.from_single_file(path)
    with pytest.raises(ValueError, match=r"no pipeline; `SD3ControlNetModel.from_single_file` reads it"):
        hubgen.TextToImagePipeline.from_single_file(path)


@pytest.mark.parametrize("variant", ["text", "text, no norms", "a mask", "dual attention", "no table", "image alone"])
def test_a_network_comes_back_from_diffusers_layout_with_its_config_inferred(variant: str, tmp_path: Path) -> None:
    network, changes = VARIANTS[variant]
    net, path = network.build(**changes), tmp_path / "x.safetensors"
    save_file(net.state_dict(), path)
    unseen = UNSEEN if net.config.qk_norm is None else {"sample_size": 8}
    again = hubgen.SD3ControlNetModel.from_single_file(path, config=unseen)
    assert same(again, net)
    assert_parity(again, net, network.inputs(**changes))


@pytest.mark.parametrize("name", FULL_SIZE)
def test_a_full_size_network_is_recognised_and_tells_its_config(name: str) -> None:
    with torch.device("meta"):
        net = hubgen.SD3ControlNetModel(**FULL_SIZE[name][0])
    state = net.state_dict()
    found = [sd3_controlnet_layout.infer_own_config(headers(state))]
    if name == "SD3.5 large":
        original = to_original(state, sd3_controlnet_layout.key_map(net.config))
        assert detect(headers(original)) == ("sd3-controlnet", "")
        found.append(sd3_controlnet_layout.infer_config(headers(original)))
    for inferred in found:
        assert inferred is not None
        for key, value in inferred.items():
            expected = net.config[key]
            assert value == (list(expected) if isinstance(expected, tuple) else expected), key


def test_a_damaged_kind_of_hints_is_refused(tmp_path: Path) -> None:
    save_file({**IMAGE_NET.build().to_original(), "control_type": torch.tensor([0, 1])}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x.safetensors: control_type: got \[0.0, 1.0\], expected one whole number"):
        hubgen.SD3ControlNetModel.from_single_file(tmp_path / "x.safetensors", config=UNSEEN)


def test_a_network_with_text_has_no_layout_but_diffusers() -> None:
    with pytest.raises(ValueError, match="`joint_attention_dim`: got 16, expected None, and `use_pos_embed`: got True"):
        NET.build().to_original()


# what is refused


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"caption_projection_dim": 24}, r"`caption_projection_dim`: got 24, expected .* = 32"),
        ({"pos_embed_type": "learned"}, "`pos_embed_type`: got 'learned', expected 'sincos' or None"),
        ({"qk_norm": "layer_norm"}, "`qk_norm`: got 'layer_norm', expected 'rms_norm' or None"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NET.fresh(**config)


def test_a_step_cache_of_the_network_is_refused() -> None:
    with pytest.raises(ValueError, match="`config`: got a FirstBlockCacheConfig, expected none"):
        NET.fresh().enable_cache(FirstBlockCacheConfig())


@pytest.mark.parametrize(
    ("network", "change", "message"),
    [
        (
            NET,
            {"controlnet_cond": torch.zeros(2, 5, 8, 8)},
            r"`controlnet_cond`: got \(2, 5, 8, 8\), .*\(2 or 1, 4, 8, 8",
        ),
        (NET, {"controlnet_cond": torch.zeros(2, 4, 8, 6)}, r"`controlnet_cond`: got \(2, 4, 8, 6\)"),
        (NET, {"controlnet_cond": torch.zeros(3, 4, 8, 8)}, r"`controlnet_cond`: got \(3, 4, 8, 8\)"),
        (NET, {"controlnet_cond": None}, "`controlnet_cond`: got NoneType"),
        (
            NET,
            {"hidden_states": torch.zeros(2, 16, 32)},
            r"`hidden_states`: got \(2, 16, 32\), expected \(2, 4, height",
        ),
        (
            NET,
            {"hidden_states": torch.zeros(2, 4, 7, 8), "controlnet_cond": torch.zeros(2, 4, 7, 8)},
            "`controlnet_cond`: got 7 x 8, expected multiples of `patch_size` = 2",
        ),
        (NET, {"encoder_hidden_states": None}, r"`encoder_hidden_states`: got None, expected \(2, tokens, 16\)"),
        (NET, {"pooled_projections": torch.zeros(2, 3)}, r"`pooled_projections`: got \(2, 3\), expected \(2, 16\)"),
        (NET, {"timestep": None}, r"`timestep`: got None, expected \(2\)"),
        (NET, {"conditioning_scale": float("nan")}, "`conditioning_scale`: got nan, expected a finite number"),
        (IMAGE_NET, {"encoder_hidden_states": torch.zeros(2, 5, 16)}, r"`encoder_hidden_states`: .*, expected None"),
        (IMAGE_NET, {"hidden_states": torch.zeros(2, 4, 8, 8)}, r"`hidden_states`: got .*, expected \(2, tokens, 32\)"),
        (
            IMAGE_NET,
            {"hidden_states": torch.zeros(2, 16, 24)},
            r"`hidden_states`: got \(2, 16, 24\), expected \(2, tok",
        ),
        (IMAGE_NET, {"hidden_states": torch.zeros(2, 9, 32)}, "got 8 x 8, which are 16 patches, expected 9"),
    ],
)
def test_an_input_that_does_not_fit_is_refused_before_anything_is_computed(
    network: Any, change: dict[str, Any], message: str
) -> None:
    net = network.fresh()
    net.pos_embed_input.forward = net.time_text_embed.forward = None  # whoever calls them fails otherwise
    with pytest.raises(ValueError, match=message):
        net(**{**network.inputs(), **change})


@torch.no_grad()
def test_one_hint_and_one_time_serve_the_whole_batch() -> None:
    net, inputs = NET.build(), NET.inputs()
    one = {name: inputs[name][:1] for name in ("controlnet_cond", "timestep")}
    both = {name: value.repeat(2, *[1] * (value.ndim - 1)) for name, value in one.items()}
    expected = first_output(net(**{**inputs, **both}))
    torch.testing.assert_close(first_output(net(**{**inputs, **one})), expected)
