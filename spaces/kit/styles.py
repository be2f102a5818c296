"""Adapters that visitors may put on the model: those that whoever started the page named, and no others."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubgen.hub.added import Added, asked_loras, check_loras
from hubgen.hub.provenance import UsedLora
from hubgen.spaces.kit.limits import Limits, Refused, checked_number

LARGEST_WEIGHT = 2.0
VAGUE = (
    *("pytorch_lora_weights", "adapter_model", "lora", "adapter", "model"),
    *("controlnet", "diffusion_pytorch_model", "ip_adapter", "ip-adapter"),
)
"""Names of files and folders that say nothing about what is in them"""


@dataclass(frozen=True)
class Style:
    """One of them."""

    name: str
    added: Added[UsedLora]


@dataclass(frozen=True)
class Worn:
    """A style, and how much it counts in one request."""

    style: Style
    weight: float


def find_styles(named: Sequence[str], parts: Mapping[str, Any] | None = None) -> list[Style]:
    """The adapters in the files, folders and repositories that were named, each checked to be for the model.

    Args:
        named: By whoever starts the page.
        parts: Networks of the model, without weights; `None` where that is not to be checked.

    Raises:
        ValueError: One is nowhere, holds none, is damaged, or is for another model.
    """
    files = [file for name in named for file in files_of(name)]
    added = asked_loras([(file, 1.0) for file in files], "HUBGEN_ADAPTERS")
    if parts is not None:
        check_loras(added, parts)
    styles: list[Style] = []
    for one in added:
        name, taken = name_of(one.used.file, one.path), {style.name for style in styles}
        number = next(n for n in range(1, len(added) + 1) if (name if n == 1 else f"{name} {n}") not in taken)
        styles.append(Style(name if number == 1 else f"{name} {number}", one))
    return styles


def files_of(name: str) -> list[str]:
    """A folder with several adapters, or several folders with one, is all of them."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return [name]
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return [str(folder)]
    found = found or sorted(one for one in folder.iterdir() if one.is_dir() and any(one.glob("*.safetensors")))
    return [str(one) for one in found] or [name]


def name_of(file: str, path: Path) -> str:
    """What visitors call it: the last part of its name that says something."""
    parts = [part for part in (*Path(file).parts, path.stem) if part not in ("/", ".", "..")]
    told = [part.removesuffix(".safetensors") for part in reversed(dict.fromkeys(parts))]
    return next((part for part in told if part.lower() not in VAGUE), told[0])


def checked_styles(value: Any, styles: Sequence[Style], limits: Limits) -> tuple[Worn, ...]:
    """What a request asks for, `{name: weight}`; weights of 0 are left out.

    Raises:
        Refused: A name is none of theirs, or a weight no number.
    """
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise Refused('Styles are names with weights, such as {"watercolour": 0.8}.')
    known = {style.name: style for style in styles}
    unknown = [name for name in value if name not in known]
    if unknown:
        there = ", ".join(known) or "none"
        raise Refused(f"There is no style of that name here; there are: {there}.")
    worn = [
        Worn(known[name], checked_number("The weight of a style", weight, -LARGEST_WEIGHT, LARGEST_WEIGHT))
        for name, weight in value.items()
    ]
    worn = [one for one in worn if one.weight]
    if len(worn) > limits.styles:
        raise Refused(f"{len(worn)} styles at once are too many; choose at most {limits.styles}.")
    return tuple(worn)


@contextmanager
def wearing(pipe: Any, worn: Sequence[Worn]) -> Iterator[None]:
    """The pipeline with these adapters on it inside; afterwards it is as it was, to the last bit."""
    names = [f"style_{number}" for number in range(len(worn))]
    try:
        for name, one in zip(names, worn, strict=True):
            pipe.load_lora_weights(str(one.style.added.path), adapter_name=name)
        if names:
            pipe.set_adapters(names, [one.weight for one in worn])
        yield
    finally:
        if names:
            pipe.unload_lora_weights()
