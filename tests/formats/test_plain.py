"""Models in any state are saved as plain ones, which diffusers loads."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig
from safetensors.torch import load_file

import hubgen
from hubgen.formats.plain import plain_model
from tests import models

TARGETS = ["to_q", "to_out.0", "conv1", "proj_in"]


def lora(name: str = "default", **options: Any) -> Callable[[Any], Any]:
    def attach(model: Any) -> Any:
        model.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=TARGETS, **options), name)
        return model

    return attach


def in_place(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def changed(model: Any) -> Any:
        change(model)
        return model

    return changed


def compile_middle(model: Any) -> None:
    model.mid_block = torch.compile(model.mid_block, backend="eager")


STATES: dict[str, Callable[[Any], Any]] = {
    "as it is": lambda model: model,
    "optimised": in_place(hubgen.optimize),
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled in place": in_place(lambda model: model.compile(backend="eager")),
    "compiled in part": in_place(compile_middle),
    "its blocks compiled": in_place(lambda model: model.compile_repeated_blocks(backend="eager")),
    "with a LoRA": lora(),
    "with a DoRA": lora(use_dora=True),
    "with two LoRAs": lambda model: lora("b")(lora("a")(model)),
    "with a LoRA, compiled": lambda model: torch.compile(lora()(model), backend="eager"),
    "offloaded": in_place(lambda model: cpu_offload(model, torch.device("cpu"))),
}


@pytest.mark.parametrize("state", STATES)
@torch.no_grad()
def test_a_model_in_any_state_is_saved_as_it_was_before(state: str, tmp_path: Path) -> None:
    network = models.NETWORKS["SD 1.x"]
    model, inputs = network.build(), network.inputs()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    changed = STATES[state](model)
    before = changed(**inputs).sample
    changed.save_pretrained(tmp_path)
    found = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert torch.equal(changed(**inputs).sample, before)  # the model itself is as it was
    theirs = diffusers.UNet2DConditionModel.from_pretrained(tmp_path)
    torch.testing.assert_close(theirs(**inputs).sample, network.build()(**inputs).sample, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("component", ["transformer", "unet", "vae", "text_encoder"])
def test_a_pipeline_with_adapters_is_saved_without_them_and_says_so(
    component: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = models.pipeline("unet" if component == "unet" else "transformer")
    model = getattr(pipe, component)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    targets = ["query"] if component == "text_encoder" else ["to_q"]
    model.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=targets))
    with caplog.at_level(logging.WARNING):
        pipe.save_pretrained(tmp_path)
    assert f"{type(model).__name__} is saved without its adapters" in caplog.text
    assert getattr(pipe, component) is model and len(list(model.parameters())) > len(expected) // 2
    again = hubgen.TextToImagePipeline.from_pretrained(tmp_path)
    found = getattr(again, component).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_fused_adapters_are_saved_in_the_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    network = models.NETWORKS["SD 1.x"]
    model, inputs = network.build(), network.inputs()
    lora()(model)
    with torch.no_grad():
        adapted = model(**inputs).sample
        model.fuse_lora()
        with caplog.at_level(logging.WARNING):
            model.save_pretrained(tmp_path)
        assert "with its fused adapters" in caplog.text
        again = diffusers.UNet2DConditionModel.from_pretrained(tmp_path)
        torch.testing.assert_close(again(**inputs).sample, adapted, rtol=1e-3, atol=1e-3)


def test_a_pipeline_whose_models_are_compiled_and_adapted_is_saved_as_one_file(
    official: Callable[[str], Path], tmp_path: Path
) -> None:
    pipe = hubgen.TextToImagePipeline.from_pretrained(official("sd1"))
    pipe.save_single_file(tmp_path / "plain.safetensors")
    lora()(pipe.unet)
    pipe.text_encoder.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]))
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    pipe.vae = torch.compile(pipe.vae, backend="eager")
    pipe.save_single_file(tmp_path / "other.safetensors")
    plain, other = (load_file(tmp_path / f"{name}.safetensors") for name in ("plain", "other"))
    assert plain.keys() == other.keys()
    assert all(torch.equal(other[name], value) for name, value in plain.items())


def test_what_is_no_model_and_what_is_plain_is_handed_back() -> None:
    model = models.NETWORKS["SD 3"].build()
    assert plain_model(model) is model and plain_model(None) is None
    assert plain_model(torch.compile(model, backend="eager")) is model
