"""IP-Adapters in the one pipeline: the latents of diffusers' pipelines, and what must stay bit-equal."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from hubgen.controls.ip_adapter import IPAdapter
from hubgen.pipelines.text_to_image import TextToImagePipeline
from tests.ip_adapter_weights import FACE, clip, siglip, tensors
from tests.official_images import picture

Official = Callable[[str], Path]
CALL: dict[str, Any] = {"prompt": "a red cat", "guidance_scale": 4.0, "num_inference_steps": 3, "output_type": "latent"}
SIZE: dict[str, Any] = {"height": 32, "width": 40}
CELLS = [
    *[("sd1", layout) for layout in ("base", "full", "plus", "faceid")],
    *[("sdxl", layout) for layout in ("base", "plus")],
    *[("sd3", "sd3"), ("sd3.5", "sd3"), ("flux-dev", "xlabs"), ("flux-schnell", "xlabs")],
]
"""What diffusers has a pipeline for"""


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


class Sides:
    """Ours and diffusers' pipelines of the same parts; theirs with an adapter in it, so each test has its own."""

    def __init__(self, folder: Path, path: Path):
        self.ours = TextToImagePipeline.from_pretrained(folder)
        self.folder, self.path = folder, path
        self.ours.set_progress_bar_config(disable=True)

    @property
    def flux(self) -> bool:
        return "flux" in self.folder.name or "Flux" in type(self.ours.backbone).__name__

    def theirs(self, *layouts: str, encoder: Any = (None, None), paths: list[Path] | None = None) -> Any:
        pipe = diffusers.DiffusionPipeline.from_pretrained(self.folder)
        pipe.set_progress_bar_config(disable=True)
        pipe.register_modules(image_encoder=encoder[0], feature_extractor=encoder[1])
        files = [self.path / f"{layout}.safetensors" for layout in layouts] if paths is None else paths
        names = [file.name for file in files]
        parent = str(files[0].parent)
        if self.flux:
            pipe.load_ip_adapter(parent, names, image_encoder_pretrained_model_name_or_path=None)
        elif "SD3" in type(self.ours.backbone).__name__:
            pipe.load_ip_adapter(parent, names[0], "", image_encoder_folder=None)
        else:
            pipe.load_ip_adapter(parent, "", names, image_encoder_folder=None)
        return pipe

    def written(self, layout: str, seed: int = 0, name: str | None = None) -> Path:
        path = self.path / f"{layout if name is None else name}.safetensors"
        save_file(tensors(layout, self.ours.backbone, seed), path)
        return path

    def drawn(self, controls: list[IPAdapter], **call: Any) -> torch.Tensor:
        return self.ours(**{**CALL, **SIZE, **call}, controls=controls, generator=seeded()).images

    def same(self, found: torch.Tensor, pipe: Any, **call: Any) -> None:
        expected = pipe(**{**CALL, **SIZE, **call}, generator=seeded()).images
        if expected.ndim == 3:
            expected = diffusers.FluxPipeline._unpack_latents(expected, *found.shape[-2:], 1)
        assert (found - expected).abs().max() < 1e-4 * expected.std()


@pytest.fixture
def sides(official: Official, tmp_path: Path) -> Callable[[str], Sides]:
    return lambda name: Sides(official(name), tmp_path)


def encoder_of(layout: str) -> tuple[Any, Any]:
    return siglip() if layout in ("sd3", "instantx") else clip()


def guided(name: str) -> dict[str, Any]:
    """Further arguments of a call with two branches."""
    return {"negative_prompt": "a big dog", "true_cfg_scale": 3.0} if name.startswith("flux") else {}


@pytest.mark.parametrize(("name", "layout"), CELLS)
def test_latents_are_those_of_diffusers(name: str, layout: str, sides: Callable[[str], Sides]) -> None:
    both, encoder = sides(name), encoder_of(layout)
    path, call = both.written(layout), guided(name)
    pipe = both.theirs(layout, encoder=encoder)
    pipe.set_ip_adapter_scale(0.7)
    shown: dict[str, Any] = {"image": picture(3), "image_encoder": encoder[0], "feature_extractor": encoder[1]}
    theirs: dict[str, Any] = {"ip_adapter_image": picture(3)}
    if layout == "faceid":
        face = torch.randn(1, FACE, generator=seeded())
        shown = {"image_embeds": face}
        theirs = {"ip_adapter_image_embeds": [torch.stack([torch.zeros_like(face), face])]}
    adapter = IPAdapter(path, scale=0.7, **shown)
    if layout == "faceid":
        both.ours.load_lora_weights(adapter.lora(both.ours.backbone))
    found = both.drawn([adapter], **call)
    if layout == "faceid":
        both.ours.unload_lora_weights()
    plain = both.drawn([], **call)
    assert (found - plain).abs().max() > 0.05 * plain.std(), "the picture changes next to nothing"
    both.same(found, pipe, **call, **theirs)
    if layout != "faceid":
        written = both.path / "ours.safetensors"
        adapter.save(written)
        both.same(found, scaled(both.theirs(paths=[written], encoder=encoder)), **call, **theirs)


def scaled(pipe: Any, scale: Any = 0.7) -> Any:
    pipe.set_ip_adapter_scale(scale)
    return pipe
