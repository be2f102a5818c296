"""Networks of a pipeline by their configs alone, without weights: what it is, before gigabytes are read for it."""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hubgen.diffusers_contract import no_init_weights
from hubgen.errors import one_line
from hubgen.formats.folders import is_component
from hubgen.hub.classes import require_class
from hubgen.hub.finding import config_file

ADAPTABLE = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
"""Components that adapters may be put on"""
BACKBONES = ADAPTABLE[:2]


def without_weights(cls: Any, config: Path) -> Any:
    """A network of this config whose parameters have no storage.

    Args:
        cls: Of hubgen, diffusers or transformers.
        config: The file; what it asks for that the class refuses is the loader's to report.
    """
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
    argument: str = "model",
) -> dict[str, Any]:
    """Networks of a pipeline, without weights; those that adapters may be put on by default.

    Args:
        index: Its `model_index.json`.
        model: Its name.
        revision: Of a repository.
        folder: Where it is, if it is here.
        names: Of the components; those that the pipeline lacks, or has without a config, are left out.
        argument: What messages call the name.

    Raises:
        ValueError: A class is not known, or no network can be made of a config.
    """
    homes = importlib.import_module("hubgen").HOMES
    found = {}
    for part in names:
        if not is_component(index.get(part)):
            continue
        library, name = index[part]
        path = config_file(model, revision, folder, part)
        if path is None:
            continue
        ours = library in ("hubgen", "diffusers") and name in homes
        cls = require_class("hubgen" if ours else library, name, where=f"{argument} {model}: `{part}`")
        try:
            found[part] = without_weights(cls, path)
        except Exception as error:  # classes and libraries fail in their own ways on damaged configs
            raise ValueError(f"{argument} {model}: no {name} can be made of {path}: {one_line(error)}") from error
    return found
