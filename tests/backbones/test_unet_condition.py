"""UNet2DConditionModel: parity with diffusers on random weights, and what diffusers' features ask of a model."""

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor as DiffusersAttnProcessor
from diffusers.models.attention_processor import AttnProcessor2_0 as DiffusersAttnProcessor2_0

from hubgen.backbones.unet_condition import UNet2DConditionModel
from hubgen.backbones.unet_condition_config import (
    stable_diffusion_1,
    stable_diffusion_2,
    stable_diffusion_xl,
    stable_diffusion_xl_refiner,
)
from hubgen.layers.attention import AttnProcessor
from tests.models import NETWORKS, POOLED, SDXL
from tests.parity import assert_parity, randomize_

UNET = NETWORKS["SD 1.x"]
SMALL, pair, random_model = UNET.config, UNET.pair, UNET.build
# Fewer blocks than SDXL, and other numbers of them on the way up.
SSD_1B = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (8, 16, 16),
    "layers_per_block": 2,
    "attention_head_dim": (1, 2, 2),
    "transformer_layers_per_block": [1, [2, 2], [4, 4]],
    "reverse_transformer_layers_per_block": [[4, 4, 3], [2, 1, 1], 1],
}
VARIANTS = {
    "sd1": {"layers_per_block": 2},
    "sd2": {"attention_head_dim": (2, 4), "use_linear_projection": True, "upcast_attention": True},
    "sdxl": SDXL,
    "refiner": {
        **SDXL,
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4, 4),
        "transformer_layers_per_block": 2,
        "projection_class_embeddings_input_dim": POOLED + 5 * 8,
    },
    "projected pooled text": {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 20},
    "timestep class": {"class_embed_type": "timestep"},
    "classes": {"num_class_embeds": 7},
    "guidance embedding": {"time_cond_proj_dim": 12},
    "projected text tokens": {"encoder_hid_dim": 20},
    "uneven": {
        "layers_per_block": (2, 1),
        "transformer_layers_per_block": ((1, 2), (1,)),
        "reverse_transformer_layers_per_block": ((1, 1), (2, 1, 1)),
        "mid_block_scale_factor": 1.5,
        "downsample_padding": 0,
        "conv_in_kernel": 5,
        "conv_out_kernel": 1,
        "time_embedding_dim": 40,
        "center_input_sample": True,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "in_channels": 5,
        "out_channels": 6,
    },
    "no middle": {"mid_block_type": None},
    "plain middle": {"mid_block_type": "UNetMidBlock2D"},
    "heads that do not divide the channels": {"attention_head_dim": 3},
    "heads that do not divide the channels, linear": {"attention_head_dim": (3, 5), "use_linear_projection": True},
    "a vector as the class": {"class_embed_type": "identity"},
    "a vector in one layer": {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 20},
    "a class beside the time": {"num_class_embeds": 7, "class_embeddings_concat": True},
    "a vector beside the time": {
        "class_embed_type": "simple_projection",
        "projection_class_embeddings_input_dim": 20,
        "class_embeddings_concat": True,
    },
    "other depths down than up": SSD_1B,
    "other depths up in one list": {
        **SSD_1B,
        "transformer_layers_per_block": 1,
        "reverse_transformer_layers_per_block": [3, 2, 1],
    },
    "no attention in the middle": {**SSD_1B, "mid_block_type": "UNetMidBlock2D"},
}


def inputs_for(config: dict, size: tuple[int, int] = (8, 8)) -> dict:
    return UNET.inputs(size, **config)


@pytest.mark.parametrize("variant", VARIANTS)
def test_output_agrees_with_diffusers_on_random_weights(variant):
    ours, theirs = pair(**VARIANTS[variant])
    assert_parity(ours, theirs, inputs_for(VARIANTS[variant]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_config_parameters_and_processors_are_named_as_in_diffusers(variant):
    ours, theirs = pair(**VARIANTS[variant])
    assert {k: v for k, v in ours.config.items() if k[0] != "_"} == {
        k: v for k, v in theirs.config.items() if k[0] != "_"
    }
    shapes = [{k: v.shape for k, v in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    # IP-Adapter files number their weights by this order.
    assert list(ours.attn_processors) == list(theirs.attn_processors)


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        (stable_diffusion_1, 859_520_964),
        (stable_diffusion_2, 865_910_724),
        (stable_diffusion_xl, 2_567_463_684),
        (stable_diffusion_xl_refiner, 2_259_526_660),
    ],
)
def test_full_size_presets_have_the_published_number_of_parameters_and_diffusers_keys(preset, count):
    with torch.device("meta"):
        ours, theirs = UNet2DConditionModel(**preset()), diffusers.UNet2DConditionModel(**preset())
    assert sum(p.numel() for p in ours.parameters()) == count
    shapes = [{k: v.shape for k, v in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("size", [(7, 9), (5, 8), (1, 3)])
@pytest.mark.parametrize("variant", ["sd1", "refiner"])
def test_sizes_that_do_not_halve_evenly_agree_with_diffusers(variant, size):
    ours, theirs = pair(**VARIANTS[variant])
    out = assert_parity(ours, theirs, inputs_for(VARIANTS[variant], size))
    assert out.shape[-2:] == size


def test_a_masked_text_token_does_not_count():
    ours, theirs = pair()
    inputs = inputs_for({})
    inputs["encoder_attention_mask"] = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    masked = assert_parity(ours, theirs, inputs)
    inputs["encoder_hidden_states"][0, 3:] = 100.0
    torch.testing.assert_close(assert_parity(ours, theirs, inputs), masked)


def test_self_attention_mask_agrees_with_diffusers_where_attention_has_one_size():
    ours, theirs = pair(**SDXL)
    inputs = inputs_for(SDXL)
    unmasked = assert_parity(ours, theirs, inputs)
    masked = assert_parity(ours, theirs, {**inputs, "attention_mask": torch.arange(32).reshape(2, 16) % 3 > 0})
    assert (masked - unmasked).abs().max() > 1e-3
    with pytest.raises(ValueError, match="`attention_mask`: got a mask of 16 tokens"):
        random_model()(**inputs_for({}), attention_mask=torch.ones(2, 16))


@pytest.mark.parametrize("variant", ["sd1", "sdxl"])
def test_controlnet_residuals_agree_with_diffusers(variant):
    ours, theirs = pair(**VARIANTS[variant])
    inputs = inputs_for(VARIANTS[variant])
    plain = assert_parity(ours, theirs, inputs)
    config = {**SMALL, **VARIANTS[variant]}
    controlnet = diffusers.ControlNetModel(
        **{k: v for k, v in config.items() if k not in ("sample_size", "out_channels", "up_block_types")},
        conditioning_embedding_out_channels=(8, 16),
    )
    randomize_(controlnet)
    with torch.no_grad():
        hint = torch.rand(2, 3, 16, 16)
        residuals = controlnet(**inputs, controlnet_cond=hint)
    inputs["down_block_additional_residuals"] = residuals.down_block_res_samples
    inputs["mid_block_additional_residual"] = residuals.mid_block_res_sample
    controlled = assert_parity(ours, theirs, inputs)
    assert (controlled - plain).abs().max() > 1e-2


@pytest.mark.parametrize("variant", ["sd1", "sdxl"])
def test_t2i_adapter_residuals_agree_with_diffusers(variant):
    ours, theirs = pair(**VARIANTS[variant])
    inputs = inputs_for(VARIANTS[variant])
    # A level with attention takes its residual before the halving, one without after it; the last is the middle's.
    sizes = {"sd1": [(8, 8), (16, 4), (16, 4)], "sdxl": [(8, 4), (16, 4), (16, 4)]}[variant]
    residuals = [torch.randn(2, channels, side, side) for channels, side in sizes]
    inputs["down_intrablock_additional_residuals"] = residuals
    assert_parity(ours, theirs, inputs)
    ours(**inputs)
    assert len(residuals) == 3, "the caller's list is left as it was"


@pytest.mark.parametrize("variant", ["sd1", "sdxl", "uneven"])
def test_saved_models_load_in_diffusers_and_the_other_way_round(variant, tmp_path):
    ours, theirs = pair(**VARIANTS[variant])
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    inputs = inputs_for(VARIANTS[variant])
    assert_parity(UNet2DConditionModel.from_pretrained(tmp_path / "theirs"), theirs, inputs)
    assert_parity(ours, diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "ours"), inputs)
    assert [f.name for f in (tmp_path / "ours").iterdir() if f.suffix not in (".json", ".safetensors")] == []


@torch.no_grad()
def test_processors_are_replaced_by_name_and_those_of_diffusers_compute_the_same():
    ours, theirs = pair(**VARIANTS["sd2"])
    inputs = inputs_for(VARIANTS["sd2"])
    inputs["encoder_attention_mask"] = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    expected = assert_parity(ours, theirs, inputs)
    for processor in (DiffusersAttnProcessor(), DiffusersAttnProcessor2_0(), AttnProcessor()):
        ours.set_attn_processor(processor)
        torch.testing.assert_close(ours(**inputs).sample, expected, rtol=1e-4, atol=1e-4)

    seen = []

    class Recorder(AttnProcessor):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, note=None):
            seen.append((note, hidden_states.shape[1]))
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)

    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor"
    processors = {key: Recorder() if key == name else AttnProcessor() for key in ours.attn_processors}
    ours.set_attn_processor(processors)
    ours(**inputs)
    assert seen == [(None, 64)]


def test_diffusers_pipelines_accept_the_model():
    unet = random_model(cross_attention_dim=32)
    pipeline = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4),
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    embeds = torch.randn(1, 5, 32)
    latents = pipeline(
        prompt_embeds=embeds,
        negative_prompt_embeds=torch.zeros_like(embeds),
        num_inference_steps=2,
        output_type="latent",
    ).images
    assert latents.shape == (1, 4, 8, 8) and torch.isfinite(latents).all()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"down_block_types": ("AttnDownBlock2D", "DownBlock2D")}, "`down_block_types`: got 'AttnDownBlock2D'"),
        ({"up_block_types": ("UpBlock2D",)}, "`up_block_types`: got .*, expected one entry a level, 2"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "`mid_block_type`.*SimpleCrossAttn"),
        ({"only_cross_attention": True}, "`only_cross_attention`: got True, expected False"),
        ({"dual_cross_attention": True}, "`dual_cross_attention`"),
        ({"num_attention_heads": 4}, "`num_attention_heads`"),
        ({"class_embed_type": "text"}, "`class_embed_type`.*'text'"),
        ({"class_embed_type": "simple_projection"}, "`projection_class_embeddings_input_dim`: got None"),
        ({"class_embeddings_concat": True}, "`class_embeddings_concat`: got True, expected False without"),
        ({**SDXL, "class_embeddings_concat": True}, "`class_embeddings_concat`: got True, expected False with"),
        ({"class_embed_type": "projection"}, "`projection_class_embeddings_input_dim`: got None"),
        ({"class_embed_type": "timestep", "num_class_embeds": 3}, "`num_class_embeds`: got 3"),
        ({"addition_embed_type": "text_image"}, "`addition_embed_type`.*'text_image'"),
        (
            {"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": 8},
            "`addition_time_embed_dim`: got None",
        ),
        ({"encoder_hid_dim_type": "text_proj"}, "`encoder_hid_dim`: got None"),
        ({"encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 8}, "`encoder_hid_dim_type`.*'image_proj'"),
        ({"attention_type": "gated"}, "`attention_type`.*'gated'"),
        ({"act_fn": "gelu"}, "`act_fn`.*'gelu'"),
        ({"resnet_time_scale_shift": "scale_shift"}, "`resnet_time_scale_shift`"),
        ({"time_embedding_type": "fourier"}, "`time_embedding_type`"),
        ({"norm_num_groups": None}, "`norm_num_groups`: got None, expected a whole number"),
        ({"norm_num_groups": 5}, "`norm_num_groups`: got 5, expected a divisor"),
        ({"attention_head_dim": 9}, "`attention_head_dim`: got 9 heads .* at most the level's 8 channels"),
        ({"attention_head_dim": (2, 2, 2)}, "`attention_head_dim`: got 3 values .*, expected one, or 2"),
        ({"layers_per_block": -3}, "`layers_per_block`: got -3, expected a whole number"),
        ({"conv_in_kernel": 4}, "`conv_in_kernel`: got 4, expected an odd number"),
        ({"transformer_layers_per_block": ((1,), (1,))}, "`reverse_transformer_layers_per_block`"),
        (
            {"transformer_layers_per_block": ((1, 1), 1), "reverse_transformer_layers_per_block": (1, 1)},
            "each of the level's 1 residual blocks",
        ),
    ],
)
def test_a_config_that_cannot_be_built_is_refused_by_name(config, message):
    with pytest.raises(ValueError, match=message):
        UNet2DConditionModel(**{**SMALL, **config})


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (
            {},
            {"sample": torch.zeros(2, 3, 8, 8)},
            r"`sample`: got \(2, 3, 8, 8\), expected \(batch, 4, height",
        ),
        ({}, {"sample": torch.zeros(4, 8, 8)}, r"`sample`.*\(4, 8, 8\)"),
        ({}, {"timestep": torch.zeros(3)}, r"`timestep`.*\(3,\)"),
        ({}, {"encoder_hidden_states": None}, r"`encoder_hidden_states`: got None, expected \(2, tokens, 16\)"),
        ({}, {"encoder_hidden_states": torch.zeros(2, 5, 32)}, r"`encoder_hidden_states`.*\(2, 5, 32\)"),
        ({}, {"encoder_hidden_states": torch.zeros(1, 5, 16)}, r"`encoder_hidden_states`.*\(1, 5, 16\)"),
        (
            {},
            {"encoder_attention_mask": torch.ones(2, 4)},
            r"`encoder_attention_mask`: got \(2, 4\), .*\(2, 5\)",
        ),
        ({}, {"attention_mask": torch.ones(2, 1, 64)}, r"`attention_mask`"),
        ({}, {"class_labels": torch.zeros(2)}, "`class_labels`: got a tensor, expected None"),
        ({"num_class_embeds": 3}, {"class_labels": None}, "`class_labels`: got None, expected a tensor"),
        (VARIANTS["projected pooled text"], {"class_labels": torch.zeros(2, 19)}, r"`class_labels`.*\(2, 19\)"),
        ({}, {"timestep_cond": torch.zeros(2, 4)}, "`timestep_cond`"),
        ({}, {"added_cond_kwargs": {"image_embeds": torch.zeros(2, 4)}}, r"`added_cond_kwargs`.*\['image_embeds'\]"),
        (
            SDXL,
            {"added_cond_kwargs": None},
            r"got the keys \[\], expected \['text_embeds', 'time_ids'\]",
        ),
        (SDXL, {"added_cond_kwargs": {"text_embeds": torch.zeros(2, 20)}}, r"got the keys \['text_embeds'\]"),
        (
            SDXL,
            {"added_cond_kwargs": {"text_embeds": torch.zeros(2, 12), "time_ids": torch.zeros(2, 5)}},
            "52 together, expected `projection_class_embeddings_input_dim` = 60",
        ),
        ({}, {"down_block_additional_residuals": [torch.zeros(1)] * 4}, "`mid_block_additional_residual`"),
        (
            {},
            {"down_block_additional_residuals": [torch.zeros(1)], "mid_block_additional_residual": torch.zeros(1)},
            "got 1 tensors, expected 4",
        ),
        ({}, {"down_intrablock_additional_residuals": [torch.zeros(1)] * 4}, "got 4 tensors, expected at most 3"),
    ],
)
def test_an_input_that_does_not_fit_is_refused_by_name(config, change, message):
    model = UNet2DConditionModel(**{**SMALL, **config})
    with pytest.raises(ValueError, match=message):
        model(**{**inputs_for(config), **change})
