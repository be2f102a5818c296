"""Settings are strictly typed: what is unknown, missing or of another type is named."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from hubgen.training.kit.parse import FREE, Range, SettingsError, identity_of, parse_settings, settings_to_dict


@dataclass(frozen=True)
class Example:
    data_dir: Path
    """Folder of pictures."""

    learning_rate: Annotated[float, Range(0, open_minimum=True)] = 1e-4
    """Peak learning rate, 100% of it."""

    warmup_steps: int | None = None
    """Steps of warm-up."""

    mixed_precision: Literal["no", "bf16"] = "no"
    """Precision."""

    gradient_checkpointing: bool = False
    """Recompute activations."""

    betas: tuple[float, float] = (0.9, 0.99)
    """Decay rates."""

    prompts: tuple[str, ...] = ()
    """Prompts."""

    widths: list[int] = field(default_factory=list)
    """Widths."""

    backbone_config: dict[str, Any] = field(default_factory=dict)
    """Arguments."""


def from_recipe(tmp_path: Path, text: str, *argv: str, cls: Any = Example) -> Any:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    return parse_settings(cls, ["--config", str(recipe), *argv])


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_the_defaults(tmp_path: Path) -> None:
    recipe = "data_dir: emoji\nlearning_rate: 1e-3\nprompts: [a cat, a dog]\nbackbone_config: {num_layers: 2}\n"
    settings = from_recipe(tmp_path, recipe, "--learning_rate", "2e-4", "--gradient_checkpointing")
    assert settings == Example(
        data_dir=Path("emoji"),
        learning_rate=2e-4,
        prompts=("a cat", "a dog"),
        gradient_checkpointing=True,
        backbone_config={"num_layers": 2},
    )


def test_a_number_without_a_dot_is_a_float_where_the_type_is_float(tmp_path: Path) -> None:
    # YAML 1.1 takes 1e-3 for a string.
    assert from_recipe(tmp_path, "data_dir: x\nlearning_rate: 1e-3").learning_rate == 1e-3
    assert from_recipe(tmp_path, "data_dir: x\nlearning_rate: 1").learning_rate == 1.0


@pytest.mark.parametrize("spelling", ["--mixed-precision", "--mixed_precision"])
def test_dashes_and_underscores_are_the_same(spelling: str) -> None:
    assert parse_settings(Example, ["--data_dir", "x", spelling, "bf16"]).mixed_precision == "bf16"


def test_lists_are_words_and_none_unsets(tmp_path: Path) -> None:
    words = ["--prompts", "a red cat", "two", "--widths", "32", "64", "--betas", "0.5", "0.9", "--warmup_steps", "none"]
    settings = from_recipe(tmp_path, "data_dir: x\nwarmup_steps: 5\n", *words)
    assert (settings.prompts, settings.widths, settings.betas) == (("a red cat", "two"), [32, 64], (0.5, 0.9))
    assert settings.warmup_steps is None


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("learning_rat: 1e-3", ["learning_rat", "did you mean 'learning_rate'"]),
        ("learning_rate: fast", ["learning_rate", "'fast'", "float above 0"]),
        ("learning_rate: 0", ["learning_rate", "got 0", "above 0"]),
        ("learning_rate: .nan", ["learning_rate", "nan"]),
        ("warmup_steps: 1.5", ["warmup_steps", "1.5", "int or none"]),
        ("warmup_steps: true", ["warmup_steps", "True"]),
        ("gradient_checkpointing: 1", ["gradient_checkpointing", "got 1 (int)", "bool"]),
        ("gradient_checkpointing: 'yes'", ["gradient_checkpointing", "'yes'"]),
        ("mixed_precision: fp8", ["mixed_precision", "'fp8'", "no, bf16"]),
        ("betas: [0.9]", ["betas", "[0.9]", "list of 2"]),
        ("prompts: a cat", ["prompts", "'a cat'", "list of str"]),
        ("prompts: [1]", ["prompts", "[1]", "list of str"]),
        ("widths: [1, x]", ["widths", "list of int"]),
        ("backbone_config: 3", ["backbone_config", "mapping"]),
        ("[1, 2]", ["got list", "mapping of setting to value"]),
        ("a: b: c", ["cannot be read as YAML"]),
    ],
)
def test_a_wrong_recipe_is_refused_with_key_found_and_expected(tmp_path: Path, line: str, named: list[str]) -> None:
    text = line if line.startswith("[") or line == "a: b: c" else f"data_dir: x\n{line}\n"
    with pytest.raises(SettingsError) as error:
        from_recipe(tmp_path, text)
    for part in [*named, "recipe.yaml"]:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--learning_rte", "1"], ["--learning_rte", "did you mean 'learning_rate'"]),
        (["--learning_rate"], ["learning_rate", "expected one argument"]),
        (["--learning_rate", "x"], ["learning_rate", "'x'", "float"]),
        (["stray"], ["stray"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml", "no such file"]),
        (["--gradient_checkpointing", "maybe"], ["gradient_checkpointing", "maybe"]),
    ],
)
def test_a_wrong_command_line_is_refused(argv: list[str], named: list[str]) -> None:
    with pytest.raises(SettingsError) as error:
        parse_settings(Example, ["--data_dir", "x", *argv])
    for part in named:
        assert part in str(error.value)


def test_a_missing_setting_is_named() -> None:
    with pytest.raises(SettingsError, match="'data_dir' is missing; expected path"):
        parse_settings(Example, [])


def test_help_shows_the_docstring_below_each_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_settings(Example, ["--help"], description="What it does.")
    shown = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert "What it does." in shown
    assert "Peak learning rate, 100% of it. [float above 0; default: 0.0001]" in shown
    assert "Folder of pictures. [path; required]" in shown


def test_settings_become_json_values() -> None:
    values = settings_to_dict(Example(data_dir=Path("x"), prompts=("a",)))
    assert values["data_dir"] == "x" and values["prompts"] == ["a"] and values["betas"] == [0.9, 0.99]


# ---- groups ----


@dataclass(frozen=True, kw_only=True)
class Optim:
    learning_rate: Annotated[float, Range(0)] = 1e-4
    """Peak learning rate."""

    betas: tuple[float, float] = (0.9, 0.99)


@dataclass(frozen=True, kw_only=True)
class Run:
    output_dir: Annotated[Path, FREE]
    """Where it goes."""

    seed: int = 0

    log_steps: Annotated[int, Range(1), FREE] = 50


@dataclass(frozen=True, kw_only=True)
class Validation:
    steps: int = 1000


@dataclass(frozen=True, kw_only=True)
class Grouped:
    optim: Optim = Optim(learning_rate=5e-4)
    run: Run
    validation: Annotated[Validation, FREE] = Validation()


grouped = partial(from_recipe, cls=Grouped)


def test_groups_are_mappings_in_a_recipe_and_dotted_on_the_command_line(tmp_path: Path) -> None:
    recipe = "optim:\n  betas: [0.5, 0.9]\nrun:\n  output_dir: x\n  seed: 3\nvalidation:\n"
    settings = grouped(tmp_path, recipe, "--run.seed", "4", "--run.log-steps", "7")
    assert settings == Grouped(
        optim=Optim(learning_rate=5e-4, betas=(0.5, 0.9)), run=Run(output_dir=Path("x"), seed=4, log_steps=7)
    )
    assert grouped(tmp_path, "run.output_dir: x\nrun: {seed: 1}").run.seed == 1


def test_what_is_free_is_no_part_of_the_identity() -> None:
    settings = Grouped(run=Run(output_dir=Path("x")))
    assert identity_of(settings) == {"optim": {"learning_rate": 5e-4, "betas": [0.9, 0.99]}, "run": {"seed": 0}}
    assert settings_to_dict(settings)["run"] == {"output_dir": "x", "seed": 0, "log_steps": 50}


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("learning_rate: 1e-3", ["unknown setting 'learning_rate'", "did you mean 'optim.learning_rate'"]),
        ("optim: {learning_rat: 1}", ["unknown setting 'optim.learning_rat'", "did you mean 'optim.learning_rate'"]),
        ("optimiser: {learning_rate: 1}", ["unknown setting 'optimiser'"]),
        ("optim: 3", ["'optim'", "got 3 (int)", "expected a mapping of its settings"]),
        ("validation: {seed: 1}", ["unknown setting 'validation.seed'", "did you mean 'run.seed'"]),
        ("run: {log_steps: 0}", ["'run.log_steps'", "int at least 1"]),
        ("run.seed: 1\nrun: {seed: 2}", ["'run.seed' stands twice"]),
    ],
)
def test_an_unknown_key_in_a_group_is_answered_with_the_nearest(tmp_path: Path, line: str, named: list[str]) -> None:
    with pytest.raises(SettingsError) as error:
        grouped(tmp_path, line, "--run.output_dir", "x")
    for part in [*named, "recipe.yaml"]:
        assert part in str(error.value)


def test_a_missing_setting_of_a_group_is_named() -> None:
    with pytest.raises(SettingsError, match=r"'run\.output_dir' is missing; expected path on the command line"):
        parse_settings(Grouped, [])
    with pytest.raises(SettingsError, match=r"unknown setting '--learning_rate' .*did you mean 'optim\.learning_rate'"):
        parse_settings(Grouped, ["--learning_rate", "1"])


def test_help_lists_the_groups(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_settings(Grouped, ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "Peak learning rate. [float at least 0; default: 0.0005]" in shown and "--run.output_dir" in shown
