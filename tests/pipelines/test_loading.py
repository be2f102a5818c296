"""Any pipeline loads by its index: the kind that reads it is found, and with it what a call is like before it loads."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hubgen import ClassToImagePipeline, TextToImagePipeline, UnconditionalPipeline
from hubgen.hub.finding import find_model, read_index
from hubgen.pipelines.loading import READERS, bare_pipeline, load_pipeline, reader_of


def loaded(model: str, **options: Any) -> Any:
    folder = find_model(model)
    return load_pipeline(read_index(model, None, folder), model, None, folder, **options)


def test_each_index_is_read_by_one_pipeline() -> None:
    pipelines = (TextToImagePipeline, ClassToImagePipeline, UnconditionalPipeline)
    assert len(READERS) == sum(1 + len(pipeline.reads) for pipeline in pipelines)
    assert {pipeline.__name__: pipeline for pipeline in pipelines}.items() <= READERS.items()


@pytest.mark.parametrize(
    ("name", "kind"), [("sd1", TextToImagePipeline), ("dit", ClassToImagePipeline), ("ddpm", UnconditionalPipeline)]
)
def test_a_folder_of_any_kind_loads_as_the_pipeline_that_reads_it(
    official: Callable[[str], Path], name: str, kind: type
) -> None:
    pipe = loaded(str(official(name)), dtype="bfloat16")
    assert type(pipe) is kind and str(pipe.dtype) == "torch.bfloat16"


def test_a_bare_pipeline_makes_the_sizes_and_has_the_defaults_of_the_loaded_one(tiny_model: Path) -> None:
    name = str(tiny_model)
    bare, whole = bare_pipeline(read_index(name, None, tiny_model), name, None, tiny_model), loaded(name)
    assert bare.default_size == whole.default_size and bare.defaults() == whole.defaults()
    assert all(one.is_meta for one in bare.backbone.parameters())


def test_what_cannot_be_had_is_told_of_its_argument(official: Callable[[str], Path], tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="^base x: is a KandinskyPipeline; hubgen draws with ClassToImagePipeline, "):
        reader_of({"_class_name": "KandinskyPipeline"}, "x", "base")
    dit = official("dit")
    with pytest.raises(ValueError, match="^model x: is a DiTPipeline, expected a pipeline that draws prompts"):
        bare_pipeline(read_index("x", None, dit), "x", None, dit)
    index = read_index("x", None, tiny_model)
    with pytest.raises(ValueError, match="^model x: does not load: "):
        load_pipeline(index, "x", None, dit)


def test_imported_first_it_leaves_the_loader_of_diffusers_knowing_hubgen() -> None:
    code = (
        "import hubgen.pipelines.loading, diffusers; from hubgen.hub.registration import is_registered\n"
        "assert is_registered() and diffusers.TextToImagePipeline.__module__ == 'hubgen.pipelines.text_to_image'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "register (" not in done.stderr, done.stderr
