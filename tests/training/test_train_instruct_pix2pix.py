"""Every family of prompts learns to edit pictures by instructions, and is published as what it then is."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import hubgen
from hubgen.conditioning.predict import predict
from hubgen.controls.shown_picture import ChannelsBeside
from hubgen.data.edits import write_edits
from hubgen.data.errors import DataError
from hubgen.data.order import Draw
from hubgen.training import train_instruct_pix2pix
from hubgen.training.kit.beside import Originals, target_of
from hubgen.training.kit.controlled import Editing, made_editor
from hubgen.training.kit.groups import EditData
from hubgen.training.kit.parse import SettingsError
from hubgen.training.kit.pictures import open_pictures
from tests import models
from tests.training.conftest import draw_pictures, example_of, quick_runs
from tests.training.test_train_controlnet import FAMILIES, checkpoint, losses, told
from tests.training.test_train_controlnet import opened as base_of

Official = Callable[[str], Path]
Run = Callable[..., Path]
EDITS = ("mirror", "grey")


@pytest.fixture
def edits(tmp_path: Path) -> Path:
    for split, count in (("train", 6), ("held_out", 3)):
        draw_pictures(tmp_path / "pictures" / split, count)
    write_edits(tmp_path / "pictures", tmp_path / "edits", EDITS)
    return tmp_path / "edits"


@pytest.fixture
def run(edits: Path, tmp_path: Path) -> Iterator[Run]:
    with quick_runs(train_instruct_pix2pix, tmp_path, {"data.source": str(edits), "optim.ema_decay": None}) as train:
        yield train


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_becomes_an_editor(run: Run, official: Official, family: str) -> None:
    folder = run({"base.model": str(official(family))})
    pipe = hubgen.TextToImagePipeline.from_pretrained(folder / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    base = hubgen.TextToImagePipeline.from_pretrained(official(family))
    assert pipe.shown is not None and pipe.shown.name == "instruction"
    assert pipe.family.channels == 2 * base.family.channels
    before, after = base.backbone.state_dict(), pipe.backbone.state_dict()
    assert before.keys() == after.keys()
    assert any(not torch.equal(value, after[key]) for key, value in before.items() if value.shape == after[key].shape)
    call: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np"}

    def drawn(image: Image.Image) -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        return pipe("red cat", image=image, generator=generator, image_guidance_scale=1.5, **call).images

    assert np.abs(drawn(picture()) - drawn(picture().transpose(Image.Transpose.FLIP_TOP_BOTTOM))).max() > 1e-4
    with Image.open(folder / "validation" / "step-00000002.png") as grid:
        assert grid.size == (3 * 16, 2 * 16)  # original, one scale, the edit; two rows
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["held_out_loss"] > 0
    assert "image=picture" in (folder / "pipeline" / "README.md").read_text()


@pytest.mark.parametrize(
    ("family", "name"),
    [("sd1", "StableDiffusionInstructPix2PixPipeline"), ("sdxl", "StableDiffusionXLInstructPix2PixPipeline")],
)
def test_diffusers_loads_the_editor_and_draws_the_same(run: Run, official: Official, family: str, name: str) -> None:
    folder = run({"base.model": str(official(family)), "run.max_train_steps": 3}) / "pipeline"
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == name
    theirs = diffusers.DiffusionPipeline.from_pretrained(folder)
    ours = hubgen.TextToImagePipeline.from_pretrained(folder)
    assert type(theirs).__name__ == name
    call: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 4.0, "image_guidance_scale": 1.5}
    found = []
    for pipe in (ours, theirs):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        found.append(pipe("a cat", image=picture(), generator=generator, output_type="latent", **call).images)
    assert (found[0] - found[1]).abs().max() < 1e-4 * found[1].std()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_editor_predicts_as_its_base_whatever_it_is_shown_and_is_asked_as_in_sampling(
    official: Official, family: str
) -> None:
    pipe = base_of(official, family)
    x_t, timestep, condition, _ = told(pipe)
    with torch.no_grad():
        base = predict(pipe.backbone, x_t, timestep, condition)
    kind = made_editor(pipe)
    learner = Editing(pipe).eval()
    with torch.no_grad():
        shown = kind.encoded(pipe.vae, 2 * models.drawn(2, 3, 32, 32, seed=5).clamp(0, 1) - 1)
        torch.testing.assert_close(learner(x_t, timestep, condition, shown), base, rtol=1e-4, atol=1e-5)
    found = learner(x_t, timestep, condition, shown)
    found.square().mean().backward()
    asked = {name for name, value in learner.named_parameters() if value.grad is not None and value.grad.any()}
    assert len(asked) > 0.8 * len(list(learner.parameters()))
    target = target_of(pipe, (32, 32), 2, x_t.device)
    assert torch.equal(ChannelsBeside(shown, target).channels("positive"), shown)


def test_original_and_edit_are_cropped_and_mirrored_alike(edits: Path, official: Official) -> None:
    data = EditData(source=str(edits), size=12, mirror=True, random_crops=3)
    pictures = open_pictures(data, "train", 0, side=12, multiple=4, caption_column="edit_prompt")
    rows = [row for row, words in enumerate(pictures.examples.texts) if words == "make it black and white"]
    draws = [Draw(place, rows[place % len(rows)]) for place in range(40)]
    before = pictures.further(draws, "original_image")
    after = (pictures.pixels(draws) + 1) / 2
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    grey = (before * weights).sum(1)
    apart = [(grey - other).abs().mean(dim=(1, 2)).max().item() for other in (after[:, 0], after[:, 0].flip(2))]
    assert apart[0] < 0.02 < 0.1 < apart[1]  # resampling rounds; mirrored, they differ
    assert len({pictures.shown(draw) for draw in draws}) == 6
    pipe = base_of(official, "sd1")
    kind = made_editor(pipe)
    beside = Originals(pipe, pictures, "original_image", kind)
    beside.sources(0, None)
    some = draws[:3]
    shown = beside.shown(beside.read(some), some, [True, False, True], torch.device("cpu"))
    assert torch.allclose(shown[0], kind.encoded(pipe.vae, 2 * before[:1] - 1)[0], atol=1e-5)
    assert not shown[1].any() and shown[2].any()


def test_a_run_made_longer_equals_one_that_was_that_long_and_caches_change_nothing(run: Run, tmp_path: Path) -> None:
    base = {"base.model": str(models.saved_pipeline(tmp_path / "base", "unet")), "data.mirror": True}
    base |= {"validation.samples": 0, "data.condition_dropout": 0.2, "optim.ema_decay": 0.9}
    long = run({**base, "run.max_train_steps": 6, "run.output_dir": str(tmp_path / "long")})
    run({**base, "run.max_train_steps": 4})
    short = run({**base, "run.max_train_steps": 6})
    ours, theirs = checkpoint(short), checkpoint(long)
    assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())
    live = run({**base, "run.max_train_steps": 6, "run.output_dir": str(tmp_path / "live"), "data.cache": False})
    assert losses(live) == pytest.approx(losses(long), rel=1e-4)
    more = {"run.output_dir": str(tmp_path / "less"), "run.gradient_checkpointing": True}
    again = run({**base, "run.max_train_steps": 6, **more})
    assert losses(again) == pytest.approx(losses(long), rel=1e-4)


def test_what_is_left_out_is_the_empty_instruction_and_zeros(
    run: Run, tmp_path: Path, shown: list[tuple[Any, str, Any]]
) -> None:
    base = str(models.saved_pipeline(tmp_path / "base"))
    run({"base.model": base, "data.condition_dropout": 0.25, "run.max_train_steps": 12, "validation.samples": 0})
    assert len(shown) == 24 and len({out for out, *_ in shown}) == 4
    for out, words, beside in shown:
        assert (words == "") == out.text and bool((beside == 0).all()) == out.picture


def test_an_editor_is_used_as_its_card_says_and_trained_further_as_it_is(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run({"base.model": str(models.saved_pipeline(tmp_path / "base"))}) / "pipeline"
    example_of(first / "README.md", monkeypatch, picture())
    second = run({"base.model": str(first), "run.output_dir": str(tmp_path / "second"), "optim.learning_rate": 0.0})
    before, after = (hubgen.TextToImagePipeline.from_pretrained(one).backbone.state_dict()
                     for one in (first, second / "pipeline"))  # fmt: skip
    assert all(torch.equal(value, after[key]) for key, value in before.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.original_column": "before"}, "row 1: got .*, expected 'before_file_name' too"),
        ({"data.edited_column": "after"}, "row 1: got .*, expected 'after_file_name' too"),
        ({"data.caption_column": "words"}, "row 1: got .*, expected 'words' too"),
        ({"data.source": "/nowhere"}, "/nowhere: no such folder"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(run: Run, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    base = str(models.saved_pipeline(tmp_path / "base"))
    with pytest.raises((SettingsError, DataError), match=message) as error:
        run({"base.model": base, **changes})
    assert "\n" not in str(error.value) and not (tmp_path / "run" / "cache").exists()


def test_models_that_cannot_be_editors_are_refused(run: Run, official: Official) -> None:
    for name, words in (("dit", "got a model of classes"), ("sd1-inpaint", "got a backbone of 9 channels")):
        with pytest.raises(SettingsError, match=words):
            run({"base.model": str(official(name))})
