"""Real models, tiny ones with random weights: the one place where tests build them.

    models.pipeline("unet")                     a whole pipeline of hubgen's own kind, for pictures of 16x16 pixels
    models.transformer(num_layers=3)            its parts, with changes to their configs
    models.NETWORKS["SDXL"].build("diffusers")  a network with the shape of an official family, of either library

Pipelines in the layouts of the official repositories are made by tests/official.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn
from transformers import BertConfig, BertModel, BertTokenizer, CLIPTextConfig, CLIPTextModelWithProjection

import hubgen
from hubgen.autoencoders.autoencoder_kl import AutoencoderKL
from hubgen.backbones.sd3 import SD3Transformer2DModel
from hubgen.backbones.unet_condition import UNet2DConditionModel
from hubgen.pipelines.text_to_image import TextToImagePipeline
from hubgen.schedulers.ddpm import DDPMScheduler
from hubgen.schedulers.flow_match_euler import FlowMatchEulerDiscreteScheduler
from tests.parity import randomize_

WORDS = ["a", "the", "red", "blue", "green", "cat", "dog", "heart", "smiling", "apple", "big", "small", "##s"]
MAX_LENGTH = 8
TEXT_WIDTH = 16


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with all parameters random, so that no zero initialisation hides a path through it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2 if parameter.ndim > 1 else 0.1, generator=generator)
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter.add_(1.0)  # norms
    return model.eval()


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
    return randomised(BertModel(config))


def clip_text_encoder() -> CLIPTextModelWithProjection:
    """Reads the same tokenizer's ids; the last token is found by `[SEP]`."""
    config = CLIPTextConfig(
        vocab_size=len(WORDS) + 5,
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        projection_dim=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )
    return randomised(CLIPTextModelWithProjection(config))


def vae() -> AutoencoderKL:
    """Two pixels a latent, four channels."""
    return randomised(
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            latent_channels=4,
            sample_size=16,
            scaling_factor=0.7,
            shift_factor=0.1,
        )
    )


def transformer(**config: Any) -> SD3Transformer2DModel:
    """16 pixels by default, at most 32; multiples of 4."""
    defaults: dict[str, Any] = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT_WIDTH,
        "caption_projection_dim": 16,
        "pooled_projection_dim": TEXT_WIDTH,
        "pos_embed_max_size": 8,
        "qk_norm": "rms_norm",
    }
    return randomised(SD3Transformer2DModel(**{**defaults, **config}))


def unet(**config: Any) -> UNet2DConditionModel:
    defaults: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": TEXT_WIDTH,
    }
    return randomised(UNet2DConditionModel(**{**defaults, **config}))


def pipeline(backbone: str = "transformer", **components: Any) -> TextToImagePipeline:
    """A pipeline of an MM-DiT on a rectified flow (`transformer`), or of a U-Net on DDPM's path (`unet`)."""
    mmdit = backbone == "transformer"
    defaults: dict[str, Any] = {
        "vae": vae(),
        "text_encoder": text_encoder(),
        "tokenizer": tokenizer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=2.0) if mmdit else DDPMScheduler(),
        backbone: transformer() if mmdit else unet(),
    }
    pipe = TextToImagePipeline(**{**defaults, **components})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def saved_pipeline(folder: Path, backbone: str = "transformer") -> Path:
    """A pipeline's folder, `folder` itself."""
    pipeline(backbone).save_pretrained(folder)
    return folder


# ---- networks of the official families, of either library ----

LIBRARIES = {"hubgen": hubgen, "diffusers": diffusers}
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Network:
    """A network of an official repository, in miniature."""

    class_name: str
    """What hubgen and diffusers both call it."""
    inputs: Callable[[], Inputs]
    """Keywords of the forward, the same each time."""
    config: dict[str, Any] = field(default_factory=dict)
    steps: str = "timestep"
    """The keyword that differs between two steps of a sampler."""

    def build(self, library: str, seed: int = 0) -> nn.Module:
        """The model with random weights, the same in both libraries."""
        model = getattr(LIBRARIES[library], self.class_name)(**self.config)
        return randomize_(model, seed).eval()


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def text_inputs(width: int, **more: Any) -> Inputs:
    return {
        "sample": drawn(2, 4, 8, 8),
        "timestep": torch.tensor([7.0, 500.0]),
        "encoder_hidden_states": drawn(2, 5, width, seed=1),
        **more,
    }


def sdxl_inputs() -> Inputs:
    time_ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).repeat(2, 1)
    return text_inputs(12, added_cond_kwargs={"text_embeds": drawn(2, 8, seed=2), "time_ids": time_ids})


def sd3_inputs() -> Inputs:
    return {
        "hidden_states": drawn(2, 4, 8, 8),
        "encoder_hidden_states": drawn(2, 5, 12, seed=1),
        "pooled_projections": drawn(2, 20, seed=2),
        "timestep": torch.tensor([7.0, 500.0]),
    }


def flux_inputs(guided: bool) -> Inputs:
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    places = torch.stack([torch.zeros(16), rows.flatten(), columns.flatten()], dim=1)
    inputs = {
        "hidden_states": drawn(2, 16, 4),
        "encoder_hidden_states": drawn(2, 5, 12, seed=1),
        "pooled_projections": drawn(2, 20, seed=2),
        "timestep": torch.tensor([0.3, 0.3]),
        "img_ids": places,
        "txt_ids": torch.zeros(5, 3),
    }
    return {**inputs, "guidance": torch.tensor([3.5, 3.5])} if guided else inputs


def dit_inputs() -> Inputs:
    return {
        "hidden_states": drawn(2, 4, 8, 8),
        "timestep": torch.tensor([7, 500]),
        "class_labels": torch.tensor([3, 1]),
    }


def pixel_inputs(timestep: tuple[float, ...] = (7.0, 500.0)) -> Inputs:
    return {"sample": drawn(2, 3, 16, 16), "timestep": torch.tensor(timestep)}


UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 12,
}
SD3: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 12,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 20,
    "out_channels": 4,
    "pos_embed_max_size": 8,
}
FLUX: dict[str, Any] = {
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 20,
    "axes_dims_rope": (4, 6, 6),
}
SDXL = {
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 8 + 6 * 8,
}
PIXELS: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": None,
}
DDPM = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
NCSNPP = {
    "block_out_channels": (32, 32),
    "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
    "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    "time_embedding_type": "fourier",
    "mid_block_scale_factor": 2**0.5,
    "norm_eps": 1e-6,
}
AUTOENCODER: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "latent_channels": 4,
    "sample_size": 16,
}

DENOISERS = {
    "SD 1.x": Network("UNet2DConditionModel", lambda: text_inputs(12), UNET),
    "SD 2.x": Network("UNet2DConditionModel", lambda: text_inputs(12), {**UNET, "use_linear_projection": True}),
    "SDXL": Network("UNet2DConditionModel", sdxl_inputs, {**UNET, **SDXL}),
    "SD 3": Network("SD3Transformer2DModel", sd3_inputs, SD3),
    "SD 3.5": Network(
        "SD3Transformer2DModel", sd3_inputs, {**SD3, "qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}
    ),
    "FLUX.1 dev": Network("FluxTransformer2DModel", lambda: flux_inputs(True), {**FLUX, "guidance_embeds": True}),
    "FLUX.1 schnell": Network("FluxTransformer2DModel", lambda: flux_inputs(False), FLUX),
    "DiT": Network(
        "DiTTransformer2DModel",
        dit_inputs,
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 3,
            "sample_size": 8,
            "num_embeds_ada_norm": 10,
        },
    ),
    "DDPM": Network("UNet2DModel", pixel_inputs, {**PIXELS, **DDPM}),
    "NCSN++": Network("UNet2DModel", lambda: pixel_inputs((0.5, 9.0)), {**PIXELS, **NCSNPP}),
}
AUTOENCODERS = {
    "KL autoencoder": Network("AutoencoderKL", lambda: {"sample": drawn(2, 3, 16, 16)}, AUTOENCODER),
    "VQ autoencoder": Network(
        "VQModel",
        lambda: {"sample": drawn(2, 3, 16, 16)},
        {
            **{k: v for k, v in AUTOENCODER.items() if k != "latent_channels"},
            "latent_channels": 3,
            "num_vq_embeddings": 32,
        },
    ),
}
NETWORKS = {**DENOISERS, **AUTOENCODERS}
