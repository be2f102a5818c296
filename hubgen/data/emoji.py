"""The emoji data set: an image-text folder built from package archives or a font.

Style "fluent": Fluent 3D emoji (Microsoft, MIT) from npm `@lobehub/fluent-emoji-3d`. Style "noto": Noto Color Emoji
(Google) from npm `emoji-datasource-google`, or drawn from the font by path. Names, tags and groups are the English CLDR
annotations in npm `emojibase-data`. Variants by skin tone are left out.

The folder, loadable with `datasets.load_dataset("imagefolder", data_dir=...)`:

    train/*.png  train/metadata.jsonl     rows: file_name, text, captions, tags, emoji, hexcode, group
    test/*.png   test/metadata.jsonl      the captions held out from training
    README.md  LICENSE  build.json        card; licences of pictures and names; what the folder was built from
"""

import io
import json
import os
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm.auto import tqdm

from hubgen.checks import is_whole
from hubgen.data.emoji_captions import Candidate, choose_held_out, clean_label, wordings
from hubgen.data.errors import DataError
from hubgen.data.packages import DEB_MAGIC, NpmPackage, fetch, file_digest, read_deb_member, read_members
from hubgen.data.pictures import decode_picture, on_white, pad_to_square, scale
from hubgen.formats.atomic import TEMPORARY, sweep, written

STYLES = ("fluent", "noto")
TRAIN, HELD_OUT = "train", "test"  # folder names that `datasets` recognises as splits
MARKER = "build.json"
FORMAT = 1  # of the folder: raised when the same inputs would give other files

# Two pictures are the same where the root mean square of their difference, over the pixels and channels of their 64×64
# renderings on white (0 to 255), is below SAME_PICTURE: in the Fluent set that joins "pilot" and "man pilot" (7.4), of
# which one is a retouched copy of the other, and keeps apart faces that differ by the mouth (9 and more), clock faces
# (15 and more) and flags (14 and more). A picture can be held out only where no other is nearer than DISTINCT_PICTURE.
COMPARED_SIZE = 64
SAME_PICTURE = 8.0
DISTINCT_PICTURE = 12.0

# Territories that fly another country's flag: of the two labels, the country's is the one to keep.
BORROWED_FLAGS = frozenset(
    f"flag: {territory}"
    for territory in (
        "Bouvet Island",
        "Ceuta & Melilla",
        "Clipperton Island",
        "Diego Garcia",
        "Heard & McDonald Islands",
        "Sark",
        "St. Martin",
        "Svalbard & Jan Mayen",
        "U.S. Outlying Islands",
    )
)

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
NOTO_PACKAGE_SIZE = 64  # pixels of the pictures in that package
NOTO_FONT_SIZE = 109  # the one bitmap size in NotoColorEmoji.ttf: glyphs of 136×128 pixels
SYSTEM_FONTS = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",  # Debian, Ubuntu
    "/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf",  # Fedora
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",  # Arch
)


@dataclass(frozen=True)
class EmojiBuild:
    """What `build_emoji_dataset` made or found: `str()` gives the lines to show to a user."""

    path: Path
    style: str
    size: int
    train: int
    held_out: int
    same_pictures: tuple[tuple[str, str], ...]
    """(caption left out, caption of the same picture that is kept)"""
    same_captions: tuple[str, ...]
    not_in_source: int
    """emoji with a name and without a picture in the source"""
    sources: tuple[str, ...]
    already_built: bool

    def __str__(self) -> str:
        first = "already built, nothing to do" if self.already_built else "built"
        lines = [
            f"{first}: {self.path}",
            f"{self.train} training and {self.held_out} held-out pictures, {self.size}x{self.size}, style {self.style}",
            f"left out: {len(self.same_pictures)} (nearly) identical pictures, {len(self.same_captions)} repeated "
            f"captions, {self.not_in_source} emoji that the source does not draw",
        ]
        return "\n".join(lines + [f"from {source}" for source in self.sources])


@dataclass(frozen=True)
class _Source:
    """Pictures by code points (lower case, joined by "-", without FE0F), each opened when called."""

    pictures: dict[str, Callable[[], Image.Image]]
    record: dict[str, str]
    licence: str
    look: str


@dataclass(frozen=True)
class _Emoji:
    label: str
    tags: tuple[str, ...]
    emoji: str
    hexcode: str
    group: str
    subgroup: str


def build_emoji_dataset(
    style: str,
    size: int,
    output_dir: str | os.PathLike[str],
    *,
    archive: str | os.PathLike[str] | None = None,
    names_archive: str | os.PathLike[str] | None = None,
    font: str | os.PathLike[str] | None = None,
    seed: int = 0,
    held_out: int = 110,
    progress: bool = True,
) -> EmojiBuild:
    """Build the image-text folder `output_dir` of `size`×`size` emoji; the same arguments give the same files.

    `archive` and `names_archive` take the npm archives of pictures and names by path, `font` a colour bitmap font
    (NotoColorEmoji.ttf, style "noto" only); what is not given is downloaded once and kept in the cache. `held_out` is
    the number of captions in the test split, chosen by `seed` (`choose_held_out`); with 0 there is no such split.

    Every file is written beside its name and renamed, the metadata after the pictures and `build.json` last: an
    interrupted build is finished by the same call, and a finished folder is recognised. Raises `DataError` for an
    unusable option, archive or font, where a download fails, and where `output_dir` holds anything else.
    """
    _check_options(style, size, seed, held_out, archive, font)
    output = Path(output_dir)
    settings = _settings(style, size, seed, held_out, archive, names_archive, font)
    finished = _check_folder(output, settings)
    if finished is not None:
        return finished

    names_path = Path(names_archive) if names_archive is not None else fetch(NAMES, progress)
    emoji, names_licence, names_version = _read_names(names_path)
    source = _open_source(style, archive, font, emoji, progress)
    present = [one for one in emoji if _key(one.hexcode) in source.pictures]
    if not present:
        raise DataError(f"{source.record['from']}: holds no picture that the names know, expected an emoji package")

    output.mkdir(parents=True, exist_ok=True)
    _write(output / MARKER, _json({"finished": False, "settings": settings}))
    splits = (TRAIN, HELD_OUT) if held_out else (TRAIN,)
    for split in splits:
        (output / split).mkdir(exist_ok=True)
        sweep(output / split)

    kept, pictures, distinct, same_pictures, same_captions = _render(present, source, size, progress)
    candidates = [Candidate(one.label, one.subgroup, far) for one, far in zip(kept, distinct, strict=True)]
    test = set(choose_held_out(candidates, held_out, seed))

    rows: dict[str, list[dict[str, Any]]] = {split: [] for split in splits}
    bar = tqdm(enumerate(zip(kept, pictures, strict=True)), total=len(kept), desc="write", disable=not progress)
    for index, (one, picture) in bar:
        split = HELD_OUT if index in test else TRAIN
        row = _row(one, source.look)
        _write(output / split / row["file_name"], picture, durable=False)
        rows[split].append(row)

    record = {
        "finished": True,
        "settings": settings,
        "sources": [source.record, {"from": f"npm emojibase-data {names_version}", "sha512": file_digest(names_path)}],
        "rows": {split: len(rows[split]) for split in rows},
        "same_pictures": same_pictures,
        "same_captions": same_captions,
        "not_in_source": len(emoji) - len(present),
    }
    build = _build_of(output, record, already_built=False)
    _write(output / "LICENSE", _licence(source, names_licence).encode())
    _write(output / "README.md", _card(build, settings, source).encode())
    for split in splits:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[split])
        _write(output / split / "metadata.jsonl", lines.encode())
    record["metadata_sha256"] = {split: file_digest(output / split / "metadata.jsonl", "sha256") for split in rows}
    _write(output / MARKER, _json(record))
    return build


# ---- options and the state of the folder -------------------------------------------------------------------------


def _check_options(style: str, size: int, seed: int, held_out: int, archive: Any, font: Any) -> None:
    if style not in STYLES:
        raise DataError(f"`style`: got {style!r}, expected one of {', '.join(STYLES)}")
    for name, value, least, most in (
        ("size", size, 8, 1024),
        ("seed", seed, 0, 2**63),
        ("held_out", held_out, 0, 10**6),
    ):
        if not is_whole(value, least, most):
            raise DataError(f"`{name}`: got {value!r}, expected an integer from {least} to {most}")
    if font is not None and style != "noto":
        raise DataError(
            f"`font`: got a font with style {style!r}, expected style 'noto', which alone is drawn from one"
        )
    if font is not None and archive is not None:
        raise DataError("font and archive: both name a source of pictures, expected one of them")
    if style == "noto" and font is None and size > NOTO_PACKAGE_SIZE:
        here = next((path for path in SYSTEM_FONTS if Path(path).is_file()), "NotoColorEmoji.ttf")
        raise DataError(
            f"`size`: got {size}, expected at most {NOTO_PACKAGE_SIZE}, the pixels of {NOTO.name}'s pictures; "
            f"larger ones are drawn from the font: --font {here}"
        )


def _settings(style: str, size: int, seed: int, held_out: int, archive: Any, names: Any, font: Any) -> dict[str, Any]:
    """What decides the files, bytes of the sources included (a pinned package and its archive by path are the same)."""
    pinned = FLUENT if style == "fluent" else NOTO
    pictures = font if font is not None else archive
    for option, path in (("archive", archive), ("names_archive", names), ("font", font)):
        if path is not None and not Path(path).is_file():
            raise DataError(f"{option}: {path}: no such file")
    return {
        "format": FORMAT,
        "style": style,
        "size": size,
        "seed": seed,
        "held_out": held_out,
        "pictures_sha512": pinned.sha512 if pictures is None else file_digest(Path(pictures)),
        "names_sha512": NAMES.sha512 if names is None else file_digest(Path(names)),
    }


def _check_folder(output: Path, settings: dict[str, Any]) -> EmojiBuild | None:
    """The finished build of these settings, or None where the folder is free for one."""
    if not output.exists():
        return None
    if not output.is_dir():
        raise DataError(f"output_dir: {output} is a file, expected a folder")
    marker = output / MARKER
    if not marker.is_file():
        if any(not path.name.startswith(TEMPORARY) for path in output.iterdir()):
            raise DataError(f"output_dir: {output} holds other files and no {MARKER}, expected an empty or new folder")
        return None
    try:
        record = json.loads(marker.read_text(encoding="utf-8"))
        found = dict(record["settings"])
    except (ValueError, KeyError, TypeError) as problem:
        raise DataError(f"{marker}: not readable as the record of a build ({problem}); use another folder") from problem
    differences = [
        f"{name} {found.get(name)!r:.24} instead of {settings.get(name)!r:.24}"
        for name in sorted(found.keys() | settings.keys())
        if found.get(name) != settings.get(name)
    ]
    if differences:
        raise DataError(f"output_dir: {output} was built with {', '.join(differences)}; use another folder")
    if not record.get("finished") or not _is_whole(output, record):
        return None
    return _build_of(output, record, already_built=True)


def _is_whole(output: Path, record: dict[str, Any]) -> bool:
    """Whether the metadata are the recorded ones and every picture is there (a lost file is built again)."""
    for split, digest in record["metadata_sha256"].items():
        metadata = output / split / "metadata.jsonl"
        if not metadata.is_file() or file_digest(metadata, "sha256") != digest:
            return False
        for line in metadata.read_text(encoding="utf-8").splitlines():
            picture = output / split / json.loads(line)["file_name"]
            if not picture.is_file() or picture.stat().st_size == 0:
                return False
    return (output / "LICENSE").is_file() and (output / "README.md").is_file()


def _build_of(output: Path, record: dict[str, Any], already_built: bool) -> EmojiBuild:
    return EmojiBuild(
        path=output,
        style=record["settings"]["style"],
        size=record["settings"]["size"],
        train=record["rows"][TRAIN],
        held_out=record["rows"].get(HELD_OUT, 0),
        same_pictures=tuple((left_out, kept) for left_out, kept in record["same_pictures"]),
        same_captions=tuple(record["same_captions"]),
        not_in_source=record["not_in_source"],
        sources=tuple(source["from"] for source in record["sources"]),
        already_built=already_built,
    )


def _write(path: Path, content: bytes, durable: bool = True) -> None:
    """Write what is not there already; what is not `durable` may come out empty, and `_is_whole` sees that."""
    if path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content:
        return
    with written(path, durable) as temporary:
        temporary.write_bytes(content)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


# ---- names -------------------------------------------------------------------------------------------------------


def _key(hexcode: str) -> str:
    """Code points without the presentation selector FE0F, which packages write or omit at will."""
    return "-".join(point for point in hexcode.lower().split("-") if point != "fe0f")


def _read_names(path: Path) -> tuple[list[_Emoji], str, str]:
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
            _Emoji(
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


def _open_source(style: str, archive: Any, font: Any, emoji: list[_Emoji], progress: bool) -> _Source:
    if font is not None:
        return _font_source(Path(font), emoji)
    package = FLUENT if style == "fluent" else NOTO
    path = Path(archive) if archive is not None else fetch(package, progress)
    if style == "fluent":
        look, prefix = "3D icon", "package/assets/"
        copyright_line = "Copyright (c) Microsoft Corporation (Fluent Emoji)\nCopyright (c) 2023 LobeHub (packaging)"
    else:
        look, prefix = "flat icon", f"package/img/google/{NOTO_PACKAGE_SIZE}/"
        copyright_line = "Copyright Google LLC (Noto Emoji)\nCopyright (c) 2013 Cal Henderson (packaging, MIT)"
    pictures: dict[str, Callable[[], Image.Image]] = {}
    for name, content in read_members(path, package.option, prefix):
        stem, extension = os.path.splitext(name.removeprefix(prefix))
        if extension in (".webp", ".png") and re.fullmatch(r"[0-9A-Fa-f]+(-[0-9A-Fa-f]+)*", stem):
            pictures[_key(stem)] = _opener(f"{package.option}: {path}: {name}", content)
    if not pictures:
        raise DataError(
            f"{package.option}: {path}: holds no pictures below {prefix}, expected an archive of {package.name}"
        )
    digest = file_digest(path)
    version = package.version if digest == package.sha512 else "(archive by path, other than the pinned version)"
    record = {"from": f"npm {package.name} {version}", "sha512": digest, "license": package.license}
    return _Source(pictures, record, copyright_line, look)


def _opener(name: str, content: bytes) -> Callable[[], Image.Image]:
    return lambda: decode_picture(content, name, MAX_SOURCE_PIXELS)


def _font_source(path: Path, emoji: list[_Emoji]) -> _Source:
    """Glyphs of a colour bitmap font; an emoji counts as drawn where the font has one glyph for all its code points."""
    content = path.read_bytes()
    if content.startswith(DEB_MAGIC):
        content = read_deb_member(path, "--font", "/NotoColorEmoji.ttf")
    try:
        font = ImageFont.truetype(io.BytesIO(content), NOTO_FONT_SIZE)
    except (OSError, ValueError) as problem:
        raise DataError(f"--font: {path}: not a font with bitmaps of {NOTO_FONT_SIZE} pixels ({problem})") from problem
    smiling = _glyph(font, "\N{GRINNING FACE}")
    if smiling is None or len(smiling.convert("RGB").getcolors(2**16) or ()) < 3:
        raise DataError(f"--font: {path}: draws no emoji in colour, expected NotoColorEmoji.ttf with bitmaps (CBDT)")
    pictures: dict[str, Callable[[], Image.Image]] = {}
    for one in emoji:
        glyph = _glyph(font, one.emoji)
        if glyph is not None:
            pictures[_key(one.hexcode)] = glyph.copy
    record = {"from": f"font {path.name}", "sha512": file_digest(path), "license": "OFL-1.1"}
    return _Source(pictures, record, "Copyright Google LLC (Noto Color Emoji)", "flat icon")


def _glyph(font: ImageFont.FreeTypeFont, text: str) -> Image.Image | None:
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


def _render(
    emoji: list[_Emoji], source: _Source, size: int, progress: bool
) -> tuple[list[_Emoji], list[bytes], list[bool], list[tuple[str, str]], list[str]]:
    """Kept emoji, their PNG files, whether each stands apart from all others, and what was left out and why."""
    drawn: list[_Emoji] = []
    encoded: list[bytes] = []
    same_captions: list[str] = []
    captions: set[str] = set()
    compared = np.empty((len(emoji), COMPARED_SIZE * COMPARED_SIZE * 3), dtype=np.float32)
    for one in tqdm(emoji, desc=f"draw {source.look}s", disable=not progress):
        if one.label.casefold() in captions:
            same_captions.append(one.label)
            continue
        captions.add(one.label.casefold())
        picture = pad_to_square(on_white(source.pictures[_key(one.hexcode)]()))
        compared[len(drawn)] = np.asarray(scale(picture, COMPARED_SIZE), dtype=np.float32).reshape(-1)
        buffer = io.BytesIO()
        scale(picture, size).save(buffer, format="PNG", optimize=True)
        encoded.append(buffer.getvalue())
        drawn.append(one)

    distance = _distances(compared[: len(drawn)])  # (N, N)
    kept: list[int] = []
    same_pictures: list[tuple[str, str]] = []
    for index in sorted(range(len(drawn)), key=lambda index: (drawn[index].label in BORROWED_FLAGS, index)):
        one = drawn[index]
        if kept and distance[index, kept].min() < SAME_PICTURE:
            same_pictures.append((one.label, drawn[kept[int(distance[index, kept].argmin())]].label))
        else:
            kept.append(index)
    kept.sort()
    nearest = distance[np.ix_(kept, kept)].min(axis=1)
    distinct = [bool(one >= DISTINCT_PICTURE) for one in nearest]
    return [drawn[index] for index in kept], [encoded[index] for index in kept], distinct, same_pictures, same_captions


def _distances(pictures: np.ndarray) -> np.ndarray:
    """Root mean square difference of each two of (N, P) values from 0 to 255: (N, N), infinite on the diagonal."""
    below_white = pictures - 255.0  # mostly zeros, which keeps the sums small and so exact enough in single precision
    squares = (below_white * below_white).sum(axis=1)
    squared = squares[:, None] + squares[None, :] - 2 * (below_white @ below_white.T)
    distance = np.sqrt(np.maximum(squared, 0) / pictures.shape[1])
    np.fill_diagonal(distance, np.inf)
    return distance


# ---- what is written beside the pictures -------------------------------------------------------------------------


def _row(one: _Emoji, look: str) -> dict[str, Any]:
    ascii_label = unicodedata.normalize("NFKD", one.label).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "-", ascii_label.replace("'", "")).strip("-")[:60].strip("-") or "emoji"
    return {
        "file_name": f"{slug}-{one.hexcode.lower()}.png",
        "text": one.label,
        "captions": wordings(one.label, one.tags, look),
        "tags": list(one.tags),
        "emoji": one.emoji,
        "hexcode": one.hexcode,
        "group": one.group,
    }


def _licence_text(name: str) -> str:
    return (files("hubgen.data") / "licenses" / f"{name}.txt").read_text(encoding="utf-8")


def _licence(source: _Source, names_licence: str) -> str:
    rule = "\n" + "=" * 80 + "\n\n"
    return (
        f"The pictures come from {source.record['from']}, under the {source.record['license']} licence:\n\n"
        f"{source.licence}\n\n{_licence_text(source.record['license'])}{rule}"
        "The names, tags and groups come from npm emojibase-data, which derives them from the Unicode CLDR\n"
        f"(https://www.unicode.org/license.txt), under this licence:\n\n{names_licence.strip()}\n"
    )


def _card(build: EmojiBuild, settings: dict[str, Any], source: _Source) -> str:
    left_out = "".join(f"- {left_out} (as {kept})\n" for left_out, kept in build.same_pictures) or "- none\n"
    sources = "".join(f"- {source}\n" for source in build.sources)
    return f"""---
license: {source.record["license"].lower()}
task_categories:
- text-to-image
language:
- en
pretty_name: Emoji with captions ({build.style}, {build.size} pixels)
size_categories:
- {"n<1K" if build.train + build.held_out < 1000 else "1K<n<10K"}
---
# Emoji with captions: {build.style}, {build.size}×{build.size}

{build.train} training pictures (`train`) and {build.held_out} pictures with held-out captions (`test`): RGB on white,
one emoji each, without variants by skin tone. `text` is the English CLDR name, `captions` are several wordings of it.

```python
from datasets import load_dataset

emoji = load_dataset("imagefolder", data_dir="PATH OF THIS FOLDER")
```

Sources (licences in `LICENSE`):
{sources}
Each held-out caption combines words that also occur in at least two training captions. The captions were chosen with
seed {settings["seed"]}; country flags, keys, lettered buttons and signs that names do not describe were not eligible.

Left out as (nearly) identical pictures, below a root mean square difference of {SAME_PICTURE:g} of 255 at 64×64:
{left_out}
{len(build.same_captions)} repeated captions were left out; {build.not_in_source} named emoji are not in the source.
"""
