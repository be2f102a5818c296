"""Tiny models with the shape of every official family, each buildable from hubgen's class and from diffusers'."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import nn

import hubgen
from tests.parity import randomize_

LIBRARIES = {"hubgen": hubgen, "diffusers": diffusers}
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Family:
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
    "SD 1.x": Family("UNet2DConditionModel", lambda: text_inputs(12), UNET),
    "SD 2.x": Family("UNet2DConditionModel", lambda: text_inputs(12), {**UNET, "use_linear_projection": True}),
    "SDXL": Family("UNet2DConditionModel", sdxl_inputs, {**UNET, **SDXL}),
    "SD 3": Family("SD3Transformer2DModel", sd3_inputs, SD3),
    "SD 3.5": Family(
        "SD3Transformer2DModel", sd3_inputs, {**SD3, "qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}
    ),
    "FLUX.1 dev": Family("FluxTransformer2DModel", lambda: flux_inputs(True), {**FLUX, "guidance_embeds": True}),
    "FLUX.1 schnell": Family("FluxTransformer2DModel", lambda: flux_inputs(False), FLUX),
    "DiT": Family(
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
    "DDPM": Family("UNet2DModel", pixel_inputs, {**PIXELS, **DDPM}),
    "NCSN++": Family("UNet2DModel", lambda: pixel_inputs((0.5, 9.0)), {**PIXELS, **NCSNPP}),
}
AUTOENCODERS = {
    "KL autoencoder": Family("AutoencoderKL", lambda: {"sample": drawn(2, 3, 16, 16)}, AUTOENCODER),
    "VQ autoencoder": Family(
        "VQModel",
        lambda: {"sample": drawn(2, 3, 16, 16)},
        {
            **{k: v for k, v in AUTOENCODER.items() if k != "latent_channels"},
            "latent_channels": 3,
            "num_vq_embeddings": 32,
        },
    ),
}
FAMILIES = {**DENOISERS, **AUTOENCODERS}
