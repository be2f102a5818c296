"""A pipeline by its name: the bundled one, a folder, a single file, or a repository on the Hub.

    folder = find_model("runs/my-model")            # None: it is on the Hub
    index = read_index("runs/my-model", None, folder)

Light, so that a mistaken name is told before anything heavy is imported.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from hubgen.hub.bundled import bundled_model

BUNDLED = "bundled"
"""The name of the model that comes with the package"""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def find_model(model: str, argument: str = "model", single_files: bool = True) -> Path | None:
    """The folder or single file of a model, or None if it is on the Hub.

    Args:
        model: Its name: `BUNDLED`, a folder or file, or owner/name.
        argument: What messages call that name.
        single_files: Whether it may be a single .safetensors file.

    Raises:
        ValueError: It is neither a pipeline folder, nor a safetensors file, nor of the form owner/name.
    """
    if model == BUNDLED:
        return bundled_model()
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ValueError(f"{argument} {model}: not a pipeline folder, it holds no model_index.json")
        try:
            index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{argument} {model}: its model_index.json is not JSON ({error})") from error
        if not isinstance(index, dict) or "_class_name" not in index:
            raise ValueError(f"{argument} {model}: its model_index.json names no pipeline (`_class_name`)")
        return folder
    if single_files and folder.suffix == ".safetensors" and folder.is_file():
        return folder
    if folder.exists():
        kinds = ", a .safetensors file or" if single_files else " or"
        raise ValueError(f"{argument} {model}: is a file, expected a pipeline folder{kinds} owner/name on the Hub")
    if not HUB_ID.fullmatch(model):
        raise ValueError(f"{argument} {model}: no such folder; expected a pipeline folder or owner/name on the Hub")
    return None


def read_index(model: str, revision: str | None, folder: Path | None, argument: str = "model") -> dict[str, Any]:
    """The `model_index.json` of a folder, or of a repository on the Hub; of a single file what it would say.

    Args:
        model: Its name.
        revision: Of a repository.
        folder: What `find_model` found.
        argument: What messages call the name.

    Raises:
        ValueError: There is no such repository, or it has no index that can be had.
    """
    if folder is not None and folder.is_file():
        return {"_class_name": "TextToImagePipeline"}
    if folder is None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            path = hf_hub_download(model, "model_index.json", revision=revision)
        except RepositoryNotFoundError as error:
            raise ValueError(
                f"{argument} {model}: not found: here is no folder of that name; on the Hub there is no such "
                "repository, or it is private and needs a login (`hf auth login`)"
            ) from error
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{argument} {model}: does not load: no folder of that name here, and from the Hub: {error}"
            ) from error
        folder = Path(path).parent
    from hubgen.hub.carried_code import as_installed

    return as_installed(json.loads((folder / "model_index.json").read_text(encoding="utf-8")))


def config_file(model: str, revision: str | None, folder: Path | None, part: str) -> Path | None:
    """The config of a part of a pipeline; None where there is none. See `read_index`."""
    if folder is not None:
        path = folder / part / "config.json"
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(model, f"{part}/config.json", revision=revision))
    except (EntryNotFoundError, OSError):
        return None


def loaded_commit(model: str, revision: str | None = None) -> str | None:
    """The commit of the Hub's files that were just loaded, so that a picture can be repeated after the branch moved.

    Args:
        model: owner/name.
        revision: As it was asked for; returned where the cache does not tell.
    """
    from huggingface_hub import try_to_load_from_cache

    index = try_to_load_from_cache(model, "model_index.json", revision=revision)
    return Path(index).parent.name if isinstance(index, str) else revision
