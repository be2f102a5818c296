"""Checkpoints on a Hub: only what is asked for comes, and nothing heavy before the config is found good.

The client reads the Hub's address when it is imported, so each test runs its code in a process of its own.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import hubgen
from tests.hub.loopback import Hub, loopback_hub

REPO = "tester/vaes"
ROOT = Path(__file__).parents[2]


def tiny() -> hubgen.AutoencoderKL:
    torch.manual_seed(0)
    return hubgen.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A repository with a variant, shards, a pickle, a broken config and a file in the original layout."""
    from safetensors.torch import save_file

    vae, folder = tiny(), tmp_path / "repo"
    vae.save_pretrained(folder / "vae")
    vae.save_pretrained(folder / "vae", variant="fp16")
    vae.save_pretrained(folder / "shards", max_shard_size=4000)
    for name in ("pickled", "wrong"):
        vae.save_config(folder / name)
    (folder / "pickled" / "diffusion_pytorch_model.bin").write_bytes(b"PK\x03\x04")
    config = json.loads((folder / "wrong" / "config.json").read_text())
    (folder / "wrong" / "config.json").write_text(json.dumps({**config, "layers_per_block": -1}))
    (folder / "wrong" / "diffusion_pytorch_model.safetensors").write_bytes(b"never fetched")
    save_file(vae.to_original(), folder / "original.safetensors")
    with loopback_hub() as hub:
        hub.add(REPO, folder)
        yield hub


def run(code: str, hub: Hub, home: Path) -> None:
    """Runs `code` in a process that knows only this Hub."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(ROOT),
    }
    head = f"repo = {REPO!r}\nimport pytest, torch, hubgen\nfrom hubgen import AutoencoderKL as VAE\n"
    head += "from tests.formats.test_hub import tiny\n"
    head += "same = lambda a, b: all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))\n"
    done = subprocess.run([sys.executable, "-c", head + code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_one_component_and_variant_is_fetched_checked_and_loaded(hub: Hub, tmp_path: Path) -> None:
    code = """
vae = VAE.from_pretrained(repo, subfolder="vae", variant="fp16", torch_dtype=torch.float16)
assert vae.dtype == torch.float16 and vae.config._name_or_path == repo
assert same(VAE.from_pretrained(repo, subfolder="shards"), tiny())
assert same(VAE.from_pretrained(repo, subfolder="shards", local_files_only=True), tiny())
with pytest.raises(FileNotFoundError):
    VAE.from_pretrained(repo, subfolder="shards", variant="fp16")
with pytest.raises(OSError, match="tester/none"):
    VAE.from_pretrained("tester/none")
with pytest.raises(FileNotFoundError, match="neither a folder nor"):
    VAE.from_pretrained("/no/such/folder")
url = f"https://huggingface.co/{repo}/blob/main/original.safetensors"
assert same(VAE.from_single_file(url, config={"norm_num_groups": 4}), tiny())
"""
    run(code, hub, tmp_path / "home")
    fetched = [path for request in hub.requests for kind, path in [request.split(" ", 1)] if kind == "GET"]
    weights = {path.split("/resolve/")[1].split("/", 1)[1] for path in fetched if path.endswith(".safetensors")}
    assert {name for name in weights if name.startswith("vae/")} == {"vae/diffusion_pytorch_model.fp16.safetensors"}


def test_what_is_refused_is_refused_before_weights_are_fetched(hub: Hub, tmp_path: Path) -> None:
    code = """
with pytest.raises(ValueError, match="only pickled weights.*diffusion_pytorch_model.bin"):
    VAE.from_pretrained(repo, subfolder="pickled")
with pytest.raises(ValueError, match="layers_per_block=-1"):
    VAE.from_pretrained(repo, subfolder="wrong")
with pytest.raises(ValueError, match="only safetensors"):
    VAE.from_single_file(f"https://huggingface.co/{repo}/blob/main/model.ckpt")
"""
    run(code, hub, tmp_path / "home")
    assert not any(request.endswith((".bin", ".ckpt", "model.safetensors")) for request in hub.requests)
