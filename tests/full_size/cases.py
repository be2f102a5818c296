"""The published networks, each as hubgen's class and diffusers' of the same name build it.

Two use a few blocks of full width, because all of them do not fit a small machine's memory in float32: names and
shapes of the parameters are compared for the whole network all the same.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import nn

import hubgen
from hubgen.autoencoders import autoencoder_kl
from hubgen.backbones import dit, flux, unet_condition_config
from hubgen.backbones import sd3 as stable_diffusion_3

LIBRARIES = {"hubgen": hubgen, "diffusers": diffusers}
Config = dict[str, Any]
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A published network."""

    class_name: str
    """What hubgen and diffusers both call it."""
    preset: Callable[[], Config]
    """The config of the whole network."""
    parameters: int
    """How many the whole network has."""
    inputs: Callable[[Config], Inputs]
    """Random inputs that a network of a config takes, always the same."""
    blocks: Config = field(default_factory=dict)
    """Changes to the config of the network that computes, where that is not the whole one."""
    reduced: Config = field(default_factory=dict)
    """Changes to the config that make it small enough for every test run, and leave all of its kinds of layers."""

    @property
    def config(self) -> Config:
        """Of the network that computes."""
        return {**self.preset(), **self.blocks}

    def build(self, library: str, config: Config) -> nn.Module:
        return getattr(LIBRARIES[library], self.class_name)(**config)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unet_inputs(config: Config) -> Inputs:
    inputs: Inputs = {
        "sample": drawn(1, 4, 16, 16),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": drawn(1, 77, config["cross_attention_dim"], seed=1),
    }
    if config.get("addition_embed_type") == "text_time":
        pooled = 1280  # OpenCLIP bigG's, in the base model and the refiner
        numbers = (config["projection_class_embeddings_input_dim"] - pooled) // config["addition_time_embed_dim"]
        time_ids = torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]])[:, :numbers]
        inputs["added_cond_kwargs"] = {"text_embeds": drawn(1, pooled, seed=2), "time_ids": time_ids}
    return inputs


def dit_inputs(config: Config) -> Inputs:
    return {
        "hidden_states": drawn(1, 4, 32, 32),
        "timestep": torch.tensor([500]),
        "class_labels": torch.tensor([7]),
    }


def sd3_inputs(config: Config) -> Inputs:
    return {
        "hidden_states": drawn(1, 16, 16, 16),
        "encoder_hidden_states": drawn(1, 154, config["joint_attention_dim"], seed=1),
        "pooled_projections": drawn(1, config["pooled_projection_dim"], seed=2),
        "timestep": torch.tensor([500.0]),
    }


def flux_inputs(config: Config) -> Inputs:
    grid = torch.meshgrid(*(torch.arange(float(n)) for n in (1, 8, 8)), indexing="ij")
    inputs = {
        "hidden_states": drawn(1, 64, config["in_channels"]),  # 16 x 16 latents, packed two by two
        "encoder_hidden_states": drawn(1, 128, config["joint_attention_dim"], seed=1),
        "pooled_projections": drawn(1, config["pooled_projection_dim"], seed=2),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.stack(grid, dim=-1).reshape(-1, 3),
        "txt_ids": torch.zeros(128, 3),
    }
    return {**inputs, "guidance": torch.tensor([3.5])} if config["guidance_embeds"] else inputs


def autoencoder_inputs(config: Config) -> Inputs:
    return {"pixels": drawn(1, 3, 128, 128), "latents": drawn(1, config["latent_channels"], 16, 16, seed=1)}


def full(class_name: str, preset: Callable[[], Config | nn.Module]) -> Callable[[], Config]:
    """All of the config, defaults too, of a preset that is a part of it or the network itself."""

    def config() -> Config:
        with torch.device("meta"):
            made = preset()
            network = made if isinstance(made, nn.Module) else getattr(hubgen, class_name)(**made)
        return {name: value for name, value in network.config.items() if not name.startswith("_")}

    return config


def unet(preset: Callable[[], Config], parameters: int, **reduced: Any) -> Case:
    name = "UNet2DConditionModel"
    return Case(name, full(name, preset), parameters, unet_inputs, reduced={"layers_per_block": 1, **reduced})


def sd3(preset: Callable[[], Config], parameters: int, blocks: Config | None = None) -> Case:
    name = "SD3Transformer2DModel"
    reduced = {
        "num_layers": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "caption_projection_dim": 32,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 20,
    }
    if preset().get("dual_attention_layers"):
        reduced["dual_attention_layers"] = (0, 1)
    return Case(name, full(name, preset), parameters, sd3_inputs, blocks or {}, reduced)


def flux_1(preset: Callable[[], Config], parameters: int) -> Case:
    name = "FluxTransformer2DModel"
    reduced = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "axes_dims_rope": (4, 6, 6),
        "joint_attention_dim": 24,
        "pooled_projection_dim": 20,
    }
    few = {"num_layers": 1, "num_single_layers": 2}
    return Case(name, full(name, preset), parameters, flux_inputs, few, reduced)


def autoencoder(preset: Callable[[], nn.Module], parameters: int) -> Case:
    name = "AutoencoderKL"
    reduced = {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 1}
    return Case(name, full(name, preset), parameters, autoencoder_inputs, reduced=reduced)


CASES = {
    "SD 1.5 U-Net": unet(
        unet_condition_config.stable_diffusion_1,
        859_520_964,
        block_out_channels=(32, 64, 64, 64),
        cross_attention_dim=24,
    ),
    "SD 2.1 U-Net": unet(
        unet_condition_config.stable_diffusion_2,
        865_910_724,
        block_out_channels=(32, 64, 64, 64),
        attention_head_dim=(1, 2, 4, 4),
        cross_attention_dim=24,
    ),
    "SDXL U-Net": unet(
        unet_condition_config.stable_diffusion_xl,
        2_567_463_684,
        block_out_channels=(32, 64, 64),
        attention_head_dim=(1, 2, 4),
        transformer_layers_per_block=(1, 2, 3),
        cross_attention_dim=24,
    ),
    "SDXL refiner U-Net": unet(
        unet_condition_config.stable_diffusion_xl_refiner,
        2_259_526_660,
        block_out_channels=(32, 64, 64, 64),
        attention_head_dim=(1, 2, 4, 4),
        transformer_layers_per_block=2,
        cross_attention_dim=24,
    ),
    "DiT-XL/2": Case(
        "DiTTransformer2DModel",
        full("DiTTransformer2DModel", dit.dit_xl_2),
        749_826_464,
        dit_inputs,
        reduced={"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 16},
    ),
    "SD3 medium": sd3(stable_diffusion_3.stable_diffusion_3_medium, 2_028_328_000),
    "SD3.5 medium": sd3(stable_diffusion_3.stable_diffusion_3_5_medium, 2_243_171_520),
    "SD3.5 large": sd3(stable_diffusion_3.stable_diffusion_3_5_large, 8_056_627_520, {"num_layers": 3}),
    "FLUX.1 dev": flux_1(flux.flux_dev, 11_901_408_320),
    "FLUX.1 schnell": flux_1(flux.flux_schnell, 11_891_178_560),
    "SD autoencoder": autoencoder(autoencoder_kl.stable_diffusion, 83_653_863),
    "SDXL autoencoder": autoencoder(autoencoder_kl.stable_diffusion_xl, 83_653_863),
    "SD3 autoencoder": autoencoder(autoencoder_kl.stable_diffusion_3, 83_819_683),
    "FLUX autoencoder": autoencoder(autoencoder_kl.flux, 83_819_683),
}
