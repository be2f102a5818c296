"""Folders to the Hub: what a folder is, which of its files are sent, and that it arrives whole.

    shipment = prepare("runs/cats/pipeline", "owner/cats")        # everything is checked, nothing is sent
    print(shipment)
    print(shipment.send())                                        # the address

A folder may be a pipeline, a captioner, a network, an adapter, an IP-Adapter (`ip-adapter*.safetensors`), a learned
word, a data set or a Space. Of each kind only the files are sent that it is known to need: what else lies there stays
here, and is said.
A pipeline that diffusers lacks is sent with its code (`hubgen.hub.carried_code`), also if the folder is without.
"""

import fnmatch
import json
import logging
import os
import random
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from hubgen.errors import one_line
from hubgen.formats.checkpoints import read_json
from hubgen.formats.folders import INDEX
from hubgen.hub.card import HERE, About, parts_of, pipeline_card, usage_of
from hubgen.hub.carried_code import as_carried, code_of
from hubgen.hub.licences import LICENCES

CARD = "README.md"
BESIDE = (CARD, "LICENSE*", "training.json", "*.png", "*.jpg")
"""What goes along with weights of any kind"""
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
DEADLINE = 600.0
"""Seconds within which a request that the Hub is too busy for is tried again"""
BUSY = (408, 429, 500, 502, 503, 504)
"""Answers that another attempt may not meet"""
LONGEST_PAUSE = 60.0
PLACES = ("_name_or_path", "base_model_name_or_path")
"""Settings of configs that may be folders of this machine, which are nobody's business"""
SHOWN = 40
"""Files that a list names"""
T = TypeVar("T")
logger = logging.getLogger(__name__)


class PublishError(ValueError):
    """A folder cannot be sent; the message says which, what was found and what was expected."""


@dataclass(frozen=True)
class Kind:
    """What a folder can be."""

    name: str
    repo_type: str
    """Of the repository: model, dataset or space"""
    mark: Callable[[Path], bool]
    """Whether a folder is one"""
    sent: tuple[str, ...]
    """Patterns of the files that it needs, by their paths below it; `*` goes across folders"""


def _has(pattern: str) -> Callable[[Path], bool]:
    return lambda folder: next(folder.glob(pattern), None) is not None


KINDS = (
    Kind(
        "pipeline",
        "model",
        _has("model_index.json"),
        ("model_index.json", "*/*.json", "*/*.txt", "*/*.model", "*/*.jinja", "*/*.py", "*.py", "*/*.safetensors"),
    ),
    Kind("adapter", "model", _has("pytorch_lora_weights.safetensors"), WEIGHTS),
    Kind("PEFT adapter", "model", _has("adapter_model.safetensors"), (*WEIGHTS, "adapter_config.json")),
    Kind("captioner", "model", _has("processor_config.json"), (*WEIGHTS, "*.json", "*.jinja", "*.model")),
    Kind("IP-Adapter", "model", _has("ip-adapter*.safetensors"), WEIGHTS),
    Kind("learned word", "model", _has("*embeds.safetensors"), WEIGHTS),
    Kind("network", "model", _has("config.json"), (*WEIGHTS, "config.json", "*.py")),
    Kind(
        "data set",
        "dataset",
        lambda folder: any(_has(pattern)(folder) for pattern in ("metadata.*", "*/metadata.*", "build.json")),
        ("*metadata.jsonl", "*metadata.csv", "*.parquet", "*.png", "*.jpg", "*.jpeg", "*.webp", "*.tar", "build.json"),
    ),
    Kind("Space", "space", _has("app.py"), ("*.py", "requirements.txt", "packages.txt", "*.css", "*.js", "*.webp")),
)


@dataclass(frozen=True)
class Shipment:
    """A folder that can be sent."""

    folder: Path
    repo_id: str
    kind: Kind
    files: Mapping[str, int]
    """Of what is sent: path below the folder, and bytes"""
    left: tuple[str, ...]
    """Files that stay here"""
    made: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    """Contents of those files that are sent otherwise than they are in the folder, or are not in it"""
    private: bool = False
    revision: str | None = None
    """Branch; the main one if not given"""
    create_pr: bool = False
    message: str = "Sent with hubgen"
    token: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        where = f"{self.repo_id}{'' if self.revision is None else f' at {self.revision}'}"
        how = "as a pull request, " if self.create_pr else ""
        lines = [f"{self.folder} ({self.kind.name}) {how}to the {self.kind.repo_type} repository {where}:"]
        lines += [f"  {size:>13,}  {name}" for name, size in list(self.files.items())[:SHOWN]]
        if len(self.files) > SHOWN:
            lines.append(f"  ... and {len(self.files) - SHOWN:,} more files")
        lines.append(f"  {sum(self.files.values()):>13,}  bytes in all ({len(self.files):,} files)")
        if self.left:
            more = f", and {len(self.left) - 8} more" if len(self.left) > 8 else ""
            lines.append(f"stays here: {', '.join(self.left[:8])}{more}")
        return "\n".join(lines)

    def content(self, name: str) -> bytes | Path:
        """What is sent as a file."""
        return self.made[name] if name in self.made else self.folder / name

    def send(self, deadline: float = DEADLINE) -> str:
        """Sends what the repository has not yet, in one commit; the repository's address.

        Large files that arrived before an interruption are not sent again.

        Args:
            deadline: Seconds within which a request that the Hub is too busy for is tried again.

        Raises:
            PublishError: There is no token, the Hub refuses it, or cannot be reached.
        """
        check_token(self.repo_id, self.token)
        api = HfApi(token=self.token)
        until = time.monotonic() + deadline
        where: dict[str, Any] = {"repo_id": self.repo_id, "repo_type": self.kind.repo_type}
        sdk: dict[str, Any] = {"space_sdk": card_metadata(self.folder)["sdk"]} if where["repo_type"] == "space" else {}
        try:
            url = patient(lambda: api.create_repo(**where, private=self.private, exist_ok=True, **sdk), until)
            if self.revision is not None:
                patient(lambda: api.create_branch(**where, branch=str(self.revision), exist_ok=True), until)
            options = {
                **where,
                "operations": [CommitOperationAdd(name, self.content(name)) for name in self.files],
                "commit_message": self.message,
                "revision": self.revision,
                "create_pr": self.create_pr,
            }
            commit = patient(lambda: api.create_commit(**options), until)
        except (HfHubHTTPError, OSError, RuntimeError) as error:
            raise PublishError(f"{self.repo_id}: the Hub did not take it: {one_line(error)}") from error
        return str(commit.pr_url or url)


def prepare(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    message: str = "Sent with hubgen",
    token: str | None = None,
    licence_needed: bool = True,
) -> Shipment:
    """Checks that a folder can be sent.

    Args:
        folder: A pipeline, a captioner, a network, an adapter, a learned word, a data set or a Space.
        repo_id: `owner/name`.
        private: Whether the repository is private, if it is made.
        revision: Branch, made if it is not there; the main one if not given.
        create_pr: Propose the change instead of making it.
        message: Of the commit.
        token: Of the Hub; that of `hf auth login` if not given.
        licence_needed: Whether a card must be there, with a licence.

    Raises:
        PublishError: The name is none that the Hub takes, the folder is none of these, or its card lacks a licence that
            the Hub knows.
    """
    check_name(repo_id)
    path = Path(folder)
    if not path.is_dir():
        raise PublishError(f"{path}: no such folder, expected {', '.join(kind.name for kind in KINDS)}.")
    kind = next((one for one in KINDS if one.mark(path)), None)
    if kind is None:
        raise PublishError(f"{path}: is none of {', '.join(one.name for one in KINDS)}.")
    metadata = card_metadata(path) if licence_needed or (path / CARD).is_file() else {}
    if licence_needed or "license" in metadata:
        check_licence(metadata, str(path / CARD))
    if kind.repo_type == "space" and metadata.get("sdk") not in ("gradio", "static", "docker"):
        raise PublishError(f"{path / CARD}: got `sdk` {metadata.get('sdk')!r}, expected gradio, static or docker.")
    found = {name: (path / name).stat().st_size for name in files_below(path)}
    files = {name: size for name, size in found.items() if is_sent(name, kind)}
    made = portable(path, files, repo_id)
    files = dict(sorted({**files, **{name: len(content) for name, content in made.items()}}.items()))
    if kind.repo_type == "model" and not any(name.endswith(".safetensors") for name in files):
        raise PublishError(f"{path}: a {kind.name} without weights, expected .safetensors files.")
    left = tuple(name for name in found if name not in files)
    return Shipment(path, repo_id, kind, files, left, made, private, revision, create_pr, message, token)


def portable(folder: Path, files: Collection[str], repo_id: str) -> dict[str, bytes]:
    """Files that cannot be sent as they are: a pipeline without the code that it needs, configs with places of here.

    Args:
        folder: That is sent.
        files: Paths below it.
        repo_id: Where to, which the card's examples load.

    Returns:
        Contents by path.
    """
    made: dict[str, bytes] = {}
    if CARD in files and HERE in (card := (folder / CARD).read_text(encoding="utf-8")):
        made[CARD] = card.replace(HERE, repo_id).encode()
    for name in files:
        if name.endswith("config.json"):
            config = read_json(folder / name)
            here = [key for key in PLACES if Path(str(config.get(key) or "")).is_absolute()]
            if here:
                made[name] = as_json({key: value for key, value in config.items() if key not in here})
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        if isinstance(index.get("_class_name"), str):
            read, code = as_carried(index, lambda name: component_config(folder / name))
            if code:
                made[INDEX] = as_json(read)
                made.update({name: code_of(cls).encode() for name, cls in code.items()})
    return made


def component_config(folder: Path) -> dict[str, Any]:
    """The config of a model or a scheduler."""
    name = next((one for one in ("config.json", "scheduler_config.json") if (folder / one).is_file()), "config.json")
    return read_json(folder / name)


def as_json(values: Mapping[str, Any]) -> bytes:
    """A config or an index as files have it."""
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


def send_pipeline(
    pipeline: Any,
    repo_id: str,
    saving: Mapping[str, Any],
    *,
    licence: str | None,
    summary: str | None,
    **options: Any,
) -> str:
    """Saves a pipeline and sends it; the repository's address.

    Args:
        pipeline: Of hubgen's.
        repo_id: `owner/name`, or the name alone for a repository of the token's owner.
        saving: Further arguments of `save_pretrained`.
        licence: For a card, where the repository has none.
        summary: First paragraph of that card.
        options: See `prepare`.

    Raises:
        PublishError: See `prepare` and `Shipment.send`.
    """
    token = options.get("token")
    check_token(repo_id, token)
    if licence is not None:
        check_licence({"license": licence}, "`license`")
    if "/" not in repo_id:
        try:
            repo_id = f"{HfApi(token=token).whoami()['name']}/{repo_id}"
        except (HfHubHTTPError, OSError) as error:
            raise PublishError(f"{repo_id}: the Hub does not tell whose token this is: {one_line(error)}") from error
    check_name(repo_id)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pipeline.save_pretrained(folder, **saving)
        card = card_of(repo_id, token)
        if card is None:
            about = About(
                title=repo_id.partition("/")[2],
                summary=summary or "A pipeline of hubgen's.",
                repo=repo_id,
                licence=licence,
            )
            native = pipeline.native_index() is not None
            card = pipeline_card(about, parts_of(pipeline), {}, usage=usage_of(pipeline), native=native)
            if licence is None:
                logger.warning("%s: its card names no licence: push_to_hub(..., license='apache-2.0') does.", repo_id)
        (folder / CARD).write_text(card, encoding="utf-8")
        return prepare(folder, repo_id, licence_needed=False, **options).send()


def card_of(repo_id: str, token: str | None) -> str | None:
    """The card that a repository has; `None` where there is none.

    Raises:
        PublishError: The Hub cannot be asked.
    """
    try:
        path = HfApi(token=token).hf_hub_download(repo_id, CARD)
    except (EntryNotFoundError, RepositoryNotFoundError):
        return None
    except (HfHubHTTPError, OSError) as error:
        raise PublishError(f"{repo_id}: the Hub does not tell whether it has a card: {one_line(error)}") from error
    return Path(path).read_text(encoding="utf-8")


def check_name(repo_id: str) -> None:
    """Raises PublishError unless it is `owner/name`, as the Hub takes it."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PublishError(f"repository {repo_id!r}: {one_line(error)}") from error
    if repo_id.count("/") != 1:
        raise PublishError(f"repository {repo_id!r}: expected owner/name.")


def check_token(repo_id: str, token: str | None = None) -> None:
    """Raises PublishError where there is no token to send with."""
    if (token or get_token()) is None:
        raise PublishError(f"repository {repo_id}: no token of the Hub here; `hf auth login`, or HF_TOKEN, gives one.")


def check_licence(metadata: Mapping[str, Any], card: str) -> None:
    """Raises PublishError unless a card, which messages call so, names a licence as the Hub does."""
    found = metadata.get("license")
    names = found if isinstance(found, list) else [found]
    if found is None or not names:
        raise PublishError(f"{card}: names no licence, expected `license: apache-2.0` or another in its metadata.")
    unknown = [str(name) for name in names if name not in LICENCES]
    if unknown:
        raise PublishError(f"{card}: got the licence {unknown[0]!r}, expected one that the Hub knows, or other.")
    if "other" in names and not metadata.get("license_name"):
        raise PublishError(f"{card}: got the licence other without `license_name`, expected it and `license_link`.")


def card_metadata(folder: Path) -> dict[str, Any]:
    """The metadata at the head of a folder's card.

    Raises:
        PublishError: There is no card, or its head is no YAML.
    """
    card = folder / CARD
    if not card.is_file():
        raise PublishError(f"{folder}: holds no {CARD}, expected a card with its licence.")
    text = card.read_text(encoding="utf-8")
    if not text.startswith("---\n") or "\n---" not in text[4:]:
        return {}
    try:
        found = yaml.safe_load(text[4 : text.index("\n---", 3)])
    except yaml.YAMLError as error:
        raise PublishError(f"{card}: its metadata are not YAML: {one_line(error)}") from error
    return found if isinstance(found, dict) else {}


def files_below(folder: Path) -> Iterator[str]:
    """The files in a folder and its folders, in order; nothing hidden, and nothing that a link leads out to."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and not hidden and path.resolve().is_relative_to(folder.resolve()):
            yield name.as_posix()


def is_sent(name: str, kind: Kind) -> bool:
    """Whether a file is one of those that a kind needs."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in (*kind.sent, *BESIDE)) and "__pycache__" not in name


def patient(call: Callable[[], T], until: float) -> T:
    """Makes a request again, with growing pauses, while the Hub is too busy for it.

    Args:
        call: The request.
        until: When to give up, as `time.monotonic` counts.
    """
    pause = 1.0
    while True:
        try:
            return call()
        except HfHubHTTPError as error:
            response = error.response
            if response is None or response.status_code not in BUSY:
                raise
            asked = response.headers.get("Retry-After", "")
            wait = float(asked) if asked.isdecimal() else pause * random.uniform(0.5, 1.0)
            if time.monotonic() + wait > until:
                raise
            time.sleep(wait)
            pause = min(2 * pause, LONGEST_PAUSE)
