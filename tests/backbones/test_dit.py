"""DiT: parity with diffusers on the same weights, adaLN-Zero, label dropout, and the features of the mixins."""

import diffusers
import pytest
import torch

from hubgen.backbones.dit import DiTTransformer2DModel, dit_b_2, dit_l_2, dit_s_2, dit_xl_2
from tests.models import NETWORKS
from tests.parity import assert_parity, randomize_

DIT = NETWORKS["DiT"]
TINY = {**DIT.config, "num_embeds_ada_norm": 5}


def tiny(**config) -> DiTTransformer2DModel:
    return DIT.build(**{**TINY, **config})


def inputs(height: int = 8, width: int = 8) -> dict[str, torch.Tensor]:
    """Of a class, and of none."""
    return {**DIT.inputs((height, width)), "class_labels": torch.tensor([4, 5])}


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"out_channels": None},
        {"attention_bias": False, "activation_fn": "geglu"},
        {"norm_elementwise_affine": True, "norm_eps": 0.1},
        {"patch_size": 4, "in_channels": 4},
    ],
)
def test_output_agrees_with_diffusers_on_random_weights(config):
    assert_parity(*DIT.pair(**{**TINY, **config}), inputs())


def test_larger_square_latents_agree_with_diffusers():
    assert_parity(*DIT.pair(**TINY), inputs(height=12, width=12))


@pytest.mark.parametrize("size", [256, 512])
def test_dit_xl_2_has_the_published_parameters(size):
    with torch.device("meta"):
        ours = dit_xl_2(size)
        theirs = diffusers.DiTTransformer2DModel(out_channels=8, sample_size=size // 8)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert sum(parameter.numel() for parameter in ours.parameters()) == 749_826_464


@pytest.mark.parametrize(("preset", "layers", "width"), [(dit_s_2, 12, 384), (dit_b_2, 12, 768), (dit_l_2, 24, 1024)])
def test_presets_have_the_papers_depth_and_width(preset, layers, width):
    with torch.device("meta"):
        model = preset(128, num_embeds_ada_norm=10)
    assert (len(model.transformer_blocks), model.inner_dim, model.config.sample_size) == (layers, width, 16)
    assert model.config.num_embeds_ada_norm == 10


def test_every_parameter_gets_a_gradient():
    model = randomize_(DiTTransformer2DModel(**TINY))
    model(**inputs()).sample.square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@torch.no_grad()
def test_latents_need_not_be_square():
    """Where no token looks at another and positions are alike, a part of the latents gives that part of the output."""
    model = tiny()
    for block in model.transformer_blocks:
        block.attn1.to_out[0].weight.zero_()
        block.attn1.to_out[0].bias.zero_()
    model.pos_embed.positions = lambda rows, columns, device: torch.zeros(1, rows * columns, model.inner_dim)
    wide = inputs(height=4, width=8)
    left = {**wide, "hidden_states": wide["hidden_states"][..., :4]}
    torch.testing.assert_close(model(**wide).sample[..., :4], model(**left).sample)


@torch.no_grad()
def test_in_training_a_label_is_dropped_for_all_blocks_together():
    """So each picture's output is that of its own label or that of no class, and nothing between."""
    model = tiny()
    batch = 64
    told = {
        "hidden_states": inputs()["hidden_states"][:1].expand(batch, -1, -1, -1),
        "timestep": torch.tensor([3]),
        "class_labels": torch.full((batch,), 2),
    }
    kept = model(**told).sample[0]
    none = model(**{**told, "class_labels": torch.full((batch,), 5)}).sample[0]
    torch.manual_seed(0)
    out = model.train()(**told).sample
    is_kept = torch.isclose(out, kept, atol=1e-5).flatten(1).all(1)
    is_none = torch.isclose(out, none, atol=1e-5).flatten(1).all(1)
    assert (is_kept ^ is_none).all()
    assert 0 < is_none.sum() < 20  # 6.4 expected


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"norm_type": "layer_norm"}, "norm_type"),
        ({"num_embeds_ada_norm": None}, "num_embeds_ada_norm"),
        ({"patch_size": 3}, "sample_size"),
        ({"activation_fn": "relu6"}, "activation_fn"),
        ({"num_layers": 0}, "num_layers"),
        ({"attention_head_dim": 7}, "attention_head_dim"),
    ],
)
def test_a_config_that_the_architecture_does_not_know_is_refused_by_name(change, word):
    with pytest.raises(ValueError, match=word):
        DiTTransformer2DModel(**{**TINY, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"hidden_states": torch.zeros(2, 3, 8, 8)},
            r"`hidden_states`: got \(2, 3, 8, 8\), expected \(2, 4, height",
        ),
        ({"hidden_states": torch.zeros(2, 4, 7, 8)}, "got 7 x 8, expected multiples of `patch_size` = 2"),
        ({"timestep": None}, r"`timestep`: got None, expected \(2\)"),
        ({"timestep": torch.zeros(3)}, r"`timestep`.*\(3,\)"),
        ({"class_labels": None}, "`class_labels`.*None"),
        ({"class_labels": torch.tensor([0, 6])}, r"`class_labels`: got \[6\], expected 0 to 4, or 5 for no class"),
        ({"class_labels": torch.tensor([0.0, 1.0])}, "`class_labels`: got torch.float32, expected whole numbers"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        tiny()(**{**inputs(), **change})
