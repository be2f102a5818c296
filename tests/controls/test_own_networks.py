"""A ControlNet, a union or a T2I-adapter of hubgen's steers a call as that of diffusers with its weights does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hubgen.controls.controlnet import ControlNet
from hubgen.pipelines.text_to_image import TextToImagePipeline
from tests.models import LIBRARIES
from tests.official_images import picture
from tests.parity import quiet_, randomize_

HINT = {"conditioning_embedding_out_channels": (4, 8, 8)}
ADAPTER = {"channels": [8, 16], "num_res_blocks": 1, "downscale_factor": 4}
CALL: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 32, "width": 40}


def networks(kind: str, unet: Any) -> list[Any]:
    """hubgen's and diffusers', of the same weights."""
    if kind == "adapter":
        made = [
            library.T2IAdapter(**{**ADAPTER, "channels": list(unet.config.block_out_channels)}) for library in sides()
        ]
    elif kind == "union":
        made = [sides()[0].ControlNetUnionModel.from_unet(unet, **HINT)]
        made.append(sides()[1].ControlNetUnionModel(**{k: v for k, v in made[0].config.items() if k[0] != "_"}))
    else:
        made = [library.ControlNetModel.from_unet(unet, **HINT) for library in sides()]
    return [quiet_(randomize_(net, 7)) for net in made]


def sides() -> list[Any]:
    return [LIBRARIES["hubgen"], LIBRARIES["diffusers"]]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("sd1", "net"), ("sd2", "net"), ("sdxl", "net"), ("sdxl", "union"), ("sd1", "adapter")],
)
def test_latents_are_the_same_with_either_librarys_network(
    name: str, kind: str, official: Callable[[str], Path]
) -> None:
    pipe = TextToImagePipeline.from_pretrained(official(name))
    pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"image": picture(3), "scale": 0.7, "end": 0.8}
    if kind == "union":
        options |= {"image": [picture(3), picture(4)], "mode": [3, 1]}

    def latents(*controls: ControlNet) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        return pipe("a red cat", controls=list(controls), generator=generator, output_type="latent", **CALL).images

    ours, theirs = (latents(ControlNet(net, **options)) for net in networks(kind, pipe.unet))
    assert (ours - theirs).abs().max() < 1e-4 * theirs.std()
    assert (ours - latents()).abs().max() > 0.02 * theirs.std(), "the network changes next to nothing"
