"""`hubgen generate --control`: networks and adapters by name, repeated with the picture; mistakes in one line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest

from hubgen.cli.arguments import control
from hubgen.hub.provenance import read_request
from tests import test_cli
from tests.controls.test_controlnet import net_of
from tests.official_images import picture
from tests.parity import quiet_
from tests.test_cli import Result, pixels, refused

Command = Callable[..., Result]
Official = Callable[[str], Path]
hubgen = test_cli.hubgen
FEW = ("--num-inference-steps", 2, "--seed", 1, "--size", "40x32")


def test_a_control_is_a_network_a_picture_and_when() -> None:
    plain: dict[str, Any] = {"net": "owner/canny", "image": "a.png", "scale": 1.0, "start": 0.0, "end": 1.0}
    for text, changes in {
        "owner/canny=a.png": {},
        "owner/canny=a.png:0.8": {"scale": 0.8},
        "owner/canny=a.png:0.8:0.2-0.6": {"scale": 0.8, "start": 0.2, "end": 0.6},
        r"C:\nets\canny=C:\a.png:-1": {"net": r"C:\nets\canny", "image": r"C:\a.png", "scale": -1.0},
    }.items():
        assert control(text) == {**plain, **changes}
    for text in ("a.png", "=a.png", "net=", "net=a.png:0.8:0.6-0.6", "net=a.png:1:0-1.5", "net=a.png:1.2.3"):
        with pytest.raises(Exception, match="expected"):
            control(text)


def test_a_network_steers_and_the_picture_repeats_it(hubgen: Command, official: Official) -> None:
    folder = official("sd1")
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    quiet_(net_of(unet)).save_pretrained("net")
    picture(3).save("hint.png")
    draw = ("generate", "a red cat", "--model", folder, *FEW)
    assert hubgen(*draw, "--out", "plain.png").status == 0
    result = hubgen(*draw, "--control", "net=hint.png:0.7:0-0.8", "--out", "steered.png")
    assert result.status == 0, result.err
    assert (pixels("plain.png") != pixels("steered.png")).any()
    request, _ = read_request(Path("steered.png"))
    assert request.control is not None and vars(request.control[0])["scale"] == 0.7
    again = hubgen("generate", "--from", "steered.png", "--out", "again.png")
    assert again.status == 0, again.err
    assert (pixels("again.png") == pixels("steered.png")).all()
    nothing = hubgen(*draw, "--control", "net=hint.png:0", "--out", "nothing.png")
    assert nothing.status == 0, nothing.err
    assert (pixels("plain.png") == pixels("nothing.png")).all()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("net=missing.png", "--control net=missing.png: No such file or directory, expected a picture"),
        ("nowhere=hint.png", "--control nowhere: no such folder or file, expected one, or owner/name on the Hub"),
        ("model=hint.png", "--control model: the model has no ControlNet of its own"),
        ("empty=hint.png", "--control empty: holds no config.json, expected the folder of a network"),
        ("unet=hint.png", "--control unet: got a UNet2DConditionModel, expected one of ControlNetModel"),
    ],
)
def test_what_is_no_control_is_told(value: str, message: str, hubgen: Command, official: Official) -> None:
    folder = official("sd1")
    Path("empty").mkdir()
    Path("unet").symlink_to(folder / "unet")
    picture(3).save("hint.png")
    result = hubgen("generate", "a red cat", "--model", folder, *FEW, "--control", value, "--out", "x.png")
    assert message in refused(result)
    assert "loaded in" not in result.err  # it is told before the model's weights are read
