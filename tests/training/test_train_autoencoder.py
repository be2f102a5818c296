"""The autoencoder's script: exact resume with and without a discriminator, measured latents, clear stops."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from hubgen.autoencoders.autoencoder_kl import AutoencoderKL
from hubgen.data.image_folder import ImageTextFolder
from hubgen.training.kit.checkpoints import CheckpointError
from hubgen.training.kit.finite import NonFiniteError
from hubgen.training.kit.parse import parse_settings
from hubgen.training.train_autoencoder import Settings, main
from tests.training.conftest import draw_pictures

Train = Callable[..., Path]


@pytest.fixture
def train(tmp_path: Path) -> Iterator[Train]:
    """Runs the script in this process on drawn pictures, with changed settings; returns the output folder."""
    draw_pictures(tmp_path / "data" / "train", 10)
    draw_pictures(tmp_path / "data" / "held_out", 3, first=10)
    tiny: dict[str, Any] = {
        "data.source": tmp_path / "data",
        "run.output_dir": tmp_path / "run",
        "data.size": 16,
        "model.latent_channels": 2,
        "model.block_out_channels": "8 8",
        "model.norm_num_groups": 4,
        "loss.perceptual_network": "none",
        "adversarial.width": 4,
        "adversarial.layers": 1,
        "run.batch_size": 4,
        "run.max_train_steps": 6,
        "optim.learning_rate": 0.003,
        "optim.lr_warmup_steps": 0,
        "optim.lr_schedule": "constant",
        "run.report_to": "none",
    }

    def run(changes: dict[str, Any] | None = None) -> Path:
        AcceleratorState._reset_state(reset_partial_state=True)
        arguments: list[str] = []
        for name, value in (tiny | (changes or {})).items():
            arguments += [f"--{name}", *str(value).split()]
        settings = parse_settings(Settings, arguments)
        main(settings)
        return settings.run.output_dir

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    newest = max((folder / "checkpoints").glob("step-*"))
    files = newest.glob("*.safetensors")
    return {f"{file.name}/{key}": value for file in files for key, value in load_file(file).items()}


@pytest.mark.parametrize("discriminator_weight", [0.0, 0.5])
def test_a_run_that_was_stopped_and_resumed_equals_an_uninterrupted_one(train: Train, tmp_path, discriminator_weight):
    options = {"adversarial.weight": discriminator_weight, "adversarial.start": 2}
    whole = final_weights(train({"run.output_dir": tmp_path / "whole", "run.checkpoint_steps": 100, **options}))
    with pytest.raises(KeyboardInterrupt):
        stop_after(4, lambda: train({"run.checkpoint_steps": 3, **options}))
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-00000003"]
    resumed = final_weights(train({"run.checkpoint_steps": 3, **options}))
    assert whole.keys() == resumed.keys()
    assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []


def stop_after(steps: int, run: Callable[[], Any]) -> None:
    """Runs until the averaged weights were updated `steps` times, then fails there as Ctrl-C would."""
    from hubgen.training.kit.ema import ExponentialMovingAverage

    update, count = ExponentialMovingAverage.update, 0

    def counted(self: ExponentialMovingAverage, module: torch.nn.Module) -> None:
        nonlocal count
        count += 1
        if count > steps:
            raise KeyboardInterrupt
        update(self, module)

    ExponentialMovingAverage.update = counted  # type: ignore[method-assign]
    try:
        run()
    finally:
        ExponentialMovingAverage.update = update  # type: ignore[method-assign]


def test_the_discriminator_changes_the_autoencoder_from_its_first_step_on_and_not_before(train: Train, tmp_path):
    def weights(name: str, **changes: Any) -> dict[str, torch.Tensor]:
        folder = train({"run.output_dir": tmp_path / name, "run.max_train_steps": 3, **changes})
        return load_file(folder / "checkpoints" / "step-00000003" / "autoencoder.safetensors")

    plain = weights("plain")
    later = weights("later", **{"adversarial.weight": 0.5}, **{"adversarial.start": 3})
    sooner = weights("sooner", **{"adversarial.weight": 0.5}, **{"adversarial.start": 2})
    assert all(torch.equal(plain[key], later[key]) for key in plain)
    assert not all(torch.equal(plain[key], sooner[key]) for key in plain)


def test_published_latents_have_mean_zero_and_standard_deviation_one_on_the_training_pictures(train: Train, tmp_path):
    folder = train()
    model = AutoencoderKL.from_pretrained(folder / "autoencoder")
    data = ImageTextFolder(tmp_path / "data", split="train", size=16)
    with torch.no_grad():
        posterior = model.encode(data.load_pixels(range(len(data)))).latent_dist
        samples = torch.stack([posterior.sample(torch.Generator().manual_seed(seed)) for seed in range(50)])
    latents = (samples - model.config.shift_factor) * model.config.scaling_factor
    assert abs(latents.mean().item()) < 0.05
    assert abs(latents.std().item() - 1) < 0.05


def test_training_with_perceptual_loss_lowers_the_reconstruction_error(train: Train, tmp_path):
    folder = train(
        {
            "loss.perceptual_network": "efficientnet_lite0",
            "validation.split": "held_out",
            "validation.steps": 1,
            "run.max_train_steps": 25,
            "optim.learning_rate": 0.01,
            "optim.ema_decay": 0.5,
        }
    )
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    reports = [row for row in rows if "psnr" in row]
    assert reports[-1]["psnr"] > reports[0]["psnr"] + 1
    assert reports[-1]["perceptual_distance"] < reports[0]["perceptual_distance"]
    assert (folder / "validation" / "step-00000025.png").is_file()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(train: Train, tmp_path):
    train({"run.max_train_steps": 2})
    with pytest.raises(NonFiniteError, match=r"\.png"):
        train({"run.output_dir": tmp_path / "bad", "optim.learning_rate": 1e20, "run.checkpoint_steps": 1})
    kept = max((tmp_path / "bad" / "checkpoints").glob("step-*"))
    assert all(value.isfinite().all() for value in load_file(kept / "autoencoder.safetensors").values())


def test_a_run_with_other_settings_in_the_same_folder_is_refused_with_the_difference(train: Train):
    train({"run.max_train_steps": 2})
    with pytest.raises(CheckpointError, match=r"loss\.kl_weight: 0.001 in the checkpoint, 0.5 now"):
        train({"run.max_train_steps": 2, "loss.kl_weight": 0.5})
