"""Official folders load as in diffusers; a broken one raises before its first weight is read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import hubgen
from hubgen.formats.loading import StrictModelMixin, on_meta
from tests.parity import randomize_

WEIGHTS = "diffusion_pytorch_model.safetensors"
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
LEVELS = {"block_out_channels": (8, 16), "norm_num_groups": 4}
WITH_OLD_ATTENTION: dict[str, dict[str, Any]] = {
    "AutoencoderKL": {
        **LEVELS,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    },
    "VQModel": {
        **LEVELS,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    },
    "UNet2DModel": {
        **LEVELS,
        "sample_size": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": None,
    },
}


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", WITH_OLD_ATTENTION)
@pytest.mark.parametrize("convolutions", [False, True], ids=["linear", "convolution"])
def test_files_of_before_2023_load_as_in_diffusers(name: str, convolutions: bool, tmp_path: Path) -> None:
    """As Stable Diffusion 1's autoencoder and the DDPM models are published: attention under its old names."""
    model = randomize_(getattr(diffusers, name)(**WITH_OLD_ATTENTION[name]))
    model.save_pretrained(tmp_path)
    tensors = {}
    for key, value in load_file(tmp_path / WEIGHTS).items():
        now = next((now for now in OLD if f"attentions.0.{now}." in key or f"attentions.1.{now}." in key), None)
        if now is not None:
            key = key.replace(f".{now}.", f".{OLD[now]}.")
            if convolutions and value.ndim == 2:
                value = value[:, :, None, None]
        tensors[key] = value.contiguous()
    assert any(".query." in key for key in tensors)
    save_file(tensors, tmp_path / WEIGHTS)
    assert same(getattr(hubgen, name).from_pretrained(tmp_path), model)
    if not convolutions:
        assert same(getattr(diffusers, name).from_pretrained(tmp_path), model)


@pytest.mark.parametrize(
    "name", [name for name, home in hubgen.HOMES.items() if name.endswith("Model") or name == "AutoencoderKL"]
)
def test_every_model_is_loaded_strictly_and_can_be_checked_without_memory(name: str) -> None:
    cls = getattr(hubgen, name)
    assert issubclass(cls, StrictModelMixin)
    needed = {"UNet2DModel": {"sample_size": 32}, "ControlNetUnionModel": {"addition_time_embed_dim": 256}}
    config: dict[str, Any] = needed.get(name, {})
    model = on_meta(cls, config, dict.fromkeys(map(str, range(1000)), torch.empty(0)), "config.json")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def spoil(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def truncate_text_encoder(folder: Path) -> None:
    spoil(folder / "text_encoder" / "model.safetensors", lambda data: data[:-1])


def lead_text_encoder_elsewhere(folder: Path) -> None:
    part = folder / "text_encoder_3"
    (part / "model.safetensors").rename(folder / "model.safetensors")
    index = {"metadata": {}, "weight_map": {"shared.weight": "../model.safetensors"}}
    (part / "model.safetensors.index.json").write_text(json.dumps(index))


def pickle_text_encoder(folder: Path) -> None:
    (folder / "text_encoder_2" / "model.safetensors").rename(folder / "text_encoder_2" / "pytorch_model.bin")


def lose_a_key(folder: Path) -> None:
    tensors = load_file(folder / "vae" / WEIGHTS)
    del tensors["decoder.conv_in.bias"]
    save_file(tensors, folder / "vae" / WEIGHTS)


def ask_for_more_layers(folder: Path) -> None:
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_layers": 4}))


def remove_component(folder: Path) -> None:
    shutil.rmtree(folder / "vae")


def remove_weights(folder: Path) -> None:
    (folder / "vae" / WEIGHTS).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate_text_encoder, "text_encoder/model.safetensors: the file is truncated"),
        (lead_text_encoder_elsewhere, "text_encoder_3/.*index.json: weight_map names '../model.safetensors'"),
        (pickle_text_encoder, "text_encoder_2: only pickled weights"),
        (lose_a_key, "vae/.*1 tensors missing:\\s+decoder.conv_in.bias"),
        (ask_for_more_layers, "transformer/.*tensors missing:.*transformer_blocks.3"),
        (remove_component, "vae: no such folder"),
        (remove_weights, "vae: no diffusion_pytorch_model.safetensors"),
    ],
)
def test_one_broken_component_stops_a_pipeline_before_any_loads(
    damage: Callable[[Path], None],
    message: str,
    official: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = Path(shutil.copytree(official("sd3"), tmp_path / "sd3"))
    damage(folder)
    for cls in (hubgen.AutoencoderKL, hubgen.SD3Transformer2DModel):
        monkeypatch.setattr(cls, "from_pretrained", lambda *_, **__: pytest.fail("a component was loaded"))
    with pytest.raises((ValueError, FileNotFoundError), match=f"(?s){message}"):
        hubgen.TextToImagePipeline.from_pretrained(folder)


def test_a_component_that_is_handed_over_is_not_looked_for(official: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(official("sd3"), tmp_path / "sd3"))
    vae = hubgen.AutoencoderKL.from_pretrained(folder / "vae")
    remove_component(folder)
    assert hubgen.TextToImagePipeline.from_pretrained(folder, vae=vae).vae is vae


def test_a_variant_is_checked_where_a_component_has_it(official: Callable[[str], Path], tmp_path: Path) -> None:
    pipe = hubgen.TextToImagePipeline.from_pretrained(official("sd1"))
    pipe.to(torch.float16).save_pretrained(tmp_path / "fp16", variant="fp16")
    loaded = hubgen.TextToImagePipeline.from_pretrained(tmp_path / "fp16", variant="fp16", torch_dtype=torch.float16)
    assert same(loaded.unet, pipe.unet)
    spoil(tmp_path / "fp16" / "vae" / "diffusion_pytorch_model.fp16.safetensors", lambda data: data[:-1])
    with pytest.raises(ValueError, match="vae/diffusion_pytorch_model.fp16.safetensors: the file is truncated"):
        hubgen.TextToImagePipeline.from_pretrained(tmp_path / "fp16", variant="fp16")
    with pytest.raises(FileNotFoundError, match="no model.safetensors .*variant='fp16'"):
        hubgen.TextToImagePipeline.from_pretrained(tmp_path / "fp16")
