"""Every family trains from its official layout, is told what its recipes tell it, and is published as it came."""

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

import hubgen
from hubgen.training import train_class_to_image, train_text_to_image, train_unconditional
from hubgen.training.kit import conditioned
from hubgen.training.kit.parse import SettingsError, parse_settings
from tests import models
from tests.training.conftest import MMDIT, UNET, draw_pictures

Official = Callable[[str], Path]
SCRIPTS: dict[str, Any] = {
    "text": train_text_to_image,
    "class": train_class_to_image,
    "pixels": train_unconditional,
}
FLUX = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
DDPM = {"objective.path": "ddpm"}
PIXELS = {name: list(v) if isinstance(v, tuple) else v for name, v in models.PIXELS.items() if name != "sample_size"}
NCSNPP = {name: list(v) if isinstance(v, tuple) else v for name, v in models.NCSNPP.items() if name != "sample_size"}


@pytest.fixture
def run(problem: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Two steps of a script in this process; returns the output folder."""

    def train(script: str, changes: dict[str, Any]) -> Path:
        AcceleratorState._reset_state(reset_partial_state=True)
        settings = {
            "data.source": problem["data.source"],
            "data.size": 16,
            "data.mirror": True,
            "data.random_crops": 2,
            "run.output_dir": str(tmp_path / "run"),
            "run.batch_size": 2,
            "run.max_train_steps": 2,
            "run.log_steps": 1,
            "run.report_to": "none",
            "validation.split": "held_out",
            "validation.inference_steps": 2,
            "publish.dtype": "float32",
            **({"validation.prompts": ["ball"]} if script == "text" else {"validation.samples": 1}),
            **changes,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(json.loads(json.dumps(settings))))
        SCRIPTS[script].main(parse_settings(SCRIPTS[script].Settings, ["--config", str(path)]))
        return tmp_path / "run"

    yield train
    AcceleratorState._reset_state(reset_partial_state=True)


def measured(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "sd3", "sd3.5", "flux-dev", "flux-schnell"])
def test_an_official_pipeline_trains_and_is_published_as_the_same_one(
    run: Callable[..., Path], official: Official, name: str
) -> None:
    folder = run("text", {"base.model": str(official(name))})
    before = json.loads((official(name) / "model_index.json").read_text())
    after = json.loads((folder / "pipeline" / "model_index.json").read_text())
    assert after["_class_name"] == before["_class_name"]
    theirs = diffusers.DiffusionPipeline.from_pretrained(folder / "pipeline")
    ours = hubgen.TextToImagePipeline.from_pretrained(folder / "pipeline")
    start = hubgen.TextToImagePipeline.from_pretrained(official(name)).backbone.state_dict()
    trained = ours.backbone.state_dict()
    assert type(theirs.scheduler).__name__ == before["scheduler"][1]
    assert any(not torch.equal(value, start[key]) for key, value in trained.items())
    rows = measured(folder)
    assert all(row["loss"] > 0 for row in rows if "loss" in row) and rows[-1]["held_out_loss"] > 0
    assert (folder / "validation" / "step-00000002.png").is_file()


def test_an_official_dit_trains_on_its_numbered_classes_and_is_published_as_the_same_one(
    run: Callable[..., Path], official: Official, tmp_path: Path
) -> None:
    for split, count in (("train", 6), ("held_out", 2)):
        draw_pictures(tmp_path / "data" / split, count)
        table = tmp_path / "data" / split / "metadata.jsonl"
        rows = [json.loads(line) for line in table.read_text().splitlines()]
        lines = [json.dumps({**row, "class": 7 + n}) + "\n" for n, row in enumerate(rows)]
        table.write_text("".join(lines))
    data = {"data.source": str(tmp_path / "data"), "data.label_column": "class"}
    folder = run("class", {"base.model": str(official("dit")), **data})
    assert json.loads((folder / "pipeline" / "model_index.json").read_text())["_class_name"] == "DiTPipeline"
    start = hubgen.ClassToImagePipeline.from_pretrained(official("dit")).transformer.state_dict()
    trained = hubgen.ClassToImagePipeline.from_pretrained(folder / "pipeline").transformer.state_dict()
    assert any(not torch.equal(value, start[key]) for key, value in trained.items())


SCRATCH: dict[str, tuple[str, dict[str, Any]]] = {
    "mmdit": ("text", {"base.backbone_config": MMDIT, "objective.shift": "auto"}),
    "unet, edm": (
        "text",
        {"base.backbone": "unet", "base.backbone_config": UNET, "objective.path": "edm"},
    ),
    "unet, cosine": (
        "text",
        {"base.backbone": "unet", "base.backbone_config": UNET, "objective.path": "cosine", "objective.huber": 0.1},
    ),
    "sdxl": (
        "text",
        {
            "base.backbone": "unet",
            "base.backbone_config": {
                **UNET,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "transformer_layers_per_block": 1,
            },
            "objective.path": "ddpm",
            "objective.noise_offset": 0.1,
        },
    ),
    "flux": (
        "text",
        {
            "base.backbone": "flux",
            "base.backbone_config": {**FLUX, "axes_dims_rope": [4, 6, 6], "guidance_embeds": True},
            "objective.sigma_min": 0.001,
        },
    ),
    "dit with its variance": (
        "class",
        {
            "base.backbone_config": {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1},
            "objective.path": "ddpm",
        },
    ),
    "dit, rectified flow": (
        "class",
        {"base.backbone_config": {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}},
    ),
    "unet with classes": ("class", {"base.backbone": "unet", "base.backbone_config": PIXELS}),
    "ddpm": ("pixels", {"base.backbone_config": PIXELS}),
    "ncsnpp": (
        "pixels",
        {"base.backbone_config": NCSNPP, "objective.path": "variance_exploding", "validation.inference_steps": 3},
    ),
    "ncsn": (
        "pixels",
        {"base.backbone_config": PIXELS, "objective.path": "ncsn", "validation.inference_steps": 10},
    ),
}


@pytest.mark.parametrize("name", SCRATCH)
def test_every_backbone_trains_from_scratch_and_draws(
    run: Callable[..., Path], problem: dict[str, str], name: str
) -> None:
    script, changes = SCRATCH[name]
    parts = {"text": ("base.autoencoder", "base.text_encoder"), "class": ("base.autoencoder",), "pixels": ()}[script]
    changes = {**{part: problem[part] for part in parts}, **changes}
    if script == "text":
        changes["base.max_text_tokens"] = 8
    if script == "class":
        changes["data.label_column"] = "text"
    folder = run(script, changes)
    pipelines = {
        "text": (hubgen.TextToImagePipeline, ("red ball",)),
        "class": (hubgen.ClassToImagePipeline, ("red ball",)),
        "pixels": (hubgen.UnconditionalPipeline, ()),
    }
    cls, arguments = pipelines[script]
    pipeline = cls.from_pretrained(folder / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    (picture,) = pipeline(*arguments, num_inference_steps=changes.get("validation.inference_steps", 2)).images
    assert isinstance(picture, Image.Image) and picture.size == (16, 16)
    assert (folder / "pipeline" / "README.md").read_text().count(f"from hubgen import {cls.__name__}") == 1
    if script == "text":
        assert picture.size == (16, 16) and pipeline.tokenizer.model_max_length == 8


def test_pictures_are_not_square_in_buckets_and_sdxl_is_told_so(
    run: Callable[..., Path], official: Official, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_pictures(tmp_path / "data", 8)
    for number in range(8):  # half of them twice as wide, half twice as high
        size = (64, 32) if number % 2 else (32, 64)
        Image.open(tmp_path / "data" / f"{number}.png").resize(size).save(tmp_path / "data" / f"{number}.png")
    told = []
    predict = conditioned.predict

    def watched(backbone: Any, x_t: torch.Tensor, timestep: torch.Tensor, condition: Any) -> torch.Tensor:
        told.append((tuple(x_t.shape[-2:]), condition.micro.tolist()))
        return predict(backbone, x_t, timestep, condition)

    monkeypatch.setattr(conditioned, "predict", watched)
    sizes = {"data.size": 32, "data.buckets": True, "data.bucket_step": 8, "data.bucket_sides": [16, 64]}
    changes = {**sizes, "data.source": str(tmp_path / "data"), "validation.split": None, "validation.prompts": []}
    run("text", {"base.model": str(official("sdxl")), **changes, "data.random_crops": 0, "run.max_train_steps": 4})
    assert {shape for shape, _ in told} == {(10, 6), (6, 10)}
    for (height, width), rows in told:
        for row in rows:
            assert row[:2] in ([64.0, 32.0], [32.0, 64.0])  # height first
            assert row[4:] == [4.0 * height, 4.0 * width]  # 40 x 24, of 48 x 24 after scaling
            assert row[2:4] == ([4.0, 0.0] if height > width else [0.0, 4.0])
            assert (row[0] > row[1]) == (height > width)


@pytest.mark.parametrize(
    ("script", "changes", "message"),
    [
        ("text", {"objective.prediction": "v"}, "'objective.prediction': got 'v', expected 'velocity' with rectified"),
        ("text", {**DDPM, "objective.zero_terminal_snr": True, "objective.weighting": "min_snr"}, "0 / 0"),
        ("text", {"base.model": "/nowhere"}, "'base.autoencoder': got together with base.model"),
        ("text", {"base.autoencoder": None}, "'base.autoencoder': got none, expected the folder of one, or base.model"),
        ("text", {"data.size": 18}, "'data.size': got 18, expected a multiple of 4"),
        ("text", {"data.size": 32}, r"0.png: got 16x16 pixels, expected at least 32x32.*upscale"),
        ("text", {"data.mask_column": "nothing"}, None),
        ("text", {"optim.optimizer": "adamx"}, "'optim.optimizer': got 'adamx', expected one of adamw"),
        ("text", {"optim.optimizer": "prodigy"}, "'optim.learning_rate': got 0.0003, expected about 1"),
        ("text", {"optim.arguments": {"x": 1}}, "'optim.arguments': adamw: .*'x'"),
        ("text", {"optim.lr_schedule": "cosinus"}, "'optim.lr_schedule': got 'cosinus', expected one of .*cosine"),
        ("text", {"data.buckets": True}, "'data.bucket_sides': .*got 16, expected one that multiples of 64"),
        ("pixels", {"objective.path": "ncsn", "base.backbone_config": PIXELS, "validation.inference_steps": 7},
         "'validation.inference_steps': .*expected a multiple of the 10 noise levels"),
        ("class", {"data.label_column": "kind"}, "got None, expected a class in column 'kind'"),
        ("class", {}, "expected the name of a folder that the picture lies in"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_in_one_line_before_the_first_step(
    run: Callable[..., Path], problem: dict[str, str], script: str, changes: dict[str, Any], message: str | None
) -> None:
    base: dict[str, Any] = {}
    if script != "pixels":
        base["base.autoencoder"] = problem["base.autoencoder"]
        base["base.backbone_config"] = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}
    if script == "text":
        base |= {"base.text_encoder": problem["base.text_encoder"], "base.max_text_tokens": 8}
        base["base.backbone_config"] = MMDIT
    if message is None:
        run(script, {**base, **changes})  # a column without masks: all counts
        return
    with pytest.raises((SettingsError, ValueError), match=message) as error:
        run(script, {**base, **changes})
    assert "\n" not in str(error.value)
