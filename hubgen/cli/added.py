"""Files that the command line puts on a model, by --lora and --embedding: found, checked, put on it."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from hubgen.cli.messages import say
from hubgen.cli.models import HUB_ID
from hubgen.hub.provenance import UsedEmbedding, UsedFile, UsedLora

WEB = ("http://", "https://")
NONE = "none"
"""What --lora and --embedding say beside --from where there shall be none"""
HOLDS = {"lora": "those of an adapter", "embedding": "learned words"}
"""What the files of each option hold, for messages"""
Used = TypeVar("Used", bound=UsedFile)


@dataclasses.dataclass(frozen=True)
class Added(Generic[Used]):
    """A file that was found."""

    used: Used
    path: Path
    """Of its safetensors file"""
    told: str = ""
    """What messages say before its name: where it is from, if not from the command line"""

    def error(self, problem: object) -> ValueError:
        """The error that says what is wrong with it."""
        text = str(problem).removeprefix(f"{self.path}: ")
        return ValueError(f"{self.told}--{self.used.option} {self.used.file}: {text}")


def is_local(file: str) -> bool:
    """Whether a name on the command line is that of a file or folder here."""
    return Path(file).expanduser().exists()


def stay_offline(files: Sequence[str]) -> None:
    """Keeps the Hub's libraries off the network where all files are here; they read it at their first import alone."""
    if all(map(is_local, files)):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


def asked_or_used(asked: Sequence[Any] | None, used: Sequence[Used] | None) -> tuple[Sequence[Any], Sequence[Used]]:
    """What an option names, and what the picture to repeat was drawn with: the one where it is given, else the other.

    Args:
        asked: Names with what stands behind them; `None` where the option is not given.
        used: As the picture's settings say.
    """
    if asked is None:
        return (), used or ()
    return () if asked[0][0] == NONE else asked, ()


def asked_loras(asked: Sequence[tuple[str, float]]) -> list[Added[UsedLora]]:
    """The files that --lora names, with weights, in their order.

    Raises:
        ValueError: One is nowhere, or it is a pickle or damaged.
    """
    return [found("lora", file, lambda marks, w=weight: UsedLora(weight=w, **marks)) for file, weight in asked]


def asked_embeddings(asked: Sequence[tuple[str, str | None]]) -> list[Added[UsedEmbedding]]:
    """The files that --embedding names, with the words that they are to be, in their order; see `asked_loras`."""
    return [found("embedding", file, lambda marks, w=word: UsedEmbedding(word=w, **marks)) for file, word in asked]


def found(option: str, file: str, used: Callable[[dict[str, Any]], Used]) -> Added[Used]:
    """A file of the command line, and what tells it from others of its name."""
    path = find_added(option, file)
    revision = None if is_local(file) else snapshot_of(path)
    return Added(used({"file": file, "sha256": sha256_of(path), "revision": revision}), path)


def find_again(used: Sequence[Used], told: str) -> list[Added[Used]]:
    """The files that a picture was drawn with.

    Args:
        used: As its settings name them.
        told: What messages say before them.

    Raises:
        ValueError: One is nowhere, or is another than it was.
    """
    again = []
    for one in used:
        added = Added(one, find_added(one.option, one.file, one.revision, told), told)
        digest = sha256_of(added.path)
        if digest != one.sha256:
            raise added.error(
                f"got a file with the sha256 {digest}, expected {one.sha256}, that of the one that the picture was "
                f"drawn with; --{one.option} FILE takes another"
            )
        again.append(added)
    return again


def find_added(option: str, file: str, revision: str | None = None, told: str = "") -> Path:
    """The safetensors file that a name means.

    Args:
        option: lora or embedding.
        file: A file, a folder with one, its address on the Hub, owner/name, or owner/name/FILE.
        revision: Of a repository.
        told: What messages say before its name.

    Raises:
        ValueError: There is none, it is a pickle or it is damaged.
    """
    from hubgen.formats.headers import PICKLED, read_header

    path, name = Path(file).expanduser(), f"{told}--{option} {file}"
    repo, inside = "/".join(file.split("/")[:2]), "/".join(file.split("/")[2:])
    in_repo = bool(HUB_ID.fullmatch(repo)) and (inside or repo).endswith(".safetensors") == bool(inside)
    on_hub = file.startswith(WEB) or in_repo
    if not path.exists() and (not on_hub or file.endswith(PICKLED)):
        raise ValueError(
            f"{name}: no such file, expected a .safetensors file, a folder with one, or owner/name on the Hub"
        )
    try:
        if not path.is_file():
            look = finder(option)
            if path.is_dir():
                path = look(path, None, None, {})
            elif file.startswith(WEB):
                path = look(file, None, None, {})
            else:
                path = look(repo, inside or None, None, {"revision": revision})
        if not read_header(path):
            raise ValueError(f"holds no tensors, expected {HOLDS[option]}")
    except (OSError, ValueError) as error:
        from hubgen.errors import one_line

        where = "" if is_local(file) else "no such file here, and from the Hub: "
        text = one_line(error).removeprefix(f"{path}: ").removeprefix(f"{file}: ")
        raise ValueError(f"{name}: {where}{text.replace('`weight_name`', f'{file}/FILE')}") from error
    return path


def finder(option: str) -> Callable[..., Path]:
    """What finds the file in a folder or repository; its libraries take a while to import."""
    if option == "lora":
        from hubgen.adaptation.locate import find_adapter

        return find_adapter
    from hubgen.adaptation.textual_inversion import find_embeddings

    return find_embeddings


def snapshot_of(path: Path) -> str | None:
    """The commit of a file in the Hub's cache."""
    parts = path.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts[:-2] else None


def sha256_of(path: Path) -> str:
    """Of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def put_on(pipe: Any, loras: Sequence[Added[UsedLora]], embeddings: Sequence[Added[UsedEmbedding]]) -> None:
    """Loads adapters with their weights and learned words onto a pipeline, and says what went where."""
    names = [f"lora_{number}" for number in range(1, len(loras) + 1)]
    for name, lora in zip(names, loras, strict=True):
        try:
            report = pipe.load_lora_weights(os.fspath(lora.path), adapter_name=name)
        except ValueError as error:
            raise lora.error(error) from error
        say(f"{lora.used.file}, weight {lora.used.weight:g}: {report}")
    if names:
        pipe.set_adapters(names, [lora.used.weight for lora in loras])
    for one in embeddings:
        try:
            pipe.load_textual_inversion(os.fspath(one.path), token=one.used.word)
        except ValueError as error:
            raise one.error(error) from error
        say(f"{one.used.file}: the word {', '.join(words_of(one))}")
