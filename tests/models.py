"""Tiny models with random weights, the only place where tests make them: a config a family, for both libraries.

    NETWORKS["SD 3"].build()                          hubgen's class; `build("diffusers")` has the same weights
    NETWORKS["SD 3"].build(num_layers=5)              with a changed config; `inputs` and `pair` take changes too
    pipeline("unet")                                  a whole text-to-image pipeline, tokenizer and all

Pipelines in the layouts of the official repositories are made of the same configs in tests/official.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from transformers import BertConfig, BertModel, BertTokenizer, CLIPTextConfig, CLIPTextModelWithProjection

import hubgen
from tests.parity import randomize_

LIBRARIES = {"hubgen": hubgen, "diffusers": diffusers}
Config = dict[str, Any]
Inputs = dict[str, Any]
Size = tuple[int, int]

WORDS = ["a", "the", "red", "blue", "green", "cat", "dog", "heart", "smiling", "apple", "big", "small", "##s"]
WORDS += ["ball", "box"]
MAX_LENGTH = 8
TEXT_WIDTH = 16
POOLED = 12
"""Features of SDXL's pooled text; SD3 and FLUX have `TEXT_WIDTH` of them."""

# Configs. Latents are 8x8 of 4 channels, pictures 16x16.

UNET: Config = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": TEXT_WIDTH,
}
SDXL: Config = {
    **UNET,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "attention_head_dim": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": POOLED + 6 * 8,
}
SD3: Config = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": TEXT_WIDTH,
    "caption_projection_dim": 32,
    "pooled_projection_dim": TEXT_WIDTH,
    "pos_embed_max_size": 8,
}
FLUX: Config = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT_WIDTH,
    "pooled_projection_dim": TEXT_WIDTH,
    "axes_dims_rope": (4, 6, 6),
}
DIT: Config = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 3,
    "sample_size": 8,
    "num_embeds_ada_norm": 10,
}
PIXELS: Config = {
    "sample_size": 16,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": None,
}
DDPM: Config = {**PIXELS, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6}
NCSNPP: Config = {
    **PIXELS,
    "block_out_channels": (32, 32),
    "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
    "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    "time_embedding_type": "fourier",
    "mid_block_scale_factor": 2**0.5,
    "norm_num_groups": None,
    "norm_eps": 1e-6,
}
GUIDED: Config = {
    **PIXELS,
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "resnet_time_scale_shift": "scale_shift",
    "attention_head_dim": 8,
    "out_channels": 6,
    "num_class_embeds": 7,
}
CONTROLNET: Config = {
    **{key: value for key, value in UNET.items() if key not in ("sample_size", "out_channels", "up_block_types")},
    "conditioning_embedding_out_channels": (4, 8),
}
CONTROLNET_SDXL: Config = {
    **{key: value for key, value in SDXL.items() if key not in ("sample_size", "out_channels", "up_block_types")},
    "conditioning_embedding_out_channels": (4, 8),
}
UNION: Config = {
    **CONTROLNET_SDXL,
    "num_control_type": 6,
    "num_trans_channel": 8,
    "num_trans_head": 2,
    "num_proj_channel": 8,
}
CONTROLNET_SD3: Config = {**SD3, "num_layers": 2, "qk_norm": "rms_norm"}
CONTROLNET_SD35: Config = {
    **SD3,
    "num_layers": 2,
    "joint_attention_dim": None,
    "caption_projection_dim": 24,
    "pos_embed_max_size": None,
    "pos_embed_type": None,
    "use_pos_embed": False,
    "force_zeros_for_pooled_projection": False,
}
CONTROLNET_FLUX: Config = {**FLUX, "num_layers": 2, "num_single_layers": 3, "guidance_embeds": True, "num_mode": 4}
AUTOENCODER: Config = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "latent_channels": 4,
    "sample_size": 16,
}

# Inputs of a batch of two for a config, the same each time.


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def class_inputs(config: Config) -> Inputs:
    """What tells a U-Net its class, if it takes one."""
    if config.get("class_embed_type") == "identity":
        return {"class_labels": drawn(2, 4 * config["block_out_channels"][0], seed=2)}
    if config.get("class_embed_type") in ("projection", "simple_projection"):
        return {"class_labels": drawn(2, config["projection_class_embeddings_input_dim"], seed=2)}
    if config.get("class_embed_type") == "timestep":
        return {"class_labels": torch.tensor([3.0, 400.0])}
    return {"class_labels": torch.tensor([0, 6])} if "num_class_embeds" in config else {}


def unet_inputs(config: Config, size: Size = (8, 8)) -> Inputs:
    inputs = {
        "sample": drawn(2, config["in_channels"], *size),
        "timestep": torch.tensor([7.0, 500.0]),
        "encoder_hidden_states": drawn(2, 5, config.get("encoder_hid_dim", config["cross_attention_dim"]), seed=1),
        **class_inputs(config),
    }
    if config.get("addition_embed_type") == "text_time":
        numbers = (config["projection_class_embeddings_input_dim"] - POOLED) // config["addition_time_embed_dim"]
        time_ids = torch.tensor([[64.0, 64, 0, 3, 64, 64]])[:, :numbers].repeat(2, 1)
        inputs["added_cond_kwargs"] = {"text_embeds": drawn(2, POOLED, seed=2), "time_ids": time_ids}
    if "time_cond_proj_dim" in config:
        inputs["timestep_cond"] = drawn(2, config["time_cond_proj_dim"], seed=3)
    return inputs


def controlnet_inputs(config: Config, size: Size = (8, 8)) -> Inputs:
    """Of a hint with two pixels a latent."""
    return {**unet_inputs(config, size), "controlnet_cond": hint(config, size)}


def union_inputs(config: Config, size: Size = (8, 8)) -> Inputs:
    """Of two hints."""
    marks = torch.zeros(2, config["num_control_type"])
    marks[:, [3, 1]] = 1
    return {
        **unet_inputs(config, size),
        "controlnet_cond": [hint(config, size), hint(config, size, seed=5)],
        "control_type": marks,
        "control_type_idx": [3, 1],
        "conditioning_scale": [0.8, 0.6],
    }


def hint(config: Config, size: Size = (8, 8), seed: int = 4) -> torch.Tensor:
    """Pixels in [0, 1], as many a latent as the network's embedding makes one of."""
    factor = 2 ** (len(config["conditioning_embedding_out_channels"]) - 1)
    shape = (2, config.get("conditioning_channels", 3), factor * size[0], factor * size[1])
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def sd3_inputs(config: Config, size: Size = (8, 8)) -> Inputs:
    return {
        "hidden_states": drawn(2, config["in_channels"], *size),
        "encoder_hidden_states": drawn(2, 5, config["joint_attention_dim"], seed=1),
        "pooled_projections": drawn(2, config["pooled_projection_dim"], seed=2),
        "timestep": torch.tensor([7.0, 500.0]),
    }


def flux_inputs(config: Config, size: Size = (8, 8)) -> Inputs:
    """Of latents that were packed two by two."""
    grid = torch.meshgrid(*(torch.arange(float(n)) for n in (1, size[0] // 2, size[1] // 2)), indexing="ij")
    inputs = {
        "hidden_states": drawn(2, size[0] * size[1] // 4, config["in_channels"]),
        "encoder_hidden_states": drawn(2, 5, config["joint_attention_dim"], seed=1),
        "pooled_projections": drawn(2, config["pooled_projection_dim"], seed=2),
        "timestep": torch.tensor([0.05, 0.8]),
        "img_ids": torch.stack(grid, dim=-1).reshape(-1, 3),
        "txt_ids": torch.zeros(5, 3),
    }
    return {**inputs, "guidance": torch.tensor([3.5, 2.0])} if config.get("guidance_embeds") else inputs


def sd3_net_inputs(config: Config, size: Size = (8, 8)) -> Inputs:
    """Of a network without an embedding of its own the tokens that its base's makes."""
    inputs = sd3_inputs({**config, "joint_attention_dim": config["joint_attention_dim"] or 1}, size)
    if config["joint_attention_dim"] is None:
        del inputs["encoder_hidden_states"]
    if not config.get("use_pos_embed", True):
        width = config["num_attention_heads"] * config["attention_head_dim"]
        inputs["hidden_states"] = drawn(2, size[0] * size[1] // config["patch_size"] ** 2, width)
    channels = config["in_channels"] + config.get("extra_conditioning_channels", 0)
    return {**inputs, "controlnet_cond": drawn(2, channels, *size, seed=4)}


def flux_net_inputs(config: Config, size: Size = (8, 8)) -> Inputs:
    """Of latents, or for a network that embeds pixels 8 of them a latent each way."""
    inputs = flux_inputs(config, size)
    if config.get("conditioning_embedding_channels"):
        inputs["controlnet_cond"] = drawn(2, 3, 8 * size[0], 8 * size[1], seed=4)
    else:
        inputs["controlnet_cond"] = drawn(*inputs["hidden_states"].shape, seed=4)
    return {**inputs, "controlnet_mode": torch.tensor([[2], [0]])} if config.get("num_mode") else inputs


def dit_inputs(config: Config, size: Size = (8, 8)) -> Inputs:
    return {
        "hidden_states": drawn(2, config["in_channels"], *size),
        "timestep": torch.tensor([7, 500]),
        "class_labels": torch.tensor([3, 1]),
    }


def pixel_inputs(config: Config, size: Size = (16, 16)) -> Inputs:
    fourier = config.get("time_embedding_type") == "fourier"
    timestep = torch.tensor([0.5, 9.0]) if fourier else torch.tensor([7, 991])
    return {"sample": drawn(2, config.get("in_channels", 3), *size), "timestep": timestep, **class_inputs(config)}


def autoencoder_inputs(config: Config, size: Size = (16, 16)) -> Inputs:
    return {"sample": drawn(2, 3, *size)}


@dataclass(frozen=True)
class Network:
    """A network of the official repositories, in miniature."""

    class_name: str
    """What hubgen and diffusers both call it."""
    config: Config
    inputs_of: Callable[..., Inputs]
    unread: str = r"^quantize\."
    """Pattern of the names of parameters without a gradient of the output: a codebook's; of a ControlNet's last block
    what computes the text."""

    def build(self, library: str = "hubgen", seed: int = 0, **changes: Any) -> Any:
        """The model with random weights, the same in both libraries; `changes` of its config."""
        return randomize_(self.fresh(library, **changes), seed).eval()

    def fresh(self, library: str = "hubgen", **changes: Any) -> Any:
        """The model as its class initialises it."""
        return getattr(LIBRARIES[library], self.class_name)(**{**self.config, **changes})

    def pair(self, **changes: Any) -> tuple[Any, Any]:
        """hubgen's model and diffusers' with the weights of diffusers'."""
        ours, theirs = self.fresh("hubgen", **changes).eval(), self.build("diffusers", **changes)
        ours.load_state_dict(theirs.state_dict())
        return ours, theirs

    def inputs(self, *size: Size, **changes: Any) -> Inputs:
        """Keywords of the forward, the same each time, for a size other than the usual if it is given."""
        return self.inputs_of({**self.config, **changes}, *size)


DENOISERS = {
    "SD 1.x": Network("UNet2DConditionModel", UNET, unet_inputs),
    "SD 2.x": Network("UNet2DConditionModel", {**UNET, "use_linear_projection": True}, unet_inputs),
    "SDXL": Network("UNet2DConditionModel", SDXL, unet_inputs),
    "SD 3": Network("SD3Transformer2DModel", SD3, sd3_inputs),
    "SD 3.5": Network(
        "SD3Transformer2DModel", {**SD3, "qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}, sd3_inputs
    ),
    "FLUX.1 dev": Network("FluxTransformer2DModel", {**FLUX, "guidance_embeds": True}, flux_inputs),
    "FLUX.1 schnell": Network("FluxTransformer2DModel", FLUX, flux_inputs),
    "DiT": Network("DiTTransformer2DModel", DIT, dit_inputs),
    "DDPM": Network("UNet2DModel", DDPM, pixel_inputs),
    "NCSN++": Network("UNet2DModel", NCSNPP, pixel_inputs),
    "guided diffusion": Network("UNet2DModel", GUIDED, pixel_inputs),
}
AUTOENCODERS = {
    "KL autoencoder": Network("AutoencoderKL", AUTOENCODER, autoencoder_inputs),
    "VQ autoencoder": Network(
        "VQModel", {**AUTOENCODER, "latent_channels": 3, "num_vq_embeddings": 32}, autoencoder_inputs
    ),
}
CONTROLNETS = {
    "ControlNet, SD 1.x": Network("ControlNetModel", CONTROLNET, controlnet_inputs),
    "ControlNet, SDXL": Network("ControlNetModel", CONTROLNET_SDXL, controlnet_inputs),
    "ControlNet Union, SDXL": Network("ControlNetUnionModel", UNION, union_inputs),
    "ControlNet, SD 3": Network(
        "SD3ControlNetModel", CONTROLNET_SD3, sd3_net_inputs, r"^transformer_blocks\.1\.(ff_context|attn\.to_add_out)\."
    ),
    "ControlNet, SD 3.5 large": Network("SD3ControlNetModel", CONTROLNET_SD35, sd3_net_inputs),
    "ControlNet, FLUX.1": Network("FluxControlNetModel", CONTROLNET_FLUX, flux_net_inputs),
}
"""Networks that return residuals for another's blocks."""
NETWORKS = {**DENOISERS, **AUTOENCODERS, **CONTROLNETS}

# A whole text-to-image pipeline of hubgen's.


def tokenizer(max_length: int = MAX_LENGTH) -> BertTokenizer:
    """WordPiece over a dozen words."""
    vocab = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    return BertTokenizer(vocab, model_max_length=max_length)


def text_encoder() -> BertModel:
    config = BertConfig(
        vocab_size=len(WORDS) + 5,
        hidden_size=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    return randomize_(BertModel(config)).eval()


def clip_text_encoder() -> CLIPTextModelWithProjection:
    """Reads the same tokenizer's ids; the last token is found by `[SEP]`."""
    config = CLIPTextConfig(
        vocab_size=len(WORDS) + 5,
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        projection_dim=POOLED,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )
    return randomize_(CLIPTextModelWithProjection(config)).eval()


def vae(**config: Any) -> hubgen.AutoencoderKL:
    """Two pixels a latent, four channels."""
    return NETWORKS["KL autoencoder"].build(**{"scaling_factor": 0.7, "shift_factor": 0.1, **config})


def transformer(**config: Any) -> hubgen.SD3Transformer2DModel:
    """16 pixels by default, at most 32; multiples of 4."""
    return NETWORKS["SD 3"].build(**{"qk_norm": "rms_norm", **config})


def unet(**config: Any) -> hubgen.UNet2DConditionModel:
    return NETWORKS["SD 1.x"].build(**config)


def pipeline(backbone: str = "transformer", **components: Any) -> hubgen.TextToImagePipeline:
    """A pipeline of an MM-DiT on a rectified flow (`transformer`), or of a U-Net on DDPM's path (`unet`)."""
    mmdit = backbone == "transformer"
    defaults: dict[str, Any] = {
        "vae": vae(),
        "text_encoder": text_encoder(),
        "tokenizer": tokenizer(),
        "scheduler": hubgen.FlowMatchEulerDiscreteScheduler(shift=2.0) if mmdit else hubgen.DDPMScheduler(),
        backbone: transformer() if mmdit else unet(),
    }
    pipe = hubgen.TextToImagePipeline(**{**defaults, **components})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def saved_pipeline(folder: Path, backbone: str = "transformer") -> Path:
    """A pipeline's folder, `folder` itself."""
    pipeline(backbone).save_pretrained(folder)
    return folder
