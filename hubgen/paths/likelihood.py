"""The exact log-likelihood of data under a trained path, by its probability-flow ODE.

Score SDE (2011.13456, section 4.3 and appendix D.2) and Flow Matching (2210.02747, appendix C): along the ODE

    dx / dt = v(x, t)        d log p_t(x) / dt = -div v(x, t)

data becomes noise, whose density is known, so that

    log p(x) = log N(x_1; 0, std^2) + integral of div v over t

The divergence is the trace of dv/dx for data of few dimensions, or Hutchinson's unbiased estimate z . (dv/dx) z, the z
being signs that stay the same along the way (FFJORD, 1810.01367).
"""

import math
from collections.abc import Callable

import torch

from hubgen.paths.path import ProbabilityPath

Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def log_likelihood(
    predict: Predict,
    path: ProbabilityPath,
    data: torch.Tensor,
    probes: int | None = 1,
    generator: torch.Generator | None = None,
    interval: tuple[float, float] = (1e-5, 1.0),
    tolerance: float = 1e-5,
) -> torch.Tensor:
    """log p(data) in nats, (B,); bits per dimension are `-log p / (log(2) * dimensions)`, plus what the scaling adds.

    Args:
        predict: `(x_t, t) -> prediction` of the path's `prediction_type`, (B, ...) and (B,) to (B, ...).
        path: That the network was trained on.
        data: (B, ...), floating-point; float64 for the tightest results.
        probes: How many z of Hutchinson's estimate are averaged; `None` for the exact trace, which costs a backward
            pass a dimension.
        generator: Source of the z.
        interval: Times to begin and to end at. Predictions of noise and score say nothing about the velocity at t = 0,
            and EDM's time ends at neither 0 nor 1.
        tolerance: Relative and absolute, of the adaptive solver (dopri5).

    Raises:
        ValueError: An argument is out of its range.
        ImportError: torchdiffeq is missing.
    """
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise ImportError("The likelihood needs torchdiffeq: pip install 'hubgen[likelihood]'.") from error
    begin, end = interval
    if not 0 <= begin < end <= 1:
        raise ValueError(f"`interval`: got {interval}, expected (begin, end) with 0 <= begin < end <= 1")
    if not data.is_floating_point():
        raise ValueError(f"`data`: got {data.dtype}, expected floating-point numbers")
    if probes is not None and probes < 1:
        raise ValueError(f"`probes`: got {probes}, expected at least 1, or None for the exact trace")
    directions = unit_vectors(data) if probes is None else signs(data, probes, generator)

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        t = t.clamp(begin, end)  # the solver looks beyond the end, and interpolates
        times = t.to(torch.float64 if x.dtype == torch.float64 else torch.float32).expand(len(x))
        return path.convert(predict(x, times), x, times, path.prediction_type, "velocity")

    def flow(t: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.enable_grad():
            x = state[0].detach().requires_grad_()
            v = velocity(x, t)
            divergence = torch.zeros(len(x), dtype=x.dtype, device=x.device)
            for z in directions:
                (product,) = torch.autograd.grad(v, x, z, retain_graph=True)
                divergence = divergence + (product * z).flatten(1).sum(1)
        return v.detach(), divergence if probes is None else divergence / len(directions)

    span = torch.tensor([begin, end], dtype=data.dtype, device=data.device)
    zero = torch.zeros(len(data), dtype=data.dtype, device=data.device)
    with torch.no_grad():
        states, integrals = odeint(flow, (data, zero), span, rtol=tolerance, atol=tolerance, method="dopri5")
    at_end = span[1:].double()
    variance = (path.alpha(at_end) ** 2 + path.sigma(at_end) ** 2).item()  # of data of variance 1
    dimensions = data[0].numel()
    squares = states[-1].flatten(1).square().sum(1)
    return integrals[-1] - 0.5 * (squares / variance + dimensions * math.log(2 * math.pi * variance))


def signs(data: torch.Tensor, count: int, generator: torch.Generator | None) -> list[torch.Tensor]:
    """`count` draws of +1 and -1 in the data's shape."""
    source = generator.device if generator is not None else data.device
    drawn = [torch.randint(0, 2, data.shape, generator=generator, device=source) for _ in range(count)]
    return [(2 * z - 1).to(data) for z in drawn]


def unit_vectors(data: torch.Tensor) -> list[torch.Tensor]:
    """For each dimension of an example, the vector along it, for the whole batch."""
    eye = torch.eye(data[0].numel(), dtype=data.dtype, device=data.device)
    return [row.expand(len(data), -1).reshape(data.shape) for row in eye]
