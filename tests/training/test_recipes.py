"""Every recipe is one that its script takes."""

import importlib
from pathlib import Path

import pytest
import yaml

import hubgen.training
from hubgen.training.kit.parse import parse_settings

RECIPES = sorted((Path(hubgen.training.__file__).parent / "recipes").glob("*.yaml"))
SCRIPTS = {
    "autoencoder": "train_autoencoder",
    "text-to-image": "train_text_to_image",
    "class-to-image": "train_class_to_image",
    "unconditional": "train_unconditional",
    "lora": "train_lora",
    "dreambooth": "train_dreambooth",
    "controlnet": "train_controlnet",
    "ip-adapter": "train_ip_adapter",
    "instruct-pix2pix": "train_instruct_pix2pix",
    "captioner": "train_captioner",
}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_is_settings_of_the_script_that_its_name_begins_with(recipe: Path) -> None:
    (script,) = (script for prefix, script in SCRIPTS.items() if recipe.name.startswith(prefix))
    module = importlib.import_module(f"hubgen.training.{script}")
    more = ["--instance.prompt", "a sks cat"] if script == "train_dreambooth" else []
    required = ["--data.source", "data", "--run.output_dir", "run", *more]
    parse_settings(module.Settings, ["--config", str(recipe), *required])
    assert f"hubgen.training.{script}" in recipe.read_text() and f"training/recipes/{recipe.name}" in recipe.read_text()


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 16


FROM_SCRATCH = [recipe for recipe in RECIPES if "backbone_config" in yaml.safe_load(recipe.read_text()).get("base", {})]


@pytest.mark.parametrize("recipe", FROM_SCRATCH, ids=lambda recipe: recipe.stem)
def test_the_network_of_a_recipe_can_be_built(recipe: Path, tmp_path: Path) -> None:
    """From scratch, on a tiny autoencoder and text encoder: what a config gets wrong shows here."""
    from hubgen.training.kit import bases
    from hubgen.training.kit.objectives import objective_from, sampler_of
    from tests import models

    (script,) = (script for prefix, script in SCRIPTS.items() if recipe.name.startswith(prefix))
    models.vae(latent_channels=16).save_pretrained(tmp_path / "vae")
    models.tokenizer(max_length=32).save_pretrained(tmp_path / "text")
    models.text_encoder().save_pretrained(tmp_path / "text")
    module = importlib.import_module(f"hubgen.training.{script}")
    arguments = ["--config", str(recipe), "--data.source", "data", "--run.output_dir", "run"]
    if script != "train_unconditional":
        arguments += ["--base.autoencoder", str(tmp_path / "vae")]
    if script == "train_text_to_image":
        arguments += ["--base.text_encoder", str(tmp_path / "text")]
    s = parse_settings(module.Settings, arguments)
    if script == "train_text_to_image":
        pipe = bases.text_to_image(s.base, s.validation, s.data.size)
    elif script == "train_class_to_image":
        start = bases.ClassToImageStart(s.base, s.data.size)
        pipe = start.pipeline(s.objective, s.validation, s.data.size, ["a", "b"])
    else:
        pipe = bases.unconditional(s.base, s.validation, s.data.size)
        sampler_of(s.objective, objective_from(s.objective)).set_timesteps(s.validation.inference_steps)
    backbone = pipe.unet if pipe.unet is not None else pipe.transformer
    assert sum(parameter.numel() for parameter in backbone.parameters()) > 1e6
