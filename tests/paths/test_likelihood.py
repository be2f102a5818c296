"""The probability-flow ODE gives densities that are known exactly."""

import math
from collections.abc import Callable

import pytest
import torch

from hubgen.paths.continuous import CosinePath, EdmPath, VarianceExplodingPath
from hubgen.paths.likelihood import log_likelihood
from hubgen.paths.path import ProbabilityPath, RectifiedFlowPath, VariancePreservingPath
from hubgen.paths.prediction import PredictionType

# A mixture of two Gaussians in three dimensions, of which every marginal along a path is one too.
MEANS = torch.tensor([[1.0, -1.0, 0.5], [-1.0, 1.0, -0.5]], dtype=torch.float64)
SCALES = torch.tensor([0.4, 0.7], dtype=torch.float64)
WEIGHTS = torch.tensor([0.3, 0.7], dtype=torch.float64)
PATHS: dict[str, tuple[Callable[..., ProbabilityPath], tuple[float, float]]] = {
    "rectified flow": (lambda: RectifiedFlowPath(), (0.0, 1.0)),
    "optimal transport": (lambda: RectifiedFlowPath(sigma_min=1e-2), (0.0, 1.0)),
    # where no more of the data is left at the end than the tolerance
    "variance preserving, noise": (lambda: VariancePreservingPath("noise", beta_end=0.05), (1e-3, 1.0)),
    "variance preserving, v": (lambda: VariancePreservingPath("v", rescale_betas_zero_snr=True), (0.0, 1.0)),
    "variance exploding": (lambda: VarianceExplodingPath(sigma_max=3000.0), (0.0, 1.0)),
    "cosine": (lambda: CosinePath(), (0.0, 1.0)),
    "edm": (lambda: EdmPath(mean=0.0, std=3.0), (1e-4, 1 - 1e-4)),
}


def component_terms(path: ProbabilityPath, x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Log-densities (B, 2) and means of data and noise given x (B, 2, 3) of each component."""
    alpha, sigma = (f(t).view(-1, 1, 1) for f in (path.alpha, path.sigma))
    spread = (alpha * SCALES[None, :, None]) ** 2 + sigma**2  # (B, 2, 1)
    centred = x[:, None] - alpha * MEANS  # (B, 2, 3)
    logs = WEIGHTS.log() - 0.5 * (centred**2 / spread + (2 * math.pi * spread).log()).sum(-1)
    data = MEANS + alpha * SCALES[None, :, None] ** 2 / spread * centred
    return logs, data, sigma / spread * centred


def exact(path: ProbabilityPath) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The best prediction of the path's type, as a trained network would approach it."""

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        logs, data, noise = component_terms(path, x, t.double())
        share = logs.softmax(-1)[..., None]
        a, b = (value.view(-1, 1) for value in path.coefficients(path.prediction_type, t.double()))
        return a * (share * data).sum(1) + b * (share * noise).sum(1)

    return predict


def drawn(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    which = torch.multinomial(WEIGHTS, count, replacement=True, generator=generator)
    noise = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    return MEANS[which] + SCALES[which, None] * noise


@pytest.mark.parametrize("name", PATHS)
def test_the_exact_field_gives_the_exact_density(name: str) -> None:
    make, interval = PATHS[name]
    path, x = make(), drawn(200)
    begin = torch.full((len(x),), interval[0], dtype=torch.float64)
    x_begin = path.alpha(begin)[:, None] * x  # the density at the time where the ODE begins
    expected = component_terms(path, x_begin, begin)[0].logsumexp(-1)
    found = log_likelihood(exact(path), path, x_begin, probes=None, interval=interval, tolerance=1e-6)
    assert (found - expected).abs().mean() < 1e-3


def test_hutchinsons_estimate_is_unbiased() -> None:
    path, x = RectifiedFlowPath(), drawn(1)
    truth = log_likelihood(exact(path), path, x, probes=None, interval=(0.0, 1.0))
    generator = torch.Generator().manual_seed(1)
    draws = log_likelihood(exact(path), path, x.repeat(400, 1), probes=1, generator=generator, interval=(0.0, 1.0))
    error = draws.std() / 400**0.5
    assert error < 0.1 and (draws.mean() - truth).abs() < 3 * error
    averaged = log_likelihood(exact(path), path, x.repeat(100, 1), 4, torch.Generator().manual_seed(2), (0.0, 1.0))
    assert averaged.std() < 0.7 * draws.std()


@pytest.mark.parametrize("kind", ["data", "score", "velocity"])
def test_every_prediction_gives_the_same_likelihood(kind: PredictionType) -> None:
    x = drawn(20)
    paths = [RectifiedFlowPath("velocity"), RectifiedFlowPath(kind)]
    found = [log_likelihood(exact(path), path, x, None, interval=(1e-3, 1 - 1e-6), tolerance=1e-7) for path in paths]
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"probes": 0}, "`probes`: got 0"),
        ({"interval": (0.5, 0.5)}, "`interval`: got"),
        ({"data": torch.zeros(2, 3, dtype=torch.int64)}, "`data`: got torch.int64"),
    ],
)
def test_bad_arguments_are_named(changes: dict, message: str) -> None:
    path = RectifiedFlowPath()
    with pytest.raises(ValueError, match=message):
        log_likelihood(**{"predict": exact(path), "path": path, "data": drawn(2), **changes})
