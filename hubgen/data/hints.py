"""Hints of pictures, which ControlNets are shown: computed from the picture alone, without a network.

    hint_of(picture, "canny")                   edges, white on black (Canny 1986)
    hint_of(picture, "color", cells=8)          a coarse grid of its colours
    hint_of(picture, "grey")                    its brightness
    hint_of(picture, "blur", radius=4)          what is left without details

    write_hints(Path("data/fluent"), "canny", Path("data/fluent-canny"))

An image-text folder with hints has one more column, `conditioning_image`; `datasets` finds it too.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter
from tqdm.auto import tqdm

from hubgen.checks import is_number, is_whole
from hubgen.data.derived import begin, copy_licences, splits_of, write_table
from hubgen.data.errors import DataError
from hubgen.data.image_folder import ImageTextFolder
from hubgen.formats.atomic import written

COLUMN = "conditioning_image"
HINTS = "hints"
"""The folder of the hints, beside the pictures"""


def edges(picture: Image.Image, low: float = 100, high: float = 200) -> Image.Image:
    """Canny's edges, white on black.

    Args:
        picture: RGB.
        low: Strength from which an edge is followed, of 0 ... 1020 for 8 bits.
        high: Strength from which one begins.

    Raises:
        DataError: OpenCV is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise DataError('edges need OpenCV, expected it: pip install "hubgen[controls]"') from error
    found = cv2.Canny(np.asarray(picture), low, high)
    return Image.fromarray(found).convert("RGB")


def color_grid(picture: Image.Image, cells: int = 8) -> Image.Image:
    """The mean colours of `cells` x `cells` parts of a picture, in its size."""
    return picture.resize((cells, cells), Image.Resampling.BOX).resize(picture.size, Image.Resampling.NEAREST)


def grey(picture: Image.Image) -> Image.Image:
    """Its brightness, in three equal channels."""
    return picture.convert("L").convert("RGB")


def blurred(picture: Image.Image, radius: float = 4) -> Image.Image:
    """Smoothed by a Gaussian whose standard deviation is `radius` pixels."""
    return picture.filter(ImageFilter.GaussianBlur(radius))


KINDS: Mapping[str, tuple[Callable[..., Image.Image], tuple[str, ...]]] = {
    "canny": (edges, ("low", "high")),
    "color": (color_grid, ("cells",)),
    "grey": (grey, ()),
    "blur": (blurred, ("radius",)),
}
"""By name, with the options of each"""


def check_options(kind: str, options: Mapping[str, Any]) -> None:
    """Raises ValueError for an unknown kind, an option that it does not have, or a value out of its range."""
    if kind not in KINDS:
        raise ValueError(f"`kind`: got {kind!r}, expected one of {', '.join(KINDS)}.")
    known = KINDS[kind][1]
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"`{name}`: got {value!r}, expected none: {kind} has {', '.join(known) or 'no options'}.")
        if name == "cells" and not is_whole(value):
            raise ValueError(f"`cells`: got {value!r}, expected a whole number, at least 1.")
        if not is_number(value) or value < 0:
            raise ValueError(f"`{name}`: got {value!r}, expected a number, at least 0.")


def hint_of(picture: Image.Image, kind: str, **options: Any) -> Image.Image:
    """The hint of an RGB picture, RGB and of the same size; options are those of the kind (see above).

    Raises:
        ValueError: No such kind or option, or a value out of its range.
        DataError: What computes it is not installed.
    """
    check_options(kind, options)
    return KINDS[kind][0](picture, **options)


def write_hints(source: Path, kind: str, out: Path, **options: Any) -> int:
    """Copies an image-text folder with a hint beside each picture, all its splits; the metadata comes last.

    Args:
        source: The folder.
        kind: Of the hints.
        out: A folder that there is not yet, or what an interrupted run has left of it.
        options: Of the kind.

    Returns:
        The number of pictures.

    Raises:
        ValueError: See `hint_of`.
        DataError: `source` is no such folder, or `out` holds something else.
    """
    check_options(kind, options)
    hint_of(Image.new("RGB", (8, 8)), kind, **options)  # what computes it is there
    folders = splits_of(source)
    begin(out, {"hints": {"kind": kind, **options}}, "hints.json")
    copy_licences(source, out)
    return sum(_write_split(folder, kind, out / split, options) for split, folder in folders.items())


def _write_split(folder: ImageTextFolder, kind: str, out: Path, options: Mapping[str, Any]) -> int:
    """One split: pictures, hints, metadata."""
    rows = []
    for row, name in enumerate(tqdm(folder.file_names, desc=f"{kind} of {folder.folder.name}", leave=False)):
        hint = f"{HINTS}/{Path(name).with_suffix('.png').as_posix()}"
        for file in (name, hint):
            (out / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder.folder / name, out / name)
        with written(out / hint, durable=False) as temporary:
            hint_of(folder.picture(row), kind, **options).save(temporary, "PNG")
        captions = folder.captions[row]
        texts = {"text": captions[0], **({"captions": captions} if len(captions) > 1 else {})}
        rows.append({"file_name": name, **texts, f"{COLUMN}_file_name": hint})
    write_table(out, rows)
    return len(rows)
