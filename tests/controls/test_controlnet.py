"""ControlNets in the one pipeline: the latents of diffusers' pipelines for them, and what must stay bit-equal."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from hubgen.controls.controlnet import ControlNet
from hubgen.pipelines.text_to_image import TextToImagePipeline
from tests.official_images import mask, picture
from tests.parity import randomize_

Official = Callable[[str], Path]

NAMES = ["sd1", "sd2", "sdxl", "sd3", "sd3.5", "flux-dev"]
HINT = {"conditioning_embedding_out_channels": (4, 8, 8)}
"""A hint is made four times smaller, as the tiny autoencoders make pictures."""
CALL: dict[str, Any] = {"prompt": "a red cat", "guidance_scale": 4.0, "num_inference_steps": 3, "output_type": "latent"}
SIZE: dict[str, Any] = {"height": 32, "width": 40}
PIPELINES: dict[str, tuple[str, str | None, str]] = {
    "sd": (
        "StableDiffusionControlNetPipeline",
        "StableDiffusionControlNetImg2ImgPipeline",
        "StableDiffusionControlNetInpaintPipeline",
    ),
    "sdxl": (
        "StableDiffusionXLControlNetPipeline",
        "StableDiffusionXLControlNetImg2ImgPipeline",
        "StableDiffusionXLControlNetInpaintPipeline",
    ),
    "sd3": ("StableDiffusion3ControlNetPipeline", None, "StableDiffusion3ControlNetInpaintingPipeline"),
    "flux": ("FluxControlNetPipeline", "FluxControlNetImg2ImgPipeline", "FluxControlNetInpaintPipeline"),
}


def family(name: str) -> str:
    """Which pipelines of diffusers a layout has."""
    return name if name == "sdxl" else name[:2] if name[:3] in ("sd1", "sd2") else name[:3] if "sd3" in name else "flux"


def net_of(backbone: Any, seed: int = 7, **changes: Any) -> Any:
    """A ControlNet of diffusers for its backbone, all weights random."""
    if isinstance(backbone, diffusers.UNet2DConditionModel):
        net = diffusers.ControlNetModel.from_unet(backbone, load_weights_from_unet=False, **HINT)
        if changes:
            net = diffusers.ControlNetModel.from_config({**net.config, **changes})
    elif isinstance(backbone, diffusers.SD3Transformer2DModel):
        config = {**backbone.config, "num_layers": 2, "dual_attention_layers": (), **changes}
        net = diffusers.SD3ControlNetModel.from_config(config)
    else:
        config = {**backbone.config, "num_layers": 2, "num_single_layers": 1, **changes}
        net = diffusers.FluxControlNetModel.from_config(config)
    return randomize_(net, seed).eval()


def small(net: Any, scale: float = 0.2) -> Any:
    """Residuals that do not drown the backbone."""
    for name, parameter in net.named_parameters():
        if name.startswith("controlnet_") and "embed" not in name:
            parameter.data *= scale
    return net


class Sides:
    """Ours and diffusers' pipelines of the same parts."""

    def __init__(self, folder: Path, kind: str):
        self.ours = TextToImagePipeline.from_pretrained(folder)
        self.theirs = diffusers.DiffusionPipeline.from_pretrained(folder)
        self.family = kind
        self.ours.set_progress_bar_config(disable=True)
        vae = self.theirs.vae
        if kind == "sd3":  # whose pipeline draws from the posterior without a generator
            self.ours.vae = certain(self.ours.vae)
            self.theirs.register_modules(vae=certain(vae))

    @property
    def backbone(self) -> Any:
        return self.theirs.unet if hasattr(self.theirs, "unet") else self.theirs.transformer

    def diffusers(self, nets: Any, task: int = 0) -> Any:
        """The pipeline of a task with these networks."""
        name = PIPELINES[self.family][task]
        assert name is not None
        parts = {key: part for key, part in self.theirs.components.items() if key != "image_encoder"}
        pipe = getattr(diffusers, name)(**parts, controlnet=nets)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def assert_same(self, controls: list[ControlNet], nets: Any, task: int = 0, ours: Any = None, **theirs: Any) -> None:
        call = {**CALL, **({} if task and self.family in ("sd", "sdxl") else SIZE)}
        found = self.ours(**{**call, **(ours or {})}, controls=controls, generator=seeded()).images
        expected = self.diffusers(nets, task)(**{**call, **theirs}, generator=seeded()).images
        if expected.ndim == 3:
            expected = diffusers.FluxPipeline._unpack_latents(expected, *found.shape[-2:], 1)
        plain = self.ours(**{**call, **(ours or {})}, generator=seeded()).images
        assert (found - plain).abs().max() > 0.05 * plain.std(), "the network changes next to nothing"
        assert (found - expected).abs().max() < 1e-4 * expected.std()


def certain(vae: Any) -> Any:
    """An autoencoder whose posterior has next to no variance."""
    conv = vae.encoder.conv_out
    half = conv.weight.shape[0] // 2
    conv.weight.data[half:] = 0
    conv.bias.data[half:] = -30
    return vae


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


@pytest.fixture(scope="module")
def sides(official: Official) -> Callable[[str], Sides]:
    made: dict[str, Sides] = {}

    def get(name: str) -> Sides:
        if name not in made:
            made[name] = Sides(official(name), family(name))
        return made[name]

    return get


def hint_name(kind: str) -> str:
    """How diffusers' text-to-image pipeline calls the hint."""
    return "image" if kind in ("sd", "sdxl") else "control_image"


@pytest.mark.parametrize("name", NAMES)
def test_latents_are_those_of_diffusers(name: str, sides: Callable[[str], Sides]) -> None:
    both = sides(name)
    net = small(net_of(both.backbone))
    hint = picture(3)
    both.assert_same(
        [ControlNet(net, hint, scale=0.7, start=0.3, end=0.8)],
        net,
        **{hint_name(both.family): hint, "controlnet_conditioning_scale": 0.7},
        control_guidance_start=0.3,
        control_guidance_end=0.8,
    )
