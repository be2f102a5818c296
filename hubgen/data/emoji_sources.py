"""Where emoji come from: their names, and pictures of each style, from package archives or a font.

Archives are those of `hubgen.data.packages`, pinned by their digest; each may be given by path.
"""

import io
import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from hubgen.data.emoji_captions import clean_label
from hubgen.data.errors import DataError
from hubgen.data.packages import DEB_MAGIC, NpmPackage, fetch, read_deb_member, read_members
from hubgen.data.pictures import decode_picture
from hubgen.formats.digests import file_digest

MAX_SOURCE_PIXELS = 4096 * 4096

FLUENT = NpmPackage(
    name="@lobehub/fluent-emoji-3d",
    version="1.1.0",
    license="MIT",
    integrity="sha512-Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
    max_bytes=32 * 2**20,
    option="--archive",
)
NAMES = NpmPackage(
    name="emojibase-data",
    version="17.0.0",
    license="MIT",
    integrity="sha512-Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
    max_bytes=32 * 2**20,
    option="--names-archive",
)
NOTO = NpmPackage(
    name="emoji-datasource-google",
    version="16.0.0",
    license="Apache-2.0",
    integrity="sha512-ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
    max_bytes=128 * 2**20,
    option="--archive",
    otherwise=", or a font: --font NotoColorEmoji.ttf",
)
ASSETS = "package/assets/"
"""Where LobeHub's packages have their pictures"""
MORE = "--more-archives"
"""Option that takes the packages of variants by path"""
ANIMATED = tuple(
    NpmPackage(f"@lobehub/fluent-emoji-anim-{number}", "1.0.0", "MIT", integrity, 256 * 2**20, MORE)
    for number, integrity in enumerate(
        (
            "sha512-/4m31vAuZEQ4aUJ5pxcOU5PVkuJya55GRxUZL7+zgLlxZXpzzE8jPqpDyhZICE3n47nS/Y9M5/vLdizi8201QA==",
            "sha512-S6yzf0RZXrQbXdxCWuHA9BAoLdBRk2flX+ne4TPGEH/qApwisCAKHoAAGjKSlTY3OVeZ9b7t/NEbmpjawnQYJA==",
            "sha512-UzRSUDMjdfdt9vER5bhjHkPqgc3EEgfGtYs6ndvizOTvQOxYQ57ow2RTkWSDZxwW30X4EYBi2eWTS7CXDDoFsg==",
            "sha512-IIkl5ztSd1HrzvIDt/uGsFoC1WODXRdYq5uROrnkyqi9DbToEcJ1nlY86PnoUXeFS9nBCnHfiYk3ouSEGThFmA==",
        ),
        start=1,
    )
)
FLAT = NpmPackage(
    name="@lobehub/fluent-emoji-flat",
    version="1.1.0",
    license="MIT",
    integrity="sha512-lPYCg8+N56MIj+iOgeBeH6AF0tneXxJCvgi41rOTjAWpA5rU2WUcmU1fiIXouEe8GrSTarWCYLY2ML+rdLRHsg==",
    max_bytes=32 * 2**20,
    option=MORE,
)
NOTO_PACKAGE_SIZE = 64  # pixels of the pictures in that package
NOTO_FONT_SIZE = 109  # the one bitmap size in NotoColorEmoji.ttf: glyphs of 136×128 pixels
SYSTEM_FONTS = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",  # Debian, Ubuntu
    "/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf",  # Fedora
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",  # Arch
)


@dataclass(frozen=True)
class EmojiSource:
    """Pictures by code points (lower case, joined by "-", without FE0F), each opened when called."""

    pictures: dict[str, Callable[[], Image.Image]]
    record: dict[str, str]
    licence: str
    look: str


@dataclass(frozen=True)
class Emoji:
    """What the names say of one."""

    label: str
    tags: tuple[str, ...]
    emoji: str
    hexcode: str
    group: str
    subgroup: str


# ---- names -------------------------------------------------------------------------------------------------------


def key_of(hexcode: str) -> str:
    """Code points without the presentation selector FE0F, which packages write or omit at will."""
    return "-".join(point for point in hexcode.lower().split("-") if point != "fe0f")


def read_names(path: Path) -> tuple[list[Emoji], str, str]:
    """Emoji in CLDR order, the package's licence and its version."""
    wanted = {"package/en/data.json", "package/en/messages.json", "package/LICENSE", "package/package.json"}
    found = {name: content for name, content in read_members(path, NAMES.option, "package/") if name in wanted}
    missing = sorted(wanted - found.keys())
    if missing:
        raise DataError(f"{NAMES.option}: {path}: holds no {missing[0]}, expected an archive of {NAMES.name}")
    try:
        data = json.loads(found["package/en/data.json"])
        messages = json.loads(found["package/en/messages.json"])
        groups = {group["order"]: group["message"] for group in messages["groups"]}
        subgroups = {group["order"]: group["key"] for group in messages["subgroups"]}
        emoji = [
            Emoji(
                label=clean_label(entry["label"]),
                tags=tuple(entry.get("tags", ())),
                emoji=entry["emoji"],
                hexcode=entry["hexcode"],
                group=groups[entry["group"]],
                subgroup=subgroups[entry["subgroup"]],
            )
            for entry in sorted(data, key=lambda entry: entry.get("order", 0))
            if "group" in entry  # the others are regional indicators, letters that make up flags
        ]
        version = str(json.loads(found["package/package.json"])["version"])
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise DataError(
            f"{NAMES.option}: {path}: data.json is not as expected of {NAMES.name} {NAMES.version} ({problem!r})"
        ) from problem
    return emoji, found["package/LICENSE"].decode("utf-8", "replace"), version


# ---- pictures ----------------------------------------------------------------------------------------------------


def open_source(style: str, archive: Any, font: Any, emoji: list[Emoji], progress: bool) -> EmojiSource:
    """The pictures of a style, from its package or from a font."""
    if font is not None:
        return font_source(Path(font), emoji)
    package = FLUENT if style == "fluent" else NOTO
    path = Path(archive) if archive is not None else fetch(package, progress)
    if style == "fluent":
        look, prefix = "3D icon", ASSETS
        copyright_line = "Copyright (c) Microsoft Corporation (Fluent Emoji)\nCopyright (c) 2023 LobeHub (packaging)"
    else:
        look, prefix = "flat icon", f"package/img/google/{NOTO_PACKAGE_SIZE}/"
        copyright_line = "Copyright Google LLC (Noto Emoji)\nCopyright (c) 2013 Cal Henderson (packaging, MIT)"
    pictures: dict[str, Callable[[], Image.Image]] = {}
    for key, name, content in assets(package, path, prefix, (".webp", ".png")):
        pictures[key] = _opener(name, content)
    if not pictures:
        raise DataError(
            f"{package.option}: {path}: holds no pictures below {prefix}, expected an archive of {package.name}"
        )
    return EmojiSource(pictures, record_of(package, path), copyright_line, look)


def _opener(name: str, content: bytes) -> Callable[[], Image.Image]:
    return lambda: decode_picture(content, name, MAX_SOURCE_PIXELS)


def font_source(path: Path, emoji: list[Emoji]) -> EmojiSource:
    """Glyphs of a colour bitmap font; an emoji counts as drawn where the font has one glyph for all its code points."""
    content = path.read_bytes()
    if content.startswith(DEB_MAGIC):
        content = read_deb_member(path, "--font", "/NotoColorEmoji.ttf")
    try:
        font = ImageFont.truetype(io.BytesIO(content), NOTO_FONT_SIZE)
    except (OSError, ValueError) as problem:
        raise DataError(f"--font: {path}: not a font with bitmaps of {NOTO_FONT_SIZE} pixels ({problem})") from problem
    smiling = drawn_glyph(font, "\N{GRINNING FACE}")
    if smiling is None or len(smiling.convert("RGB").getcolors(2**16) or ()) < 3:
        raise DataError(f"--font: {path}: draws no emoji in colour, expected NotoColorEmoji.ttf with bitmaps (CBDT)")
    pictures: dict[str, Callable[[], Image.Image]] = {}
    for one in emoji:
        glyph = drawn_glyph(font, one.emoji)
        if glyph is not None:
            pictures[key_of(one.hexcode)] = glyph.copy
    record = {"from": f"font {path.name}", "sha512": file_digest(path, "sha512"), "license": "OFL-1.1"}
    return EmojiSource(pictures, record, "Copyright Google LLC (Noto Color Emoji)", "flat icon")


def drawn_glyph(font: ImageFont.FreeTypeFont, text: str) -> Image.Image | None:
    """RGBA picture of a text that the font draws as one glyph, else None.

    Without the shaping library (raqm, part of most Pillow builds) joined emoji fall apart into several glyphs.
    """
    left, top, right, bottom = font.getbbox(text)
    one = font.getbbox("\N{GRINNING FACE}")
    if right <= left or bottom <= top or right - left > 1.5 * (one[2] - one[0]):
        return None
    picture = Image.new("RGBA", (int(right - left), int(bottom - top)))
    ImageDraw.Draw(picture).text((-left, -top), text, font=font, embedded_color=True)
    return picture if picture.getbbox() else None


# ---- pictures of variants ----


def given_packages(wanted: Sequence[NpmPackage], given: Sequence[str | os.PathLike[str]]) -> dict[NpmPackage, Path]:
    """Which of the wanted packages are given by path, told by the name inside.

    Raises:
        DataError: One that is given is none of them.
    """
    by_name = {package.name: package for package in wanted}
    found: dict[NpmPackage, Path] = {}
    for path in map(Path, given):
        package = by_name.get(name_inside(path))
        if package is None:
            names = ", ".join(by_name) or "none, for these variants"
            raise DataError(f"{MORE}: {path}: got {name_inside(path) or 'no npm package'}, expected {names}")
        found[package] = path
    return found


def name_inside(path: Path) -> str:
    """What an npm package says of its name; empty where it says none."""
    for name, content in read_members(path, MORE, "package/package.json"):
        if name == "package/package.json":
            try:
                return str(json.loads(content)["name"])
            except (ValueError, KeyError, TypeError):
                return ""
    return ""


def record_of(package: NpmPackage, path: Path) -> dict[str, str]:
    """What build.json says of a source."""
    digest = file_digest(path, "sha512")
    version = package.version if digest == package.sha512 else "(archive by path, other than the pinned version)"
    return {"from": f"npm {package.name} {version}", "sha512": digest, "license": package.license}


def assets(
    package: NpmPackage, path: Path, prefix: str, extensions: Collection[str]
) -> Iterator[tuple[str, str, bytes]]:
    """Code points, name for messages and bytes of each picture of a package, one after the other."""
    for name, content in read_members(path, package.option, prefix):
        stem, extension = os.path.splitext(name.removeprefix(prefix))
        if extension in extensions and re.fullmatch(r"[0-9A-Fa-f]+(-[0-9A-Fa-f]+)*", stem):
            yield key_of(stem), f"{package.option}: {path}: {name}", content


def frames_of(content: bytes, name: str, step: int) -> Iterator[Image.Image]:
    """Each `step`-th frame of an animated picture; none of one that stands still.

    Raises:
        DataError: It is damaged.
    """
    try:
        with Image.open(io.BytesIO(content)) as animation:
            if animation.width * animation.height > MAX_SOURCE_PIXELS:
                raise ValueError(f"got {animation.size} pixels, expected at most {MAX_SOURCE_PIXELS}")
            count = getattr(animation, "n_frames", 1)
            for number in range(0, count if count > 1 else 0, step):
                animation.seek(number)
                yield animation.convert("RGBA")
    except (OSError, ValueError, SyntaxError) as problem:
        raise DataError(f"{name}: not readable as an animated picture ({problem})") from problem


def drawn_svg(content: bytes, name: str, size: int) -> Image.Image:
    """A vector picture, drawn at `size` pixels.

    Raises:
        DataError: It is damaged.
    """
    from resvg_py import svg_to_bytes

    try:
        png = svg_to_bytes(svg_string=content.decode(), width=size, height=size, skip_system_fonts=True)
    except ValueError as problem:
        raise DataError(f"{name}: not readable as SVG ({problem})") from problem
    return decode_picture(bytes(png), name, MAX_SOURCE_PIXELS)
