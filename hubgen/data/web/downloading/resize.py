"""Pictures as a shard holds them: decoded, brought to a size in one of img2dataset's ways, and encoded."""

import io
import json
import warnings
from dataclasses import dataclass
from typing import Any

from PIL import ExifTags, Image

from hubgen.checks import whole
from hubgen.data.errors import DataError
from hubgen.data.pictures import decode_picture, on_white
from hubgen.data.web.shards import NOT_RESIZED, SUCCESS, Outcome

MODES = ("no", "border", "keep_ratio", "center_crop", "keep_ratio_largest")
ENCODINGS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
QUALITY = {"jpg": (95, 100), "png": (6, 9), "webp": (95, 100)}
"""The usual one, and the most"""
LONGEST = {"jpg": 65_500, "png": 2**31 - 1, "webp": 16_383}
"""Pixels of a side that a format can hold"""
FORMATS = ("jpeg", "png", "webp", "gif", "bmp", "tiff", "avif")
"""What is read unless something else is asked for"""
MAX_PIXELS = 89_478_484
"""LAION's limit, at which Pillow warns of a bomb; such a picture takes about a gigabyte while it is decoded"""
ORIENTATION = 274
UNREADABLE, TOO_LARGE = "Image decoding error", "image area too large"


@dataclass(frozen=True)
class Resizing:
    """How pictures are brought to a size.

    Sides are those that img2dataset gives. Pictures become smaller by averages of areas and larger by Lanczos' filter.
    """

    size: int = 256
    """Of a side, in pixels"""
    mode: str = "keep_ratio"
    """no: as it is; border: the longer side is `size`, on a white square; keep_ratio: the shorter side is `size`;
    center_crop: that, cut to a square; keep_ratio_largest: the longer side is `size`"""
    only_if_bigger: bool = False
    """Smaller pictures stay as they are"""
    encoding: str = "jpg"
    """jpg, png or webp"""
    quality: int | None = None
    """0 to 100 (95); of png the compression, 0 to 9 (6)"""
    skip_reencode: bool = False
    """Pictures that need no change keep their bytes"""
    formats: tuple[str, ...] = FORMATS
    """What is read, by Pillow's names in lower case"""
    min_bytes: int = 0
    min_side: int = 0
    max_pixels: int = MAX_PIXELS
    max_aspect_ratio: float | None = None

    def __post_init__(self) -> None:
        whole("size", self.size)
        for name, known in (("mode", MODES), ("encoding", tuple(ENCODINGS))):
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}`: got {getattr(self, name)!r}, expected one of {', '.join(known)}.")
        if self.quality is not None:
            whole("quality", self.quality, 0, QUALITY[self.encoding][1])

    def __call__(self, content: bytes) -> Outcome:
        """What becomes of a file: a picture, or why there is none.

        The size that a file claims, and that which it would get, are checked before its pixels are decoded. It is
        turned upright first, so widths and heights are those that a viewer shows.
        """
        if len(content) < self.min_bytes:
            return Outcome(NOT_RESIZED, "file too small")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                header = Image.open(io.BytesIO(content), formats=[name.upper() for name in self.formats])
            problem = self._out_of_bounds(*header.size)
            if problem is not None:
                return Outcome(NOT_RESIZED, problem)
            exif, is_turned = _exif(header), _orientation(header) != 1
            decoded = decode_picture(content, "picture", self.max_pixels)
        except Image.DecompressionBombError:
            return Outcome(NOT_RESIZED, TOO_LARGE)
        except (DataError, OSError):  # `Image.open` raises OSErrors over bytes that are no picture
            return Outcome(NOT_RESIZED, UNREADABLE)
        picture = self.resized(decoded if decoded.mode == "RGB" else on_white(decoded))  # `on_white` copies
        is_same = picture.size == decoded.size and decoded.mode == "RGB" and header.mode == "RGB" and not is_turned
        if self.skip_reencode and is_same and header.format == ENCODINGS[self.encoding]:
            encoded = content
        else:
            encoded = self.encoded(picture)
        sizes = {"original_width": decoded.width, "original_height": decoded.height}
        return Outcome(SUCCESS, None, encoded, *picture.size, **sizes, exif=exif)

    def _out_of_bounds(self, width: int, height: int) -> str | None:
        if min(width, height) < max(self.min_side, 1):
            return "image too small"
        new = (width, height) if self._stays((width, height)) else self._scaled((width, height))
        if max(width * height, new[0] * new[1]) > self.max_pixels or max(new) > LONGEST[self.encoding]:
            return TOO_LARGE
        if self.max_aspect_ratio is not None and max(width, height) / min(width, height) > self.max_aspect_ratio:
            return "aspect ratio too large"
        return None

    def _side(self, size: tuple[int, int]) -> int:
        """The side that becomes `self.size`."""
        return min(size) if self.mode in ("keep_ratio", "center_crop") else max(size)

    def _stays(self, size: tuple[int, int]) -> bool:
        return self.mode == "no" or (self.only_if_bigger and self._side(size) <= self.size)

    def _scaled(self, size: tuple[int, int]) -> tuple[int, int]:
        scale = self.size / self._side(size)
        return max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)

    def resized(self, picture: Image.Image) -> Image.Image:
        """An RGB picture in its new size."""
        if self._stays(picture.size):
            return picture
        width, height = self._scaled(picture.size)
        if (width, height) != picture.size:
            is_smaller = self._side(picture.size) > self.size
            picture = picture.resize((width, height), Image.Resampling.BOX if is_smaller else Image.Resampling.LANCZOS)
        if self.mode == "center_crop":
            left, top = (width - self.size) // 2, (height - self.size) // 2
            return picture.crop((left, top, left + self.size, top + self.size))
        if self.mode == "border":
            square = Image.new("RGB", (self.size, self.size), (255, 255, 255))
            square.paste(picture, ((self.size - width) // 2, (self.size - height) // 2))
            return square
        return picture

    def encoded(self, picture: Image.Image) -> bytes:
        """The bytes of an RGB picture's file."""
        file = io.BytesIO()
        quality = QUALITY[self.encoding][0] if self.quality is None else self.quality
        option = {"compress_level" if self.encoding == "png" else "quality": quality}
        picture.save(file, ENCODINGS[self.encoding], **option)
        return file.getvalue()


def _orientation(picture: Image.Image) -> int:
    try:
        return int(picture.getexif().get(ORIENTATION, 1))
    except Exception:  # of damaged EXIF, anything may come; `decode_picture` says whether the picture is one
        return 0


def _exif(picture: Image.Image) -> str | None:
    """What a picture says about itself, as JSON by names such as "Image Make" and "EXIF FNumber"."""
    try:
        exif = picture.getexif()
        groups: list[tuple[str, Any, Any]] = [
            ("Image", exif, ExifTags.TAGS),
            ("EXIF", exif.get_ifd(ExifTags.IFD.Exif), ExifTags.TAGS),
            ("GPS", exif.get_ifd(ExifTags.IFD.GPSInfo), ExifTags.GPSTAGS),
        ]
        return json.dumps(
            {
                f"{group} {names.get(tag, hex(tag))}": str(value).strip().replace("\0", "")
                for group, values, names in groups
                for tag, value in values.items()
                if not isinstance(value, bytes)
            }
        )
    except Exception:  # as img2dataset has it: a picture without readable EXIF is a picture
        return None
