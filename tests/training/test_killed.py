"""A run that is killed at any moment, again and again, ends with the weights of one that was left alone."""

import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import models
from tests.training.conftest import MMDIT
from tests.training.processes import Running

pytestmark = pytest.mark.slow

PIXELS = {name: list(v) if isinstance(v, tuple) else v for name, v in models.PIXELS.items() if name != "sample_size"}
DIT = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}
FEW = {"validation.split": "held_out", "validation.steps": 7, "validation.inference_steps": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "train_text_to_image": {**FEW, "base.backbone_config": MMDIT, "validation.prompts": ["red ball"]},
    "train_class_to_image": {
        **FEW,
        "base.backbone_config": DIT,
        "objective.path": "ddpm",
        "data.label_column": "text",
        "validation.samples": 1,
    },
    "train_unconditional": {**FEW, "base.backbone_config": PIXELS, "validation.samples": 1},
    "train_autoencoder": {
        "validation.split": "held_out",
        "validation.steps": 7,
        "model.latent_channels": 2,
        "model.block_out_channels": [8, 8],
        "model.norm_num_groups": 4,
        "loss.perceptual_network": "none",
        "adversarial.weight": 0.5,
        "adversarial.start": 5,
        "adversarial.width": 4,
        "adversarial.layers": 1,
    },
    "train_lora": {**FEW, "adapter.rank": 2, "validation.prompts": ["red ball"]},
    "train_dreambooth": {
        "validation.steps": 7,
        "validation.inference_steps": 2,
        "adapter.rank": 2,
        "adapter.text_encoder": True,
        "data.cache_texts": False,
        "instance.prompt": "big ball",
        "prior.prompt": "ball",
        "prior.pictures": 5,
        "prior.inference_steps": 2,
        "validation.prompts": ["red ball"],
    },
}
OPTIMIZERS = {"train_text_to_image": "adamw", "train_class_to_image": "adamw8bit", "train_autoencoder": "adafactor"}
OPTIMIZERS |= {"train_unconditional": "prodigy", "train_lora": "schedule_free_adamw", "train_dreambooth": "muon"}
ADAPTERS = ("train_lora", "train_dreambooth")


def final(run: Path) -> dict[str, torch.Tensor]:
    newest = max((run / "checkpoints").glob("step-*"))
    folders = ("pipeline/*", "autoencoder", "lora")
    results = [file for folder in folders for file in run.glob(f"{folder}/*.safetensors")]
    assert results
    files = [*sorted(newest.glob("*.safetensors")), *results]
    return {f"{file.relative_to(run)}/{key}": value for file in files for key, value in load_file(file).items()}


def settings_of(script: str, recipe: dict[str, Any], problem: dict[str, str]) -> dict[str, Any]:
    common = {name: value for name, value in recipe.items() if name.startswith(("run.", "data.", "publish."))}
    parts = {
        "train_text_to_image": ("base.autoencoder", "base.text_encoder"),
        "train_class_to_image": ("base.autoencoder",),
    }
    own = {name: problem[name] for name in parts.get(script, ())}
    if script in ADAPTERS:
        own["base.model"] = str(models.saved_pipeline(Path(common["run.output_dir"]).parent / "base"))
    optimizer = OPTIMIZERS[script]
    return {
        **common,
        **own,
        **({"base.max_text_tokens": 8} if script == "train_text_to_image" else {}),
        "optim.optimizer": optimizer,
        "optim.learning_rate": 1.0 if optimizer == "prodigy" else 3e-3,
        "optim.lr_warmup_steps": 2,
        "run.max_train_steps": 30,
        "run.checkpoint_steps": 4,
        "run.log_steps": 5,
        **SETTINGS[script],
    }


@pytest.mark.parametrize(
    ("script", "processes", "kills"),
    [
        ("train_text_to_image", 1, 20),  # the loop is the same for all; what differs is what is saved
        ("train_class_to_image", 1, 6),
        ("train_unconditional", 1, 6),
        ("train_autoencoder", 1, 6),
        ("train_lora", 1, 4),
        ("train_dreambooth", 1, 6),
        ("train_text_to_image", 2, 6),
    ],
)
def test_a_run_killed_at_random_moments_equals_one_that_was_left_alone(
    recipe: dict[str, Any], problem: dict[str, str], tmp_path: Path, script: str, processes: int, kills: int
) -> None:
    settings = settings_of(script, recipe, problem)
    whole, run = tmp_path / "whole", Path(settings["run.output_dir"])
    begun = time.monotonic()
    alone = settings | {"run.output_dir": str(whole), "run.checkpoint_steps": 1000}
    Running(script, alone, tmp_path, processes).finish()
    lasted = time.monotonic() - begun
    draw = random.Random(script)
    for _ in range(kills):
        running = Running(script, settings, tmp_path, processes)
        time.sleep(draw.uniform(0.2, 1.0) * lasted)
        running.kill()
    Running(script, settings, tmp_path, processes).finish()
    found, expected = final(run), final(whole)
    assert found.keys() == expected.keys()
    assert [key for key, value in expected.items() if not torch.equal(found[key], value)] == []
    assert not list(run.glob(".tmp-*")) and not list((run / "checkpoints").glob(".tmp-*"))
