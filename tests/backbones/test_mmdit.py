"""SD3Transformer2DModel: the second implementation is diffusers' class of the same name."""

from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel as DiffusersSD3Transformer2DModel

from hubgen.backbones.sd3 import SD3Transformer2DModel
from tests.models import NETWORKS

SD3 = NETWORKS["SD 3"]
TINY, tiny = SD3.config, SD3.build
SD3_MEDIUM: dict[str, Any] = {
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 192,
}


def inputs(height: int = 8, width: int = 8) -> dict[str, torch.Tensor]:
    return SD3.inputs((height, width))


def shapes(model: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def assert_agree(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert theirs.std() > 0.1, "an output of nothing would agree with anything"
    assert (ours - theirs).abs().max() < tolerance * theirs.std()


CONFIGS = [
    pytest.param({}, id="sd3"),
    pytest.param({"qk_norm": "rms_norm"}, id="sd3.5-large"),
    pytest.param({"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}, id="sd3.5-medium"),
    pytest.param({"patch_size": 1, "pos_embed_max_size": 16, "out_channels": 8}, id="patch-1"),
]


@pytest.mark.parametrize("changes", CONFIGS)
def test_agrees_with_diffusers_on_the_same_weights(changes: dict[str, Any]) -> None:
    ours = tiny(**changes)
    theirs = DiffusersSD3Transformer2DModel(**(TINY | changes))
    assert shapes(ours) == shapes(theirs)
    theirs.load_state_dict(ours.state_dict())
    for height, width in ((8, 8), (4, 6)):  # the second takes the middle of the positions
        batch = inputs(height, width)
        assert_agree(ours(**batch).sample, theirs(**batch).sample)


def test_agrees_with_diffusers_on_controls_and_skipped_layers() -> None:
    ours = tiny(num_layers=5)
    theirs = DiffusersSD3Transformer2DModel(**(TINY | {"num_layers": 5}))
    theirs.load_state_dict(ours.state_dict())
    batch = inputs()
    residuals = [3 * torch.randn(2, 16, 32) for _ in range(2)]
    plain = theirs(**batch).sample
    for extra in (
        {"block_controlnet_hidden_states": residuals},
        {"skip_layers": [1, 4]},
        {"block_controlnet_hidden_states": residuals, "skip_layers": [0]},
    ):
        expected = theirs(**batch, **extra).sample
        assert_agree(ours(**batch, **extra).sample, expected)
        assert (expected - plain).abs().max() > 0.1


def test_agrees_with_diffusers_in_bfloat16() -> None:
    ours = tiny(qk_norm="rms_norm").to(torch.bfloat16)
    theirs = DiffusersSD3Transformer2DModel(**(TINY | {"qk_norm": "rms_norm"})).to(torch.bfloat16)
    theirs.load_state_dict(ours.state_dict())
    batch = {name: x if name == "timestep" else x.bfloat16() for name, x in inputs().items()}
    sample = ours(**batch).sample
    assert sample.dtype == torch.bfloat16
    assert_agree(sample.float(), theirs(**batch).sample.float(), tolerance=0.1)  # 8 bits, three blocks


def test_fresh_positions_are_those_of_diffusers() -> None:
    for changes in ({}, {"patch_size": 1, "pos_embed_max_size": 12, "sample_size": 6}):
        ours = SD3Transformer2DModel(**(TINY | changes))
        theirs = DiffusersSD3Transformer2DModel(**(TINY | changes))
        torch.testing.assert_close(ours.pos_embed.pos_embed, theirs.pos_embed.pos_embed, rtol=0, atol=1e-6)


def test_every_block_of_a_fresh_model_is_the_identity() -> None:
    model = SD3Transformer2DModel(**TINY, qk_norm="rms_norm", dual_attention_layers=(0,))
    x, context, temb = torch.randn(2, 16, 32), torch.randn(2, 5, 32), torch.randn(2, 32)
    for block in model.transformer_blocks:
        text, image = block(x, context, temb)
        assert torch.equal(text, context)
        assert torch.equal(image, x)


def test_a_fresh_model_learns_through_its_zeroed_gates() -> None:
    model = SD3Transformer2DModel(**TINY, qk_norm="rms_norm")
    batch = inputs()
    target = torch.randn(2, 4, 8, 8)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = (model(**batch).sample - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


def test_sd3_medium_has_its_published_size() -> None:
    with torch.device("meta"):
        model = SD3Transformer2DModel(**SD3_MEDIUM)
    assert sum(parameter.numel() for parameter in model.parameters()) == 2_028_328_000


def test_autocast_gives_every_parameter_a_float32_gradient() -> None:
    model = tiny(qk_norm="rms_norm", dual_attention_layers=(0,))
    with torch.autocast("cpu", torch.bfloat16):
        sample = model(**inputs()).sample
    sample.float().square().mean().backward()
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden_states": torch.zeros(2, 3, 8, 8)},
            r"`hidden_states`: got \(2, 3, 8, 8\), expected \(2, 4, height",
        ),
        ({"hidden_states": torch.zeros(2, 4, 18, 8)}, r"got 18 x 8, expected at most 16 \(`pos_embed_max_size` = 8"),
        ({"hidden_states": torch.zeros(2, 4, 7, 8)}, r"got 7 x 8, expected multiples of `patch_size` = 2"),
        (
            {"encoder_hidden_states": torch.zeros(2, 5, 13)},
            r"`encoder_hidden_states`: .* expected \(2, tokens, 16\)",
        ),
        ({"encoder_hidden_states": None}, r"`encoder_hidden_states`: got None"),
        ({"pooled_projections": torch.zeros(2, 21)}, r"`pooled_projections`: got \(2, 21\), expected \(2, 16\)"),
        ({"timestep": torch.tensor(3.0)}, r"`timestep`: got \(\), expected \(2\)"),
        ({"timestep": torch.zeros(3)}, r"`timestep`: got \(3,\), expected \(2\)"),
    ],
)
def test_a_wrong_input_is_named_with_what_was_found_and_expected(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SD3Transformer2DModel(**TINY)(**(inputs() | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"caption_projection_dim": 24}, r"`caption_projection_dim`: got 24, expected .* = 32"),
        ({"dual_attention_layers": (1, 3)}, r"`dual_attention_layers`: got \(1, 3\), expected layers from 0 to 2"),
        ({"qk_norm": "layer_norm"}, r"`qk_norm`: got 'layer_norm', expected 'rms_norm' or None"),
    ],
)
def test_a_wrong_setting_is_named_with_what_was_found_and_expected(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SD3Transformer2DModel(**(TINY | changes))
