"""What a picture says about itself: the request that made it, in a PNG's text chunk, and back.

The chunk is named `hubgen` and holds JSON: `request`, the fields of `Request`, and `versions`, those of the libraries
that decide the numbers in a picture. `Description` (the prompts) and `Software` stand beside it for other programs.
"""

from __future__ import annotations

import dataclasses
import json
import re
from functools import cache
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hubgen.checks import is_number, is_whole
from hubgen.formats.atomic import written

if TYPE_CHECKING:
    from PIL import Image

METADATA_KEY = "hubgen"
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
DTYPES = ("float32", "float16", "bfloat16")
LARGEST_SIDE = 8192  # pixels; above it a typing error is likelier than a wish
LARGEST_SEED = 2**63 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class UsedFile:
    """A file that was put on the model for a picture."""

    option: ClassVar[str]
    """Of the command line, which names it"""
    file: str
    """Its file, a folder with it, or owner/name on the Hub"""
    sha256: str
    """Of its file, in hexadecimal"""
    revision: str | None = None
    """The commit of a repository on the Hub"""

    @classmethod
    def is_valid(cls, value: Any) -> bool:
        """Whether a stored value has these fields, each of its type."""
        if not isinstance(value, dict) or value.keys() != {field.name for field in dataclasses.fields(cls)}:
            return False
        texts = isinstance(value["file"], str) and isinstance(value["sha256"], str)
        commit = value["revision"] is None or isinstance(value["revision"], str)
        return texts and commit and bool(re.fullmatch("[0-9a-f]{64}", value["sha256"]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class UsedLora(UsedFile):
    """An adapter that a picture was drawn with."""

    option = "lora"
    weight: float
    """How much it counts; 1 as it was trained"""

    @classmethod
    def is_valid(cls, value: Any) -> bool:
        """See `UsedFile`."""
        return super().is_valid(value) and is_number(value["weight"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class UsedEmbedding(UsedFile):
    """A learned word that a picture was drawn with (textual inversion)."""

    option = "embedding"
    word: str | None
    """What prompts call it; the file's own name for it if `None`"""

    @classmethod
    def is_valid(cls, value: Any) -> bool:
        """See `UsedFile`."""
        return super().is_valid(value) and (value["word"] is None or isinstance(value["word"], str))


@dataclasses.dataclass(frozen=True, kw_only=True)
class UsedControl:
    """A control that steered a picture."""

    net: str
    """Folder, file or owner/name of a ControlNet, T2I-adapter or IP-Adapter; `model` for the model's own"""
    image: str
    """File that it was shown"""
    scale: float
    start: float
    end: float

    @classmethod
    def is_valid(cls, value: Any) -> bool:
        """Whether a stored value has these fields, each of its type and range."""
        if not isinstance(value, dict) or value.keys() != {field.name for field in dataclasses.fields(cls)}:
            return False
        numbers = all(is_number(value[name]) for name in ("scale", "start", "end"))
        texts = isinstance(value["net"], str) and isinstance(value["image"], str)
        return texts and numbers and 0 <= value["start"] < value["end"] <= 1


USED: tuple[type[UsedFile], ...] = (UsedLora, UsedEmbedding)
"""Each is a field of `Request` by the name of its option"""


@dataclasses.dataclass(frozen=True)
class Request:
    """Everything that decides how a picture comes out.

    Before the model is loaded, None in a sampling setting stands for the model's own.
    """

    prompts: list[str]
    """None of them blank; none at all for a model that draws without."""
    negative_prompt: str | None
    n: int
    """Pictures of each prompt."""
    num_inference_steps: int | None
    guidance_scale: float | None
    seed: int
    """Picture j of each prompt starts from seed + j."""
    width: int | None
    """Pixels of one picture, not of the grid."""
    height: int | None
    model: str
    """`bundled`, a folder, or owner/name on the Hub."""
    revision: str | None
    """The commit of a model from the Hub."""
    device: str
    dtype: str
    batch_size: int
    """Pictures made at a time; other batches round differently."""
    image: str | None = None
    """File that the picture starts from; not a part of what is written."""
    mask: str | None = None
    """File that is white where `image` is drawn anew."""
    strength: float | None = None
    """How much of `image` is drawn over, above 0 and at most 1."""
    config: str | None = None
    """Folder or repository with what `model` lacks, where that is a single file."""
    lora: list[UsedLora] | None = None
    """Adapters on the model, in their order."""
    embedding: list[UsedEmbedding] | None = None
    """Learned words that its text encoders know, in their order."""
    control: list[UsedControl] | None = None
    """What else steers, in its order."""
    control_image: str | None = None
    """File of the hint that the model itself is shown, for models of hints."""
    image_guidance_scale: float | None = None
    """How near a picture stays to `image`, for models that edit."""


def versions() -> dict[str, str]:
    """The versions of what decides the numbers in a picture."""
    return {name: version_of(name) for name in ("hubgen", "torch", "diffusers", "transformers")}


@cache
def version_of(package: str) -> str:
    """Of an installed package; read once, because that takes as long as a step of a small model."""
    return installed_version(package)


def slug(prompt: str) -> str:
    """A file name of the prompt's letters and digits."""
    return re.sub(r"[\W_]+", "-", prompt.lower())[:60].strip("-") or "picture"


def write_picture(out: Path, picture: Image.Image, request: Request) -> None:
    """Write a picture; a PNG gets the request with it.

    It is written beside and renamed, so that there is never half a picture under the name.

    Raises:
        OSError: the folder does not take it, for example because the disk is full; nothing is left behind.
    """
    from PIL.PngImagePlugin import PngInfo

    options: dict[str, Any] = {}
    if out.suffix.lower() == ".png":
        content = {"versions": versions(), "request": dataclasses.asdict(request)}
        chunks = PngInfo()  # international text chunks, in UTF-8: prompts are in any language
        chunks.add_itxt(METADATA_KEY, json.dumps(content, ensure_ascii=False))
        chunks.add_itxt("Description", "\n".join(request.prompts))
        chunks.add_itxt("Software", f"hubgen {version_of('hubgen')}")
        options["pnginfo"] = chunks
    with written(out) as temporary:
        picture.save(temporary, format=FORMATS[out.suffix.lower()], **options)


def read_request(path: Path) -> tuple[Request, dict[str, str]]:
    """The request that made a picture, and the versions of the libraries that did.

    Raises:
        ValueError: the file is no picture, carries no request, or a damaged one; the message names it.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:  # the chunks stand before the pixels: nothing is decoded here
            text = picture.info.get(METADATA_KEY)
    except UnidentifiedImageError as error:
        raise ValueError(f"{path}: not a picture; expected a PNG that hubgen wrote") from error
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    if not isinstance(text, str):
        raise ValueError(f"{path}: carries no settings of hubgen; expected a PNG that `hubgen generate` wrote")
    try:
        content = json.loads(text)
        fields, made_with = dict(content["request"]), dict(content["versions"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: its settings are damaged and cannot be read") from error
    known = dataclasses.fields(Request)
    names = {field.name for field in known}
    needed = {field.name for field in known if field.default is dataclasses.MISSING}
    for problem, found in (("lack", needed - fields.keys()), ("have an unknown", fields.keys() - names)):
        if found:
            raise ValueError(f"{path}: its settings {problem} {', '.join(sorted(map(str, found)))}")
    for name, value in fields.items():
        if not is_valid(name, value):
            raise ValueError(f"{path}: its settings hold a bad {name}: {value!r}")
    for kind in USED:
        if fields.get(kind.option) is not None:
            fields[kind.option] = [kind(**one) for one in fields[kind.option]]
    if fields.get("control") is not None:
        fields["control"] = [UsedControl(**one) for one in fields["control"]]
    return Request(**fields), {str(name): str(number) for name, number in made_with.items()}


def is_valid(name: str, value: Any) -> bool:
    """Whether a stored setting has its type and range: a file is input like any other."""
    match name:
        case "prompts":
            return isinstance(value, list) and all(isinstance(prompt, str) for prompt in value)
        case "model" | "device":
            return isinstance(value, str)
        case "negative_prompt" | "revision" | "image" | "mask" | "config" | "control_image":
            return value is None or isinstance(value, str)
        case "lora" | "embedding":
            (kind,) = (one for one in USED if one.option == name)
            return value is None or (isinstance(value, list) and bool(value) and all(map(kind.is_valid, value)))
        case "control":
            return value is None or (isinstance(value, list) and bool(value) and all(map(UsedControl.is_valid, value)))
        case "dtype":
            return value in DTYPES
        case "guidance_scale" | "image_guidance_scale":
            return value is None or is_number(value)
        case "seed":
            return is_whole(value, 0, LARGEST_SEED)
        case "strength":
            return value is None or (is_number(value) and 0 < value <= 1)
        case "width" | "height":
            return value is None or is_whole(value, 1, LARGEST_SIDE)
        case "num_inference_steps":
            return value is None or is_whole(value)
        case _:
            return is_whole(value)
