"""A ControlNet learns on every family, and nothing else does; it is the same one in diffusers, and after a stop."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

import hubgen
from hubgen.data.errors import DataError
from hubgen.training import train_controlnet
from hubgen.training.kit.finite import NonFiniteError
from hubgen.training.kit.parse import SettingsError, parse_settings
from tests import models
from tests.parity import first_output
from tests.training.conftest import draw_pictures

Official = Callable[[str], Path]
Run = Callable[..., Path]
INPUTS = {
    "ControlNetModel": models.controlnet_inputs,
    "SD3ControlNetModel": models.sd3_net_inputs,
    "FluxControlNetModel": models.flux_net_inputs,
}
FAMILIES = ["sd1", "sd2", "sdxl", "sd3", "sd3.5", "flux-dev", "flux-schnell"]


@pytest.fixture
def hinted(tmp_path: Path) -> Path:
    """Pictures with their negatives as hints, train and held out."""
    for split, count in (("train", 6), ("held_out", 3)):
        folder = tmp_path / "data" / split
        draw_pictures(folder, count)
        (folder / "hints").mkdir()
        rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        for number, row in enumerate(rows):
            hint = Image.open(folder / row["file_name"]).point(lambda value: 255 - value)
            row |= {"conditioning_image_file_name": f"hints/{number}.png", "class": 7 + number}
            hint.save(folder / "hints" / f"{number}.png")
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "data"


@pytest.fixture
def run(hinted: Path, tmp_path: Path) -> Iterator[Run]:
    """A few steps in this process; returns the output folder."""

    def train(changes: dict[str, Any]) -> Path:
        AcceleratorState._reset_state(reset_partial_state=True)
        settings = {
            "data.source": str(hinted),
            "data.size": 16,
            "run.output_dir": str(tmp_path / "run"),
            "run.batch_size": 2,
            "run.max_train_steps": 2,
            "run.log_steps": 1,
            "run.report_to": "none",
            "optim.learning_rate": 0.01,
            "optim.lr_warmup_steps": 0,
            "validation.split": "held_out",
            "validation.samples": 2,
            "validation.inference_steps": 2,
            "publish.dtype": "float32",
            **changes,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(json.loads(json.dumps(settings))))
        train_controlnet.main(parse_settings(train_controlnet.Settings, ["--config", str(path)]))
        return Path(settings["run.output_dir"])

    yield train
    AcceleratorState._reset_state(reset_partial_state=True)


def newest(folder: Path) -> Path:
    return max((folder / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_learns_on_every_family_and_is_the_same_in_diffusers(
    run: Run, official: Official, family: str
) -> None:
    folder = run({"base.model": str(official(family)), "data.mirror": True, "data.random_crops": 2})
    published = folder / "controlnet"
    name = json.loads((published / "config.json").read_text())["_class_name"]
    ours, theirs = (getattr(library, name).from_pretrained(published).eval() for library in (hubgen, diffusers))
    learnt = load_file(newest(folder) / "controlnet.safetensors")
    assert learnt.keys() == ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, ours.state_dict()[key]) for key, value in learnt.items())
    zeros = [key for key in learnt if key.startswith(("controlnet_down_blocks", "controlnet_blocks"))]
    assert zeros and any(learnt[key].abs().max() > 0 for key in zeros)
    inputs = INPUTS[name]({key: value for key, value in ours.config.items() if value is not None})
    with torch.no_grad():
        found, expected = first_output(ours(**inputs)), first_output(theirs(**inputs))
    assert (found - expected).abs().max() < 1e-5 * max(1.0, expected.abs().max().item()) and expected.abs().max() > 0
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["held_out_loss"] > 0
    with Image.open(folder / "validation" / "step-00000002.png") as grid:
        assert grid.size == (4 * 16, 2 * 16)  # hint, two scales, without; two rows
    assert {file.name for file in published.iterdir()} >= {"README.md", "training.json", "samples.png"}
