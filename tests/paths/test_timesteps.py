"""The timestep densities: what is drawn follows the density that is stated."""

import pytest
import scipy.stats
import torch

from hubgen.paths.timesteps import CosMapDensity, LogitNormalDensity, ModeDensity, UniformDensity, shift_time

DENSITIES = {
    "uniform": UniformDensity(),
    "uniform shift 3": UniformDensity(shift=3.0),
    "logit-normal": LogitNormalDensity(),
    "logit-normal (-0.5, 0.7)": LogitNormalDensity(-0.5, 0.7),
    "logit-normal shift 3": LogitNormalDensity(shift=3.0),
    "logit-normal shift 0.5": LogitNormalDensity(0.3, 1.2, shift=0.5),
    "cosmap": CosMapDensity(),
    "cosmap shift 2": CosMapDensity(shift=2.0),
    "mode": ModeDensity(1.29),
    "mode -0.8 shift 2": ModeDensity(-0.8, shift=2.0),
}


@pytest.fixture(params=DENSITIES)
def density(request: pytest.FixtureRequest):
    return DENSITIES[request.param]


def test_draws_follow_the_distribution_function(density):
    t = density.sample(100_000, generator=torch.Generator().manual_seed(0))
    assert t.shape == (100_000,) and t.dtype == torch.float32 and (t >= 0).all() and (t <= 1).all()
    test = scipy.stats.kstest(t.double().numpy(), lambda x: density.cdf(torch.from_numpy(x)).numpy())
    assert test.statistic < 0.005 and test.pvalue > 0.01


def test_the_density_is_the_slope_of_the_distribution_function_and_integrates_to_one(density):
    t = torch.linspace(0.001, 0.999, 20_001, dtype=torch.float64)
    p = density.density(t)
    integral = torch.trapezoid(p, t)
    torch.testing.assert_close(integral, density.cdf(t[-1:])[0] - density.cdf(t[:1])[0], rtol=1e-5, atol=1e-5)
    assert 0.98 < integral < 1.0001
    h = 1e-6
    inner = t[10:-10:50]
    slope = (density.cdf(inner + h) - density.cdf(inner - h)) / (2 * h)
    torch.testing.assert_close(density.density(inner), slope, rtol=1e-4, atol=1e-6)


def test_shift_lowers_the_log_snr_of_rectified_flow_by_twice_its_logarithm():
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    shifted = shift_time(t, 3.0)
    moved = 2 * torch.logit(shifted) - 2 * torch.logit(t)  # log-SNR is -2 logit(t)
    torch.testing.assert_close(moved, torch.full_like(t, 2 * torch.tensor(3.0).log().item()), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(shift_time(shifted, 1 / 3.0), t)


def test_a_generator_repeats_the_draws(density):
    first, second = (density.sample(16, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: UniformDensity(shift=0), "`shift`: got 0"),
        (lambda: LogitNormalDensity(std=-1), "`std`: got -1"),
        (lambda: ModeDensity(2.0), "`scale`: got 2.0"),
        (lambda: ModeDensity(-1.1), "`scale`: got -1.1"),
    ],
)
def test_bad_arguments_are_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()
