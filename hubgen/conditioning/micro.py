"""Micro-conditioning: the numbers about a picture that SDXL is given beside its text (2307.01952, section 2.2)."""

import dataclasses
import numbers
from dataclasses import dataclass

import torch

from hubgen.checks import is_number

Pair = tuple[int, int]

# What diffusers' pipelines give the refiner for the picture that is wanted, and for the one to lead away from.
SCORES = {"positive": 6.0, "negative": 2.5}


@dataclass(frozen=True)
class MicroConditioning:
    """Of one picture; sizes are (height, width) in pixels."""

    original_size: Pair
    """before it was cropped and resized for training"""
    crops_coords_top_left: Pair
    target_size: Pair
    aesthetic_score: float | None = None
    """of SDXL's refiner, in the place of the target size"""

    def rows(self, batch: int, device: torch.device | str | None = None) -> torch.Tensor:
        """The same for B pictures, (B, 6) or with a score (B, 5), in the order in which they are embedded."""
        last = self.target_size if self.aesthetic_score is None else (self.aesthetic_score,)
        values = (*self.original_size, *self.crops_coords_top_left, *last)
        return torch.tensor([values], dtype=torch.float32, device=device).repeat(batch, 1)


@dataclass(frozen=True)
class MicroArguments:
    """The arguments of the same names of a pipeline's call; `None` for what was not given."""

    original_size: Pair | None = None
    crops_coords_top_left: Pair | None = None
    target_size: Pair | None = None
    negative_original_size: Pair | None = None
    negative_crops_coords_top_left: Pair | None = None
    negative_target_size: Pair | None = None
    aesthetic_score: float | None = None
    negative_aesthetic_score: float | None = None

    def branches(self, size: Pair, scored: bool) -> dict[str, MicroConditioning]:
        """The numbers of the branches "positive" and "negative", with the defaults of diffusers' pipelines.

        Args:
            size: Height and width in pixels of the picture.
            scored: Whether the backbone is given a score in the place of the target size.
        """
        original, target = self.original_size or size, self.target_size or size
        crop, negative_crop = self.crops_coords_top_left or (0, 0), self.negative_crops_coords_top_left
        if negative_crop is None:
            # The same picture, but not the same crop once anything else differs.
            same = self.negative_original_size is None and self.negative_target_size is None and not scored
            negative_crop = crop if same else (0, 0)
        scores = dict.fromkeys(SCORES) | (self._scores() if scored else {})
        negative = (self.negative_original_size or original, negative_crop, self.negative_target_size or target)
        return {
            "positive": MicroConditioning(original, crop, target, scores["positive"]),
            "negative": MicroConditioning(*negative, scores["negative"]),
        }

    def _scores(self) -> dict[str, float]:
        given = {"positive": self.aesthetic_score, "negative": self.negative_aesthetic_score}
        return {branch: SCORES[branch] if score is None else score for branch, score in given.items()}

    def check(self, takes_micro: bool, scored: bool) -> None:
        """Raises ValueError for what the backbone does not take, and for what is no pair of whole numbers or no number.

        Args:
            takes_micro: Whether the backbone takes any of it.
            scored: See `branches`.
        """
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if value is None:
                continue
            is_score = name.endswith("score")
            if not takes_micro or (is_score and not scored):
                raise ValueError(f"`{name}`: got {value!r}, expected none: this model does not take it.")
            if is_score and (not is_number(value)):
                raise ValueError(f"`{name}`: got {value!r}, expected a number.")
            pair = isinstance(value, tuple | list) and len(value) == 2
            if not is_score and not (pair and all(isinstance(side, numbers.Integral) for side in value)):
                raise ValueError(f"`{name}`: got {value!r}, expected two whole numbers, down and across.")
