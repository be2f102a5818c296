"""Identities of the probability paths, in exact arithmetic where the claim is exact."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from diffusers import DDPMScheduler
from scipy import stats

from hubgen.paths.continuous import CosinePath, EdmPath, VarianceExplodingPath
from hubgen.paths.path import ProbabilityPath, RectifiedFlowPath, VariancePreservingPath
from hubgen.paths.prediction import PREDICTION_TYPES, from_diffusers, to_diffusers
from hubgen.schedulers.score_sde_ve import ScoreSdeVeScheduler

VP_CONFIGS = {
    "vp-linear": {},
    "vp-scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "vp-squaredcos": {"beta_schedule": "squaredcos_cap_v2"},
    "vp-sigmoid": {"beta_schedule": "sigmoid"},
    "vp-laplace": {"beta_schedule": "laplace"},
    "vp-zero-snr": {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
    "vp-10-steps": {"trained_betas": [0.05 * i for i in range(1, 11)], "num_train_timesteps": 10},
}
PATHS: dict[str, Callable[..., ProbabilityPath]] = {
    "rectified-flow": RectifiedFlowPath,
    "optimal-transport": partial(RectifiedFlowPath, sigma_min=1e-3),
    "cosine": CosinePath,
    "edm": EdmPath,
    "variance-exploding": VarianceExplodingPath,
    **{
        name: (lambda prediction_type="noise", config=config: VariancePreservingPath(prediction_type, **config))
        for name, config in VP_CONFIGS.items()
    },
}


@pytest.fixture(params=PATHS)
def make_path(request: pytest.FixtureRequest) -> Callable[..., ProbabilityPath]:
    return PATHS[request.param]


def name_of(path: ProbabilityPath) -> str:
    return type(path).__name__


def draw(batch: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 3, 4, 4, dtype=dtype), torch.randn(batch, 3, 4, 4, dtype=dtype)


def predictions(path: ProbabilityPath, data: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> dict:
    """Every prediction type from its definition, without `convert`."""
    at = [
        c(t.double()).view(-1, 1, 1, 1) for c in (path.alpha, path.sigma, path.alpha_derivative, path.sigma_derivative)
    ]
    alpha, sigma, alpha_derivative, sigma_derivative = at
    data, noise = data.double(), noise.double()
    return {
        "noise": noise,
        "data": data,
        "v": alpha * noise - sigma * data,
        "velocity": alpha_derivative * data + sigma_derivative * noise,
        "score": -noise / sigma,
    }


def inside(path: ProbabilityPath, least: float) -> torch.Tensor:
    """Times at which neither alpha nor sigma falls below `least`."""
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    return t[(path.alpha(t) >= least) & (path.sigma(t) >= least)][::25]


def per_example_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest deviation of an example in units of the example's own standard deviation."""
    return ((got.double() - expected.double()).abs().amax((1, 2, 3)) / expected.double().std((1, 2, 3))).max().item()


@pytest.mark.parametrize("target", PREDICTION_TYPES)
@pytest.mark.parametrize("source", PREDICTION_TYPES)
@pytest.mark.parametrize(("dtype", "least"), [(torch.float64, 0.001), (torch.float32, 0.1)])
def test_conversions_give_the_defined_quantity_and_invert_each_other(make_path, source, target, dtype, least):
    path = make_path()
    # float32 rounding is amplified by 1 / alpha and 1 / sigma, so that 1e-5 can hold only away from the ends
    t = inside(path, least).to(dtype)
    data, noise = draw(len(t), dtype)
    x_t = path.interpolate(data, noise, t)
    known = predictions(path, data, noise, t)
    there = path.convert(known[source].to(dtype), x_t, t, source, target)
    back = path.convert(there, x_t, t, target, source)
    assert there.dtype == dtype
    # where the data stays as it is, the noise outgrows it
    limit = 2e-5 if name_of(path) == "VarianceExplodingPath" else 1e-5
    assert per_example_error(there, known[target]) < limit
    assert per_example_error(back, known[source]) < limit


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_the_target_of_a_sample_is_the_quantity_that_the_path_predicts(make_path, kind):
    path = make_path(prediction_type=kind)
    t = inside(path, 0.05)
    data, noise = draw(len(t))
    sample = path.sample(data, noise, t)
    assert per_example_error(sample.target, predictions(path, data, noise, sample.t)[kind]) < 1e-9
    torch.testing.assert_close(sample.x_t, path.interpolate(data, noise, sample.t))


def test_the_velocity_is_the_time_derivative_of_x_t(make_path):
    path = make_path()
    t = torch.rand(64, dtype=torch.float64) * 0.998 + 0.001
    data, noise = draw(64)
    _, derivative = torch.func.jvp(lambda t: path.interpolate(data, noise, t), (t,), (torch.ones_like(t),))
    torch.testing.assert_close(predictions(path, data, noise, t)["velocity"], derivative, rtol=1e-8, atol=1e-8)
    h = 1e-7
    difference = (path.interpolate(data, noise, t + h) - path.interpolate(data, noise, t - h)) / (2 * h)
    # a central difference that straddles a knot of the table is off by the second derivative times h
    torch.testing.assert_close(derivative, difference, rtol=1e-3, atol=1e-3)


def test_the_rectified_flow_velocity_is_noise_minus_data():
    data, noise = draw(8)
    sample = RectifiedFlowPath().sample(data, noise, torch.rand(8))
    torch.testing.assert_close(sample.target, noise - data)


def test_a_path_begins_at_the_data_and_ends_near_noise(make_path):
    path = make_path()
    data, noise = draw(2)
    start, left = torch.zeros(2), path.sigma(torch.zeros(1)).item()  # noise that is left: none, but for two of them
    assert left == 0 or name_of(path) in ("RectifiedFlowPath", "VarianceExplodingPath")
    torch.testing.assert_close(path.interpolate(data, noise, start), data + left * noise, rtol=0, atol=1e-9)
    end = path.interpolate(data, noise, torch.ones(2, dtype=torch.float64))
    assert torch.nn.functional.cosine_similarity(end.flatten(), noise.flatten(), dim=0) > 0.97


def test_data_turns_into_noise_monotonically(make_path):
    path = make_path()
    t = torch.linspace(0, 1, 5001, dtype=torch.float64)
    assert (path.sigma(t).diff() > 0).all()
    if name_of(path) == "VarianceExplodingPath":
        assert (path.alpha(t) == 1).all()
    else:
        assert (path.alpha(t).diff() < 0).all()


@pytest.mark.parametrize("config", VP_CONFIGS.values(), ids=VP_CONFIGS)
def test_the_variance_preserving_path_equals_ddpm_add_noise_at_the_grid_times(config):
    path, scheduler = VariancePreservingPath(**config), DDPMScheduler(**config)
    n = path.num_train_timesteps
    index = torch.arange(n)
    data, noise = torch.randn(n, 1, 2, 2), torch.randn(n, 1, 2, 2)
    sample = path.sample(data, noise, (index + 1) / n)
    torch.testing.assert_close(sample.x_t, scheduler.add_noise(data, noise, index), rtol=0, atol=1e-5)
    v = path.convert(noise, sample.x_t, sample.t, "noise", "v")
    # 1 / alpha amplifies the rounding of x_t; where there is no signal, noise says nothing about v
    seen = path.alpha(sample.t) > 0.05
    torch.testing.assert_close(v[seen], scheduler.get_velocity(data, noise, index)[seen], rtol=0, atol=1e-4)


@pytest.mark.parametrize("n", [1, 10, 1000])
def test_the_index_told_to_the_model_belongs_to_x_t(n):
    path = VariancePreservingPath(num_train_timesteps=n)
    index = torch.arange(n)
    grid = path.time(index)
    assert torch.equal(path.timestep(grid), index)
    assert torch.equal(path.snap(grid), grid)
    t = torch.rand(1000)
    sample = path.sample(torch.randn(1000, 2), torch.randn(1000, 2), t)
    assert torch.equal(path.timestep(t), path.timestep(sample.t))
    assert torch.equal(path.time(path.timestep(t)), sample.t)
    assert ((sample.t - t) >= -2e-6).all() and ((sample.t - t) <= 1 / n + 2e-6).all()


def test_uniform_times_show_every_index_equally_often():
    path = VariancePreservingPath(num_train_timesteps=10)
    counts = path.timestep((torch.arange(10000) + 0.5) / 10000).bincount(minlength=10)
    assert (counts - 1000).abs().max() <= 1


def test_rectified_flow_tells_the_model_a_thousand_times_t():
    path, t = RectifiedFlowPath(), torch.tensor([0.0, 0.25, 1.0])
    assert path.timestep(t).tolist() == [0.0, 250.0, 1000.0]
    torch.testing.assert_close(path.time(path.timestep(t)), t)


def test_sd3_noise_weight_of_the_velocity_loss_is_t_over_one_minus_t():
    """-lambda' b^2 / 2 = t / (1 - t) with lambda = log-SNR and b = sigma (2403.03206, section 2 and 3.1)."""
    path = RectifiedFlowPath()
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(path.log_snr(t).sum(), t)
    torch.testing.assert_close(-0.5 * slope * path.sigma(t) ** 2, t / (1 - t))


def test_half_precision_data_keeps_its_dtype_and_the_accuracy_of_the_factors():
    path = RectifiedFlowPath()
    data, noise = draw(4, torch.float32)
    t = torch.rand(4)
    half = path.sample(data.bfloat16(), noise.bfloat16(), t)
    full = path.sample(data.bfloat16().float(), noise.bfloat16().float(), t)
    assert half.x_t.dtype == half.target.dtype == torch.bfloat16
    assert torch.equal(half.x_t, full.x_t.bfloat16())


def test_prediction_names_translate_both_ways():
    for theirs in ("epsilon", "sample", "v_prediction", "flow_prediction"):
        assert to_diffusers(from_diffusers(theirs)) == theirs


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: RectifiedFlowPath("epsilon"), "`prediction_type`: got 'epsilon'"),
        (lambda: to_diffusers("score"), "prediction_type"),
        (lambda: from_diffusers("noise"), "prediction_type"),
        (lambda: VariancePreservingPath(beta_schedule="quadratic"), "`beta_schedule`: got 'quadratic'"),
        (lambda: VariancePreservingPath(num_train_timesteps=0), "`num_train_timesteps`: got 0"),
        (lambda: VariancePreservingPath(beta_end=2.0), "betas"),
        (lambda: VariancePreservingPath(trained_betas=[0.1, 0.2]), "`trained_betas`: got shape (2,)"),
        (lambda: RectifiedFlowPath().sample(torch.ones(2, 3), torch.ones(2, 1), torch.rand(2)), "`noise`: got shape"),
        (lambda: RectifiedFlowPath().sample(torch.ones(2, 3), torch.ones(2, 3), torch.rand(1)), "`t`: got shape (1,)"),
        (
            lambda: RectifiedFlowPath().sample(torch.ones(2, 3), torch.ones(2, 3), torch.rand(2).half()),
            "`t`: got dtype",
        ),
        (
            lambda: RectifiedFlowPath().convert(*[torch.ones(2, 3)] * 2, torch.rand(2), "v", "eps"),
            "`target`: got 'eps'",
        ),
    ],
)
def test_bad_arguments_are_named(call, named):
    with pytest.raises(ValueError) as error:
        call()
    assert named in str(error.value)


def test_optimal_transport_is_lipmans_conditional_flow_in_reversed_time():
    sigma_min, path = 1e-2, RectifiedFlowPath(sigma_min=1e-2)
    data, noise = draw(16)
    s = torch.rand(16, dtype=torch.float64)  # 0 is noise there
    sample = path.sample(data, noise, 1 - s)
    at = s.view(-1, 1, 1, 1)
    torch.testing.assert_close(sample.x_t, (1 - (1 - sigma_min) * at) * noise + at * data)
    torch.testing.assert_close(sample.target, -(data - (1 - sigma_min) * noise))


def test_edm_is_its_preconditioning_and_draws_its_noise_levels():
    """2206.00364, table 1, for data of standard deviation 1."""
    path = EdmPath()
    t = torch.rand(4000, dtype=torch.float64) * 0.998 + 0.001
    level = path.noise_level(t)
    kolmogorov = stats.kstest(level.log().numpy(), stats.norm(-1.2, 1.2).cdf).statistic
    assert kolmogorov < 1.63 / 4000**0.5  # the bound of one in a hundred
    data, noise = draw(8)
    sample, s = path.sample(data, noise, t[:8]), level[:8].view(-1, 1, 1, 1)
    c_in, c_skip, c_out = (1 + s**2).rsqrt(), 1 / (1 + s**2), s * (1 + s**2).rsqrt()
    torch.testing.assert_close(sample.x_t, c_in * (data + s * noise))
    torch.testing.assert_close(-sample.target, (data - c_skip * (data + s * noise)) / c_out)
    torch.testing.assert_close(path.timestep(t), (level.log() / 4).float())
    torch.testing.assert_close(path.time(path.timestep(t)), t.float(), rtol=0, atol=1e-5)


def test_the_levels_of_ncsn_are_geometric_and_equally_likely():
    path = VarianceExplodingPath(sigma_min=0.01, sigma_max=1.0, levels=10)
    index = path.timestep(torch.linspace(0, 1, 10_001)[:-1] + 5e-5)
    assert index.dtype == torch.int64 and (index.bincount() == 1000).all()
    levels = path.sigma(path.time(torch.arange(10)).double())
    torch.testing.assert_close(levels, torch.logspace(0, -2, 10, dtype=torch.float64))
    t = path.snap(torch.rand(100))
    assert torch.equal(path.snap(t), t)
    data, noise = draw(100)
    sample = path.sample(data, noise, torch.rand(100))
    torch.testing.assert_close(sample.target, -noise / path.sigma(sample.t.double()).view(-1, 1, 1, 1))


def test_the_score_sdes_path_has_the_noise_levels_of_its_scheduler():
    path, scheduler = VarianceExplodingPath(sigma_min=0.01, sigma_max=348.0), ScoreSdeVeScheduler(sigma_max=348.0)
    scheduler.set_timesteps(50)
    torch.testing.assert_close(path.timestep(scheduler.timesteps), scheduler.sigmas, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RectifiedFlowPath(sigma_min=1.0), "`sigma_min`: got 1.0"),
        (lambda: EdmPath(std=0), "`std`: got 0"),
        (lambda: VarianceExplodingPath(sigma_min=2, sigma_max=1), "`sigma_min`, `sigma_max`: got 2 and 1"),
        (lambda: VarianceExplodingPath(levels=1), "`levels`: got 1"),
    ],
)
def test_paths_that_cannot_be_are_refused_by_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()
