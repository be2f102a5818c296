"""What a run sends to the Hub, by the real client against a Hub on the loopback address."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import hubgen
from hubgen.hub.bundled import bundled_model
from hubgen.training import train_text_to_image
from hubgen.training.kit.parse import SettingsError, parse_settings
from tests.hub.loopback import Hub, environment_of, loopback_hub

pytestmark = pytest.mark.slow
REPO = "tester/trained"


def train(
    recipe: dict[str, Any], folder: Path, hub: Hub, script: str = "train_text_to_image"
) -> subprocess.CompletedProcess[str]:
    """The client reads the Hub's address when it is imported, so each run is a process of its own."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", f"hubgen.training.{script}", "--config", str(path)]
    return subprocess.run(
        command, env=environment_of(hub, folder / "home"), capture_output=True, text=True, timeout=300
    )


def test_a_trained_pipeline_is_sent_and_a_failure_names_the_command_that_tries_again(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe |= {"run.max_train_steps": 2, "publish.push_to_hub": REPO, "publish.license": "apache-2.0"}
    folder = Path(recipe["run.output_dir"]) / "pipeline"
    with loopback_hub() as hub:
        done = train(recipe, tmp_path, hub)
        assert done.returncode == 0, done.stderr[-3000:]
        sent = hub.repos[REPO]
        assert {name for name in sent if name != ".gitattributes"} == {
            path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
        }
        assert b"license: apache-2.0" in sent["README.md"]
        assert json.loads(sent["model_index.json"])["_class_name"] == ["hubgen_text_to_image", "TextToImagePipeline"]
    # The Hub is gone now: the run is trained and written, and says what is missing.
    done = train(recipe | {"run.output_dir": str(tmp_path / "other")}, tmp_path, hub)
    assert done.returncode == 4 and (tmp_path / "other" / "pipeline" / "model_index.json").is_file()
    last = done.stderr.strip().splitlines()[-1]
    again = f"`hubgen publish {tmp_path / 'other' / 'pipeline'} {REPO}` tries again"
    assert again in last and "Traceback" not in done.stderr


def test_a_run_begins_from_a_model_on_the_hub(recipe: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    own = {name: value for name, value in recipe.items() if not name.startswith("base.")}
    with loopback_hub() as hub:
        hub.add("tester/base", tiny_model)
        done = train(own | {"base.model": "tester/base", "run.max_train_steps": 1}, tmp_path, hub)
        assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "run" / "pipeline" / "transformer" / "training.json").read_text())
    assert record["settings"]["base"]["model"] == "tester/base"


IN_HUBGEN = """
import sys
import hubgen, numpy as np, torch
pipe = hubgen.TextToImagePipeline.from_pretrained(sys.argv[1], torch_dtype=torch.float32)
pipe.load_lora_weights(sys.argv[2])
with torch.no_grad():
    words, nothing = (pipe.condition.encode([text]) for text in ("red apple", ""))
embeddings = {
    "prompt_embeds": words.tokens,
    "pooled_prompt_embeds": words.pooled,
    "negative_prompt_embeds": nothing.tokens,
    "negative_pooled_prompt_embeds": nothing.pooled,
}
options = dict(num_inference_steps=4, guidance_scale=4.0, height=64, width=64, output_type="np")
images = pipe("red apple", generator=torch.Generator().manual_seed(0), **options).images
np.savez(sys.argv[3], images=images, **embeddings)
"""
# The model's text encoder is no CLIP, so diffusers' pipeline is given what it said.
IN_DIFFUSERS = """
import sys
import diffusers, numpy as np, torch
folder, repo, embeddings, out = sys.argv[1:]
parts = {
    "transformer": diffusers.SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer"),
    "vae": diffusers.AutoencoderKL.from_pretrained(folder, subfolder="vae"),
}
parts = {name: part.float() for name, part in parts.items()}
scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
absent = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
pipe = diffusers.StableDiffusion3Pipeline(**parts, scheduler=scheduler, **dict.fromkeys(absent))
pipe.load_lora_weights(repo)
given = {name: torch.from_numpy(value) for name, value in np.load(embeddings).items() if name != "images"}
options = dict(num_inference_steps=4, guidance_scale=4.0, height=64, width=64, output_type="np")
np.save(out, pipe(**given, generator=torch.Generator().manual_seed(0), **options).images)
assert "hubgen" not in sys.modules
"""


def test_an_adapter_of_the_bundled_model_goes_round_the_world(problem: dict[str, str], tmp_path: Path) -> None:
    """Trained, sent with its card and pictures, and loaded by its name in hubgen and in diffusers: the same picture."""
    settings = {
        "data.source": problem["data.source"],
        "data.size": 64,
        "data.upscale": True,
        "run.output_dir": str(tmp_path / "red"),
        "run.max_train_steps": 3,
        "run.batch_size": 2,
        "run.report_to": "none",
        "adapter.alpha": 40,
        "optim.learning_rate": 0.003,
        "validation.prompts": ["red apple"],
        "validation.inference_steps": 2,
        "publish.push_to_hub": "tester/red",
        "publish.license": "apache-2.0",
        "publish.dtype": "float32",
    }
    ours, theirs = tmp_path / "ours.npz", tmp_path / "theirs.npy"
    with loopback_hub() as hub:
        done = train(settings, tmp_path, hub, "train_lora")
        assert done.returncode == 0, done.stderr[-3000:]
        sent = {name for name in hub.repos["tester/red"] if name != ".gitattributes"}
        pictures = {"before.png", "after.png", "sample-0.png"}
        assert sent == {"README.md", "pytorch_lora_weights.safetensors", "training.json", *pictures}
        assert b'pipe.load_lora_weights("tester/red")' in hub.repos["tester/red"]["README.md"]
        for code, files in ((IN_HUBGEN, [ours]), (IN_DIFFUSERS, [ours, theirs])):
            command = [sys.executable, "-c", code, str(bundled_model()), "tester/red", *map(str, files)]
            drawn = subprocess.run(command, env=environment_of(hub, tmp_path / "home"), capture_output=True, text=True)
            assert drawn.returncode == 0, drawn.stderr[-3000:]
    np.testing.assert_allclose(np.load(theirs), np.load(ours)["images"], atol=1e-4)
    plain = hubgen.TextToImagePipeline.from_pretrained(bundled_model()).to(dtype=torch.float32)
    options: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 4.0, "height": 64, "width": 64}
    base = plain("red apple", generator=torch.Generator().manual_seed(0), output_type="np", **options).images
    assert np.abs(base - np.load(theirs)).max() > 1e-2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"publish.push_to_hub": "red"}, "repository 'red': expected owner/name"),
        ({"publish.license": None}, "setting 'publish.license': names no licence, expected `license: apache-2.0`"),
        ({"publish.license": "apache"}, "setting 'publish.license': got the licence 'apache'"),
        ({"publish.license": "other"}, "setting 'publish.license': got the licence other without `license_name`"),
        ({}, "repository tester/red: no token of the Hub here"),
    ],
)
def test_what_could_not_be_sent_is_said_before_anything_is_trained(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    if changes:
        monkeypatch.setenv("HF_TOKEN", "hf_test")
    else:
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr("hubgen.hub.publish.get_token", lambda: None)
    settings = recipe | {"publish.push_to_hub": "tester/red", "publish.license": "mit"} | changes
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    with pytest.raises(SettingsError) as error:
        train_text_to_image.main(parse_settings(train_text_to_image.Settings, ["--config", str(path)]))
    assert message in str(error.value)
    assert not (Path(settings["run.output_dir"]) / "checkpoints").exists()
