"""The numbers of the benchmarks: retrieval, variety, colours, reconstruction. Pure functions of pixels and captions.

Pixels are (N, 3, H, W) in [-1, 1] everywhere.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from hubgen.autoencoders.efficientnet import EfficientNetLite0
from hubgen.data.colours import COLOURS, colour_words

# ---------------------------------------------------------------------------------------------------------------------
# Retrieval: is the picture that was asked for among the nearest pictures?

FEATURE_SIZE = 128
LAYOUT_STAGE, TOP_STAGE = 4, 5
LAYOUT_GRID = 4


@torch.no_grad()
def describe(network: EfficientNetLite0, pixels: torch.Tensor, batch_size: int = 32) -> dict[str, torch.Tensor]:
    """Unit vectors whose inner products are the similarities of pictures, by two definitions.

    "layout": the 112 channels of stage 4 (stride 16), averaged over a 4 x 4 grid, (N, 1792): what is where.
    "pooled": the 1,280 channels before the classifier, averaged over the whole picture: what there is.

    Pictures are scaled to 128 x 128 first. "layout" is what counts: among 1,646 real emoji it found a copy that was
    blurred twice, shifted, zoomed, recoloured and laid over with smooth noise among the first five in 99 % of the
    cases at 64 x 64, "pooled" in 53 %.
    """
    layout, pooled = [], []
    for batch in pixels.split(batch_size):
        batch = F.interpolate(batch.float(), size=(FEATURE_SIZE, FEATURE_SIZE), mode="bicubic", antialias=True)
        middle, top = network.forward_features(batch, stages=(LAYOUT_STAGE, TOP_STAGE))
        layout.append(F.normalize(F.adaptive_avg_pool2d(middle, LAYOUT_GRID).flatten(1), dim=-1))
        pooled.append(F.normalize(network.pool(top), dim=-1))
    return {"layout": torch.cat(layout), "pooled": torch.cat(pooled)}


def found_captions(
    queries: torch.Tensor,
    index: torch.Tensor,
    index_captions: Sequence[Sequence[str]],
    asked: Sequence[str],
    neighbours: int = 5,
) -> torch.Tensor:
    """(Q, A) bool: whether one of the `neighbours` pictures nearest to picture q bears the caption a.

    Args:
        queries: (Q, D) unit vectors of the generated pictures.
        index: (N, D) unit vectors of the real pictures.
        index_captions: The wordings of each real picture's caption.
        asked: The A captions.
    """
    nearest = (queries @ index.T).topk(neighbours, dim=-1).indices.tolist()
    borne = [{caption.lower() for row in rows for caption in index_captions[row]} for rows in nearest]
    return torch.tensor([[caption.lower() in captions for caption in asked] for captions in borne])


def chance_of_caption(index_captions: Sequence[Sequence[str]], asked: Sequence[str], neighbours: int = 5) -> float:
    """How often `neighbours` different pictures drawn at random hold one that bears the caption, on average."""
    total = len(index_captions)
    counts: dict[str, int] = {}
    for captions in index_captions:
        for caption in {caption.lower() for caption in captions}:
            counts[caption] = counts.get(caption, 0) + 1
    misses = (math.comb(total - counts.get(caption.lower(), 0), neighbours) for caption in asked)
    return 1 - sum(misses) / (len(asked) * math.comb(total, neighbours))


@dataclass(frozen=True)
class Rate:
    """How often something held, among `count` cases."""

    hits: float
    count: int

    @property
    def value(self) -> float:
        return self.hits / self.count if self.count else math.nan

    def interval(self, z: float = 1.96) -> tuple[float, float]:
        """Wilson's 95 % confidence interval of the rate."""
        if not self.count:
            return math.nan, math.nan
        centre = (self.value + z**2 / (2 * self.count)) / (1 + z**2 / self.count)
        spread = z * math.sqrt(self.value * (1 - self.value) / self.count + z**2 / (4 * self.count**2))
        spread /= 1 + z**2 / self.count
        return max(0.0, centre - spread), min(1.0, centre + spread)

    def as_dict(self) -> dict[str, Any]:
        return {"rate": self.value, "hits": self.hits, "count": self.count, "interval_95": list(self.interval())}


def asked_and_shuffled(found: torch.Tensor) -> tuple[Rate, float]:
    """The rate at each picture's own caption, and with captions shuffled: the mean over every other picture's caption.

    Args:
        found: (Q, Q) bool; picture q was asked for with caption q.
    """
    own = found.diagonal()
    others = (found.sum() - own.sum()).item() / max(found.numel() - len(own), 1)
    return Rate(own.sum().item(), len(own)), others


# ---------------------------------------------------------------------------------------------------------------------
# Variety: do the pictures of one caption differ?


def variety(groups: Sequence[torch.Tensor], resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """How far apart the pictures of one caption are, as a part of how far apart those of different captions are.

    A distance is 1 minus the inner product; each caption counts the same, whatever its number of pictures.

    Args:
        groups: Unit vectors (S, D) of the pictures of each caption, at least two of them.
        resamples: Drawings of the captions, with replacement, for the interval.
        seed: Of those drawings.

    Returns:
        "within" and "between", mean distances, "ratio", the first by the second, and its "interval_95".
    """
    counts = torch.tensor([len(group) for group in groups])
    if counts.min() < 2:
        raise ValueError(f"groups: got a caption with {counts.min()} pictures, expected at least 2 of each")
    vectors = torch.cat(list(groups)).double()
    group_of = torch.repeat_interleave(torch.arange(len(groups)), counts)
    member = F.one_hot(group_of, len(groups)).double()  # (N, C)
    sums = member.T @ (1 - vectors @ vectors.T) @ member  # (C, C)
    within = sums.diagonal() / (counts * (counts - 1))
    between = sums / (counts[:, None] * counts)
    between.fill_diagonal_(0)

    def means(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both mean distances, where each caption counts as often as `weights` (R, C) says."""
        total = weights.sum(dim=1)
        pairs = total**2 - (weights**2).sum(dim=1)
        return (weights @ within) / total, ((weights @ between) * weights).sum(dim=1) / pairs

    own, others = means(torch.ones(1, len(groups), dtype=torch.float64))
    drawn = torch.randint(len(groups), (resamples, len(groups)), generator=torch.Generator().manual_seed(seed))
    times = torch.stack([torch.bincount(rows, minlength=len(groups)) for rows in drawn])  # (R, C)
    within_drawn, between_drawn = means(times.double())
    # A drawing of one caption alone has no ratio: it is nan, and left out.
    bounds = torch.nanquantile(within_drawn / between_drawn, torch.tensor([0.025, 0.975], dtype=torch.float64))
    return {
        "captions": len(groups),
        "pictures": len(vectors),
        "within": own.item(),
        "between": others.item(),
        "ratio": (own / others).item(),
        "interval_95": bounds.tolist(),
    }


def clearly_apart(features: torch.Tensor, least: float) -> list[int]:
    """Rows of `features` (N, D), unit vectors, that are `least` apart from each other: the first, and so on."""
    distances = 1 - features @ features.T
    kept: list[int] = []
    for row in range(len(features)):
        if all(distances[row, other] >= least for other in kept):
            kept.append(row)
    return kept


def covered(drawn: torch.Tensor, real: torch.Tensor) -> int:
    """How many of the real pictures (K, D) are the nearest one of some drawn picture (S, D)."""
    return len((drawn @ real.T).argmax(dim=1).unique())


def chance_of_two(pictures: int, draws: int) -> float:
    """How often `draws` drawings, with replacement, from so many pictures hold at least two different ones."""
    return 1 - pictures ** (1 - draws)


# ---------------------------------------------------------------------------------------------------------------------
# Colour words: does the colour show in the pixels?


def calibrate_colour_threshold(shares: torch.Tensor, captions: Sequence[str]) -> float:
    """The share of a colour from which on it "shows": where real pictures that name it and that do not differ most.

    Args:
        shares: (N, 10) of real pictures whose captions name a colour.
        captions: Their captions.

    Returns:
        The threshold with the largest difference of hit rate and false-alarm rate (Youden's index).
    """
    named = torch.tensor([[colour in colour_words(caption) for colour in COLOURS] for caption in captions])
    thresholds = torch.arange(1, 100) / 100
    shows = shares[..., None] >= thresholds  # (N, 10, T)
    gain = shows[named].float().mean(dim=0) - shows[~named].float().mean(dim=0)
    return thresholds[gain.argmax()].item()


def colours_shown(shares: torch.Tensor, captions: Sequence[str], threshold: float) -> tuple[Rate, float]:
    """How often a colour that a picture's caption names shows, and the same with the other pictures' colours.

    Args:
        shares: (N, 10) of the pictures.
        captions: The N captions; those without a colour are left out.
        threshold: From `calibrate_colour_threshold`.
    """
    rows = [row for row, caption in enumerate(captions) if colour_words(caption)]
    asked = [(row, COLOURS.index(colour)) for row in rows for colour in colour_words(captions[row])]
    shows = shares >= threshold
    own = Rate(sum(bool(shows[row, colour]) for row, colour in asked), len(asked))
    # Every other picture's colour word, so far as this picture's own caption does not name it too.
    shuffled = [
        bool(shows[row, colour])
        for row in rows
        for other, colour in asked
        if other != row and COLOURS[colour] not in colour_words(captions[row])
    ]
    return own, sum(shuffled) / len(shuffled) if shuffled else math.nan


# ---------------------------------------------------------------------------------------------------------------------
# Reconstruction


def psnr(pixels: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each picture in dB, (N,): -10 log10 of the squared error of values in [0, 1]."""
    error = ((pixels.clamp(-1, 1) - target) / 2).square().mean(dim=(1, 2, 3))
    return -10 * torch.log10(error.clamp(min=1e-10))


@torch.no_grad()
def reconstruct(vae: Any, pixels: torch.Tensor, batch_size: int = 32) -> torch.Tensor:
    """Pictures through the autoencoder (the posterior's mode), clamped to [-1, 1]."""
    parts = []
    for batch in pixels.split(batch_size):
        latents = vae.encode(batch.to(vae.device, vae.dtype)).latent_dist.mode()
        parts.append(vae.decode(latents).sample.float().clamp(-1, 1).cpu())
    return torch.cat(parts)


@torch.no_grad()
def in_batches(
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    first: torch.Tensor,
    second: torch.Tensor,
    batch_size: int = 32,
) -> torch.Tensor:
    """`function` of two batches of pictures, batch by batch."""
    return torch.cat([function(x, y) for x, y in zip(first.split(batch_size), second.split(batch_size), strict=True)])


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """(N, H, W, 3) in [0, 1], as pipelines return them, to (N, 3, H, W) in [-1, 1], rounded to 8 bits as a PNG is."""
    return torch.from_numpy(np.round(images * 255) / 127.5 - 1).permute(0, 3, 1, 2).float()
