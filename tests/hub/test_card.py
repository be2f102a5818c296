"""A card says how the parts got their weights, and its sections can be replaced."""

from pathlib import Path

import pytest
import yaml

from hubgen.hub.card import (
    CURVE_ROWS,
    TrainingRecord,
    describe_data,
    markdown_curve,
    pipeline_card,
    replace_section,
)

RECORD = TrainingRecord(
    script="hubgen.training.train_text_to_image",
    settings={"learning_rate": 0.001, "pretrained_backbone": None, "validation_prompts": ["a café"]},
    data={"pictures": 1730, "fingerprint": "ab", "sources": [{"from": "npm art 1.0", "license": "MIT"}]},
    curve=[{"step": step, "loss": 1.0 / step} for step in range(1, 101)],
)
COMPONENTS = {"transformer": ("SD3Transformer2DModel", 6_536_208)}


def test_a_record_survives_saving_and_loading(tmp_path: Path) -> None:
    assert TrainingRecord.load(tmp_path) is None
    RECORD.save(tmp_path)
    assert TrainingRecord.load(tmp_path) == RECORD


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "training.json").write_text('{"script": "x"}')
    with pytest.raises(ValueError, match=r"training\.json"):
        TrainingRecord.load(tmp_path)


def test_the_card_has_metadata_that_the_hub_reads_and_states_data_and_settings() -> None:
    card = pipeline_card(
        "emoji", "Draws emoji.", COMPONENTS, {"transformer": RECORD, "vae": None}, licence="apache-2.0"
    )
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["library_name"] == "diffusers" and metadata["pipeline_tag"] == "text-to-image"
    assert metadata["license"] == "apache-2.0"
    assert "npm art 1.0 (MIT)" in card and "1,730 pictures" in card and "6,536,208" in card
    settings = yaml.safe_load(card.split("```yaml")[1].split("```")[0])
    assert settings == {"learning_rate": 0.001, "validation_prompts": ["a café"]}
    assert "Not recorded." in card


def test_a_long_curve_is_thinned_to_a_table_that_keeps_both_ends() -> None:
    header, _, *rows = markdown_curve(RECORD.curve)
    assert header == "| step | loss |" and len(rows) == CURVE_ROWS
    assert rows[0] == "| 1 | 1 |" and rows[-1] == "| 100 | 0.01 |"


def test_replacing_a_section_changes_nothing_else_and_can_be_repeated(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(pipeline_card("emoji", "Draws emoji.", COMPONENTS, {"transformer": RECORD}))
    before = path.read_text()
    replace_section(path, "measured", r"50 % \1")
    assert path.read_text() == before.replace("Not measured yet.", r"50 % \1")
    replace_section(path, "measured", "Not measured yet.")
    assert path.read_text() == before
    with pytest.raises(ValueError, match="<!-- nothing -->"):
        replace_section(path, "nothing", "")


def test_data_is_described_with_its_sources_where_the_folder_names_them(tmp_path: Path) -> None:
    assert describe_data(tmp_path, 3, "f") == {"pictures": 3, "fingerprint": "f"}
    (tmp_path / "build.json").write_text('{"sources": [{"from": "npm a", "license": "MIT", "sha512": "x"}]}')
    assert describe_data(tmp_path, 3, "f")["sources"] == [{"from": "npm a", "license": "MIT"}]
