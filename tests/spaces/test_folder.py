"""The Space's folder can be pushed as it stands."""

import ast
import re
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "spaces" / "text_to_image"
BROUGHT = {
    "hubgen": {"PIL", "huggingface_hub", "numpy"},
    "hubgen[demo]": {"hubgen", "gradio", "PIL", "huggingface_hub"},
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


def test_it_needs_nothing_but_published_packages() -> None:
    required = (FOLDER / "requirements.txt").read_text().split()
    brought = {name for one in required for name in BROUGHT.get(one, {one})}
    own = {"tabs", "app", "spaces"}  # `spaces` is there where GPUs are lent, and imported there alone
    for path in FOLDER.rglob("*.py"):
        foreign = imported(path) - set(sys.stdlib_module_names) - own
        assert foreign <= brought, path


def test_what_it_takes_from_hubgen_is_installed_with_it() -> None:
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert {"hubgen.spaces", "hubgen.spaces.kit"} <= set(settings["tool"]["setuptools"]["packages"])
    patterns = settings["tool"]["setuptools"]["package-data"]["hubgen.spaces"]
    installed = {path for pattern in patterns for path in (ROOT / "spaces").glob(pattern)}
    files = {path for path in FOLDER.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert installed == files
    assert any(one.startswith("gradio") for one in settings["project"]["optional-dependencies"]["demo"])


def header() -> dict[str, Any]:
    match = re.match(r"---\n(.*?)\n---\n", (FOLDER / "README.md").read_text(encoding="utf-8"), re.S)
    assert match
    return yaml.safe_load(match[1])


def test_the_header_is_what_the_hub_reads() -> None:
    found = header()
    assert found["sdk"] == "gradio" and (FOLDER / found["app_file"]).is_file()
    assert found["license"] == "apache-2.0" and found["pinned"] is False
    colours = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {found["colorFrom"], found["colorTo"]} <= colours
    assert len(found["short_description"]) <= 60 and len(found["emoji"]) == 1
    assert isinstance(found["python_version"], str) and found["title"]


def test_the_header_names_the_version_that_is_pinned() -> None:
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    assert header()["sdk_version"] == pinned["gradio"]


def test_hubgen_publish_sends_all_of_it() -> None:
    from hubgen.hub.publish import prepare

    shipment = prepare(FOLDER, "owner/name")
    assert shipment.kind.repo_type == "space"
    sources = {str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.py")}
    assert set(shipment.files) == {"README.md", "requirements.txt", *sources}
