"""Networks that a page offers to steer by: named by whoever starts it, checked before it is served."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
from PIL import Image
from safetensors.torch import save_file

from hubgen.spaces.kit.controls import Steering, find_controls, hint_kinds, made_hint
from hubgen.spaces.kit.limits import Refused
from hubgen.spaces.kit.service import Drawing, Service
from hubgen.spaces.kit.settings import Settings
from tests.controls.test_controlnet import net_of
from tests.ip_adapter_weights import clip, tensors
from tests.models import NETWORKS
from tests.official_images import picture
from tests.parity import quiet_

Official = Callable[[str], Path]


@pytest.fixture(scope="module")
def model(official: Official, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a ControlNet of its own, and an image encoder."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(official("sd1"))
    encoder, extractor = clip()
    parts = {**pipe.components, "image_encoder": encoder, "feature_extractor": extractor}
    cls = diffusers.StableDiffusionControlNetPipeline
    folder = tmp_path_factory.mktemp("model")
    cls(**parts, controlnet=quiet_(net_of(pipe.unet, 7))).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def nets(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a network and an IP-Adapter."""
    folder = tmp_path_factory.mktemp("nets")
    unet = diffusers.UNet2DConditionModel.from_pretrained(model / "unet")
    quiet_(net_of(unet, 8)).save_pretrained(folder / "edges")
    save_file(tensors("base", unet), folder / "looks.safetensors")
    (folder / "notes.txt").write_text("no network")
    return folder


def test_a_page_steers_by_all_that_it_was_given_and_by_two_at_once(model: Path, nets: Path) -> None:
    service = Service(Settings(model=str(model), controls=(str(nets),)))
    offered = service.model.offered
    assert [one.name for one in offered] == ["the model's own", "edges", "looks"]
    assert [one.sees_pictures for one in offered] == [False, False, True]
    service.model.load()
    size = {"width": 32, "height": 32}

    def drawn(*chosen: int, **more: Any) -> bytes:
        steering = tuple(Steering(offered[i], picture(i).resize((32, 32)), **more) for i in chosen)
        drawing = Drawing(prompt="a red cat", steps=2, guidance=3.0, seed=1, steering=steering, **size)
        return service.model.draw(drawing, lambda step: True).pictures[0].tobytes()

    pictures = [drawn(), drawn(0), drawn(1), drawn(2), drawn(1, 2), drawn(0, 1, 2), drawn(1, scale=0.5)]
    assert len(set(pictures)) == len(pictures)
    assert drawn() == pictures[0] and drawn(1, 2) == pictures[4]
    service.close()


def test_a_model_whose_own_network_asks_for_more_than_a_picture_offers_none() -> None:
    index = {"controlnet": ["diffusers", "FluxControlNetModel"]}
    masked, union = NETWORKS["ControlNet, SD 3"], NETWORKS["ControlNet, FLUX.1"]
    for own in (None, masked.fresh(extra_conditioning_channels=1), union.fresh()):
        assert find_controls([], index, own) == []
    assert [one.file for one in find_controls([], index, union.fresh(num_mode=None))] == ["model"]


def test_what_cannot_steer_is_refused_by_its_name_before_the_page_is_served(
    model: Path, nets: Path, official: Official, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "unet").symlink_to(model / "unet")
    for name, message in (
        ("nowhere", "HUBGEN_CONTROLS nowhere: no such folder or file"),
        (str(tmp_path / "empty"), "HUBGEN_CONTROLS .*empty: holds no config.json"),
        (str(tmp_path / "unet"), "HUBGEN_CONTROLS .*unet: got a UNet2DConditionModel, expected one of ControlNetModel"),
    ):
        with pytest.raises(ValueError, match=message):
            Service(Settings(model=str(model), controls=(name,)))
    for folder, name, message in (
        ("sdxl", "edges", "got a ControlNetModel with .*, expected .* as the model's backbone has them"),
        ("sd1", "looks.safetensors", "`image_encoder`: got None, and the pipeline has none"),
    ):
        service = Service(Settings(model=str(official(folder)), controls=(str(nets / name),)))
        with pytest.raises(ValueError, match=f"HUBGEN_CONTROLS .*{name}: .*{message}"):
            service.model.load()
        service.close()


def test_hints_have_the_size_of_their_picture_and_no_others_are_made() -> None:
    shown = picture(1)
    for kind in hint_kinds():
        assert made_hint(shown, kind).size == shown.size and made_hint(shown, kind).mode == "RGB"
    assert made_hint(shown, "none") is shown
    for kind in ("depth", None, 5, ["grey"]):
        with pytest.raises(Refused, match="There is no hint of that kind here; there are: "):
            made_hint(Image.new("RGB", (8, 8)), kind)
