"""`hubgen train captioner`: a plan, a run that goes on, and its use; what is said about mistakes."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from hubgen.captioning.captioner import open_captioner
from hubgen.cli.captioner import usual
from hubgen.training import train_captioner
from hubgen.training.kit.parse import settings_of
from tests import test_cli
from tests.data.web.recaptioning import shards_of
from tests.test_cli import Result, refused
from tests.test_cli_adapters import Command, planned
from tests.training.conftest import draw_pictures

hubgen = test_cli.hubgen
SMALL = ("--set", "base.width=16", "--set", "base.layers=2", "--set", "base.heads=2", "--set", "validation.steps=100")


@pytest.fixture
def train_(hubgen: Command) -> Iterator[Command]:
    """`hubgen train captioner`, in this process."""

    def run(*arguments: object) -> Result:
        AcceleratorState._reset_state(reset_partial_state=True)  # it remembers the precision of the first run
        return hubgen("train", "captioner", *arguments, "--set", "run.report_to=none")

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_captioner_is_trained_by_a_plan_goes_on_and_writes_captions(train_: Command, hubgen: Command) -> None:
    draw_pictures(Path("pictures"), 6)
    result = train_("pictures", "--steps", 2, *SMALL)
    assert result.status == 0, result.err
    found = planned(result)
    assert found["learns"] == "projector, language model, upper half of the vision tower (pretrain)"
    assert found["base"].startswith("from scratch: 2 blocks of 16 features each") and "32x32 pixels" in found["base"]
    assert found["batch"] == "6 pictures a step (chosen)" and found["steps"].startswith("2, each picture about 2 times")
    assert "max_train_steps: 2" in Path("runs/pictures-captioner/recipe.yaml").read_text()
    longer = train_("pictures", "--steps", 3, *SMALL)  # the learning rate falls towards the end
    assert longer.status == 2 and "max_train_steps: 2 in the checkpoint, 3 now" in longer.err
    place = "runs/pictures-captioner/captioner"
    assert open_captioner(place).processor.chat_template is None
    further = train_("pictures", "--base", place, "--stage", "align", "--steps", 1, "--out", "further",
                     "--set", "run.mixed_precision=no")  # fmt: skip
    assert further.status == 0, further.err
    assert planned(further)["base"].startswith(place) and planned(further)["learns"] == "the projector (align)"
    shards_of(Path("shards"), 1, 2)
    assert hubgen("data", "recaption", "shards", "--model", "further/captioner", "--max-tokens", 4).status == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere",), "nowhere: no such folder, expected a folder of pictures"),
        (("pictures", "--base", "nowhere"), "--base nowhere: no such folder, expected that of a captioner"),
        (("pictures", "--image-root", "x"), "setting 'data.image_root': got 'x', expected nothing"),
        (("said.json",), "said.json row 1: got no list 'conversations'"),
        (("pictures", "--set", "data.mirror=true"), "setting 'data.mirror': got True, expected nothing"),
        (("bare",), "bare: its pictures have no captions; expected a metadata.jsonl"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(train_: Command, arguments: tuple[str, ...], words: str) -> None:
    draw_pictures(Path("pictures"), 3)
    draw_pictures(Path("bare"), 2)
    (Path("bare") / "metadata.jsonl").unlink()
    Path("said.json").write_text(json.dumps([{"id": "1"}]))
    assert words in refused(train_(*arguments))
    assert not list(Path("runs").rglob("step-*"))


def test_what_is_chosen_suits_the_number_of_pictures() -> None:
    given = {"data.source": "x", "run.output_dir": "y"}
    scratch = settings_of(train_captioner, given, {})
    chosen = {n: usual(scratch, n, [(64, 80)], None) for n in (6, 64, 1730, 100_000)}
    assert [one["run.batch_size"] for one in chosen.values()] == [6, 16, 64, 64]
    assert [one["run.max_train_steps"] for one in chosen.values()] == [200, 200, 1400, 5000]
    assert {one["base.image_size"] for one in chosen.values()} == {64}
    further = settings_of(train_captioner, {**given, "base.model": "z"}, {})
    assert usual(further, 1000, [(64, 80)], None)["run.max_train_steps"] == 63  # once through the data
    assert "optim.learning_rate" not in usual(further, 1000, [(64, 80)], None)
    for values in (*chosen.values(), usual(further, 1000, [(64, 80)], 8)):
        settings_of(train_captioner, {**given, **values}, {})
