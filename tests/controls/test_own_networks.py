"""Networks of hubgen's steer a call as those of diffusers with their weights do, in the pipelines of either library."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from hubgen.controls.controlnet import ControlNet
from hubgen.pipelines.text_to_image import TextToImagePipeline
from tests.controls.test_controlnet import Sides, family, hint_name, net_of, seeded, stabilitys
from tests.models import LIBRARIES
from tests.official_images import mask, picture
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


# ---- in diffusers' pipelines ----


def ours_of(net: Any) -> Any:
    """hubgen's network with the weights of one of diffusers'."""
    cls = getattr(LIBRARIES["hubgen"], type(net).__name__)
    ours = cls(**{key: value for key, value in net.config.items() if key[0] != "_"})
    ours.load_state_dict(net.state_dict())
    return ours.eval()


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "sd3.5", "flux-dev"])
def test_diffusers_pipelines_take_hubgens_networks_one_or_several(name: str, official: Callable[[str], Path]) -> None:
    both = Sides(official(name), family(name))
    net = stabilitys(both) if name == "sd3.5" else quiet_(net_of(both.backbone))
    ours = ours_of(net)
    call = {**CALL, "prompt": "a red cat", "output_type": "latent"}
    plain = both.theirs(**call, generator=seeded()).images
    for few in (1, 2):
        hints = [picture(3), picture(4)][:few]
        given = {hint_name(both.family): hints if few > 1 else hints[0]}
        if few > 1:
            given["controlnet_conditioning_scale"] = [0.5, 0.8]
        found, expected = (
            both.diffusers([one] * few if few > 1 else one)(**call, **given, generator=seeded()).images
            for one in (ours, net)
        )
        assert (found - expected).abs().max() < 1e-4 * expected.std()
        assert (found - plain).abs().max() > 0.02 * plain.std(), "the network changes next to nothing"


def test_diffusers_other_pipelines_take_them_too(official: Callable[[str], Path]) -> None:
    both = Sides(official("sdxl"), "sdxl")
    call: dict[str, Any] = {**CALL, "prompt": "a red cat", "output_type": "latent", "control_image": picture(3)}
    call |= {"image": picture(1), "mask_image": mask(2), "strength": 0.9}
    net = quiet_(net_of(both.backbone))
    found, expected = (both.diffusers(one, 2)(**call, generator=seeded()).images for one in (ours_of(net), net))
    assert (found - expected).abs().max() < 1e-4 * expected.std()

    unions = [quiet_(randomize_(net, 7)) for net in networks("union", both.ours.unet)]
    auto = diffusers.AutoPipelineForText2Image
    pipes = [auto.from_pretrained(official("sdxl"), controlnet=union) for union in unions]
    assert {type(pipe) for pipe in pipes} == {diffusers.StableDiffusionXLControlNetUnionPipeline}
    call = {**CALL, "prompt": "a red cat", "output_type": "latent", "control_image": [picture(3)], "control_mode": [1]}
    found, expected = (pipe(**call, generator=seeded()).images for pipe in pipes)
    assert (found - expected).abs().max() < 1e-4 * expected.std()


def test_classes_of_diffusers_stay_what_they_are() -> None:
    named = vars(sys.modules["diffusers.pipelines.controlnet.pipeline_controlnet"])["ControlNetModel"]
    ours, theirs = LIBRARIES["hubgen"].ControlNetModel, diffusers.ControlNetModel
    assert issubclass(ours, named) and issubclass(theirs, named) and not issubclass(ours, theirs)
    assert not issubclass(LIBRARIES["hubgen"].FluxControlNetModel, named)
    small = {"block_out_channels": (8, 8), "down_block_types": ("DownBlock2D",) * 2, "norm_num_groups": 4}
    assert type(named(**small, **HINT, cross_attention_dim=8)) is theirs
