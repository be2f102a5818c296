"""FluxTransformer2DModel: the second implementation is diffusers' class of the same name."""

from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel as DiffusersFluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor as DiffusersFluxAttnProcessor
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from diffusers.models.transformers.transformer_flux import FluxPosEmbed as DiffusersFluxPosEmbed

from hubgen.backbones.flux import FluxTransformer2DModel, flux_dev, flux_schnell
from hubgen.layers.attention import rotate
from hubgen.layers.embeddings import FluxPosEmbed
from tests.models import NETWORKS
from tests.parity import assert_parity

FLUX = NETWORKS["FLUX.1 dev"]
DEV, SCHNELL = FLUX.config, NETWORKS["FLUX.1 schnell"].config
tiny, both = FLUX.build, NETWORKS["FLUX.1 schnell"].pair
ROWS, COLUMNS, TEXT_TOKENS = 3, 4, 5


def image_ids(rows: int = ROWS, columns: int = COLUMNS) -> torch.Tensor:
    """(rows * columns, 3): frame, row, column."""
    grid = torch.meshgrid(*(torch.arange(float(n)) for n in (1, rows, columns)), indexing="ij")
    return torch.stack(grid, dim=-1).reshape(-1, 3)


def inputs(guided: bool = True) -> dict[str, Any]:
    return FLUX.inputs((2 * ROWS, 2 * COLUMNS), guidance_embeds=guided)


def shapes(model: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(DEV, id="dev"),
        pytest.param(SCHNELL, id="schnell"),
        pytest.param({**DEV, "patch_size": 2, "out_channels": 3}, id="patches"),
    ],
)
def test_agrees_with_diffusers_on_the_same_weights(config: dict[str, Any]) -> None:
    ours, theirs = both(**config)
    assert shapes(ours) == shapes(theirs)
    assert_parity(ours, theirs, inputs("guidance_embeds" in config), atol=1e-5)


@pytest.mark.parametrize("preset", [flux_dev, flux_schnell])
def test_presets_have_the_keys_and_shapes_of_diffusers_and_the_published_size(preset: Any) -> None:
    with torch.device("meta"):
        ours, theirs = FluxTransformer2DModel(**preset()), DiffusersFluxTransformer2DModel(**preset())
    assert shapes(ours) == shapes(theirs)
    guidance = 256 * 3072 + 3072 + 3072 * 3072 + 3072  # two linear layers
    count = sum(parameter.numel() for parameter in ours.parameters())
    assert count == 11_901_408_320 - (0 if preset is flux_dev else guidance)


def test_the_default_config_is_schnells() -> None:
    with torch.device("meta"):
        config = FluxTransformer2DModel().config
    assert {name: config[name] for name in flux_schnell()} == flux_schnell()


def test_agrees_with_diffusers_in_bfloat16() -> None:
    ours, theirs = (model.to(torch.bfloat16) for model in both(**DEV))
    batch = {name: x if name.endswith("ids") else x.bfloat16() for name, x in inputs().items()}
    assert ours(**batch).sample.dtype == torch.bfloat16
    assert_parity(ours, theirs, batch, atol=0.1)  # 8 bits, five blocks


@pytest.mark.parametrize("repeat", [False, True])
def test_agrees_with_diffusers_on_a_controlnets_features(repeat: bool) -> None:
    ours, theirs = both(**{**DEV, "num_layers": 5, "num_single_layers": 4})
    plain, batch = ours(**inputs()).sample, inputs()
    double, single = ([3 * torch.randn(2, ROWS * COLUMNS, 32) for _ in range(count)] for count in (2, 3))
    batch |= {
        "controlnet_block_samples": double,
        "controlnet_single_block_samples": single,
        "controlnet_blocks_repeat": repeat,
    }
    assert (assert_parity(ours, theirs, batch) - plain).abs().max() > 0.1


def test_every_block_of_a_fresh_model_is_the_identity() -> None:
    model = FluxTransformer2DModel(**DEV)
    x, context, temb = torch.randn(2, ROWS * COLUMNS, 32), torch.randn(2, TEXT_TOKENS, 32), torch.randn(2, 32)
    rotary = model.pos_embed(torch.cat([torch.zeros(TEXT_TOKENS, 3), image_ids()]))
    for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
        text, image = block(x, context, temb, rotary)
        assert torch.equal(text, context)
        assert torch.equal(image, x)


def test_rotary_tables_are_those_of_diffusers() -> None:
    ids = torch.cat([torch.zeros(7, 3), image_ids(40, 64) + torch.tensor([0, 0, 4000])])
    ours, theirs = FluxPosEmbed(10000, (16, 56, 56))(ids), DiffusersFluxPosEmbed(10000, [16, 56, 56])(ids)
    for table, expected in zip(ours, theirs, strict=True):
        assert table.shape == (len(ids), 128)
        torch.testing.assert_close(table, expected, rtol=0, atol=1e-7)


def test_rotation_keeps_lengths_and_leaves_scores_a_function_of_the_distance() -> None:
    embed = FluxPosEmbed(10000, (4, 6, 6))
    query, key = torch.randn(1, 1, 2, 16), torch.randn(1, 1, 2, 16)

    def score(first: float, second: float) -> torch.Tensor:
        turned = [rotate(x, embed(torch.tensor([[0.0, at, 2 * at]]))) for x, at in ((query, first), (key, second))]
        torch.testing.assert_close(turned[0].norm(dim=-1), query.norm(dim=-1))
        return (turned[0] * turned[1]).sum(-1)

    torch.testing.assert_close(score(3, 8), score(20, 25), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(score(3, 8), score(3, 9))


def test_image_tokens_with_their_positions_may_come_in_any_order() -> None:
    model, batch = tiny(), inputs()
    order = torch.randperm(ROWS * COLUMNS)
    expected = model(**batch).sample
    shuffled = batch | {"hidden_states": batch["hidden_states"][:, order], "img_ids": batch["img_ids"][order]}
    torch.testing.assert_close(model(**shuffled).sample, expected[:, order], rtol=1e-4, atol=1e-4)
    batch["hidden_states"] = batch["hidden_states"][:, order]  # the tokens alone, at others' positions
    assert not torch.allclose(model(**batch).sample, expected[:, order], atol=1e-2)


def test_positions_with_a_batch_are_taken_from_the_first() -> None:
    model, batch = tiny(), inputs()
    stacked = batch | {name: batch[name].expand(2, -1, -1) for name in ("img_ids", "txt_ids")}
    assert torch.equal(model(**stacked).sample, model(**batch).sample)


def test_processors_written_for_diffusers_compute_the_same() -> None:
    model, batch = tiny(), inputs()
    expected = model(**batch).sample
    model.set_attn_processor(DiffusersFluxAttnProcessor())
    torch.testing.assert_close(model(**batch).sample, expected, rtol=1e-4, atol=1e-4)
    model.fuse_qkv_projections()
    torch.testing.assert_close(model(**batch).sample, expected, rtol=1e-4, atol=1e-4)


def test_an_ip_adapters_processors_see_its_pictures_in_the_double_blocks() -> None:
    ours, theirs = both(**DEV)
    pictures = torch.randn(2, 4, 12)
    for model in (ours, theirs):
        torch.manual_seed(1)
        processors = {
            name: FluxIPAdapterAttnProcessor(32, 12) if name.startswith("transformer_blocks") else processor
            for name, processor in model.attn_processors.items()
        }
        model.set_attn_processor(processors)
        model.encoder_hid_proj = torch.nn.Identity()
    plain = ours(**inputs(), joint_attention_kwargs={"ip_adapter_image_embeds": [0 * pictures]}).sample
    batch = inputs()
    expected = theirs(**batch, joint_attention_kwargs={"ip_adapter_image_embeds": [pictures]}).sample
    kwargs = {"ip_adapter_image_embeds": [pictures]}
    actual = ours(**batch, joint_attention_kwargs=kwargs).sample
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert set(kwargs) == {"ip_adapter_image_embeds"}, "the caller's keywords are left as they are"
    assert (actual - plain).abs().max() > 0.1


def test_float16_beyond_its_numbers_is_clipped_as_in_diffusers() -> None:
    ours, theirs = (model.half() for model in both(**DEV))
    x, context = torch.randn(1, 4, 32).half(), torch.full((1, 3, 32), 6e4).half()
    temb = 20 * torch.ones(1, 32).half()
    for index in range(2):
        outputs = [model.transformer_blocks[index](x, context, temb) for model in (ours, theirs)]
        assert torch.isfinite(outputs[1][0]).all()
        torch.testing.assert_close(outputs[0][0], outputs[1][0], rtol=0.02, atol=20.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_states": torch.zeros(2, 12, 7)}, r"`hidden_states`: got \(2, 12, 7\), expected \(2, tokens, 16\)"),
        (
            {"hidden_states": torch.zeros(2, 8, 3, 4)},
            r"`hidden_states`: got \(2, 8, 3, 4\), expected \(2, tokens, 16\)",
        ),
        ({"encoder_hidden_states": None}, r"`encoder_hidden_states`: got None"),
        ({"pooled_projections": torch.zeros(2, 21)}, r"`pooled_projections`: got \(2, 21\), expected \(2, 16\)"),
        ({"timestep": torch.tensor(0.5)}, r"`timestep`: got \(\), expected \(2\)"),
        ({"img_ids": torch.zeros(11, 3)}, r"`img_ids`: got \(11, 3\), expected \(12, 3\)"),
        ({"img_ids": None}, r"`img_ids`: got None, expected \(12, 3\)"),
        ({"txt_ids": torch.zeros(5, 2)}, r"`txt_ids`: got \(5, 2\), expected \(5, 3\)"),
        ({"guidance": None}, r"`guidance`: got None, expected \(2\)"),
    ],
)
def test_a_wrong_input_is_named_with_what_was_found_and_expected(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny()(**(inputs() | changes))


def test_guidance_for_a_model_without_is_refused() -> None:
    with pytest.raises(ValueError, match="`guidance`: got a tensor, expected None"):
        tiny(guidance_embeds=False)(**inputs())


@pytest.mark.parametrize("axes", [(4, 6, 8), (5, 5, 6)])
def test_axes_that_do_not_share_out_a_head_are_refused(axes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="`axes_dims_rope`: got .*, expected even numbers that add up to .* = 16"):
        FluxTransformer2DModel(**{**DEV, "axes_dims_rope": axes})


def test_rotary_tables_are_computed_once_for_the_same_positions_and_anew_for_others() -> None:
    model, given = tiny().eval(), inputs()
    calls: list[int] = []
    model.pos_embed.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        first = model(**given).sample
        assert torch.equal(model(**given).sample, first) and len(calls) == 1
        given["img_ids"] += 1  # in place: the same tensor with other values
        assert not torch.equal(model(**given).sample, first) and len(calls) == 2
        given["img_ids"] = given["img_ids"] - 1
        assert torch.equal(model(**given).sample, first) and len(calls) == 3
