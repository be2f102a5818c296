"""What hubgen tells diffusers' loader, and when."""

import ast
import logging
import subprocess
import sys
from pathlib import Path

import diffusers
import diffusers.pipelines.pipeline_utils  # hubgen registers when this is imported
import pytest
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES, get_class_obj_and_candidates

import hubgen
from hubgen.hub.registration import is_registered, register


def test_the_tested_version_of_diffusers_lets_hubgen_register() -> None:
    assert is_registered()
    assert diffusers.TextToImagePipeline is hubgen.TextToImagePipeline


@pytest.mark.parametrize(
    "name",
    [
        "AutoencoderKL",
        "SD3Transformer2DModel",
        "UNet2DConditionModel",
        "DDPMScheduler",
        "FlowMatchEulerDiscreteScheduler",
    ],
)
def test_diffusers_loader_finds_a_component_and_its_base_class(name: str) -> None:
    found, bases = get_class_obj_and_candidates("hubgen", name, LOADABLE_CLASSES["hubgen"], diffusers.pipelines, False)
    assert found is getattr(hubgen, name)
    assert any(issubclass(found, base) for base in bases.values())


@pytest.mark.parametrize(
    "first",
    [
        "import hubgen; from diffusers import DiffusionPipeline",
        "from diffusers import DiffusionPipeline; import hubgen",
        "from hubgen.pipelines.text_to_image import TextToImagePipeline",
    ],
)
def test_hubgen_is_registered_whatever_is_imported_first(first: str) -> None:
    code = (
        f"{first}\n"
        "import hubgen, diffusers\n"
        "from hubgen.hub.registration import is_registered\n"
        "assert is_registered()\n"
        "assert diffusers.TextToImagePipeline is hubgen.TextToImagePipeline\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_registering_twice_changes_nothing() -> None:
    before = (dict(LOADABLE_CLASSES), list(sys.meta_path))
    register(pipelines=("TextToImagePipeline",))
    assert (dict(LOADABLE_CLASSES), list(sys.meta_path)) == before


def test_a_diffusers_without_its_table_of_libraries_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr("diffusers.pipelines.pipeline_loading_utils.LOADABLE_CLASSES")
    with caplog.at_level(logging.WARNING):
        register(pipelines=("TextToImagePipeline",))
    assert "does not let hubgen register" in caplog.text
    assert not is_registered()


def test_every_public_name_is_also_named_for_type_checkers() -> None:
    tree = ast.parse(Path(hubgen.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    named = {
        alias.asname: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert named == hubgen.HOMES


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'FooModel'"):
        hubgen.FooModel  # noqa: B018
