"""FlowEdit: the paper's walk, an unchanged picture for unchanged prompts, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from hubgen.acceleration.optimize import optimize, restore
from hubgen.controls.attention_maps import AttentionMaps
from hubgen.controls.control import Control, Prepared, Start, Target
from hubgen.controls.controlnet import ControlNet
from hubgen.hub.bundled import bundled_model
from hubgen.pipelines.text_to_image import TextToImagePipeline
from tests.controls.test_controlnet import net_of
from tests.parity import quiet_
from tests.pipelines.test_inversion import Rows

Official = Callable[[str], Path]
Pipes = Callable[[str], Any]

SOURCE, PROMPT = "a red cat", "the big blue heart"
FLOWS = ["sd3", "flux-dev"]
SCALES: dict[str, Any] = {"source_guidance_scale": 3.0, "guidance_scale": 3.0}
CALL: dict[str, Any] = {"num_inference_steps": 5, "height": 32, "width": 32, "output_type": "latent"}


def latents(count: int = 1) -> torch.Tensor:
    return torch.randn(count, 16, 8, 8, generator=torch.Generator().manual_seed(3))


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def edited(pipe: Any, source: Any = SOURCE, prompt: Any = PROMPT, **changes: Any) -> torch.Tensor:
    image = changes.pop("image", latents())
    return pipe.flow_edit(image, source, prompt, **{**CALL, "generator": seeded(), **changes}).images


@pytest.mark.parametrize(("count", "options"), [(1, {}), (3, {"n_avg": 3, "n_max": 5})], ids=str)
@pytest.mark.parametrize("name", FLOWS)
def test_equal_prompts_leave_the_latents_as_they_are(
    name: str, count: int, options: dict[str, Any], pipes: Pipes
) -> None:
    image = latents(count)
    assert torch.equal(edited(pipes(name), SOURCE, SOURCE, image=image, **SCALES, **options), image)
    assert (edited(pipes(name), image=image, **SCALES, **options) - image).abs().max() > 0.1


@pytest.mark.parametrize("sampled", [0, 2])
@torch.no_grad()
def test_it_is_the_papers_walk(sampled: int, pipes: Pipes) -> None:
    """2412.08629, algorithm 1, with the state z = x + d, and the velocities of diffusers' transformer's signature."""
    pipe, x, noise = pipes("sd3"), latents(), seeded()
    found = edited(pipe, n_max=4, n_min=sampled, n_avg=2, source_guidance_scale=2.0, guidance_scale=5.0)
    pipe(SOURCE, **CALL, guidance_scale=1.0)
    sigmas = pipe.scheduler.sigmas

    def velocity(z: torch.Tensor, sigma: torch.Tensor, prompt: str, scale: float) -> torch.Tensor:
        tokens, negative, pooled, negative_pooled = pipe.encode_prompt(prompt)
        texts = {"encoder_hidden_states": torch.cat([negative, tokens])}
        texts["pooled_projections"] = torch.cat([negative_pooled, pooled])
        rows = pipe.transformer(z.repeat(2, 1, 1, 1), timestep=1000 * sigma.repeat(2), **texts, return_dict=False)[0]
        return rows[:1] + scale * (rows[1:] - rows[:1])

    z = x
    for i in range(1, 5 - sampled):
        total = torch.zeros_like(x)
        for _ in range(2):
            z_source = (1 - sigmas[i]) * x + sigmas[i] * torch.randn(x.shape, generator=noise)
            z_target = z + z_source - x
            total += velocity(z_target, sigmas[i], PROMPT, 5.0) - velocity(z_source, sigmas[i], SOURCE, 2.0)
        z = z + (sigmas[i + 1] - sigmas[i]) * total / 2
    for i in range(5 - sampled, 5):
        if i == 5 - sampled:
            z = z + sigmas[i] * (torch.randn(x.shape, generator=noise) - x)
        z = z + (sigmas[i + 1] - sigmas[i]) * velocity(z, sigmas[i], PROMPT, 5.0)
    assert (found - z).abs().max() < 1e-4 * z.std()


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("steps", [3, 5])
def test_of_sampled_steps_alone_it_is_an_image_to_image_call(steps: int, name: str, pipes: Pipes) -> None:
    """From the same noise; of all steps, a plain call, in which nothing is left of the picture."""
    pipe, options = pipes(name), {"guidance_scale": 3.0}
    found = edited(pipe, n_max=steps, n_min=steps, **options)
    expected = pipe(PROMPT, image=latents(), strength=steps / 5, generator=seeded(), **CALL, **options).images
    assert (found - expected).abs().max() < 1e-5 * expected.std()
    if steps == 5:
        other = edited(pipe, n_max=5, n_min=5, image=latents(2)[1:], **options)
        assert (other - found).abs().max() < 1e-5 * expected.std()


def test_the_source_is_asked_at_compared_steps_alone(pipes: Pipes) -> None:
    pipe, rows = pipes("sd3"), Rows()
    edited(pipe, n_max=4, n_min=1, n_avg=2, **SCALES, controls=[rows])
    assert rows.seen == [2] * (3 * 2 * 2 + 1)


def test_pictures_of_a_batch_come_out_as_alone(pipes: Pipes) -> None:
    pipe, prompts = pipes("sd3"), [PROMPT, "a dog"]
    together = edited(pipe, prompt=prompts, image=latents(2), generator=[seeded(1), seeded(2)])
    for i, prompt in enumerate(prompts):
        alone = edited(pipe, prompt=prompt, image=latents(2)[i : i + 1], generator=[seeded(i + 1)])
        assert (together[i] - alone[0]).abs().max() < 1e-3


@pytest.mark.parametrize("name", FLOWS)
def test_defaults_are_the_papers(name: str, pipes: Pipes) -> None:
    written = {
        "sd3": {"num_inference_steps": 50, "n_max": 33, "source_guidance_scale": 3.5, "guidance_scale": 13.5},
        "flux-dev": {"num_inference_steps": 28, "n_max": 24, "source_guidance_scale": 1.5, "guidance_scale": 5.5},
    }[name]
    pipe = pipes(name)
    assert torch.equal(edited(pipe, num_inference_steps=None), edited(pipe, **written))
    assert pipe.num_timesteps == written["n_max"]


@pytest.mark.parametrize("name", FLOWS)
def test_acceleration_changes_nothing_but_rounding(name: str, pipes: Pipes) -> None:
    pipe = pipes(name)
    fast = edited(pipe, **SCALES)
    restore(pipe)
    plain = edited(pipe, **SCALES)
    optimize(pipe)
    assert (fast - plain).abs().max() < 1e-4 * plain.std()


def test_controls_steer_both_prompts(pipes: Pipes, official: Official) -> None:
    pipe, theirs = pipes("sd3"), diffusers.DiffusionPipeline.from_pretrained(official("sd3"))
    net, hint = quiet_(net_of(theirs.transformer)), torch.rand(1, 3, 32, 32)
    plain = edited(pipe, **SCALES)
    assert torch.equal(edited(pipe, **SCALES, controls=[ControlNet(net, hint, scale=0.0)]), plain)
    assert (edited(pipe, **SCALES, controls=[ControlNet(net, hint)]) - plain).abs().max() > 0.01
    assert torch.equal(edited(pipe, SOURCE, SOURCE, **SCALES, controls=[ControlNet(net, hint)]), latents())


class Blend(Control):
    """Changes latents after each step."""

    def prepare(self, target: Target, start: Start) -> Prepared:
        class Blended(Prepared):
            def after_step(self, step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
                return 0.5 * latents

        return Blended()


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("sd1", {}, "flow_edit: got a PNDMScheduler, expected a scheduler of a flow"),
    ("sd3", {"image": None}, "`image`: got None, expected one or several pictures"),
    ("sd3", {"source": None}, "`source_prompt`: got None, expected a prompt"),
    ("sd3", {"prompt": ["a", "b"]}, "`image`: got 1, expected one for each of the 2 in `prompt`"),
    ("sd3", {"n_max": 6}, "`n_max`: got 6, expected a whole number, from 1 to 5"),
    ("sd3", {"n_max": 4, "n_min": 5}, "`n_min`: got 5, expected a whole number, from 0 to 4"),
    ("sd3", {"n_avg": 0}, "`n_avg`: got 0, expected a whole number, at least 1"),
    ("sd3", {"guidance_scale": -1.0}, "`guidance_scale`: got -1.0, expected a finite number"),
    ("sd3", {"output_type": "jpg"}, "`output_type`: got 'jpg', expected one of"),
    ("sd3", {"generator": [seeded(), seeded()]}, "`generator`: got a list of 2, expected one for each of 1"),
    ("sd3", {"controls": [Blend()]}, "`controls`: got one that changes the latents after each step \\(Blended\\)"),
    ("sd3", {"controls": AttentionMaps()}, "`controls`: got .*, expected a list of controls"),
]


@pytest.mark.parametrize(("name", "changes", "message"), BAD, ids=[message[:40] for _, _, message in BAD])
def test_a_bad_argument_is_named_before_the_backbone_runs(
    name: str, changes: dict[str, Any], message: str, pipes: Pipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = pipes(name)
    own = pipe.scheduler

    def ran(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the backbone ran")

    monkeypatch.setattr(pipe.backbone, "forward", ran)
    with pytest.raises(ValueError, match=message):
        edited(pipe, **changes)
    assert pipe.scheduler is own


def test_a_step_cache_is_refused(pipes: Pipes) -> None:
    pipe = pipes("sd3")
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    try:
        with pytest.raises(ValueError, match="flow_edit: got a backbone with a step cache"):
            edited(pipe)
    finally:
        pipe.transformer.disable_cache()


def test_a_trained_flow_moves_towards_the_edit_and_keeps_what_it_was() -> None:
    """A red apple made green: green gains on red, and most of what surrounds it stays nearer than in a new picture."""
    pipe = TextToImagePipeline.from_pretrained(bundled_model(), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    source = pipe("a red apple", num_inference_steps=8, generator=seeded(0), output_type="pt").images
    options = {"num_inference_steps": 12, "generator": seeded(1), "output_type": "pt"}
    edit = pipe.flow_edit(source, "a red apple", "a green apple", **options).images
    fresh = pipe("a green apple", num_inference_steps=12, generator=seeded(1), output_type="pt").images
    green = lambda picture: (picture[:, 1] - picture[:, 0]).mean()  # noqa: E731
    assert green(edit) > green(source)
    assert (edit - source).square().mean() < (fresh - source).square().mean()
