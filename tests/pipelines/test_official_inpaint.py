"""Inpainting: the folders of official layouts give the latents of diffusers' inpainting pipelines."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from tests.official_images import (
    INPAINT,
    PROMPTS,
    SIZE,
    STEPS,
    NoEncoder,
    Pair,
    assert_same,
    generators,
    is_flow,
    mask,
    pairs,
    picture,
)

HEIGHT, WIDTH = SIZE
BLENDED = [name for name in INPAINT if name != "sd1-inpaint"]


@pytest.fixture(scope="module")
def pair(official: Callable[[str], Path]) -> Callable[[str], Pair]:
    return pairs(official, INPAINT)


def inputs(**changed: Any) -> dict[str, Any]:
    return {"image": picture(), "mask_image": mask(), "height": HEIGHT, "width": WIDTH, **changed}


def negative(name: str) -> dict[str, Any]:
    return {} if name.startswith("flux") else {"negative_prompt": "small", "guidance_scale": 4.0}


def plain(level: int) -> Image.Image:
    """A mask of one gray level."""
    return Image.new("L", (WIDTH, HEIGHT), level)


def latent_image(name: str) -> torch.Tensor:
    channels = 16 if is_flow(name) else 4
    return torch.randn(1, channels, HEIGHT // 4, WIDTH // 4, generator=torch.Generator().manual_seed(9))


# ---- the same as diffusers ----


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("name", INPAINT)
def test_latents_are_those_of_diffusers(
    pair: Callable[[str], Pair], name: str, strength: float, shows: Callable[..., None]
) -> None:
    shows(name, "inpainting")
    assert_same(*pair(name).latents(**inputs(strength=strength), **negative(name)))


@pytest.mark.parametrize("name", INPAINT)
def test_latents_of_a_generator_each_are_those_of_diffusers(pair: Callable[[str], Pair], name: str) -> None:
    call = inputs(num_images_per_prompt=2, strength=0.8)
    assert_same(*pair(name).latents((3, 4), **call))


@pytest.mark.parametrize("name", ["sd1-inpaint", "sdxl", "sd3", "flux-dev"])
def test_an_image_and_a_mask_for_each_prompt_are_those_of_diffusers(pair: Callable[[str], Pair], name: str) -> None:
    images, masks = [picture(1), picture(2)], [mask(1), mask(2)]
    assert_same(*pair(name).latents(**inputs(prompt=PROMPTS, image=images, mask_image=masks, strength=0.6)))


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "flux-schnell"])
def test_the_default_strength_is_that_of_diffusers(pair: Callable[[str], Pair], name: str) -> None:
    assert_same(*pair(name).latents(**inputs()))


@pytest.mark.parametrize("name", ["sd1", "sd1-inpaint"])
def test_latents_given_are_the_noise_as_in_diffusers(pair: Callable[[str], Pair], name: str) -> None:
    assert_same(*pair(name).latents(**inputs(latents=latent_image(name), strength=1.0)))


def test_masked_latents_take_the_place_of_the_encoded_masked_image(pair: Callable[[str], Pair]) -> None:
    call = inputs(masked_image_latents=latent_image("sd1-inpaint"), strength=0.7)
    assert_same(*pair("sd1-inpaint").latents(**call))


@pytest.mark.parametrize("name", ["sd1", "sd1-inpaint"])
@pytest.mark.parametrize("scheduler", [diffusers.DDPMScheduler, diffusers.EulerAncestralDiscreteScheduler])
def test_schedulers_that_draw_noise_draw_the_same_as_in_diffusers(
    pair: Callable[[str], Pair], name: str, scheduler: Any
) -> None:
    """So that everything before the loop has drawn as much as in diffusers."""
    assert_same(*pair(name).with_scheduler(scheduler).latents(**inputs(strength=0.8)))


@pytest.mark.parametrize("name", ["sd1", "sd3"])
def test_only_the_part_around_the_mask_is_made_and_put_into_the_image(pair: Callable[[str], Pair], name: str) -> None:
    small = Image.new("L", (64, 48))
    small.paste(255, (20, 12, 36, 24))
    call = inputs(image=picture().resize((64, 48)), mask_image=small, padding_mask_crop=4)
    call |= {"prompt": PROMPTS[0], "num_inference_steps": STEPS, "strength": 0.8}
    ours, theirs = (
        np.asarray(pipe(**call, generator=generators(1)).images[0], dtype=float)
        for pipe in (pair(name).ours, pair(name).theirs)
    )
    assert ours.shape == (48, 64, 3)
    assert (np.abs(ours - theirs) > 2).mean() < 0.01  # rounded twice: decoded, and resized
    np.testing.assert_array_equal(ours[:, :12], np.asarray(picture().resize((64, 48)))[:, :12])


def test_the_refiner_inpaints_where_the_base_stopped(pair: Callable[[str], Pair]) -> None:
    call = inputs(image=latent_image("sdxl"), denoising_start=0.5, strength=0.9)
    assert_same(*pair("sdxl").latents(**call))


# ---- identities ----


@pytest.mark.parametrize("name", BLENDED)
def test_a_black_mask_returns_the_image(pair: Callable[[str], Pair], name: str) -> None:
    image = latent_image(name)
    call = {"image": image, "mask_image": plain(0), "num_inference_steps": 2, "strength": 0.5, "output_type": "latent"}
    assert torch.equal(pair(name).ours(PROMPTS[0], **call).images, image)


@pytest.mark.parametrize("name", BLENDED)
def test_a_white_mask_at_full_strength_is_text_to_image(pair: Callable[[str], Pair], name: str) -> None:
    """Latents for the image, which takes no random number to encode."""
    call: dict[str, Any] = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 2, "output_type": "latent"}
    call["guidance_scale"] = 4.0  # whose default is another one with a mask
    masked = {"image": latent_image(name), "mask_image": plain(255), "strength": 1.0}
    pipe = pair(name).ours
    found = pipe(PROMPTS[0], **masked, **call, generator=generators(1)).images
    torch.testing.assert_close(found, pipe(PROMPTS[0], **call, generator=generators(1)).images)


def test_every_form_of_a_mask_gives_the_same(pair: Callable[[str], Pair]) -> None:
    array = np.asarray(mask(), dtype=np.float32) / 255
    tensor = torch.from_numpy(array)
    forms = [mask(), [mask()], mask().convert("RGB"), array, array[None], array[..., None], array[None, ..., None]]
    forms += [tensor, tensor[None], tensor[None, None], [tensor], [tensor[None]], tensor >= 128 / 255]

    def latents(form: Any) -> torch.Tensor:
        call = inputs(mask_image=form, num_inference_steps=1, strength=1.0, output_type="latent")
        return pair("sd1").ours(PROMPTS[0], **call, generator=generators(1)).images

    first = latents(forms[0])
    for form in forms[1:]:
        torch.testing.assert_close(latents(form), first)


def test_the_inpainting_network_is_shown_mask_and_masked_image(pair: Callable[[str], Pair]) -> None:
    def latents(**changed: Any) -> torch.Tensor:
        call = inputs(num_inference_steps=2, strength=1.0, output_type="latent", **changed)
        return pair("sd1-inpaint").ours(PROMPTS[0], **call, generator=generators(1)).images

    for changed in ({"image": picture(5)}, {"mask_image": mask(5)}):
        assert (latents(**changed) - latents()).abs().max() > 1e-2


# ---- what is refused ----

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (
        "sd1",
        {"mask_image": plain(0), "padding_mask_crop": 4, "output_type": "pil"},
        "`mask_image`: got a mask that is black everywhere",
    ),
    ("sd1", {"image": None}, "`mask_image`: got one without `image`"),
    ("sd1", {"mask_image": None, "padding_mask_crop": 4}, "`padding_mask_crop`: got one without `mask_image`"),
    ("sd1", {"mask_image": torch.rand(1, 3, *SIZE)}, "`mask_image`: got shape \\(1, 3, 32, 40\\)"),
    ("sd1", {"mask_image": torch.rand(1, 1, *SIZE) * 255}, "`mask_image`: got values from .* to 2"),
    ("sd1", {"mask_image": torch.ones(1, 1, *SIZE, dtype=torch.int64)}, "`mask_image`: got numbers of torch.int64"),
    ("sd1", {"mask_image": "mask.png"}, "`mask_image`: got \\['str'\\]"),
    ("sd1", {"mask_image": [mask()] * 2}, "`mask_image`: got 2, expected a number that divides the 1 pictures"),
    ("sd1", {"strength": -1}, "`strength`: got -1"),
    ("sd1", {"strength": 0.1}, "`strength`: got 0.1, which leaves none of 5 steps; expected at least 0.2"),
    ("sd1", {"padding_mask_crop": -1}, "`padding_mask_crop`: got -1"),
    ("sd1", {"padding_mask_crop": 4}, "`output_type`: got 'latent', expected 'pil'"),
    ("sd1", {"padding_mask_crop": 4, "image": [picture()] * 2}, "`image`: got a tensor or several"),
    ("sd1-inpaint", {"mask_image": None}, "`mask_image`: got None, expected a mask"),
    ("sd1-inpaint", {"image": None, "mask_image": None, "strength": None}, "`image`, `mask_image`: got none"),
    ("sd1-inpaint", {"image": torch.randn(1, 4, 8, 10)}, "`masked_image_latents`: got None"),
    ("sd1-inpaint", {"masked_image_latents": torch.randn(1, 4, 8, 8)}, "`masked_image_latents`: got \\(1, 4, 8, 8\\)"),
    ("sd3", {"width": 60}, "`width`: got 60, expected a multiple of 8; the nearest: 56 or 64"),
]


@pytest.mark.parametrize(("name", "wrong", "message"), REFUSED, ids=[message[:48] for _, _, message in REFUSED])
def test_a_bad_argument_is_named_before_any_network_runs(
    pair: Callable[[str], Pair], name: str, wrong: dict[str, Any], message: str
) -> None:
    pipe = pair(name).ours
    call = {**inputs(strength=0.5), "num_inference_steps": STEPS, "output_type": "latent", **wrong}
    with NoEncoder(pipe), pytest.raises(ValueError, match=message):
        pipe(PROMPTS[0], **call)
