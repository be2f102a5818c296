"""A card says how the parts got their weights, its examples run as they stand, and its sections can be replaced."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from hubgen.hub.card import (
    CURVE_ROWS,
    HERE,
    UNCONDITIONAL,
    About,
    adapter_card,
    draw_curve,
    markdown_curve,
    pipeline_card,
    replace_section,
)
from hubgen.hub.publish import prepare
from hubgen.hub.records import TrainingRecord, describe_data, repository
from tests import models
from tests.hub.loopback import WITHOUT_HUBGEN, environment_of, loopback_hub

RECORD = TrainingRecord(
    script="hubgen.training.train_text_to_image",
    settings={
        "base": {"model": "owner/base"},
        "data": {"source": "owner/pictures"},
        "learning_rate": 0.001,
        "backbone": None,
        "prompts": ["a café"],
    },
    data={
        "pictures": 1730,
        "fingerprint": "ab",
        "sources": [{"from": "npm art 1.0", "license": "MIT"}],
        "language": "en",
    },
    curve=[{"step": step, "loss": 1.0 / step, "held_out_loss": 2.0 / step} for step in range(1, 101)],
)
COMPONENTS = {"transformer": ("SD3Transformer2DModel", 6_536_208)}
ABOUT = About(title="emoji", summary="Draws emoji.", licence="apache-2.0")


def metadata(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def test_a_record_survives_saving_and_loading(tmp_path: Path) -> None:
    assert TrainingRecord.load(tmp_path) is None
    RECORD.save(tmp_path)
    assert TrainingRecord.load(tmp_path) == RECORD


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "training.json").write_text('{"script": "x"}')
    with pytest.raises(ValueError, match=r"training\.json"):
        TrainingRecord.load(tmp_path)


def test_metadata_are_what_is_known_and_nothing_else() -> None:
    about = dataclasses.replace(ABOUT, samples={"sample-0.png": "a café", "sample-1.png": "a red cat"})
    found = metadata(pipeline_card(about, COMPONENTS, {"transformer": RECORD, "vae": None}))
    assert found == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "license": "apache-2.0",
        "language": ["en"],
        "base_model": ["owner/base"],
        "base_model_relation": "finetune",
        "datasets": ["owner/pictures"],
        "tags": ["hubgen", "text-to-image", "diffusers"],
        "widget": [
            {"text": "a café", "output": {"url": "sample-0.png"}},
            {"text": "a red cat", "output": {"url": "sample-1.png"}},
        ],
    }
    local = dataclasses.replace(RECORD, settings={"base": {"model": "base"}, "data": {"source": "pictures"}}, data={})
    local = dataclasses.replace(local, data={"pictures": 3})
    bare = metadata(
        pipeline_card(About(title="x", summary=""), COMPONENTS, {"transformer": local}, usage=UNCONDITIONAL)
    )
    assert bare.keys() == {"library_name", "pipeline_tag", "tags"}
    assert [repository(name) for name in ("a/b", "./b", "/b", "b", "a/b/c", None)] == ["a/b", *[None] * 5]


def test_the_card_states_data_settings_figures_and_shows_its_pictures() -> None:
    about = dataclasses.replace(ABOUT, samples={"sample-0.png": "a café"}, curves={"transformer": "curve.png"})
    card = pipeline_card(about, COMPONENTS, {"transformer": RECORD, "vae": None})
    assert "npm art 1.0 (MIT)" in card and "1,730 pictures" in card and "6,536,208" in card
    settings = yaml.safe_load(card.split("```yaml")[1].split("```")[0])
    assert settings == {key: value for key, value in RECORD.settings.items() if value is not None}
    assert "Not recorded." in card and "<Gallery />" in card and "](curve.png)" in card
    assert "Held out loss after 100 steps: 0.02." in card
    assert "<Gallery />" not in pipeline_card(ABOUT, COMPONENTS, {})


def test_an_adapters_card_names_its_base_and_its_trigger() -> None:
    card = adapter_card(
        ABOUT, RECORD, base_model="owner/base", pipeline="TextToImagePipeline", parameters=12, trigger="a sks frog"
    )
    found = metadata(card)
    assert found["base_model_relation"] == "adapter" and found["instance_prompt"] == "a sks frog"
    assert 'from_pretrained("owner/base")' in card and f'load_lora_weights("{HERE}")' in card


def test_a_long_curve_is_thinned_to_a_table_that_keeps_both_ends_and_drawn_whole(tmp_path: Path) -> None:
    header, _, *rows = markdown_curve(RECORD.curve)
    assert header == "| step | loss | held out loss |" and len(rows) == CURVE_ROWS
    assert rows[0] == "| 1 | 1 | 2 |" and rows[-1] == "| 100 | 0.01 | 0.02 |"
    assert draw_curve(RECORD.curve, tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as drawn:
        assert drawn.size == (840, 420) and len(drawn.convert("RGB").getcolors(1 << 20) or []) > 10
    assert not draw_curve(RECORD.curve[:1], tmp_path / "none.png") and not (tmp_path / "none.png").exists()


def test_the_examples_of_a_published_card_run_as_they_stand(tmp_path: Path) -> None:
    """With quotes in title and prompt; the second one where hubgen is not installed."""
    folder = tmp_path / "model"
    pipe = models.pipeline()
    pipe.register_to_config(default_num_inference_steps=2)
    pipe.save_pretrained(folder)
    title, prompt = 'my "best"\nmodel \\ one', 'a "red" cat\'s \\ café'
    about = About(title=title, summary="Draws.", licence="mit", samples={"sample-0.png": prompt})
    (folder / "README.md").write_text(pipeline_card(about, COMPONENTS, {}), encoding="utf-8")
    shipment = prepare(folder, "tester/model")
    card = shipment.made["README.md"].decode()
    assert HERE not in card and '# my "best" model \\ one\n' in card
    assert ModelCard(card).data.widget[0]["text"] == prompt
    examples = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(examples) == 2
    with loopback_hub() as hub:
        hub.add("tester/model", folder)
        hub.repos["tester/model"].update(shipment.made)
        environment = environment_of(hub, tmp_path / "home")
        for number, (head, example) in enumerate(zip(("", WITHOUT_HUBGEN), examples, strict=True)):
            place = tmp_path / str(number)
            place.mkdir()
            command = [sys.executable, "-c", head + example]
            done = subprocess.run(command, env=environment, cwd=place, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-2000:]
            with Image.open(place / "picture.png") as picture:
                assert picture.size == (16, 16)


def test_replacing_a_section_changes_nothing_else_and_can_be_repeated(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(pipeline_card(ABOUT, COMPONENTS, {}))
    before = path.read_text()
    replace_section(path, "measured", r"50 % \1")
    assert path.read_text() == before.replace("Not measured yet.", r"50 % \1")
    replace_section(path, "measured", "Not measured yet.")
    assert path.read_text() == before
    with pytest.raises(ValueError, match="<!-- nothing -->"):
        replace_section(path, "nothing", "")


def test_data_is_described_with_its_sources_where_the_folder_names_them(tmp_path: Path) -> None:
    assert describe_data(tmp_path, 3, "f") == {"pictures": 3, "fingerprint": "f"}
    build = {"sources": [{"from": "npm a", "license": "MIT", "sha512": "x"}], "language": "en"}
    (tmp_path / "build.json").write_text(json.dumps(build))
    described = describe_data(tmp_path, 3, "f")
    assert described["sources"] == [{"from": "npm a", "license": "MIT"}] and described["language"] == "en"
