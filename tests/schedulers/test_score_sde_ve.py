"""ScoreSdeVeScheduler: predictor and corrector apart against closed forms, and diffusers' scheduler step by step."""

import math
from collections.abc import Callable

import diffusers
import pytest
import torch

from hubgen.schedulers.score_sde_ve import ScoreSdeVeScheduler

Score = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
CONFIGS = {
    "default": {},
    "ffhq": {"snr": 0.075, "sigma_max": 348.0},
    "later end": {"sampling_eps": 1e-3, "sigma_min": 0.1, "sigma_max": 50.0},
}

# Eight modes on a ring, unequal, so that a sampler which only finds them fails.
RADIUS, DEVIATION = 2.0, 0.2
WEIGHTS = torch.tensor([1.0, 2, 3, 4, 4, 3, 2, 1]) / 20
ANGLES = torch.arange(8) * (2 * math.pi / 8)
MODES = RADIUS * torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)  # (8, 2)


def ring_score(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The exact score of the ring plus noise: (B, 2), () -> (B, 2)."""
    variance = DEVIATION**2 + sigma**2
    distances = (x[:, None] - MODES).square().sum(-1)  # (B, 8)
    share = torch.softmax(WEIGHTS.log() - distances / (2 * variance), dim=1)
    return (share @ MODES - x) / variance


def ring_divergence(x: torch.Tensor) -> float:
    """KL of the samples' histogram from the ring's over 40 cells: the 8 modes, in each 5 rings of equal probability.

    Of 10,000 true samples about 39 / 20,000 = 0.002.
    """
    distances, mode = (x[:, None] - MODES).norm(dim=-1).min(dim=1)
    edges = DEVIATION * torch.sqrt(-2 * torch.log(1 - torch.arange(1, 5) / 5))  # quantiles of Rayleigh's distribution
    cells = mode * 5 + torch.bucketize(distances, edges)
    share = torch.bincount(cells, minlength=40) / len(x)
    truth = WEIGHTS.repeat_interleave(5) / 5
    return float(torch.where(share > 0, share * (share / truth).log(), 0.0).sum())


def sample_ring(
    scheduler: ScoreSdeVeScheduler, steps: int, corrects: bool = True, predicts: bool = True, score: Score = ring_score
) -> torch.Tensor:
    """10,000 samples, by both stages or by one of them."""
    generator = torch.Generator().manual_seed(0)
    scheduler.set_timesteps(steps)
    x = scheduler.init_noise_sigma * torch.randn(10_000, 2, generator=generator)
    for t in scheduler.timesteps:
        sigma = scheduler.sigma(t)
        if corrects:
            x = scheduler.step_correct(score(x, sigma), x, generator).prev_sample
        if predicts:
            x = scheduler.step(score(x, sigma), t, x, generator).prev_sample
    return x


class WrongCorrector(ScoreSdeVeScheduler):
    """The corrector with one of two mistakes."""

    mistake = ""

    def step_correct(self, model_output, sample, generator=None, return_dict=True):
        noise = torch.randn(sample.shape, generator=generator)
        ratio = self.config.snr * noise.norm(dim=1).mean() / model_output.norm(dim=1).mean()
        size = 2 * (ratio if self.mistake == "snr not squared" else ratio**2)
        spread = size if self.mistake == "root of e noise" else 2 * size
        return diffusers.schedulers.scheduling_utils.SchedulerOutput(sample + size * model_output + spread**0.5 * noise)


RING = {"sigma_max": 50.0, "snr": 0.16}


def test_the_noise_to_start_from_has_the_largest_standard_deviation():
    assert ScoreSdeVeScheduler(sigma_max=50.0).init_noise_sigma == 50.0
    scheduler = ScoreSdeVeScheduler(sigma_max=50.0)
    scheduler.set_timesteps(10)
    torch.testing.assert_close(scheduler.sigma(scheduler.timesteps[0]), torch.tensor(50.0))
    torch.testing.assert_close(scheduler.discrete_sigmas[[0, -1]], torch.tensor([0.01, 50.0]))


def test_the_predictor_alone_samples_the_ring_from_its_exact_score():
    assert ring_divergence(sample_ring(ScoreSdeVeScheduler(**RING), 200, corrects=False)) < 0.01


def test_predictor_and_corrector_sample_the_ring_in_half_as_many_steps():
    assert ring_divergence(sample_ring(ScoreSdeVeScheduler(**RING), 100)) < 0.005


def test_half_the_drift_is_seen_in_the_predictor_alone_and_hidden_by_the_corrector():
    """Which is why the two stages are tested apart."""

    class HalfDrift(ScoreSdeVeScheduler):
        def step_pred(self, model_output, timestep, sample, generator=None, return_dict=True):
            return super().step_pred(model_output / 2, timestep, sample, generator, return_dict)

    assert ring_divergence(sample_ring(HalfDrift(**RING), 100, corrects=False)) > 0.5
    assert ring_divergence(sample_ring(HalfDrift(**RING), 200)) < 0.05


@pytest.mark.parametrize("mistake", ["snr not squared", "root of e noise"])
def test_the_ring_tells_a_wrong_corrector(mistake):
    wrong = WrongCorrector(**RING)
    wrong.mistake = mistake
    assert ring_divergence(sample_ring(wrong, 50)) > 0.05


def test_the_corrector_keeps_a_normal_distribution_but_for_its_known_bias():
    """x' = x (1 - e / v) + sqrt(2 e) noise, with e = 2 (snr |noise| / |score|)^2 = 2 snr^2 v^2 / var(x)."""
    scheduler = ScoreSdeVeScheduler(snr=0.3)
    generator = torch.Generator().manual_seed(0)
    variance = 9.0
    x = variance**0.5 * torch.randn(200, 500, generator=generator)
    for _ in range(60):
        x = scheduler.step_correct(-x / variance, x, generator).prev_sample
        variance_now = x.var().item()
    expected = variance  # the fixed point of the variance's own recursion
    for _ in range(100):
        e = 2 * 0.3**2 * variance**2 / expected
        expected = expected * (1 - e / variance) ** 2 + 2 * e
    assert abs(variance_now - expected) < 0.03 * expected


def test_the_predictor_follows_the_variance_of_a_normal_distribution():
    """x' = x (1 - d / v) + sqrt(d) noise with d = sigma^2 - sigma'^2 and v = s^2 + sigma^2, step by step."""
    scheduler = ScoreSdeVeScheduler(sigma_max=50.0)
    scheduler.set_timesteps(40)
    generator = torch.Generator().manual_seed(0)
    data_variance, variance = 4.0, 50.0**2
    x = 50.0 * torch.randn(200, 500, generator=generator)
    sigmas = [0.0, *scheduler.discrete_sigmas.tolist()]
    for i, t in enumerate(scheduler.timesteps):
        sigma, below = sigmas[40 - i], sigmas[39 - i]
        score = -x / (data_variance + sigma**2)
        removed = sigma**2 - below**2
        variance = variance * (1 - removed / (data_variance + sigma**2)) ** 2 + removed
        x = scheduler.step_pred(score, t, x, generator).prev_sample
        assert abs(x.var().item() - variance) < 0.05 * variance


def test_the_last_step_ends_in_the_mean_and_no_other_does():
    scheduler = ScoreSdeVeScheduler()
    scheduler.set_timesteps(4)
    x, score = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    for t in scheduler.timesteps:
        out = scheduler.step(score, t, x)
        assert torch.equal(out.prev_sample, out.prev_sample_mean) == (t == scheduler.timesteps[-1]).item()
    tuples = scheduler.step(score, scheduler.timesteps[-1], x, return_dict=False)
    assert torch.equal(tuples[0], tuples[1])


def score(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """A fixed nonlinear function of x_t and sigma, the same for both libraries."""
    return (torch.tanh(x.roll(1, -1)) - x / sigma) / (sigma + 1)


@pytest.mark.parametrize("steps", [1, 7, 50])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_each_stage_equals_diffusers_step_by_step(config, steps):
    ours, theirs = ScoreSdeVeScheduler(**config), diffusers.ScoreSdeVeScheduler(**config)
    ours.set_timesteps(steps)
    theirs.set_timesteps(steps)
    theirs.set_sigmas(steps)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas)
    torch.testing.assert_close(ours.discrete_sigmas, theirs.discrete_sigmas)
    assert ours.init_noise_sigma == theirs.init_noise_sigma and len(ours) == len(theirs)

    x = ours.init_noise_sigma * torch.randn(2, 3, 8, 8)
    for i, t in enumerate(ours.timesteps):
        results = []
        for scheduler in (ours, theirs):
            generator = torch.Generator().manual_seed(i)
            corrected = scheduler.step_correct(score(x, ours.sigmas[i]), x, generator).prev_sample
            output = scheduler.step_pred(score(corrected, ours.sigmas[i]), t, corrected, generator)
            results.append((corrected, output.prev_sample, output.prev_sample_mean))
        for mine, other in zip(*results, strict=True):
            assert (mine - other).abs().max() <= 1e-5 * other.std()
        x = results[0][1]
    assert x.isfinite().all()


@pytest.mark.parametrize("steps", [100, 1000, 2000])
def test_the_predictor_of_long_grids_walks_the_same_noise_levels_as_diffusers(steps):
    ours, theirs = ScoreSdeVeScheduler(), diffusers.ScoreSdeVeScheduler()
    ours.set_timesteps(steps)
    theirs.set_timesteps(steps)
    theirs.set_sigmas(steps)
    ones = torch.ones(steps, 1)
    for mine, other in zip(
        *(s.step_pred(ones, ours.timesteps, ones, torch.Generator().manual_seed(0), False) for s in (ours, theirs)),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)


def test_a_generator_a_picture_gives_the_noise_of_each():
    scheduler = ScoreSdeVeScheduler()
    x = torch.randn(2, 3, 4, 4)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    both = scheduler.step_pred(x, 0.5, x, generators).prev_sample
    for i, seed in enumerate((3, 4)):
        one = scheduler.step_pred(x[i : i + 1], 0.5, x[i : i + 1], torch.Generator().manual_seed(seed)).prev_sample
        assert torch.equal(both[i : i + 1], one)


def test_add_noise_equals_diffusers():
    ours, theirs = ScoreSdeVeScheduler(), diffusers.ScoreSdeVeScheduler()
    data, noise, indices = torch.randn(3, 3, 4, 4), torch.randn(3, 3, 4, 4), torch.tensor([0, 700, 1999])
    torch.testing.assert_close(ours.add_noise(data, noise, indices), theirs.add_noise(data, noise, indices))


def test_no_step_reads_a_value_back_from_the_device():
    """On the meta device no tensor has a value, so that a step which reads one fails."""
    scheduler = ScoreSdeVeScheduler()
    scheduler.set_timesteps(4, device="meta")
    x = torch.randn(2, 3, 4, 4, device="meta")
    for t in scheduler.timesteps:
        x = scheduler.step_correct(x, x).prev_sample
        x = scheduler.step(x, t, x).prev_sample
    assert x.shape == (2, 3, 4, 4) and scheduler.sigma(t).shape == ()


def test_configs_travel_both_ways(tmp_path):
    ours = ScoreSdeVeScheduler(snr=0.075, sigma_max=348.0, correct_steps=2)
    ours.save_pretrained(tmp_path)
    theirs = diffusers.ScoreSdeVeScheduler.from_pretrained(tmp_path)
    back = ScoreSdeVeScheduler.from_config(theirs.config)
    assert {k: v for k, v in ours.config.items() if k[0] != "_"} == {
        k: v for k, v in back.config.items() if k[0] != "_"
    }


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: ScoreSdeVeScheduler(snr=0), "`snr`: got 0"),
        (lambda: ScoreSdeVeScheduler(correct_steps=-1), "`correct_steps`: got -1"),
        (lambda: ScoreSdeVeScheduler(sigma_min=2.0, sigma_max=1.0), "`sigma_min`, `sigma_max`: got 2.0 and 1.0"),
        (lambda: ScoreSdeVeScheduler(sampling_eps=1.0), "`sampling_eps`: got 1.0"),
        (lambda: ScoreSdeVeScheduler().set_timesteps(0), "`num_inference_steps`: got 0"),
        (lambda: ScoreSdeVeScheduler().set_sigmas(10), "`num_inference_steps`: got 10, expected that of set_timesteps"),
        (lambda: ScoreSdeVeScheduler().set_sigmas(2000, sampling_eps=0.1), "`sampling_eps`: got 0.1"),
        (lambda: ScoreSdeVeScheduler().step_pred(torch.ones(1, 6), 0.5, torch.ones(1, 3)), "`model_output`: got shape"),
        (lambda: ScoreSdeVeScheduler().step_correct(torch.ones(1, 6), torch.ones(1, 3)), "`model_output`: got shape"),
        (
            lambda: ScoreSdeVeScheduler().add_noise(torch.ones(1, 3), torch.ones(1, 3), torch.ones(1)),
            "`timesteps`: got",
        ),
    ],
)
def test_bad_arguments_are_named(call, named):
    with pytest.raises(ValueError) as error:
        call()
    assert named in str(error.value)


def test_the_timesteps_are_the_times_of_the_denoising_loop():
    from hubgen.pipelines.denoising import times

    scheduler = ScoreSdeVeScheduler()
    scheduler.set_timesteps(5)
    assert times(scheduler, scheduler.timesteps) == scheduler.timesteps.tolist()
