"""Image to image and inpainting on the pipelines of tests/official.py: ours and diffusers' side by side."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

from hubgen.pipelines.text_to_image import TextToImagePipeline

STEPS = 5
SIZE = (32, 40)
"""Height and width of `picture` and `mask`, in pixels."""
PROMPTS = ["a red cat", "the big blue dog"]
IMG2IMG = {
    "sd1": diffusers.StableDiffusionImg2ImgPipeline,
    "sd2": diffusers.StableDiffusionImg2ImgPipeline,
    "sdxl": diffusers.StableDiffusionXLImg2ImgPipeline,
    "sdxl-refiner": diffusers.StableDiffusionXLImg2ImgPipeline,
    "sd3": diffusers.StableDiffusion3Img2ImgPipeline,
    "sd3.5": diffusers.StableDiffusion3Img2ImgPipeline,
    "flux-dev": diffusers.FluxImg2ImgPipeline,
    "flux-schnell": diffusers.FluxImg2ImgPipeline,
}
INPAINT = {
    "sd1": diffusers.StableDiffusionInpaintPipeline,
    "sd1-inpaint": diffusers.StableDiffusionInpaintPipeline,
    "sd2": diffusers.StableDiffusionInpaintPipeline,
    "sdxl": diffusers.StableDiffusionXLInpaintPipeline,
    "sdxl-refiner": diffusers.StableDiffusionXLInpaintPipeline,
    "sd3": diffusers.StableDiffusion3InpaintPipeline,
    "sd3.5": diffusers.StableDiffusion3InpaintPipeline,
    "flux-dev": diffusers.FluxInpaintPipeline,
    "flux-schnell": diffusers.FluxInpaintPipeline,
}


def picture(seed: int = 0) -> Image.Image:
    """Coarse random patches, so that resizing and encoding see more than noise."""
    patches = np.random.default_rng(seed).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize(SIZE[::-1], Image.Resampling.BICUBIC)


def mask(seed: int = 0) -> Image.Image:
    """Gray levels around the threshold of 0.5, about half of them above."""
    levels = np.random.default_rng(seed + 100).integers(0, 256, (8, 10), dtype=np.uint8)
    return Image.fromarray(levels).resize(SIZE[::-1], Image.Resampling.BICUBIC)


def is_flow(name: str) -> bool:
    return name.startswith(("sd3", "flux"))


def generators(seeds: int | tuple[int, ...]) -> torch.Generator | list[torch.Generator]:
    """One generator of a number, a list of several."""
    if isinstance(seeds, int):
        return torch.Generator().manual_seed(seeds)
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def unpacked(latents: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """FLUX's latents as diffusers returns them, (B, T, 64), to (B, 16, h, w); others as they are."""
    if latents.ndim == 4:
        return latents
    h, w = size[0] // 8, size[1] // 8
    return latents.reshape(-1, h, w, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(-1, 16, 2 * h, 2 * w)


@dataclass(frozen=True)
class Pair:
    """The same folder, loaded by both libraries."""

    name: str
    ours: TextToImagePipeline
    theirs: diffusers.DiffusionPipeline

    def latents(self, seeds: int | tuple[int, ...] = 3, **call: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, C, h, w) of ours and of theirs, from the same call at the same seeds."""
        call = {"prompt": PROMPTS[0], "num_inference_steps": STEPS, "output_type": "latent", **call}
        ours = self.ours(**call, generator=generators(seeds)).images
        theirs = self.theirs(**call, generator=generators(seeds)).images
        return ours, unpacked(theirs, (call.get("height") or SIZE[0], call.get("width") or SIZE[1]))

    def with_scheduler(self, cls: type, **config: Any) -> "Pair":
        """The same models with another scheduler, diffusers' own class in both."""
        scheduler = cls.from_config(self.theirs.scheduler.config, **config)
        ours = TextToImagePipeline(**{**self.ours.components, "scheduler": scheduler})
        theirs = type(self.theirs)(**{**self.theirs.components, "scheduler": cls.from_config(scheduler.config)})
        return Pair(self.name, quiet(ours), quiet(theirs))


def pairs(official: Callable[[str], Path], classes: dict[str, Any]) -> Callable[[str], Pair]:
    """`pair("sdxl")`: loaded once, with diffusers' pipeline of `classes`."""
    loaded: dict[str, Pair] = {}

    def pair(name: str) -> Pair:
        if name not in loaded:
            folder = official(name)
            ours = TextToImagePipeline.from_pretrained(folder)
            loaded[name] = Pair(name, quiet(ours), quiet(classes[name].from_pretrained(folder)))
        return loaded[name]

    return pair


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To 1e-3 absolute, on latents that are not trivial."""
    assert found.shape == expected.shape, f"{tuple(found.shape)} is not {tuple(expected.shape)}"
    assert torch.isfinite(expected).all() and expected.std() > 0.05
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0.0)


class NoEncoder:
    """Asserts that no network runs inside it: what is refused has to be refused before."""

    def __init__(self, pipe: TextToImagePipeline):
        self.networks = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]

    def __enter__(self) -> None:
        def refuse(module: torch.nn.Module, *inputs: Any) -> None:
            raise AssertionError(f"{type(module).__name__} ran before the arguments were checked")

        self.hooks = [part.register_forward_pre_hook(refuse) for net in self.networks for part in net.modules()]

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()
