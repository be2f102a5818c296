"""Image-text folders: what is read, and what is refused."""

import io
import json
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hubgen.data.errors import DataError
from hubgen.data.image_folder import ImageTextFolder


def picture(colour: tuple[int, ...] = (255, 0, 0), size: tuple[int, int] = (16, 16), mode: str = "RGB") -> Image.Image:
    return Image.new(mode, size, colour)


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(size: int, format: str = "PNG") -> bytes:
    return encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)), format)


def write(folder: Path, rows: list[object], files: dict[str, bytes] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (files or {}).items():
        (folder / name).write_bytes(content)
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (folder / "metadata.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return folder


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """Three rows: red, green, blue."""
    colours = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
    rows = [{"file_name": f"{name}.png", "text": f"a {name} square", "captions": [f"{name}"]} for name in colours]
    return write(tmp_path / "good", rows, {f"{name}.png": encoded(picture(rgb)) for name, rgb in colours.items()})


def append(folder: Path, row: object, **files: bytes) -> Path:
    lines = (folder / "metadata.jsonl").read_bytes().splitlines()
    for name, content in files.items():
        (folder / f"{name}.png").write_bytes(content)
    return write(folder, [*lines, row])


def test_rows_come_as_pixels_from_minus_one_to_one_with_their_captions(good: Path):
    folder = ImageTextFolder(good, size=16)
    row = folder[1]
    assert len(folder) == 3
    assert (row["text"], row["captions"], row["file_name"]) == (
        "a green square",
        ["a green square", "green"],
        "green.png",
    )
    assert row["pixel_values"].shape == (3, 16, 16) and row["pixel_values"].dtype == torch.float32
    assert row["pixel_values"].amin(dim=(1, 2)).tolist() == [-1, 1, -1]
    assert torch.equal(folder.load_pixels([2, 0])[1], folder[0]["pixel_values"])
    assert folder.captions == [[f"a {name} square", name] for name in ("red", "green", "blue")]
    assert folder.skipped == []


def test_a_picture_of_the_size_asked_for_is_not_resampled(tmp_path: Path):
    content = noise(16)
    folder = ImageTextFolder(write(tmp_path, [{"file_name": "n.png", "text": "noise"}], {"n.png": content}), size=16)
    expected = torch.from_numpy(np.array(Image.open(io.BytesIO(content)))).permute(2, 0, 1) / 127.5 - 1
    assert torch.allclose(folder[0]["pixel_values"], expected, atol=1e-6)


def test_other_sizes_are_cropped_to_the_central_square_and_scaled(tmp_path: Path):
    wide = picture((255, 255, 255), (64, 32))
    wide.paste((255, 0, 0), (16, 0, 48, 32))  # the central square is red
    folder = write(tmp_path, [{"file_name": "w.png", "text": "wide"}], {"w.png": encoded(wide)})
    pixels = ImageTextFolder(folder, size=16)[0]["pixel_values"]
    assert pixels.shape == (3, 16, 16)
    assert pixels[0].min() == 1 and pixels[1:].max() == -1


def test_without_a_size_pictures_stay_as_they_are_and_only_equal_ones_stack(tmp_path: Path):
    files = {"a.png": encoded(picture()), "b.png": encoded(picture(size=(24, 16)))}
    folder = ImageTextFolder(write(tmp_path, [{"file_name": n, "text": n} for n in files], files))
    assert folder[1]["pixel_values"].shape == (3, 16, 24)
    with pytest.raises(DataError, match="expected one shape; give a size"):
        folder.load_pixels([0, 1])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (encoded(picture((0, 0, 0, 0), mode="RGBA")), [1, 1, 1]),  # transparent is white
        (encoded(picture((0, 255), mode="LA")), [-1, -1, -1]),
        (encoded(picture((0, 255, 255, 0), mode="CMYK"), "JPEG"), [0.98, -1, -1]),
        (encoded(Image.fromarray(np.full((16, 16), 65535, dtype=np.uint16))), [1, 1, 1]),
        (encoded(Image.fromarray(np.full((16, 16), 32896, dtype=np.uint16))), [0, 0, 0]),
        (encoded(picture((1,), mode="1")), [1, 1, 1]),
    ],
    ids=["RGBA", "LA", "CMYK", "16-bit white", "16-bit grey", "1-bit"],
)
def test_every_kind_of_picture_becomes_rgb(tmp_path: Path, content: bytes, expected: list[float]):
    folder = write(tmp_path, [{"file_name": "p.png", "text": "p"}], {"p.png": content})
    pixels = ImageTextFolder(folder, size=16)[0]["pixel_values"]
    assert pixels.mean(dim=(1, 2)).tolist() == pytest.approx(expected, abs=0.03)


def test_a_camera_s_rotation_is_applied(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    upright = write(
        tmp_path, [{"file_name": "p.jpg", "text": "p"}], {"p.jpg": encoded(picture(size=(32, 16)), "JPEG", exif=exif)}
    )
    assert ImageTextFolder(upright)[0]["pixel_values"].shape == (3, 32, 16)


def png_header_of(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims any size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


BAD_PICTURES = {
    "truncated PNG": (noise(32)[:-600], "truncated or damaged picture"),
    "truncated JPEG": (noise(32, "JPEG")[:-200], "truncated or damaged picture"),
    "empty file": (b"", "got an empty file, expected a picture"),
    "HTML": (b"<!doctype html><title>Not found</title>", r"begin with b'<!doctype ht', expected a picture"),
    "177 megapixels": (png_header_of(13300, 13300), "got 13300x13300 pixels, expected at most 100000000"),
    "400 megapixels": (png_header_of(20000, 20000), "far more pixels than `max_pixels`, 100000000"),
    "one pixel": (encoded(picture(size=(1, 1))), "got 1x1 pixels, expected at least 8"),
    "a program for printers": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n",
        "got EPS, a program for printers",
    ),
}


@pytest.mark.parametrize("kind", BAD_PICTURES)
def test_an_unusable_picture_is_named_with_its_row(good: Path, kind: str):
    content, message = BAD_PICTURES[kind]
    append(good, {"file_name": "bad.png", "text": "bad"}, bad=content)
    with pytest.raises(DataError, match=rf"metadata.jsonl row 4: .*bad.png: .*{message}") as caught:
        ImageTextFolder(good, size=16)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", BAD_PICTURES)
def test_an_unusable_picture_is_skipped_only_when_asked_and_counted(good: Path, kind: str):
    append(good, {"file_name": "bad.png", "text": "bad"}, bad=BAD_PICTURES[kind][0])
    folder = ImageTextFolder(good, size=16, on_error="skip")
    assert len(folder) == 3 and len(folder.skipped) == 1
    assert "bad.png" in folder.skipped[0] and "row 4" in folder.skipped[0]


BAD_ROWS = {
    "no caption": ({"file_name": "x.png"}, r"got 'file_name', expected 'text'"),
    "null caption": ({"file_name": "x.png", "text": None}, "text is null, expected a string"),
    "number as caption": ({"file_name": "x.png", "text": 3}, "text is int 3, expected a string"),
    "empty caption": ({"file_name": "x.png", "text": "  "}, "text is empty"),
    "NUL in caption": ({"file_name": "x.png", "text": "a\0b"}, "text holds a NUL character"),
    "half a character": (b'{"file_name": "x.png", "text": "\\ud800"}', "text holds half a character"),
    "captions no list": ({"file_name": "x.png", "text": "x", "captions": "x"}, "captions is str 'x', expected a list"),
    "empty wording": ({"file_name": "x.png", "text": "x", "captions": ["x", ""]}, r"captions\[1\] is empty"),
    "no file name": ({"text": "x"}, r"got 'text', expected 'file_name'"),
    "missing file": ({"file_name": "x.png", "text": "x"}, "x.png: no such file, expected a picture"),
    "a folder": ({"file_name": ".", "text": "x"}, "no such file"),
    "twice the same file": ({"file_name": "./red.png", "text": "x"}, "red.png stands in row 1 already"),
    "no JSON": (b"file_name,text", "not JSON"),
    "no object": ([1], "got list"),
    "not UTF-8": (b'{"file_name": "x.png", "text": "caf\xe9"}', "not UTF-8"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_an_unusable_row_is_named_by_number_or_skipped_and_counted(good: Path, kind: str):
    row, message = BAD_ROWS[kind]
    append(good, row)
    with pytest.raises(DataError, match=rf"metadata.jsonl row 4: .*{message}"):
        ImageTextFolder(good, size=16)
    folder = ImageTextFolder(good, size=16, on_error="skip")
    assert len(folder) == 3 and len(folder.skipped) == 1


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "a/../../secret.png", "..\\secret.png"])
def test_a_path_that_leaves_the_folder_is_refused_even_when_skipping(good: Path, name: str):
    (good.parent / "secret.png").write_bytes(encoded(picture()))
    append(good, {"file_name": name, "text": "x"})
    with pytest.raises(DataError, match="row 4: file_name .* leaves the folder"):
        ImageTextFolder(good, size=16, on_error="skip")


def test_a_link_out_of_the_folder_is_followed_unless_that_is_refused(good: Path):
    (good.parent / "secret.png").write_bytes(encoded(picture()))
    (good / "link.png").symlink_to(good.parent / "secret.png")
    append(good, {"file_name": "link.png", "text": "x"})
    assert len(ImageTextFolder(good, size=16)) == 4
    with pytest.raises(DataError, match="row 4: .*link.png is a link out of the folder"):
        ImageTextFolder(good, size=16, on_error="skip", follow_links=False)


def test_a_folder_of_which_most_rows_are_unusable_is_refused(good: Path):
    for name in ("green", "blue"):
        (good / f"{name}.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"1 of 3 rows can be used, expected most; the first: .*green.png"):
        ImageTextFolder(good, size=16, on_error="skip")


def test_missing_folders_metadata_and_splits_are_named(good: Path, tmp_path: Path):
    with pytest.raises(DataError, match="nowhere: no such folder"):
        ImageTextFolder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty/metadata.jsonl: no such file"):
        ImageTextFolder(tmp_path / "empty")
    with pytest.raises(DataError, match="got no rows"):
        ImageTextFolder(write(tmp_path / "bare", []))
    with pytest.raises(DataError, match=r"`split`: got 'test', expected a folder of .*: bare, empty, good"):
        ImageTextFolder(tmp_path, split="test")
    with pytest.raises(DataError, match=r"holds no metadata.jsonl, but splits: bare, good; name one"):
        ImageTextFolder(tmp_path)
    with pytest.raises(DataError, match=r"`split`: got '../good'"):
        ImageTextFolder(tmp_path, split="../good")


@pytest.mark.parametrize(
    ("options", "message"), [({"size": 0}, "`size`: got 0"), ({"on_error": "ignore"}, "`on_error`: got 'ignore'")]
)
def test_unusable_options_are_named(good: Path, options: dict, message: str):
    with pytest.raises(DataError, match=message):
        ImageTextFolder(good, **options)


def test_another_caption_column_is_read(tmp_path: Path):
    folder = write(tmp_path, [{"file_name": "a.png", "caption": "red", "text": "no"}], {"a.png": encoded(picture())})
    assert ImageTextFolder(folder, caption_column="caption").captions == [["red"]]


def test_held_out_finds_the_folder_that_imagefolder_calls_test(good: Path, tmp_path: Path):
    shutil.copytree(good, tmp_path / "data" / "test")
    assert len(ImageTextFolder(tmp_path / "data", split="held_out")) == 3


def test_the_fingerprint_follows_pictures_captions_order_and_size_and_nothing_else(good: Path, tmp_path: Path):
    def fingerprint(folder: Path, size: int = 16) -> str:
        return ImageTextFolder(folder, size=size).fingerprint

    first = fingerprint(good)
    copy = shutil.copytree(good, tmp_path / "copy")
    assert fingerprint(copy) == first
    assert fingerprint(copy, size=8) != first
    lines = (copy / "metadata.jsonl").read_bytes().splitlines()
    write(copy, lines[::-1])
    assert fingerprint(copy) != first
    write(copy, [lines[0].replace(b"a red", b"one red"), *lines[1:]])
    assert fingerprint(copy) != first
    write(copy, list(lines), {"red.png": encoded(picture((254, 0, 0)))})
    assert fingerprint(copy) != first


def test_a_picture_that_vanishes_after_the_check_is_named(good: Path):
    folder = ImageTextFolder(good, size=16)
    (good / "red.png").unlink()
    with pytest.raises(DataError, match="red.png: No such file"):
        folder[0]
