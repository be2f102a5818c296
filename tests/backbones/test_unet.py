"""UNet2DModel: parity with diffusers on random weights, and what diffusers' features ask of a model."""

import diffusers
import pytest
import torch
from torch import nn

from hubgen.backbones.unet import UNet2DModel
from hubgen.backbones.unet_config import ddpm_celebahq_256, ddpm_cifar10, ncsnpp_256, ncsnpp_ffhq_1024
from hubgen.layers.fir import FirDownsample2D, FirUpsample2D
from tests import models
from tests.models import Network
from tests.parity import assert_parity, share_weights_

PIXELS = Network("UNet2DModel", models.PIXELS, models.pixel_inputs)
SMALL, pair, random_model = PIXELS.config, PIXELS.pair, PIXELS.build
NCSNPP = {
    **models.NCSNPP,
    "block_out_channels": (32, 32, 64),
    "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipDownBlock2D"),
    "up_block_types": ("SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"),
}
GUIDED = models.GUIDED
VARIANTS = {
    "ddpm": {"downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6},
    "deep": {
        "block_out_channels": (16, 32, 32),
        "layers_per_block": 2,
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
    "several heads": {"attention_head_dim": 4},
    "heads that do not divide the channels": {"attention_head_dim": 3},
    "ncsn++": NCSNPP,
    "ncsn++, two residual blocks": {**NCSNPP, "layers_per_block": 2},
    "ncsn++ with scale and shift": {**NCSNPP, "resnet_time_scale_shift": "scale_shift"},
    "ncsn++, narrower below": {
        **NCSNPP,
        "block_out_channels": (32, 16),
        "down_block_types": ("AttnSkipDownBlock2D", "SkipDownBlock2D"),
        "up_block_types": ("SkipUpBlock2D", "AttnSkipUpBlock2D"),
    },
    "input skip alone": {**NCSNPP, "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"), "norm_num_groups": 8},
    "output skip alone": {
        **NCSNPP,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "norm_num_groups": 8,
    },
    "guided diffusion": GUIDED,
    "guided diffusion with a norm": {**GUIDED, "attn_norm_num_groups": 16},
    "resampling without attention": {
        "down_block_types": ("ResnetDownsampleBlock2D",) * 2,
        "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
        "add_attention": False,
    },
    "attention resamples by residual blocks": {
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
    },
    "no middle": {"mid_block_type": None},
    "scaled middle": {"mid_block_scale_factor": 1.5},
    "learned timesteps": {"time_embedding_type": "learned", "num_train_timesteps": 1000, "time_embedding_dim": 40},
    "timestep class": {"class_embed_type": "timestep"},
    "class vector": {"class_embed_type": "identity"},
    "five channels in [0, 1]": {"in_channels": 5, "out_channels": 6, "center_input_sample": True},
    "names of the first configs": {
        "down_block_types": ("UNetResDownBlock2D", "UNetResAttnDownBlock2D"),
        "up_block_types": ("UNetResAttnUpBlock2D", "UNetResUpBlock2D"),
    },
}


def inputs_for(config: dict, size: tuple[int, int] = (8, 8)) -> dict:
    return PIXELS.inputs(size, **config)


@pytest.mark.parametrize("variant", VARIANTS)
def test_output_agrees_with_diffusers_on_random_weights(variant):
    ours, theirs = pair(**VARIANTS[variant])
    assert_parity(ours, theirs, inputs_for(VARIANTS[variant], (8, 16)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_config_parameters_and_processors_are_named_as_in_diffusers(variant):
    ours, theirs = pair(**VARIANTS[variant])
    assert {k: v for k, v in ours.config.items() if k[0] != "_"} == {
        k: v for k, v in theirs.config.items() if k[0] != "_"
    }
    shapes = [{k: v.shape for k, v in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert list(ours.attn_processors) == [
        f"{name}.processor" for name, module in theirs.named_modules() if hasattr(module, "set_processor")
    ]


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        (ddpm_cifar10, 35_746_307),
        (ddpm_celebahq_256, 113_673_219),
        (ncsnpp_256, 65_574_549),
        (ncsnpp_ffhq_1024, 105_785_896),
    ],
)
def test_full_size_presets_have_the_published_number_of_parameters_and_diffusers_keys(preset, count):
    with torch.device("meta"):
        ours, theirs = UNet2DModel(**preset()), diffusers.UNet2DModel(**preset())
    assert sum(p.numel() for p in ours.parameters()) == count
    shapes = [{k: v.shape for k, v in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]


def test_the_full_ddpm_of_cifar10_agrees_with_diffusers():
    ours, theirs = UNet2DModel(**ddpm_cifar10()), diffusers.UNet2DModel(**ddpm_cifar10())
    share_weights_(ours, theirs)
    assert_parity(ours, theirs, {"sample": torch.randn(2, 3, 32, 32), "timestep": torch.tensor([3, 700])})


def test_the_full_ncsnpp_agrees_with_diffusers_on_small_pictures():
    ours, theirs = UNet2DModel(**ncsnpp_256()), diffusers.UNet2DModel(**ncsnpp_256())
    share_weights_(ours, theirs)
    assert_parity(ours, theirs, {"sample": torch.randn(1, 3, 64, 64), "timestep": torch.tensor([20.0])})


def test_fir_resampling_keeps_constants_inside_and_has_the_binomial_impulse_response():
    impulse = torch.zeros(1, 2, 5, 5)
    impulse[0, 1, 2, 2] = 1
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 4
    up = FirUpsample2D()(impulse)  # (1, 2, 10, 10)
    assert (up[0, 0] == 0).all()
    torch.testing.assert_close(up[0, 1, 3:7, 3:7], torch.outer(taps, taps))
    assert up.sum() == 4
    constant = torch.ones(1, 1, 8, 8)
    assert (FirDownsample2D()(constant)[..., 1:-1, 1:-1] == 1).all()
    assert (FirUpsample2D()(constant)[..., 1:-1, 1:-1] == 1).all()


def test_fir_resampling_down_is_the_adjoint_of_up():
    up, down = FirUpsample2D(), FirDownsample2D()
    small, large = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 8, 12)
    torch.testing.assert_close((up(small) * large).sum(), 4 * (small * down(large)).sum())


def test_a_sigma_that_is_a_plain_number_is_not_rounded():
    model = random_model(**NCSNPP)
    sample = inputs_for(NCSNPP)["sample"]
    with torch.no_grad():
        torch.testing.assert_close(model(sample, 0.5).sample, model(sample, torch.tensor([0.5, 0.5])).sample)


def test_ncsnpp_divides_by_sigma_so_that_the_score_grows_where_there_is_little_noise():
    model = random_model(**NCSNPP)
    model.time_proj.weight.zero_()  # the network sees no sigma
    sample = inputs_for(NCSNPP)["sample"]
    with torch.no_grad():
        torch.testing.assert_close(model(sample, 0.01).sample, 100 * model(sample, 1.0).sample)


@pytest.mark.parametrize("variant", ["ddpm", "ncsn++"])
def test_a_fresh_model_predicts_zero_and_learns(variant):
    model = UNet2DModel(**{**SMALL, **VARIANTS[variant]})
    if variant == "ncsn++":  # the picture's convolutions are no residual branches
        for block in model.up_blocks[:-1]:
            nn.init.zeros_(block.skip_conv.weight)
            nn.init.zeros_(block.skip_conv.bias)
    out = model(**inputs_for(VARIANTS[variant])).sample
    assert (out == 0).all()
    (out - 1).square().mean().backward()
    assert model.conv_out.weight.grad.abs().max() > 0


@torch.no_grad()
def test_old_names_of_attention_weights_load(tmp_path):
    """Checkpoints of 2022, such as google/ddpm-cifar10-32, say query, key, value and proj_attn."""
    from safetensors.torch import load_file, save_file

    _ours, theirs = pair(**VARIANTS["ddpm"])
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, name in old.items():
        weights = {key.replace(f".{new}.", f".{name}."): value.clone() for key, value in weights.items()}
    assert any("proj_attn" in key for key in weights)
    save_file(weights, file, metadata={"format": "pt"})
    assert_parity(UNet2DModel.from_pretrained(tmp_path), theirs, inputs_for({}))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"block_out_channels": (16, 32, 32)}, "`down_block_types`: got .*, expected one entry a level, 3"),
        ({"up_block_types": ("UpBlock2D",)}, "`up_block_types`: got .*, expected one entry a level, 2"),
        ({"down_block_types": ("KDownBlock2D", "DownBlock2D")}, "`down_block_types`.*'KDownBlock2D'"),
        ({"mid_block_type": "UNetMidBlock2DCrossAttn"}, "`mid_block_type`.*'UNetMidBlock2DCrossAttn'"),
        (
            {"down_block_types": ("SkipDownBlock2D", "DownBlock2D")},
            "`down_block_types`: .* expected `Skip` levels",
        ),
        ({**NCSNPP, "in_channels": 4}, "`in_channels`: got 4, expected 3 for `Skip` levels"),
        ({**NCSNPP, "out_channels": 4}, "`out_channels`: got 4, expected 3 for `Skip` levels"),
        ({**NCSNPP, "block_out_channels": (32, 24, 64)}, "`Skip` levels normalise 88 channels in 32 groups"),
        ({"norm_num_groups": None}, "`norm_num_groups`: got None, expected a number"),
        ({"norm_num_groups": 5}, "`norm_num_groups`: got 5, expected a divisor"),
        ({"attn_norm_num_groups": 5}, "`attn_norm_num_groups`: got 5, expected a divisor of the middle's 16"),
        ({"attention_head_dim": 17}, "`attention_head_dim`: got 17, expected at most the 16 channels"),
        ({"attention_head_dim": 0}, "`attention_head_dim`: got 0, expected a whole number"),
        ({"layers_per_block": (1, 2)}, r"`layers_per_block`: got \(1, 2\), expected a whole number"),
        ({"downsample_padding": 2}, "`downsample_padding`: got 2, expected 0 or 1"),
        ({"downsample_type": "fir"}, "`downsample_type`.*'fir'"),
        ({"time_embedding_type": "gaussian"}, "`time_embedding_type`.*'gaussian'"),
        ({"time_embedding_type": "learned"}, "`num_train_timesteps`: got None"),
        ({"resnet_time_scale_shift": "spatial"}, "`resnet_time_scale_shift`.*'spatial'"),
        ({"act_fn": "gelu"}, "`act_fn`.*'gelu'"),
        ({"class_embed_type": "projection"}, "`class_embed_type`.*'projection'"),
        ({"class_embed_type": "timestep", "num_class_embeds": 3}, "`num_class_embeds`: got 3"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused_by_name(config, message):
    with pytest.raises(ValueError, match=message):
        UNet2DModel(**{**SMALL, **config})


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (
            {},
            {"sample": torch.zeros(2, 4, 8, 8)},
            r"`sample`: got \(2, 4, 8, 8\), expected \(batch, 3, height",
        ),
        ({}, {"sample": torch.zeros(3, 8, 8)}, r"`sample`.*\(3, 8, 8\)"),
        ({}, {"sample": torch.zeros(2, 3, 8, 7)}, "`sample`: got 8 x 7, expected a height and width that 2 divides"),
        ({}, {"timestep": torch.zeros(3)}, r"`timestep`.*\(3,\)"),
        ({}, {"class_labels": torch.zeros(2)}, "`class_labels`: got a tensor, expected None"),
        ({"num_class_embeds": 3}, {"class_labels": None}, "`class_labels`: got None, expected a tensor"),
        ({"class_embed_type": "identity"}, {"class_labels": torch.zeros(2, 5)}, r"got \(2, 5\), expected \(2, 32\)"),
    ],
)
def test_an_input_that_does_not_fit_is_refused_by_name(config, change, message):
    model = UNet2DModel(**{**SMALL, **config})
    with pytest.raises(ValueError, match=message):
        model(**{**inputs_for(config), **change})
