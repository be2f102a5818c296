"""Pictures of files and of other programs, brought to one kind: upright, sRGB, 8 bits a channel, RGB or RGBA.

Everything that takes a picture reads it here: the command line, the pipelines, data folders and the trainers.

    picture = read_picture("photo.jpg")     # or decode_picture(content, name), or standard(an open PIL image, name)
    on_white(picture)                       # RGB
    as_mask(picture)                        # "L"

No torch in here, so that the builders of data folders start quickly.
"""

import io
import os
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from hubgen.data.errors import DataError

MAX_PIXELS = 100_000_000
"""Pixels of a picture that are decoded by default; a file of 20 kB can claim hundreds of millions."""

FOREIGN_PROGRAMS = ("EPS",)
"""Formats that Pillow hands to another program, and that a file of any name may have."""


def read_picture(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS, name: str | None = None) -> Image.Image:
    """The picture in a file, as `decode_picture` gives it.

    Args:
        path: The file.
        max_pixels: See `decode_picture`.
        name: What messages call it; by default the path.

    Raises:
        DataError: The file cannot be read, or holds no picture that can.
    """
    name = os.fspath(path) if name is None else name
    try:
        content = Path(path).read_bytes()
    except OSError as problem:
        raise DataError(f"{name}: {problem.strerror or problem}, expected a picture") from problem
    return decode_picture(content, name, max_pixels)


def decode_picture(content: bytes, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture in a file's bytes, of an animation the first one, as `standard` gives it.

    Args:
        content: The bytes, which nobody vouches for.
        name: What messages call them.
        max_pixels: The most that are decoded; the size is checked before. Beyond 178 million, Pillow's own limit
            (`PIL.Image.MAX_IMAGE_PIXELS`) holds too.

    Raises:
        DataError: The bytes are no picture, a damaged one, one of more than `max_pixels`, or of a kind that `standard`
            refuses. Opens with `name`, and is one line.
    """
    if not content:
        raise DataError(f"{name}: got an empty file, expected a picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures and odd metadata: the limit below is the stricter rule
            picture = Image.open(io.BytesIO(content))
            if picture.format in FOREIGN_PROGRAMS:
                raise DataError(f"{name}: got {picture.format}, a program for printers, expected a picture")
            width, height = picture.size
            if width * height > max_pixels:
                raise DataError(
                    f"{name}: got {width}x{height} pixels, expected at most {max_pixels} in all (`max_pixels`)"
                )
            return standard(picture, name)
    except DataError:
        raise
    except UnidentifiedImageError as problem:
        found = f"{len(content)} bytes that begin with {content[:12]!r}"
        raise DataError(f"{name}: got {found}, expected a picture (PNG, JPEG, WebP, …)") from problem
    except Image.DecompressionBombError as problem:
        raise DataError(f"{name}: got far more pixels than `max_pixels`, {max_pixels}") from problem
    except Exception as problem:
        raise _damaged(name, problem) from problem


def standard(picture: Image.Image, name: str) -> Image.Image:
    """A picture of any mode as RGB, or as RGBA where parts of it are transparent; a new one, without metadata.

    It is turned as its EXIF orientation says, 16 bits a channel become 8, and colours of another space than sRGB are
    converted by the colour profile that the picture brings along. A profile that does not fit the picture is left out
    of account, as viewers do.

    Args:
        picture: Open, its pixels decoded or not.
        name: What messages call it.

    Raises:
        DataError: Floating-point or 32-bit pixels, whose range nothing tells; or the bytes of a picture that is not
            decoded yet are damaged. Opens with `name`, and is one line.
    """
    try:
        return _standard(picture, name)
    except DataError:
        raise
    except Exception as problem:  # codecs raise almost anything over damaged bytes
        raise _damaged(name, problem) from problem


def _damaged(name: str, problem: Exception) -> DataError:
    reason = " ".join(str(problem).split()) or type(problem).__name__
    return DataError(f"{name}: truncated or damaged picture ({reason}), expected a whole one")


def _standard(picture: Image.Image, name: str) -> Image.Image:
    has_16_bits = any("16" in str(tile[3]) for tile in getattr(picture, "tile", ()))  # before the pixels are decoded
    picture.load()
    picture = ImageOps.exif_transpose(picture)
    profile, transparent = picture.info.get("icc_profile"), picture.info.get("transparency")
    alpha = None
    if picture.mode == "F":
        raise DataError(f"{name}: got floating-point pixels, expected 8 or 16 bits for each channel")
    if picture.mode == "I" or picture.mode.startswith("I;"):
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise DataError(
                f"{name}: got pixels from {values.min()} to {values.max()}, expected 8 or 16 bits for each channel"
            )
        picture = Image.fromarray((values // 257).astype(np.uint8))
        if isinstance(transparent, int):
            alpha = Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))
    elif transparent is not None or picture.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        if has_16_bits and isinstance(transparent, tuple):
            picture.info["transparency"] = tuple(value >> 8 for value in transparent)
        whole = picture.convert("RGBA")
        alpha = whole.getchannel("A")
        picture = whole.convert("L" if picture.mode in ("L", "LA", "La") else "RGB")
    rgb = _in_srgb(picture, profile)
    if alpha is not None:
        rgb.putalpha(alpha)
    rgb.info.clear()
    return rgb


def _in_srgb(picture: Image.Image, profile: Any) -> Image.Image:
    """RGB of a picture without alpha; `profile` is the content of an ICC file, or None."""
    if picture.mode == "LAB":
        return ImageCms.profileToProfile(picture, ImageCms.createProfile("LAB"), _srgb(), outputMode="RGB")
    if picture.mode not in ("L", "RGB", "CMYK"):
        picture = picture.convert("L" if picture.mode == "1" else "RGB")
    transform = _to_srgb(bytes(profile), picture.mode) if isinstance(profile, bytes) and profile else None
    if transform is not None:
        return ImageCms.applyTransform(picture, transform)
    return picture.convert("RGB")


@lru_cache(maxsize=1)
def _srgb() -> Any:
    return ImageCms.createProfile("sRGB")


@lru_cache(maxsize=16)
def _to_srgb(profile: bytes, mode: str) -> Any:
    """The way from a colour profile to sRGB; None where it is sRGB to the last bit but one, or no profile of `mode`."""
    try:
        transform = ImageCms.buildTransform(ImageCms.ImageCmsProfile(io.BytesIO(profile)), _srgb(), mode, "RGB")
    except (ImageCms.PyCMSError, OSError):
        return None
    ramp = np.linspace(0, 255, 16).round().astype(np.uint8)
    colours = np.stack(np.meshgrid(*[ramp] * 3, indexing="ij"), -1).reshape(64, 64, 3)
    if mode == "CMYK":
        return transform
    probe = Image.fromarray(colours).convert(mode)
    change = np.asarray(ImageCms.applyTransform(probe, transform)).astype(int) - np.asarray(probe.convert("RGB"))
    return None if np.abs(change).max() <= 1 else transform


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


def as_mask(picture: Image.Image) -> Image.Image:
    """The mask that a standard picture draws, "L": of one with transparent parts its opacity, else its brightness."""
    if picture.mode == "RGBA":
        alpha = picture.getchannel("A")
        least, most = alpha.getextrema()
        if least != most or most == 0:
            return alpha
    return picture.convert("RGB").convert("L")


def pad_to_square(picture: Image.Image) -> Image.Image:
    """An RGB picture centred on a white square: nothing is cut off."""
    side = max(picture.size)
    if picture.size == (side, side):
        return picture
    square = Image.new("RGB", (side, side), (255, 255, 255))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def scale(picture: Image.Image, size: int) -> Image.Image:
    """A square picture at `size`×`size`; one that has this size already is left as it is."""
    return picture if picture.size == (size, size) else picture.resize((size, size), Image.Resampling.LANCZOS)
