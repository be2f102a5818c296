"""Two processes train one model, over gloo as on any machine without a GPU."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

pytestmark = pytest.mark.slow


def start(recipe: dict[str, Any], folder: Path, processes: int = 2) -> subprocess.Popen[str]:
    path = folder / f"{Path(recipe['output_dir']).name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    code = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    code += ["-m", "hubgen.training.train_text_to_image", "--config", str(path)]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(code, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env)


def finish(process: subprocess.Popen[str]) -> None:
    _, message = process.communicate(timeout=600)
    assert process.returncode == 0, message


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*"))


def weights(run: Path) -> dict[str, torch.Tensor]:
    files = sorted(newest(run).glob("*.safetensors"))
    return {f"{file.name}/{key}": value for file in files for key, value in load_file(file).items()}


def test_a_run_of_two_processes_that_was_stopped_goes_on_bit_for_bit(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe |= {"run.max_train_steps": 30, "run.batch_size": 2, "run.checkpoint_steps": 3}
    run, whole = Path(recipe["run.output_dir"]), tmp_path / "whole"
    finish(start(recipe | {"run.output_dir": str(whole), "run.checkpoint_steps": 1000}, tmp_path))
    identity = json.loads((newest(whole) / "state.json").read_text())["identity"]
    assert identity["num_processes"] == 2

    process = start(recipe, tmp_path)
    while not list((run / "checkpoints").glob("step-*")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=600)
    assert newest(run).name < newest(whole).name, "it was done before it was stopped"

    finish(start(recipe, tmp_path))
    found, expected = weights(run), weights(whole)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_each_process_takes_pictures_of_its_own_and_both_learn_from_all(recipe: dict[str, Any], tmp_path: Path) -> None:
    """One process on the first one's pictures alone ends elsewhere."""
    ends = []
    for processes in (1, 2):
        output = tmp_path / str(processes)
        changes = {
            "run.output_dir": str(output),
            "run.batch_size": 2,
            "run.max_train_steps": 2,
            "run.checkpoint_steps": 2,
        }
        finish(start(recipe | changes, tmp_path, processes))
        ends.append(weights(output))
    assert any(not torch.equal(value, ends[0][key]) for key, value in ends[1].items())
