"""Where a model looks for a word: attention maps of image tokens to text tokens, gathered during a call (2210.04885).

    maps = AttentionMaps()
    picture = pipe("a red cat", controls=[maps]).images[0]
    places = pipe.condition.word_places("a red cat")
    overlay(picture, maps.heat(places["cat"])[0]).save("cat.png")

The maps are those of the positive prompt, averaged over heads, layers and steps. They change nothing in the picture but
by rounding, since attention is computed by its maps.

Shapes: B pictures, L image tokens, S text tokens, H heads, a grid of h x w.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch.nn import functional as F

from hubgen.conditioning.guidance import POSITIVE
from hubgen.conditioning.predict import BackboneCall
from hubgen.controls.control import Control, Prepared, Start, Target
from hubgen.controls.image_attention import attention
from hubgen.layers.attention import AttentionCall, Part

HOT = torch.tensor([[0.05, 0.03, 0.20], [0.45, 0.05, 0.45], [0.90, 0.30, 0.25], [1.00, 0.75, 0.20], [1.0, 1.0, 0.85]])
"""Colours of a map from nothing to the most, RGB in [0, 1]"""


class AttentionMaps(Control):
    """Gathers the maps of a call; `heat` tells those of the last one."""

    def __init__(self) -> None:
        self.last: Gathered | None = None

    def check(self, target: Target) -> None:
        """Raises ValueError where the backbone reads no text tokens."""
        if "tokens" not in target.family.takes:
            raise ValueError("`controls`: got AttentionMaps, expected a model that reads words; this one reads none.")

    def prepare(self, target: Target, start: Start) -> Prepared:
        self.last = Gathered(target)
        return self.last

    def heat(self, tokens: Sequence[int]) -> torch.Tensor:
        """How much each place of the pictures looks at some tokens, (B, h, w), from 0 to 1 in every picture.

        Args:
            tokens: Their places among the text tokens (`PromptCondition.word_places`).

        Raises:
            ValueError: No call has been made, or there are no such tokens.
        """
        if self.last is None or not self.last.sums:
            raise ValueError(
                "`controls`: these AttentionMaps have seen no step yet; call the pipeline with them first."
            )
        return self.last.heat(tokens)


class Gathered(Prepared):
    """The sums of one call."""

    def __init__(self, target: Target):
        self.batch, self.grid = target.batch, token_grid(target)
        self.backbone, self.branches = target.backbone, tuple[str, ...]()
        self.sums: dict[tuple[int, int], torch.Tensor] = {}
        """By the grid of a layer: (B, L, S), summed over calls of layers"""
        self.calls: dict[tuple[int, int], int] = {}

    def before_call(self, call: BackboneCall) -> None:
        self.branches = call.branches

    def parts(self) -> Mapping[str, Any]:
        return dict.fromkeys(takers_of_parts(self.backbone), Watch(self))

    def add(self, call: AttentionCall, probabilities: torch.Tensor) -> None:
        """Adds the maps of one layer, (B of all branches, H, queries, keys)."""
        to_text = maps_to_text(call, probabilities, self.grid)
        if to_text is None:
            return
        first = self.branches.index(POSITIVE) * self.batch
        mean = to_text[first : first + self.batch].mean(dim=1)  # (B, L, S)
        grid = layer_grid(self.grid, mean.shape[1])
        self.sums[grid] = self.sums[grid] + mean if grid in self.sums else mean
        self.calls[grid] = self.calls.get(grid, 0) + 1

    def heat(self, tokens: Sequence[int]) -> torch.Tensor:
        """See `AttentionMaps.heat`."""
        known = next(iter(self.sums.values())).shape[-1]
        if not tokens or not all(0 <= place < known for place in tokens):
            raise ValueError(f"`tokens`: got {list(tokens)}, expected places from 0 to {known - 1}, at least one.")
        total = torch.zeros(self.batch, *self.grid)
        for grid, summed in self.sums.items():
            one = summed[..., list(tokens)].sum(-1).unflatten(1, grid).float().cpu()  # (B, rows, columns)
            total += F.interpolate(one[:, None], self.grid, mode="bilinear", align_corners=False)[:, 0]
        total /= sum(self.calls.values())
        low, high = total.amin((1, 2), keepdim=True), total.amax((1, 2), keepdim=True)
        return (total - low) / (high - low).clamp(min=1e-12)


class Watch(Part):
    """Hands a layer's maps on, and leaves them as they are."""

    wants_maps = True

    def __init__(self, gathered: Gathered):
        self.gathered = gathered

    def maps(self, call: AttentionCall, probabilities: torch.Tensor) -> torch.Tensor:
        self.gathered.add(call, probabilities)
        return probabilities


# What all controls share that look at attention maps.


def takers_of_parts(backbone: Any, serves: Callable[[Any], bool] = lambda layer: True) -> list[str]:
    """Names of processors that take parts, each processor once, though several layers may share it.

    Args:
        backbone: Of any family.
        serves: Chooses layers; a processor counts if one of its layers is chosen.
    """
    found: dict[int, str] = {}
    for name, processor in backbone.attn_processors.items():
        if hasattr(processor, "parts") and serves(attention(backbone, name)):
            found[id(processor)] = name
    return list(found.values())


def token_grid(target: Target) -> tuple[int, int]:
    """The rows and columns of the pictures' tokens, where there is text; a U-Net also has layers of coarser ones."""
    patch = target.family.patch
    return target.shape[2] // patch, target.shape[3] // patch


def layer_grid(grid: tuple[int, int], tokens: int) -> tuple[int, int]:
    """The rows and columns of a layer's tokens: the picture's grid, or in a U-Net a coarser one."""
    height, width = grid
    while height * width > tokens:
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    if height * width != tokens:
        raise ValueError(f"`controls`: met a layer of {tokens} image tokens, expected a grid of {grid} or its halves.")
    return height, width


def maps_to_text(call: AttentionCall, probabilities: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor | None:
    """Where a picture's tokens look in its text; `None` in layers in which they look at each other alone.

    Args:
        call: Of a layer.
        probabilities: Its maps, (B, H, queries, keys).
        grid: The picture's rows and columns of tokens; tokens of other pictures, which may follow, are left out.

    Returns:
        (B, H, L, S).
    """
    if call.text.stop > call.text.start:
        first = call.image.start
        return probabilities[:, :, first : first + grid[0] * grid[1], call.text]
    return probabilities if call.attn.is_cross_attention else None


def overlay(picture: Image.Image, heat: torch.Tensor, strength: float = 0.6) -> Image.Image:
    """A picture under the colours of a map.

    Args:
        picture: Of any size.
        heat: (h, w), from 0 to 1.
        strength: How much of the colours is seen, from 0 to 1.
    """
    width, height = picture.size
    smooth = F.interpolate(heat[None, None].float(), (height, width), mode="bicubic", antialias=False)[0, 0].clamp(0, 1)
    place = smooth * (len(HOT) - 1)
    below = place.floor().long().clamp(max=len(HOT) - 2)
    colours = torch.lerp(HOT[below], HOT[below + 1], (place - below)[..., None])  # (H, W, 3)
    seen = Image.fromarray((colours * 255).round().to(torch.uint8).numpy())
    return Image.blend(picture.convert("RGB"), seen, strength)
