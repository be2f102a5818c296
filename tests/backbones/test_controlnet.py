"""ControlNetModel: parity with diffusers on random weights, fresh networks of a base, single files, refusals."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import hubgen
from hubgen.backbones.unet_condition_config import stable_diffusion_1, stable_diffusion_2, stable_diffusion_xl
from hubgen.formats import ldm_controlnet
from hubgen.formats.key_maps import to_original, to_ours
from hubgen.formats.layouts import detect
from tests.models import CONTROLNET, CONTROLNET_SDXL, LIBRARIES, NETWORKS, hint
from tests.parity import assert_parity, first_output, headers, plain, randomize_, same

NET = NETWORKS["ControlNet, SD 1.x"]
SMALL = {
    **CONTROLNET_SDXL,
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownBlock2D",) * 3,
    "mid_block_type": "UNetMidBlock2D",
    "attention_head_dim": (1, 2, 2),
    "transformer_layers_per_block": (1, 2, 2),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "sd1": {"layers_per_block": 2},
    "sd2": {"attention_head_dim": (2, 4), "use_linear_projection": True, "upcast_attention": True},
    "sdxl": CONTROLNET_SDXL,
    "sdxl, small": SMALL,
    "bgr": {"controlnet_conditioning_channel_order": "bgr"},
    "pooled": {"global_pool_conditions": True},
    "hint of one channel, four sizes": {
        "conditioning_channels": 1,
        "conditioning_embedding_out_channels": (4, 4, 8, 8),
    },
    "classes": {"num_class_embeds": 7},
    "timestep class": {"class_embed_type": "timestep"},
    "projected pooled text": {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 20},
    "a vector as the class": {"class_embed_type": "identity"},
    "odd": {"downsample_padding": 0, "mid_block_scale_factor": 1.5, "flip_sin_to_cos": False, "in_channels": 5},
}
FULL_SIZE = {
    "SD 1.5": (stable_diffusion_1(), {}, 361_279_120),
    "SD 2.1": (stable_diffusion_2(), {}, 364_228_240),
    "SDXL": (stable_diffusion_xl(), {}, 1_251_014_160),
    "SDXL, small": (
        stable_diffusion_xl(),
        {"down_block_types": ("DownBlock2D",) * 3, "mid_block_type": "UNetMidBlock2D"},
        125_690_640,
    ),
}


def with_up(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the base of a network."""
    up = [kind.replace("Down", "Up") for kind in reversed(config["down_block_types"])]
    return {**{key: value for key, value in config.items() if key not in OWN}, "up_block_types": up}


OWN = (
    "conditioning_channels",
    "conditioning_embedding_out_channels",
    "controlnet_conditioning_channel_order",
    "global_pool_conditions",
)


def base_of(library: str = "hubgen", **changes: Any) -> Any:
    return randomize_(LIBRARIES[library].UNet2DConditionModel(**with_up({**CONTROLNET, **changes}))).eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_residuals_and_names_are_those_of_diffusers(variant: str) -> None:
    config = VARIANTS[variant]
    ours, theirs = NET.pair(**config)
    assert dict(ours.config) == dict(theirs.config)
    inputs = NET.inputs(**config)
    assert_parity(ours, theirs, inputs)
    assert_parity(ours, theirs, {**inputs, "conditioning_scale": 0.3, "guess_mode": True})
    with torch.no_grad():
        found, expected = ours(**inputs), theirs(**inputs)
    assert isinstance(found, type(expected))
    shapes = [[tuple(one.shape) for one in out.down_block_res_samples] for out in (found, expected)]
    assert shapes[0] == shapes[1] and found.mid_block_res_sample.shape == expected.mid_block_res_sample.shape


@pytest.mark.parametrize("size", [(7, 9), (1, 3)])
def test_sizes_that_do_not_halve_evenly_agree_with_diffusers(size: tuple[int, int]) -> None:
    ours, theirs = NET.pair()
    assert_parity(ours, theirs, NET.inputs(size))
    odd = {**NET.inputs(size), "controlnet_cond": torch.rand(2, 3, 2 * size[0] - 1, 2 * size[1])}
    assert_parity(ours, theirs, odd)


@torch.no_grad()
def test_one_hint_serves_the_whole_batch_and_the_scale_may_be_a_tensor() -> None:
    model, inputs = NET.build(), NET.inputs()
    inputs["controlnet_cond"] = inputs["controlnet_cond"][:1].expand(2, -1, -1, -1)
    expected = first_output(model(**inputs, conditioning_scale=0.5))
    inputs["controlnet_cond"] = inputs["controlnet_cond"][:1]
    torch.testing.assert_close(first_output(model(**inputs, conditioning_scale=torch.tensor(0.5))), expected)
    down, mid = model(**inputs, return_dict=False)
    assert torch.equal(model(**inputs).down_block_res_samples[1], down[1]) and mid.shape == (2, 16, 4, 4)


@torch.no_grad()
def test_the_base_takes_the_residuals_of_every_variant() -> None:
    for variant in ("sd1", "sdxl", "sdxl, small", "pooled"):
        config = {**CONTROLNET, **VARIANTS[variant]}
        inputs = NET.inputs(**config)
        down, mid = NET.build(**config)(**inputs, return_dict=False)
        del inputs["controlnet_cond"]
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        unet = base_of(**config)
        assert (unet(**inputs, **residuals).sample - unet(**inputs).sample).abs().max() > 1e-2


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_networks_have_the_published_number_of_parameters_and_diffusers_keys(name: str) -> None:
    base, own, count = FULL_SIZE[name]
    left = {key: value for key, value in base.items() if key not in ("sample_size", "up_block_types")}
    with torch.device("meta"):
        ours, theirs = (library.ControlNetModel(**{**left, **own}) for library in LIBRARIES.values())
    assert sum(p.numel() for p in ours.parameters()) == count
    shapes = [{k: v.shape for k, v in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]


# from a base


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("variant", ["sd1", "sd2", "sdxl", "classes"])
def test_a_network_of_a_base_is_the_one_that_diffusers_makes_and_leaves_the_base_alone(
    variant: str, library: str, tmp_path: Path
) -> None:
    base = base_of(library, **VARIANTS[variant])
    config, weights = dict(base.config), {name: value.clone() for name, value in base.state_dict().items()}
    hints = {"conditioning_embedding_out_channels": (4, 8), "conditioning_channels": 1}
    net = hubgen.ControlNetModel.from_unet(base, **hints)
    theirs = diffusers.ControlNetModel.from_unet(base_of("diffusers", **VARIANTS[variant]), **hints)
    assert plain(net.config) == plain(theirs.config)
    for name, value in theirs.state_dict().items():
        if not name.startswith("controlnet_cond_embedding."):
            assert torch.equal(net.state_dict()[name], value), name

    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(7.0)
    assert dict(base.config) == config
    assert all(torch.equal(value, weights[name]) for name, value in base.state_dict().items())
    base.save_pretrained(tmp_path)
    again = type(base).from_pretrained(tmp_path)
    assert all(torch.equal(value, weights[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize("load", [True, False])
def test_a_fresh_network_adds_exactly_zero_and_only_its_zero_layers_learn_at_first(load: bool) -> None:
    net = hubgen.ControlNetModel.from_unet(
        base_of(), conditioning_embedding_out_channels=(4, 8), load_weights_from_unet=load
    )
    inputs = NET.inputs()
    out = first_output(net(**inputs))
    assert torch.count_nonzero(out) == 0
    (out - 1).square().mean().backward()
    for name, parameter in net.named_parameters():
        grad = parameter.grad if parameter.grad is not None else torch.zeros(1)
        learns = name.startswith(("controlnet_down_blocks.", "controlnet_mid_block."))
        assert bool(grad.any()) == learns, name


def test_a_base_with_an_adapter_gives_its_own_weights() -> None:
    from peft import LoraConfig

    base = base_of()
    expected = hubgen.ControlNetModel.from_unet(base, conditioning_embedding_out_channels=(4, 8)).state_dict()
    base.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    net = hubgen.ControlNetModel.from_unet(base, conditioning_embedding_out_channels=(4, 8))
    left = [name for name in expected if not name.startswith("controlnet_cond_embedding.")]
    assert all(torch.equal(net.state_dict()[name], expected[name]) for name in left)


@torch.no_grad()
def test_projected_text_tokens_are_projected_as_in_the_base() -> None:
    base = base_of(encoder_hid_dim=20)
    net = hubgen.ControlNetModel.from_unet(base, conditioning_embedding_out_channels=(4, 8))
    inputs = NET.inputs(encoder_hid_dim=20)
    assert torch.equal(net.encoder_hid_proj.weight, base.encoder_hid_proj.weight)
    assert torch.count_nonzero(first_output(net(**inputs))) == 0


# files


@pytest.mark.parametrize("variant", ["sd1", "sdxl, small"])
def test_a_saved_network_loads_in_diffusers_and_the_other_way_round(variant: str, tmp_path: Path) -> None:
    ours, theirs = NET.pair(**VARIANTS[variant])
    for model, other in ((ours, theirs), (theirs, ours)):
        folder = tmp_path / type(model).__module__
        model.save_pretrained(folder)
        assert_parity(type(other).from_pretrained(folder), model, NET.inputs(**VARIANTS[variant]))


def write(path: Path, state: dict[str, torch.Tensor], prefix: str = "") -> Path:
    save_file({prefix + name: tensor.clone().contiguous() for name, tensor in state.items()}, path)
    return path


UNSEEN = {"norm_num_groups": 4}
"""What no file tells, and no published network has"""
FILES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sd1": ({"layers_per_block": 2}, {"attention_head_dim": 2}),
    "sd2": ({"use_linear_projection": True, "attention_head_dim": (1, 1)}, {}),
    "sdxl": (
        {**CONTROLNET_SDXL, "attention_head_dim": (1, 1), "addition_time_embed_dim": 256, **{
            "projection_class_embeddings_input_dim": 12 + 6 * 256}},
        {},
    ),
    "sdxl, small": (SMALL, {"addition_time_embed_dim": 8, "cross_attention_dim": 16}),
    "four sizes": ({"conditioning_embedding_out_channels": (4, 4, 8, 8)}, {"attention_head_dim": 2}),
}  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "control_model."])
@pytest.mark.parametrize("name", FILES)
def test_a_network_comes_back_from_either_layout_with_its_config_inferred(
    name: str, prefix: str, tmp_path: Path
) -> None:
    config, unseen = FILES[name]
    net = NET.build(**config)
    original = net.to_original()
    assert {"input_hint_block.0.weight", "zero_convs.0.0.bias", "middle_block_out.0.weight"} <= original.keys()
    path = write(tmp_path / "ldm.safetensors", original, prefix)
    own = write(tmp_path / "own.safetensors", net.state_dict())
    for file in (path, own):
        again = hubgen.ControlNetModel.from_single_file(file, config={**UNSEEN, **unseen})
        assert same(again, net) and not again.training
        assert_parity(again, net, NET.inputs(**config))


@pytest.mark.parametrize("name", FULL_SIZE)
def test_a_full_size_network_is_recognised_and_tells_its_config(name: str) -> None:
    base, own, _ = FULL_SIZE[name]
    left = {key: value for key, value in base.items() if key not in ("sample_size", "up_block_types")}
    with torch.device("meta"):
        net = hubgen.ControlNetModel(**{**left, **own})
    state = net.state_dict()
    original = to_original(state, ldm_controlnet.key_map(net.config))
    assert detect(headers(original)) == ("controlnet", "")
    assert detect(headers({f"control_model.{key}": value for key, value in original.items()}))[0] == "controlnet"
    inferred = ldm_controlnet.infer_config(headers(original))
    assert inferred == ldm_controlnet.infer_own_config(headers(state))
    back = to_ours(original, ldm_controlnet.key_map(inferred))
    assert {key: value.shape for key, value in back.items()} == {key: value.shape for key, value in state.items()}
    exempt = ("transformer_layers_per_block",) if "small" in name else ()  # it has no transformers
    for key, value in inferred.items():
        expected = net.config[key]
        assert key in exempt or value == (list(expected) if isinstance(expected, tuple) else expected), key


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_diffusers_reads_the_original_layout_as_we_do(name: str, tmp_path: Path) -> None:
    net = NET.build(**FILES[name][0], conditioning_embedding_out_channels=(4, 4, 8, 8))
    net.save_pretrained(tmp_path / "folder")
    path = write(tmp_path / "x.safetensors", net.to_original(), "control_model.")
    theirs = diffusers.ControlNetModel.from_single_file(str(path), config=str(tmp_path / "folder"))
    assert same(net, theirs)
    assert same(hubgen.ControlNetModel.from_single_file(path, config=tmp_path / "folder"), theirs)


def test_network_and_base_of_one_file_are_told_apart(tmp_path: Path) -> None:
    net, base = NET.build(), base_of()
    state = {f"control_model.{name}": value for name, value in net.to_original().items()}
    state |= {f"model.diffusion_model.{name}": value for name, value in base.to_original().items()}
    path = write(tmp_path / "x.safetensors", state)
    config = {**UNSEEN, "attention_head_dim": 2}
    assert same(hubgen.ControlNetModel.from_single_file(path, config=config), net)
    assert same(hubgen.UNet2DConditionModel.from_single_file(path, config=config), base)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["lllite_unet_down_blocks_0_attentions_0.lora_down.weight"], "looks like a ControlLLLite of kohya's"),
        (["lora_controlnet", "input_blocks.1.1.proj_in.down"], "looks like a Control-LoRA"),
        (["adapter.body.0.in_conv.weight"], "looks like a T2I-adapter"),
        (
            ["controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.3.conv1.weight"],
            "x.safetensors: no such",
        ),
        (["input_hint_block.0.weight"], "x.safetensors: no such ControlNet: "),
    ],
)
def test_a_file_of_another_kind_is_refused_by_name(keys: list[str], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {key: torch.zeros(1, 1) for key in keys})
    with pytest.raises(ValueError, match=message):
        hubgen.ControlNetModel.from_single_file(path)


def test_files_of_networks_and_of_bases_are_not_taken_for_each_other(tmp_path: Path) -> None:
    net = write(tmp_path / "net.safetensors", NET.build().to_original())
    base = write(tmp_path / "base.safetensors", base_of().to_original())
    with pytest.raises(ValueError, match=r"holds a ControlNet .* \(controlnet\), no UNet2DConditionModel"):
        hubgen.UNet2DConditionModel.from_single_file(net)
    with pytest.raises(ValueError, match=r"holds Stable Diffusion 1.x \(unet\), no ControlNetModel"):
        hubgen.ControlNetModel.from_single_file(base)
    with pytest.raises(ValueError, match=r"no pipeline; `ControlNetModel.from_single_file` reads it"):
        hubgen.TextToImagePipeline.from_single_file(net)
    NET.build().save_pretrained(tmp_path / "folder")
    with pytest.raises(ValueError, match="config of a ControlNetModel, expected a UNet2DConditionModel"):
        hubgen.UNet2DConditionModel.from_pretrained(tmp_path / "folder")


# acceleration


@torch.no_grad()
def test_modulations_are_the_answers_of_the_layers_that_see_the_time() -> None:
    net, inputs = NETWORKS["ControlNet, SDXL"].build(), NETWORKS["ControlNet, SDXL"].inputs()
    told = {"added_cond_kwargs": inputs["added_cond_kwargs"], "timestep": inputs["timestep"]}
    table = dict(net.modulations(**told))
    seen = {}
    for layer in table:
        layer.register_forward_hook(lambda layer, args, out: seen.update({layer: out}))
    net(**inputs)
    assert len(table) == 3 + 1 and seen.keys() == table.keys()
    assert all(torch.equal(seen[layer], out) for layer, out in table.items())


@torch.no_grad()
def test_calls_are_accelerated_to_the_same_residuals() -> None:
    net, inputs = NET.build(), NET.inputs()
    expected = first_output(net(**inputs))
    hubgen.optimize(net)
    torch.testing.assert_close(first_output(net(**inputs)), expected, rtol=1e-4, atol=1e-5)
    hubgen.restore(net)


@torch.no_grad()
def test_the_forward_compiles_without_a_graph_break_for_any_scale() -> None:
    net, inputs = NET.build(), NET.inputs()
    torch.compiler.reset()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    for scale in (1.0, 0.5, 0.25):
        for guess in (False, True):
            options = {"conditioning_scale": scale, "guess_mode": guess}
            torch.testing.assert_close(
                first_output(compiled(**inputs, **options)), first_output(net(**inputs, **options))
            )


# what is refused


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"controlnet_conditioning_channel_order": "gbr"}, "`controlnet_conditioning_channel_order`: got 'gbr'"),
        ({"conditioning_channels": 0}, "`conditioning_channels`: got 0"),
        ({"conditioning_embedding_out_channels": ()}, r"`conditioning_embedding_out_channels`: got \(\)"),
        ({"conditioning_embedding_out_channels": None}, "`conditioning_embedding_out_channels`: got None"),
        ({"conditioning_embedding_out_channels": (4, -1)}, "`conditioning_embedding_out_channels`: got -1"),
        ({"mid_block_type": None}, "`mid_block_type`: got None"),
        ({"class_embed_type": "simple_projection"}, "`class_embed_type`: got 'simple_projection'"),
        ({"down_block_types": ("DownBlock2D",)}, "`down_block_types`: got .*, expected one entry a level, 2"),
        ({"addition_embed_type": "text"}, "`addition_embed_type`: got 'text'"),
        ({"norm_num_groups": 5}, "`norm_num_groups`: got 5"),
        ({"num_attention_heads": 2}, "`num_attention_heads`: got 2"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NET.fresh(**config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"class_embeddings_concat": True, "num_class_embeds": 3},
            "`unet`: got one with .*'class_embeddings_concat': Tr",
        ),
        ({"conv_in_kernel": 5}, r"`unet`: got one with {'conv_in_kernel': 5}, expected {'conv_in_kernel': 3}"),
        ({"time_cond_proj_dim": 8}, "`unet`: got one with {'time_cond_proj_dim': 8}"),
        ({"mid_block_type": None}, "`mid_block_type`: got None"),
    ],
)
def test_a_base_that_no_network_fits_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hubgen.ControlNetModel.from_unet(base_of(**change))


def test_what_is_no_base_is_refused() -> None:
    for other in (nn.Linear(1, 1), NETWORKS["DDPM"].fresh(), NET.fresh()):
        with pytest.raises(ValueError, match=f"`unet`: got a {type(other).__name__}, expected a UNet2DConditionModel"):
            hubgen.ControlNetModel.from_unet(other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"controlnet_cond": torch.zeros(2, 4, 16, 16)},
            r"`controlnet_cond`: got \(2, 4, 16, 16\), expected \(2 or 1, 3, 16, 16\)",
        ),
        ({"controlnet_cond": torch.zeros(2, 3, 8, 8)}, r"`controlnet_cond`: got \(2, 3, 8, 8\).* 2 pixels a latent"),
        ({"controlnet_cond": torch.zeros(3, 3, 16, 16)}, r"`controlnet_cond`: got \(3, 3, 16, 16\)"),
        ({"controlnet_cond": [torch.zeros(2, 3, 16, 16)]}, "`controlnet_cond`: got list"),
        ({"controlnet_cond": None}, "`controlnet_cond`: got NoneType"),
        ({"conditioning_scale": float("nan")}, "`conditioning_scale`: got nan, expected a finite number"),
        ({"conditioning_scale": [1.0]}, r"`conditioning_scale`: got \[1.0\]"),
        ({"conditioning_scale": torch.ones(2)}, r"`conditioning_scale`: got a tensor of shape \(2,\)"),
        ({"sample": torch.zeros(2, 9, 8, 8)}, r"`sample`: got \(2, 9, 8, 8\), expected \(batch, 4"),
        ({"encoder_hidden_states": torch.zeros(2, 5, 8)}, r"`encoder_hidden_states`: got \(2, 5, 8\)"),
        ({"timestep_cond": torch.zeros(2, 4)}, r"`timestep_cond`: got \(2, 4\), expected `time_cond_proj_dim` = None"),
        ({"class_labels": torch.zeros(2)}, "`class_labels`: got a tensor, expected None"),
        ({"added_cond_kwargs": {"time_ids": torch.zeros(2, 6)}}, r"`added_cond_kwargs`: got the keys \['time_ids'\]"),
    ],
)
def test_an_input_that_does_not_fit_is_refused_before_anything_is_computed(
    change: dict[str, Any], message: str
) -> None:
    net = NET.fresh()
    net.conv_in.forward = net.time_embedding.forward = None  # whoever calls them fails otherwise
    with pytest.raises(ValueError, match=message):
        net(**{**NET.inputs(), **change})


def test_the_hint_helper_makes_what_the_network_takes() -> None:
    assert hint({"conditioning_embedding_out_channels": (1, 1, 1, 1)}, (2, 3)).shape == (2, 3, 16, 24)
