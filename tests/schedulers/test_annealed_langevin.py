"""NCSN's sampler on a distribution whose score is known, and by a score that was learned."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

import hubgen
from hubgen.conditioning.guidance import ClassifierFreeGuidance
from hubgen.paths.continuous import VarianceExplodingPath
from hubgen.pipelines.denoising import denoise
from hubgen.schedulers.annealed_langevin import AnnealedLangevinScheduler
from hubgen.schedulers.objective import objective_of
from hubgen.training.kit.ema import ExponentialMovingAverage

# A ring of eight Gaussians, radius 2, standard deviation 0.2.
WEIGHTS = torch.tensor([1.0, 2, 3, 4, 4, 3, 2, 1]) / 20
ANGLES = torch.arange(8) * (2 * math.pi / 8)
MEANS = 2 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1)
SCALE = 0.2
Score = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def ring(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    which = torch.multinomial(WEIGHTS, count, replacement=True, generator=generator)
    return MEANS[which] + SCALE * torch.randn(count, 2, generator=generator)


def exact_score(sigmas: torch.Tensor) -> Score:
    def score(x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        spread = SCALE**2 + sigmas[level.long()][:, None] ** 2  # (B, 1)
        centred = MEANS - x[:, None]  # (B, 8, 2)
        share = (WEIGHTS.log() - 0.5 * centred.square().sum(-1) / spread).softmax(-1)
        return (share[..., None] * centred).sum(1) / spread

    return score


def histogram(x: torch.Tensor) -> torch.Tensor:
    """Shares of 40 cells: those of eight directions, the modes', at five distances."""
    distance = torch.bucketize((x.norm(dim=1) - 2).abs(), torch.tensor([0.05, 0.13, 0.22, 0.35]))
    counts = torch.bincount(5 * torch.cdist(x, MEANS).argmin(1) + distance, minlength=40).double()
    return (counts + 0.01) / (counts + 0.01).sum()


def modes(x: torch.Tensor) -> torch.Tensor:
    return torch.bincount(torch.cdist(x, MEANS).argmin(1), minlength=8) / len(x)


def sampled(score: Score, scheduler: AnnealedLangevinScheduler, count: int = 10_000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(count, 2, generator=generator) * scheduler.init_noise_sigma
    predict = lambda x, t, branches, step: score(x, t)  # noqa: E731
    return denoise(predict, scheduler, start, scheduler.timesteps, ClassifierFreeGuidance(1.0), generator)


def assert_like_the_ring(x: torch.Tensor, modes_within: float = 0.03) -> None:
    """True samples have a divergence of 0.002, and miss the weights of the modes by 0.01."""
    truth, found = histogram(ring(2_000_000, seed=5)), histogram(x)
    assert (found * (found / truth).log()).sum() < 0.01
    assert 0.5 * (modes(x) - WEIGHTS).abs().sum() < modes_within


@pytest.fixture
def scheduler() -> AnnealedLangevinScheduler:
    """Levels that reach over the ring, and steps as large as its narrowest part allows."""
    return AnnealedLangevinScheduler(
        sigma_min=0.05, sigma_max=5.0, num_train_timesteps=10, step_size=5e-4, denoise=False
    )


def test_the_exact_score_gives_the_ring_with_its_weights(scheduler: AnnealedLangevinScheduler) -> None:
    assert_like_the_ring(ring(10_000, seed=7))
    assert_like_the_ring(sampled(exact_score(scheduler.sigmas), scheduler))


@pytest.mark.slow
def test_a_score_that_was_learned_gives_the_ring(scheduler: AnnealedLangevinScheduler) -> None:
    objective, data = objective_of(scheduler), ring(50_000, seed=3)
    torch.manual_seed(0)
    widths, layers = (2 + 10, 128, 128, 128), []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.SiLU()]
    network = nn.Sequential(*layers, nn.Linear(128, 2))
    optimizer = torch.optim.Adam(network.parameters(), lr=4e-3)
    average = ExponentialMovingAverage(network, decay=0.995)
    random = torch.Generator().manual_seed(0)

    def score(x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        sigma = scheduler.sigmas[level.long()][:, None]
        inputs = torch.cat([4 * x / (4 + sigma**2).sqrt(), nn.functional.one_hot(level.long(), 10)], 1)
        return network(inputs) / sigma

    for step in range(3000):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * (1 - step / 3000)
        batch = data[torch.randint(0, len(data), (512,), generator=random)]
        sample = objective.draw(batch, random)
        objective.loss(score(sample.x_t, objective.timestep(sample)), sample).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(network)
    average.copy_to(network)
    with torch.no_grad():
        x = sampled(score, scheduler)
    assert_like_the_ring(x, modes_within=0.05)


def test_steps_are_those_of_the_authors_code() -> None:
    scheduler = AnnealedLangevinScheduler(denoise=False)
    x, score = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    for level in (0, 4, 9):
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        size = 2e-5 * (scheduler.sigmas[level] / scheduler.sigmas[-1]) ** 2
        found = scheduler.step(score, level, x, torch.Generator().manual_seed(0)).prev_sample
        torch.testing.assert_close(found, x + size * score + (2 * size).sqrt() * noise)


def test_levels_are_those_of_the_path_and_steps_are_spread_over_them() -> None:
    scheduler = AnnealedLangevinScheduler()
    path = VarianceExplodingPath(sigma_min=0.01, sigma_max=1.0, levels=10)
    torch.testing.assert_close(path.sigma(path.time(torch.arange(10)).double()).float(), scheduler.sigmas)
    assert len(scheduler.timesteps) == 1000
    scheduler.set_timesteps(30)
    assert scheduler.timesteps.tolist() == [level for level in range(10) for _ in range(3)]
    data, noise = torch.randn(10, 3, 2, 2), torch.randn(10, 3, 2, 2)
    expected = data + scheduler.sigmas.view(-1, 1, 1, 1) * noise
    torch.testing.assert_close(scheduler.add_noise(data, noise, torch.arange(10)), expected)


def test_the_last_step_ends_at_the_mean_of_the_data() -> None:
    scheduler = AnnealedLangevinScheduler(num_train_timesteps=2, steps_per_level=1)
    x, score = torch.randn(2, 2), torch.randn(2, 2)
    scheduler.step(score, 0, x)
    found = scheduler.step(score, 1, x, return_dict=False)[0]
    torch.testing.assert_close(found, x + 0.01**2 * score)


def test_it_is_saved_and_loaded(tmp_path) -> None:
    AnnealedLangevinScheduler(sigma_max=3.0, steps_per_level=7).save_pretrained(tmp_path)
    again = hubgen.AnnealedLangevinScheduler.from_pretrained(tmp_path)
    assert again.config.sigma_max == 3.0 and len(again.timesteps) == 70


def stepped(score: torch.Tensor, level: int) -> None:
    AnnealedLangevinScheduler().step(score, level, torch.zeros(1, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AnnealedLangevinScheduler(sigma_min=2.0), "`sigma_min`, `sigma_max`: got 2.0 and 1.0"),
        (lambda: AnnealedLangevinScheduler(num_train_timesteps=1), "`num_train_timesteps`: got 1"),
        (lambda: AnnealedLangevinScheduler(step_size=0), "`step_size`: got 0"),
        (lambda: AnnealedLangevinScheduler().set_timesteps(15), "expected a multiple of the 10 noise levels"),
        (lambda: stepped(torch.zeros(1, 2), 10), "`timestep`: got 10"),
        (
            lambda: AnnealedLangevinScheduler().step(torch.zeros(1, 3), 0, torch.zeros(1, 2)),
            r"`model_output`: got shape \(1, 3\)",
        ),
    ],
)
def test_bad_arguments_are_named(call: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
