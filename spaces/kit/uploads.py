"""Pictures that strangers send: looked at in their headers, and only then decoded.

No path and no address from a visitor is ever opened: a file is one that was uploaded here, or it is none.
"""

import io
import warnings
from pathlib import Path
from typing import Any

from PIL import Image

from hubgen.data.errors import DataError
from hubgen.data.pictures import decode_picture
from hubgen.spaces.kit.limits import Limits, Refused

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "MPO")
"""Of Pillow, for what people have; SVG, PostScript and their like are programs and no pictures"""
EXPECTED = "a PNG, JPEG or WebP"


def check_upload(content: bytes, limits: Limits) -> None:
    """Raises Refused for what is no picture, or too large; nothing is decoded."""
    if len(content) > limits.upload_bytes:
        raise Refused(f"The picture has {len(content):,} bytes; at most {limits.upload_bytes:,} are taken.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
                width, height = picture.size
    except Image.DecompressionBombError:
        raise Refused(f"The picture has far more pixels than the {limits.upload_pixels:,} that are taken.") from None
    except Exception:  # readers raise almost anything over bytes that are none of theirs
        raise Refused(f"This is not a picture that can be read here; send {EXPECTED}.") from None
    if width * height > limits.upload_pixels:
        raise Refused(f"The picture has {width} × {height} pixels; at most {limits.upload_pixels:,} are taken.")


def read_upload(content: bytes, limits: Limits) -> Image.Image:
    """The picture that was sent, upright, as RGB or RGBA."""
    check_upload(content, limits)
    try:
        return decode_picture(content, "The picture", limits.upload_pixels)
    except DataError:
        raise Refused(f"The picture is damaged, or of a kind that is not read here; send {EXPECTED}.") from None


def uploaded_file(value: Any, folder: Path, limits: Limits) -> Path:
    """The file that a value of a request means, in the folder of the uploads.

    Args:
        value: What was sent, a mapping with a path.
        folder: Where uploads lie.
        limits: Of the page.

    Raises:
        Refused: It is elsewhere, or nowhere, or too large.
    """
    path = value.get("path") if isinstance(value, dict) else None
    if not isinstance(path, str) or not path or "\0" in path or len(path) > 4096:
        raise Refused("A file is missing; send the picture itself.")
    try:
        real = Path(path).resolve(strict=True)
        inside = real.is_relative_to(folder.resolve()) and real.is_file()
        size = real.stat().st_size if inside else 0
    except (OSError, ValueError, RuntimeError):
        inside = False
    if not inside:  # the same words for what exists elsewhere and for what does not
        raise Refused("Only pictures that were uploaded here are opened; no paths and no addresses.")
    if size > limits.upload_bytes:
        raise Refused(f"The picture has {size:,} bytes; at most {limits.upload_bytes:,} are taken.")
    return real
