"""What a run sends to the Hub, by the real client against a Hub on the loopback address."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.hub.loopback import Hub, loopback_hub

pytestmark = pytest.mark.slow
REPO = "tester/trained"


def train(recipe: dict[str, Any], folder: Path, hub: Hub) -> subprocess.CompletedProcess[str]:
    """The client reads the Hub's address when it is imported, so each run is a process of its own."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "home"),
        "HF_TOKEN": "hf_test",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-m", "hubgen.training.train_text_to_image", "--config", str(path)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


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
        assert json.loads(sent["model_index.json"])["_class_name"] == "TextToImagePipeline"
    # The Hub is gone now: the run is trained and written, and says what is missing.
    done = train(recipe | {"run.output_dir": str(tmp_path / "other")}, tmp_path, hub)
    assert done.returncode == 4 and (tmp_path / "other" / "pipeline" / "model_index.json").is_file()
    last = done.stderr.strip().splitlines()[-1]
    assert (
        f"`hf upload {REPO} {tmp_path / 'other' / 'pipeline'}` tries again" in last and "Traceback" not in done.stderr
    )


def test_a_run_begins_from_a_model_on_the_hub(recipe: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    own = {name: value for name, value in recipe.items() if not name.startswith("base.")}
    with loopback_hub() as hub:
        hub.add("tester/base", tiny_model)
        done = train(own | {"base.model": "tester/base", "run.max_train_steps": 1}, tmp_path, hub)
        assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "run" / "pipeline" / "transformer" / "training.json").read_text())
    assert record["settings"]["base"]["model"] == "tester/base"
