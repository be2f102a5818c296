"""Models out of single files in their original layouts, and back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.utils import logging
from safetensors.torch import load_file, save_file
from torch import nn

import hubgen
from hubgen.formats.layouts import open_single_file

MODELS = {
    "sd1": ("unet", "UNet2DConditionModel"),
    "sd1-inpaint": ("unet", "UNet2DConditionModel"),
    "sd2": ("unet", "UNet2DConditionModel"),
    "sdxl": ("unet", "UNet2DConditionModel"),
    "sdxl-refiner": ("unet", "UNet2DConditionModel"),
    "sd3": ("transformer", "SD3Transformer2DModel"),
    "flux-dev": ("transformer", "FluxTransformer2DModel"),
    "flux-schnell": ("transformer", "FluxTransformer2DModel"),
}
FAMILY = {"sd1-inpaint": "sd1", "flux-dev": "flux", "flux-schnell": "flux"}


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def backbone(folder: Path, name: str) -> nn.Module:
    part, cls = MODELS[name]
    return getattr(hubgen, cls).from_pretrained(folder / part)


def write(path: Path, state: dict[str, torch.Tensor], prefix: str = "") -> Path:
    save_file({prefix + name: tensor.clone().contiguous() for name, tensor in state.items()}, path)
    return path


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_backbone_comes_back_from_its_original_layout(
    name: str, prefix: str, official: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, (part, cls) = official(name), MODELS[name]
    model = backbone(folder, name)
    path = write(tmp_path / "x.safetensors", model.to_original(), prefix)
    again = getattr(hubgen, cls).from_single_file(path, config=folder)
    assert same(again, model) and not again.training
    assert again.config._name_or_path == str(path)
    own = getattr(hubgen, cls).from_single_file(str(path), config=folder / part, torch_dtype=torch.bfloat16)
    assert own.dtype == torch.bfloat16
    again.save_pretrained(tmp_path / "saved")  # no tensor shares its storage with another
    assert same(getattr(diffusers, cls).from_pretrained(tmp_path / "saved"), model)


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3"])
def test_diffusers_reads_the_file_as_we_do(name: str, official: Callable[[str], Path], tmp_path: Path) -> None:
    folder, (part, cls) = official(name), MODELS[name]
    model = backbone(folder, name)
    path = write(tmp_path / "x.safetensors", model.to_original(), "model.diffusion_model.")
    theirs = getattr(diffusers, cls).from_single_file(str(path), config=str(folder), subfolder=part)
    assert same(getattr(hubgen, cls).from_single_file(path, config=folder), theirs)


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
def test_an_autoencoder_comes_back_with_its_config_inferred(
    prefix: str, official: Callable[[str], Path], tmp_path: Path
) -> None:
    vae = hubgen.AutoencoderKL.from_pretrained(official("sd1") / "vae")
    path = write(tmp_path / "vae.safetensors", vae.to_original(), prefix)
    again = hubgen.AutoencoderKL.from_single_file(path, config={"norm_num_groups": 4})
    assert same(again, vae)
    theirs = diffusers.AutoencoderKL.from_single_file(str(path), config=str(official("sd1") / "vae"))
    assert same(again, theirs)
    changed = {"scaling_factor", "sample_size", "norm_num_groups"}
    for key in changed ^ {"block_out_channels", "latent_channels", "layers_per_block", "use_quant_conv", *changed}:
        assert list(map(str, [again.config[key]])) == list(map(str, [vae.config[key]])), key
    assert again.config.scaling_factor == 0.18215


def test_what_a_bare_autoencoder_does_not_say_is_told(
    official: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    vae = hubgen.AutoencoderKL.from_pretrained(official("sdxl") / "vae")
    path = write(tmp_path / "vae.safetensors", vae.to_original())
    logging.enable_propagation()
    try:
        hubgen.AutoencoderKL.from_single_file(path, config={"norm_num_groups": 4})
    finally:
        logging.disable_propagation()
    assert "does not say how its latents are scaled" in caplog.text


def test_a_config_can_be_changed_value_by_value(official: Callable[[str], Path], tmp_path: Path) -> None:
    model = backbone(official("sd1"), "sd1")
    path = write(tmp_path / "x.safetensors", model.to_original())
    known = {"norm_num_groups": 4, "attention_head_dim": 2, "sample_size": 8}
    again = hubgen.UNet2DConditionModel.from_single_file(path, config=known)
    assert same(again, model)
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 16)
    with torch.no_grad():
        torch.testing.assert_close(again(x, 5, text).sample, model(x, 5, text).sample)


def test_what_training_leaves_in_a_file_is_passed_over(official: Callable[[str], Path], tmp_path: Path) -> None:
    folder = official("sd1")
    model = backbone(folder, "sd1")
    state = {f"model.diffusion_model.{name}": tensor for name, tensor in model.to_original().items()}
    state |= {"alphas_cumprod": torch.zeros(3), "model_ema.decay": torch.zeros(1), "betas": torch.zeros(3)}
    path = write(tmp_path / "x.safetensors", state)
    assert open_single_file(path).others == []
    assert same(hubgen.UNet2DConditionModel.from_single_file(path, config=folder), model)


# what is refused


def test_keys_and_shapes_that_do_not_fit_are_all_listed(official: Callable[[str], Path], tmp_path: Path) -> None:
    folder = official("flux-dev")
    state = backbone(folder, "flux-dev").to_original()
    load = hubgen.FluxTransformer2DModel.from_single_file
    path = tmp_path / "x.safetensors"
    write(path, {**state, "double_blocks.0.img_mlp.9.weight": torch.zeros(1), "double_blocks.0.x": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"(?s)x.safetensors.*2 tensors.*img_mlp.9.weight: unknown.*0.x: unknown"):
        load(path, config=folder)
    write(path, {name: tensor for name, tensor in state.items() if name != "img_in.bias"})
    with pytest.raises(ValueError, match=r"1 tensors missing:\s+x_embedder.bias"):
        load(path, config=folder)
    write(path, {**state, "img_in.bias": torch.zeros(5)})
    with pytest.raises(ValueError, match=r"x_embedder.bias: \[5\], expected \[32\]"):
        load(path, config=folder)


def test_another_models_file_is_refused(official: Callable[[str], Path], tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", backbone(official("sd1"), "sd1").to_original())
    with pytest.raises(ValueError, match=r"holds Stable Diffusion 1.x \(unet\), no SD3Transformer2DModel"):
        hubgen.SD3Transformer2DModel.from_single_file(path)
    with pytest.raises(ValueError, match="no AutoencoderKL"):
        hubgen.AutoencoderKL.from_single_file(path)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["a", "b"], r"(?s)no layout that is known.*Stable Diffusion XL.*FLUX.*2 tensors:\s+a\s+b"),
        (["lora_unet_mid_block.lora_down.weight"], "looks like a LoRA"),
        (["transformer_blocks.0.attn.to_q.weight"], "`config`: got None.*in diffusers' layout"),
        (["control_model.input_blocks.0.0.weight"], "looks like a ControlNet"),
    ],
)
def test_an_unknown_layout_is_told_with_what_was_found(keys: list[str], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {key: torch.zeros(1) for key in keys})
    with pytest.raises(ValueError, match=message):
        hubgen.UNet2DConditionModel.from_single_file(path)


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.safetensors"])
def test_a_pickled_file_is_refused_by_its_name_or_its_first_bytes(name: str, tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / name)
    with pytest.raises(
        ValueError, match=r"(?s)a pickled file.*weights_only=True.*save_file\(tensors, '.*model.safetensors'"
    ):
        hubgen.UNet2DConditionModel.from_single_file(tmp_path / name)


def test_the_way_to_convert_that_is_told_works(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(2).t(), "step": 3}}, tmp_path / "model.ckpt")
    with pytest.raises(ValueError) as caught:
        open_single_file(tmp_path / "model.ckpt")
    lines = str(caught.value).split("\n", 1)[1]
    exec("\n".join(line.strip() for line in lines.splitlines()))
    assert load_file(tmp_path / "model.safetensors").keys() == {"a"}


def test_a_folder_or_no_file_is_named(official: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="folders are for `from_pretrained`"):
        hubgen.UNet2DConditionModel.from_single_file(official("sd1"))
    with pytest.raises(FileNotFoundError, match="none.safetensors: no such file"):
        hubgen.UNet2DConditionModel.from_single_file(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="is a file.*from_single_file"):
        hubgen.UNet2DConditionModel.from_pretrained(official("sd1") / "model_index.json")


def test_a_truncated_file_is_named(official: Callable[[str], Path], tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", backbone(official("sd1"), "sd1").to_original())
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"x.safetensors: the file is truncated"):
        hubgen.UNet2DConditionModel.from_single_file(path, config=official("sd1"))


def test_a_config_of_the_wrong_size_is_refused(official: Callable[[str], Path], tmp_path: Path) -> None:
    folder = official("sd1")
    path = write(tmp_path / "x.safetensors", backbone(folder, "sd1").to_original())
    config: dict[str, Any] = json.loads((folder / "unet" / "config.json").read_text())
    for bad in ({"in_channels": 9}, {"layers_per_block": 10**7}, {"block_out_channels": [8, 320_000]}):
        (tmp_path / "config.json").write_text(json.dumps({**config, **bad}))
        with pytest.raises(ValueError, match=r"does not fit|asks for more layers|key map does not take"):
            hubgen.UNet2DConditionModel.from_single_file(path, config=tmp_path)
