"""A pipeline goes into one file of its family's original layout and comes back; diffusers reads the file as well."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors import safe_open
from torch import nn

import hubgen
from hubgen.formats.layouts import open_single_file
from tests.hub.loopback import loopback_hub
from tests.hub.test_hub import run

PIPELINES = {
    "sd1": diffusers.StableDiffusionPipeline,
    "sd1-inpaint": diffusers.StableDiffusionInpaintPipeline,
    "sd2": diffusers.StableDiffusionPipeline,
    "sdxl": diffusers.StableDiffusionXLPipeline,
    "sdxl-refiner": diffusers.StableDiffusionXLImg2ImgPipeline,
    "sd3": diffusers.StableDiffusion3Pipeline,
    "sd3.5": diffusers.StableDiffusion3Pipeline,
    "flux-dev": diffusers.FluxPipeline,
    "flux-schnell": diffusers.FluxPipeline,
}
TEXT_TO_IMAGE = [name for name in PIPELINES if name not in ("sd1-inpaint", "sdxl-refiner")]


def load(folder: Path) -> Any:
    return hubgen.TextToImagePipeline.from_pretrained(folder)


def without_weights(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors")))


def models(pipe: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def assert_same_weights(one: Any, other: Any) -> None:
    assert models(one).keys() == models(other).keys()
    for part, model in models(one).items():
        ours, theirs = model.state_dict(), models(other)[part].state_dict()
        assert ours.keys() == theirs.keys(), part
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), part


def latents(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        "a red cat",
        height=32,
        width=32,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_comes_back_from_a_single_file(
    name: str, official: Callable[[str], Path], tmp_path: Path, shows: Callable[..., None]
) -> None:
    shows(name, "single file")
    pipe = load(official(name))
    pipe.save_single_file(tmp_path / "x.safetensors")
    small = without_weights(official(name), tmp_path / "small")
    again = hubgen.TextToImagePipeline.from_single_file(tmp_path / "x.safetensors", config=small)
    assert_same_weights(again, pipe)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small", "x.safetensors"]
    settings = {key: value for key, value in pipe.config.items() if not key.startswith("_") and key != "vae"}
    assert {key: again.config[key] for key in settings} == settings
    if name in TEXT_TO_IMAGE:
        torch.testing.assert_close(latents(again), latents(pipe), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "sd3"])
def test_diffusers_reads_the_file_that_we_write(name: str, official: Callable[[str], Path], tmp_path: Path) -> None:
    """FLUX is not among them: diffusers' converter has the width of the published models built in.

    Of two CLIPs it tells by their widths which is which, and these here are of the same: those are handed over.
    """
    pipe = load(official(name))
    pipe.save_single_file(tmp_path / "x.safetensors")
    handed = {"sdxl": ["text_encoder_2"], "sd3": ["text_encoder", "text_encoder_2"]}.get(name, [])
    theirs = PIPELINES[name].from_single_file(
        str(tmp_path / "x.safetensors"), config=str(official(name)), **{part: getattr(pipe, part) for part in handed}
    )
    assert_same_weights(theirs, pipe)


def test_half_precision_halves_the_file(official: Callable[[str], Path], tmp_path: Path) -> None:
    pipe = load(official("sd1"))
    pipe.save_single_file(tmp_path / "x.safetensors", torch_dtype=torch.float16)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} <= {torch.float16, torch.int64}
    again = hubgen.TextToImagePipeline.from_single_file(
        tmp_path / "x.safetensors", config=official("sd1"), torch_dtype=torch.bfloat16
    )
    assert {model.dtype for model in models(again).values()} == {torch.bfloat16}


def backbone_alone(pipe: Any, path: Path) -> Path:
    from safetensors.torch import save_file

    tensors = pipe.transformer.to_original()
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)
    return path


def test_what_a_file_lacks_comes_from_the_config_folder_or_from_the_caller(
    official: Callable[[str], Path], tmp_path: Path
) -> None:
    pipe = load(official("flux-dev"))
    path = backbone_alone(pipe, tmp_path / "x.safetensors")
    assert open_single_file(path).parts.keys() == {"transformer"}
    cls = hubgen.TextToImagePipeline
    assert_same_weights(cls.from_single_file(path, config=official("flux-dev")), pipe)
    small = without_weights(official("flux-dev"), tmp_path / "small")
    with pytest.raises(ValueError) as caught:
        cls.from_single_file(path, config=small, text_encoder=pipe.text_encoder)
    assert "text_encoder_2 (T5EncoderModel), vae (AutoencoderKL) are neither there" in str(caught.value)
    handed = {name: pipe.components[name] for name in ("vae", "text_encoder", "text_encoder_2")}
    again = cls.from_single_file(path, config=small, **handed)
    assert again.vae is pipe.vae
    assert_same_weights(again, pipe)


def test_an_optional_encoder_can_be_done_without(official: Callable[[str], Path], tmp_path: Path) -> None:
    """As SD3's files with the two CLIPs alone."""
    pipe = load(official("sd3"))
    pipe.text_encoder_3 = None
    pipe.save_single_file(tmp_path / "x.safetensors")
    small = without_weights(official("sd3"), tmp_path / "small")
    cls = hubgen.TextToImagePipeline
    with pytest.raises(ValueError, match=r"text_encoder_3 \(T5EncoderModel\) .*hand them over"):
        cls.from_single_file(tmp_path / "x.safetensors", config=small)
    again = cls.from_single_file(tmp_path / "x.safetensors", config=small, text_encoder_3=None)
    assert again.text_encoder_3 is None
    assert_same_weights(again, pipe)


def test_a_damaged_component_elsewhere_is_found_before_anything_loads(
    official: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = load(official("flux-dev"))
    path = backbone_alone(pipe, tmp_path / "x.safetensors")
    folder = Path(shutil.copytree(official("flux-dev"), tmp_path / "folder"))
    weights = folder / "text_encoder_2" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    monkeypatch.setattr("hubgen.formats.single_file.read_part", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=r"model.safetensors: the file is truncated"):
        hubgen.TextToImagePipeline.from_single_file(path, config=folder)


def test_a_text_encoder_that_does_not_fit_its_config_is_refused(
    official: Callable[[str], Path], tmp_path: Path
) -> None:
    pipe = load(official("sd1"))
    pipe.save_single_file(tmp_path / "x.safetensors")
    folder = without_weights(official("sd1"), tmp_path / "small")
    config = folder / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": 4'))
    with pytest.raises(ValueError, match=r"(?s)text_encoder does not fit.*16 tensors missing:.*layers.3.layer_norm1"):
        hubgen.TextToImagePipeline.from_single_file(tmp_path / "x.safetensors", config=folder)


def test_an_autoencoder_alone_is_no_pipeline(official: Callable[[str], Path], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    vae = hubgen.AutoencoderKL.from_pretrained(official("sd1") / "vae")
    save_file(vae.to_original(), tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match="holds an autoencoder .*AutoencoderKL.from_single_file"):
        hubgen.TextToImagePipeline.from_single_file(tmp_path / "vae.safetensors", config=official("sd1"))


def test_sd2_asks_for_a_config_because_its_kinds_look_alike(official: Callable[[str], Path], tmp_path: Path) -> None:
    pipe = load(official("sd2"))
    pipe.save_single_file(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="Stable Diffusion 2.x .*say by `config`"):
        hubgen.TextToImagePipeline.from_single_file(tmp_path / "x.safetensors")


def test_an_argument_that_the_pipeline_does_not_have_is_named(official: Callable[[str], Path], tmp_path: Path) -> None:
    pipe = load(official("sd1"))
    pipe.save_single_file(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="does not take textencoder"):
        hubgen.TextToImagePipeline.from_single_file(
            tmp_path / "x.safetensors", config=official("sd1"), textencoder=None
        )


def test_a_repository_brings_what_the_file_lacks_and_nothing_else(
    official: Callable[[str], Path], tmp_path: Path
) -> None:
    path = backbone_alone(load(official("flux-dev")), tmp_path / "x.safetensors")
    code = f"""
import hubgen
pipe = hubgen.TextToImagePipeline.from_single_file({str(path)!r}, config="tester/flux")
assert pipe.transformer.config.num_single_layers == 2
"""
    with loopback_hub() as hub:
        hub.add("tester/flux", official("flux-dev"))
        run(code, hub, tmp_path / "home")
        fetched = {request.rsplit("/", 2)[-2] for request in hub.requests if request.endswith(".safetensors")}
    assert fetched == {"vae", "text_encoder", "text_encoder_2"}
