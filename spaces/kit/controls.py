"""Networks that visitors may steer by: those that whoever started the page named, the model's own, and no others.

A ControlNet or a T2I-adapter is shown a hint of a picture, such as its edges; an IP-Adapter or FLUX.1 Redux the picture
itself.
"""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from hubgen.controls.net_kinds import kind_of
from hubgen.controls.opening import CONFIGS, OWN, check_name, control_of, load_control, sees_pictures
from hubgen.data.errors import DataError
from hubgen.data.hints import hint_of
from hubgen.errors import one_line
from hubgen.spaces.kit.limits import Limits, Refused, checked_number
from hubgen.spaces.kit.styles import name_of

VARIABLE = "HUBGEN_CONTROLS"
OWN_NAME = "the model's own"
HINTS: Mapping[str, str] = {
    "canny": "Edges",
    "color": "Colours",
    "grey": "Brightness",
    "blur": "Blur",
    "none": "It is a hint already",
}
"""By kind, what visitors read"""


@dataclass(frozen=True)
class Offered:
    """A network of the page."""

    name: str
    """What visitors read"""
    file: str
    """As it was named"""
    sees_pictures: bool
    """Whether it is shown the picture itself, and no hint of it: an IP-Adapter, or Redux"""


@dataclass(frozen=True, eq=False)
class Steering:
    """What one of them does in a drawing."""

    offered: Offered
    shown: Image.Image
    """RGB; of a hint the size of the drawing"""
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0


def find_controls(named: Sequence[str], index: Mapping[str, Any], own: Any = None) -> list[Offered]:
    """The networks in the files, folders and repositories that were named, with the model's own first if it has one.

    Args:
        named: By whoever starts the page.
        index: The `model_index.json` of the model.
        own: The model's ControlNet, without weights. One that asks for more than a picture is left out.

    Raises:
        ValueError: One is nowhere, or is none; no weights are read.
    """
    files = [*([OWN] if needs_a_picture_alone(own) else []), *(file for name in named for file in files_of(name))]
    found: list[Offered] = []
    for file in files:
        with told_of(file):
            check_name(file, index)
            looks = sees_pictures(file)
        name, taken = OWN_NAME if file == OWN else name_of(file, Path(file).expanduser()), {one.name for one in found}
        number = next(n for n in range(1, len(files) + 1) if (name if n == 1 else f"{name} {n}") not in taken)
        found.append(Offered(name if number == 1 else f"{name} {number}", file, looks))
    return found


def needs_a_picture_alone(net: Any) -> bool:
    """Whether there is a network that can be asked with a picture, and no mask and no mode."""
    if net is None:
        return False
    kind = kind_of(net)
    return not kind.masked and not (kind.modes and kind.is_union)


def files_of(name: str) -> list[str]:
    """A folder that is no network's is all of those in it."""
    folder = Path(name).expanduser()
    if not folder.is_dir() or has_config(folder):
        return [name]
    found = [one for one in folder.iterdir() if one.suffix in (".safetensors", ".bin") or has_config(one)]
    return [str(one) for one in sorted(found)] or [name]


def has_config(folder: Path) -> bool:
    """Whether it is the folder of one control."""
    return any((folder / file).is_file() for file in CONFIGS)


def load_controls(offered: Sequence[Offered], pipe: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Reads their weights, by name, and draws one step with each, which finds out what does not fit the model.

    Args:
        offered: Checked.
        pipe: The model.
        size: (height, width) that it draws.

    Raises:
        ValueError: One cannot be loaded, or is for another model.
    """
    loaded = {}
    blank = Image.new("RGB", size[::-1], "grey")
    for one in offered:
        with told_of(one.file):
            loaded[one.name] = load_control(one.file, pipe)
            controls = [control_of(loaded[one.name], blank)]
            pipe("warm", num_inference_steps=1, height=size[0], width=size[1], controls=controls)
    return loaded


@contextmanager
def told_of(file: str) -> Iterator[None]:
    """Errors inside name the variable, or the option, by which the page was given a network."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(f"{VARIABLE} {file}: {one_line(error).removeprefix(f'{file}: ')}") from error


def hint_kinds() -> dict[str, str]:
    """Those of `HINTS` that can be made here: edges need OpenCV."""
    without = () if importlib.util.find_spec("cv2") is not None else ("canny",)
    return {kind: label for kind, label in HINTS.items() if kind not in without}


def made_hint(picture: Image.Image, kind: Any) -> Image.Image:
    """What a network is shown of an RGB picture.

    Raises:
        Refused: There is no such hint here.
    """
    if not isinstance(kind, str) or kind not in hint_kinds():
        raise Refused(f"There is no hint of that kind here; there are: {', '.join(hint_kinds())}.")
    if kind == "none":
        return picture
    try:
        return hint_of(picture, kind)
    except DataError:
        raise Refused("A hint of that kind cannot be made here; choose another.") from None


def checked_steering(
    offered: Sequence[Offered], name: Any, shown: Image.Image, scale: Any, start: Any, end: Any, limits: Limits
) -> Steering:
    """What a request asks for, each value checked; a `name` of `None` is the first one's.

    Raises:
        Refused: The name is none of theirs, or a number is out of its range.
    """
    known = {one.name: one for one in offered}
    if not known:
        raise Refused("There is no network of that kind here, so that a picture cannot steer.")
    if name is not None and (not isinstance(name, str) or name not in known):
        raise Refused(f"There is no network of that name here; there are: {', '.join(known)}.")
    begins, ends = (checked_number(f"Its {place}", share, 0, 1) for place, share in (("start", start), ("end", end)))
    if begins >= ends:
        raise Refused("It ends before it has begun; the end comes after the start.")
    strength = checked_number("Its strength", scale, 0, limits.control)
    return Steering(offered[0] if name is None else known[name], shown, strength, begins, ends)
