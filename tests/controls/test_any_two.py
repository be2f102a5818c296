"""Any two controls on any backbone in any task: they run together; one at scale 0 leaves the other as it was alone."""

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from hubgen.adaptation.adapters import AdapterShape, add_adapter, targets
from hubgen.backbones.controlnet import ControlNetModel
from hubgen.backbones.controlnet_dit import DiTControlNetModel
from hubgen.backbones.controlnet_flux import FluxControlNetModel
from hubgen.backbones.controlnet_sd3 import SD3ControlNetModel
from hubgen.backbones.t2i_adapter import T2IAdapter
from hubgen.controls.control import Control
from hubgen.controls.controlnet import ControlNet
from hubgen.controls.ip_adapter import IPAdapter
from hubgen.pipelines.class_to_image import ClassToImagePipeline
from hubgen.pipelines.text_to_image import TextToImagePipeline
from tests.official_images import mask, picture
from tests.parity import quiet_, randomize_

Official = Callable[[str], Path]
Maker = Callable[[float], Control]

NAMES = ["sd1", "sdxl", "dit", "sd3", "flux-dev"]
CELLS = [*((name, task) for name in NAMES for task in ("text", "image", "mask")), ("sd1-inpaint", "mask")]
"""Of the last one, the backbone is shown mask and masked picture beside x_t; its networks are not"""
TASKS: dict[str, dict[str, Any]] = {
    "text": {},
    "image": {"image": picture(1), "strength": 1.0},
    "mask": {"image": picture(1), "mask_image": mask(2), "strength": 1.0},
}
U_NETS = ("sd1", "sd1-inpaint", "sdxl")
WORDS = {"text": "", "image": " with an image", "mask": " with a mask"}
FEATURES = 8
"""Of a picture's embedding"""


@pytest.fixture(scope="module")
def pipes(official: Official) -> Callable[[str], Any]:
    made: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in made:
            cls = ClassToImagePipeline if name == "dit" else TextToImagePipeline
            made[name] = cls.from_pretrained(official(name))
            made[name].set_progress_bar_config(disable=True)
        return made[name]

    return get


def network(name: str, pipe: Any, seed: int) -> torch.nn.Module:
    """A ControlNet of the backbone's family, all weights random."""
    backbone = pipe.backbone
    if name in U_NETS:
        net = ControlNetModel.from_unet(backbone, conditioning_embedding_out_channels=(4, 8, 8))
        config = {key: value for key, value in net.config.items() if key[0] != "_"}
        net = ControlNetModel(**{**config, "in_channels": 4})
    elif name == "dit":
        net = DiTControlNetModel.from_transformer(backbone, num_layers=2)
    elif name == "sd3":
        net = SD3ControlNetModel.from_transformer(backbone, num_layers=2, num_extra_conditioning_channels=0)
    else:
        net = FluxControlNetModel.from_transformer(backbone, num_layers=1, num_single_layers=1)
    return quiet_(randomize_(net, seed))


def makers(name: str, pipe: Any) -> Mapping[str, Maker]:
    """By what a control is, how to make one of a scale."""
    nets = [network(name, pipe, seed) for seed in (7, 8)]
    adapter = IPAdapter.fresh(pipe.backbone, image_features=FEATURES).adapter
    randomize_(adapter.network, 9)
    embeds = torch.randn(1, FEATURES, generator=torch.Generator().manual_seed(3))
    found: dict[str, Maker] = {
        "ControlNet": lambda scale: ControlNet(nets[0], picture(3), scale),
        "another ControlNet": lambda scale: ControlNet(nets[1], picture(4), scale),
        "IP-Adapter": lambda scale: IPAdapter(adapter, image_embeds=embeds, scale=scale),
    }
    if name in U_NETS:
        widths = list(pipe.backbone.config.block_out_channels)
        kind = {"adapter_type": "full_adapter_xl", "downscale_factor": 8} if name == "sdxl" else {"downscale_factor": 4}
        t2i = randomize_(T2IAdapter(3, widths, num_res_blocks=1, **kind), 10).eval()
        found["T2I-adapter"] = lambda scale: ControlNet(t2i, picture(5), scale)
    return found


def drawn(name: str, pipe: Any, task: str, controls: list[Control]) -> torch.Tensor:
    """Latents; the start is given, so that hints that draw random numbers leave it as it is."""
    shape = pipe.latent_space.shape(1, (32, 32))
    call: dict[str, Any] = {
        **({"class_labels": 1} if name == "dit" else {"prompt": "a red cat"}),
        "num_inference_steps": 2,
        "height": 32,
        "width": 32,
        "guidance_scale": 3.0,
        "output_type": "latent",
        "latents": torch.randn(shape, generator=torch.Generator().manual_seed(1)),
        "generator": torch.Generator().manual_seed(2),
        **TASKS[task],
    }
    return pipe(**call, controls=controls).images


@pytest.mark.parametrize(("name", "task"), CELLS)
def test_any_two_go_together_and_one_at_scale_0_is_not_there(
    name: str, task: str, pipes: Callable[[str], Any], shows: Callable[..., None]
) -> None:
    pipe = pipes(name)
    available = makers(name, pipe)
    plain = drawn(name, pipe, task, [])
    alone = {kind: drawn(name, pipe, task, [make(1.0)]) for kind, make in available.items()}
    for kind, latents in alone.items():
        assert (latents - plain).abs().max() > 0.01 * plain.std(), f"{kind} changes next to nothing"
        if kind != "another ControlNet":
            shows(name, kind + WORDS[task])
    for (one, make_one), (other, make_other) in itertools.combinations(available.items(), 2):
        both = drawn(name, pipe, task, [make_one(1.0), make_other(1.0)])
        assert torch.isfinite(both).all() and not torch.equal(both, alone[one]) and not torch.equal(both, alone[other])
        assert torch.equal(drawn(name, pipe, task, [make_one(1.0), make_other(0.0)]), alone[one]), (one, other)
        assert torch.equal(drawn(name, pipe, task, [make_one(0.0), make_other(1.0)]), alone[other]), (one, other)


@pytest.mark.parametrize("name", NAMES)
def test_controls_go_with_an_adapter_of_the_weights(name: str, pipes: Callable[[str], Any]) -> None:
    pipe = pipes(name)
    backbone = pipe.backbone
    control = makers(name, pipe)["ControlNet"]
    without = drawn(name, pipe, "text", [control(1.0)])
    add_adapter(backbone, "style", AdapterShape(rank=2), targets(backbone, "attention"))
    try:
        assert torch.equal(drawn(name, pipe, "text", [control(1.0)]), without)  # a fresh adapter is nothing
        for key, parameter in backbone.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.1)
        adapted = drawn(name, pipe, "text", [])
        both = drawn(name, pipe, "text", [control(1.0)])
        assert not torch.equal(both, without) and not torch.equal(both, adapted)
        assert torch.equal(drawn(name, pipe, "text", [control(0.0)]), adapted)
    finally:
        backbone.delete_adapters("style")
