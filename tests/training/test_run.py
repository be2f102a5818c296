"""How runs begin, what they survive and what they refuse, in both trainers."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from hubgen.training import train_autoencoder, train_text_to_image
from hubgen.training.kit.checkpoints import CheckpointError
from hubgen.training.kit.metrics import Metrics
from hubgen.training.kit.parse import SettingsError, parse_settings
from hubgen.training.kit.run import Survived
from hubgen.training.kit.script import UnfinishedError
from hubgen.training.kit.signals import Interruption
from tests.training.conftest import draw_pictures

Run = Callable[..., Path]
TEXT_TO_IMAGE, AUTOENCODER = "text to image", "autoencoder"
BOTH = pytest.mark.parametrize("kind", [TEXT_TO_IMAGE, AUTOENCODER])
SCRIPTS = {TEXT_TO_IMAGE: train_text_to_image, AUTOENCODER: train_autoencoder}
RESULTS = {TEXT_TO_IMAGE: "pipeline", AUTOENCODER: "autoencoder"}


@pytest.fixture
def run(recipe: dict[str, Any], tmp_path: Path) -> Iterator[Run]:
    """`run(kind, {"group.setting": value})` trains a few steps in this process and returns the output folder."""
    own = {
        "model.latent_channels": 4,
        "model.block_out_channels": [8, 8],
        "model.norm_num_groups": 4,
        "loss.perceptual_network": "none",
    }
    names = ("data.source", "data.size", *(name for name in recipe if name.startswith("run.")))
    small = {**{name: recipe[name] for name in names}, **own, "run.batch_size": 2, "optim.learning_rate": 1e-3}
    recipes = {TEXT_TO_IMAGE: recipe, AUTOENCODER: small}

    def train(kind: str, changes: dict[str, Any] | None = None) -> Path:
        AcceleratorState._reset_state(reset_partial_state=True)
        path = tmp_path / "run.yaml"
        settings = {
            **recipes[kind],
            "run.max_train_steps": 4,
            "optim.lr_warmup_steps": 0,
            "optim.lr_schedule": "constant",
            **(changes or {}),
        }
        path.write_text(yaml.safe_dump(settings))
        script: Any = SCRIPTS[kind]
        script.main(parse_settings(script.Settings, ["--config", str(path)]))
        return Path(settings["run.output_dir"])

    yield train
    AcceleratorState._reset_state(reset_partial_state=True)


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("*step-*"))


# ---- what a run survives ----


@BOTH
def test_a_validation_that_fails_is_said_and_costs_no_step(
    run: Run, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "validation").write_text("a file where a folder is expected")
    prompts = {"validation.prompts": ["red ball"], "validation.inference_steps": 1} if kind == TEXT_TO_IMAGE else {}
    with pytest.raises(UnfinishedError, match=r"done and saved, but the validation.*step 2 failed: .*validation"):
        run(kind, {"validation.split": "held_out", "validation.steps": 2, **prompts})
    assert steps(tmp_path / "run")[-1] == "step-00000004"
    assert "The training itself is not touched by it" in capsys.readouterr().err
    assert (tmp_path / "run" / RESULTS[kind]).is_dir()


@BOTH
def test_publishing_that_fails_is_done_by_the_same_command_later(
    run: Run, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", "somewhere")

    with monkeypatch.context() as patch:
        patch.setattr("hubgen.hub.card.TrainingRecord.save", full)
        with pytest.raises(UnfinishedError, match=r"writing the .* failed: disk full while writing somewhere"):
            run(kind)
    assert not (tmp_path / "run" / RESULTS[kind]).exists()
    assert not list((tmp_path / "run").glob(".tmp-*"))
    run(kind)
    assert (tmp_path / "run" / RESULTS[kind]).is_dir()


def test_what_survives_is_told_at_the_end_and_interruptions_go_through() -> None:
    survived = Survived()
    with survived("one"):
        raise KeyError("x")
    with survived("two"):
        pass
    with pytest.raises(KeyboardInterrupt), survived("three"):
        raise KeyboardInterrupt
    with pytest.raises(UnfinishedError, match="one failed: 'x'$"):
        survived.finish()


# ---- going on ----


@BOTH
def test_a_finished_run_of_constant_rate_may_be_longer_and_not_shorter(run: Run, kind: str) -> None:
    folder = run(kind)
    with pytest.raises(SettingsError, match=r"'run.max_train_steps': got 2, expected at least 4"):
        run(kind, {"run.max_train_steps": 2})
    run(kind, {"run.max_train_steps": 6})
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]


@BOTH
def test_a_run_whose_checkpoints_are_all_damaged_is_refused_every_time(run: Run, kind: str) -> None:
    folder = run(kind)
    for path in (folder / "checkpoints").glob("step-*/state.json"):
        path.write_text("{}")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
            run(kind)
    assert all(name.startswith("damaged") for name in steps(folder))


@BOTH
def test_a_measurement_that_a_kill_cut_off_is_made_when_the_run_goes_on(run: Run, kind: str) -> None:
    changes = {"validation.split": "held_out", "validation.steps": 4}
    name = "held_out_loss" if kind == TEXT_TO_IMAGE else "psnr"
    folder = run(kind, changes)
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines()
    kept = [line for line in lines if name not in line]
    assert len(kept) == len(lines) - 1
    path.write_text("\n".join(kept) + "\n" + lines[-1][:9])
    run(kind, changes)
    assert sorted(path.read_text().splitlines()) == sorted(lines)


def test_a_base_is_known_by_content_and_no_path_is_published(run: Run, recipe: dict[str, Any], tmp_path: Path) -> None:
    first = run(TEXT_TO_IMAGE, {"run.max_train_steps": 1})
    base = shutil.copytree(first / "pipeline", tmp_path / "home-of-somebody" / "base")
    for name in [name for name in recipe if name.startswith("base.")]:
        del recipe[name]
    changes = {"run.output_dir": str(tmp_path / "fine"), "run.max_train_steps": 2}
    folder = run(TEXT_TO_IMAGE, {"base.model": str(base), **changes})
    for path in folder.joinpath("pipeline").rglob("*"):
        assert path.is_dir() or b"home-of-somebody" not in path.read_bytes(), path
    moved = shutil.copytree(base, tmp_path / "elsewhere")
    run(TEXT_TO_IMAGE, {"base.model": str(moved), **changes, "run.max_train_steps": 3})
    path = moved / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    name = next(iter(weights))
    save_file({**weights, name: weights[name] + 1}, path)
    with pytest.raises(CheckpointError, match=r"base\.transformer"):
        run(TEXT_TO_IMAGE, {"base.model": str(moved), **changes, "run.max_train_steps": 3})


# ---- what a run says and takes at its start ----


@BOTH
def test_skip_reaches_every_split_and_what_is_left_out_is_said(
    run: Run, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split, count in (("train", 6), ("held_out", 4)):
        draw_pictures(tmp_path / "data" / split, count)
        (tmp_path / "data" / split / "1.png").write_bytes(b"")
    shutil.copyfile(tmp_path / "data" / "train" / "0.png", tmp_path / "data" / "train" / "extra.png")
    changes = {"data.source": str(tmp_path / "data"), "validation.split": "held_out", "run.max_train_steps": 1}
    with pytest.raises(ValueError, match=r"1.png: got an empty file"):
        run(kind, changes)
    run(kind, {**changes, "data.on_bad_picture": "skip"})
    said = capsys.readouterr().out
    assert "1 row of" in said and "1 picture of" in said and "without a row" in said
    batch = 4 if kind == TEXT_TO_IMAGE else 2
    assert f"in precision no, in 1 process on cpu; {batch} pictures a step" in said


@BOTH
def test_the_launchers_precision_counts_and_another_one_is_refused(
    run: Run, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    run(kind, {"run.max_train_steps": 1})
    assert "in precision bf16" in capsys.readouterr().out
    with pytest.raises(SettingsError, match="'run.mixed_precision': got 'no', expected 'bf16' as the launcher has it"):
        run(kind, {"run.mixed_precision": "no"})


@BOTH
def test_processes_that_do_not_know_each_other_are_refused(
    run: Run, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(SettingsError, match="SLURM_STEP_NUM_TASKS: got 2 processes that do not know each other"):
        run(kind)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.size": 17}, "'data.size': got 17, expected a multiple of 2"),
        ({"model.block_out_channels": []}, "'model.block_out_channels': got \\(\\), expected the width"),
        (
            {"model.block_out_channels": [6, 6]},
            "'model.block_out_channels': got 6, expected a multiple of model.norm_num_groups, 4",
        ),
        (
            {"adversarial.weight": 0.5, "adversarial.layers": 4},
            "'adversarial.layers': got 4, expected fewer: they halve 16",
        ),
    ],
)
def test_an_autoencoder_that_cannot_be_is_refused_by_setting(run: Run, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        run(AUTOENCODER, changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base.max_text_tokens": 77}, "'base.max_text_tokens': got 77, expected at most 32"),
        (
            {"base.backbone_config": {"num_layers": "2"}},
            "'base.backbone_config': no SD3Transformer2DModel can be made of it",
        ),
        ({"data.caption_column": "prompt"}, "expected 'prompt' too"),
        ({"data.max_pixels": 100}, r"got 16x16 pixels, expected at most 100 in all \(`max_pixels`\)"),
    ],
)
def test_settings_that_do_not_fit_the_models_or_the_data_are_named(
    run: Run, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(TEXT_TO_IMAGE, changes)


def test_a_damaged_text_encoder_is_named(run: Run, recipe: dict[str, Any], tmp_path: Path) -> None:
    damaged = shutil.copytree(recipe["base.text_encoder"], tmp_path / "text")
    os.truncate(damaged / "model.safetensors", 3000)
    with pytest.raises(SettingsError, match="'base.text_encoder': .*text holds no text encoder"):
        run(TEXT_TO_IMAGE, {"base.text_encoder": str(damaged)})


# ---- the steps ----


def test_accumulated_batches_of_the_autoencoder_are_clipped_as_one(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without noise, two batches of one picture are one batch of two."""
    monkeypatch.setattr(train_autoencoder, "posterior_noise", lambda s, draw, size, ratio: torch.zeros(4, 8, 8))
    ends = []
    for batch in (2, 1):
        changes = {
            "run.batch_size": batch,
            "run.gradient_accumulation_steps": 2 // batch,
            "run.output_dir": str(tmp_path / str(batch)),
        }
        folder = run(AUTOENCODER, {**changes, "data.mirror": False, "optim.max_grad_norm": 0.05})
        ends.append(load_file(folder / "checkpoints" / "step-00000004" / "autoencoder.safetensors"))
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, atol=3e-4, rtol=1e-3)


# ---- signals ----


def test_the_end_of_accelerates_launcher_counts_as_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hubgen.training.kit.signals.is_accelerate", lambda process: True)
    interruption = Interruption()
    assert not interruption.requested
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert interruption.requested


@pytest.mark.slow
def test_a_signal_to_the_whole_group_saves_and_stops_also_with_data_workers(
    run: Run, recipe: dict[str, Any], tmp_path: Path
) -> None:
    run(AUTOENCODER, {"run.max_train_steps": 1, "run.output_dir": str(tmp_path / "other")})  # leaves a recipe to change
    settings = yaml.safe_load((tmp_path / "run.yaml").read_text())
    settings |= {"run.output_dir": str(tmp_path / "run"), "run.max_train_steps": 100_000, "data.num_workers": 2}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "hubgen.training.train_autoencoder", "--config", str(tmp_path / "run.yaml")]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True
    )
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    _, message = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, message
    assert "Traceback" not in message and steps(tmp_path / "run")


# ---- metrics ----


def test_metrics_take_back_what_a_checkpoint_has_not_seen_and_mend_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "loss": 3}\n{"step": 2, "loss": 2, "psnr": 9}\n[1]\n{"step": 3, "loss": 1}\n{"step": 4, "lo'
    )
    metrics = Metrics(path, first_step=2, writer=True)
    metrics.write(3, {"loss": 0.5})
    assert metrics.curve("loss") == [{"step": 1, "loss": 3}, {"step": 2, "loss": 2}, {"step": 3, "loss": 0.5}]
    assert metrics.curve("psnr", "loss") == [{"step": 2, "psnr": 9, "loss": 2}]
    assert metrics.has(2, "psnr") and not metrics.has(3, "psnr")
    Metrics(path, first_step=0, writer=False).write(9, {"loss": 1})
    assert len(path.read_text().splitlines()) == 3
