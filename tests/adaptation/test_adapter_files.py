"""Adapters of every family and kind: a file of ours is the same picture in plain diffusers, and theirs is in ours."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file

import hubgen
from hubgen.adaptation.attach import holders

Official = Callable[[str], Path]
FAMILIES = ["sd1", "sd2", "sdxl", "sd3", "sd3.5", "flux-dev", "flux-schnell"]
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_v_proj"]
CONVOLUTIONS = [*ATTENTION, "conv1", "conv_shortcut", "proj_in", "x_embedder", "proj_out"]
KINDS: dict[str, dict[str, Any]] = {
    "alpha": {"r": 2, "lora_alpha": 3},
    "ranks by pattern": {"r": 2, "rank_pattern": {"to_q": 3, "to_out.0": 1}, "alpha_pattern": {"to_q": 1.5}},
    "rslora": {"r": 4, "lora_alpha": 2, "use_rslora": True},
    "dora": {"r": 2, "lora_alpha": 3, "use_dora": True},
    "convolutions": {"r": 2, "lora_alpha": 1, "target_modules": CONVOLUTIONS},
    "text encoders": {"r": 2, "lora_alpha": 1},
}
SOME = [("sd1", kind) for kind in KINDS] + [
    *((family, kind) for family in FAMILIES[1:] for kind in ("ranks by pattern", "text encoders")),
    *((family, "dora") for family in ("sdxl", "sd3", "flux-dev")),
]
CALL: dict[str, Any] = {
    "prompt": "a cat",
    "num_inference_steps": 2,
    "output_type": "np",
    "height": 32,
    "width": 32,
}


def opened(cls: Any, folder: Path) -> Any:
    pipe = cls.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe: Any) -> np.ndarray:
    return pipe(**CALL, generator=torch.Generator().manual_seed(0)).images


def adapt(pipe: Any, kind: str, seed: int = 0) -> None:
    """Puts random adapters on a pipeline by PEFT alone."""
    backbone = "unet" if getattr(pipe, "unet", None) is not None else "transformer"
    parts = [backbone]
    if kind == "text encoders":
        encoders = {name: getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2")}
        parts += [name for name, model in encoders.items() if "CLIP" in type(model).__name__]  # diffusers drops T5's
    for part in parts:
        targets = ATTENTION if part == backbone else ["q_proj", "fc1", "out_proj"]
        config = LoraConfig(init_lora_weights=False, **{"target_modules": targets, **KINDS[kind]})
        model = getattr(pipe, part)
        inject_adapter_in_model(config, model, "default_0")
        model._hf_peft_config_loaded = True
        for number, (_, module) in enumerate(holders(model, "default_0")):
            generator = torch.Generator().manual_seed(seed + number)
            for side in (module.lora_A, module.lora_B):
                weight = side["default_0"].weight.data
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)


IN_DIFFUSERS = """
import json, sys
import diffusers, numpy as np, torch
found = {}
for name, (folder, file) in json.load(open(sys.argv[1])).items():
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(file)
    found[name] = pipe(**json.loads(sys.argv[3]), generator=torch.Generator().manual_seed(0)).images
assert "hubgen" not in sys.modules
np.savez(sys.argv[2], **found)
"""


@pytest.fixture(scope="module")
def both(official: Official, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any, Path]]:
    """Of each family and kind the picture of ours with its adapter, that of diffusers with our file, and the file."""
    folder = tmp_path_factory.mktemp("adapters")
    ours, jobs = {}, {}
    for family, kind in SOME:
        name = f"{family}, {kind}"
        pipe = opened(hubgen.TextToImagePipeline, official(family))
        adapt(pipe, kind)
        pipe.save_adapter(folder / f"{name}.safetensors")
        ours[name] = picture(pipe)
        jobs[name] = (str(official(family)), str(folder / f"{name}.safetensors"))
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-c", IN_DIFFUSERS, folder / "jobs.json", folder / "theirs.npz", json.dumps(CALL)]
    subprocess.run([str(part) for part in command], check=True)
    theirs = np.load(folder / "theirs.npz")
    return {name: (ours[name], theirs[name], folder / f"{name}.safetensors") for name in ours}


@pytest.mark.parametrize(("family", "kind"), SOME)
def test_our_file_is_the_same_picture_in_diffusers_and_again_in_ours(
    both: dict[str, tuple[Any, Any, Path]], official: Official, family: str, kind: str
) -> None:
    ours, theirs, file = both[f"{family}, {kind}"]
    np.testing.assert_allclose(theirs, ours, atol=1e-4)
    pipe = opened(hubgen.TextToImagePipeline, official(family))
    plain = picture(pipe)
    assert np.abs(plain - ours).max() > 1e-3
    found = pipe.load_lora_weights(file)
    assert sum(found.taken.values()) == len(load_file(file)) and not found.left
    np.testing.assert_allclose(picture(pipe), ours, atol=1e-5)
    pipe.disable_lora()
    assert np.array_equal(picture(pipe), plain)
    pipe.enable_lora()
    pipe.fuse_lora()
    fused = np.abs(picture(pipe) - ours)  # weights are rounded once more, which a sampler carries on
    assert fused.mean() < 1e-5 and fused.max() < 2e-5
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    np.testing.assert_allclose(picture(pipe), plain, atol=1e-4)


def test_a_file_says_its_alpha_where_no_reader_applies_it_twice(both: dict[str, tuple[Any, Any, Path]]) -> None:
    with safe_open(both["sd1, alpha"][2], framework="pt") as file:
        header = file.metadata()
    config = json.loads(header["lora_adapter_metadata"])
    assert config["unet.r"] == config["unet.lora_alpha"] == 2
    assert set(json.loads(header["hubgen_alpha"])["unet"].values()) == {3.0}
    with safe_open(both["sd1, text encoders"][2], framework="pt") as file:
        keys = [key for key in file.keys() if key.startswith("text_encoder")]
    assert keys and all(key.startswith("text_encoder.text_model.encoder.layers.") for key in keys)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["ranks by pattern", "text encoders"])
def test_diffusers_file_is_the_same_picture_in_ours(official: Official, tmp_path: Path, family: str, kind: str) -> None:
    theirs = opened(diffusers.DiffusionPipeline, official(family))
    adapt(theirs, kind)
    layers, metadata = {}, {}
    for part in ("unet", "transformer", "text_encoder", "text_encoder_2"):
        model = getattr(theirs, part, None)
        if model is not None and hasattr(model, "peft_config"):
            layers[f"{part}_lora_layers"] = get_peft_model_state_dict(model, adapter_name="default_0")
            metadata[f"{part}_lora_adapter_metadata"] = model.peft_config["default_0"].to_dict()
    type(theirs).save_lora_weights(tmp_path, **layers, **metadata)
    expected = picture(theirs)
    ours = opened(hubgen.TextToImagePipeline, official(family))
    ours.load_lora_weights(tmp_path)
    np.testing.assert_allclose(picture(ours), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "version", "architecture"),
    [
        ("sd1", "sd_v1", "stable-diffusion-v1/lora"),
        ("sdxl", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
        ("sd3", "sd3", "stable-diffusion-3/lora"),
        ("flux-dev", "flux1", "flux-1-dev/lora"),
        ("flux-schnell", "flux1", "flux-1-schnell/lora"),
    ],
)
def test_a_file_of_kohyas_layout_says_what_it_is_for(
    official: Official, tmp_path: Path, family: str, version: str, architecture: str
) -> None:
    pipe = opened(hubgen.TextToImagePipeline, official(family))
    adapt(pipe, "alpha")
    pipe.save_adapter(tmp_path / "kohya.safetensors", layout="kohya", metadata={"modelspec.title": "mine"})
    with safe_open(tmp_path / "kohya.safetensors", framework="pt") as file:
        header = file.metadata()
    assert header["ss_base_model_version"] == version and header["modelspec.architecture"] == architecture
    assert (header["ss_network_dim"], header["ss_network_alpha"], header["modelspec.title"]) == ("2", "3", "mine")


def test_a_hot_swap_compiles_nothing_again(both: dict[str, tuple[Any, Any, Path]], official: Official) -> None:
    """A second adapter of the same layers, other ranks and another scale, in a network that torch has compiled."""
    pipe = opened(hubgen.TextToImagePipeline, official("sd1"))
    pipe.unet.enable_lora_hotswap(target_rank=4)
    pipe.load_lora_weights(both["sd1, alpha"][2], adapter_name="one")
    pipe.load_lora_weights(both["sd1, rslora"][2], adapter_name="one", hotswap=True)
    swapped = picture(pipe)
    np.testing.assert_allclose(swapped, both["sd1, rslora"][0], atol=1e-4)
    pipe.load_lora_weights(both["sd1, alpha"][2], adapter_name="one", hotswap=True)
    torch._dynamo.reset()
    pipe.unet.compile(backend="eager")
    try:
        np.testing.assert_allclose(picture(pipe), both["sd1, alpha"][0], atol=1e-4)
        with torch._dynamo.config.patch(error_on_recompile=True):
            pipe.load_lora_weights(both["sd1, rslora"][2], adapter_name="one", hotswap=True)
            np.testing.assert_allclose(picture(pipe), both["sd1, rslora"][0], atol=1e-4)
    finally:
        torch._dynamo.reset()
