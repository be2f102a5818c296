"""Any number of processes is the same run, over gloo as on any machine without a GPU."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hubgen.data.edits import write_edits
from tests import models
from tests.training.processes import Running, stop_at_the_first_checkpoint

pytestmark = pytest.mark.slow

TEXT_TO_IMAGE, AUTOENCODER = "train_text_to_image", "train_autoencoder"
DREAMBOOTH = "train_dreambooth"


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*"))


def weights(run: Path) -> dict[str, torch.Tensor]:
    files = sorted(newest(run).glob("*.safetensors"))
    return {f"{file.name}/{key}": value for file in files for key, value in load_file(file).items()}


def curve(run: Path, name: str = "loss") -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


SHARES = {"1 x 8": (1, 8, 1), "2 x 4": (2, 4, 1), "2 x 2, accumulated": (2, 2, 2)}


@pytest.fixture
def autoencoder(recipe: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run with a codebook and a discriminator."""
    names = [name for name in recipe if name.startswith(("data.", "run."))]
    return {
        **{name: recipe[name] for name in names},
        "model.kind": "vq",
        "model.latent_channels": 2,
        "model.block_out_channels": [8, 8],
        "model.norm_num_groups": 4,
        "model.num_codes": 32,
        "loss.perceptual_network": "none",
        "loss.revive_steps": 4,
        "adversarial.weight": 0.5,
        "adversarial.width": 4,
        "adversarial.layers": 1,
        "optim.lr_warmup_steps": 2,
    }


@pytest.fixture
def dreambooth(recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Settings of a run with pictures of a class, in which the text encoder learns too."""
    names = [name for name in recipe if name.startswith(("data.", "run.", "optim."))]
    return {
        **{name: recipe[name] for name in names},
        "base.model": str(models.saved_pipeline(tmp_path / "base")),
        "adapter.rank": 2,
        "adapter.text_encoder": True,
        "data.cache_texts": False,
        "instance.prompt": "big ball",
        "prior.prompt": "ball",
        "prior.pictures": 9,
        "prior.inference_steps": 2,
        "validation.inference_steps": 2,
    }


@pytest.mark.parametrize("script", [TEXT_TO_IMAGE, AUTOENCODER, DREAMBOOTH])
def test_logged_losses_do_not_depend_on_the_number_of_processes(
    recipe: dict[str, Any], autoencoder: dict[str, Any], dreambooth: dict[str, Any], tmp_path: Path, script: str
) -> None:
    changes = {"run.max_train_steps": 20, "run.checkpoint_steps": 20, "data.random_crops": 2, "data.mirror": True}
    bases = {
        TEXT_TO_IMAGE: recipe,
        AUTOENCODER: {**autoencoder, "adversarial.start": 1000, "loss.revive_steps": 0},
        DREAMBOOTH: dreambooth,
    }
    base = bases[script]
    if script != DREAMBOOTH:
        changes |= {"validation.split": "held_out", "validation.steps": 10}
    found = {}
    for name, (processes, batch, accumulation) in SHARES.items():
        output = tmp_path / name.replace(" ", "")
        share = {"run.batch_size": batch, "run.gradient_accumulation_steps": accumulation}
        Running(script, base | changes | share | {"run.output_dir": str(output)}, tmp_path, processes).finish()
        found[name] = output
    measured = {TEXT_TO_IMAGE: "held_out_loss", AUTOENCODER: "psnr", DREAMBOOTH: "prior_loss"}[script]
    for name in ("loss", measured):
        alone = torch.tensor(curve(found["1 x 8"], name))
        assert len(alone) == (20 if name in ("loss", "prior_loss") else 2)
        for run in found.values():
            torch.testing.assert_close(torch.tensor(curve(run, name)), alone, rtol=1e-5, atol=1e-5)


CONTROLS: dict[str, dict[str, Any]] = {
    "train_controlnet": {"data.hint": "color", "data.hint_options": {"cells": 2}},
    "train_ip_adapter": {"adapter.image_encoder": "latents", "adapter.tokens": 2},
    "train_instruct_pix2pix": {},
}


@pytest.mark.parametrize("script", CONTROLS)
def test_controls_learn_the_same_on_any_number_of_processes(
    recipe: dict[str, Any], tmp_path: Path, script: str
) -> None:
    names = [name for name in recipe if name.startswith(("data.", "run.", "optim."))]
    base = {name: recipe[name] for name in names} | CONTROLS[script]
    if script == "train_instruct_pix2pix":
        write_edits(Path(recipe["data.source"]), tmp_path / "edits", ("mirror", "grey"))
        base["data.source"] = str(tmp_path / "edits")
    base |= {"base.model": str(models.saved_pipeline(tmp_path / "base")), "validation.split": "held_out"}
    base |= {"validation.samples": 2, "validation.inference_steps": 2, "run.max_train_steps": 6}
    curves = []
    for processes, batch in ((1, 4), (2, 2)):
        output = tmp_path / f"{processes}"
        changes = {"run.output_dir": str(output), "run.batch_size": batch}
        Running(script, base | changes, tmp_path, processes).finish()
        curves.append([torch.tensor(curve(output, name)) for name in ("loss", "held_out_loss")])
        assert (output / "validation" / "step-00000006.png").is_file()
    for ours, theirs in zip(*curves, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_run_begun_on_two_processes_ends_on_one_with_the_same_curve(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe |= {"run.max_train_steps": 16, "run.checkpoint_steps": 4, "run.batch_size": 4}
    whole = tmp_path / "whole"
    Running(TEXT_TO_IMAGE, recipe | {"run.output_dir": str(whole), "run.batch_size": 8}, tmp_path, 1).finish()
    run = Path(recipe["run.output_dir"])
    stop_at_the_first_checkpoint(Running(TEXT_TO_IMAGE, recipe, tmp_path, 2), run)
    assert newest(run).name < newest(whole).name, "it was done before it was stopped"
    Running(TEXT_TO_IMAGE, recipe | {"run.batch_size": 8}, tmp_path, 1).finish()
    torch.testing.assert_close(torch.tensor(curve(run)), torch.tensor(curve(whole)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("script", [TEXT_TO_IMAGE, AUTOENCODER])
def test_a_run_of_two_processes_that_was_stopped_goes_on_bit_for_bit(
    recipe: dict[str, Any], autoencoder: dict[str, Any], tmp_path: Path, script: str
) -> None:
    base = recipe if script == TEXT_TO_IMAGE else {**autoencoder, "adversarial.start": 5}
    base |= {"run.max_train_steps": 24, "run.batch_size": 2, "run.checkpoint_steps": 3}
    run, whole = Path(base["run.output_dir"]), tmp_path / "whole"
    Running(script, base | {"run.output_dir": str(whole), "run.checkpoint_steps": 1000}, tmp_path, 2).finish()
    stop_at_the_first_checkpoint(Running(script, base, tmp_path, 2), run)
    assert newest(run).name < newest(whole).name, "it was done before it was stopped"
    Running(script, base, tmp_path, 2).finish()
    found, expected = weights(run), weights(whole)
    assert found.keys() == expected.keys()
    assert [key for key, value in expected.items() if not torch.equal(found[key], value)] == []
