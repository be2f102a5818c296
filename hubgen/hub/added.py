"""Files that are put on a model beside its own, adapters and learned words: found, and checked before it loads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from hubgen.formats.digests import file_digest
from hubgen.hub.finding import HUB_ID
from hubgen.hub.provenance import UsedEmbedding, UsedFile, UsedLora

WEB = ("http://", "https://")
HOLDS = {"lora": "those of an adapter", "embedding": "learned words"}
"""What the files of each kind hold, for messages"""
Used = TypeVar("Used", bound=UsedFile)


@dataclasses.dataclass(frozen=True)
class Added(Generic[Used]):
    """A file that was found."""

    used: Used
    path: Path
    """Of its safetensors file"""
    shown: str
    """What messages call it"""

    def error(self, problem: object) -> ValueError:
        """The error that says what is wrong with it."""
        text = str(problem).removeprefix(f"{self.path}: ")
        return ValueError(f"{self.shown}: {text}")


def is_local(file: str) -> bool:
    """Whether a name is that of a file or folder here."""
    return Path(file).expanduser().exists()


def asked_loras(asked: Sequence[tuple[str, float]], argument: str = "lora") -> list[Added[UsedLora]]:
    """Adapters by name, with their weights, in their order.

    Args:
        asked: Names, as of `find_added`, and weights.
        argument: What messages call a name.

    Raises:
        ValueError: One is nowhere, or it is a pickle or damaged.
    """
    return [
        found("lora", file, argument, lambda marks, w=weight: UsedLora(weight=w, **marks)) for file, weight in asked
    ]


def asked_embeddings(
    asked: Sequence[tuple[str, str | None]], argument: str = "embedding"
) -> list[Added[UsedEmbedding]]:
    """Learned words by the names of their files, with what prompts are to call them; see `asked_loras`."""
    return [
        found("embedding", file, argument, lambda marks, w=word: UsedEmbedding(word=w, **marks)) for file, word in asked
    ]


def found(kind: str, file: str, argument: str, used: Callable[[dict[str, Any]], Used]) -> Added[Used]:
    """A file by its name, and what tells it from others of that name."""
    shown = f"{argument} {file}"
    path = find_added(kind, file, shown=shown)
    revision = None if is_local(file) else snapshot_of(path)
    return Added(used({"file": file, "sha256": file_digest(path), "revision": revision}), path, shown)


def find_added(kind: str, file: str, revision: str | None = None, shown: str | None = None) -> Path:
    """The safetensors file that a name means.

    Args:
        kind: lora or embedding.
        file: A file, a folder with one, its address on the Hub, owner/name, or owner/name/FILE.
        revision: Of a repository.
        shown: What messages call it; its name if not given.

    Raises:
        ValueError: There is none, it is a pickle or it is damaged.
    """
    from hubgen.formats.headers import PICKLED, read_header

    path, shown = Path(file).expanduser(), shown or file
    repo, inside = "/".join(file.split("/")[:2]), "/".join(file.split("/")[2:])
    in_repo = bool(HUB_ID.fullmatch(repo)) and (inside or repo).endswith(".safetensors") == bool(inside)
    on_hub = file.startswith(WEB) or in_repo
    if not path.exists() and (not on_hub or file.endswith(PICKLED)):
        raise ValueError(
            f"{shown}: no such file, expected a .safetensors file, a folder with one, or owner/name on the Hub"
        )
    try:
        if not path.is_file():
            look = finder(kind)
            if path.is_dir():
                path = look(path, None, None, {})
            elif file.startswith(WEB):
                path = look(file, None, None, {})
            else:
                path = look(repo, inside or None, None, {"revision": revision})
        if not read_header(path):
            raise ValueError(f"holds no tensors, expected {HOLDS[kind]}")
    except (OSError, ValueError) as error:
        from hubgen.errors import one_line

        where = "" if is_local(file) else "no such file here, and from the Hub: "
        text = one_line(error).removeprefix(f"{path}: ").removeprefix(f"{file}: ")
        raise ValueError(f"{shown}: {where}{text.replace('`weight_name`', f'{file}/FILE')}") from error
    return path


def finder(kind: str) -> Callable[..., Path]:
    """What finds the file in a folder or repository; its libraries take a while to import."""
    if kind == "lora":
        from hubgen.adaptation.locate import find_adapter

        return find_adapter
    from hubgen.adaptation.textual_inversion import find_embeddings

    return find_embeddings


def snapshot_of(path: Path) -> str | None:
    """The commit of a file in the Hub's cache."""
    parts = path.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts[:-2] else None


def check_loras(loras: Sequence[Added[UsedLora]], parts: Mapping[str, Any]) -> None:
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


def words_of(added: Added[UsedEmbedding]) -> list[str]:
    """What prompts call the words of a file.

    Raises:
        ValueError: It holds no learned words, or they cannot have that name.
    """
    from hubgen.adaptation.textual_inversion import read_words

    try:
        words = read_words(added.path, None if added.used.word is None else [added.used.word])
    except ValueError as error:
        raise added.error(error) from error
    return list(dict.fromkeys(word.token for word in words))
