"""A pipeline's folder, checked as a whole before its first component loads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hubgen.formats.checkpoints import (
    DIFFUSERS_STEM,
    TRANSFORMERS_STEM,
    index_names,
    read_checkpoint,
    read_json,
    weights_name,
)
from hubgen.formats.headers import PICKLED
from hubgen.formats.loading import CONFIG, StrictModelMixin

INDEX = "model_index.json"


def is_component(value: object) -> bool:
    """Whether a value of an index is `[library, class]`."""
    return isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(part, str) for part in value)


def check_pipeline_folder(
    folder: Path, classes: Mapping[str, type | None], variant: str | None = None, **options: Any
) -> None:
    """Checks every component of a pipeline that has weights, from headers alone: nothing is loaded or allocated.

    A component of ours is checked as by its own `from_pretrained`. Of a text encoder, whose class belongs to
    transformers, the files are checked: whole, safetensors, shards within the folder.

    Args:
        folder: With model_index.json.
        classes: Component -> the class that is to load it; None, or leaving it out, for a component that is handed
            over ready-made or not wanted, which is not looked at.
        variant: Of the weights; a component without such files loads its plain ones, as in diffusers.
        options: As of `StrictModelMixin.check_pretrained`.

    Raises:
        FileNotFoundError: A component's folder, config or weights are missing.
        ValueError: As of `StrictModelMixin.from_pretrained`; the message names the file.
    """
    for name, cls in classes.items():
        if cls is None:
            continue
        part = folder / name
        if not part.is_dir() and (folder / getattr(cls, "config_name", name)).is_file():
            part = folder  # the first pipelines on the Hub have all files at the top, google/ddpm-cifar10-32 for one
        if not part.is_dir():
            listed = read_json(folder / INDEX).get(name)
            raise FileNotFoundError(f"{part}: no such folder; {folder / INDEX} lists {name!r} as {listed}.")
        if issubclass(cls, StrictModelMixin):
            cls.check_pretrained(part, variant=component_variant(part, DIFFUSERS_STEM, variant), **options)
        elif has_weights(part, TRANSFORMERS_STEM):
            read_json(part / CONFIG)
            read_checkpoint(part, component_variant(part, TRANSFORMERS_STEM, variant), TRANSFORMERS_STEM)
        elif has_weights(part, DIFFUSERS_STEM):  # a class of diffusers that hubgen does not have
            read_json(part / CONFIG)
            read_checkpoint(part, component_variant(part, DIFFUSERS_STEM, variant), DIFFUSERS_STEM)


def component_variant(folder: Path, stem: str, variant: str | None) -> str | None:
    """The variant, if the component has files of it, else None."""
    if variant is None:
        return None
    names = (weights_name(stem, variant), *index_names(stem, variant))
    return variant if any((folder / name).is_file() for name in names) else None


def has_weights(folder: Path, stem: str) -> bool:
    """Whether a folder has weights under the name that one of the two libraries gives them, pickled ones included.

    Tokenizers, schedulers and image processors have none.
    """
    pickle = "pytorch_model" if stem == TRANSFORMERS_STEM else stem
    return any(
        (entry.name.startswith(stem) and ".safetensors" in entry.name)
        or (entry.name.startswith(pickle) and entry.suffix in PICKLED)
        for entry in folder.iterdir()
    )
