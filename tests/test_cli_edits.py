"""`hubgen generate` with models that are shown a picture: edits, hints, and mistakes in one line."""

from collections.abc import Callable
from pathlib import Path

import pytest

from hubgen.hub.provenance import read_request
from tests import test_cli
from tests.official_images import mask, picture
from tests.test_cli import Result, pixels, refused

Command = Callable[..., Result]
Official = Callable[[str], Path]
hubgen = test_cli.hubgen
FEW = ("--num-inference-steps", 2, "--seed", 1)


def test_a_picture_is_edited_and_the_file_repeats_it(hubgen: Command, official: Official) -> None:
    picture().save("photo.png")
    edit = ("generate", "make it red", "--model", official("sd1-instruct"), "--image", "photo.png", *FEW)
    result = hubgen(*edit, "--out", "plain.png")
    assert result.status == 0, result.err
    request, _ = read_request(Path("plain.png"))
    assert request.image_guidance_scale == 1.5 and request.strength is None
    assert (request.height, request.width) == (32, 40)
    result = hubgen(*edit, "--image-guidance-scale", 3, "--out", "near.png")
    assert result.status == 0, result.err
    assert (pixels("plain.png") != pixels("near.png")).any()
    again = hubgen("generate", "--from", "near.png", "--out", "again.png")
    assert again.status == 0, again.err
    assert (pixels("again.png") == pixels("near.png")).all()


def test_a_hint_is_shown_beside_a_picture_to_begin_from(hubgen: Command, official: Official) -> None:
    picture().save("hint.png")
    picture(2).save("photo.png")
    draw = ("generate", "a red cat", "--model", official("flux-control"), "--size", "40x32", *FEW)
    result = hubgen(*draw, "--control-image", "hint.png", "--out", "plain.png")
    assert result.status == 0, result.err
    more = ("--image", "photo.png", "--strength", 0.5)
    result = hubgen(*draw, "--control-image", "hint.png", *more, "--out", "begun.png")
    assert result.status == 0, result.err
    assert (pixels("plain.png") != pixels("begun.png")).any()
    again = hubgen("generate", "--from", "begun.png", "--out", "again.png")
    assert again.status == 0, again.err
    assert (pixels("again.png") == pixels("begun.png")).all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sd1-instruct", (), "`image`: got None, expected a picture: this model is shown one at every step"),
        ("sd1", ("--image-guidance-scale", 2), "`image_guidance_scale`: got 2.0, expected none"),
        ("sd1", ("--control-image", "photo.png"), "`control_image`: got one, expected none"),
        ("flux-control", ("--control-image", "none.png"), "--control-image none.png: No such file"),
        (
            "flux-control",
            ("--image", "photo.png", "--mask", "mask.png"),
            "`control_image`: got None, expected a picture",
        ),
        ("flux-redux", (), "is a FluxPriorReduxPipeline: it has no backbone and steers another model, FLUX.1"),
    ],
)
def test_mistakes_are_told(
    name: str,
    options: tuple[object, ...],
    message: str,
    hubgen: Command,
    official: Official,
    capsys: pytest.CaptureFixture[str],
) -> None:
    picture().save("photo.png")
    mask().save("mask.png")
    folder = official(name)
    capsys.readouterr()  # the bars of what writes the folder
    result = hubgen("generate", "a red cat", "--model", folder, *options, *FEW, "--out", "x.png")
    assert message in refused(result)
