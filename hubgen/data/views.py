"""How a picture is shown to a network: scaled until it covers a size, cropped to it, moved, mirrored; never stretched.

A picture has a finite number of views (places of the crop, moves, each mirrored or not), so that what an encoder makes
of them can be kept. Which of them a training step takes is drawn at each use.

Sizes are (height, width) in pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image, ImageOps

from hubgen.checks import whole
from hubgen.conditioning.micro import MicroConditioning
from hubgen.data.errors import DataError
from hubgen.data.lazy import each
from hubgen.data.order import generator_of

Size = tuple[int, int]
TURN, SHIFT, ZOOM = 10.0, 0.06, 0.12
"""Of moved views, at most: degrees; part of the side; part by which it is larger or smaller"""
WHITE: dict[str, int | tuple[int, int, int]] = {"RGB": (255, 255, 255), "L": 255}


@dataclass(frozen=True)
class View:
    """A part of a picture at a size."""

    original: Size
    """Of the picture"""
    box: tuple[float, float, float, float]
    """(left, top, right, bottom) of the part in the picture's pixels, of the same aspect ratio as `size`; what lies
    outside of the picture is white"""
    size: Size
    """That the part is brought to"""
    mirrored: bool = False
    turn: float = 0.0
    """Degrees, counterclockwise, that the picture is turned by around its middle"""

    def of(self, picture: Image.Image) -> Image.Image:
        """The view of a picture, or of a mask of the same size."""
        left, top, right, bottom = self.box
        if self.turn or left < 0 or top < 0 or right > picture.width or bottom > picture.height:
            border = max(picture.size) // 4
            picture = ImageOps.expand(picture, border, fill=WHITE[picture.mode])
            picture = picture.rotate(self.turn, Image.Resampling.BICUBIC, fillcolor=WHITE[picture.mode])
            left, top, right, bottom = (one + border for one in self.box)
        # Pixels outside of the part must not blend into its border.
        outer = (math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom))
        if outer != (0, 0, *picture.size):
            picture = picture.crop(outer)
        inner = (left - outer[0], top - outer[1], right - outer[0], bottom - outer[1])
        size = (self.size[1], self.size[0])
        if picture.size != size or inner != (0, 0, *size):
            picture = picture.resize(size, Image.Resampling.LANCZOS, box=inner)
        return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.mirrored else picture

    def micro(self) -> MicroConditioning:
        """What SDXL is told about it: the picture's size, where the crop begins once the picture is scaled, its size.

        The crop of a mirrored picture begins as far from the left as it ended from the right.
        """
        left, top, right, bottom = self.box
        scale = self.size[0] / (bottom - top)
        first = self.original[1] - right if self.mirrored else left
        corner = (max(round(top * scale), 0), max(round(first * scale), 0))
        return MicroConditioning(self.original, corner, self.size)


def square_view(original: Size, side: int) -> View:
    """The central square of a picture of some size, at `side` x `side`, enlarged where it is smaller."""
    return Views([original], [""], [(side, side)], upscale=True).view(0, 0)


def pixels_of(picture: Image.Image) -> torch.Tensor:
    """(3, H, W) float32 in [-1, 1] of an RGB picture."""
    values = torch.from_numpy(np.array(picture))  # (H, W, 3) uint8
    return values.permute(2, 0, 1).float().div_(127.5).sub_(1.0).contiguous()


def bucket_sizes(side: int, step: int, smallest: int, largest: int) -> list[Size]:
    """Sizes of about the same area and different aspect ratios, as kohya's sd-scripts choose them.

    Args:
        side: Of the square whose area none exceeds.
        step: Height and width are multiples of it.
        smallest: Height and width at least.
        largest: Height and width at most.

    Raises:
        ValueError: There are none.
    """
    area, sizes = side * side, set()
    for width in range(-(-smallest // step) * step, largest + 1, step):
        height = min(largest, area // width) // step * step
        if height >= smallest:
            sizes |= {(height, width), (width, height)}
    square = side // step * step
    if smallest <= square <= largest:
        sizes.add((square, square))
    if not sizes:
        raise ValueError(
            f"`side`: got {side}, expected one that multiples of {step} from {smallest} to {largest} fit in."
        )
    return sorted(sizes)


def bucket_of(size: Size, buckets: Sequence[Size]) -> Size:
    """The bucket whose aspect ratio is nearest to that of a picture."""
    return min(buckets, key=lambda bucket: (abs(bucket[1] / bucket[0] - size[1] / size[0]), -bucket[0]))


class Views:
    """The views of all pictures of a data set.

    Args:
        sizes: Of each picture.
        digests: Of each picture's bytes, in hexadecimal: what its crops derive from, beside the seed.
        buckets: Sizes that pictures are brought to, each to the one of the nearest aspect ratio.
        crops: Places of the crop, drawn for each picture; 0 is one crop, in the middle.
        mirror: Whether half of the uses are mirrored.
        moves: Views beside the plain one that are turned, shifted and of another scale, by as much as `TURN`, `SHIFT`
            and `ZOOM` say; what comes in at the border is white.
        upscale: Whether pictures smaller than their size are enlarged.
        seed: Of the crops.
        names: Of the pictures, for the message.

    Raises:
        DataError: A picture is smaller than its size, and `upscale` is False; of lazy sizes, once it is asked for.
    """

    def __init__(
        self,
        sizes: Sequence[Size],
        digests: Sequence[str],
        buckets: Sequence[Size],
        *,
        crops: int = 0,
        mirror: bool = False,
        moves: int = 0,
        upscale: bool = False,
        seed: int = 0,
        names: Sequence[str] | None = None,
    ) -> None:
        self.sizes, self.digests, self.seed = sizes, digests, seed
        self.crops, self.mirror, self.moves = whole("crops", crops, 0), mirror, whole("moves", moves, 0)
        self.upscale, self._names = upscale, names
        self.known = buckets
        """Sizes that pictures are brought to"""
        self.buckets = each(sizes, self._bucket)
        """Of each picture, the size that it is brought to"""

    def _bucket(self, row: int, size: Size) -> Size:
        bucket = bucket_of(size, self.known)
        if not self.upscale and (size[0] < bucket[0] or size[1] < bucket[1]):
            name = f"row {row}" if self._names is None else self._names[row]
            raise DataError(
                f"{name}: got {size[1]}x{size[0]} pixels, expected at least {bucket[1]}x{bucket[0]}, the size that "
                "it is brought to (upscale enlarges smaller ones)"
            )
        return bucket

    @property
    def count(self) -> int:
        """Views of each picture."""
        return max(self.crops, 1) * (self.moves + 1) * (2 if self.mirror else 1)

    def drawn(self, seed: int, place: int) -> int:
        """The number of the view that is shown at a place of the endless row."""
        return int(torch.randint(self.count, (), generator=generator_of(seed, place, "view")))

    def view(self, row: int, number: int) -> View:
        """A view of the picture in a row; `number` is below `count`."""
        number, crop = divmod(number, max(self.crops, 1))
        mirrored, move = divmod(number, self.moves + 1)
        height, width = self.sizes[row]
        size = self.buckets[row]
        scale = max(size[0] / height, size[1] / width)
        part = (min(size[0] / scale, height), min(size[1] / scale, width))
        down, right = 0.5, 0.5
        if self.crops:
            # Of the picture's bytes, so that neither the order of rows nor other pictures move a crop.
            generator = generator_of(self.seed, int(self.digests[row][:12], 16), f"crop {crop}")
            down, right = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        # Whole pixels: a crop that is not scaled is not blurred either.
        top, left = int(down * (height - part[0])), int(right * (width - part[1]))
        plain = View((height, width), (left, top, left + part[1], top + part[0]), size, bool(mirrored))
        return self._moved(plain, row, move) if move else plain

    def _moved(self, view: View, row: int, number: int) -> View:
        """A view that is turned, shifted and of another scale."""
        generator = generator_of(self.seed, int(self.digests[row][:12], 16), f"move {number}")
        turn, zoom, down, right = (2 * torch.rand(4, generator=generator, dtype=torch.float64) - 1).tolist()
        left, top, end, bottom = view.box
        width, height = end - left, bottom - top
        middle = ((left + end) / 2 + right * SHIFT * width, (top + bottom) / 2 + down * SHIFT * height)
        half = (width / 2 / (1 + zoom * ZOOM), height / 2 / (1 + zoom * ZOOM))
        box = (middle[0] - half[0], middle[1] - half[1], middle[0] + half[0], middle[1] + half[1])
        return replace(view, box=box, turn=turn * TURN)

    def key(self, row: int, number: int) -> str:
        """What names the pixels of a view: the picture's bytes, part, size."""
        view = self.view(row, number)
        box = ",".join(f"{value:.4f}" for value in view.box)
        turned = f" turned {view.turn:.4f}" if view.turn else ""
        return f"{self.digests[row]} {box} {view.size[0]}x{view.size[1]}{' mirrored' if view.mirrored else ''}{turned}"
