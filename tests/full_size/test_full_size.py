"""Published networks at full size: a checkpoint that diffusers wrote computes in hubgen what it computes there.

    python -m pytest -m full_size tests/full_size

One network at a time; SDXL's takes 11 GB of memory and of the temporary folder, and about two minutes on two cores.
What it shows is stored in `results.json`, see report.py. The same with fewer channels runs with all other tests
(tests/backbones/test_reduced.py).
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.full_size.cases import CASES
from tests.full_size.report import store
from tests.full_size.sides import error

ROOT = Path(__file__).parent.parent.parent
TOLERANCE = 1e-4


def run(side: str, name: str, folder: Path) -> dict[str, Any]:
    """`sides.run` in a process of its own."""
    command = [sys.executable, "-m", "tests.full_size.sides", side, name, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.full_size
@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_of_diffusers_computes_the_same_in_hubgen(name: str, tmp_path: Path) -> None:
    sides = {side: run(side, name, tmp_path) for side in ("diffusers", "hubgen")}
    computed = {side.pop("parameters") for side in sides.values()}
    assert len(computed) == 1
    difference = error(*(load_file(tmp_path / f"{side}.safetensors") for side in ("hubgen", "diffusers")))
    for weights in (tmp_path / "model").iterdir():
        weights.unlink()  # the temporary folders of several runs are kept, and these are large
    row = {"parameters": CASES[name].parameters, "computed_parameters": computed.pop(), "error": difference}
    store(name, {**row, **sides})
    assert difference < TOLERANCE
