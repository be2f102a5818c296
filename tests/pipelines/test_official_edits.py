"""Models that are shown a picture: folders of official layouts give the latents of diffusers' pipelines for them."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from PIL import Image

from hubgen.autoencoders.latents import LatentSpace
from hubgen.controls.controlnet import ControlNet
from hubgen.controls.ip_adapter import IPAdapter
from hubgen.controls.redux import Redux
from hubgen.pipelines.sizes import reference_size
from hubgen.pipelines.text_to_image import TextToImagePipeline
from tests.controls.test_controlnet import net_of
from tests.official import sd3, vae
from tests.official_images import SIZE, NoEncoder, generators, mask, picture, quiet, unpacked
from tests.parity import quiet_, randomize_

Official = Callable[[str], Path]

HEIGHT, WIDTH = SIZE
CALL: dict[str, Any] = {"prompt": "a red cat", "num_inference_steps": 3, "output_type": "latent"}
SIZED: dict[str, Any] = {**CALL, "height": HEIGHT, "width": WIDTH}
KONTEXT = {"max_area": HEIGHT * WIDTH, "_auto_resize": False}
"""Has diffusers make pictures, and show them, at the tiny size"""


def wide(seed: int = 0) -> Image.Image:
    """Of one of the forms at which Kontext is shown pictures, so that it is not resized."""
    return picture(seed).resize((WIDTH, 24))


BEGUN: dict[str, Any] = {"image": picture(2), "strength": 0.5}
INPAINTED: dict[str, Any] = {**BEGUN, "mask_image": mask()}
TASKS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "InstructPix2Pix": ("sd1-instruct", None, {**CALL, "image": picture()}),
    "InstructPix2Pix, other scales": (
        "sd1-instruct",
        None,
        {**CALL, "image": picture(), "guidance_scale": 4.0, "image_guidance_scale": 2.5, "negative_prompt": "small"},
    ),
    "InstructPix2Pix, off by the picture's scale": (
        "sd1-instruct",
        None,
        {**CALL, "image": picture(), "image_guidance_scale": 0.5},
    ),
    "InstructPix2Pix, latents": ("sd1-instruct", None, {**CALL, "image": torch.linspace(-2, 2, 320).view(1, 4, 8, 10)}),
    "InstructPix2Pix XL": ("sdxl-instruct", None, {**SIZED, "image": picture()}),
    "InstructPix2Pix XL, rescaled": (
        "sdxl-instruct",
        None,
        {**SIZED, "image": picture(), "negative_prompt": "small", "guidance_rescale": 0.7},
    ),
    "FLUX control": ("flux-control", None, {**SIZED, "control_image": picture()}),
    "FLUX control, image": (
        "flux-control",
        diffusers.FluxControlImg2ImgPipeline,
        {**SIZED, **BEGUN, "control_image": picture()},
    ),
    "FLUX control, mask": (
        "flux-control",
        diffusers.FluxControlInpaintPipeline,
        {**SIZED, **INPAINTED, "control_image": picture()},
    ),
    "FLUX fill": ("flux-fill", None, {**SIZED, "image": picture(), "mask_image": mask()}),
    "FLUX fill, part of the way": ("flux-fill", None, {**SIZED, **INPAINTED}),
    "FLUX Kontext": ("flux-kontext", None, {**SIZED, "image": wide()}),
    "FLUX Kontext, another form": ("flux-kontext", None, {**SIZED, "image": picture().resize((24, 40))}),
    "FLUX Kontext, guided": (
        "flux-kontext",
        None,
        {**SIZED, "image": wide(), "negative_prompt": "the big blue dog", "true_cfg_scale": 3.0},
    ),
    "FLUX Kontext, mask": ("flux-kontext", diffusers.FluxKontextInpaintPipeline, {**SIZED, **INPAINTED}),
}


class Sides:
    """Ours and diffusers' pipeline of a folder."""

    def __init__(self, folder: Path, cls: Any = None):
        options = {"default_side": 32} if "kontext" in folder.name else {}
        self.ours = quiet(TextToImagePipeline.from_pretrained(folder, **options))
        theirs = quiet(diffusers.DiffusionPipeline.from_pretrained(folder))
        if cls is not None:
            taken = inspect.signature(cls).parameters
            theirs = quiet(cls(**{name: part for name, part in theirs.components.items() if name in taken}))
        self.theirs = theirs

    def assert_same(self, seeds: int | tuple[int, ...] = 3, **call: Any) -> torch.Tensor:
        own = KONTEXT if "_auto_resize" in inspect.signature(type(self.theirs).__call__).parameters else {}
        expected = unpacked(self.theirs(**call, **own, generator=generators(seeds)).images, SIZE)
        found = self.ours(**call, generator=generators(seeds)).images
        assert found.shape == expected.shape and expected.std() > 0.05
        assert (found - expected).abs().max() < 1e-4 * expected.std()
        return found


@pytest.mark.parametrize("task", TASKS)
def test_latents_are_those_of_diffusers(task: str, official: Official) -> None:
    name, cls, call = TASKS[task]
    both = Sides(official(name), cls)
    found = both.assert_same(**call)
    argument = "control_image" if "control_image" in call else "image"
    if torch.is_tensor(call[argument]):
        return
    other = both.ours(**{**call, argument: picture(7)}, generator=generators(3)).images
    assert (found - other).abs().max() > 1e-3 * found.std(), "the picture changes next to nothing"


@pytest.mark.parametrize("task", ["InstructPix2Pix", "FLUX control", "FLUX fill", "FLUX Kontext"])
def test_several_pictures_and_generators_are_those_of_diffusers(task: str, official: Official) -> None:
    name, cls, call = TASKS[task]
    both = Sides(official(name), cls)
    several = {**call, "prompt": ["a red cat", "the big blue dog"]}
    for argument in ("image", "control_image", "mask_image"):
        if argument in call:
            several[argument] = [mask(1), mask(2)] if argument == "mask_image" else [wide(1), wide(2)]
    both.assert_same((3, 4), **several)


# ---- folders ----


@pytest.mark.parametrize("name", ["sd1-instruct", "sdxl-instruct", "flux-control", "flux-fill", "flux-kontext"])
def test_a_folder_keeps_its_class_and_diffusers_loads_it(name: str, official: Official, tmp_path: Path) -> None:
    both = Sides(official(name))
    both.ours.save_pretrained(tmp_path)
    before, after = (json.loads((one / "model_index.json").read_text()) for one in (official(name), tmp_path))
    assert after["_class_name"] == before["_class_name"]
    assert {key: value for key, value in after.items() if isinstance(value, list)} == {
        key: value for key, value in before.items() if isinstance(value, list)
    }
    call = next(call for one, cls, call in TASKS.values() if one == name and cls is None)
    again = Sides(tmp_path)
    assert type(again.theirs) is type(both.theirs)
    latents = again.assert_same(**call)
    assert torch.equal(latents, both.ours(**call, generator=generators(3)).images)


@pytest.mark.parametrize("written", [["pipeline_ultra_edit", "StableDiffusion3InstructPix2PixPipeline"], None])
def test_an_ultra_edit_folder_loads_and_is_saved_with_what_it_is_shown(written: Any, tmp_path: Path) -> None:
    pipe = ultra_edit(2, tmp_path / "official", written)
    assert pipe.shown is not None and pipe.shown.guided and not pipe.shown.normalised
    assert pipe.vae.config.shift_factor == 0  # as it was trained
    options = {"edit_input_normalised": True, "latents_shifted": True}
    pipe = TextToImagePipeline.from_pretrained(tmp_path / "official", **options)
    assert pipe.vae.config.shift_factor == 0.0609
    pipe.save_pretrained(tmp_path / "again")
    again = quiet(TextToImagePipeline.from_pretrained(tmp_path / "again"))
    assert again.shown is not None and again.shown.normalised
    call = {**CALL, "image": picture()}
    assert torch.equal(
        quiet(pipe)(**call, generator=generators(3)).images, again(**call, generator=generators(3)).images
    )


def ultra_edit(times: int, folder: Path, name: Any = None, **options: Any) -> TextToImagePipeline:
    """SD3 with the channels of x_t so many times, from a folder of the name that UltraEdit's have."""
    sd3(in_channels=16 * times).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "StableDiffusion3InstructPix2PixPipeline" if name is None else name
    (folder / "model_index.json").write_text(json.dumps(index))
    return quiet(TextToImagePipeline.from_pretrained(folder, **options))


# ---- UltraEdit, for which diffusers has no pipeline of its own ----


@torch.no_grad()
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("times", [2, 3])
def test_ultra_edit_follows_its_formula(times: int, normalised: bool, tmp_path: Path) -> None:
    """The rows of InstructPix2Pix; picture and mask are the posterior's mode, of diffusers' pipeline shifted, scaled.

    The formula is written out here from the pipelines of UltraEdit's authors and of diffusers' community.
    """
    pipe = ultra_edit(times, tmp_path, edit_input_normalised=normalised, latents_shifted=normalised)
    taken = inspect.signature(diffusers.StableDiffusion3Pipeline).parameters
    parts = {name: part for name, part in pipe.components.items() if name in taken}
    base = diffusers.StableDiffusion3Pipeline(**parts)
    call = {**CALL, "image": picture(), "guidance_scale": 4.0, "image_guidance_scale": 2.0, "negative_prompt": "small"}
    if times == 3:
        call["mask_image"] = mask()
    found = pipe(**call, generator=generators(3)).images

    def shown(image: Image.Image) -> torch.Tensor:
        pixels = base.image_processor.preprocess(image.convert("RGB"))
        latents = pipe.vae.encode(pixels).latent_dist.mode()
        config = pipe.vae.config
        return (latents - config.shift_factor) * config.scaling_factor if normalised else latents

    beside = torch.cat([shown(image) for image in [picture(), *([mask()] if times == 3 else [])]], dim=1)
    text, negative, pooled, negative_pooled = base.encode_prompt("a red cat", None, None, negative_prompt="small")
    texts, pools = torch.cat([text, negative, negative]), torch.cat([pooled, negative_pooled, negative_pooled])
    scheduler = pipe.scheduler
    scheduler.set_timesteps(3)
    x = torch.randn(1, 16, HEIGHT // 4, WIDTH // 4, generator=generators(3))
    for t in scheduler.timesteps:
        rows = torch.cat([torch.cat([x] * 3), torch.cat([beside, beside, torch.zeros_like(beside)])], dim=1)
        told = {"encoder_hidden_states": texts, "pooled_projections": pools, "timestep": t.expand(3)}
        both, alone, neither = pipe.transformer(rows, **told).sample.chunk(3)
        guided = neither + 4.0 * (both - alone) + 2.0 * (alone - neither)
        x = scheduler.step(guided, t, x, return_dict=False)[0]
    assert (found - x).abs().max() < 1e-4 * x.std()
    config, pictures = pipe.vae.config, pipe(**{**call, "output_type": "pt"}, generator=generators(3)).images
    decoded = pipe.vae.decode(found / config.scaling_factor + (0.0609 if normalised else 0)).sample
    torch.testing.assert_close(pictures, (decoded / 2 + 0.5).clamp(0, 1), atol=1e-4, rtol=0.0)


def test_without_a_mask_ultra_edit_is_shown_a_white_one(tmp_path: Path) -> None:
    pipe, call = ultra_edit(3, tmp_path), {**CALL, "image": picture()}
    white = Image.new("L", (WIDTH, HEIGHT), 255)
    drawn = [pipe(**call, **more, generator=generators(3)).images for more in ({}, {"mask_image": white})]
    assert torch.equal(*drawn)


# ---- how often the network is asked ----


def rows_of(pipe: TextToImagePipeline, **call: Any) -> list[int]:
    """The rows of each call of the backbone."""
    seen: list[int] = []
    hook = pipe.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(args[0] if args else kwargs["hidden_states"])), with_kwargs=True
    )
    pipe(**{**CALL, "image": picture(), **call}, generator=generators(3))
    hook.remove()
    return seen


@pytest.mark.parametrize("name", ["sd1-instruct", "sdxl-instruct"])
def test_a_step_has_three_rows_and_one_without_guidance(name: str, official: Official) -> None:
    pipe = Sides(official(name)).ours
    scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.register_modules(scheduler=scheduler)
    assert rows_of(pipe) == [3, 3, 3]
    assert rows_of(pipe, guidance_scale=1.0) == [1, 1, 1] == rows_of(pipe, image_guidance_scale=0.9)
    assert rows_of(pipe, guidance_interval=(0.5, 1.0)) == [3, 1, 1]


def test_scales_of_one_are_the_conditional_prediction(official: Official) -> None:
    pipe = Sides(official("sd1-instruct")).ours
    call = {**CALL, "image": picture(), "guidance_scale": 1.0}
    one = pipe(**call, image_guidance_scale=1.0, generator=generators(3)).images
    for changed in ({"image_guidance_scale": 3.0}, {"negative_prompt": "small"}):
        assert torch.equal(pipe(**{**call, **changed}, generator=generators(3)).images, one)


# ---- with other controls ----


def adapter_of(pipe: TextToImagePipeline, scale: float) -> IPAdapter:
    adapter = IPAdapter.fresh(pipe.backbone, image_features=12, tokens=2, image_embeds=torch.ones(1, 12), scale=scale)
    randomize_(adapter.network, 3)
    return adapter


@pytest.mark.parametrize("name", ["sd1-instruct", "sdxl-instruct", "flux-control", "flux-fill", "flux-kontext"])
def test_other_controls_go_with_it_and_at_scale_0_change_nothing(name: str, official: Official) -> None:
    pipe = Sides(official(name)).ours
    task, call = next((task, dict(call)) for task, (one, cls, call) in TASKS.items() if one == name and cls is None)
    call |= {"num_inference_steps": 2, "height": HEIGHT, "width": WIDTH}
    backbone = diffusers.DiffusionPipeline.from_pretrained(official(name)).components
    theirs = backbone.get("unet") or backbone["transformer"]
    net = quiet_(net_of(theirs, in_channels=64) if name.startswith("flux") else net_of(narrow(theirs)))
    plain = pipe(**call, generator=generators(3)).images
    for control in (lambda scale: ControlNet(net, picture(5), scale), lambda scale: adapter_of(pipe, scale)):
        drawn = pipe(**call, controls=[control(1.0)], generator=generators(3)).images
        assert torch.isfinite(drawn).all() and (drawn - plain).abs().max() > 1e-3 * plain.std(), task
    nothing = [ControlNet(net, picture(5), 0.0), adapter_of(pipe, 0.0)]
    assert torch.equal(pipe(**call, controls=nothing, generator=generators(3)).images, plain)


def narrow(unet: Any) -> Any:
    """The U-Net of x_t alone, for which ControlNets are made."""
    config = {name: value for name, value in unet.config.items() if name[0] != "_"}
    return type(unet)(**{**config, "in_channels": 4})


def test_an_image_and_a_mask_keep_what_lies_outside(official: Official) -> None:
    """InstructPix2Pix with a mask, for which diffusers has no pipeline: the rest of the picture stays."""
    pipe = Sides(official("sd1-instruct")).ours
    left = Image.new("L", (WIDTH, HEIGHT))
    left.paste(255, (0, 0, WIDTH // 2, HEIGHT))
    latents = torch.randn(1, 4, HEIGHT // 4, WIDTH // 4, generator=generators(9))
    drawn = pipe(**CALL, image=latents, mask_image=left, generator=generators(3)).images
    assert torch.equal(drawn[..., WIDTH // 8 :], latents[..., WIDTH // 8 :])
    assert (drawn - latents)[..., : WIDTH // 8].abs().min() > 0


# ---- Redux ----


@pytest.mark.parametrize("name", ["flux-dev", "flux-schnell"])
def test_redux_is_diffusers_prior(name: str, official: Official) -> None:
    both = Sides(official(name))
    prior = diffusers.FluxPriorReduxPipeline.from_pretrained(official("flux-redux-texts"))
    shape = {key: value for key, value in SIZED.items() if key != "prompt"}
    expected = both.theirs(**prior(picture(), prompt="a red cat"), **shape, generator=generators(3)).images
    redux = Redux.from_pretrained(official("flux-redux"), image=picture())
    found = both.ours(**SIZED, controls=[redux], generator=generators(3)).images
    plain = both.ours(**SIZED, generator=generators(3)).images
    expected = unpacked(expected, SIZE)
    assert (found - expected).abs().max() < 1e-4 * expected.std()
    assert (found - plain).abs().max() > 1e-2 * plain.std()
    for nothing in ({"scale": 0.0}, {"start": 0.9}):
        redux = Redux.from_pretrained(official("flux-redux"), image=picture(), **nothing)
        assert torch.equal(both.ours(**SIZED, controls=[redux], generator=generators(3)).images, plain)


def test_a_redux_folder_says_what_it_is_for(official: Official) -> None:
    with pytest.raises(ValueError, match="has no backbone and steers another model, FLUX.1: .*Redux.from_pretrained"):
        TextToImagePipeline.from_pretrained(official("flux-redux"))


# ---- sizes ----


def test_kontext_is_shown_pictures_at_the_sizes_of_its_training() -> None:
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    space = LatentSpace(vae(block_out_channels=(8,) * 4, **levels), {}, 2)
    assert space.factor == 8
    for height, width in [(512, 512), (300, 900), (900, 301), (640, 480), (1000, 1234), (7, 3000)]:
        form = width / height
        _, w, h = min((abs(form - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
        assert reference_size((height, width), space) == (h // 16 * 16, w // 16 * 16)


# ---- what is refused ----

WITHOUT = "this model is shown one at every step"
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("sd1-instruct", {}, f"`image`: got None, expected a picture: {WITHOUT}"),
    ("sdxl-instruct", {}, f"`image`: got None, expected a picture: {WITHOUT}"),
    ("flux-kontext", {}, f"`image`: got None, expected a picture: {WITHOUT}"),
    ("flux-control", {"image": picture()}, f"`control_image`: got None, expected a picture: {WITHOUT}"),
    ("flux-fill", {}, "`image`, `mask_image`: got none, expected both: this model inpaints"),
    ("flux-fill", {"image": picture()}, "`mask_image`: got None, expected a mask"),
    ("sd1", {"image_guidance_scale": 1.5}, "`image_guidance_scale`: got 1.5, expected none: this model is not guided"),
    (
        "flux-control",
        {"control_image": picture(), "image_guidance_scale": 1.5},
        "`image_guidance_scale`: got 1.5, expected none",
    ),
    (
        "sd1-instruct",
        {"image": picture(), "image_guidance_scale": -1},
        "`image_guidance_scale`: got -1, expected",
    ),
    ("sd1", {"control_image": picture()}, "`control_image`: got one, expected none: this model is not shown one"),
    ("sd1-instruct", {"image": picture(), "control_image": picture()}, "`control_image`: got one, expected none"),
    ("sd1-instruct", {"image": [picture()] * 2}, "`image`: got 2, expected a number that divides the 1 pictures"),
    ("flux-kontext", {"image": [picture()] * 2}, "`image`: got 2, expected a number that divides the 1 pictures"),
    (
        "flux-control",
        {"control_image": [picture()] * 3},
        "`control_image`: got 3, expected a number that divides the 1 pictures",
    ),
    ("sd1-instruct", {"image": picture(), "strength": 0.5}, "`strength`: got one, expected none: this call begins at"),
    ("flux-kontext", {"image": picture(), "strength": 0.5}, "`strength`: got one, expected none: this call begins at"),
    (
        "flux-control",
        {"control_image": torch.zeros(1, 16, 8, 8), "height": 32, "width": 40},
        "`control_image`: got latents of 8x8, expected those of the result of 32x40 pixels",
    ),
]


@pytest.mark.parametrize(("name", "call", "message"), REFUSED)
def test_what_does_not_fit_is_refused_before_any_network_runs(
    name: str, call: dict[str, Any], message: str, official: Official
) -> None:
    pipe = Sides(official(name)).ours
    with NoEncoder(pipe), pytest.raises(ValueError) as error:
        pipe(**{**CALL, **call})
    assert str(error.value).startswith(message), error.value


def test_a_backbone_without_such_tokens_or_channels_is_refused(official: Official) -> None:
    for edit_input, message in {
        "reference": "`edit_input`: got 'reference' for a backbone of 4 channels, expected one of 4, and one that",
        "instruction": "`edit_input`: got 'instruction' for a backbone of 4 channels, expected one of 8 or 12",
        "picture": "`edit_input`: got 'picture', expected None or one of 'control', 'instruction', 'reference'",
    }.items():
        with pytest.raises(ValueError, match=message):
            TextToImagePipeline.from_pretrained(official("sd1"), edit_input=edit_input)


def test_a_redux_of_other_features_or_numbers_is_refused(official: Official) -> None:
    for name, image, message in (
        ("sd1", picture(), "`controls`: got a Redux of 32 features, expected 16"),
        ("flux-dev", [picture()] * 2, "`image`: got 2, expected a number that divides the 1 pictures"),
    ):
        pipe = Sides(official(name)).ours
        redux = Redux.from_pretrained(official("flux-redux"), image=image)
        with NoEncoder(pipe), pytest.raises(ValueError, match=message):
            pipe(**CALL, controls=[redux])
    with pytest.raises(ValueError, match="is a FluxPipeline, expected a FluxPriorReduxPipeline"):
        Redux.from_pretrained(official("flux-dev"), image=picture())
