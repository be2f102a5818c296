"""A network that is sharded over two processes is saved whole, and restored on two as on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hubgen.training.kit.checkpoints import Checkpoints

CODE = """
import sys, torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from hubgen.training.kit.checkpoints import Checkpoints
from hubgen.training.kit.ema import ExponentialMovingAverage

folder, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
torch.manual_seed(0 if first == 0 else 100 + rank)
model = nn.Sequential(nn.Linear(5, 7), nn.SiLU(), nn.Linear(7, 3))
mesh = init_device_mesh("cpu", (2,))
for layer in (model[0], model[2]):
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
ema = ExponentialMovingAverage(model, decay=0.9)
checkpoints = Checkpoints(folder, identity={"a": 1}, writer=rank == 0)
parts = ({"model": model, "ema": ema}, {"adamw": optimizer})
restored = checkpoints.restore(*parts)
assert (restored[0] if restored else 0) == first, restored
for step in range(first, last):
    generator = torch.Generator().manual_seed(step)
    model(torch.randn(4, 5, generator=generator)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    ema.update(model)
checkpoints.save(last, *parts, {"note": 1})
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def run(folder: Path, script: Path, first: int, last: int) -> None:
    code = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*code, str(script), str(folder), str(first), str(last)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def state(folder: Path, step: int) -> dict[str, torch.Tensor]:
    files = sorted((folder / "checkpoints" / f"step-{step:08d}").glob("*.safetensors"))
    return {f"{file.name}/{key}": value for file in files for key, value in load_file(file).items()}


@pytest.mark.slow
def test_sharded_weights_and_moments_are_saved_whole_and_restored(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(CODE)
    run(tmp_path / "whole", script, 0, 6)
    run(tmp_path / "parts", script, 0, 3)
    run(tmp_path / "parts", script, 3, 6)
    whole, parts = state(tmp_path / "whole", 6), state(tmp_path / "parts", 6)
    assert whole.keys() == parts.keys() and len(whole) == 4 + 5 + 12
    assert [key for key in whole if not torch.equal(whole[key], parts[key])] == []

    # The same file on one process, without any sharding.
    model = nn.Sequential(nn.Linear(5, 7), nn.SiLU(), nn.Linear(7, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    folder = tmp_path / "parts" / "checkpoints" / "step-00000006"
    (folder / "ema.safetensors").unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]["ema.safetensors"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    checkpoints = Checkpoints(tmp_path / "parts", identity={"a": 1})
    assert checkpoints.restore({"model": model}, {"adamw": optimizer}) == (6, {"note": 1})
    assert all(torch.equal(value, whole[f"model.safetensors/{key}"]) for key, value in model.state_dict().items())
    moments = optimizer.state_dict()["state"]
    names = [key for key in whole if key.startswith("optimizer.adamw") and key.endswith("exp_avg")]
    assert len(names) == len(moments) == 4
    for name in names:
        number = int(name.rpartition("state.")[2].split(".")[0])
        assert torch.equal(whole[name], moments[number]["exp_avg"])
