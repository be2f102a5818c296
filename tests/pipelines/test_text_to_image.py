"""Text to image, with tiny real models: an MM-DiT on a rectified flow and a U-Net on DDPM's path."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from hubgen.pipelines.text_to_image import TextToImagePipeline
from tests import models

PROMPTS = ["a red cat", "the big blue dog"]
STEPS = 3


@pytest.fixture(scope="module", params=["transformer", "unet"])
def pipe(request: pytest.FixtureRequest) -> TextToImagePipeline:
    return models.pipeline(request.param)


@pytest.fixture(scope="module")
def mmdit() -> TextToImagePipeline:
    return models.pipeline("transformer")


def draw(
    pipe: TextToImagePipeline, prompt: Any = None, seeds: tuple[int, ...] = (1, 2), **options: Any
) -> torch.Tensor:
    """(B, 3, H, W) of two prompts on seeds 1 and 2, unless told otherwise."""
    if prompt is None and "prompt_embeds" not in options:
        prompt = PROMPTS
    options = {"num_inference_steps": STEPS, "output_type": "pt", "generator": models.seeded(*seeds), **options}
    return pipe(prompt, **options).images


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for rounding, which differs with the size of a batch and grows from step to step."""
    torch.testing.assert_close(found, expected, atol=5e-4, rtol=0.0)


def assert_different(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() > 5e-3


# ---- what comes out ----


def test_every_output_type_is_the_same_picture(pipe: TextToImagePipeline) -> None:
    pixels = draw(pipe)
    assert pixels.shape == (2, 3, 16, 16) and pixels.min() >= 0 and pixels.max() <= 1
    array = draw(pipe, output_type="np")
    np.testing.assert_allclose(array, pixels.permute(0, 2, 3, 1).numpy(), atol=2e-5)
    pictures = draw(pipe, output_type="pil")
    assert all(isinstance(picture, Image.Image) and picture.size == (16, 16) for picture in pictures)
    np.testing.assert_allclose(np.asarray(pictures[0]) / 255, array[0], atol=0.51 / 255)
    latents = draw(pipe, output_type="latent")
    assert latents.shape == (2, 4, 8, 8)
    assert_same(pipe.decode_latents(latents, "pt"), pixels)


def test_return_dict_off_returns_a_tuple(mmdit: TextToImagePipeline) -> None:
    returned = mmdit(PROMPTS, num_inference_steps=1, output_type="pt", return_dict=False)
    assert isinstance(returned, tuple) and returned[0].shape == (2, 3, 16, 16)


def test_height_and_width_are_those_asked_for(pipe: TextToImagePipeline) -> None:
    assert draw(pipe, height=8, width=24).shape == (2, 3, 8, 24)


# ---- seeds ----


def test_a_picture_of_a_list_of_generators_is_the_same_in_any_batch(pipe: TextToImagePipeline) -> None:
    together = draw(pipe, PROMPTS, (1, 2))
    apart = torch.cat([draw(pipe, prompt, (seed,)) for prompt, seed in zip(PROMPTS, (1, 2), strict=True)])
    assert_same(together, apart)
    assert_same(draw(pipe, PROMPTS[::-1], (2, 1)), together.flip(0))


def test_a_single_generator_gives_the_same_pictures_again_and_another_seed_others(pipe: TextToImagePipeline) -> None:
    first, again, other = (draw(pipe, generator=models.seeded(seed)[0]) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert_different(first, other)


def test_pictures_of_a_prompt_lie_next_to_each_other(pipe: TextToImagePipeline) -> None:
    two_each = draw(pipe, PROMPTS, (1, 2, 3, 4), num_images_per_prompt=2)
    repeated = draw(pipe, [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]], (1, 2, 3, 4))
    assert_same(two_each, repeated)


def test_latents_given_are_the_noise_that_is_walked_back_from(mmdit: TextToImagePipeline) -> None:
    noise = torch.cat([torch.randn(1, 4, 8, 8, generator=generator) for generator in models.seeded(1, 2)])
    assert_same(draw(mmdit, latents=noise, generator=None), draw(mmdit))


# ---- prompts ----


def test_the_prompt_matters(pipe: TextToImagePipeline) -> None:
    assert_different(draw(pipe, "a red cat", (1,)), draw(pipe, "a blue dog", (1,)))


def test_the_negative_prompt_matters_and_the_empty_one_is_none(pipe: TextToImagePipeline) -> None:
    without = draw(pipe)
    assert_different(draw(pipe, negative_prompt="small green apple"), without)
    assert_same(draw(pipe, negative_prompt=""), without)
    assert_same(draw(pipe, negative_prompt=["", ""]), without)


def test_a_negative_prompt_without_guidance_is_told_to_have_no_effect(
    mmdit: TextToImagePipeline, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        same = draw(mmdit, negative_prompt="small green apple", guidance_scale=1.0)
    assert "no effect" in caplog.text
    assert_same(same, draw(mmdit, guidance_scale=1.0))


def test_embeddings_stand_for_their_prompts(pipe: TextToImagePipeline) -> None:
    with torch.no_grad():
        positive, negative = pipe.condition.encode(PROMPTS), pipe.condition.encode(["the dog", "a heart"])
    embedded = draw(
        pipe,
        prompt_embeds=positive.tokens,
        pooled_prompt_embeds=positive.pooled,
        negative_prompt_embeds=negative.tokens,
        negative_pooled_prompt_embeds=negative.pooled,
    )
    assert_same(embedded, draw(pipe, negative_prompt=["the dog", "a heart"]))


def test_a_unet_needs_no_pooled_embeddings() -> None:
    pipe = models.pipeline("unet")
    with torch.no_grad():
        embedded = draw(pipe, prompt_embeds=pipe.condition.encode(PROMPTS).tokens)
    assert_same(embedded, draw(pipe))


# ---- guidance ----


def test_guidance_of_one_is_the_conditional_prediction_alone(pipe: TextToImagePipeline) -> None:
    """Any negative prompt gives the same, so that the unconditional half cannot have been there."""
    one = draw(pipe, guidance_scale=1.0)
    assert_same(draw(pipe, guidance_scale=1.0, negative_prompt="a heart"), one)
    assert_different(draw(pipe, guidance_scale=4.0), one)


def test_an_empty_interval_is_guidance_of_one_and_the_full_one_is_guidance(pipe: TextToImagePipeline) -> None:
    assert_same(draw(pipe, guidance_interval=(0.0, 0.0)), draw(pipe, guidance_scale=1.0))
    assert_same(draw(pipe, guidance_interval=(0.0, 1.0)), draw(pipe))
    assert_different(draw(pipe, guidance_interval=(0.3, 0.7)), draw(pipe))


def test_batched_guidance_equals_two_calls(pipe: TextToImagePipeline) -> None:
    """A loop written out here, with one call for each half."""
    from hubgen.conditioning.condition import Condition
    from hubgen.conditioning.predict import predict

    scale = 4.0
    with torch.no_grad():
        cond, uncond = pipe.condition.encode(PROMPTS), pipe.condition.encode(["", ""])
        generators = models.seeded(1, 2)
        latents = torch.cat([torch.randn(1, 4, 8, 8, generator=generator) for generator in generators])
        pipe.scheduler.set_timesteps(STEPS)
        for t in pipe.scheduler.timesteps:
            one, other = (
                predict(pipe.backbone, latents, t.expand(2), Condition.of_text(text)) for text in (uncond, cond)
            )
            guided = one + scale * (other - one)
            latents = pipe.scheduler.step(guided, t, latents, generator=generators).prev_sample
    assert_same(draw(pipe, guidance_scale=scale, output_type="latent"), latents)


def test_rescale_changes_the_picture(pipe: TextToImagePipeline) -> None:
    assert_different(draw(pipe, guidance_rescale=0.7), draw(pipe))


# ---- schedulers ----


def test_a_call_without_settings_uses_the_pipelines_defaults() -> None:
    pipe = models.pipeline(default_num_inference_steps=3, default_guidance_scale=2.0)
    plain = pipe(PROMPTS, generator=models.seeded(1, 2), output_type="pt").images
    assert pipe.num_timesteps == 3 and pipe.guidance_scale == 2.0
    assert_same(plain, draw(pipe, num_inference_steps=3, guidance_scale=2.0))


@pytest.mark.parametrize(
    ("backbone", "scheduler"),
    [
        ("transformer", diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)),
        ("transformer", diffusers.FlowMatchHeunDiscreteScheduler()),
        (
            "transformer",
            diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
        ),
        ("unet", diffusers.DDPMScheduler()),
        ("unet", diffusers.DDIMScheduler()),
        ("unet", diffusers.EulerDiscreteScheduler()),
        ("unet", diffusers.EulerAncestralDiscreteScheduler()),
        ("unet", diffusers.DPMSolverMultistepScheduler()),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_diffusers_schedulers_work_and_a_batch_is_still_its_pictures(backbone: str, scheduler: Any) -> None:
    pipe = models.pipeline(backbone, scheduler=scheduler)
    together = draw(pipe)
    assert together.isfinite().all()
    assert_same(together, torch.cat([draw(pipe, PROMPTS[i], (i + 1,)) for i in range(2)]))


@pytest.mark.parametrize(
    ("backbone", "theirs"),
    [("transformer", diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)), ("unet", diffusers.DDPMScheduler())],
    ids=["transformer", "unet"],
)
def test_diffusers_scheduler_of_the_same_name_gives_the_same_picture(backbone: str, theirs: Any) -> None:
    assert_same(draw(models.pipeline(backbone, scheduler=theirs)), draw(models.pipeline(backbone)))


def test_grids_of_ones_own_are_walked(mmdit: TextToImagePipeline) -> None:
    draw(mmdit)
    shift = mmdit.scheduler.shift
    sigmas = [sigma / (shift - (shift - 1) * sigma) for sigma in mmdit.scheduler.sigmas[:-1].tolist()]
    assert_same(draw(mmdit, num_inference_steps=None, sigmas=sigmas), draw(mmdit))
    unet = models.pipeline("unet")
    draw(unet)
    timesteps = unet.scheduler.timesteps.tolist()
    assert_same(draw(unet, num_inference_steps=None, timesteps=timesteps), draw(unet))


def test_dynamic_shifting_follows_the_size(mmdit: TextToImagePipeline) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64
    )
    pipe = models.pipeline(scheduler=scheduler)
    assert pipe.dynamic_shift((8, 8)) == pytest.approx(0.5)
    assert pipe.dynamic_shift((32, 32)) == pytest.approx(1.15)
    draw(pipe, height=8, width=8)
    small = pipe.scheduler.sigmas.clone()
    draw(pipe, height=32, width=32)
    assert (pipe.scheduler.sigmas[1:-1] > small[1:-1]).all()


# ---- callbacks ----


def test_a_callback_sees_every_step_and_can_change_latents(pipe: TextToImagePipeline) -> None:
    seen = []

    def replace_last(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, float(timestep)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == STEPS - 1 else {}

    found = draw(pipe, callback_on_step_end=replace_last, output_type="latent")
    assert seen == list(enumerate(pipe.scheduler.timesteps.tolist()))
    assert not found.any()


def test_a_callback_can_change_the_prompt(mmdit: TextToImagePipeline) -> None:
    def keep(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        return tensors

    def forget(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": torch.zeros_like(tensors["prompt_embeds"])}

    names = ["latents", "prompt_embeds", "negative_pooled_prompt_embeds"]
    assert_same(draw(mmdit, callback_on_step_end=keep, callback_on_step_end_tensor_inputs=names), draw(mmdit))
    changed = draw(mmdit, callback_on_step_end=forget, callback_on_step_end_tensor_inputs=names)
    assert_different(changed, draw(mmdit))


def test_a_callback_can_end_the_call(mmdit: TextToImagePipeline) -> None:
    steps = []

    def stop(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> None:
        steps.append(step)
        pipe._interrupt = True

    assert draw(mmdit, callback_on_step_end=stop).shape == (2, 3, 16, 16)
    assert steps == [0]
    assert not torch.equal(draw(mmdit), draw(mmdit, callback_on_step_end=stop))


# ---- precision and devices ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_starts_from_the_same_noise_and_ends_near_the_same_picture(dtype: torch.dtype) -> None:
    single = draw(models.pipeline(), guidance_scale=1.0)
    pipe = models.pipeline().to(dtype)
    half = draw(pipe, guidance_scale=1.0)
    assert half.dtype == torch.float32
    assert (half - single).abs().mean() < 0.1 * single.std()
    assert pipe.vae.dtype == dtype  # put back where decoding upcast it


def test_a_half_precision_autoencoder_that_overflows_decodes_in_single_precision() -> None:
    pipe = models.pipeline()
    latents = draw(pipe, output_type="latent")
    expected = pipe.decode_latents(latents, "pt")
    pipe.vae.to(torch.float16)
    rounded = models.vae().half().float()  # the same rounding of the weights, computed in single precision
    pipe_rounded = models.pipeline(vae=rounded)
    with torch.no_grad():
        decoded = pipe_rounded.decode_latents(latents, "pt")
        assert torch.allclose(pipe.decode_latents(latents, "pt"), decoded, atol=1e-5)
        pipe.vae.register_to_config(force_upcast=False)
        assert not torch.allclose(pipe.decode_latents(latents, "pt"), decoded, atol=1e-5)
    torch.testing.assert_close(pipe.decode_latents(latents, "pt"), expected, atol=0.02, rtol=0.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is something to offload from")
def test_offloading_without_an_accelerator_says_so() -> None:
    with pytest.raises(RuntimeError, match="accelerator"):
        models.pipeline().enable_model_cpu_offload()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backbone", ["transformer", "unet"])
def test_offloading_leaves_the_picture_as_it_is(backbone: str) -> None:
    expected = draw(models.pipeline(backbone).to("cuda"))
    pipe = models.pipeline(backbone)
    pipe.enable_model_cpu_offload()
    torch.testing.assert_close(draw(pipe), expected, atol=1e-3, rtol=1e-3)
    assert pipe.text_encoder.device.type == pipe.backbone.device.type == pipe.vae.device.type == "cpu"


# ---- saving and loading ----


@pytest.mark.parametrize("backbone", ["transformer", "unet"])
@pytest.mark.parametrize("loader", [TextToImagePipeline, diffusers.DiffusionPipeline])
def test_a_saved_pipeline_loads_and_draws_the_same(backbone: str, loader: Any, tmp_path: Path) -> None:
    saved = models.pipeline(backbone, default_guidance_scale=3.0)
    saved.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is TextToImagePipeline
    assert type(loaded.scheduler) is type(saved.scheduler) and type(loaded.vae) is type(saved.vae)
    assert loaded.config.default_guidance_scale == 3.0
    for name, parameter in saved.backbone.state_dict().items():
        assert torch.equal(loaded.backbone.state_dict()[name], parameter)
    assert_same(draw(loaded), draw(saved))
    loaded.save_pretrained(tmp_path / "again")
    indices = [json.loads((folder / "model_index.json").read_text()) for folder in (tmp_path, tmp_path / "again")]
    assert "_name_or_path" not in indices[1]  # a folder of this machine
    assert indices[0] == indices[1]


def test_components_can_be_replaced_while_loading(tmp_path: Path) -> None:
    models.saved_pipeline(tmp_path, "unet")
    scheduler = diffusers.DDIMScheduler()
    loaded = TextToImagePipeline.from_pretrained(tmp_path, scheduler=scheduler, torch_dtype=torch.bfloat16)
    assert loaded.scheduler is scheduler
    assert loaded.unet.dtype == loaded.vae.dtype == loaded.text_encoder.dtype == torch.bfloat16


def test_from_pipe_shares_the_components(mmdit: TextToImagePipeline) -> None:
    other = TextToImagePipeline.from_pipe(mmdit)
    assert all(other.components[name] is component for name, component in mmdit.components.items())


def test_a_folder_that_is_no_pipeline_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path}.*model_index.json"):
        TextToImagePipeline.from_pretrained(tmp_path)


def test_exactly_one_backbone_is_needed() -> None:
    with pytest.raises(ValueError, match="both"):
        models.pipeline("transformer", unet=models.unet())
    with pytest.raises(ValueError, match="neither"):
        models.pipeline("transformer", transformer=None)


# ---- our components in diffusers' pipelines ----


def test_our_components_in_diffusers_pipeline_give_our_pipelines_picture() -> None:
    """Stable Diffusion 3's own pipeline, fed with the same embeddings and noise."""
    pipe = models.pipeline()
    text = [None] * 6
    theirs = diffusers.StableDiffusion3Pipeline(pipe.transformer, pipe.scheduler, pipe.vae, *text)
    theirs.set_progress_bar_config(disable=True)
    with torch.no_grad():
        positive, negative = pipe.condition.encode(PROMPTS), pipe.condition.encode(["", ""])
    options = {
        "prompt_embeds": positive.tokens,
        "pooled_prompt_embeds": positive.pooled,
        "negative_prompt_embeds": negative.tokens,
        "negative_pooled_prompt_embeds": negative.pooled,
        "num_inference_steps": STEPS,
        "guidance_scale": 4.0,
        "output_type": "pt",
        "height": 16,
        "width": 16,
    }
    assert_same(
        pipe(generator=models.seeded(1, 2), **options).images, theirs(generator=models.seeded(1, 2), **options).images
    )


# ---- bad input ----


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("prompt", {"prompt": []}),
        ("prompt", {"prompt": 5}),
        ("prompt", {"prompt": ["a cat", None]}),
        ("prompt", {"prompt": None}),
        ("prompt", {"prompt": "a cat", "prompt_embeds": torch.zeros(1, 8, 16)}),
        ("negative_prompt", {"negative_prompt": ["a", "b", "c"]}),
        ("negative_prompt", {"negative_prompt": []}),
        ("negative_prompt", {"negative_prompt": 5}),
        ("negative_prompt", {"negative_prompt": "a", "negative_prompt_embeds": torch.zeros(2, 8, 16)}),
        (
            "prompt_embeds",
            {"prompt": None, "prompt_embeds": torch.zeros(8, 16), "pooled_prompt_embeds": torch.zeros(1)},
        ),
        ("pooled_prompt_embeds", {"prompt": None, "prompt_embeds": torch.zeros(1, 8, 16)}),
        ("pooled_prompt_embeds", {"pooled_prompt_embeds": torch.zeros(2, 16)}),
        ("negative_pooled_prompt_embeds", {"negative_prompt_embeds": torch.zeros(2, 8, 16)}),
        ("num_inference_steps", {"num_inference_steps": 0}),
        ("num_inference_steps", {"num_inference_steps": -1}),
        ("num_inference_steps", {"num_inference_steps": 1.5}),
        ("num_inference_steps", {"num_inference_steps": True}),
        ("num_inference_steps", {"num_inference_steps": "4"}),
        ("guidance_scale", {"guidance_scale": math.nan}),
        ("guidance_scale", {"guidance_scale": -2.0}),
        ("guidance_rescale", {"guidance_rescale": 2.0}),
        ("guidance_interval", {"guidance_interval": (0.9, 0.1)}),
        ("height", {"height": 0}),
        ("height", {"height": -16}),
        ("height", {"height": 17}),
        ("height", {"height": 16.0}),
        ("width", {"width": 18}),
        ("width", {"width": 800_000}),
        ("num_images_per_prompt", {"num_images_per_prompt": 0}),
        ("generator", {"generator": models.seeded(1, 2, 3)}),
        ("generator", {"generator": 5}),
        ("generator", {"generator": [None, None]}),
        ("latents", {"latents": torch.zeros(2, 4, 16, 16)}),
        ("latents", {"latents": "noise"}),
        ("output_type", {"output_type": "jpeg"}),
        ("callback_on_step_end", {"callback_on_step_end": 5}),
        ("callback_on_step_end_tensor_inputs", {"callback_on_step_end_tensor_inputs": ["image"]}),
        ("sigmas", {"sigmas": [1.0, 0.5]}),
        ("sigmas", {"num_inference_steps": None, "sigmas": [2.0, 0.5]}),
        ("timesteps", {"num_inference_steps": None, "timesteps": []}),
    ],
)
def test_a_bad_argument_is_named_before_anything_is_computed(
    mmdit: TextToImagePipeline, argument: str, options: dict[str, Any]
) -> None:
    computed = []
    hooks = [
        model.register_forward_pre_hook(lambda *_: computed.append(True))
        for model in (mmdit.text_encoder, mmdit.transformer)
    ]
    try:
        with pytest.raises(ValueError, match=rf"\b{argument}\b"):
            mmdit(**{"prompt": PROMPTS, "num_inference_steps": STEPS, **options})
    finally:
        for hook in hooks:
            hook.remove()
    assert not computed


def test_the_nearest_sizes_that_the_model_can_make_are_told(mmdit: TextToImagePipeline) -> None:
    with pytest.raises(ValueError, match="multiple of 4; the nearest: 16 or 20"):
        mmdit("a cat", height=17)
    with pytest.raises(ValueError, match="at most 32"):
        mmdit("a cat", width=36)
    with pytest.raises(ValueError, match="the nearest: 4"):
        mmdit("a cat", width=2)


def test_a_scheduler_that_takes_no_sigmas_says_so() -> None:
    with pytest.raises(ValueError, match="`sigmas`.*DDPMScheduler"):
        models.pipeline("unet")("a cat", sigmas=[1.0, 0.5])


def test_what_a_callback_returns_is_checked(mmdit: TextToImagePipeline) -> None:
    with pytest.raises(ValueError, match="callback_on_step_end.*image"):
        draw(mmdit, callback_on_step_end=lambda *_: {"image": None})
