"""The emoji data set: an image-text folder built from package archives or a font.

Style "fluent": Fluent 3D emoji (Microsoft, MIT) from npm `@lobehub/fluent-emoji-3d`. Style "noto": Noto Color Emoji
(Google) from npm `emoji-datasource-google`, or drawn from the font by path. Names, tags and groups are the English CLDR
annotations in npm `emojibase-data`. Variants by skin tone are left out.

The folder, loadable with `datasets.load_dataset("imagefolder", data_dir=...)`:

    train/*.png  train/metadata.jsonl     rows: file_name, text, captions, tags, emoji, hexcode, group
    test/*.png   test/metadata.jsonl      the captions held out from training
    README.md  LICENSE  build.json        card; licences of pictures and names; what the folder was built from
"""

import importlib.util
import io
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from hubgen.checks import is_whole
from hubgen.data.emoji_captions import Candidate, choose_held_out, wordings
from hubgen.data.emoji_sources import (
    FLUENT,
    NAMES,
    NOTO,
    NOTO_PACKAGE_SIZE,
    SYSTEM_FONTS,
    Emoji,
    EmojiSource,
    given_packages,
    key_of,
    open_source,
    read_names,
    record_of,
)
from hubgen.data.emoji_variants import (
    COMPARED_SIDE,
    RULES,
    SAME_PICTURE,
    VARIANTS,
    Material,
    Variant,
    compared,
    hold_out_combinations,
    packages_of,
    variants_of,
)
from hubgen.data.errors import DataError
from hubgen.data.packages import NpmPackage, fetch
from hubgen.data.pictures import on_white, pad_to_square, scale
from hubgen.formats.atomic import TEMPORARY, sweep, written
from hubgen.formats.digests import file_digest

STYLES = ("fluent", "noto")
TRAIN, VALIDATION, HELD_OUT = "train", "validation", "test"  # folder names that `datasets` recognises as splits
MARKER = "build.json"
FORMAT = 1  # of the folder: raised when the same inputs would give other files

DISTINCT_PICTURE = 12.0
"""A picture can be held out only where no other is nearer, in the measure of `SAME_PICTURE`"""

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


@dataclass(frozen=True)
class EmojiBuild:
    """What `build_emoji_dataset` made or found: `str()` gives the lines to show to a user."""

    path: Path
    style: str
    size: int
    train: int
    held_out: int
    validation: int
    variants: Mapping[str, int]
    """how many pictures of each kind are among those for training"""
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
            *([f"{self.validation} pictures for validation"] if self.validation else []),
            *(f"{count} of the training pictures are {kind}" for kind, count in self.variants.items()),
            f"left out: {len(self.same_pictures)} (nearly) identical pictures, {len(self.same_captions)} repeated "
            f"captions, {self.not_in_source} emoji that the source does not draw",
        ]
        return "\n".join(lines + [f"from {source}" for source in self.sources])


def build_emoji_dataset(
    style: str,
    size: int,
    output_dir: str | os.PathLike[str],
    *,
    archive: str | os.PathLike[str] | None = None,
    names_archive: str | os.PathLike[str] | None = None,
    font: str | os.PathLike[str] | None = None,
    variants: Sequence[str] = (),
    more_archives: Sequence[str | os.PathLike[str]] = (),
    seed: int = 0,
    held_out: int = 110,
    validation: int = 0,
    progress: bool = True,
) -> EmojiBuild:
    """Build the image-text folder `output_dir` of `size`×`size` emoji; the same arguments give the same files.

    `archive` and `names_archive` take the npm archives of pictures and names by path, `font` a colour bitmap font
    (NotoColorEmoji.ttf, style "noto" only); what is not given is downloaded once and kept in the cache. `held_out` is
    the number of captions in the test split, chosen by `seed` (`choose_held_out`); with 0 there is no such split.
    `validation` is likewise that of a split to choose by, so that the test split judges what was chosen.

    `variants` are further pictures of the training split (`hubgen.data.emoji_variants`); rows say which in "variant",
    and the colour that a picture was turned to in "colour". Of recoloured ones some combinations of colour and thing
    are held out in each other split. `more_archives` takes the archives of their packages by path.

    Every file is written beside its name and renamed, the metadata after the pictures and `build.json` last: an
    interrupted build is finished by the same call, and a finished folder is recognised. Raises `DataError` for an
    unusable option, archive or font, where a download fails, and where `output_dir` holds anything else.
    """
    _check_options(style, size, seed, held_out, archive, font)
    _check_variants(style, variants, more_archives, validation)
    output = Path(output_dir)
    settings = _settings(style, size, seed, held_out, archive, names_archive, font)
    settings |= {"variants": list(variants), "validation": validation} if variants or validation else {}
    wanted = packages_of(variants)
    given = given_packages(wanted, more_archives)
    if wanted:
        digests = {one.name: file_digest(given[one], "sha512") if one in given else one.sha512 for one in wanted}
        settings["packages_sha512"] = digests
    finished = _check_folder(output, settings)
    if finished is not None:
        return finished

    names_path = Path(names_archive) if names_archive is not None else fetch(NAMES, progress)
    emoji, names_licence, names_version = read_names(names_path)
    source = open_source(style, archive, font, emoji, progress)
    present = [one for one in emoji if key_of(one.hexcode) in source.pictures]
    if not present:
        raise DataError(f"{source.record['from']}: holds no picture that the names know, expected an emoji package")

    packages = {package: given.get(package) or fetch(package, progress) for package in wanted}

    output.mkdir(parents=True, exist_ok=True)
    _write(output / MARKER, _json({"finished": False, "settings": settings}))
    counts = {TRAIN: len(present), VALIDATION: validation, HELD_OUT: held_out}
    splits = [split for split, count in counts.items() if count]
    for split in splits:
        (output / split).mkdir(exist_ok=True)
        sweep(output / split)

    kept, pictures, distinct, same_pictures, same_captions = _render(present, source, size, progress)
    candidates = [Candidate(one.label, one.subgroup, far) for one, far in zip(kept, distinct, strict=True)]
    split_of = dict.fromkeys(choose_held_out(candidates, held_out, seed), HELD_OUT)
    others = [index for index in range(len(kept)) if index not in split_of]
    chosen = choose_held_out([candidates[index] for index in others], validation, seed + 1)
    split_of |= {others[number]: VALIDATION for number in chosen}

    rows: dict[str, list[dict[str, Any]]] = {split: [] for split in splits}
    bar = tqdm(enumerate(zip(kept, pictures, strict=True)), total=len(kept), desc="write", disable=not progress)
    for index, (one, picture) in bar:
        split = split_of.get(index, TRAIN)
        row = _row(one, source.look) | (ORIGINAL if variants else {})
        _write(output / split / row["file_name"], picture, durable=False)
        rows[split].append(row)
    if variants:
        opened = [Image.open(io.BytesIO(picture)) for picture in pictures]
        material = Material(
            train=[(one, opened[index]) for index, one in enumerate(kept) if index not in split_of],
            held=[opened[index] for index in split_of],
            labels=[one.label for one in emoji],
            look=source.look,
            packages=packages,
            progress=progress,
        )
        for split, found in _variants(variants, material, [one for one in splits if one != TRAIN], held_out, seed):
            row = _variant_row(found, source.look)
            _write(output / split / row["file_name"], encoded(found.picture), durable=False)
            rows[split].append(row)

    record = {
        "finished": True,
        "settings": settings,
        "language": "en",
        "sources": [
            source.record,
            {"from": f"npm emojibase-data {names_version}", "sha512": file_digest(names_path, "sha512")},
            *(record_of(package, path) for package, path in packages.items()),
        ],
        "rows": {split: len(rows[split]) for split in rows},
        "same_pictures": same_pictures,
        "same_captions": same_captions,
        "not_in_source": len(emoji) - len(present),
        "variants": {kind: sum(row["variant"] == kind for row in rows[TRAIN]) for kind in variants},
    }
    build = _build_of(output, record, already_built=False)
    _write(output / "LICENSE", _licence(source, names_licence, packages).encode())
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


def _check_variants(style: str, variants: Sequence[str], archives: Sequence[Any], validation: int) -> None:
    unknown = sorted(set(variants) - set(VARIANTS))
    if unknown or len(set(variants)) < len(variants):
        raise DataError(f"`variants`: got {', '.join(variants)}, expected some of {', '.join(VARIANTS)}, each once")
    if style != "fluent" and packages_of(variants):
        raise DataError(f"`variants`: got {', '.join(variants)} with style {style!r}, expected mirrored or recoloured")
    if "flat" in variants and importlib.util.find_spec("resvg_py") is None:
        raise DataError("`variants`: flat needs resvg-py, which draws SVG: pip install 'hubgen[emoji]'")
    for path in archives:
        if not Path(path).is_file():
            raise DataError(f"more_archives: {path}: no such file")
    if not is_whole(validation, 0, 10**6):
        raise DataError(f"`validation`: got {validation!r}, expected an integer from 0 to {10**6}")


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
        "pictures_sha512": pinned.sha512 if pictures is None else file_digest(Path(pictures), "sha512"),
        "names_sha512": NAMES.sha512 if names is None else file_digest(Path(names), "sha512"),
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
        validation=record["rows"].get(VALIDATION, 0),
        variants=record.get("variants", {}),
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


# ---- pictures ----------------------------------------------------------------------------------------------------


def _render(
    emoji: list[Emoji], source: EmojiSource, size: int, progress: bool
) -> tuple[list[Emoji], list[bytes], list[bool], list[tuple[str, str]], list[str]]:
    """Kept emoji, their PNG files, whether each stands apart from all others, and what was left out and why."""
    drawn: list[Emoji] = []
    files: list[bytes] = []
    same_captions: list[str] = []
    captions: set[str] = set()
    values = np.empty((len(emoji), 3 * COMPARED_SIDE**2), dtype=np.float32)
    for one in tqdm(emoji, desc=f"draw {source.look}s", disable=not progress):
        if one.label.casefold() in captions:
            same_captions.append(one.label)
            continue
        captions.add(one.label.casefold())
        picture = pad_to_square(on_white(source.pictures[key_of(one.hexcode)]()))
        values[len(drawn)] = compared(picture)
        files.append(encoded(scale(picture, size)))
        drawn.append(one)

    distance = _distances(values[: len(drawn)])  # (N, N)
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
    return [drawn[index] for index in kept], [files[index] for index in kept], distinct, same_pictures, same_captions


def encoded(picture: Image.Image) -> bytes:
    """A picture as a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _variants(
    kinds: Sequence[str], material: Material, others: Sequence[str], count: int, seed: int
) -> Iterator[tuple[str, Variant]]:
    """All variants with the split that each belongs to.

    Args:
        kinds: Which.
        material: What they are made of.
        others: The splits beside that for training.
        count: Of the combinations that each of them holds out.
        seed: Of the choice.
    """
    for kind in kinds:
        found = variants_of(kind, material)
        if kind != "recoloured":
            yield from ((TRAIN, one) for one in found)
            continue
        by_emoji: dict[str, list[Variant]] = {}
        for one in found:
            by_emoji.setdefault(one.emoji.hexcode, []).append(one)
        held = hold_out_combinations(list(by_emoji.values()), count, len(others), seed)
        split_of = {one.file_stem: split for split, some in zip(others, held, strict=True) for one in some}
        for some in by_emoji.values():
            yield from ((split_of.get(one.file_stem, TRAIN), one) for one in some)


def _distances(pictures: np.ndarray) -> np.ndarray:
    """Root mean square difference of each two of (N, P) values from 0 to 255: (N, N), infinite on the diagonal."""
    below_white = pictures - 255.0  # mostly zeros, which keeps the sums small and so exact enough in single precision
    squares = (below_white * below_white).sum(axis=1)
    squared = squares[:, None] + squares[None, :] - 2 * (below_white @ below_white.T)
    distance = np.sqrt(np.maximum(squared, 0) / pictures.shape[1])
    np.fill_diagonal(distance, np.inf)
    return distance


# ---- what is written beside the pictures -------------------------------------------------------------------------


ORIGINAL = {"variant": "", "colour": None}
"""Columns of a picture as it is drawn, in folders with variants"""


def _variant_row(one: Variant, look: str) -> dict[str, Any]:
    row = _row(one.emoji, look)
    captions = list(one.captions or row["captions"])
    name = f"{row['file_name'].removesuffix('.png')}-{one.name}.png"
    return {**row, "file_name": name, "text": one.text, "captions": captions, "variant": one.kind, "colour": one.colour}


def _row(one: Emoji, look: str) -> dict[str, Any]:
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


def _variants_told(build: EmojiBuild) -> str:
    """What the card says of variants and of the split to choose by; empty where there are none."""
    told = [f"\n`validation` has {build.validation} further pictures, to choose by.\n"] if build.validation else []
    if build.variants:
        lines = "".join(f"- {count} {kind}: {RULES[kind]}\n" for kind, count in build.variants.items())
        told.append(
            "\nOf the training pictures, as the column `variant` says (empty: the emoji as it is drawn):\n\n"
            f"{lines}\nEmoji of the other splits have none, and a variant that looks like one of them is left out. "
            "Some combinations of colour and thing are in the other splits alone (`colour` names the colour).\n"
        )
    return "".join(told)


def _licence_text(name: str) -> str:
    return (files("hubgen.data") / "licenses" / f"{name}.txt").read_text(encoding="utf-8")


def _licence(source: EmojiSource, names_licence: str, packages: Iterable[NpmPackage]) -> str:
    rule = "\n" + "=" * 80 + "\n\n"
    names = [package.name for package in packages]
    beside = f"Frames and flat pictures come from npm {', '.join(names)}, under the same.{rule}" if names else ""
    return (
        f"The pictures come from {source.record['from']}, under the {source.record['license']} licence:\n\n"
        f"{source.licence}\n\n{_licence_text(source.record['license'])}{rule}{beside}"
        "The names, tags and groups come from npm emojibase-data, which derives them from the Unicode CLDR\n"
        f"(https://www.unicode.org/license.txt), under this licence:\n\n{names_licence.strip()}\n"
    )


def _card(build: EmojiBuild, settings: dict[str, Any], source: EmojiSource) -> str:
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
{_variants_told(build)}
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
