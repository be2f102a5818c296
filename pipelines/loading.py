"""Any pipeline from where it was found: which of hubgen's reads it, with its weights or without.

pipe = load_pipeline(index, model, revision, folder, dtype="bfloat16")      # index and folder: hubgen.hub.finding
"""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hubgen.hub.bare import ADAPTABLE, BACKBONES, bare_parts
from hubgen.pipelines.class_to_image import ClassToImagePipeline
from hubgen.pipelines.defaults import ELSEWHERE
from hubgen.pipelines.text_to_image import TextToImagePipeline
from hubgen.pipelines.unconditional import UnconditionalPipeline

READERS: dict[str, Any] = {
    name: pipeline
    for pipeline in (TextToImagePipeline, ClassToImagePipeline, UnconditionalPipeline)
    for name in (pipeline.__name__, *pipeline.reads)
}
"""By the name that an index has, the pipeline that reads it"""


def reader_of(index: Mapping[str, Any], model: str, argument: str = "model") -> Any:
    """The pipeline of hubgen that reads a model's index.

    Args:
        index: Its `model_index.json`.
        model: Its name.
        argument: What messages call the name.

    Raises:
        ValueError: There is none.
    """
    name = index["_class_name"]
    if name in ELSEWHERE:
        raise ValueError(f"{argument} {model}: is a {name}: {ELSEWHERE[name]}")
    if name not in READERS:
        raise ValueError(f"{argument} {model}: is a {name}; hubgen draws with {', '.join(sorted(READERS))}")
    return READERS[name]


def is_text_to_image(index: Mapping[str, Any]) -> bool:
    """Whether a pipeline draws prompts, as the bases of adapters do."""
    return READERS.get(index["_class_name"]) is TextToImagePipeline


def load_pipeline(
    index: Mapping[str, Any],
    model: str,
    revision: str | None,
    folder: Path | None,
    *,
    config: str | None = None,
    dtype: str | None = None,
    argument: str = "model",
) -> Any:
    """A pipeline of any kind, with its weights.

    Args:
        index: Its `model_index.json`.
        model: Its name.
        revision: Of a repository.
        folder: Its folder or single file; `None` where it is on the Hub.
        config: For a single file, see `from_single_file`.
        dtype: Precision, such as bfloat16; that of `from_pretrained` if not given.
        argument: What messages call the name.

    Raises:
        ValueError: No pipeline reads it, or it does not load.
    """
    pipeline = reader_of(index, model, argument)
    load, options = pipeline.from_pretrained, {} if dtype is None else {"torch_dtype": getattr(torch, dtype)}
    if folder is None:
        options["revision"] = revision
    elif folder.is_file():
        load, options["config"] = pipeline.from_single_file, config
    try:
        return load(str(folder or model), **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"{argument} {model}: does not load: {error}") from error


def bare_pipeline(
    index: Mapping[str, Any], model: str, revision: str | None, folder: Path | None, argument: str = "model"
) -> Any:
    """A text-to-image pipeline whose networks have no weights: what sizes it makes, and what a call does by default.

    Args:
        index: Its `model_index.json`.
        model: Its name.
        revision: Of a repository.
        folder: Where it is, if it is here.
        argument: What messages call the name.

    Raises:
        ValueError: It draws no prompts, parts are missing, or no network can be made of a config.
    """
    if not is_text_to_image(index):
        raise ValueError(f"{argument} {model}: is a {index['_class_name']}, expected a pipeline that draws prompts")
    ours = TextToImagePipeline.with_our_classes(index)
    parts = bare_parts(ours, model, revision, folder, (*ADAPTABLE, "vae"), argument)
    if "vae" not in parts or len(parts.keys() & set(BACKBONES)) != 1:
        raise ValueError(f"{argument} {model}: has the parts {', '.join(parts)}, expected a vae and one backbone")
    known = inspect.signature(TextToImagePipeline).parameters
    values = {name: value for name, value in ours.items() if name in known and not isinstance(value, list | tuple)}
    needed: dict[str, Any] = dict.fromkeys(("text_encoder", "tokenizer", "scheduler"))
    return TextToImagePipeline(**{**needed, **values, **parts, "requires_safety_checker": False})
