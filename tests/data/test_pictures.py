"""Pictures of every kind come out as one kind, and damaged ones as one kind of error."""

import io
import random
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from hubgen.data.errors import DataError
from hubgen.data.pictures import as_mask, decode_picture, on_white, standard

SIZE = (16, 12)
RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def two_halves(left: Any = RED, right: Any = BLUE, mode: str = "RGB") -> Image.Image:
    picture = Image.new(mode, SIZE, left)
    picture.paste(right, (8, 0, 16, 12))
    return picture


def encoded(picture: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def png(depth: int, colour: int, row: bytes, transparent: bytes) -> bytes:
    """A PNG of kinds that Pillow does not write: its two equal rows, and the colour that is transparent."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 2, 2, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"tRNS", transparent), (b"IDAT", zlib.compress((b"\0" + row) * 2)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, body) for kind, body in chunks)


def halves_of(picture: Image.Image) -> tuple[Any, Any]:
    assert picture.mode == "RGB"
    return picture.getpixel((0, 0)), picture.getpixel((picture.width - 1, picture.height - 1))


GREY16 = np.repeat([[0x0000, 0xC8C8]], 12, 0).repeat(8, 1).astype(np.uint16)
KINDS: dict[str, tuple[bytes, Any, Any]] = {
    "RGB": (encoded(two_halves()), RED, BLUE),
    "palette": (encoded(two_halves().convert("P")), RED, BLUE),
    "palette with a transparent colour": (
        encoded(two_halves().quantize(2), transparency=two_halves().quantize(2).getpixel((0, 0))),
        WHITE,
        BLUE,
    ),
    "grey with alpha": (encoded(two_halves((0, 0), (0, 255), "LA")), WHITE, (0, 0, 0)),
    "RGB with a transparent colour": (encoded(two_halves(), transparency=RED), WHITE, BLUE),
    "1 bit": (encoded(two_halves(1, 0, "1")), WHITE, (0, 0, 0)),
    "CMYK": (encoded(two_halves((0, 255, 255, 0), (255, 255, 0, 0), "CMYK"), "TIFF"), RED, BLUE),
    "YCbCr": (encoded(two_halves().resize((16, 16), 0).convert("YCbCr"), "TIFF", compression="jpeg"), RED, BLUE),
    "Lab": (
        encoded(
            ImageCms.profileToProfile(
                two_halves(), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
            ),
            "TIFF",
        ),
        RED,
        BLUE,
    ),
    "16-bit grey": (encoded(Image.fromarray(GREY16)), (0,) * 3, (200,) * 3),
    "16-bit grey TIFF": (encoded(Image.fromarray(GREY16), "TIFF"), (0,) * 3, (200,) * 3),
    "16-bit grey with a transparent one": (png(16, 0, b"\0\0\xc8\xc8", b"\0\0"), WHITE, (200,) * 3),
    "16-bit RGB with a transparent colour": (
        png(16, 2, b"\xff\x01\0\0\0\0" + b"\0\0\0\0\xff\xff", b"\xff\x01\0\0\0\0"),
        WHITE,
        BLUE,
    ),
    "GIF animation": (encoded(two_halves(), "GIF", save_all=True, append_images=[two_halves(BLUE, RED)]), RED, BLUE),
    "PNG animation": (encoded(two_halves(), save_all=True, append_images=[two_halves(BLUE, RED)]), RED, BLUE),
    "WebP animation": (
        encoded(two_halves(), "WEBP", lossless=True, save_all=True, append_images=[two_halves(BLUE, RED)]),
        RED,
        BLUE,
    ),
    "TIFF of two pages": (
        encoded(two_halves(), "TIFF", save_all=True, append_images=[two_halves(BLUE, RED)]),
        RED,
        BLUE,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_of_any_kind_becomes_rgb_on_white(kind: str) -> None:
    content, left, right = KINDS[kind]
    found = halves_of(on_white(decode_picture(content, kind)))
    assert np.abs(np.array(found) - np.array((left, right))).max() <= (30 if kind == "Lab" else 3)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_comes_out_upright(format: str, orientation: int) -> None:
    upright = Image.new("RGB", (16, 12), "black")
    upright.paste((255, 255, 255), (0, 0, 8, 6))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's names of what brings it there
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode_picture(encoded(stored, format, exif=exif), "photo")
    assert found.size == (16, 12)
    assert np.abs(np.asarray(found, float) - np.asarray(upright, float)).mean() < 12
    assert np.array_equal(standard(found, "again"), found)


def other_space() -> bytes:
    """A profile with red and blue exchanged."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {bytes(profile[at : at + 4]): at for at in range(132, 132 + 12 * profile[131], 12)}
    red, blue = tags[b"rXYZ"], tags[b"bXYZ"]
    profile[red + 4 : red + 12], profile[blue + 4 : blue + 12] = (
        profile[blue + 4 : blue + 12],
        profile[red + 4 : red + 12],
    )
    return bytes(profile)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colours_of_another_space_become_srgb_once(format: str, mode: str) -> None:
    if (format, mode) == ("JPEG", "RGBA"):
        pytest.skip("a JPEG has no alpha")
    options: dict[str, Any] = {"lossless": True} if format == "WEBP" else {}
    content = encoded(two_halves(mode="RGB").convert(mode), format, icc_profile=other_space(), **options)
    found = decode_picture(content, "photo")
    left, right = halves_of(on_white(found))
    assert left[2] > 200 > 60 > left[0] and right[0] > 200 > 60 > right[2]
    assert np.array_equal(standard(found, "again"), found)


@pytest.mark.parametrize(
    "profile", [b"no profile", other_space()[:200], ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()]
)
def test_a_broken_profile_and_that_of_srgb_change_nothing(profile: bytes) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8))
    assert np.array_equal(decode_picture(encoded(noise, icc_profile=profile), "photo"), noise)


def test_a_profile_of_another_kind_of_picture_is_left_out_of_account() -> None:
    grey = two_halves(10, 200, "L")
    assert np.array_equal(decode_picture(encoded(grey, icc_profile=other_space()), "grey"), grey.convert("RGB"))


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (Image.new("F", SIZE, 0.5), "got floating-point pixels"),
        (Image.new("I", SIZE, 70000), "got pixels from 70000 to 70000, expected 8 or 16 bits"),
        (Image.new("I", SIZE, -1), "got pixels from -1 to -1"),
    ],
)
def test_pixels_of_unknown_range_are_refused(picture: Image.Image, message: str) -> None:
    with pytest.raises(DataError, match=f"^deep: {message}"):
        decode_picture(encoded(picture, "TIFF"), "deep")


def test_a_mask_with_transparent_parts_is_its_opacity_and_any_other_its_brightness() -> None:
    strokes = two_halves((0, 0, 0, 0), (0, 0, 0, 255), "RGBA")  # black paint on nothing
    painted = two_halves((0, 0, 0, 255), (255, 255, 255, 255), "RGBA")
    for mask in (strokes, painted, two_halves(0, 255, "L"), two_halves(0, 1, "1"), two_halves(0, 65535, "I;16")):
        found = as_mask(standard(mask, "mask"))
        assert found.mode == "L" and (found.getpixel((0, 0)), found.getpixel((15, 0))) == (0, 255)
    assert as_mask(standard(Image.new("RGBA", SIZE, (255, 255, 255, 0)), "mask")).getextrema() == (0, 0)


@pytest.mark.parametrize(
    "format",
    ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000", "DDS", "ICO", "TGA", "PPM", "PCX", "SGI"],
)
def test_damaged_bytes_give_a_picture_or_one_named_error(format: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8))
    whole, draw = encoded(noise, format), random.Random(0)
    errors: list[str] = []
    for _ in range(60):
        damaged = bytearray(whole[: draw.randrange(1, len(whole) + 1)] if draw.random() < 0.3 else whole)
        for _ in range(draw.randrange(4)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        try:
            assert decode_picture(bytes(damaged), "photo").mode in ("RGB", "RGBA")
        except DataError as error:
            errors.append(str(error))
    assert len(errors) > 5
    assert all(error.startswith("photo: ") and "\n" not in error for error in errors)
