"""The variational bound of a path of betas: what a network learns its variance by (2102.09672; DiT, 2212.09748).

Shapes: data, x_t and predictions are (B, ...); t is (B,).
"""

import math

import torch

from hubgen.paths.path import PathSample, VariancePreservingPath

HALF_BIN = 1 / 255
"""Half of the distance of two neighbouring values of 8 bits in [-1, 1]"""


def variational_bound(
    path: VariancePreservingPath, sample: PathSample, noise: torch.Tensor, variance: torch.Tensor
) -> torch.Tensor:
    """The term of the bound that belongs to each example's step, for each of its values, (B, ...), in bits.

    The Kullback-Leibler divergence of the network's step from x_t to x_(t-1) from the true one given the data; at the
    first step the negative log-likelihood of the data, as if it were of 8 bits in [-1, 1].

    Args:
        path: Whose `timestep` numbers the steps.
        sample: On its grid.
        noise: The network's prediction of the noise, (B, ...), which gives the mean.
        variance: Its share v in about [-1, 1] of the logarithm of the variance, between that of the true step (-1) and
            beta (1): 2102.09672, eq. 15.
    """
    index = path.timestep(sample.t).cpu()
    bars = torch.cat([torch.ones(1, dtype=torch.float64), path.alpha_bars])  # (N + 1,)
    now, before = bars[index + 1], bars[index]
    beta = 1 - now / before
    # The true variance of the first step is 0: that of the second stands in for its logarithm.
    safe = torch.where(index == 0, torch.ones_like(index), index)
    true = (1 - bars[safe]) * (1 - bars[safe + 1] / bars[safe]) / (1 - bars[safe + 1])
    factors = {
        "data": before.sqrt() * beta / (1 - now),
        "x_t": (now / before).sqrt() * (1 - before) / (1 - now),
        "beta": beta.log(),
        "true": true.log(),
        "alpha": now.sqrt(),
        "sigma": (1 - now).sqrt(),
    }
    shape = (-1,) + (1,) * (sample.x_t.ndim - 1)
    f = {name: value.to(sample.x_t.device, torch.float32).view(shape) for name, value in factors.items()}
    x_t, data = sample.x_t.float(), sample.data.float()
    predicted = (x_t - f["sigma"] * noise) / f["alpha"]
    mean, true_mean = (f["data"] * x + f["x_t"] * x_t for x in (predicted, data))
    share = (variance + 1) / 2
    log_variance = share * f["beta"] + (1 - share) * f["true"]
    distance = (true_mean - mean).square() * torch.exp(-log_variance)
    divergence = 0.5 * (-1 + log_variance - f["true"] + torch.exp(f["true"] - log_variance) + distance)
    first = (index == 0).to(x_t.device).view(shape)
    return torch.where(first, -_log_likelihood(data, mean, 0.5 * log_variance), divergence) / math.log(2)


def _log_likelihood(data: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    """Of values of 8 bits under a normal density; what lies beyond -1 and 1 counts to these (2006.11239, eq. 13)."""
    centred, inverse = data - mean, torch.exp(-log_std)
    above, below = (torch.special.ndtr(inverse * (centred + edge)) for edge in (HALF_BIN, -HALF_BIN))
    share = torch.where(data < -0.999, above, torch.where(data > 0.999, 1 - below, above - below))
    return share.clamp(min=1e-12).log()
