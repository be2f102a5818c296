"""The key maps agree with diffusers' converters, undo themselves, and know every key of the full-size models."""

from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils as theirs
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from hubgen.formats import flux_layout, ldm_unet, ldm_vae, sd3_layout
from hubgen.formats.headers import TensorHeader
from hubgen.formats.key_maps import to_original, to_ours
from hubgen.formats.layouts import LAYOUTS, detect
from hubgen.formats.single_file import original_text_encoder, text_encoder_tensors
from tests import official
from tests.parity import randomize_

State = dict[str, torch.Tensor]
UNET_PREFIX = "model.diffusion_model."


def assert_same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor), name


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


# parity with diffusers' converters, on real tiny models


UNETS: dict[str, Callable[[], nn.Module]] = {
    "sd1": official.unet,
    "sd2": lambda: official.unet(use_linear_projection=True, attention_head_dim=(1, 2)),
    "sdxl": lambda: official.sdxl_unet(6),
    "deep": lambda: official.unet(
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 8, 16),
        layers_per_block=2,
    ),
    "unclip": lambda: official.unet(class_embed_type="projection", projection_class_embeddings_input_dim=6),
}


@pytest.mark.parametrize("name", UNETS)
def test_a_unets_map_agrees_with_diffusers_both_ways(name: str) -> None:
    model = UNETS[name]()
    state, table = model.state_dict(), ldm_unet.key_map(model.config)
    original = to_original(state, table)
    assert_same(theirs.convert_ldm_unet_checkpoint(prefixed(original, UNET_PREFIX), dict(model.config)), state)
    assert_same(to_ours(original, table), state)


@pytest.mark.parametrize("model", [official.vae(), official.flow_vae(1.0, 0.0)], ids=["sd", "flow"])
@pytest.mark.parametrize("prefix", ["first_stage_model.", "vae.", ""])
def test_an_autoencoders_map_agrees_with_diffusers_both_ways(model: nn.Module, prefix: str) -> None:
    state, table = model.state_dict(), ldm_vae.key_map(model.config)
    original = to_original(state, table)
    assert original["encoder.mid.attn_1.q.weight"].ndim == 4
    assert_same(theirs.convert_ldm_vae_checkpoint(prefixed(original, prefix), dict(model.config)), state)
    assert_same(to_ours(original, table), state)


@pytest.mark.parametrize("dual", [(), (0, 1)])
@pytest.mark.parametrize("qk_norm", [None, "rms_norm"])
@pytest.mark.parametrize("prefix", ["", UNET_PREFIX])
def test_sd3s_map_agrees_with_diffusers_both_ways(dual: tuple[int, ...], qk_norm: str | None, prefix: str) -> None:
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        pos_embed_max_size=12,
        dual_attention_layers=dual,
        qk_norm=qk_norm,
    )
    state, table = randomize_(model).state_dict(), sd3_layout.key_map(model.config)
    original = to_original(state, table)
    assert_same(theirs.convert_sd3_transformer_checkpoint_to_diffusers(prefixed(original, prefix)), state)
    assert_same(to_ours(original, table), state)


def columns(model: nn.Module) -> State:
    """Random stand-ins for a state dict: all rows, one column of each matrix. Maps only ever cut and join rows."""
    generator = torch.Generator().manual_seed(0)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    return {
        name: torch.randn(shape if len(shape) == 1 else (shape[0], 1), generator=generator)
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("prefix", ["", UNET_PREFIX])
def test_fluxs_map_agrees_with_diffusers_both_ways(guidance: bool, prefix: str) -> None:
    """At full width, which diffusers' converter has built in."""
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(num_layers=2, num_single_layers=2, guidance_embeds=guidance)
    state, table = columns(model), flux_layout.key_map(model.config)
    original = to_original(state, table)
    assert_same(theirs.convert_flux_transformer_checkpoint_to_diffusers(prefixed(original, prefix)), state)
    assert_same(to_ours(original, table), state)


def clip(cls: type) -> nn.Module:
    config = CLIPTextConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=16,
        projection_dim=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=7,
    )
    return randomize_(cls(config))


@pytest.mark.parametrize("cls", [CLIPTextModel, CLIPTextModelWithProjection])
def test_open_clips_map_agrees_with_diffusers_both_ways(cls: type) -> None:
    model = clip(cls)
    state = model.state_dict()
    prefix = "conditioner.embedders.1.model."
    original = original_text_encoder(state, model.config, prefix)
    assert "transformer.resblocks.1.attn.in_proj_weight" in original
    converted = theirs.convert_open_clip_checkpoint(model, prefixed(original, prefix), prefix=prefix)
    wrapped = any(name.startswith("text_model.") for name in state)
    assert_same({name if wrapped else name.removeprefix("text_model."): t for name, t in converted.items()}, state)
    assert_same(text_encoder_tensors(original, model.config, state), state)


@pytest.mark.parametrize("cls", [CLIPTextModel, CLIPTextModelWithProjection])
@pytest.mark.parametrize("open_clip", [True, False])
def test_what_a_text_encoder_has_no_use_for_is_left_out(cls: type, open_clip: bool) -> None:
    """A temperature, a further layer, a table of positions; for a model without it, the projection."""
    model, full = clip(cls), clip(CLIPTextModelWithProjection)
    config = CLIPTextConfig(**{**model.config.to_dict(), "num_hidden_layers": 3})
    longer = randomize_(CLIPTextModelWithProjection(config))
    longer.load_state_dict(full.state_dict(), strict=False)
    prefix = "cond_stage_model.model." if open_clip else "cond_stage_model.transformer."
    original = original_text_encoder(longer.state_dict(), config, prefix)
    original |= {"logit_scale": torch.ones(())}
    if not open_clip:
        original["text_model.embeddings.position_ids"] = torch.arange(7)
    assert_same(text_encoder_tensors(original, model.config, model.state_dict()), model.state_dict())


def test_an_encoder_without_its_projection_gets_the_identity() -> None:
    """As in early SD3 files, where it is the identity."""
    model = clip(CLIPTextModelWithProjection)
    state = model.state_dict()
    original = {name: tensor for name, tensor in state.items() if name != "text_projection.weight"}
    found = text_encoder_tensors(original, model.config, state)
    assert torch.equal(found["text_projection.weight"], torch.eye(8))


# full size, on the meta device

SD1: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768}
SD2: dict[str, Any] = {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
XL: dict[str, Any] = {"sample_size": 128, "use_linear_projection": True, "addition_embed_type": "text_time"}
SDXL = XL | {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
REFINER = XL | {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [384, 768, 1536, 1536],
    "transformer_layers_per_block": 4,
    "attention_head_dim": [6, 12, 24, 24],
    "cross_attention_dim": 1280,
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2560,
}
SD3_MEDIUM: dict[str, Any] = {
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 192,
}
SD35_MEDIUM = SD3_MEDIUM | {
    "dual_attention_layers": list(range(13)),
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
}
SD35_LARGE = SD3_MEDIUM | {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "qk_norm": "rms_norm",
}
VAE: dict[str, Any] = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
}
FLOW_VAE = VAE | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}

# family, diffusers' class, config, tensors in the original file's backbone, what diffusers takes the file for
FULL_SIZE: dict[str, tuple[str, type, dict[str, Any], int, str]] = {
    "sd1": ("sd1", diffusers.UNet2DConditionModel, SD1, 686, "v1"),
    "sd1-inpaint": ("sd1", diffusers.UNet2DConditionModel, {**SD1, "in_channels": 9}, 686, "inpainting"),
    "sd2": ("sd2", diffusers.UNet2DConditionModel, SD2, 686, "v2"),
    "sdxl": ("sdxl", diffusers.UNet2DConditionModel, SDXL, 1680, "xl_base"),
    "sdxl-refiner": ("sdxl-refiner", diffusers.UNet2DConditionModel, REFINER, 1220, "xl_refiner"),
    "sd3-medium": ("sd3", diffusers.SD3Transformer2DModel, SD3_MEDIUM, 491, "sd3"),
    "sd3.5-medium": ("sd3", diffusers.SD3Transformer2DModel, SD35_MEDIUM, 665, "sd35_medium"),
    "sd3.5-large": ("sd3", diffusers.SD3Transformer2DModel, SD35_LARGE, 923, "sd35_large"),
    "flux-dev": ("flux", diffusers.FluxTransformer2DModel, {"guidance_embeds": True}, 780, "flux-dev"),
    "flux-schnell": ("flux", diffusers.FluxTransformer2DModel, {}, 776, "flux-schnell"),
}


def headers(state: State) -> dict[str, TensorHeader]:
    from pathlib import Path

    return {name: TensorHeader(tuple(t.shape), t.dtype, Path("x")) for name, t in state.items()}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_a_full_size_backbone_is_recognised_and_mapped_key_by_key(name: str) -> None:
    """All names and shapes there and back; the config that is inferred makes the same model."""
    family, cls, config, count, kind = FULL_SIZE[name]
    with torch.device("meta"):
        model = cls(**config)
    state = model.state_dict()
    original = to_original(state, LAYOUTS[family].key_map(model.config))
    assert len(original) == count
    file = prefixed(original, UNET_PREFIX)
    marks = {  # what diffusers tells these families by
        "sdxl": "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias",
        "sdxl-refiner": "conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias",
    }
    marked = file | ({marks[family]: torch.empty(0, device="meta")} if family in marks else {})
    assert theirs.infer_diffusers_model_type(marked) == kind
    assert detect(headers(marked)) == detect(headers(file)) == (family, UNET_PREFIX)
    inferred = LAYOUTS[family].infer_config(headers(original))
    back = to_ours(original, LAYOUTS[family].key_map(inferred))
    assert {key: tensor.shape for key, tensor in back.items()} == {key: tensor.shape for key, tensor in state.items()}
    with torch.device("meta"):
        again = cls(**inferred)
    assert {k: t.shape for k, t in again.state_dict().items()} == {k: t.shape for k, t in state.items()}
    exempt = {"transformer_layers_per_block"} if family == "sdxl-refiner" else set()
    for key, value in inferred.items():
        expected = model.config[key]
        plain = list(expected) if isinstance(expected, tuple) else expected
        if key == "out_channels" and plain is None:
            plain = model.config.in_channels
        if key not in exempt:
            assert value == plain, key


@pytest.mark.parametrize(
    ("family", "config", "count"),
    [("sd", VAE, 248), ("sdxl", VAE, 248), ("sd3", FLOW_VAE, 244), ("flux", FLOW_VAE, 244)],
    ids=["sd", "sdxl", "sd3", "flux"],
)
def test_a_full_size_autoencoder_is_mapped_key_by_key(family: str, config: dict[str, Any], count: int) -> None:
    with torch.device("meta"):
        model = diffusers.AutoencoderKL(**config)
    original = to_original(model.state_dict(), ldm_vae.key_map(model.config))
    assert len(original) == count
    inferred = ldm_vae.infer_config(headers(original), family)
    with torch.device("meta"):
        again = diffusers.AutoencoderKL(**inferred)
    assert {k: t.shape for k, t in again.state_dict().items()} == {k: t.shape for k, t in model.state_dict().items()}
    assert {key: inferred[key] for key in config} == config
    assert inferred["scaling_factor"] == {"sd": 0.18215, "sdxl": 0.13025, "sd3": 1.5305, "flux": 0.3611}[family]


@pytest.mark.parametrize(
    ("cls", "width", "layers", "prefix", "count"),
    [
        (CLIPTextModelWithProjection, 1280, 32, "conditioner.embedders.1.model.", 389),
        (CLIPTextModel, 1024, 23, "cond_stage_model.model.", 280),
    ],
)
def test_a_full_size_open_clip_encoder_is_mapped_key_by_key(
    cls: type, width: int, layers: int, prefix: str, count: int
) -> None:
    config = CLIPTextConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, projection_dim=width
    )
    with torch.device("meta"):
        state = cls(config).state_dict()
    original = original_text_encoder(state, config, prefix)
    assert len(original) == count
    back = text_encoder_tensors(original, config, state)
    assert {key: tensor.shape for key, tensor in back.items()} == {key: tensor.shape for key, tensor in state.items()}


def test_a_map_refuses_keys_that_it_does_not_know_and_lists_them() -> None:
    table = flux_layout.key_map({"num_layers": 1, "num_single_layers": 1})
    state = {
        "double_blocks.0.img_attn.qkv.weight": torch.zeros(7, 2),
        "double_blocks.1.img_mod.lin.weight": torch.zeros(1),
    }
    with pytest.raises(ValueError, match=r"(?s)2 tensors.*shape \[7, 2\] does not divide.*double_blocks.1.*unknown"):
        to_ours(state, table)
    with pytest.raises(ValueError, match=r"to_q.weight: without transformer_blocks.0.attn.to_k.weight"):
        to_original({"transformer_blocks.0.attn.to_q.weight": torch.zeros(2, 2)}, table)
