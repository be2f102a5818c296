"""DDIMScheduler: diffusers' scheduler step by step, DDPM at eta = 1, and back to the noise."""

import itertools

import diffusers
import pytest
import torch

from hubgen.schedulers.ddim import DDIMScheduler
from hubgen.schedulers.ddim_inverse import DDIMInverseScheduler
from hubgen.schedulers.ddpm import DDPMScheduler

CONFIGS = {
    "default": {},
    "linspace": {"timestep_spacing": "linspace"},
    "trailing": {"timestep_spacing": "trailing"},
    "leading offset": {"steps_offset": 1, "set_alpha_to_one": False},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "squaredcos": {"beta_schedule": "squaredcos_cap_v2"},
    "trained betas": {"trained_betas": torch.linspace(0.001, 0.05, 200).tolist(), "num_train_timesteps": 200},
    "no clip": {"clip_sample": False},
    "clip range": {"clip_sample_range": 0.5},
    "thresholding": {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9},
    "sample": {"prediction_type": "sample"},
    "v_prediction": {"prediction_type": "v_prediction", "set_alpha_to_one": False},
    "zero snr": {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "clip_sample": False,
    },
}
OPTIONS = {
    "eta 0": {},
    "eta 0.5": {"eta": 0.5},
    "eta 1": {"eta": 1.0},
    "clipped": {"use_clipped_model_output": True, "eta": 0.3},
}


def model(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """A fixed nonlinear function of x_t and t, the same for both libraries."""
    return torch.tanh(1.3 * sample.roll(1, -1) + 0.7 * sample + timestep.float() / 500 - 1)


def trajectory(scheduler, steps: int, options: dict, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    scheduler.set_timesteps(steps)
    sample = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    generator = torch.Generator().manual_seed(2)
    states = []
    for t in scheduler.timesteps:
        step = scheduler.step(model(sample, t).to(dtype), t, sample, generator=generator, **options)
        sample = step.prev_sample
        states += [sample, step.pred_original_sample]
    return states


@pytest.mark.parametrize("steps", [7, 50])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_whole_trajectories_equal_diffusers(config, options, steps):
    ours = trajectory(DDIMScheduler(**config), steps, options)
    theirs = trajectory(diffusers.DDIMScheduler(**config), steps, options)
    for mine, other in zip(ours, theirs, strict=True):
        if not other.isfinite().all():  # eta 1 from all noise: a root of minus the last bit, in diffusers
            assert options.get("eta") == 1 and "rescale_betas_zero_snr" in config
            break
        assert (mine - other).abs().max() < 1e-4 * other.std()
    assert all(mine.isfinite().all() for mine in ours)


def test_trajectories_equal_diffusers_in_bfloat16():
    ours = trajectory(DDIMScheduler(), 5, {"eta": 0.5}, torch.bfloat16)
    theirs = trajectory(diffusers.DDIMScheduler(), 5, {"eta": 0.5}, torch.bfloat16)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == torch.bfloat16 and torch.equal(mine, other)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_the_grid_equals_diffusers_for_every_number_of_steps(spacing):
    ours, theirs = (cls(timestep_spacing=spacing) for cls in (DDIMScheduler, diffusers.DDIMScheduler))
    for steps in range(1, 1001, 7):
        ours.set_timesteps(steps)
        theirs.set_timesteps(steps)
        assert torch.equal(ours.timesteps, theirs.timesteps[:steps]) and len(ours.timesteps) == steps


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({"clip_sample": False}, {}),
        ({"clip_sample": False, "prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"}, {}),
        ({"clip_sample": True}, {"use_clipped_model_output": True}),
    ],
)
def test_at_eta_1_a_step_is_the_ancestral_step_with_the_posteriors_variance(config, options):
    ddim, ddpm = DDIMScheduler(**config), DDPMScheduler(variance_type="fixed_small", **config)
    for scheduler in (ddim, ddpm):
        scheduler.set_timesteps(10)
    for t in ddpm.timesteps:
        x, output = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
        one, two = (torch.Generator().manual_seed(0) for _ in range(2))
        torch.testing.assert_close(
            ddim.step(output, t, x, eta=1.0, generator=one, **options).prev_sample,
            ddpm.step(output, t, x, generator=two).prev_sample,
            rtol=1e-4,
            atol=1e-4,
        )


def test_at_eta_0_no_noise_is_drawn():
    state = torch.random.get_rng_state()
    first, second = (trajectory(DDIMScheduler(), 5, {}) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(5)
    scheduler.step(torch.ones(1, 3), 800, torch.ones(1, 3))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_given_noise_takes_the_place_of_a_generator():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(5)
    x, output = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    drawn = scheduler.step(output, 800, x, eta=0.7, generator=torch.Generator().manual_seed(3)).prev_sample
    assert torch.equal(drawn, scheduler.step(output, 800, x, eta=0.7, variance_noise=noise).prev_sample)


INVERSIONS = {
    "epsilon": {},
    "v_prediction": {"prediction_type": "v_prediction"},
    "sample": {"prediction_type": "sample", "set_alpha_to_one": False},
    "trailing, not to one": {"timestep_spacing": "trailing", "set_alpha_to_one": False},
    "offset": {"steps_offset": 1, "beta_schedule": "scaled_linear"},
    "clipped": {"clip_sample": True},
}


@pytest.mark.parametrize("config", INVERSIONS.values(), ids=INVERSIONS)
def test_inversion_equals_diffusers_inverse_scheduler(config):
    config = {"clip_sample": False, **config}
    ours, theirs = DDIMScheduler(**config), diffusers.DDIMInverseScheduler(**config)
    ours.set_timesteps(10)
    theirs.set_timesteps(10)
    assert torch.equal(ours.timesteps.flip(0), theirs.timesteps)
    x = y = torch.randn(2, 3, 8, 8)
    for t in theirs.timesteps:
        mine, other = ours.invert_step(model(x, t), t, x), theirs.step(model(y, t), t, y)
        x, y = mine.prev_sample, other.prev_sample
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mine.pred_original_sample, other.pred_original_sample, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", INVERSIONS.values(), ids=INVERSIONS)
def test_the_inverse_scheduler_walks_as_diffusers(config):
    config = {"clip_sample": False, **config}
    ends = []
    for scheduler in (DDIMInverseScheduler(**config), diffusers.DDIMInverseScheduler(**config)):
        scheduler.set_timesteps(10)
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t), t, x, return_dict=False)[0]
        ends.append((scheduler.timesteps, x))
    assert torch.equal(ends[0][0], ends[1][0])
    torch.testing.assert_close(ends[0][1], ends[1][1], rtol=1e-4, atol=1e-4)


def test_the_inverse_scheduler_visits_a_given_grid_from_below():
    up, down = DDIMInverseScheduler(clip_sample=False), DDIMScheduler(clip_sample=False)
    for scheduler in (up, down):
        scheduler.set_timesteps(timesteps=[900, 500, 20])
    assert up.timesteps.tolist() == [20, 500, 900]
    assert [up.previous_timestep(t) for t in up.timesteps] == [-1, 20, 500]
    x, noises = torch.randn(2, 3, 8, 8), [torch.randn(2, 3, 8, 8) for _ in range(3)]
    y = x
    for t, noise in zip(up.timesteps, noises, strict=True):
        y = up.step(noise, t, y).prev_sample
    for t, noise in zip(down.timesteps, noises[::-1], strict=True):
        y = down.step(noise, t, y).prev_sample
    torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="`timestep`: got 21, expected one of scheduler.timesteps"):
        up.previous_timestep(21)


@pytest.mark.parametrize("config", [{}, {"set_alpha_to_one": False, "steps_offset": 1}])
def test_inverting_undoes_a_step_that_was_given_the_same_noise(config):
    scheduler = DDIMScheduler(clip_sample=False, **config)
    scheduler.set_timesteps(10)
    for t in scheduler.timesteps:
        x, noise = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
        back = scheduler.invert_step(noise, t, scheduler.step(noise, t, x).prev_sample).prev_sample
        torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-4)


def there_and_back(steps: int, kind: str) -> float:
    """Error of data -> noise -> data where data is normal with deviation 0.5 and the denoiser knows it exactly."""
    scheduler = DDIMScheduler(clip_sample=False, prediction_type=kind)
    scheduler.set_timesteps(steps)

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        bar = scheduler.alphas_cumprod[t]
        spread = 0.25 * bar + 1 - bar
        noise, data = (1 - bar).sqrt() * x / spread, 0.25 * bar.sqrt() * x / spread
        return noise if kind == "epsilon" else bar.sqrt() * noise - (1 - bar).sqrt() * data

    start = 0.5 * torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    x = start
    for t in scheduler.timesteps.flip(0):
        x = scheduler.invert_step(predict(x, t), t, x).prev_sample
    assert 0.8 < x.std() < 1.2  # noise, by now
    for t in scheduler.timesteps:
        x = scheduler.step(predict(x, t), t, x).prev_sample
    return ((x - start).norm() / start.norm()).item()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_inverting_and_sampling_return_the_start_to_an_error_that_falls_with_the_steps(kind):
    errors = [there_and_back(steps, kind) for steps in (25, 50, 100, 200)]
    assert all(1.8 < before / after < 2.2 for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.03


def test_on_a_given_grid_each_step_leads_to_the_next_entry():
    scheduler = DDIMScheduler(prediction_type="sample", clip_sample=False)
    scheduler.set_timesteps(timesteps=[900, 300, 10])
    assert [scheduler.previous_timestep(t) for t in scheduler.timesteps] == [300, 10, -1]
    data, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    x = scheduler.add_noise(data, noise, scheduler.timesteps[:1])
    for t, after in zip(scheduler.timesteps, [300, 10, None], strict=True):
        x = scheduler.step(data, t, x).prev_sample
        expected = data if after is None else scheduler.add_noise(data, noise, torch.tensor([after]))
        torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


def test_no_step_reads_a_value_back_from_the_device():
    """On the meta device no tensor has a value, so that a step which reads one fails."""
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(4, device="meta")
    x = torch.randn(2, 3, 4, 4, device="meta")
    for index, t in enumerate(scheduler.timesteps[1:], start=1):
        assert scheduler.previous_timestep(t) == ([500, 250, 0, -1][index])
        x = scheduler.step(x, t, x).prev_sample
        x = scheduler.invert_step(x, t, x).prev_sample
    assert x.shape == (2, 3, 4, 4)


def test_add_noise_and_velocity_equal_diffusers():
    data, noise, t = torch.randn(5, 3, 4, 4), torch.randn(5, 3, 4, 4), torch.tensor([0, 1, 10, 500, 999])
    ours, theirs = DDIMScheduler(), diffusers.DDIMScheduler()
    torch.testing.assert_close(ours.add_noise(data, noise, t), theirs.add_noise(data, noise, t))
    torch.testing.assert_close(ours.get_velocity(data, noise, t), theirs.get_velocity(data, noise, t))


def ready(**config) -> DDIMScheduler:
    scheduler = DDIMScheduler(**config)
    scheduler.set_timesteps(4)
    return scheduler


X = torch.ones(1, 3)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: DDIMScheduler().set_timesteps(0), "`num_inference_steps`: got 0"),
        (lambda: DDIMScheduler().set_timesteps(1001), "`num_inference_steps`: got 1001"),
        (lambda: DDIMScheduler().step(X, 5, X), "`num_inference_steps`: got None"),
        (lambda: DDIMScheduler(prediction_type="noise"), "`prediction_type`: got 'noise'"),
        (lambda: DDIMScheduler(timestep_spacing="even"), "`timestep_spacing`: got 'even'"),
        (lambda: ready().step(X, 1000, X), "`timestep`: got 1000"),
        (lambda: ready().step(X, -1, X), "`timestep`: got -1"),
        (lambda: ready().step(X, torch.tensor([500, 250]), X), "`timestep`: got a tensor of shape (2,)"),
        (lambda: ready().step(X, 500, X, eta=1.5), "`eta`: got 1.5"),
        (lambda: ready().step(X, 500, X, eta=-0.1), "`eta`: got -0.1"),
        (
            lambda: ready().step(X, 500, X, eta=1.0, generator=torch.Generator(), variance_noise=X),
            "`generator`, `variance_noise`: got both",
        ),
        (lambda: ready().step(torch.ones(1, 6), 500, X), "`model_output`: got shape (1, 6)"),
        (lambda: ready(rescale_betas_zero_snr=True).step(X, 999, X), "prediction_type: 'epsilon' leaves data unknown"),
        (lambda: ready(prediction_type="sample").invert_step(X, 0, X), "prediction_type: 'sample' leaves the noise"),
    ],
)
def test_bad_arguments_are_named(call, named):
    with pytest.raises(ValueError) as error:
        call()
    assert named in str(error.value)
