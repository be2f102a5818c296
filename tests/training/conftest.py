"""A whole training problem that takes seconds: drawn pictures, a tiny autoencoder and a tiny text encoder."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.state import AcceleratorState
from PIL import Image, ImageDraw

from tests import models

COLORS = ("red", "green", "blue")
SHAPES = ("ball", "box")


def draw_pictures(folder: Path, count: int, first: int = 0) -> None:
    """`count` pictures of 16x16 pixels, a colored shape each, with metadata.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(first, first + count):
        color, shape = COLORS[number % 3], SHAPES[number % 2]
        picture = Image.new("RGB", (16, 16), "white")
        pen = ImageDraw.Draw(picture)
        (pen.ellipse if shape == "ball" else pen.rectangle)((number % 5, number % 7, 9, 12), fill=color)
        picture.save(folder / f"{number}.png")
        text = f"{color} {shape}"
        rows.append({"file_name": f"{number}.png", "text": text, "captions": [text, f"a {text}", f"{shape} {color}"]})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def problem(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Settings of train_text_to_image that name the data and the frozen parts."""
    root = tmp_path_factory.mktemp("problem")
    draw_pictures(root / "data" / "train", 14)
    draw_pictures(root / "data" / "held_out", 4, first=14)
    models.vae(scaling_factor=0.9).save_pretrained(root / "autoencoder")
    models.tokenizer(max_length=16).save_pretrained(root / "text")
    models.text_encoder().save_pretrained(root / "text")
    return {
        "data.source": str(root / "data"),
        "base.autoencoder": str(root / "autoencoder"),
        "base.text_encoder": str(root / "text"),
    }


# What a recipe says of a backbone; the rest follows from autoencoder and text encoder.
SIZED = ("in_channels", "out_channels", "sample_size", "joint_attention_dim", "pooled_projection_dim")
SIZED += ("caption_projection_dim", "cross_attention_dim")
MMDIT = {name: value for name, value in {**models.SD3, "qk_norm": "rms_norm"}.items() if name not in SIZED}
UNET = {name: value for name, value in models.UNET.items() if name not in SIZED}


@pytest.fixture
def recipe(problem: dict[str, str], tmp_path: Path) -> dict[str, Any]:
    """Settings of a run of 8 steps into `tmp_path / "run"`, as a recipe would give them."""
    return {
        **problem,
        "run.output_dir": str(tmp_path / "run"),
        "data.size": 16,
        "base.max_text_tokens": 8,
        "base.backbone_config": MMDIT,
        "run.batch_size": 4,
        "run.max_train_steps": 8,
        "optim.lr_warmup_steps": 2,
        "optim.learning_rate": 1e-2,
        "run.checkpoint_steps": 3,
        "run.log_steps": 1,
        "run.report_to": "none",
        "publish.dtype": "float32",
    }


@pytest.fixture
def train(tmp_path: Path) -> Iterator[Callable[[dict[str, Any]], Path]]:
    """Runs train_text_to_image in this process and returns its output folder."""
    from hubgen.training.kit.parse import parse_settings
    from hubgen.training.train_text_to_image import Settings, main

    def run(recipe: dict[str, Any]) -> Path:
        # Accelerate remembers the precision of the process's first run.
        AcceleratorState._reset_state(reset_partial_state=True)
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        main(parse_settings(Settings, ["--config", str(path)]))
        return Path(recipe["run.output_dir"])

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)


QUICK: dict[str, Any] = {
    "data.size": 16,
    "run.batch_size": 2,
    "run.max_train_steps": 2,
    "run.log_steps": 1,
    "run.report_to": "none",
    "optim.learning_rate": 0.01,
    "validation.split": "held_out",
    "validation.samples": 2,
    "validation.inference_steps": 2,
    "publish.dtype": "float32",
}


@contextmanager
def quick_runs(script: Any, folder: Path, settings: dict[str, Any]) -> Iterator[Callable[[dict[str, Any]], Path]]:
    """Runs a script that trains a control for a few steps in this process, and returns its output folder."""
    from hubgen.training.kit.parse import parse_settings

    def train(changes: dict[str, Any]) -> Path:
        AcceleratorState._reset_state(reset_partial_state=True)
        all_settings = {**QUICK, "run.output_dir": str(folder / "run"), **settings, **changes}
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(json.loads(json.dumps(all_settings))))
        script.main(parse_settings(script.Settings, ["--config", str(path)]))
        return Path(all_settings["run.output_dir"])

    yield train
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, str, Any]]:
    """What is to be left out of each picture that a run learns from, its caption, and what is shown beside it."""
    from hubgen.training.kit.conditioned import ConditionedPictures

    seen: list[tuple[Any, str, Any]] = []
    plain = ConditionedPictures.shown

    def watched(self: Any, draws: Any, batch: Any, embedded: bool = True) -> Any:
        batch = plain(self, draws, batch, embedded)
        if self.train:
            rows = zip(draws, batch.captions, batch.beside, strict=True)
            seen.extend((self.left_out(draw), caption, beside) for draw, caption, beside in rows)
        return batch

    monkeypatch.setattr(ConditionedPictures, "shown", watched)
    return seen


def example_of(card: Path, monkeypatch: pytest.MonkeyPatch, shown: Image.Image) -> Image.Image:
    """What a card's first example draws that is shown a picture, where the folders that it names are."""
    example = re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)[0]
    base = card.parents[2]  # of the run's folder
    monkeypatch.chdir(base)
    for name in ("shown.png", "before.png"):
        shown.save(base / name)
    exec(compile(example.replace("path/to/this/folder", str(card.parent)), str(card), "exec"), {})
    with Image.open(base / "picture.png") as picture:
        return picture.copy()
