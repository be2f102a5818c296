"""train_captioner: exact resume, the same loss however a step is dealt, both forms of data, and what it learns."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from hubgen.captioning.captioner import open_captioner
from hubgen.captioning.generate import Asked, write_captions
from hubgen.captioning.templates import PROMPT, V1
from hubgen.data.errors import DataError
from hubgen.data.order import generator_of
from hubgen.training.kit.answers import Told
from hubgen.training.kit.parse import SettingsError, parse_settings
from hubgen.training.kit.trained import Trained
from hubgen.training.train_captioner import Settings, main
from tests.captioning.taught import NAMED, QUESTION
from tests.data.web.recaptioning import shards_of

Train = Callable[..., Path]
TINY: dict[str, Any] = {
    "base.image_size": 32,
    "base.width": 16,
    "base.layers": 4,
    "base.heads": 2,
    "base.vocabulary": 300,
    "run.batch_size": 4,
    "run.max_train_steps": 6,
    "run.log_steps": 1,
    "optim.learning_rate": 0.003,
    "optim.lr_warmup_steps": 0,
    "run.report_to": "none",
}


def folder_of(root: Path, rows: dict[str, Any]) -> Path:
    """An image-text folder."""
    (root / "train").mkdir(parents=True)
    lines = []
    for number, (caption, picture) in enumerate(rows.items()):
        picture.save(root / "train" / f"{number}.png")
        line = {"file_name": f"{number}.png", "text": caption, "captions": [caption, f"{caption}, on white"]}
        lines.append(json.dumps(line) + "\n")
    (root / "train" / "metadata.jsonl").write_text("".join(lines))
    return root


@pytest.fixture
def train(tmp_path: Path) -> Iterator[Train]:
    """Runs the script in this process on eight drawn pictures, with changed settings; returns the output folder."""
    data = folder_of(tmp_path / "data", NAMED)

    def run(changes: dict[str, Any] | None = None) -> Path:
        AcceleratorState._reset_state(reset_partial_state=True)
        asked = {"data.source": data, "run.output_dir": tmp_path / "run", **TINY, **(changes or {})}
        settings = parse_settings(Settings, [f"--{name}={value}" for name, value in asked.items()])
        main(settings)
        return settings.run.output_dir

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)


def final(folder: Path) -> dict[str, torch.Tensor]:
    newest = max((folder / "checkpoints").glob("step-*"))
    files = [*newest.glob("*.safetensors"), folder / "captioner" / "model.safetensors"]
    return {f"{file.name}/{key}": value for file in files for key, value in load_file(file).items()}


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in metrics(folder) if "loss" in row]


def test_a_run_that_was_stopped_and_resumed_equals_an_uninterrupted_one(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"data.caption_variants": 0.5, "optim.ema_decay": 0.5, "validation.split": "train",
               "validation.steps": 2, "validation.max_new_tokens": 4}  # fmt: skip
    whole = train({"run.output_dir": tmp_path / "whole", "run.checkpoint_steps": 100, **options})
    update = Trained.update

    def stopped(self: Trained, step: int, kept_steps: Any) -> None:
        if step == 5:
            raise KeyboardInterrupt
        update(self, step, kept_steps)

    with monkeypatch.context() as patch:
        patch.setattr(Trained, "update", stopped)
        with pytest.raises(KeyboardInterrupt):
            train({"run.checkpoint_steps": 3, **options})
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]
    resumed = train({"run.checkpoint_steps": 3, **options})
    expected, found = final(whole), final(resumed)
    assert expected.keys() == found.keys()
    assert [key for key, value in expected.items() if not torch.equal(found[key], value)] == []
    assert losses(whole) == losses(resumed)
    learned = {key.partition("/")[2] for key in expected if key.startswith("captioner.safetensors/")}
    assert not any("vision_tower" in key and "layers.2." not in key for key in learned)


def test_a_step_is_the_mean_over_its_answers_tokens_however_it_is_dealt(train: Train, tmp_path: Path) -> None:
    """Captions of different lengths: a mean of the batches' means would be another number."""
    whole = train({"run.output_dir": tmp_path / "whole", "run.batch_size": 8, "optim.optimizer": "sgd"})
    dealt = train({"run.batch_size": 2, "run.gradient_accumulation_steps": 4, "optim.optimizer": "sgd"})
    assert losses(dealt) == pytest.approx(losses(whole), rel=1e-5)
    expected, found = final(whole), final(dealt)
    moved = [key for key in expected if not torch.allclose(found[key], expected[key], atol=1e-6)]
    assert moved == []


def test_shards_are_told_with_the_captions_that_a_model_wrote(train: Train, tmp_path: Path) -> None:
    """And are a source as any other."""
    shards = shards_of(tmp_path / "shards", 2, 4, synthetic=lambda caption: f"{caption} on white paper")
    seen: list[str] = []
    encoded = Told._encoded

    def noted(self: Told, rows: Any, conversations: Any) -> Any:
        seen.extend(conversation[0].answer for conversation in conversations)
        return encoded(self, rows, conversations)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Told, "_encoded", noted)
        train({"data.source": shards, "data.synthetic_captions": 0.5, "run.max_train_steps": 8})
    share = sum(text.endswith("paper") for text in seen) / len(seen)
    places = [float(torch.rand((), generator=generator_of(0, place, "synthetic"))) for place in range(8 * 4)]
    assert share == sum(place < 0.5 for place in places) / 32


@pytest.fixture
def conversations(tmp_path: Path) -> Path:
    rows = []
    for number, (caption, picture) in enumerate(NAMED.items()):
        picture.crop((0, 4, 32, 28)).save(tmp_path / f"{number}.png")
        said = [f"<image>\n{QUESTION}", caption, "Is it big?", "Yes." if "ball" in caption else "No, it is not."]
        turns = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(said)]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    path = tmp_path / "said.json"
    path.write_text(json.dumps(rows))
    return path


def test_stages_follow_each_other_and_the_second_answers_questions_about_padded_pictures(
    train: Train, conversations: Path, tmp_path: Path
) -> None:
    first = train({"base.layers": 2, "run.batch_size": 8})
    second = train({
        "stage": "instruct", "base.model": first / "captioner", "data.source": conversations,
        "run.output_dir": tmp_path / "second", "run.batch_size": 8, "run.max_train_steps": 60,
        "run.log_steps": 10, "optim.learning_rate": 0.02, "optim.lr_warmup_steps": 5,
        "validation.source": conversations, "validation.steps": 60, "validation.max_new_tokens": 12,
    })  # fmt: skip
    before, after = (
        load_file(first / "captioner" / "model.safetensors"),
        load_file(second / "captioner" / "model.safetensors"),
    )
    same = {key for key in before if torch.equal(before[key], after[key])}
    assert same == {key for key in before if "vision_tower" in key}
    rows = metrics(second)
    assert losses(second)[-1] < 0.5 * losses(second)[0]
    assert rows[-1]["held_out_loss"] < 0.5 * losses(second)[0] and rows[-1]["held_out_usable"] > 0.5
    captioner = open_captioner(second / "captioner")
    assert captioner.processor.chat_template == V1.chat and captioner.processor.image_processor.do_pad
    assert captioner.model.generation_config.eos_token_id == [captioner.tokenizer.eos_token_id]
    answers = write_captions(captioner, list(NAMED.values()), Asked(QUESTION, 12))
    assert all(answer.text.startswith("a ") for answer in answers)
    card = (second / "captioner" / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card and "apply_chat_template" in card and PROMPT in card
    record = json.loads((second / "captioner" / "training.json").read_text())
    assert record["settings"]["stage"] == "instruct" and record["data"]["pictures"] == 8


def test_what_the_card_shows_runs(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = train({"run.max_train_steps": 1}) / "captioner"
    card = (folder / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    next(iter(NAMED.values())).save("picture.png")
    exec(code.replace("path/to/this/folder", str(folder)), {})
    assert isinstance(AutoProcessor.from_pretrained(folder).image_token, str)
    assert LlavaForConditionalGeneration.from_pretrained(folder).dtype == torch.float32


def test_texts_that_are_too_long_end_the_run_or_are_left_out(train: Train, tmp_path: Path) -> None:
    data = folder_of(tmp_path / "long", {**NAMED, "a red ball " * 40: NAMED["a red ball"]})
    with pytest.raises(DataError, match=r"8.png: got a text of \d+ tokens, expected at most 30"):
        train({"data.source": data, "data.max_tokens": 30})
    folder = train({"data.source": data, "data.max_tokens": 30, "data.on_bad_picture": "skip"})
    assert json.loads((folder / "captioner" / "training.json").read_text())["data"]["pictures"] == 8


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (
            {"base.model": "nowhere"},
            SettingsError,
            "setting 'base': nowhere: no such folder, expected that of a capt",
        ),
        (
            {"base.vision_tower": "nowhere"},
            SettingsError,
            "setting 'base.vision_tower': got 'nowhere', expected it a",
        ),
        ({"base.image_size": 40}, SettingsError, "setting 'base': `side`: got 40, expected a multiple of 16"),
        ({"data.mirror": True}, SettingsError, "setting 'data.mirror': got True, expected nothing: it is not for capt"),
        ({"data.size": 32}, SettingsError, "setting 'data.size': got 32, expected nothing"),
        (
            {"data.image_root": "x"},
            SettingsError,
            "setting 'data.image_root': got 'x', expected nothing: it is for",
        ),
        ({"stage": "second"}, SettingsError, "setting 'stage' on the command line: got 'second', expected"),
        ({"data.source": "nowhere"}, DataError, "nowhere: no such folder"),
    ],
)
def test_settings_that_do_not_fit_are_named(train: Train, changes: dict[str, Any], error: type, words: str) -> None:
    with pytest.raises(error) as refused:
        train(changes)
    assert words in str(refused.value)


def test_conversations_of_several_turns_do_not_suit_the_first_stage(train: Train, conversations: Path) -> None:
    with pytest.raises(DataError, match="0.png: got 2 questions, expected one: the template plain has one answer"):
        train({"data.source": conversations})


def test_a_caption_that_holds_the_image_token_is_refused(train: Train, tmp_path: Path) -> None:
    data = folder_of(tmp_path / "odd", {"an <image> of a ball": NAMED["a red ball"]})
    with pytest.raises(DataError, match="0.png: got <image> in 'an <image> of a ball', expected words"):
        train({"data.source": data})


@pytest.mark.slow
def test_sixty_four_captions_are_written_word_for_word_after_300_steps(train: Train, tmp_path: Path) -> None:
    """Drawn: eight colours, two shapes, four places. The same on emoji is tests/benchmarks/captioner.py."""
    rows = {}
    for color in ("red", "green", "blue", "black", "orange", "purple", "gray", "brown"):
        for shape in ("ball", "box"):
            for place, (x, y) in {"top left": (4, 4), "top right": (34, 4), "bottom left": (4, 34),
                                  "bottom right": (34, 34)}.items():  # fmt: skip
                picture = Image.new("RGB", (64, 64), "white")
                pen = ImageDraw.Draw(picture)
                (pen.ellipse if shape == "ball" else pen.rectangle)((x, y, x + 25, y + 25), fill=color)
                rows[f"a {color} {shape} at the {place}"] = picture
    assert len(rows) == 64
    folder = train({
        "data.source": folder_of(tmp_path / "drawn", rows), "base.image_size": 64, "base.width": 64, "base.heads": 4,
        "run.batch_size": 16, "run.max_train_steps": 300, "run.log_steps": 50, "optim.learning_rate": 0.002,
        "optim.lr_warmup_steps": 20, "validation.split": "train", "validation.steps": 300,
        "validation.max_new_tokens": 24,
    })  # fmt: skip
    found = metrics(folder)[-1]
    assert found["held_out_exact"] >= 0.9, found
