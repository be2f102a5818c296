"""Pictures from bytes that nobody vouches for: decoded under a pixel budget, made RGB on white, and scaled.

No torch in here, so that the builders of data folders start quickly.
"""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from hubgen.data.errors import DataError

MAX_PIXELS = 50_000_000
"""Pixels of a picture that are decoded by default; a file of 20 kB can claim hundreds of millions."""

SHORTEST_SIDE = 8
"""Pixels that a picture has at least."""


def decode_picture(content: bytes, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The whole picture, upright, RGB or RGBA.

    Raises `DataError`, which opens with `name`, where the bytes are no picture or a truncated, animated, tiny one or
    one of more than `max_pixels`; the size is checked before any pixel is decoded.
    """
    if not content:
        raise DataError(f"{name}: got an empty file, expected a picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the budget below is the stricter rule
            picture = Image.open(io.BytesIO(content))
        width, height = picture.size
        if width * height > max_pixels:
            raise DataError(f"{name}: got {width}x{height} pixels, expected at most {max_pixels} in all")
        if min(width, height) < SHORTEST_SIDE:
            raise DataError(f"{name}: got {width}x{height} pixels, expected at least {SHORTEST_SIDE} on each side")
        frames = getattr(picture, "n_frames", 1)
        if frames > 1 and picture.format != "MPO":  # a camera's JPEG with previews behind the picture
            raise DataError(f"{name}: got an animation of {frames} frames, expected a still picture")
        picture.load()
        picture = ImageOps.exif_transpose(picture)
        if picture.mode == "F":
            raise DataError(f"{name}: got floating-point pixels, expected 8 or 16 bits for each channel")
        if picture.mode == "I" or picture.mode.startswith("I;16"):  # one channel of 16 bits; Pillow would clip it
            picture = Image.fromarray((np.asarray(picture).clip(0, 65535) // 257).astype(np.uint8))
        transparent = "A" in picture.getbands() or "a" in picture.getbands() or "transparency" in picture.info
        return picture.convert("RGBA" if transparent else "RGB")
    except DataError:
        raise
    except UnidentifiedImageError as problem:
        raise DataError(f"{name}: got {_first_bytes(content)}, expected a picture (PNG, JPEG, WebP, …)") from problem
    except Image.DecompressionBombError as problem:
        raise DataError(f"{name}: got far more pixels than {max_pixels}, the most that are decoded") from problem
    except (OSError, SyntaxError, ValueError, EOFError) as problem:
        raise DataError(f"{name}: truncated or damaged picture ({problem}), expected a whole one") from problem


def _first_bytes(content: bytes) -> str:
    return f"{len(content)} bytes that begin with {content[:12]!r}"


def on_white(picture: Image.Image) -> Image.Image:
    """RGB; transparency becomes white.

    Done before any scaling: to scale straight RGBA blends the invisible, mostly black, colour of transparent pixels
    into the outline.
    """
    if picture.mode != "RGBA":
        return picture.convert("RGB")
    canvas = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    canvas.alpha_composite(picture)
    return canvas.convert("RGB")


def pad_to_square(picture: Image.Image) -> Image.Image:
    """An RGB picture centred on a white square: nothing is cut off."""
    side = max(picture.size)
    if picture.size == (side, side):
        return picture
    square = Image.new("RGB", (side, side), (255, 255, 255))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def crop_to_square(picture: Image.Image) -> Image.Image:
    """The central square of a picture: nothing is added."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture if picture.size == (side, side) else picture.crop((left, top, left + side, top + side))


def scale(picture: Image.Image, size: int) -> Image.Image:
    """A square picture at `size`×`size`; one that has this size already is left as it is."""
    return picture if picture.size == (size, size) else picture.resize((size, size), Image.Resampling.LANCZOS)
