"""`hubgen train controlnet`, `ip-adapter`, `instruct-pix2pix`: a plan, a run, what is said about mistakes."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

import hubgen as hubgen_
from hubgen.data.hints import write_hints
from tests import test_cli, test_cli_adapters
from tests.test_cli import refused
from tests.test_cli_adapters import Command, planned
from tests.training.conftest import draw_pictures

hubgen, train_ = test_cli.hubgen, test_cli_adapters.train_


def test_a_network_is_trained_by_made_hints_and_drawn_with(train_: Command, hubgen: Command, tiny_model: Path) -> None:
    draw_pictures(Path("pictures"), 6)
    command = ("controlnet", "pictures", "--base", tiny_model, "--hint", "canny", "--batch-size", 2)
    result = train_(*command, "--steps", 2)
    assert result.status == 0, result.err
    found = planned(result)
    net = hubgen_.SD3ControlNetModel.from_pretrained("runs/pictures-controlnet/controlnet")
    assert found["learns"] == "SD3ControlNetModel" and found["hints"] == "canny, made of each picture"
    assert found["size"] == f"{sum(one.numel() for one in net.parameters()):,} numbers"
    assert found["samples"].startswith("4 pictures of train: before, every ")
    again = train_(*command, "--steps", 3)
    assert again.status == 0, again.err
    further = train_(*command, "--steps", 2, "--controlnet", "runs/pictures-controlnet/controlnet", "--out", "further")
    assert further.status == 0, further.err
    assert "goes on from runs/pictures-controlnet/controlnet" in planned(further)["learns"]
    (Path("pictures") / "0.png").rename("hint.png")
    draw = ("generate", "a red ball", "--model", tiny_model, "--num-inference-steps", 2, "--size", 16)
    drawn = hubgen(*draw, "--control", "runs/pictures-controlnet/controlnet=hint.png", "--out", "x.png")
    assert drawn.status == 0, drawn.err


def test_hints_of_a_column_are_found(train_: Command, tiny_model: Path) -> None:
    draw_pictures(Path("pictures"), 4)
    write_hints(Path("pictures"), "color", Path("hinted"), cells=4)
    result = train_("controlnet", "hinted", "--base", tiny_model, "--steps", 1, "--batch-size", 2, "--layers", 1)
    assert result.status == 0, result.err
    assert planned(result)["hints"] == "column conditioning_image"
    assert "pictures/metadata.jsonl row 1: got" in refused(train_("controlnet", "pictures", "--base", tiny_model))


def test_an_adapter_for_pictures_is_trained(train_: Command, tiny_model: Path) -> None:
    draw_pictures(Path("pictures"), 6)
    result = train_("ip-adapter", "pictures", "--base", tiny_model, "--steps", 2, "--batch-size", 2, "--tokens", 2)
    assert result.status == 0, result.err
    found = planned(result)
    weights = load_file("runs/pictures-ip-adapter/ip_adapter/ip-adapter.safetensors")
    assert found["learns"] == "an IP-Adapter of 64 features of a picture"
    assert found["seen"].split() == ["by", "latents", "(chosen)"]
    assert found["size"] == f"{sum(one.numel() for one in weights.values()):,} numbers"
    recipe = Path("runs/pictures-ip-adapter/recipe.yaml").read_text()
    assert "image_encoder: latents" in recipe


def test_a_model_becomes_an_editor(train_: Command, hubgen: Command, tiny_model: Path) -> None:
    draw_pictures(Path("pictures"), 6)
    assert hubgen("data", "edits", "pictures", "--out", "edits").status == 0
    result = train_("instruct-pix2pix", "edits", "--base", tiny_model, "--steps", 2, "--batch-size", 2)
    assert result.status == 0, result.err
    found = planned(result)
    assert found["learns"] == "all of SD3Transformer2DModel"
    assert found["edits"] == "from column original_image to edited_image"
    index = json.loads(Path("runs/edits-instruct-pix2pix/pipeline/model_index.json").read_text())
    assert index["edit_input"] == "instruction"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("controlnet", "pictures", "--hint", "canny", "--hint-column", "x"),
            "--hint-column: got together with --hint",
        ),
        (("controlnet", "bare", "--hint", "canny"), "bare: its pictures have no captions; expected"),
        (
            ("controlnet", "pictures", "--hint", "grey", "--controlnet", "nowhere"),
            "'base.controlnet': nowhere",
        ),
        (("ip-adapter", "pictures", "--image-encoder", "nowhere"), "'adapter.image_encoder': nowhere"),
        (("ip-adapter", "pictures", "--ip-adapter", "nowhere"), "'base.ip_adapter': nowhere"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(
    train_: Command, tiny_model: Path, arguments: tuple[str, ...], words: str
) -> None:
    draw_pictures(Path("pictures"), 3)
    draw_pictures(Path("bare"), 2)
    (Path("bare") / "metadata.jsonl").unlink()
    assert words in refused(train_(*arguments, "--base", tiny_model))
    assert json.dumps(sorted(path.name for path in Path("runs").rglob("step-*"))) == "[]"
