"""Adapters that the command line names by --lora: found, checked against a model before that is loaded, put on it."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hubgen.cli.messages import say
from hubgen.cli.models import HUB_ID
from hubgen.hub.provenance import UsedLora

WEB = ("http://", "https://")
NO_LORA = [("none", 1.0)]
"""What --lora none is read as"""


@dataclasses.dataclass(frozen=True)
class Lora:
    """An adapter that was found."""

    used: UsedLora
    path: Path
    """Of its safetensors file"""
    told: str = ""
    """What messages say before its name: where it is from, if not from the command line"""

    def error(self, problem: object) -> ValueError:
        """The error that says what is wrong with it."""
        text = str(problem).removeprefix(f"{self.path}: ")
        return ValueError(f"{self.told}--lora {self.used.file}: {text}")


def is_local(file: str) -> bool:
    """Whether a name of --lora is that of a file or folder here."""
    return Path(file).expanduser().exists()


def stay_offline(files: Sequence[str]) -> None:
    """Keeps the Hub's libraries off the network where all files are here; they read it at their first import alone."""
    if all(map(is_local, files)):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


def find_loras(asked: Sequence[tuple[str, float]]) -> list[Lora]:
    """The files that --lora names, with weights, in their order.

    Raises:
        ValueError: One is nowhere, or it is a pickle or damaged.
    """
    found = []
    for file, weight in asked:
        path = find_lora(file)
        revision = None if is_local(file) else snapshot_of(path)
        found.append(Lora(UsedLora(file, weight, sha256_of(path), revision), path))
    return found


def find_again(used: Sequence[UsedLora], told: str) -> list[Lora]:
    """The files that a picture was drawn with.

    Args:
        used: As its settings name them.
        told: What messages say before them.

    Raises:
        ValueError: One is nowhere, or is another than it was.
    """
    found = []
    for one in used:
        lora = Lora(one, find_lora(one.file, one.revision, told), told)
        digest = sha256_of(lora.path)
        if digest != one.sha256:
            raise lora.error(
                f"got a file with the sha256 {digest}, expected {one.sha256}, that of the one that the picture was "
                "drawn with; --lora FILE takes another"
            )
        found.append(lora)
    return found


def find_lora(file: str, revision: str | None = None, told: str = "") -> Path:
    """The safetensors file that a name means.

    Args:
        file: A file, a folder with one, its address on the Hub, owner/name, or owner/name/FILE.
        revision: Of a repository.
        told: What messages say before its name.

    Raises:
        ValueError: There is none, it is a pickle or it is damaged.
    """
    from hubgen.formats.headers import PICKLED, read_header

    path, name = Path(file).expanduser(), f"{told}--lora {file}"
    repo, inside = "/".join(file.split("/")[:2]), "/".join(file.split("/")[2:])
    in_repo = bool(HUB_ID.fullmatch(repo)) and (inside or repo).endswith(".safetensors") == bool(inside)
    on_hub = file.startswith(WEB) or in_repo
    if not path.exists() and (not on_hub or file.endswith(PICKLED)):
        raise ValueError(
            f"{name}: no such file, expected a .safetensors file, a folder with one, or owner/name on the Hub"
        )
    try:
        if not path.is_file():  # imports the libraries of adapters, which take a while
            from hubgen.adaptation.locate import find_adapter

            if path.is_dir():
                path = find_adapter(path, None, None, {})
            elif file.startswith(WEB):
                path = find_adapter(file, None, None, {})
            else:
                path = find_adapter(repo, inside or None, None, {"revision": revision})
        if not read_header(path):
            raise ValueError("holds no tensors, expected those of an adapter")
    except (OSError, ValueError) as error:
        from hubgen.errors import one_line

        where = "" if is_local(file) else "no such file here, and from the Hub: "
        text = one_line(error).removeprefix(f"{path}: ").removeprefix(f"{file}: ")
        raise ValueError(f"{name}: {where}{text.replace('`weight_name`', f'{file}/FILE')}") from error
    return path


def snapshot_of(path: Path) -> str | None:
    """The commit of a file in the Hub's cache."""
    parts = path.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts[:-2] else None


def sha256_of(path: Path) -> str:
    """Of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_loras(loras: Sequence[Lora], parts: Mapping[str, Any]) -> None:
    """Raises ValueError for an adapter that is for other models, or damaged, before the weights of a model are read.

    Args:
        loras: Each of them.
        parts: Networks of the model, without weights.
    """
    from hubgen.adaptation.describe import base_of
    from hubgen.adaptation.locate import load_adapter
    from hubgen.adaptation.lora_files import read_adapter

    for lora in loras:
        try:
            tensors, header = load_adapter(lora.path)
            read_adapter(tensors, header, parts)
        except NotImplementedError:  # it takes the weights to say what it comes to: magnitudes of the inputs
            continue
        except ValueError as error:
            base = base_of(lora.path)
            raise lora.error(f"looks like an adapter for {base}, and {error}" if base else error) from error


def put_on(pipe: Any, loras: Sequence[Lora]) -> None:
    """Loads adapters onto a pipeline with their weights, and says how many tensors went where."""
    names = [f"lora_{number}" for number in range(1, len(loras) + 1)]
    for name, lora in zip(names, loras, strict=True):
        try:
            found = pipe.load_lora_weights(os.fspath(lora.path), adapter_name=name)
        except ValueError as error:
            raise lora.error(error) from error
        say(f"{lora.used.file}, weight {lora.used.weight:g}: {found}")
    if names:
        pipe.set_adapters(names, [lora.used.weight for lora in loras])
