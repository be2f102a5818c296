"""What single files say beside weights in an original layout, and what else people have in single files."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import hubgen
from hubgen.pipelines.text_to_image import TextToImagePipeline

Official = Callable[[str], Path]
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def file_of(official: Official, tmp_path: Path) -> Callable[..., Path]:
    """`file_of("sdxl", v_pred=...)`: the pipeline as one file, with these tensors (and metadata) besides."""

    def write(name: str, metadata: dict[str, str] | None = None, **more: torch.Tensor) -> Path:
        path = tmp_path / "one.safetensors"
        TextToImagePipeline.from_pretrained(official(name)).save_single_file(path)
        save_file({**load_file(path), **{key.replace("__", "."): value for key, value in more.items()}}, path, metadata)
        return path

    return write


def latents(pipe: Any, **call: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    return pipe("a red cat", generator=generator, num_inference_steps=4, output_type="latent", **call).images


NONE = torch.zeros(0)


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "sdxl-refiner"])
def test_v_prediction_and_zero_snr_set_the_scheduler(
    name: str, official: Official, file_of: Callable[..., Path]
) -> None:
    load = TextToImagePipeline.from_single_file
    config = load(file_of(name, v_pred=NONE), config=official(name)).scheduler.config
    assert config.prediction_type == "v_prediction" and not config.get("rescale_betas_zero_snr")
    pipe = load(file_of(name, v_pred=NONE, ztsnr=NONE), config=official(name))
    assert pipe.scheduler.config.prediction_type == "v_prediction" and pipe.scheduler.config.rescale_betas_zero_snr
    pipe.scheduler.set_timesteps(4)
    assert pipe.scheduler.timesteps[0] == 999  # the step without signal is done
    assert torch.isfinite(
        latents(pipe, **({"image": torch.rand(1, 3, 32, 32)} if name == "sdxl-refiner" else {}))
    ).all()


def test_a_model_spec_says_it_in_the_metadata(official: Official, file_of: Callable[..., Path]) -> None:
    load = TextToImagePipeline.from_single_file
    for told, expected in (("v", "v_prediction"), ("epsilon", "epsilon")):
        path = file_of("sdxl", {"modelspec.prediction_type": told})
        assert load(path, config=official("sdxl")).scheduler.config.prediction_type == expected


def test_a_scheduler_that_is_handed_over_stays(official: Official, file_of: Callable[..., Path]) -> None:
    scheduler = hubgen.DDIMScheduler()
    path = file_of("sdxl", v_pred=NONE)
    assert (
        TextToImagePipeline.from_single_file(path, config=official("sdxl"), scheduler=scheduler).scheduler is scheduler
    )


def test_playgrounds_mean_and_deviation_set_autoencoder_and_scheduler(
    official: Official, file_of: Callable[..., Path]
) -> None:
    mean, std = torch.tensor([-1.5, 2.0, -1.25, 2.5]), torch.tensor([8.0, 6.0, 6.5, 5.0])
    path = file_of("sdxl", edm_mean=mean, edm_std=std)
    pipe = TextToImagePipeline.from_single_file(path, config=official("sdxl"))
    assert (pipe.vae.config.latents_mean, pipe.vae.config.latents_std) == (mean.tolist(), std.tolist())
    assert pipe.vae.config.scaling_factor == 0.5 and pipe.scheduler.config.sigma_data == 0.5
    theirs = diffusers.StableDiffusionXLPipeline(**{
        name: part for name, part in pipe.components.items() if name not in ("transformer", "text_encoder_3")
        and name not in ("tokenizer_3", "safety_checker", "transformer")
    })  # fmt: skip
    for call in ({}, {"guidance_scale": 1.0}):
        torch.testing.assert_close(latents(pipe, **call), latents(theirs, **call), atol=1e-3, rtol=1e-3)
    vae = hubgen.AutoencoderKL.from_single_file(path, config=official("sdxl"))
    assert vae.config.latents_mean == mean.tolist()


def test_cosxls_noise_levels_set_the_scheduler(official: Official, file_of: Callable[..., Path]) -> None:
    levels = {"edm_vpred__sigma_max": torch.tensor(120.0), "edm_vpred__sigma_min": torch.tensor(0.004)}
    pipe = TextToImagePipeline.from_single_file(file_of("sdxl", **levels), config=official("sdxl"))
    config = pipe.scheduler.config
    assert isinstance(pipe.scheduler, diffusers.EDMEulerScheduler) and config.prediction_type == "v_prediction"
    assert (config.sigma_max, config.sigma_min) == (120.0, pytest.approx(0.004))
    assert torch.isfinite(latents(pipe)).all()


@pytest.mark.parametrize(
    "change",
    [
        {"prediction_type": "v_prediction"},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        "EDMEulerScheduler",
    ],
)
def test_what_is_written_is_read_again(change: Any, official: Official, tmp_path: Path) -> None:
    pipe = TextToImagePipeline.from_pretrained(official("sdxl"))
    if isinstance(change, dict):
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **change)
    else:
        pipe.scheduler = diffusers.EDMEulerScheduler(
            sigma_min=0.002,
            sigma_max=120.0,
            sigma_data=1.0,
            prediction_type="v_prediction",
            sigma_schedule="exponential",
        )
    pipe.save_single_file(tmp_path / "x.safetensors")
    again = TextToImagePipeline.from_single_file(tmp_path / "x.safetensors", config=official("sdxl"))
    torch.testing.assert_close(latents(again), latents(pipe), atol=1e-4, rtol=1e-4)


# ---- one model in diffusers' layout ----

MODELS = [
    ("sd1", "unet"),
    ("sd1", "vae"),
    ("sdxl", "unet"),
    ("sd3", "transformer"),
    ("sd3", "vae"),
    ("flux-dev", "transformer"),
]


@pytest.mark.parametrize(("name", "part"), MODELS)
@pytest.mark.parametrize("where", ["pipeline", "model", "subfolder"])
def test_a_file_in_diffusers_layout_loads_with_a_config(name: str, part: str, where: str, official: Official) -> None:
    folder = official(name)
    expected = getattr(TextToImagePipeline.from_pretrained(folder), part)
    more: dict[str, Any] = {"config": folder / part if where == "model" else folder}
    more |= {"subfolder": part} if where == "subfolder" else {}
    path = folder / part / "diffusion_pytorch_model.safetensors"
    model = type(expected).from_single_file(path, torch_dtype=torch.float16, **more)
    assert model.dtype == torch.float16 and not model.training
    for key, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[key], value.half())


def test_what_such_a_file_lacks_is_said(official: Official, tmp_path: Path) -> None:
    folder = official("sd1")
    path = shutil.copyfile(folder / "unet" / "diffusion_pytorch_model.safetensors", tmp_path / "x.safetensors")
    load = hubgen.UNet2DConditionModel.from_single_file
    with pytest.raises(ValueError, match="`config`: got None, expected a folder or repository: .*diffusers' layout"):
        load(path)
    with pytest.raises(ValueError, match="one model in diffusers' layout: the model's class reads it"):
        TextToImagePipeline.from_single_file(path, config=folder)
    with pytest.raises(ValueError, match="the config of a AutoencoderKL, expected a UNet2DConditionModel"):
        load(path, config=folder / "vae")
    tensors = load_file(path)
    removed = next(key for key in tensors if "resnets" in key)
    save_file({key: value for key, value in tensors.items() if key != removed}, path)
    with pytest.raises(ValueError, match=rf"1 tensors missing:\n *{removed}"):
        load(path, config=folder)


# ---- quantised files ----


@pytest.mark.parametrize("ending", [".scale_weight", ".weight_scale"])
@pytest.mark.parametrize(
    ("name", "layer"), [("flux-dev", "double_blocks.0.img_attn.qkv"), ("sd3", "joint_blocks.0.x_block.mlp.fc1")]
)
def test_scaled_float8_is_multiplied_out(
    ending: str, name: str, layer: str, official: Official, file_of: Callable[..., Path]
) -> None:
    path = file_of(name)
    tensors, key = load_file(path), f"model.diffusion_model.{layer}"
    weight = tensors[f"{key}.weight"]
    scale = weight.abs().max() / 448
    tensors[f"{key}.weight"] = (weight / scale).to(torch.float8_e4m3fn)
    tensors[f"{key}{ending}"] = scale
    tensors[f"{key}{'.scale_input' if ending == '.scale_weight' else '.input_scale'}"] = torch.ones(())
    tensors["model.diffusion_model.scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file(tensors, path)
    pipe = TextToImagePipeline.from_single_file(path, config=official(name))
    found = pipe.transformer.to_original()[f"{layer}.weight"]
    assert torch.equal(found, (weight / scale).to(torch.float8_e4m3fn).float() * scale)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("img_in.weight.quant_state.bitsandbytes__nf4", torch.zeros(8, dtype=torch.uint8), "to 4 bits by bitsandbytes"),
        ("img_in.weight.absmax", torch.zeros(8), "to 4 bits by bitsandbytes"),
        ("img_in.SCB", torch.zeros(8), "to 8 bits by bitsandbytes"),
        ("img_in.qweight", torch.zeros(8, dtype=torch.int32), "to 4 bits"),
        ("img_in.weight_scale_2", torch.zeros(()), "to 4-bit floating point"),
        ("img_in.weight_scale", torch.zeros(()), "scales no float8 weight"),
    ],
)
def test_other_quantised_files_are_named_as_such(
    key: str, value: torch.Tensor, message: str, official: Official, file_of: Callable[..., Path]
) -> None:
    path = file_of("flux-dev", **{f"model.diffusion_model.{key}".replace(".", "__"): value})
    with pytest.raises(ValueError, match=f"one.safetensors: quantised.*{message}"):
        TextToImagePipeline.from_single_file(path, config=official("flux-dev"))
    path.write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(ValueError, match="a GGUF file, quantised"):
        TextToImagePipeline.from_single_file(path, config=official("flux-dev"))


# ---- keywords of diffusers' method ----


def test_averaged_weights_are_taken_when_asked_for(official: Official, file_of: Callable[..., Path]) -> None:
    path = file_of("sd1")
    prefix = "model.diffusion_model."
    own = {key: value for key, value in load_file(path).items() if key.startswith(prefix)}
    averaged = {f"model_ema.{key.removeprefix('model.').replace('.', '')}": value + 1 for key, value in own.items()}
    save_file({**load_file(path), **averaged, "model_ema.decay": torch.zeros(())}, path)
    for extract, offset in ((False, 0.0), (True, 1.0)):
        pipe = TextToImagePipeline.from_single_file(path, config=official("sd1"), extract_ema=extract)
        unet = hubgen.UNet2DConditionModel.from_single_file(path, config=official("sd1"), extract_ema=extract)
        for found in (pipe.unet.to_original(), unet.to_original()):
            assert all(torch.equal(found[key.removeprefix(prefix)], value + offset) for key, value in own.items())


def test_keywords_of_diffusers_mean_what_they_mean_there_or_are_refused(
    official: Official, file_of: Callable[..., Path]
) -> None:
    path, config = file_of("sd1"), official("sd1")
    TextToImagePipeline.from_single_file(path, config=config, use_safetensors=True, variant="fp16", disable_mmap=True)
    with pytest.raises(ValueError, match="`use_safetensors`: got False"):
        TextToImagePipeline.from_single_file(path, config=config, use_safetensors=False)
    for load in (TextToImagePipeline.from_single_file, hubgen.UNet2DConditionModel.from_single_file):
        with pytest.raises(ValueError, match="does not take original_config; it takes .*`config` takes the place"):
            load(path, config=config, original_config="v1.yaml")
