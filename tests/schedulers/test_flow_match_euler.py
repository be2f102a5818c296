"""FlowMatchEulerDiscreteScheduler: exact on straight paths, and diffusers' scheduler step by step."""

import diffusers
import numpy as np
import pytest
import torch

from hubgen.paths.path import RectifiedFlowPath
from hubgen.paths.timesteps import shift_time
from hubgen.schedulers.flow_match_euler import FlowMatchEulerDiscreteScheduler

Theirs = diffusers.FlowMatchEulerDiscreteScheduler

CONFIGS = {
    "default": {},
    "shift 3": {"shift": 3.0},
    "100 timesteps": {"num_train_timesteps": 100, "shift": 2.0},
    "dynamic": {"use_dynamic_shifting": True},
    "dynamic linear": {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    "terminal": {"shift": 3.0, "shift_terminal": 0.1},
    "dynamic terminal": {"use_dynamic_shifting": True, "shift_terminal": 0.02},
    "karras": {"shift": 3.0, "use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"shift": 1.15, "use_beta_sigmas": True},
    "inverted": {"invert_sigmas": True},
    "stochastic": {"shift": 3.0, "stochastic_sampling": True},
}
GRIDS = {
    "1 step": {"num_inference_steps": 1},
    "4 steps": {"num_inference_steps": 4},
    "28 steps": {"num_inference_steps": 28},
    "sigmas": {"sigmas": np.linspace(1.0, 1 / 6, 6)},
    "sigmas list": {"num_inference_steps": 3, "sigmas": [1.0, 0.6, 0.2]},
    "timesteps": {"timesteps": [90.0, 50.0, 10.0]},
    "both": {"sigmas": [0.9, 0.5, 0.1], "timesteps": [80.0, 50.0, 10.0]},
}


def lay(scheduler, grid: dict) -> None:
    mu = {"mu": 0.8} if scheduler.config.use_dynamic_shifting else {}
    scheduler.set_timesteps(**grid, **mu)


def trajectory(scheduler, grid: dict, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    lay(scheduler, grid)
    sample = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    generator = torch.Generator().manual_seed(2)
    states = []
    for t in scheduler.timesteps:
        output = torch.tanh(1.3 * sample.roll(1, -1) + 0.7 * sample + t / 500 - 1).to(dtype)
        sample = scheduler.step(output, t, sample, generator=generator).prev_sample
        states.append(sample)
    return states


CASES = {
    f"{config}, {grid}": (CONFIGS[config], GRIDS[grid])
    for config in CONFIGS
    for grid in GRIDS
    if not (grid == "1 step" and "shift_terminal" in CONFIGS[config])  # the one time 1 cannot be stretched
}


@pytest.mark.parametrize(("config", "grid"), CASES.values(), ids=CASES)
def test_grids_and_whole_trajectories_equal_diffusers(config, grid):
    ours, theirs = FlowMatchEulerDiscreteScheduler(**config), Theirs(**config)
    assert torch.equal(ours.sigmas, theirs.sigmas) and torch.equal(ours.timesteps, theirs.timesteps)
    assert (ours.sigma_min, ours.sigma_max) == (theirs.sigma_min, theirs.sigma_max)
    for mine, other in zip(trajectory(ours, grid), trajectory(theirs, grid), strict=True):
        assert mine.isfinite().all() and (mine - other).abs().max() < 1e-5 * other.std()
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=0, atol=1e-7)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=0, atol=1e-4)


def test_the_default_grid_equals_diffusers_bit_for_bit():
    for shift in (1.0, 3.0, 6.0):
        ours, theirs = FlowMatchEulerDiscreteScheduler(shift=shift), Theirs(shift=shift)
        for steps in (1, 2, 4, 20, 28, 50, 1000):
            ours.set_timesteps(steps)
            theirs.set_timesteps(steps)
            assert torch.equal(ours.sigmas, theirs.sigmas) and torch.equal(ours.timesteps, theirs.timesteps)


def test_bfloat16_trajectories_equal_diffusers():
    ours = trajectory(FlowMatchEulerDiscreteScheduler(shift=3.0), {"num_inference_steps": 5}, torch.bfloat16)
    theirs = trajectory(Theirs(shift=3.0), {"num_inference_steps": 5}, torch.bfloat16)
    assert all(a.dtype == torch.bfloat16 and torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("steps", [1, 4, 50])
@pytest.mark.parametrize(
    "config", [{}, {"shift": 3.0}, {"shift": 0.5, "shift_once": True}, {"use_karras_sigmas": True}]
)
def test_euler_on_a_straight_path_returns_the_data(steps, config):
    path, scheduler = RectifiedFlowPath(), FlowMatchEulerDiscreteScheduler(**config)
    scheduler.set_timesteps(steps)
    data, noise = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    x = noise
    for t in scheduler.timesteps:
        sample = path.sample(data, noise, path.time(t).expand(3))
        torch.testing.assert_close(x, sample.x_t, rtol=0, atol=1e-5)
        x = scheduler.step(sample.target, t, x, return_dict=False)[0]
    torch.testing.assert_close(x, data, rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 4, 50])
def test_the_stochastic_sampler_ends_at_the_data_too(steps):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    scheduler.set_timesteps(steps)
    data, x = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    for sigma, t in zip(scheduler.sigmas, scheduler.timesteps, strict=False):
        x = scheduler.step((x - data) / sigma, t, x).prev_sample
    torch.testing.assert_close(x, data, rtol=0, atol=1e-5)


def test_the_shift_is_applied_once_where_asked_for():
    """diffusers' issue 13243: at shift 3 and 4 steps the last sigma is 0.00893 by default, 0.00299 shifted once."""
    twice, once = (
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        FlowMatchEulerDiscreteScheduler(shift=3.0, shift_once=True),
    )
    trained = once.sigmas.clone()
    assert torch.equal(trained, twice.sigmas)
    twice.set_timesteps(4)
    once.set_timesteps(4)
    assert twice.sigmas[-2].item() == pytest.approx(0.00893, abs=5e-6)
    assert once.sigmas[-2].item() == pytest.approx(0.00299, abs=5e-6)
    expected = shift_time(torch.linspace(1, 0.001, 4, dtype=torch.float64), 3.0).float()
    torch.testing.assert_close(once.sigmas[:-1], expected)
    once.set_timesteps(1000)
    torch.testing.assert_close(once.sigmas[:-1], trained)


def test_a_shift_by_mu_is_the_static_shift_of_e_to_the_mu():
    sigmas = [1.0, 0.7, 0.4, 0.1]
    static = FlowMatchEulerDiscreteScheduler(shift=float(np.exp(0.8)))
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    linear = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear")
    static.set_timesteps(sigmas=sigmas)
    dynamic.set_timesteps(sigmas=sigmas, mu=0.8)
    linear.set_timesteps(sigmas=sigmas, mu=float(np.exp(0.8)))
    torch.testing.assert_close(static.sigmas, dynamic.sigmas)
    torch.testing.assert_close(static.sigmas, linear.sigmas)
    later = FlowMatchEulerDiscreteScheduler()
    later.set_shift(float(np.exp(0.8)))
    later.set_timesteps(sigmas=sigmas)
    assert torch.equal(later.sigmas, static.sigmas) and later.shift == static.shift


def test_scale_noise_equals_diffusers_and_the_path():
    data, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    ours, theirs = FlowMatchEulerDiscreteScheduler(shift=3.0), Theirs(shift=3.0)
    for begin in (None, 2):
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(5)
            if begin is not None:
                scheduler.set_begin_index(begin)
        t = ours.timesteps[2:3].repeat(2)
        noised = ours.scale_noise(data, t, noise)
        torch.testing.assert_close(noised, theirs.scale_noise(data, t, noise))
        torch.testing.assert_close(noised, RectifiedFlowPath().sample(data, noise, t / 1000).x_t)
        if begin is not None:  # once the loop runs, the sigma follows it
            for scheduler in (ours, theirs):
                scheduler.step(noise - data, scheduler.timesteps[2], noised)
            assert ours.step_index == theirs.step_index == 3
            torch.testing.assert_close(ours.scale_noise(data, t, noise), theirs.scale_noise(data, t, noise))


def test_a_repeated_timestep_is_found_where_diffusers_finds_it():
    grid = {"sigmas": [0.9, 0.5, 0.5, 0.1]}
    ours, theirs = FlowMatchEulerDiscreteScheduler(), Theirs()
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(**grid)
    for t in ours.timesteps:
        assert ours.index_for_timestep(t) == theirs.index_for_timestep(t)


def test_a_run_may_begin_in_the_middle_of_the_grid():
    data, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    for announced in (True, False):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
        scheduler.set_timesteps(8)
        if announced:
            scheduler.set_begin_index(5)
        x = scheduler.scale_noise(data, scheduler.timesteps[5:6].repeat(2), noise)
        for t in scheduler.timesteps[5:]:
            x = scheduler.step(noise - data, t, x).prev_sample
        torch.testing.assert_close(x, data, rtol=0, atol=1e-5)


def test_no_step_reads_a_value_back_from_the_device():
    """On the meta device no tensor has a value, so that a step which reads one fails."""
    for config in ({"shift": 3.0}, {"stochastic_sampling": True}):
        scheduler = FlowMatchEulerDiscreteScheduler(**config)
        scheduler.set_timesteps(3, device="meta")
        scheduler.set_begin_index(0)
        x = torch.randn(2, 3, 4, 4, device="meta")
        for t in scheduler.timesteps:
            x = scheduler.step(x, t, x).prev_sample
        assert x.shape == (2, 3, 4, 4) and scheduler.step_index == 3


def test_configs_travel_both_ways(tmp_path, caplog):
    ours = FlowMatchEulerDiscreteScheduler(shift=3.0, use_karras_sigmas=True, shift_once=True)
    ours.save_pretrained(tmp_path)
    theirs = Theirs.from_pretrained(tmp_path)
    assert theirs.config.shift == 3.0 and theirs.config.use_karras_sigmas
    same = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path)
    assert same.config.shift_once and torch.equal(same.sigmas, ours.sigmas)
    back = FlowMatchEulerDiscreteScheduler.from_config(Theirs(shift=3.0, shift_terminal=0.1).config)
    assert (back.config.shift, back.config.shift_terminal, back.config.shift_once) == (3.0, 0.1, False)
    heun = diffusers.FlowMatchHeunDiscreteScheduler.from_config(ours.config)
    assert heun.config.shift == 3.0 and FlowMatchEulerDiscreteScheduler.from_config(heun.config).config.shift == 3.0
    assert Theirs in ours.compatibles and diffusers.FlowMatchHeunDiscreteScheduler in ours.compatibles


def test_timesteps_without_sigmas_are_told_of_where_a_shift_parts_them(caplog):
    FlowMatchEulerDiscreteScheduler().set_timesteps(timesteps=[900.0, 100.0])
    assert not caplog.records
    FlowMatchEulerDiscreteScheduler(shift=3.0).set_timesteps(timesteps=[900.0, 100.0])
    assert "timesteps without sigmas" in caplog.text


def stepped(steps: int) -> FlowMatchEulerDiscreteScheduler:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        scheduler.step(torch.ones(1, 2), t, torch.ones(1, 2))
    return scheduler


New = FlowMatchEulerDiscreteScheduler


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: New().set_timesteps(0), "`num_inference_steps`: got 0"),
        (lambda: New().set_timesteps(2.5), "`num_inference_steps`: got 2.5"),
        (lambda: New().set_timesteps(), "got none"),
        (lambda: New().set_timesteps(3, sigmas=[1.0, 0.5]), "`sigmas`, `num_inference_steps`: got lengths [2, 3]"),
        (lambda: New().set_timesteps(sigmas=[1.0], timesteps=[2.0, 1.0]), "got lengths [1, 2]"),
        (lambda: New().set_timesteps(sigmas=[]), "`sigmas`: got []"),
        (lambda: New().set_timesteps(sigmas=[1.5, 0.5]), "`sigmas`: got [1.5, 0.5]"),
        (lambda: New().set_timesteps(sigmas=[float("nan")]), "`sigmas`: got [nan]"),
        (lambda: New().set_timesteps(timesteps=[1001.0]), "`timesteps`: got [1001.0]"),
        (lambda: New(use_dynamic_shifting=True).set_timesteps(4), "`mu`: got None"),
        (lambda: New(shift_terminal=0.1).set_timesteps(1), "`shift_terminal`: got 0.1"),
        (lambda: New(use_exponential_sigmas=True).set_timesteps(sigmas=[1.0, 0.0]), "`sigmas`: got 0 as the last"),
        (lambda: New(shift=0.0), "`shift`: got 0.0"),
        (lambda: New(num_train_timesteps=0), "`num_train_timesteps`: got 0"),
        (lambda: New(time_shift_type="cubic"), "`time_shift_type`: got 'cubic'"),
        (lambda: New(use_karras_sigmas=True, use_beta_sigmas=True), "use_karras_sigmas"),
        (lambda: New().step(torch.ones(1), 3, torch.ones(1)), "`timestep`: got the whole number 3"),
        (lambda: New().step(torch.ones(1), torch.tensor(0.123), torch.ones(1)), "`timestep`: got 0.123"),
        (lambda: New().step(torch.ones(1), torch.tensor(1000.0), torch.ones(1), s_churn=1.0), "`s_churn`: got 1.0"),
        (
            lambda: New().step(torch.ones(1), torch.tensor(1000.0), torch.ones(1), per_token_timesteps=torch.ones(1)),
            "`per_token_timesteps`: got a tensor",
        ),
        (lambda: New().scale_noise(torch.ones(1), torch.ones(1)), "`noise`: got None"),
        (lambda: stepped(2).step(torch.ones(1), torch.tensor(1.0), torch.ones(1)), "all 2 steps are done"),
    ],
)
def test_bad_arguments_are_named(call, named):
    with pytest.raises(ValueError) as error:
        call()
    assert named in str(error.value)
