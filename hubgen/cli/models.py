"""The model that the command line names: where it is, what it is made of, and its networks without their weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BUNDLED = "bundled"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
ADAPTABLE = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
"""Components that adapters may be put on"""
BACKBONES = ADAPTABLE[:2]


def find_model(model: str, option: str = "--model", single_files: bool = True) -> Path | None:
    """The folder or single file of a model, or None if it is on the Hub.

    Args:
        model: As the command line names it.
        option: Of the command line, for messages.
        single_files: Whether it may be a single .safetensors file.

    Raises:
        ValueError: It is neither a pipeline folder, nor a safetensors file, nor of the form owner/name.
    """
    if model == BUNDLED:
        from hubgen.hub.bundled import bundled_model

        return bundled_model()
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ValueError(f"{option} {model}: not a pipeline folder, it holds no model_index.json")
        try:
            index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{option} {model}: its model_index.json is not JSON ({error})") from error
        if not isinstance(index, dict) or "_class_name" not in index:
            raise ValueError(f"{option} {model}: its model_index.json names no pipeline (`_class_name`)")
        return folder
    if single_files and folder.suffix == ".safetensors" and folder.is_file():
        return folder
    if folder.exists():
        kinds = ", a .safetensors file or" if single_files else " or"
        raise ValueError(f"{option} {model}: is a file, expected a pipeline folder{kinds} owner/name on the Hub")
    if not HUB_ID.fullmatch(model):
        raise ValueError(f"{option} {model}: no such folder; expected a pipeline folder or owner/name on the Hub")
    return None


def read_index(model: str, revision: str | None, folder: Path | None, option: str = "--model") -> dict[str, Any]:
    """The `model_index.json` of a folder, or of a repository on the Hub; of a single file what it would say."""
    if folder is not None and folder.is_file():
        return {"_class_name": "TextToImagePipeline"}
    if folder is None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            path = hf_hub_download(model, "model_index.json", revision=revision)
        except RepositoryNotFoundError as error:
            raise ValueError(
                f"{option} {model}: not found: here is no folder of that name; on the Hub there is no such repository, "
                "or it is private and needs a login (`hf auth login`)"
            ) from error
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{option} {model}: does not load: no folder of that name here, and from the Hub: {error}"
            ) from error
        folder = Path(path).parent
    from hubgen.hub.carried_code import as_installed

    return as_installed(json.loads((folder / "model_index.json").read_text(encoding="utf-8")))


def config_file(model: str, revision: str | None, folder: Path | None, part: str) -> Path | None:
    """The config of a part of a model; None where there is none."""
    if folder is not None:
        path = folder / part / "config.json"
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(model, f"{part}/config.json", revision=revision))
    except (EntryNotFoundError, OSError):
        return None


def without_weights(cls: Any, config: Path) -> Any:
    """A network of this config whose parameters have no storage.

    Args:
        cls: Of hubgen, diffusers or transformers.
        config: The file; what it asks for that the class refuses is the loader's to report.
    """
    import torch

    from hubgen.diffusers_contract import no_init_weights

    of_transformers = getattr(cls, "config_class", None)
    values = None if of_transformers else json.loads(config.read_text(encoding="utf-8"))
    with torch.device("meta"), no_init_weights():
        if of_transformers:
            return cls(of_transformers.from_pretrained(str(config.parent)))
        return cls.from_config(values)


def bare_parts(
    index: Mapping[str, Any],
    model: str,
    revision: str | None,
    folder: Path | None,
    names: tuple[str, ...] = ADAPTABLE,
    option: str = "--model",
) -> dict[str, Any]:
    """Networks of a pipeline by their configs alone, without weights; those that adapters may be put on by default.

    Args:
        index: Its `model_index.json`.
        model: As the command line names it.
        revision: Of a repository.
        folder: Where it is, if it is here.
        names: Of the components; those that the pipeline lacks, or has without a config, are left out.
        option: Of the command line, for messages.

    Raises:
        ValueError: A class is not known, or no network can be made of a config.
    """
    import hubgen
    from hubgen.errors import one_line
    from hubgen.formats.folders import is_component
    from hubgen.hub.native import require_class

    found = {}
    for part in names:
        if not is_component(index.get(part)):
            continue
        library, name = index[part]
        path = config_file(model, revision, folder, part)
        if path is None:
            continue
        ours = library in ("hubgen", "diffusers") and name in hubgen.HOMES
        cls = getattr(hubgen, name) if ours else require_class(library, name, where=f"{option} {model}: `{part}`")
        try:
            found[part] = without_weights(cls, path)
        except Exception as error:  # classes and libraries fail in their own ways on damaged configs
            raise ValueError(f"{option} {model}: no {name} can be made of {path}: {one_line(error)}") from error
    return found


def is_text_to_image(index: Mapping[str, Any]) -> bool:
    """Whether a pipeline draws prompts, as the bases of adapters do."""
    import hubgen

    return index["_class_name"] in ("TextToImagePipeline", *hubgen.TextToImagePipeline.reads)


def bare_pipeline(
    index: Mapping[str, Any], model: str, revision: str | None, folder: Path | None, option: str = "--model"
) -> Any:
    """A text-to-image pipeline whose networks have no weights: what sizes it makes, and what a call does by default.

    Args:
        index: Its `model_index.json`.
        model: As the command line names it.
        revision: Of a repository.
        folder: Where it is, if it is here.
        option: Of the command line, for messages.

    Raises:
        ValueError: It draws no prompts, parts are missing, or no network can be made of a config.
    """
    import inspect

    import hubgen

    if not is_text_to_image(index):
        raise ValueError(f"{option} {model}: is a {index['_class_name']}, expected a pipeline that draws prompts")
    cls = hubgen.TextToImagePipeline
    ours = cls.with_our_classes(index)
    parts = bare_parts(ours, model, revision, folder, (*ADAPTABLE, "vae"), option)
    if "vae" not in parts or len(parts.keys() & set(BACKBONES)) != 1:
        raise ValueError(f"{option} {model}: has the parts {', '.join(parts)}, expected a vae and one backbone")
    known = inspect.signature(cls).parameters
    values = {name: value for name, value in ours.items() if name in known and not isinstance(value, list | tuple)}
    needed = dict.fromkeys(("text_encoder", "tokenizer", "scheduler"))
    return cls(**{**needed, **values, **parts, "requires_safety_checker": False})
