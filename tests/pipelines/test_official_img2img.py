"""Image to image: the folders of official layouts give the latents of diffusers' image to image pipelines."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from hubgen.pipelines.text_to_image import TextToImagePipeline
from tests.official_images import (
    IMG2IMG,
    PROMPTS,
    SIZE,
    STEPS,
    NoEncoder,
    Pair,
    assert_same,
    generators,
    is_flow,
    pairs,
    picture,
    quiet,
)


@pytest.fixture(scope="module")
def pair(official: Callable[[str], Path]) -> Callable[[str], Pair]:
    return pairs(official, IMG2IMG)


def sized(name: str) -> dict[str, int]:
    """diffusers' pipelines of flows take a size; those of U-Nets take the picture's own."""
    return {"height": SIZE[0], "width": SIZE[1]} if is_flow(name) else {}


def negative(name: str) -> dict[str, Any]:
    return {} if name.startswith("flux") else {"negative_prompt": "small", "guidance_scale": 4.0}


# ---- the same as diffusers ----


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("name", IMG2IMG)
def test_latents_are_those_of_diffusers(
    pair: Callable[[str], Pair], name: str, strength: float, shows: Callable[..., None]
) -> None:
    shows(name, "image to image")
    call = {"image": picture(), "strength": strength, **sized(name), **negative(name)}
    assert_same(*pair(name).latents(**call))


@pytest.mark.parametrize("name", IMG2IMG)
def test_latents_of_a_generator_each_are_those_of_diffusers(pair: Callable[[str], Pair], name: str) -> None:
    """diffusers' SD3 pipeline needs an image for each generator; the others repeat the image."""
    images = {"prompt": PROMPTS, "image": [picture(1), picture(2)]} if name.startswith("sd3") else {"image": picture()}
    repeats = {} if name.startswith("sd3") else {"num_images_per_prompt": 2}
    assert_same(*pair(name).latents((3, 4), strength=0.7, **images, **repeats, **sized(name)))


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "flux-dev"])
def test_two_prompts_with_an_image_each_are_those_of_diffusers(pair: Callable[[str], Pair], name: str) -> None:
    call = {"prompt": PROMPTS, "image": [picture(1), picture(2)], "strength": 0.4}
    assert_same(*pair(name).latents(**call, **sized(name)))


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "flux-schnell"])
def test_the_default_strength_is_that_of_diffusers(pair: Callable[[str], Pair], name: str) -> None:
    assert_same(*pair(name).latents(image=picture(), **sized(name)))


def test_a_vae_with_means_and_deviations_encodes_as_in_diffusers(pair: Callable[[str], Pair]) -> None:
    values = {"latents_mean": [-1.6, 1.9, -1.4, 2.5], "latents_std": [8.5, 5.9, 6.5, 5.2], "scaling_factor": 0.5}
    both = pair("sdxl")
    kept = {name: both.ours.vae.config[name] for name in values}
    try:
        for pipe in (both.ours, both.theirs):
            pipe.vae.register_to_config(**values)
        assert_same(*both.latents(image=picture(), strength=0.5))
    finally:
        for pipe in (both.ours, both.theirs):
            pipe.vae.register_to_config(**kept)


@pytest.mark.parametrize("name", ["sd1", "sd3", "flux-dev"])
def test_latents_as_the_image_are_not_encoded_again(pair: Callable[[str], Pair], name: str) -> None:
    channels = 16 if is_flow(name) else 4
    image = torch.randn(1, channels, SIZE[0] // 4, SIZE[1] // 4)
    assert_same(*pair(name).latents(image=image, strength=0.5, **sized(name)))


@pytest.mark.parametrize(
    ("scheduler", "config"),
    [
        (diffusers.HeunDiscreteScheduler, {}),
        (diffusers.EulerAncestralDiscreteScheduler, {}),
        (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    ],
)
def test_schedulers_of_two_stages_and_of_random_steps_are_walked_as_in_diffusers(
    pair: Callable[[str], Pair], scheduler: Any, config: dict[str, Any]
) -> None:
    assert_same(*pair("sd1").with_scheduler(scheduler, **config).latents(image=picture(), strength=0.6))


def test_an_image_of_an_odd_size_is_cut_as_in_diffusers_and_told(
    pair: Callable[[str], Pair], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert_same(*pair("sd1").latents(image=picture().resize((43, 34)), strength=0.5))
    assert "34x43" in caplog.text and "32x40" in caplog.text


def test_the_refiner_goes_on_where_the_base_stopped(
    official: Callable[[str], Path], pair: Callable[[str], Pair]
) -> None:
    """Both halves together walk the whole grid, and end where diffusers' two pipelines do."""
    refiner = pair("sdxl-refiner")
    ours, theirs = (
        quiet(cls.from_pretrained(official("sdxl")))
        for cls in (TextToImagePipeline, diffusers.StableDiffusionXLPipeline)
    )
    walked: list[float] = []

    def note(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        walked.append(float(timestep))
        return {}

    call = {"prompt": PROMPTS[0], "num_inference_steps": STEPS, "output_type": "latent"}
    results = []
    for base, second, seen in ((ours, refiner.ours, {"callback_on_step_end": note}), (theirs, refiner.theirs, {})):
        half = base(**call, denoising_end=0.6, height=32, width=40, generator=generators(1), **seen).images
        results.append(second(**call, image=half, denoising_start=0.6, generator=generators(2), **seen).images)
    assert_same(*results)
    assert walked == refiner.ours.scheduler.timesteps.tolist()


# ---- identities ----


def test_every_form_of_an_image_gives_the_same(pair: Callable[[str], Pair]) -> None:
    array = np.asarray(picture(), dtype=np.float32) / 255
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    forms = [picture(), [picture()], array, array[None], [array], tensor, tensor[None], [tensor], [tensor[None]]]

    def latents(image: Any) -> torch.Tensor:
        call = {"num_inference_steps": 2, "strength": 0.5, "output_type": "latent"}
        return pair("sd1").ours(PROMPTS[0], image=image, generator=generators(1), **call).images

    first = latents(forms[0])
    for form in forms[1:]:
        torch.testing.assert_close(latents(form), first, atol=1e-4, rtol=0.0)


def test_an_image_goes_with_its_prompt_in_all_pictures_of_it(pair: Callable[[str], Pair]) -> None:
    def latents(prompt: Any, image: Any, *seeds: int, **call: Any) -> torch.Tensor:
        call |= {"num_inference_steps": 2, "strength": 0.5, "output_type": "latent"}
        return pair("sd1").ours(prompt, image=image, generator=generators(seeds), **call).images

    together = latents(PROMPTS, [picture(1), picture(2)], 1, 2, 3, 4, num_images_per_prompt=2)
    apart = [latents(PROMPTS[i // 2], picture(1 + i // 2), 1 + i) for i in range(4)]
    torch.testing.assert_close(together, torch.cat(apart), atol=1e-3, rtol=0.0)


def test_height_and_width_resize_the_image(pair: Callable[[str], Pair]) -> None:
    def latents(image: Any, **size: int) -> torch.Tensor:
        call = {"num_inference_steps": 2, "strength": 0.5, "output_type": "latent"}
        return pair("sd2").ours(PROMPTS[0], image=image, generator=generators(1), **call, **size).images

    resized = latents(picture(), height=48, width=24)
    assert resized.shape == (1, 4, 12, 6)
    # The same filter as in diffusers' image processor.
    torch.testing.assert_close(resized, latents(picture().resize((24, 48), resample=1)))


# ---- what is refused ----

TENSOR = torch.rand(1, 3, *SIZE)

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("sd1", {"strength": -0.1}, "`strength`: got -0.1, expected a number in"),
    ("sd1", {"strength": 1.01}, "`strength`: got 1.01"),
    ("sd1", {"strength": float("nan")}, "`strength`: got nan"),
    ("sd1", {"strength": "much"}, "`strength`: got 'much'"),
    ("sd1", {"strength": 0.1}, "`strength`: got 0.1, which leaves none of 5 steps; expected at least 0.2"),
    ("sd3", {"strength": 0.0}, "`strength`: got 0.0, which leaves none of 5 steps; expected above 0"),
    ("sd1", {"image": None}, "`strength`: got one without `image`"),
    ("sd1", {"image": "cat.png"}, "`image`: got \\['str'\\], expected a PIL image"),
    ("sd1", {"image": []}, "`image`: got nothing"),
    ("sd1", {"image": [picture(), TENSOR]}, "`image`: got \\['Image', 'Tensor'\\]"),
    ("sd1", {"image": [picture(), picture().resize((8, 8))]}, "`image`: got sizes"),
    ("sd1", {"image": picture().convert("F")}, "`image`: got floating-point pixels"),
    ("sd1", {"image": TENSOR[:, :2]}, "`image`: got shape \\(1, 2, 32, 40\\)"),
    ("sd1", {"image": TENSOR * 2 - 1}, "`image`: got values from -"),
    ("sd1", {"image": TENSOR * 255}, "`image`: got values from .* to 2"),
    ("sd1", {"image": TENSOR * float("nan")}, "`image`: got values from nan"),
    ("sd1", {"image": np.asarray(picture()).astype(np.int64)}, "`image`: got numbers of torch.int64, expected uint8"),
    ("sd1", {"image": [picture()] * 3}, "`image`: got 3, expected a number that divides the 1 pictures"),
    ("sd1", {"height": 30}, "`height`: got 30, expected a multiple of 4; the nearest: 28 or 32"),
    ("sd3", {"width": 60}, "`width`: got 60, expected a multiple of 8; the nearest: 56 or 64"),
    ("sd1", {"image": torch.randn(1, 4, 8, 8), "height": 64}, "`height`, `width`: got 64x32, expected 32x32"),
    ("sd1", {"image": torch.full((1, 4, 8, 8), float("inf"))}, "`image`: got latents that are not finite"),
    ("sdxl", {"strength": None, "denoising_start": 1.2}, "`denoising_start`: got 1.2, expected a number in"),
    (
        "sdxl",
        {"strength": None, "denoising_start": 0.9999},
        "`denoising_start`: got 0.9999, which leaves none of 5 steps",
    ),
    ("sdxl", {"image": None, "strength": None, "denoising_start": 0.5}, "`denoising_start`: got one without `image`"),
    ("sdxl", {"denoising_end": 0.001, "strength": None}, "`denoising_end`: got 0.001, which leaves none"),
]


@pytest.mark.parametrize(("name", "wrong", "message"), REFUSED, ids=[message[:48] for _, _, message in REFUSED])
def test_a_bad_argument_is_named_before_any_network_runs(
    pair: Callable[[str], Pair], name: str, wrong: dict[str, Any], message: str
) -> None:
    pipe = pair(name).ours
    call = {"image": picture(), "strength": 0.5, "num_inference_steps": STEPS, "output_type": "latent", **wrong}
    with NoEncoder(pipe), pytest.raises(ValueError, match=message):
        pipe(PROMPTS[0], **call)
