"""What a call tells SDXL about the picture beside its text: sizes, crop and, for the refiner, an aesthetic score."""

import dataclasses
import numbers
from dataclasses import dataclass
from typing import Any

from hubgen.conditioning.inputs import PictureNumbers, takes_sizes

Pair = tuple[int, int]

# What diffusers' pipelines tell the refiner, of the picture that is wanted and of the one to lead away from.
SCORES = (6.0, 2.5)


@dataclass(frozen=True)
class PictureInputs:
    """See the arguments of the same names of `TextToImagePipeline.__call__`."""

    original_size: Pair | None = None
    crops_coords_top_left: Pair | None = None
    target_size: Pair | None = None
    negative_original_size: Pair | None = None
    negative_crops_coords_top_left: Pair | None = None
    negative_target_size: Pair | None = None
    aesthetic_score: float | None = None
    negative_aesthetic_score: float | None = None

    def numbers(self, backbone: Any, size: Pair, scored: bool) -> tuple[PictureNumbers, PictureNumbers] | None:
        """What the conditional and the unconditional half are told; `None` for a backbone that is told nothing.

        Args:
            backbone: Of any family.
            size: Height and width in pixels of the picture.
            scored: Whether the backbone is told a score in the place of the target size.

        Raises:
            ValueError: Something was given that the backbone is not told, or that is no pair of whole numbers.
        """
        self._check(takes_sizes(backbone), scored)
        if not takes_sizes(backbone):
            return None
        original, target = self.original_size or size, self.target_size or size
        crop, negative_crop = self.crops_coords_top_left or (0, 0), self.negative_crops_coords_top_left
        if negative_crop is None:
            # diffusers' defaults: the same picture, but not the same crop once anything else differs
            same = self.negative_original_size is None and self.negative_target_size is None and not scored
            negative_crop = crop if same else (0, 0)
        return (
            PictureNumbers(original, crop, target, self._score(self.aesthetic_score, SCORES[0], scored)),
            PictureNumbers(
                self.negative_original_size or original,
                negative_crop,
                self.negative_target_size or target,
                self._score(self.negative_aesthetic_score, SCORES[1], scored),
            ),
        )

    @staticmethod
    def _score(score: float | None, default: float, scored: bool) -> float | None:
        return (default if score is None else score) if scored else None

    def _check(self, told: bool, scored: bool) -> None:
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if value is None:
                continue
            is_score = name.endswith("score")
            if not told or (is_score and not scored):
                raise ValueError(f"`{name}`: got {value!r}, expected none: this model is not told.")
            if is_score and (not isinstance(value, numbers.Real) or isinstance(value, bool)):
                raise ValueError(f"`{name}`: got {value!r}, expected a number.")
            pair = isinstance(value, tuple | list) and len(value) == 2
            if not is_score and not (pair and all(isinstance(side, numbers.Integral) for side in value)):
                raise ValueError(f"`{name}`: got {value!r}, expected two whole numbers, down and across.")
