"""A run that was killed, stopped, saved at another cadence or made longer ends with the weights of one that was not."""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hubgen.training.kit.finite import NonFiniteError
from hubgen.training.kit.parse import SettingsError
from hubgen.training.kit.script import NON_FINITE_ERROR, USAGE_ERROR
from tests.training.conftest import MMDIT, UNET, draw_pictures
from tests.training.processes import Running

Train = Callable[[dict[str, Any]], Path]
SCRIPT = "train_text_to_image"


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Everything in the newest checkpoint: weights, average and optimizer."""
    newest = max((folder / "checkpoints").glob("step-*"))
    files = sorted(newest.glob("*.safetensors"))
    assert len(files) == 3
    return {f"{file.name}/{key}": value for file in files for key, value in load_file(file).items()}


def assert_identical(first: Path, second: Path) -> None:
    ours, theirs = final_weights(first), final_weights(second)
    assert ours.keys() == theirs.keys()
    different = [key for key, value in ours.items() if not torch.equal(value, theirs[key])]
    assert not different


def steps_logged(folder: Path) -> list[int]:
    path = folder / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def wait_for_step(running: Running, folder: Path, step: int) -> None:
    deadline = time.monotonic() + 600
    while not (folder / "metrics.jsonl").exists() or max(steps_logged(folder), default=0) < step:
        assert running.alive() and time.monotonic() < deadline, running.output()
        time.sleep(0.002)


def test_a_run_killed_at_a_random_step_and_then_stopped_by_sigterm_equals_an_uninterrupted_one(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe |= {
        "run.max_train_steps": 60,
        "run.mixed_precision": "bf16",
        "run.gradient_accumulation_steps": 2,
        "run.batch_size": 3,
    }
    run, whole = Path(recipe["run.output_dir"]), tmp_path / "whole"
    Running(SCRIPT, recipe | {"run.output_dir": str(whole), "run.checkpoint_steps": 1000}, tmp_path).finish()

    running = Running(SCRIPT, recipe, tmp_path)
    wait_for_step(running, run, random.Random(0).randint(4, 25))
    running.kill()

    running = Running(SCRIPT, recipe, tmp_path)
    wait_for_step(running, run, max(steps_logged(run)) + 2)
    running.send(signal.SIGTERM)
    assert running.wait() == [128 + signal.SIGTERM], running.output()
    assert "is saved in" in running.output() and "Traceback" not in running.output()

    Running(SCRIPT, recipe, tmp_path).finish()
    assert_identical(run, whole)
    # what the killed run logged beyond its last checkpoint stands there once
    assert steps_logged(run) == steps_logged(whole) == list(range(1, 61))


@pytest.mark.parametrize("cadence", [1, 7])
def test_the_cadence_of_saving_and_validation_does_not_touch_the_weights(
    recipe: dict[str, Any], train: Train, tmp_path: Path, cadence: int
) -> None:
    never = train(recipe | {"run.output_dir": str(tmp_path / "never"), "run.checkpoint_steps": 1000})
    often = {"validation.split": "held_out", "validation.prompts": ["red ball"], "validation.inference_steps": 2}
    run = train(recipe | often | {"run.checkpoint_steps": cadence, "validation.steps": cadence})
    assert_identical(run, never)


@pytest.mark.parametrize("variant", ["ddpm", "unet", "accumulation", "dropped captions"])
def test_a_run_made_longer_equals_one_that_was_that_long_from_the_start(
    recipe: dict[str, Any], train: Train, tmp_path: Path, variant: str
) -> None:
    recipe |= {"optim.lr_schedule": "constant", "run.max_train_steps": 6}
    recipe |= {
        "ddpm": {"objective.path": "ddpm", "objective.prediction": "v", "objective.weighting": "min_snr"},
        "unet": {"base.backbone": "unet", "base.backbone_config": UNET | {"dropout": 0.3}},
        "accumulation": {"run.gradient_accumulation_steps": 3, "run.gradient_checkpointing": True},
        "dropped captions": {"data.caption_dropout": 0.5, "data.caption_variants": 1.0, "objective.density": "uniform"},
    }[variant]
    long = train(recipe | {"run.output_dir": str(tmp_path / "long")})
    train(recipe | {"run.max_train_steps": 4})  # 4 steps of 4 of 14 pictures: in the middle of an epoch
    assert_identical(train(recipe), long)


def test_a_model_goes_on_in_smaller_patches(recipe: dict[str, Any], train: Train, tmp_path: Path) -> None:
    from hubgen.pipelines.text_to_image import TextToImagePipeline

    first = train(recipe | {"run.max_train_steps": 2, "run.output_dir": str(tmp_path / "first")}) / "pipeline"
    kept = {name: value for name, value in recipe.items() if not name.startswith("base.")}
    changes = {"base.model": str(first), "base.patch_size": 1, "run.max_train_steps": 2}
    pipe = TextToImagePipeline.from_pretrained(train(kept | changes) / "pipeline")
    assert pipe.transformer.config.patch_size == 1
    assert pipe("red ball", num_inference_steps=2).images[0].size == (16, 16)
    with pytest.raises(SettingsError, match="'base.patch_size': `patch_size`: got 3, expected a divisor"):
        train(kept | changes | {"base.patch_size": 3, "run.output_dir": str(tmp_path / "three")})
    with pytest.raises(SettingsError, match="'base.patch_size': got 1 without base.model"):
        train(recipe | {"base.patch_size": 1, "run.output_dir": str(tmp_path / "scratch")})


@pytest.mark.parametrize("backbone", ["mmdit", "unet"])
@pytest.mark.parametrize("path", ["rectified_flow", "ddpm"])
def test_either_backbone_on_either_path_ends_in_a_pipeline_that_draws(
    recipe: dict[str, Any], train: Train, backbone: str, path: str
) -> None:
    from hubgen.pipelines.text_to_image import TextToImagePipeline

    config = MMDIT if backbone == "mmdit" else UNET
    recipe |= {
        "base.backbone": backbone,
        "base.backbone_config": config,
        "objective.path": path,
        "run.max_train_steps": 2,
    }
    recipe |= {"validation.split": "held_out", "validation.prompts": ["red ball", "a box", "blue"]}
    run = train(recipe | {"validation.inference_steps": 2, "run.report_to": "tensorboard"})
    pipeline = TextToImagePipeline.from_pretrained(run / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    (picture,) = pipeline("red ball", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images
    assert picture.size == (16, 16)
    assert pipeline.tokenizer.model_max_length == 8
    published_text = "".join(path.read_text() for path in (run / "pipeline").rglob("*.json"))
    assert str(run.parent) not in published_text and recipe["base.autoencoder"] not in published_text
    assert pipeline.config.default_num_inference_steps == 2
    average = {k.partition("average.")[2]: v for k, v in final_weights(run).items() if "/average." in k}
    published = pipeline.backbone.state_dict()
    assert average.keys() == {name for name, _ in pipeline.backbone.named_parameters()}
    assert all(torch.equal(average[key], published[key]) for key in average)
    assert (run / "validation" / "step-00000002.png").is_file() and list((run / "logs").iterdir())
    held_out = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    assert held_out["held_out_loss"] > 0


def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_the_batch(
    recipe: dict[str, Any], train: Train
) -> None:
    recipe |= {"optim.learning_rate": 1e30, "optim.lr_warmup_steps": 0, "run.checkpoint_steps": 1, "run.batch_size": 14}
    with pytest.raises(NonFiniteError) as error:
        train(recipe)
    message = str(error.value)
    assert all(f"{number}.png" in message for number in range(14))
    kept = max((Path(recipe["run.output_dir"]) / "checkpoints").glob("step-*"))
    assert f"checkpoint of step {int(kept.name[5:])} is kept" in message
    assert all(value.isfinite().all() for value in load_file(kept / "backbone.safetensors").values())
    assert not (Path(recipe["run.output_dir"]) / "pipeline").exists()
    assert NON_FINITE_ERROR not in (0, 1, USAGE_ERROR)


def test_other_settings_or_data_are_refused_with_the_differences(
    recipe: dict[str, Any], train: Train, tmp_path: Path
) -> None:
    recipe |= {"run.max_train_steps": 2}
    train(recipe)
    with pytest.raises(ValueError, match=r"optim\.learning_rate: 0.01 in the checkpoint, 0.1 now"):
        train(recipe | {"optim.learning_rate": 0.1})
    draw_pictures(tmp_path / "other" / "train", 13)
    with pytest.raises(ValueError, match="another run: data: "):
        train(recipe | {"data.source": str(tmp_path / "other")})
    train(recipe | {"run.log_steps": 5, "run.checkpoint_steps": 100})  # does not touch the weights


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"base.backbone_config": MMDIT | {"num_layer": 3}}, "unknown key 'num_layer'"),
        ({"base.backbone_config": MMDIT | {"in_channels": 3}}, "got in_channels 3, expected 4"),
        ({"objective.prediction": "noise"}, "'objective.prediction': got 'noise', expected 'velocity'"),
        ({"base.autoencoder": "/nowhere"}, "'base.autoencoder': got /nowhere"),
        ({"base.text_encoder": "/nowhere"}, "'base.text_encoder': /nowhere"),
        ({"optim.ema_decay": 1}, "'optim.ema_decay'"),
    ],
)
def test_settings_that_do_not_fit_are_named(
    recipe: dict[str, Any], train: Train, wrong: dict[str, Any], named: str
) -> None:
    with pytest.raises(SettingsError) as error:
        train(recipe | wrong)
    assert named in str(error.value)


def test_the_script_ends_with_one_line_and_exit_code_2_on_bad_input(recipe: dict[str, Any], tmp_path: Path) -> None:
    picture = tmp_path / "data" / "train" / "1.png"
    draw_pictures(picture.parent, 3)
    picture.write_bytes(picture.read_bytes()[:60])
    running = Running(SCRIPT, recipe | {"data.source": str(tmp_path / "data")}, tmp_path)
    assert running.wait() == [USAGE_ERROR]
    message = running.output()
    assert message.splitlines()[-1].startswith("error: ") and "1.png" in message and "Traceback" not in message


def test_a_second_process_on_the_same_folder_is_refused(recipe: dict[str, Any], train: Train, tmp_path: Path) -> None:
    from hubgen.training.kit.checkpoints import CheckpointError, Checkpoints

    first = Checkpoints(recipe["run.output_dir"])
    with pytest.raises(CheckpointError, match="another process"):
        train(recipe)
    first.close()
    assert os.listdir(recipe["run.output_dir"] + "/checkpoints") == []


def losses(folder: Path) -> torch.Tensor:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([row["loss"] for row in rows if "loss" in row])


def test_cached_and_live_runs_have_the_same_losses_and_the_order_of_rows_moves_no_caption(
    recipe: dict[str, Any], train: Train, tmp_path: Path
) -> None:
    draw_pictures(tmp_path / "data" / "train", 12)
    for number in range(12):  # half of them wide, half high
        path = tmp_path / "data" / "train" / f"{number}.png"
        Image.open(path).resize((24, 16) if number % 2 else (16, 24)).save(path)
    recipe |= {
        "data.source": str(tmp_path / "data"),
        "data.cache_dir": str(tmp_path / "cache"),
        "data.buckets": True,
        "data.bucket_step": 4,
        "data.bucket_sides": [8, 24],
        "data.random_crops": 3,
        "data.mirror": True,
        "data.caption_variants": 0.7,
        "data.tag_orders": 2,
        "data.caption_prefix": "sks ",
        "run.max_train_steps": 12,
    }
    found = {}
    for order in ("as it was", "shuffled"):
        if order == "shuffled":
            table = tmp_path / "data" / "train" / "metadata.jsonl"
            lines = table.read_text().splitlines(keepends=True)
            table.write_text("".join(random.Random(1).sample(lines, len(lines))))
        for cache in (True, False):
            output = {"run.output_dir": str(tmp_path / f"{order} {cache}"), "data.cache": cache}
            found[order, cache] = losses(train(recipe | output))
        assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2  # the second order made nothing anew
        torch.testing.assert_close(found[order, True], found[order, False], rtol=1e-5, atol=1e-5)
    assert not torch.equal(found["as it was", True], found["shuffled", True])


def test_masks_say_where_the_loss_counts(recipe: dict[str, Any], train: Train, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "train"
    draw_pictures(folder, 6)
    (folder / "masks").mkdir()
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]

    def with_masks(value: int) -> torch.Tensor:
        for row in rows:
            row["mask"] = f"masks/{row['file_name']}"
            Image.new("L", (16, 16), value).save(folder / row["mask"])
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        changes = {"data.source": str(tmp_path / "data"), "run.output_dir": str(tmp_path / str(value))}
        changes |= {"data.mask_column": "mask", "optim.learning_rate": 0.0}
        return losses(train(recipe | changes))

    torch.testing.assert_close(with_masks(51), with_masks(255) / 5, rtol=1e-3, atol=1e-6)
