"""DDPMScheduler: the posterior of the paper, and diffusers' scheduler step by step."""

import diffusers
import pytest
import torch

from hubgen.schedulers.ddpm import DDPMScheduler

CONFIGS = {
    "default": {},
    "linspace": {"timestep_spacing": "linspace"},
    "trailing": {"timestep_spacing": "trailing"},
    "leading offset": {"steps_offset": 1},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "squaredcos": {"beta_schedule": "squaredcos_cap_v2"},
    "sigmoid": {"beta_schedule": "sigmoid"},
    "laplace": {"beta_schedule": "laplace"},
    "trained betas": {"trained_betas": torch.linspace(0.001, 0.05, 200).tolist(), "num_train_timesteps": 200},
    "fixed_small_log": {"variance_type": "fixed_small_log"},
    "fixed_large": {"variance_type": "fixed_large"},
    "learned": {"variance_type": "learned"},
    "learned_range": {"variance_type": "learned_range"},
    "no clip": {"clip_sample": False},
    "clip range": {"clip_sample_range": 0.5},
    "thresholding": {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9},
    "sample": {"prediction_type": "sample"},
    "v_prediction": {"prediction_type": "v_prediction"},
    "zero snr": {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "clip_sample": False,
    },
}


def model(sample: torch.Tensor, timestep: torch.Tensor, channels: int) -> torch.Tensor:
    """A fixed nonlinear function of x_t and t, the same for both libraries; positive where a variance is asked for."""
    output = torch.tanh(1.3 * sample.roll(1, -1) + 0.7 * sample + timestep.float() / 500 - 1)
    return output if channels == sample.shape[1] else torch.cat([output, 0.05 * output.abs() + 0.01], 1)


def trajectory(scheduler, steps: dict, dtype: torch.dtype = torch.float32, generator=None) -> list[torch.Tensor]:
    scheduler.set_timesteps(**steps)
    sample = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    generator = generator or torch.Generator().manual_seed(2)
    channels = 6 if scheduler.config.variance_type.startswith("learned") else 3
    states = []
    for t in scheduler.timesteps:
        output = model(scheduler.scale_model_input(sample, t), t, channels).to(dtype)
        step = scheduler.step(output, t, sample, generator=generator)
        sample = step.prev_sample
        states += [sample, step.pred_original_sample]
    return states


@pytest.mark.parametrize("steps", [{"num_inference_steps": 7}, {"timesteps": [150, 90, 30, 4, 0]}], ids=["7", "custom"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_whole_trajectories_equal_diffusers(config, steps):
    ours = trajectory(DDPMScheduler(**config), steps)
    theirs = trajectory(diffusers.DDPMScheduler(**config), steps)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.isfinite().all() and (mine - other).abs().max() < 1e-4 * other.std()


def test_trajectories_equal_diffusers_in_bfloat16_and_with_a_generator_per_picture():
    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in (3, 4)]

    for dtype in (torch.bfloat16, torch.float32):
        ours = trajectory(DDPMScheduler(), {"num_inference_steps": 5}, dtype, generators())
        theirs = trajectory(diffusers.DDPMScheduler(), {"num_inference_steps": 5}, dtype, generators())
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.dtype == dtype and torch.equal(mine, other)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("total", [1000, 77])
def test_the_grid_equals_diffusers_for_every_number_of_steps(spacing, total):
    ours, theirs = (cls(total, timestep_spacing=spacing) for cls in (DDPMScheduler, diffusers.DDPMScheduler))
    assert torch.equal(ours.timesteps, theirs.timesteps)
    for steps in range(1, total + 1):
        ours.set_timesteps(steps)
        theirs.set_timesteps(steps)
        # for some numbers diffusers' rounding adds a last timestep -1, which is no timestep
        expected = theirs.timesteps[:steps]
        assert torch.equal(ours.timesteps, expected) and len(ours.timesteps) == steps


def test_the_step_is_the_gaussian_posterior_of_the_chain():
    """Bayes' rule in closed form: q(x_prev | x_t, data) from q(x_t | x_prev) and q(x_prev | data), skipping steps."""
    scheduler = DDPMScheduler(clip_sample=False, prediction_type="sample")
    scheduler.set_timesteps(10)
    t, prev = 500, 400
    bar, bar_prev = scheduler.alphas_cumprod[[t, prev]].double()
    alpha = bar / bar_prev
    precision = alpha / (1 - alpha) + 1 / (1 - bar_prev)
    data, x_t = torch.randn(1, 1, 200, 200), torch.randn(1, 1, 200, 200)
    mean = (alpha.sqrt() / (1 - alpha) * x_t + bar_prev.sqrt() / (1 - bar_prev) * data) / precision
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(0))
    result = scheduler.step(data, t, x_t, generator=generator).prev_sample
    torch.testing.assert_close(result, mean + noise / precision.sqrt(), rtol=1e-4, atol=1e-4)


def test_the_last_step_returns_the_estimate_of_data_without_noise():
    scheduler = DDPMScheduler(prediction_type="sample", clip_sample=False)
    scheduler.set_timesteps(4)
    data = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(scheduler.step(data, 0, torch.randn(2, 3, 4, 4)).prev_sample, data)


def test_the_two_logarithmic_variances_equal_the_plain_ones():
    for plain in ("fixed_small", "fixed_large"):
        first = trajectory(DDPMScheduler(variance_type=plain), {"num_inference_steps": 5})
        second = trajectory(DDPMScheduler(variance_type=f"{plain}_log"), {"num_inference_steps": 5})
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


def test_add_noise_and_velocity_equal_diffusers():
    data, noise, t = torch.randn(5, 3, 4, 4), torch.randn(5, 3, 4, 4), torch.tensor([0, 1, 10, 500, 999])
    ours, theirs = DDPMScheduler(), diffusers.DDPMScheduler()
    torch.testing.assert_close(ours.add_noise(data, noise, t), theirs.add_noise(data, noise, t))
    torch.testing.assert_close(ours.get_velocity(data, noise, t), theirs.get_velocity(data, noise, t))


def test_before_set_timesteps_the_chain_goes_down_by_one():
    ours, theirs = DDPMScheduler(), diffusers.DDPMScheduler()
    assert ours.previous_timestep(500) == theirs.previous_timestep(500) == 499
    assert len(ours) == len(theirs) == 1000 and ours.init_noise_sigma == 1.0 and ours.order == 1


def test_no_step_reads_a_value_back_from_the_device():
    """On the meta device no tensor has a value, so that a step which reads one fails."""
    scheduler = DDPMScheduler()
    scheduler.set_timesteps(4, device="meta")
    x = torch.randn(2, 3, 4, 4, device="meta")
    for index, t in enumerate(scheduler.timesteps[1:], start=1):
        assert scheduler.previous_timestep(t) == ([500, 250, 0, -1][index])
        x = scheduler.step(x, t, x).prev_sample
    assert x.shape == (2, 3, 4, 4)


def test_the_grid_may_be_set_by_hand():
    ours, theirs = DDPMScheduler(), diffusers.DDPMScheduler()
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
        scheduler.timesteps = scheduler.timesteps[::3].clone()
    assert [ours.previous_timestep(t) for t in ours.timesteps] == [
        theirs.previous_timestep(t) for t in theirs.timesteps
    ]


def test_configs_travel_both_ways(tmp_path):
    config = {"beta_schedule": "scaled_linear", "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    ours = DDPMScheduler(**config)
    theirs = diffusers.DDPMScheduler.from_config(ours.config)
    back = DDPMScheduler.from_config(theirs.config)
    assert {k: v for k, v in ours.config.items() if k[0] != "_"} == {
        k: v for k, v in back.config.items() if k[0] != "_"
    }
    ours.save_pretrained(tmp_path)
    assert torch.equal(
        diffusers.DDPMScheduler.from_pretrained(tmp_path).betas, DDPMScheduler.from_pretrained(tmp_path).betas
    )
    ddim = diffusers.DDIMScheduler.from_config(ours.config)
    assert ddim.config.timestep_spacing == "trailing"
    assert DDPMScheduler.from_config(ddim.config).config.prediction_type == "v_prediction"
    assert diffusers.DDPMScheduler in ours.compatibles and diffusers.DDIMScheduler in ours.compatibles


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: DDPMScheduler().set_timesteps(0), "`num_inference_steps`: got 0"),
        (lambda: DDPMScheduler().set_timesteps(-3), "`num_inference_steps`: got -3"),
        (lambda: DDPMScheduler().set_timesteps(2.5), "`num_inference_steps`: got 2.5"),
        (lambda: DDPMScheduler().set_timesteps(True), "`num_inference_steps`: got True"),
        (lambda: DDPMScheduler().set_timesteps(1001), "`num_inference_steps`: got 1001"),
        (lambda: DDPMScheduler().set_timesteps(), "got neither"),
        (lambda: DDPMScheduler().set_timesteps(3, timesteps=[3, 2, 1]), "got both"),
        (lambda: DDPMScheduler().set_timesteps(timesteps=[1, 2]), "`timesteps`: got [1, 2]"),
        (lambda: DDPMScheduler().set_timesteps(timesteps=[]), "`timesteps`: got []"),
        (lambda: DDPMScheduler().set_timesteps(timesteps=[1000, 2]), "`timesteps`: got [1000, 2]"),
        (lambda: DDPMScheduler().set_timesteps(timesteps=[10.5, 2]), "`timesteps`: got [10.5, 2]"),
        (lambda: DDPMScheduler(10, steps_offset=1).set_timesteps(10), "`steps_offset`: got 1"),
        (lambda: DDPMScheduler(variance_type="big"), "`variance_type`: got 'big'"),
        (lambda: DDPMScheduler(prediction_type="velocity"), "`prediction_type`: got 'velocity'"),
        (lambda: DDPMScheduler(timestep_spacing="even"), "`timestep_spacing`: got 'even'"),
        (lambda: DDPMScheduler(beta_schedule="none"), "`beta_schedule`: got 'none'"),
        (lambda: DDPMScheduler().step(torch.ones(1, 6, 2, 2), 5, torch.ones(1, 3, 2, 2)), "`model_output`: got shape"),
        (
            lambda: DDPMScheduler().step(torch.ones(2, 3), torch.tensor([5, 6]), torch.ones(2, 3)),
            "`timestep`: got a tensor of shape (2,)",
        ),
        (
            lambda: DDPMScheduler(variance_type="learned").step(torch.ones(1, 3, 2), 5, torch.ones(1, 3, 2)),
            "expected (1, 6, 2)",
        ),
        (
            lambda: DDPMScheduler(rescale_betas_zero_snr=True).step(torch.ones(1, 3), 999, torch.ones(1, 3)),
            "prediction_type: 'epsilon' leaves data unknown",
        ),
    ],
)
def test_bad_arguments_are_named(call, named):
    with pytest.raises(ValueError) as error:
        call()
    assert named in str(error.value)


def test_a_timestep_outside_the_grid_is_named():
    scheduler = DDPMScheduler()
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="`timestep`: got 123"):
        scheduler.step(torch.ones(1, 3), 123, torch.ones(1, 3))
