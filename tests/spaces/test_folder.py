"""The folders of the Spaces can be pushed as they stand."""

import ast
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
FOLDERS = [ROOT / "spaces" / name for name in ("text_to_image", "train_lora")]
BROUGHT = {
    "hubgen": {"PIL", "huggingface_hub", "numpy"},
    "hubgen[controls,demo]": {"hubgen", "gradio", "PIL", "huggingface_hub"},
    "hubgen[demo,train]": {"hubgen", "gradio", "PIL", "huggingface_hub", "safetensors", "yaml"},
}
"""Packages that published ones bring along, as far as the folder uses them"""


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}: relative imports do not work where the Hub runs it"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def space(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_it_needs_nothing_but_published_packages(space: Path) -> None:
    required = (space / "requirements.txt").read_text().split()
    brought = {name for one in required for name in BROUGHT.get(one, {one})}
    own = {"tabs", "steps", "app", "spaces"}  # `spaces` is there where GPUs are lent, and imported there alone
    for path in space.rglob("*.py"):
        foreign = imported(path) - set(sys.stdlib_module_names) - own
        assert foreign <= brought, path


def test_what_it_takes_from_hubgen_is_installed_with_it() -> None:
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert {"hubgen.spaces", "hubgen.spaces.kit"} <= set(settings["tool"]["setuptools"]["packages"])
    patterns = settings["tool"]["setuptools"]["package-data"]["hubgen.spaces"]
    installed = {path for pattern in patterns for path in (ROOT / "spaces").glob(pattern)}
    files = {path for folder in FOLDERS for path in folder.rglob("*") if path.is_file()}
    assert installed == {path for path in files if "__pycache__" not in path.parts}
    assert any(one.startswith("gradio") for one in settings["project"]["optional-dependencies"]["demo"])


def header(space: Path) -> dict[str, Any]:
    match = re.match(r"---\n(.*?)\n---\n", (space / "README.md").read_text(encoding="utf-8"), re.S)
    assert match
    return yaml.safe_load(match[1])


def test_the_header_is_what_the_hub_reads(space: Path) -> None:
    found = header(space)
    assert found["sdk"] == "gradio" and (space / found["app_file"]).is_file()
    assert found["license"] == "apache-2.0" and found["pinned"] is False
    colours = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {found["colorFrom"], found["colorTo"]} <= colours
    assert len(found["short_description"]) <= 60 and len(found["emoji"]) == 1
    assert isinstance(found["python_version"], str) and found["title"]


def test_the_header_names_the_version_that_is_pinned(space: Path) -> None:
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    assert header(space)["sdk_version"] == pinned["gradio"]


def test_hubgen_publish_sends_all_of_it(space: Path) -> None:
    from hubgen.hub.publish import prepare

    shipment = prepare(space, "owner/name")
    assert shipment.kind.repo_type == "space"
    sources = {str(path.relative_to(space)) for path in space.rglob("*.py")}
    assert set(shipment.files) == {"README.md", "requirements.txt", *sources}
