"""Every script trains from shards as from a folder of the same pictures; killed, it goes on bit for bit."""

import importlib
import json
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from hubgen.data.captions import SYNTHETIC
from hubgen.data.errors import DataError
from hubgen.data.web.shards import Outcome, write_shard, write_stats
from hubgen.training.kit.parse import parse_settings
from hubgen.training.kit.script import USAGE_ERROR
from tests import models
from tests.training.conftest import MMDIT
from tests.training.processes import Running

TEXT_TO_IMAGE = "train_text_to_image"
TINY = {
    "model.latent_channels": 2,
    "model.block_out_channels": [8, 8],
    "model.norm_num_groups": 4,
    "loss.perceptual_network": "none",
}
PIXELS = {name: list(v) if isinstance(v, tuple) else v for name, v in models.PIXELS.items() if name != "sample_size"}
DIT = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}
SCRIPTS: dict[str, dict[str, Any]] = {
    "train_text_to_image": {"base.backbone_config": MMDIT, "base.max_text_tokens": 8},
    "train_class_to_image": {"base.backbone_config": DIT, "data.label_column": "text", "objective.path": "ddpm"},
    "train_unconditional": {"base.backbone_config": PIXELS},
    "train_autoencoder": TINY,
    "train_lora": {"adapter.rank": 2},
    "train_dreambooth": {"adapter.rank": 2, "instance.prompt": "big ball", "prior.weight": 0},
    "train_controlnet": {"data.hint": "color", "data.hint_options": {"cells": 2}},
    "train_ip_adapter": {"adapter.image_encoder": "latents", "adapter.tokens": 2},
}
FROM_SCRATCH = {"train_text_to_image": ("base.autoencoder", "base.text_encoder")}
FROM_SCRATCH |= {"train_class_to_image": ("base.autoencoder",), "train_unconditional": (), "train_autoencoder": ()}


def write_pictures(source: Path, target: Path, shards: int, written: bool = True) -> None:
    """The pictures of a folder as shards, between them rows that failed; every other has a caption of a model too."""
    rows = [json.loads(line) for line in (source / "metadata.jsonl").read_text().splitlines()]
    target.mkdir(parents=True)
    count = -(-len(rows) // shards)
    for number in range(shards):
        part = rows[number * count : (number + 1) * count]
        outcomes = [Outcome("failed_to_download", "HTTP Error 404: Not Found")]
        for row in part:
            content = (source / row["file_name"]).read_bytes()
            width, height = Image.open(source / row["file_name"]).size
            outcomes.append(Outcome("success", None, content, width, height, width, height))
        texts = ["", *(row["text"] for row in part)]
        columns = {"text": texts, "caption": texts}
        if written:
            columns[SYNTHETIC] = [f"a {text}" if place % 2 else None for place, text in enumerate(texts)]
        stats = write_shard(target, number, 100, pa.table(columns), outcomes, ending="png")
        write_stats(target / f"{number:05d}_stats.json", stats)


@pytest.fixture(scope="module")
def shards(problem: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Folders with the pictures of the problem in one shard and in three."""
    source, root = Path(problem["data.source"]), tmp_path_factory.mktemp("shards")
    for count in (1, 3):
        for split in ("train", "held_out"):
            write_pictures(source / split, root / str(count) / split, count if split == "train" else 1)
    return {count: str(root / str(count)) for count in (1, 3)}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(models.saved_pipeline(tmp_path_factory.mktemp("base")))


def tensors(run: Path) -> dict[str, torch.Tensor]:
    newest = max((run / "checkpoints").glob("step-*"))
    files = sorted(newest.glob("*.safetensors"))
    return {f"{file.name}/{key}": value for file in files for key, value in load_file(file).items()}


def assert_identical(first: Path, second: Path) -> None:
    ours, theirs = tensors(first), tensors(second)
    assert ours.keys() == theirs.keys() and ours
    assert [key for key, value in ours.items() if not torch.equal(value, theirs[key])] == []


def losses(run: Path) -> torch.Tensor:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([row["loss"] for row in rows if "loss" in row])


def trained(script: str, settings: dict[str, Any], output: Path) -> Path:
    """Runs a script in this process, and returns its output folder."""
    module = importlib.import_module(f"hubgen.training.{script}")
    recipe = output.with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump(settings | {"run.output_dir": str(output)}))
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        module.main(parse_settings(module.Settings, ["--config", str(recipe)]))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    return output


def settings_of(script: str, problem: dict[str, str], base: str) -> dict[str, Any]:
    """Of a run of two steps."""
    own = {name: problem[name] for name in FROM_SCRATCH[script]} if script in FROM_SCRATCH else {"base.model": base}
    captioned = script in ("train_text_to_image", "train_lora", "train_controlnet", "train_ip_adapter")
    return {
        **own,
        **({"data.caption_variants": 0.0} if captioned else {}),
        "data.size": 16,
        "run.batch_size": 3,
        "run.max_train_steps": 2,
        "run.log_steps": 1,
        "run.report_to": "none",
        "optim.lr_warmup_steps": 0,
        **({} if script == "train_autoencoder" else {"validation.inference_steps": 2}),
        **SCRIPTS[script],
    }


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_from_one_window_of_shards_is_that_from_a_folder_of_the_same_pictures(
    problem: dict[str, str], shards: dict[int, str], base: str, tmp_path: Path, script: str
) -> None:
    settings = settings_of(script, problem, base)
    folder = trained(script, settings | {"data.source": problem["data.source"]}, tmp_path / "folder")
    assert_identical(trained(script, settings | {"data.source": shards[3]}, tmp_path / "shards"), folder)


# ---- killed, stopped, on several processes ----


@pytest.fixture
def long(problem: dict[str, str], shards: dict[int, str], tmp_path: Path) -> dict[str, Any]:
    """Settings of a run over three shards, each a window of its own, with captions of a model."""
    return {
        **settings_of(TEXT_TO_IMAGE, problem, ""),
        "data.source": shards[3],
        "data.window": 1,
        "data.synthetic_captions": 0.5,
        "data.num_workers": 2,
        "run.output_dir": str(tmp_path / "run"),
        "run.batch_size": 4,
        "run.max_train_steps": 30,
        "run.checkpoint_steps": 4,
        "optim.learning_rate": 1e-2,
    }


@pytest.mark.slow
def test_a_run_from_shards_killed_and_resumed_with_other_workers_equals_one_that_was_left_alone(
    long: dict[str, Any], tmp_path: Path
) -> None:
    alone = Running(TEXT_TO_IMAGE, long | {"run.output_dir": str(tmp_path / "alone"), "data.num_workers": 0}, tmp_path)
    killed = Running(TEXT_TO_IMAGE, long, tmp_path)
    run, deadline = Path(long["run.output_dir"]), time.monotonic() + 300
    while not list((run / "checkpoints").glob("step-*")):
        assert killed.alive() and time.monotonic() < deadline, killed.output()
        time.sleep(0.002)
    killed.kill()
    refused = Running(TEXT_TO_IMAGE, long | {"data.synthetic_captions": 0.25}, tmp_path)
    assert refused.wait() == [USAGE_ERROR] and "synthetic_captions" in refused.output(), refused.output()
    Running(TEXT_TO_IMAGE, long | {"data.num_workers": 3}, tmp_path).finish()
    alone.finish()
    assert_identical(run, tmp_path / "alone")
    pair = long | {"run.output_dir": str(tmp_path / "pair"), "run.batch_size": 2, "data.num_workers": 1}
    Running(TEXT_TO_IMAGE, pair, tmp_path, 2).finish()
    torch.testing.assert_close(losses(tmp_path / "pair"), losses(tmp_path / "alone"), rtol=1e-5, atol=1e-5)


def test_caches_of_shards_change_nothing(long: dict[str, Any], tmp_path: Path) -> None:
    settings = long | {"run.max_train_steps": 4, "data.num_workers": 0}
    runs = [trained(TEXT_TO_IMAGE, settings | {"data.cache": cache}, tmp_path / str(cache)) for cache in (True, False)]
    torch.testing.assert_close(losses(runs[0]), losses(runs[1]), rtol=1e-5, atol=1e-5)
    assert len(list((runs[0] / "cache").glob("latents-*"))) == len(list((runs[0] / "cache").glob("text-*"))) == 3


def test_captions_of_a_model_that_are_not_there_are_asked_for_in_vain(
    problem: dict[str, str], long: dict[str, Any], tmp_path: Path
) -> None:
    write_pictures(Path(problem["data.source"]) / "train", tmp_path / "plain", 1, written=False)
    with pytest.raises(DataError, match=r"00000\.parquet: got the columns .*, expected 'synthetic_caption' too"):
        trained(TEXT_TO_IMAGE, long | {"data.source": str(tmp_path / "plain")}, tmp_path / "run")
    with pytest.raises(DataError, match=r"got no synthetic_caption of any picture, expected some for .* 0\.5"):
        trained(TEXT_TO_IMAGE, long | {"data.source": problem["data.source"]}, tmp_path / "run")
    assert not (tmp_path / "run").exists()
