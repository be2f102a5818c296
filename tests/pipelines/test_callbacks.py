"""Callbacks written for diffusers' pipelines do in ours what they do there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.callbacks import (
    IPAdapterScaleCutoffCallback,
    MultiPipelineCallbacks,
    SD3CFGCutoffCallback,
    SDCFGCutoffCallback,
    SDXLCFGCutoffCallback,
)

import hubgen
from tests import models

PROMPTS = ["a red cat", "the big blue dog"]
THEIRS = {
    "sd1": diffusers.StableDiffusionPipeline,
    "sdxl": diffusers.StableDiffusionXLPipeline,
    "sd3": diffusers.StableDiffusion3Pipeline,
}
CUTOFFS = {"sd1": SDCFGCutoffCallback, "sdxl": SDXLCFGCutoffCallback, "sd3": SD3CFGCutoffCallback}
POOLED = {"sd1": [], "sdxl": ["add_text_embeds", "add_time_ids"], "sd3": ["pooled_prompt_embeds"]}
Pair = tuple[Any, Any]


@pytest.fixture(params=THEIRS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def pair(name: str, official: Callable[[str], Path]) -> Pair:
    pipes = tuple(cls.from_pretrained(official(name)) for cls in (hubgen.TextToImagePipeline, THEIRS[name]))
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    return pipes


def latents(pipe: Any, prompt: Any = PROMPTS[0], **call: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return pipe(prompt, generator=generator, num_inference_steps=4, output_type="latent", **call).images


def assert_same(pair: Pair, **call: Any) -> torch.Tensor:
    ours, theirs = (latents(pipe, **call) for pipe in pair)
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0.0)
    assert (ours - latents(pair[0])).abs().max() > 1e-3  # the callback does something
    return ours


def test_the_cutoff_callbacks_of_diffusers_end_the_guidance(name: str, pair: Pair) -> None:
    assert_same(pair, callback_on_step_end=CUTOFFS[name](cutoff_step_ratio=0.5))


def test_a_cutoff_acts_on_every_prompt_of_a_batch(name: str, pair: Pair) -> None:
    ours = pair[0]
    noise = torch.randn(latents(ours).shape, generator=torch.Generator().manual_seed(2))
    call = {"latents": noise, "callback_on_step_end": CUTOFFS[name](cutoff_step_ratio=0.5)}
    alone = [latents(ours, prompt, **call) for prompt in PROMPTS]
    together = latents(ours, PROMPTS, **{**call, "latents": noise.repeat(2, 1, 1, 1)})
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-3, rtol=0.0)


def test_the_second_half_may_be_handed_back(name: str, pair: Pair) -> None:
    """As diffusers' documentation of dynamic guidance has it."""

    def cut(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == int(pipe.num_timesteps * 0.5):
            pipe._guidance_scale = 0.0
            return {key: value.chunk(2)[-1] for key, value in tensors.items()}
        return tensors

    names = ["prompt_embeds", *POOLED[name]]
    assert_same(pair, callback_on_step_end=cut, callback_on_step_end_tensor_inputs=names)


def test_the_strength_of_guidance_may_change_between_steps(pair: Pair) -> None:
    def halve(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            pipe._guidance_scale *= 0.5
        return tensors

    assert_same(pair, callback_on_step_end=halve, guidance_scale=6.0)


@pytest.mark.parametrize("edit", [lambda x: x.mul_(1.5), lambda x: x * 1.5])
def test_an_edit_of_the_rows_of_both_branches_acts(pair: Pair, edit: Callable[[torch.Tensor], torch.Tensor]) -> None:
    def change(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": edit(tensors["prompt_embeds"])} if step == 0 else {}

    assert_same(pair, callback_on_step_end=change, callback_on_step_end_tensor_inputs=["prompt_embeds"])


def test_several_callbacks_of_diffusers_act_together(name: str, pair: Pair) -> None:
    seen = []

    class Note(IPAdapterScaleCutoffCallback):
        def callback_fn(self, pipeline: Any, step_index: int, timesteps: Any, callback_kwargs: Any) -> Any:
            seen.append((step_index, pipeline.num_timesteps))
            return callback_kwargs

    both = MultiPipelineCallbacks([Note(cutoff_step_ratio=0.5), CUTOFFS[name](cutoff_step_ratio=0.5)])
    found = latents(pair[0], callback_on_step_end=both)
    assert seen == [(step, pair[0].num_timesteps) for step in range(pair[0].num_timesteps)]
    assert torch.equal(found, latents(pair[0], callback_on_step_end=CUTOFFS[name](cutoff_step_ratio=0.5)))


def test_the_ip_adapters_scale_is_set_through_the_pipelines_method(pair: Pair) -> None:
    scales: list[float] = []
    pair[0].set_ip_adapter_scale = scales.append
    latents(pair[0], callback_on_step_end=IPAdapterScaleCutoffCallback(cutoff_step_ratio=0.5))
    assert scales == [0.0]


def test_guidance_cannot_begin_in_the_middle_and_rows_have_to_fit() -> None:
    pipe = models.pipeline("unet")

    def set_scale(pipe: Any, *_: Any) -> dict[str, Any]:
        pipe._guidance_scale = 5.0
        return {}

    call = {"num_inference_steps": 3, "output_type": "latent"}
    with pytest.raises(ValueError, match="`_guidance_scale`: got 5.0 from a callback, expected at most 1"):
        pipe("a cat", guidance_scale=1.0, callback_on_step_end=set_scale, **call)
    for rows, scale, expected in ((3, 4.0, "2, or 1 for the positive branch"), (3, 1.0, "1")):
        embeds = torch.zeros(rows, models.MAX_LENGTH, models.TEXT_WIDTH)
        with pytest.raises(ValueError, match=f"got `prompt_embeds` of 3 rows, expected {expected}"):
            pipe("a cat", guidance_scale=scale, callback_on_step_end=lambda *_, e=embeds: {"prompt_embeds": e}, **call)


def test_eta_0_is_handed_on_to_schedulers_with_another_default(official: Callable[[str], Path]) -> None:
    pipes = [cls.from_pretrained(official("sd1")) for cls in (hubgen.TextToImagePipeline, THEIRS["sd1"])]
    found = {}
    for pipe in pipes:
        pipe.scheduler = diffusers.TCDScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        found[pipe] = [latents(pipe), latents(pipe, eta=0.0), latents(pipe, eta=0.3)]
    for ours, theirs in zip(*found.values(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0.0)
    assert not torch.allclose(found[pipes[0]][1], found[pipes[0]][2])
    with pytest.raises(ValueError, match="`eta`: got None, expected a finite number"):
        latents(pipes[0], eta=None)


@pytest.mark.parametrize("whole", [np.int64, np.uint8, lambda n: torch.tensor(n).numpy()[()]])
def test_counts_and_sizes_may_be_any_whole_numbers(whole: Callable[[int], Any]) -> None:
    pipe = models.pipeline("unet")
    draw = {"generator": [torch.Generator().manual_seed(seed) for seed in (1, 2)], "output_type": "np"}
    counts = {"height": 16, "width": 24, "num_inference_steps": 3, "num_images_per_prompt": 2, "clip_skip": None}
    expected = pipe("a cat", **counts, **draw).images
    draw["generator"] = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    numbers = {name: value if value is None else whole(value) for name, value in counts.items()}
    assert np.array_equal(pipe("a cat", **numbers, **draw).images, expected)
