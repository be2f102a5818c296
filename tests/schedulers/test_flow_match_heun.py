"""FlowMatchHeunDiscreteScheduler: second order, exact on straight paths, and diffusers' scheduler call by call."""

import itertools
import math

import diffusers
import pytest
import torch

from hubgen.paths.path import RectifiedFlowPath
from hubgen.schedulers.flow_match_euler import FlowMatchEulerDiscreteScheduler
from hubgen.schedulers.flow_match_heun import FlowMatchHeunDiscreteScheduler

Theirs = diffusers.FlowMatchHeunDiscreteScheduler
CONFIGS = {"default": {}, "shift 3": {"shift": 3.0}, "100 timesteps": {"num_train_timesteps": 100, "shift": 2.0}}


def trajectory(scheduler, steps: int, dtype: torch.dtype = torch.float32, **options) -> list[torch.Tensor]:
    scheduler.set_timesteps(steps)
    sample = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    generator = torch.Generator().manual_seed(2)
    states = []
    for t in scheduler.timesteps:
        output = torch.tanh(1.3 * sample.roll(1, -1) + 0.7 * sample + t / 500 - 1).to(dtype)
        sample = scheduler.step(output, t, sample, generator=generator, **options).prev_sample
        states.append(sample)
    return states


@pytest.mark.parametrize(
    "options", [{}, {"s_churn": 2.0}, {"s_churn": 9.0, "s_tmin": 0.3, "s_tmax": 0.9, "s_noise": 1.1}]
)
@pytest.mark.parametrize("steps", [1, 4, 28])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_grids_and_whole_trajectories_equal_diffusers(config, steps, options):
    ours, theirs = FlowMatchHeunDiscreteScheduler(**config), Theirs(**config)
    assert torch.equal(ours.sigmas, theirs.sigmas) and torch.equal(ours.timesteps, theirs.timesteps)
    for mine, other in zip(trajectory(ours, steps, **options), trajectory(theirs, steps, **options), strict=True):
        # diffusers takes the velocity apart and divides by sigma again: at sigma = 0.001 that costs three digits
        assert mine.isfinite().all() and (mine - other).abs().max() < 1e-4 * other.std()
    assert torch.equal(ours.sigmas, theirs.sigmas) and torch.equal(ours.timesteps, theirs.timesteps)
    assert ours.step_index == theirs.step_index == len(ours.timesteps) == 2 * steps - 1


def test_bfloat16_trajectories_equal_diffusers():
    ours, theirs = (trajectory(cls(shift=3.0), 5, torch.bfloat16) for cls in (FlowMatchHeunDiscreteScheduler, Theirs))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine, other, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("steps", [1, 4, 50])
@pytest.mark.parametrize("config", [{}, {"shift": 3.0}])
def test_heun_on_a_straight_path_returns_the_data(steps, config):
    path, scheduler = RectifiedFlowPath(), FlowMatchHeunDiscreteScheduler(**config)
    scheduler.set_timesteps(steps)
    data, noise = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    x = noise
    for t in scheduler.timesteps:
        sample = path.sample(data, noise, path.time(t).expand(3))
        torch.testing.assert_close(x, sample.x_t, rtol=0, atol=1e-5)
        x = scheduler.step(sample.target, t, x, return_dict=False)[0]
    torch.testing.assert_close(x, data, rtol=0, atol=1e-5)


def error(scheduler, steps: int) -> float:
    """Distance from the exact end of dx/dt = 2 x (1 + sin(5 t)) between t = 1 and t = 0.1, with x(1) = 1."""
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0.1, steps + 1).tolist())
    x = torch.ones(1)
    for t in scheduler.timesteps:
        if scheduler.sigmas[(scheduler.step_index or 0) + 1] == 0:
            break  # at sigma = 0.1: the last step, to 0, is of first order
        x = scheduler.step(2 * x * (1 + math.sin(5 * t.item() / 1000)), t, x).prev_sample
    exact = math.exp(2 * (0.1 - math.cos(0.5) / 5) - 2 * (1 - math.cos(5) / 5))
    return abs(x.item() - exact)


def test_the_error_falls_with_the_square_of_the_steps_where_eulers_falls_with_the_steps():
    heun = [error(FlowMatchHeunDiscreteScheduler(), steps) for steps in (8, 16, 32)]
    euler = [error(FlowMatchEulerDiscreteScheduler(), steps) for steps in (8, 16, 32)]
    for before, after in itertools.pairwise(heun):
        assert 3 < before / after < 5
    for before, after in itertools.pairwise(euler):
        assert 1.5 < before / after < 2.5


def test_the_grid_is_eulers_with_each_inner_sigma_twice():
    heun, euler = FlowMatchHeunDiscreteScheduler(shift=3.0), FlowMatchEulerDiscreteScheduler(shift=3.0)
    for grid in ({"num_inference_steps": 5}, {"sigmas": [1.0, 0.6, 0.2]}):
        heun.set_timesteps(**grid)
        euler.set_timesteps(**grid)
        assert torch.equal(heun.timesteps.unique_consecutive(), euler.timesteps)
        assert torch.equal(heun.sigmas.unique_consecutive(), euler.sigmas)
        assert len(heun.timesteps) == 2 * len(euler.timesteps) - 1 and len(heun.sigmas) == len(heun.timesteps) + 1


def test_a_run_may_begin_in_the_middle_of_the_grid():
    data, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    for announced in (True, False):
        scheduler = FlowMatchHeunDiscreteScheduler(shift=2.0)
        scheduler.set_timesteps(8)
        begin = 5 * scheduler.order
        if announced:
            scheduler.set_begin_index(begin)
        x = scheduler.scale_noise(data, scheduler.timesteps[begin : begin + 1].repeat(2), noise)
        torch.testing.assert_close(x, RectifiedFlowPath().interpolate(data, noise, scheduler.sigmas[begin].expand(2)))
        for t in scheduler.timesteps[begin:]:
            x = scheduler.step(noise - data, t, x).prev_sample
        torch.testing.assert_close(x, data, rtol=0, atol=1e-5)


def test_scale_noise_equals_diffusers():
    data, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    ours, theirs = FlowMatchHeunDiscreteScheduler(shift=3.0), Theirs(shift=3.0)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(5)
    t = ours.timesteps[4]
    torch.testing.assert_close(ours.scale_noise(data, t, noise), theirs.scale_noise(data, t, noise))


def test_no_call_reads_a_value_back_from_the_device():
    """On the meta device no tensor has a value, so that a step which reads one fails."""
    scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(3, device="meta")
    scheduler.set_begin_index(0)
    x = torch.randn(2, 3, 4, 4, device="meta")
    for t in scheduler.timesteps:
        x = scheduler.step(x, t, x).prev_sample
    assert x.shape == (2, 3, 4, 4) and scheduler.step_index == 5


def test_a_run_that_was_left_in_the_middle_of_a_step_leaves_nothing_to_the_next():
    scheduler, fresh = FlowMatchHeunDiscreteScheduler(), FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(4)
    scheduler.step(torch.ones(2, 4), scheduler.timesteps[0], torch.ones(2, 4))
    assert not scheduler.state_in_first_order
    for mine, other in zip(trajectory(scheduler, 3), trajectory(fresh, 3), strict=True):
        assert torch.equal(mine, other)
    assert scheduler.state_in_first_order and scheduler.sample is None


def begun(index: int) -> FlowMatchHeunDiscreteScheduler:
    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(2)
    scheduler.set_begin_index(index)
    return scheduler


New, X, T = FlowMatchHeunDiscreteScheduler, torch.ones(1), torch.tensor(1.0)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: New().set_timesteps(0), "`num_inference_steps`: got 0"),
        (lambda: New().set_timesteps(), "`num_inference_steps`: got None"),
        (lambda: New().set_timesteps(3, sigmas=[1.0, 0.5]), "`num_inference_steps`: got 3 beside 2 sigmas"),
        (lambda: New().set_timesteps(sigmas=[1.5, 0.5]), "`sigmas`: got [1.5, 0.5]"),
        (lambda: New(shift=0.0), "`shift`: got 0.0"),
        (lambda: New(num_train_timesteps=0), "`num_train_timesteps`: got 0"),
        (lambda: New().step(X, 3, X), "`timestep`: got the whole number 3"),
        (lambda: New().step(X, torch.tensor(0.123), X), "`timestep`: got 0.123"),
        (lambda: New().scale_noise(X, X), "`noise`: got None"),
        (lambda: begun(1).step(X, T, X), "`begin_index`: got 1, a second stage"),
        (lambda: begun(3).step(X, T, X), "all 3 steps are done"),
    ],
)
def test_bad_arguments_are_named(call, named):
    with pytest.raises(ValueError) as error:
        call()
    assert named in str(error.value)
