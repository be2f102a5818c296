"""What every test shares: no network, few threads, nothing random that was not asked for, and a tiny model."""

import functools
import os

# Before any import of torch or huggingface_hub, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# One thread: tiny models are no faster on two, and how a product is shared among threads moves its last bit.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test starts from the same global seed, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a whole text-to-image pipeline of a few thousand random weights, for pictures of 16x16 pixels."""
    from tests.models import saved_pipeline

    return saved_pipeline(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def official(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`official("sdxl")`: the folder of a tiny random pipeline in an official layout, saved by diffusers."""
    from tests import official as layouts

    @functools.cache
    def folder(name: str) -> Path:
        return layouts.official(name, tmp_path_factory.mktemp("official") / name)

    return folder


@pytest.fixture(scope="module")
def pipes(official: Callable[[str], Path]) -> Callable[[str], Any]:
    """`pipes("sdxl")`: hubgen's pipeline of such a folder, loaded once a module, without progress bars."""
    from hubgen.pipelines.class_to_image import ClassToImagePipeline
    from hubgen.pipelines.text_to_image import TextToImagePipeline

    @functools.cache
    def pipe(name: str) -> Any:
        cls = ClassToImagePipeline if name == "dit" else TextToImagePipeline
        opened = cls.from_pretrained(official(name))
        opened.set_progress_bar_config(disable=True)
        return opened

    return pipe


@pytest.fixture
def shows(record_property: Callable[[str, Any], None]) -> Callable[..., None]:
    """`shows("sdxl", "inpainting")`: what the test shows if it passes, for the table of tests/compatibility.py."""
    from tests.compatibility import OFFICIAL

    def show(row: str, column: str, diffusers: bool | None = None, reason: str | None = None) -> None:
        value = {"row": OFFICIAL.get(row, row), "column": column, "diffusers": diffusers}
        record_property("shows", value if reason is None else {**value, "reason": reason})

    return show


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record-compatibility", action="store_true", help="store what the tests show, see tests/compatibility.py"
    )


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not session.config.getoption("--record-compatibility") or hasattr(session.config, "workerinput"):
        return  # with several processes, the one that collects their reports stores them
    from tests.compatibility import collect, store

    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    reports = [(report, report.passed) for kind in ("passed", "failed") for report in reporter.stats.get(kind, [])]
    store(collect([(value, ok) for report, ok in reports for name, value in report.user_properties if name == "shows"]))
