"""UnconditionalPipeline: the same pictures as diffusers' three pipelines, their folders both ways, what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import hubgen
from hubgen.pipelines.unconditional import UnconditionalPipeline
from hubgen.schedulers.ddpm import DDPMScheduler
from hubgen.schedulers.score_sde_ve import ScoreSdeVeScheduler
from tests.models import seeded
from tests.official import ddpm, ncsnpp, pixel_unet

Official = Callable[[str], Path]
NATIVE = {"ddpm": "DDPMPipeline", "ddim": "DDIMPipeline", "ncsnpp": "ScoreSdeVePipeline"}


def load(folder: Path, cls: Any = UnconditionalPipeline, **options: Any) -> Any:
    pipe = cls.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ours_of(theirs: diffusers.DiffusionPipeline, **changes: Any) -> UnconditionalPipeline:
    pipe = UnconditionalPipeline(**{**theirs.components, **changes})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures(pipe: Any, seed: int = 7, steps: int = 5, **options: Any) -> np.ndarray:
    """(2, 16, 16, 3)."""
    options = {"generator": seeded(seed)[0], "output_type": "np", "batch_size": 2, **options}
    return pipe(num_inference_steps=steps, **options).images


@pytest.fixture
def pipe() -> UnconditionalPipeline:
    return ours_of(ddpm())


@pytest.mark.parametrize("name", NATIVE)
def test_official_folders_give_the_pictures_of_diffusers(name: str, official: Official, shows) -> None:
    shows(name, "unconditional pictures")
    theirs = pictures(load(official(name), diffusers.DiffusionPipeline))
    pipe = load(official(name))
    for component in pipe.components.values():
        assert type(component).__module__.startswith("hubgen."), component
    assert theirs.std() > 0.05
    np.testing.assert_allclose(pictures(pipe), theirs, atol=1e-3)


@pytest.mark.parametrize("name", NATIVE)
def test_saved_by_ours_they_load_again_in_diffusers(name: str, official: Official, tmp_path: Path, shows) -> None:
    shows(name, "saved files load in diffusers")
    pipe = load(official(name))
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == NATIVE[name]
    assert {index[part][0] for part in ("unet", "scheduler")} == {"diffusers"}
    back = load(tmp_path, diffusers.DiffusionPipeline)
    assert type(back).__name__ == NATIVE[name] and type(back).__module__.startswith("diffusers.")
    np.testing.assert_allclose(pictures(back), pictures(pipe), atol=1e-3)
    np.testing.assert_allclose(pictures(load(tmp_path)), pictures(pipe), atol=1e-5)


def test_a_folder_with_all_files_at_the_top_loads(official: Official, tmp_path: Path) -> None:
    """The layout of google/ddpm-cifar10-32 and its sisters."""
    folder = official("ddpm")
    shutil.copy(folder / "model_index.json", tmp_path)
    for part in ("unet", "scheduler"):
        for file in (folder / part).iterdir():
            shutil.copy(file, tmp_path)
    np.testing.assert_allclose(pictures(load(tmp_path)), pictures(load(folder)), atol=1e-6)


def test_ddim_with_noise_gives_the_pictures_of_diffusers(official: Official) -> None:
    ours, theirs = load(official("ddim")), load(official("ddim"), diffusers.DiffusionPipeline)
    for options in ({"eta": 0.6}, {"eta": 1.0, "use_clipped_model_output": True}):
        np.testing.assert_allclose(pictures(ours, **options), pictures(theirs, **options), atol=1e-3)
    assert np.abs(pictures(ours, eta=0.6) - pictures(ours)).max() > 0.01


def test_a_ddim_folder_samples_by_ddim_whatever_scheduler_it_names(official: Official, tmp_path: Path) -> None:
    shutil.copytree(official("ddpm"), tmp_path, dirs_exist_ok=True)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "_class_name": "DDIMPipeline"}))
    pipe = load(tmp_path)
    assert type(pipe.scheduler).__name__ == "DDIMScheduler"
    np.testing.assert_allclose(pictures(pipe), pictures(load(tmp_path, diffusers.DiffusionPipeline)), atol=1e-3)


@pytest.mark.parametrize("correct_steps", [0, 1, 2])
def test_the_corrector_runs_as_often_as_the_config_says(correct_steps: int) -> None:
    theirs = ncsnpp()
    theirs.scheduler = diffusers.ScoreSdeVeScheduler(snr=0.075, sigma_max=348.0, correct_steps=correct_steps)
    theirs.set_progress_bar_config(disable=True)
    pipe = ours_of(theirs)
    calls = []
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    ours = pictures(pipe)
    assert len(calls) == 5 * (correct_steps + 1)
    np.testing.assert_allclose(ours, pictures(theirs), atol=1e-3)


def test_ncsnpp_starts_from_noise_of_the_largest_standard_deviation() -> None:
    pipe = ours_of(ncsnpp(), scheduler=ScoreSdeVeScheduler(sigma_max=50.0, correct_steps=0))
    seen = []
    pipe.unet.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0], kwargs["timestep"])), with_kwargs=True
    )
    pictures(pipe, steps=2, batch_size=8)
    sample, sigma = seen[0]
    assert abs(sample.std().item() - 50.0) < 2.0
    torch.testing.assert_close(sigma, torch.full((8,), 50.0))


@pytest.mark.parametrize(
    "scheduler", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"]
)
def test_schedulers_of_diffusers_make_pictures(scheduler: str) -> None:
    theirs = ddpm()
    pipe = ours_of(theirs, scheduler=getattr(diffusers, scheduler).from_config(theirs.scheduler.config))
    images = pictures(pipe)
    assert np.isfinite(images).all() and images.std() > 0.05
    assert pipe.native_class() == "DDPMPipeline"


def test_a_learned_variance_goes_to_schedulers_that_take_it_and_is_cut_off_for_others() -> None:
    unet = pixel_unet(out_channels=6)
    learned = DDPMScheduler(variance_type="learned_range")
    plain = DDPMScheduler()
    images = [pictures(ours_of(ddpm(), unet=unet, scheduler=scheduler)) for scheduler in (learned, plain)]
    assert np.isfinite(images).all() and np.abs(images[0] - images[1]).max() > 1e-3
    with pytest.raises(ValueError, match="takes 6 channels of a prediction; the U-Net has `out_channels`=3"):
        pictures(ours_of(ddpm(), scheduler=learned))


def test_a_generator_a_picture_makes_each_the_same_in_any_batch(pipe: UnconditionalPipeline) -> None:
    both = pictures(pipe, generator=seeded(1, 2))
    for i, seed in enumerate((1, 2)):
        one = pictures(pipe, generator=seeded(seed), batch_size=1)
        np.testing.assert_allclose(one[0], both[i], atol=1e-5)


def test_output_types_are_the_same_pictures(pipe: UnconditionalPipeline) -> None:
    array, tensor, latents, pil = (pictures(pipe, output_type=kind) for kind in ("np", "pt", "latent", "pil"))
    np.testing.assert_allclose(tensor.permute(0, 2, 3, 1), array, atol=1e-6)
    np.testing.assert_allclose((latents / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1), array, atol=1e-6)
    assert pil[0].size == (16, 16) and np.abs(np.asarray(pil[1]) / 255 - array[1]).max() < 1 / 255
    ve = ours_of(ncsnpp())
    array, latents = pictures(ve), pictures(ve, output_type="latent")
    np.testing.assert_allclose(latents.clamp(0, 1).permute(0, 2, 3, 1), array, atol=1e-6)
    assert isinstance(ve(num_inference_steps=1, return_dict=False), tuple)


def test_given_noise_takes_the_place_of_drawn_noise(official: Official) -> None:
    pipe = load(official("ddim"))
    noise = torch.randn(2, 3, 16, 16, generator=seeded(7)[0])
    np.testing.assert_allclose(pictures(pipe, latents=noise), pictures(pipe), atol=1e-6)


def test_a_callback_sees_and_changes_each_step_and_may_stop(pipe: UnconditionalPipeline) -> None:
    seen = []

    def callback(pipeline: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, int(timestep)))
        pipeline._interrupt = step == 2
        return {"latents": torch.zeros_like(tensors["latents"])}

    assert (pictures(pipe, callback_on_step_end=callback) == 0.5).all()
    assert seen == [(0, 800), (1, 600), (2, 400)] and pipe.num_timesteps == 5


def test_the_number_of_steps_defaults_to_what_diffusers_does_or_to_what_was_saved(tmp_path: Path) -> None:
    assert ours_of(ddpm()).default_steps == 1000
    assert ours_of(ddpm(), scheduler=diffusers.DDIMScheduler()).default_steps == 50
    assert ours_of(ddpm(), scheduler=DDPMScheduler(20)).default_steps == 20
    assert ours_of(ncsnpp()).default_steps == 2000
    ours_of(ddpm(), default_num_inference_steps=3).save_pretrained(tmp_path)
    pipe = load(tmp_path)
    pipe(output_type="np")
    assert pipe.num_timesteps == 3
    diffusers.DDPMPipeline.from_pretrained(tmp_path)


def test_half_precision_pictures_stay_near(official: Official) -> None:
    full, half = load(official("ddim")), load(official("ddim"), torch_dtype=torch.bfloat16)
    assert half.unet.dtype == torch.bfloat16
    assert np.abs(pictures(half) - pictures(full)).mean() < 0.05


def test_the_pipeline_is_public() -> None:
    assert hubgen.UnconditionalPipeline is UnconditionalPipeline
    assert diffusers.UnconditionalPipeline is UnconditionalPipeline


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "`batch_size`: got 0"),
        ({"num_inference_steps": 0}, "`num_inference_steps`: got 0"),
        ({"generator": seeded(1)}, "`generator`: got a list of 1, expected one for each of 2"),
        ({"generator": 3}, "`generator`: got 3"),
        ({"latents": torch.zeros(2, 3, 8, 8)}, r"`latents`: got \(2, 3, 8, 8\), expected .*\(2, 3, 16, 16\)"),
        ({"output_type": "jpg"}, "`output_type`: got 'jpg'"),
        ({"eta": 0.5}, "`eta`: got 0.5, but DDPMScheduler takes none"),
        ({"eta": -1.0}, "`eta`: got -1.0"),
        ({"use_clipped_model_output": True}, "`use_clipped_model_output`: got True, but DDPMScheduler takes none"),
        ({"sigmas": [1.0, 0.5]}, "`sigmas`: DDPMScheduler takes none"),
        ({"callback_on_step_end": 3}, "`callback_on_step_end`: got 3"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, r"got \['prompt_embeds'\]"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_computed(
    options: dict[str, Any], message: str, pipe: UnconditionalPipeline
) -> None:
    pipe.unet.register_forward_pre_hook(lambda *_: pytest.fail("the network was called"))
    with pytest.raises(ValueError, match=message):
        pipe(**{"batch_size": 2, **options})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_class_embeds": 3}, "`unet`: got one with `num_class_embeds`=3"),
        ({"class_embed_type": "timestep"}, "`unet`: got one with `class_embed_type`='timestep'"),
        ({"sample_size": None}, "`unet`: got one without `sample_size`"),
    ],
)
def test_networks_that_want_more_than_noise_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours_of(ddpm(), unet=pixel_unet(**config))


def test_an_index_of_another_task_is_refused(official: Official) -> None:
    with pytest.raises(ValueError, match="names 'DiTPipeline' as the pipeline; UnconditionalPipeline reads"):
        load(official("dit"))
