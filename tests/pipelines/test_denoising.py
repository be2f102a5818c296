"""The one denoising loop."""

from collections.abc import Mapping

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers import FlowMatchEulerDiscreteScheduler as DiffusersFlowMatchEuler
from diffusers import FlowMatchHeunDiscreteScheduler as DiffusersFlowMatchHeun

from hubgen.conditioning.guidance import ClassifierFreeGuidance
from hubgen.paths.path import RectifiedFlowPath, VariancePreservingPath
from hubgen.pipelines.denoising import denoise
from hubgen.schedulers.ddim import DDIMScheduler
from hubgen.schedulers.ddpm import DDPMScheduler
from hubgen.schedulers.flow_match_euler import FlowMatchEulerDiscreteScheduler
from hubgen.schedulers.flow_match_heun import FlowMatchHeunDiscreteScheduler
from hubgen.schedulers.times import times


def flow(steps: int) -> FlowMatchEulerDiscreteScheduler:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("steps", [1, 4, 50])
def test_the_true_velocity_leads_from_noise_to_the_data(steps: int) -> None:
    data, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    scheduler = flow(steps)
    found = denoise(
        lambda x, t, branches, step: noise - data, scheduler, noise, scheduler.timesteps, ClassifierFreeGuidance(1.0)
    )
    torch.testing.assert_close(found, data, atol=1e-5, rtol=1e-5)


def test_a_guided_step_is_one_call_on_both_halves_and_another_step_one_call_on_one() -> None:
    calls: list[tuple[int, tuple[str, ...], float]] = []

    def predict(x: torch.Tensor, t: torch.Tensor, branches: tuple[str, ...], step: int) -> torch.Tensor:
        assert len(t) == len(x) and step == len(calls)
        calls.append((len(x), branches, t[0].item() / 1000))
        return torch.zeros_like(x)

    scheduler = flow(10)
    guidance = ClassifierFreeGuidance(4.0, interval=(0.25, 0.75))
    denoise(predict, scheduler, torch.randn(3, 4, 8, 8), scheduler.timesteps, guidance)
    assert len(calls) == 10
    for size, branches, t in calls:
        assert branches == (("negative", "positive") if 0.25 < t <= 0.75 else ("positive",))
        assert size == 3 * len(branches)
    assert len({branches for _, branches, _ in calls}) == 2


def test_a_guidance_may_have_any_number_of_branches() -> None:
    """InstructPix2Pix's two scales (2211.09800, eq. 3), written here: the loop knows no number of branches."""

    class ImageAndText:
        all_branches = ("negative", "image", "positive")

        def branches(self, t: float) -> tuple[str, ...]:
            return self.all_branches

        def combine(self, predictions: Mapping[str, torch.Tensor]) -> torch.Tensor:
            none, image, both = (predictions[name] for name in self.all_branches)
            return none + 1.5 * (image - none) + 7.0 * (both - image)

    def predict(x: torch.Tensor, t: torch.Tensor, branches: tuple[str, ...], step: int) -> torch.Tensor:
        values = {"negative": 1.0, "image": 2.0, "positive": 4.0}
        return torch.cat([torch.full_like(rows, values[b]) for b, rows in zip(branches, x.chunk(3), strict=True)])

    scheduler, noise = flow(1), torch.randn(2, 4, 8, 8)
    found = denoise(predict, scheduler, noise, scheduler.timesteps, ImageAndText())
    torch.testing.assert_close(found, noise - (1.0 + 1.5 + 14.0))


def test_the_negative_branch_comes_first() -> None:
    def predict(x: torch.Tensor, t: torch.Tensor, branches: tuple[str, ...], step: int) -> torch.Tensor:
        uncond, cond = x.chunk(2)
        return torch.cat([torch.zeros_like(uncond), torch.ones_like(cond)])

    scheduler, noise = flow(1), torch.randn(2, 4, 8, 8)
    found = denoise(predict, scheduler, noise, scheduler.timesteps, ClassifierFreeGuidance(3.0))
    torch.testing.assert_close(found, noise - 3.0)


def test_latents_keep_their_precision_whatever_the_network_computes_in() -> None:
    scheduler = flow(3)
    found = denoise(
        lambda x, t, branches, step: x.to(torch.bfloat16),
        scheduler,
        torch.randn(1, 4, 8, 8),
        scheduler.timesteps,
        ClassifierFreeGuidance(1.0),
    )
    assert found.dtype == torch.float32


def test_an_interrupted_loop_returns_what_it_has() -> None:
    seen: list[torch.Tensor] = []

    def remember(step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        seen.append(latents)
        return latents

    scheduler = flow(5)
    found = denoise(
        lambda x, t, branches, step: x,
        scheduler,
        torch.randn(1, 4, 8, 8),
        scheduler.timesteps,
        ClassifierFreeGuidance(1.0),
        after_step=[remember],
        interrupted=lambda: len(seen) == 2,
    )
    assert len(seen) == 2
    assert torch.equal(found, seen[-1])


@pytest.mark.parametrize(
    ("scheduler", "path"),
    [
        (FlowMatchEulerDiscreteScheduler(shift=3.0), RectifiedFlowPath()),
        (DiffusersFlowMatchEuler(), RectifiedFlowPath()),
        (UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"), RectifiedFlowPath()),
        (DDPMScheduler(), VariancePreservingPath()),
        (FlowMatchHeunDiscreteScheduler(shift=3.0), RectifiedFlowPath()),
        (DiffusersFlowMatchHeun(), RectifiedFlowPath()),
        (DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"), RectifiedFlowPath()),
        (DDIMScheduler(), VariancePreservingPath()),
        (EulerDiscreteScheduler(), VariancePreservingPath()),
        (EulerAncestralDiscreteScheduler(), VariancePreservingPath()),
        (DPMSolverMultistepScheduler(), VariancePreservingPath()),
        (UniPCMultistepScheduler(), VariancePreservingPath()),
        (PNDMScheduler(), VariancePreservingPath()),
        (LMSDiscreteScheduler(), VariancePreservingPath()),
        (HeunDiscreteScheduler(beta_start=0.0001, beta_end=0.02), VariancePreservingPath()),
        (LCMScheduler(), VariancePreservingPath()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_timestep_means_the_time_that_its_path_says(scheduler, path) -> None:
    scheduler.set_timesteps(7)
    torch.testing.assert_close(torch.tensor(times(scheduler, scheduler.timesteps)), path.time(scheduler.timesteps))


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        EDMEulerScheduler(),
        EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction", timestep_spacing="leading"),
    ],
    ids=["reversed time", "EDM", "continuous"],
)
def test_whatever_clock_a_model_has_its_times_fall_from_1_and_stay_above_0(scheduler) -> None:
    scheduler.set_timesteps(8)
    found = times(scheduler, scheduler.timesteps)
    assert found[0] == 1.0 and found == sorted(found, reverse=True) and found[-1] > 0
    assert times(scheduler, scheduler.timesteps[3:]) == found[3:]  # a start in the middle


@pytest.mark.parametrize(
    "scheduler", [FlowMatchHeunDiscreteScheduler(), DiffusersFlowMatchHeun()], ids=["ours", "theirs"]
)
def test_a_scheduler_of_second_order_calls_back_after_each_call_of_the_network(scheduler) -> None:
    """dx/dt = x from 1 to 0 ends at 1/e of the start; Euler's method with as many calls is further from it."""
    calls: list[tuple[int, float]] = []

    def on_step(step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        calls.append((step, timestep.item()))
        return latents

    def end(scheduler, steps: int) -> float:
        scheduler.set_timesteps(steps)
        start, guidance = torch.ones(1, 1), ClassifierFreeGuidance(1.0)
        return denoise(
            lambda x, t, branches, step: x, scheduler, start, scheduler.timesteps, guidance, after_step=[on_step]
        ).item()

    second = end(scheduler, 8)
    assert calls == list(enumerate(scheduler.timesteps.tolist())) and len(calls) == 15
    exact = torch.tensor(-1.0).exp().item()
    assert abs(second - exact) < 0.2 * abs(end(FlowMatchEulerDiscreteScheduler(), 15) - exact)
