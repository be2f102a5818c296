"""Pictures to noise and back: diffusers' DDIM inversion, exact identities of the methods, and what goes with them."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from hubgen.acceleration.optimize import optimize, restore
from hubgen.autoencoders.latents import normalised, posterior
from hubgen.controls.attention_maps import AttentionMaps
from hubgen.controls.control import Control, Prepared, Start, Target
from hubgen.controls.controlnet import ControlNet
from hubgen.hub.bundled import bundled_model
from hubgen.pipelines.inversion import Inversion
from hubgen.pipelines.text_to_image import TextToImagePipeline
from hubgen.schedulers.flow_match_midpoint import FlowMatchMidpointScheduler
from tests.controls.test_controlnet import net_of
from tests.parity import quiet_

Official = Callable[[str], Path]
Pipes = Callable[[str], Any]

PROMPT = "a red cat"
CALL: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 5, "height": 32, "width": 32}
FLOWS = ["sd3", "flux-dev"]


def images(count: int = 1) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def inverted(pipe: Any, method: str = "euler", **changes: Any) -> Inversion:
    return pipe.invert(**{"image": images(), "method": method, **CALL, **changes})


def back(pipe: Any, inversion: Inversion, *prompt: Any, **options: Any) -> torch.Tensor:
    return pipe.reconstruct(inversion, *prompt, output_type="latent", **options).images


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Rows(Control):
    """Counts the rows of the backbone's calls."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def prepare(self, target: Target, start: Start) -> Prepared:
        rows = self

        class Counted(Prepared):
            def before_call(self, call: Any) -> None:
                rows.seen.append(len(call.x_t))

        return Counted()


# ---- what is computed ----


@pytest.mark.parametrize(("name", "guidance"), [("sd1", 1.0), ("sd1", 3.0), ("sd2", 1.0), ("sdxl", 1.0)])
def test_on_variance_preserving_paths_it_is_the_walk_of_diffusers_inverse_scheduler(
    name: str, guidance: float, pipes: Pipes, official: Official
) -> None:
    pipe = pipes(name)
    inversion = inverted(pipe, guidance_scale=guidance)
    theirs = diffusers.DiffusionPipeline.from_pretrained(official(name))
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = diffusers.DDIMInverseScheduler.from_config(theirs.scheduler.config, clip_sample=False)
    call = {**CALL, "guidance_scale": guidance, "output_type": "latent"}
    expected = theirs(**call, latents=inversion.data).images
    assert (inversion.latents - expected).abs().max() < 1e-4 * expected.std()
    theirs.scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config, clip_sample=False)
    expected = theirs(**call, latents=inversion.latents).images
    assert (back(pipe, inversion) - expected).abs().max() < 1e-4 * expected.std()


@torch.no_grad()
@pytest.mark.parametrize("name", FLOWS)
def test_along_flows_it_is_eulers_method_on_the_grid_from_below(name: str, pipes: Pipes) -> None:
    pipe = pipes(name)
    inversion = inverted(pipe)
    pipe(**CALL, guidance_scale=1.0, output_type="latent")
    sigmas, x = pipe.scheduler.sigmas.flip(0), inversion.data
    tokens = pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False) if name == "sd3" else None
    for sigma, sigma_next in itertools.pairwise(sigmas):
        if tokens is not None:
            text = {"encoder_hidden_states": tokens[0], "pooled_projections": tokens[2]}
            u = pipe.transformer(x, timestep=1000 * sigma[None], **text, return_dict=False)[0]
        else:
            from hubgen.conditioning.families.flux import pack, token_positions, unpack

            states, pooled, positions = pipe.encode_prompt(PROMPT)
            text = {"encoder_hidden_states": states, "pooled_projections": pooled, "txt_ids": positions}
            more = {"img_ids": token_positions(8, 8, torch.device("cpu")), "guidance": torch.ones(1)}
            u = pipe.transformer(pack(x), timestep=sigma[None], **text, **more, return_dict=False)[0]
            u = unpack(u, 8, 8)
        x = x + (sigma_next - sigma) * u
    assert (inversion.latents - x).abs().max() < 1e-4 * x.std()
    assert torch.equal(inversion.trajectory[0], inversion.data)
    assert torch.equal(inversion.trajectory[-1], inversion.latents) and len(inversion.trajectory) == 6


@pytest.mark.parametrize("name", FLOWS)
def test_rf_of_full_strength_ends_at_the_noise_and_at_the_picture_and_of_none_is_eulers(
    name: str, pipes: Pipes
) -> None:
    pipe, whole = pipes(name), (0.0, 1.0)
    full = inverted(pipe, "rf", gamma=1.0, eta=1.0, eta_span=whole, generator=seeded())
    noise = torch.randn(full.data.shape, generator=seeded())
    assert (full.latents - noise).abs().max() < 1e-5
    assert (back(pipe, full) - full.data).abs().max() < 1e-5
    none = inverted(pipe, "rf", gamma=0.0, eta=0.0, eta_span=whole, generator=seeded())
    euler = inverted(pipe)
    assert torch.equal(none.latents, euler.latents)
    assert torch.equal(back(pipe, none), back(pipe, euler))
    half = inverted(pipe, "rf", generator=seeded())
    assert (half.latents - noise).abs().mean() < (euler.latents - noise).abs().mean()


@pytest.mark.parametrize("name", FLOWS)
def test_the_first_step_of_fireflow_is_the_midpoints_there_and_back(name: str, pipes: Pipes) -> None:
    pipe = pipes(name)
    one, other = (inverted(pipe, method, num_inference_steps=1) for method in ("midpoint", "fireflow"))
    assert torch.equal(one.latents, other.latents)
    assert torch.equal(back(pipe, one), back(pipe, other))


@pytest.mark.parametrize("name", FLOWS)
def test_second_order_comes_back_nearer(name: str, pipes: Pipes) -> None:
    pipe, errors = pipes(name), {}
    for method in ("euler", "midpoint", "fireflow"):
        inversion = inverted(pipe, method, num_inference_steps=10)
        errors[method] = (back(pipe, inversion) - inversion.data).square().mean().item()
    assert errors["midpoint"] < 0.3 * errors["euler"] and errors["fireflow"] < 0.3 * errors["euler"]


@pytest.mark.parametrize(("method", "calls"), [("euler", 5), ("midpoint", 10), ("fireflow", 6), ("rf", 5)])
def test_a_guided_inversion_guides_every_call_of_the_model(method: str, calls: int, pipes: Pipes) -> None:
    rows = Rows()
    inverted(pipes("sd3"), method, guidance_scale=3.0, controls=[rows])
    assert rows.seen == [2] * calls


def test_the_latents_are_the_posteriors_mean_and_latents_are_taken_as_they_are(pipes: Pipes) -> None:
    pipe = pipes("sd3")
    with torch.no_grad():
        mean = normalised(posterior(pipe.vae, 2 * images() - 1)[0], pipe.vae)
    one = inverted(pipe)
    assert torch.equal(one.data, mean)
    assert torch.equal(inverted(pipe, image=mean).latents, one.latents)


# ---- several pictures, other prompts, other parts ----


@pytest.mark.parametrize("method", ["euler", "rf"])
def test_pictures_of_a_batch_come_out_as_alone(method: str, pipes: Pipes) -> None:
    pipe, prompts = pipes("sd3"), [PROMPT, "the big blue heart"]
    together = inverted(pipe, method, image=images(2), prompt=prompts, generator=[seeded(1), seeded(2)])
    returned = back(pipe, together)
    for i, prompt in enumerate(prompts):
        alone = inverted(pipe, method, image=images(2)[i : i + 1], prompt=prompt, generator=seeded(i + 1))
        assert (together.latents[i] - alone.latents[0]).abs().max() < 1e-4
        assert (returned[i] - back(pipe, alone)[0]).abs().max() < 1e-3
    same = inverted(pipe, method, image=images(2), generator=[seeded(1), seeded(2)])
    assert (same.latents[0] - together.latents[0]).abs().max() < 1e-4


def test_the_noises_serve_several_prompts_in_turns(pipes: Pipes) -> None:
    pipe, prompts = pipes("sd3"), [PROMPT, "the big blue heart"]
    inversion = inverted(pipe, "rf", generator=seeded())
    both = back(pipe, inversion, prompts)
    for i, prompt in enumerate(prompts):
        assert (both[i] - back(pipe, inversion, prompt)[0]).abs().max() < 1e-3
    assert (both[0] - both[1]).abs().max() > 0.01


@pytest.mark.parametrize("method", ["midpoint", "fireflow"])
def test_a_pipeline_with_the_methods_scheduler_makes_the_same(method: str, pipes: Pipes, tmp_path: Path) -> None:
    """Also after it was saved and loaded: methods are schedulers like others."""
    pipe = pipes("sd3")
    inversion = inverted(pipe, method)
    expected, call = back(pipe, inversion), {**CALL, "guidance_scale": 1.0, "output_type": "latent"}
    own = TextToImagePipeline(**{**pipe.components, "scheduler": inversion.scheduler})
    own.set_progress_bar_config(disable=True)
    assert torch.equal(own(**call, latents=inversion.latents).images, expected)
    own.save_pretrained(tmp_path)
    loaded = TextToImagePipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler).__name__ == type(inversion.scheduler).__name__
    assert torch.equal(loaded(**call, latents=inversion.latents).images, expected)


def test_a_picture_is_begun_at_whole_midpoint_steps(pipes: Pipes) -> None:
    pipe = pipes("sd3")
    midpoint = FlowMatchMidpointScheduler.from_config(pipe.scheduler.config)
    own = TextToImagePipeline(**{**pipe.components, "scheduler": midpoint})
    own.set_progress_bar_config(disable=True)
    call = {**CALL, "image": images(), "output_type": "latent", "guidance_scale": 1.0}
    for options in ({"strength": 0.6}, {"denoising_start": 0.5}, {"denoising_start": 0.7}):
        rows = Rows()
        data = inverted(pipe).data if "denoising_start" in options else images()
        found = own(**{**call, **options, "image": data}, controls=[rows], generator=seeded()).images
        assert found.isfinite().all() and 0 < len(rows.seen) < 10 and len(rows.seen) % 2 == 0


def test_the_pipeline_has_its_own_scheduler_again_also_after_an_error(pipes: Pipes) -> None:
    pipe = pipes("sd1")
    own, config = pipe.scheduler, dict(pipe.config)

    def fail(*args: Any) -> dict[str, Any]:
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        inverted(pipe, callback_on_step_end=fail)
    inversion = inverted(pipe)
    back(pipe, inversion)
    assert pipe.scheduler is own and dict(pipe.config) == config


def test_an_inversion_that_is_stopped_is_none(pipes: Pipes) -> None:
    def stop(pipe: Any, step: int, *args: Any) -> dict[str, Any]:
        pipe._interrupt = step == 1
        return {}

    with pytest.raises(RuntimeError, match="interrupted after 2 of 5 steps"):
        inverted(pipes("sd3"), callback_on_step_end=stop)


@pytest.mark.parametrize("name", ["sd1", "sd3"])
def test_controls_steer_the_way_up_as_well(name: str, pipes: Pipes, official: Official) -> None:
    pipe, theirs = pipes(name), diffusers.DiffusionPipeline.from_pretrained(official(name))
    net = quiet_(net_of(theirs.unet if name == "sd1" else theirs.transformer))
    hint, plain = images(), inverted(pipe)
    off = inverted(pipe, controls=[ControlNet(net, hint, scale=0.0)])
    assert torch.equal(off.latents, plain.latents)
    steered = inverted(pipe, controls=[ControlNet(net, hint), maps := AttentionMaps()])
    assert (steered.latents - plain.latents).abs().max() > 0.01
    assert len(maps.heat([1])) == 1
    if name == "sd3":
        with_it = back(pipe, steered, controls=[ControlNet(net, hint)])
        assert (with_it - steered.data).square().mean() < (back(pipe, steered) - steered.data).square().mean()


@pytest.mark.parametrize("name", ["sd1", *FLOWS])
def test_acceleration_changes_nothing_but_rounding(name: str, pipes: Pipes) -> None:
    pipe = pipes(name)
    fast = inverted(pipe)
    restore(pipe)
    plain = inverted(pipe)
    optimize(pipe)
    assert (fast.latents - plain.latents).abs().max() < 1e-4 * plain.latents.std()


@pytest.mark.parametrize(("scheduler", "method"), [(None, "euler"), ("flow", "midpoint")])
def test_classes_are_inverted_as_prompts_are(
    scheduler: str | None, method: str, pipes: Pipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = pipes("dit")
    if scheduler is not None:
        monkeypatch.setattr(pipe, "scheduler", diffusers.FlowMatchEulerDiscreteScheduler())
    inversion = pipe.invert(images(2), [1, 3], method, num_inference_steps=4)
    one = pipe.invert(images(2)[1:], 3, method, num_inference_steps=4)
    assert (inversion.latents[1] - one.latents[0]).abs().max() < 1e-4 * one.latents.std()
    error = (back(pipe, inversion) - inversion.data).square().mean()
    other = (back(pipe, inversion, 7, guidance_scale=4.0) - inversion.data).square().mean()
    assert torch.isfinite(error) and other > error
    with pytest.raises(ValueError, match="`image`: got 2, expected one for each of the 3 in `class_labels`"):
        pipe.invert(images(2), [1, 2, 3])


# ---- the bundled model ----


@pytest.fixture(scope="module")
def bundled() -> Any:
    pipe = TextToImagePipeline.from_pretrained(bundled_model(), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn() -> Image.Image:
    """Colours that run from corner to corner: no picture of the model's."""
    y, x = np.mgrid[0:64, 0:64]
    return Image.fromarray(np.stack([4 * x, 4 * y, 252 - 2 * x - 2 * y], -1).astype(np.uint8))


def test_a_trained_flow_comes_back_a_hundred_times_nearer_by_the_midpoint_rule(bundled: Any) -> None:
    errors = {}
    picture = bundled("a red apple", num_inference_steps=8, generator=seeded()).images[0]
    for method in ("euler", "midpoint"):
        inversion = bundled.invert(picture, "a red apple", method, 24)
        errors[method] = (back(bundled, inversion) - inversion.data).square().mean().item()
    assert 0 < errors["midpoint"] < 0.01 * errors["euler"]


# ---- what is refused ----


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("sd1", {"method": "midpoint"}, "`method`: got 'midpoint', expected 'euler' with a PNDMScheduler"),
    ("sd3", {"method": "heun"}, "`method`: got 'heun', expected one of"),
    ("sd3", {"num_inference_steps": 0}, "`num_inference_steps`: got 0, expected a whole number, at least 1"),
    ("sd3", {"image": None}, "`image`: got None, expected one or several pictures"),
    ("sd3", {"image": "cat.png"}, "`image`: got"),
    ("sd3", {"image": images(3), "prompt": ["a", "b"]}, "`image`: got 3, expected one for each of the 2 in `prompt`"),
    ("sd3", {"prompt": None}, "`prompt`, `prompt_embeds`: got neither, expected exactly one"),
    ("sd3", {"strength": 0.5}, "`strength`: got 0.5, expected none: an inversion goes all the way"),
    ("sd3", {"latents": images()}, "`latents`: got a Tensor, expected none"),
    ("sd3", {"gamma": 0.5}, "`gamma`: got 0.5, expected none: only the method 'rf' has it, not 'euler'"),
    ("sd3", {"method": "rf", "eta": 1.5}, "`eta`: got 1.5, expected a number in"),
    ("sd3", {"method": "rf", "eta_span": (0.5, 0.1)}, "`eta_span`: got .*, expected \\(start, end\\)"),
    ("sd3", {"controls": AttentionMaps()}, "`controls`: got .*, expected a list of controls"),
    ("sd3", {"generator": [seeded(), seeded()]}, "`generator`: got a list of 2, expected one for each of 1"),
    ("sd1-inpaint", {}, "`mask_image`: got None, expected a mask"),
    ("sd1-instruct", {}, "`image`: this call cannot show a picture to a backbone of 8 channels"),
]


@pytest.mark.parametrize(("name", "changes", "message"), BAD, ids=[message[:40] for _, _, message in BAD])
def test_a_bad_argument_is_named_before_any_network_runs(
    name: str, changes: dict[str, Any], message: str, pipes: Pipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = pipes(name)

    def ran(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a network ran")

    for part in (pipe.vae, pipe.backbone):
        monkeypatch.setattr(part, "forward", ran)
    monkeypatch.setattr(pipe.vae, "encode", ran)
    with pytest.raises(ValueError, match=message):
        inverted(pipe, **changes)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.LCMScheduler(),
        diffusers.ScoreSdeVeScheduler(),
        diffusers.EDMEulerScheduler(),
        diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_a_scheduler_whose_steps_are_not_walked_back_is_named(
    scheduler: Any, pipes: Pipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = pipes("sd1")
    monkeypatch.setattr(pipe, "scheduler", scheduler)
    with pytest.raises(ValueError, match=f"`scheduler`: got a {type(scheduler).__name__}, expected"):
        inverted(pipe)


def test_what_the_way_back_has_already_is_refused(pipes: Pipes) -> None:
    pipe = pipes("sd3")
    inversion = inverted(pipe, image=images(2))
    for name, value in (("num_inference_steps", 9), ("height", 64), ("latents", images()), ("image", images())):
        with pytest.raises(ValueError, match=f"`{name}`: got .*, expected none: the way back"):
            pipe.reconstruct(inversion, **{name: value})
    with pytest.raises(ValueError, match="`inversion`: got one of 2 pictures, expected a number that divides 3"):
        pipe.reconstruct(inversion, ["a", "b", "c"])
    with pytest.raises(TypeError, match="`steps`: got one, expected an argument of TextToImagePipeline's call"):
        pipe.reconstruct(inversion, steps=3)
