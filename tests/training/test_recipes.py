"""Every recipe is one that its script takes."""

import importlib
from pathlib import Path

import pytest

import hubgen.training
from hubgen.training.kit.parse import parse_settings

RECIPES = sorted((Path(hubgen.training.__file__).parent / "recipes").glob("*.yaml"))
SCRIPTS = {"autoencoder": "train_autoencoder", "text-to-image": "train_text_to_image"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_is_settings_of_the_script_that_its_name_begins_with(recipe: Path) -> None:
    (script,) = (script for prefix, script in SCRIPTS.items() if recipe.name.startswith(prefix))
    module = importlib.import_module(f"hubgen.training.{script}")
    parse_settings(module.Settings, ["--config", str(recipe), "--data.source", "data", "--run.output_dir", "run"])
    assert f"hubgen.training.{script}" in recipe.read_text() and f"training/recipes/{recipe.name}" in recipe.read_text()


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 2
