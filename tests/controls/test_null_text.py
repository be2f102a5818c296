"""Null-text inversion: what it is made of changes nothing, and what it finds leads a guided call back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from hubgen.controls.null_text import NullText, NullTextFit
from hubgen.hub.bundled import bundled_model
from hubgen.pipelines.inversion import Inversion
from hubgen.pipelines.text_to_image import TextToImagePipeline

Official = Callable[[str], Path]
Pipes = Callable[[str], Any]

PROMPT, OTHER = "a red cat", "the big blue heart"
CALL: dict[str, Any] = {"num_inference_steps": 4, "height": 32, "width": 32}
GUIDED: dict[str, dict[str, Any]] = {
    "sd1": {"guidance_scale": 4.0},
    "sdxl": {"guidance_scale": 4.0},
    "sd3": {"guidance_scale": 4.0},
    "flux-dev": {"true_cfg_scale": 4.0, "negative_prompt": ""},
}


def inverted(pipe: Any, count: int = 1, **changes: Any) -> Inversion:
    images = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    return pipe.invert(images, **{"prompt": PROMPT, **CALL, **changes})


def back(pipe: Any, inversion: Inversion, *prompt: Any, **options: Any) -> torch.Tensor:
    return pipe.reconstruct(inversion, *prompt, output_type="latent", **options).images


def error(pipe: Any, inversion: Inversion, **options: Any) -> float:
    return (back(pipe, inversion, **options) - inversion.data).square().mean().item()


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd1", "sd3"])
def test_the_negative_prompts_own_embeddings_change_nothing(name: str, pipes: Pipes) -> None:
    """To the last bit; and one picture's serve several."""
    pipe = pipes(name)
    inversion, prompts = inverted(pipe), [PROMPT, OTHER]
    own = pipe.encode_prompt(prompts, negative_prompt="a dog")[1][None].expand(4, -1, -1, -1)
    call = {"negative_prompt": "a dog", "guidance_scale": 4.0}
    plain = back(pipe, inversion, prompts, **call)
    assert torch.equal(back(pipe, inversion, prompts, **call, controls=[NullText(own)]), plain)
    assert (back(pipe, inversion, prompts, **call, controls=[NullText(own[:, :1])]) - plain).abs().max() < 1e-4
    last = torch.cat([own[:3], 0 * own[3:]])
    assert (back(pipe, inversion, prompts, **call, controls=[NullText(last)]) - plain).abs().max() > 1e-3


@pytest.mark.parametrize("name", GUIDED)
def test_it_leads_a_guided_call_nearer_to_the_picture(name: str, pipes: Pipes) -> None:
    pipe, guided = pipes(name), GUIDED[name]
    inversion = inverted(pipe)
    parameters = list(pipe.backbone.parameters())
    needed = [parameter.requires_grad for parameter in parameters]
    null = pipe.null_text(inversion, **guided)
    assert null.embeddings.shape[:2] == (4, 1) and not null.embeddings.requires_grad
    assert [parameter.requires_grad for parameter in parameters] == needed and True in needed
    assert all(parameter.grad is None for parameter in parameters)
    without, found = error(pipe, inversion, **guided), error(pipe, inversion, **guided, controls=[null])
    assert found < 0.9 * without


def test_the_optimised_call_is_the_call_with_what_it_found(pipes: Pipes) -> None:
    pipe = pipes("sd1")
    inversion = inverted(pipe)
    fit = NullTextFit(inversion.trajectory, 4.0)
    during = back(pipe, inversion, guidance_scale=4.0, controls=[fit])
    assert torch.equal(back(pipe, inversion, guidance_scale=4.0, controls=[fit.result]), during)


def test_every_step_begins_with_what_the_one_before_found_and_ends_early(pipes: Pipes) -> None:
    """An error that every state is below ends a step's optimisation after one of Adam's steps, of its length."""
    pipe = pipes("sd1")
    inversion, start = inverted(pipe), pipe.encode_prompt(PROMPT)[1]
    null = pipe.null_text(inversion, guidance_scale=4.0, early_stop=1e9, learning_rate=0.1).embeddings
    moves = torch.diff(torch.cat([start[None], null]), dim=0).abs().flatten(1).amax(1)
    expected = 0.1 * (1 - torch.arange(4) / 8)
    assert (moves - expected).abs().max() < 1e-3
    one = pipe.null_text(inversion, guidance_scale=4.0, inner_steps=1, early_stop=0.0, learning_rate=0.1).embeddings
    assert torch.equal(one, null)


def test_pictures_of_a_batch_are_optimised_as_alone(pipes: Pipes) -> None:
    pipe = pipes("sd1")
    both, options = inverted(pipe, 2, num_inference_steps=2), {"guidance_scale": 4.0, "early_stop": 0.0}
    alone = pipe.null_text(inverted(pipe, num_inference_steps=2), **options).embeddings
    together = pipe.null_text(both, **options).embeddings
    assert together.shape[1] == 2
    close = (together[:, :1] - alone).abs() < 1e-3  # where a gradient is near 0, rounding may turn Adam's step round
    assert close.float().mean() > 0.98
    assert error(pipe, both, guidance_scale=4.0, controls=[NullText(together)]) < error(pipe, both, guidance_scale=4.0)


def test_bfloat16_weights_are_optimised_in_float32(pipes: Pipes, official: Official) -> None:
    pipe = TextToImagePipeline.from_pretrained(official("sd3"), torch_dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    inversion = inverted(pipe, num_inference_steps=2)
    null = pipe.null_text(inversion, guidance_scale=4.0)
    assert null.embeddings.dtype == torch.float32
    assert error(pipe, inversion, guidance_scale=4.0, controls=[null]) < error(pipe, inversion, guidance_scale=4.0)


def test_the_optimisation_goes_with_an_adapter_and_gradient_checkpointing(pipes: Pipes) -> None:
    from peft import LoraConfig

    pipe = pipes("sd3")
    inversion = inverted(pipe, num_inference_steps=2)
    pipe.transformer.enable_gradient_checkpointing()
    kept = pipe.null_text(inversion, guidance_scale=4.0).embeddings
    pipe.transformer.disable_gradient_checkpointing()
    torch.testing.assert_close(pipe.null_text(inversion, guidance_scale=4.0).embeddings, kept, atol=1e-5, rtol=0)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "style")
    try:
        styled = inverted(pipe, num_inference_steps=2)
        null = pipe.null_text(styled, guidance_scale=4.0)
        adapted = error(pipe, styled, guidance_scale=4.0, controls=[null])
        assert adapted < error(pipe, styled, guidance_scale=4.0)
        assert (null.embeddings - kept).abs().max() > 1e-3
    finally:
        pipe.transformer.delete_adapters("style")


def test_bad_ones_are_named(pipes: Pipes) -> None:
    pipe, flux = pipes("sd3"), pipes("flux-dev")
    inversion = inverted(pipe)
    null = NullText(torch.zeros(4, 1, 77, 32))
    for message, call in [
        ("`inversion`: got one without a trajectory", lambda: pipe.null_text(inverted(pipe, method="midpoint"))),
        ("expected a call with classifier-free guidance", lambda: pipe.null_text(inversion, guidance_scale=1.0)),
        ("expected a call with classifier-free guidance", lambda: flux.null_text(inverted(flux))),
        ("`true_cfg_scale`: got 4.0, expected none", lambda: pipe.null_text(inversion, true_cfg_scale=4.0)),
        ("`inner_steps`: got 0, expected a whole number", lambda: pipe.null_text(inversion, inner_steps=0)),
        ("`learning_rate`: got -1, expected a finite number", lambda: pipe.null_text(inversion, learning_rate=-1)),
        ("`controls`: got .*, expected none: null-text", lambda: pipe.null_text(inversion, controls=[null])),
        ("`embeddings`: got \\(4, 3\\), expected a tensor", lambda: NullText(torch.zeros(4, 3))),
        (
            "`controls`: got NullText of 4 steps and 1 pictures, expected 3 steps",
            lambda: pipe(PROMPT, num_inference_steps=3, height=32, width=32, guidance_scale=4.0, controls=[null]),
        ),
        (
            "`controls`: got NullText of \\(77, 32\\) tokens and features, expected those of the prompts",
            lambda: back(pipe, inversion, guidance_scale=4.0, controls=[null]),
        ),
        ("expected a call with classifier-free", lambda: back(pipe, inversion, guidance_scale=1.0, controls=[null])),
        (
            "`trajectory`: got 5 states of 1 pictures, expected 5 of 2",
            lambda: back(
                pipe, inversion, [PROMPT, OTHER], guidance_scale=4.0, controls=[NullTextFit(inversion.trajectory, 4.0)]
            ),
        ),
        ("this NullTextFit has seen 0 of 4 steps", lambda: NullTextFit(inversion.trajectory, 4.0).result),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    with torch.inference_mode(), pytest.raises(ValueError, match=r"torch\.inference_mode, where nothing"):
        pipe.null_text(inversion, guidance_scale=4.0)
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    try:
        with pytest.raises(ValueError, match="expected a backbone without a step cache"):
            pipe.null_text(inversion, guidance_scale=4.0)
    finally:
        pipe.transformer.disable_cache()


@pytest.mark.slow
def test_a_trained_model_finds_a_picture_at_guidance_4_three_times_nearer() -> None:
    """Of colours that run from corner to corner, which no prompt describes, so that guidance leads far away."""
    pipe = TextToImagePipeline.from_pretrained(bundled_model(), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    y, x = np.mgrid[0:64, 0:64]
    picture = Image.fromarray(np.stack([4 * x, 4 * y, 252 - 2 * x - 2 * y], -1).astype(np.uint8))
    inversion = pipe.invert(picture, "a rainbow", num_inference_steps=24)
    null = pipe.null_text(inversion, guidance_scale=4.0)
    without, found = (error(pipe, inversion, guidance_scale=4.0, controls=controls) for controls in ([], [null]))
    assert found < without / 3
