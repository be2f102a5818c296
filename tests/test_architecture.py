"""The house stands as DESIGN draws it: who may import whom, what importing costs, what names and folders there are."""

import ast
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "hubgen": ROOT / "hubgen",
    "hubgen.pipelines": ROOT / "pipelines",
    "hubgen.training": ROOT / "training",
    "hubgen.spaces": ROOT / "spaces",
}

BEDROCK = ("checks", "errors", "diffusers_contract")
GROUND = ("layers", "paths", "formats")
MACHINE = ("autoencoders", "backbones", "schedulers", "conditioning")
ABOVE = ("controls", "adaptation", "captioning", "data", "hub", "acceleration")
# part of the package -> the parts that it may import, itself aside
ALLOWED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(BEDROCK, ()),
    **dict.fromkeys(GROUND, BEDROCK),
    **dict.fromkeys(MACHINE, (*BEDROCK, *GROUND)),
    **dict.fromkeys(ABOVE, (*BEDROCK, *GROUND, *MACHINE, *ABOVE)),
    "pipelines": (*BEDROCK, *GROUND, *MACHINE, *ABOVE),
    "training": (*BEDROCK, *GROUND, *MACHINE, *ABOVE, "pipelines"),
    "cli": (*BEDROCK, *GROUND, *MACHINE, *ABOVE, "pipelines", "training"),
    "spaces": (*BEDROCK, *GROUND, *MACHINE, *ABOVE, "pipelines", "training"),
}


def modules() -> Iterator[tuple[str, Path]]:
    """Each module of the package by its dotted name."""
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            if any((above / "app.py").exists() for above in path.parents if folder in above.parents):
                continue  # the folder of a Space is no package: it is pushed and run as it stands
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join((package, *parts)).removesuffix(".__init__"), path


MODULES = dict(modules())


def imports(name: str, path: Path) -> set[str]:
    """All dotted names that a module imports, relative ones resolved; `from a import b` gives both a and a.b."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1])
                base = f"{above}.{base}".rstrip(".")
            found.add(base)
            found.update(f"{base}.{alias.name}" for alias in node.names)
    return found


def part(name: str) -> str | None:
    """`hubgen.layers.resnet` -> `layers`; None for the root and for other packages."""
    pieces = name.split(".")
    return pieces[1] if pieces[0] == "hubgen" and len(pieces) > 1 and pieces[1] in ALLOWED else None


def test_every_module_lies_in_a_part_of_the_house() -> None:
    assert [name for name in MODULES if name != "hubgen" and part(name) is None] == []


def test_imports_point_downwards() -> None:
    upwards = []
    for name, path in MODULES.items():
        here = part(name)
        if here is not None:
            there = {other for other in map(part, imports(name, path)) if other is not None}
            upwards += [f"{name} imports {other}" for other in sorted(there - {here, *ALLOWED[here]})]
    assert upwards == []


def test_nothing_imports_the_command() -> None:
    """What it and a page both need is the library's; this holds for the folders of Spaces too, which are no modules."""
    files = {path for folder in FOLDERS.values() for path in folder.rglob("*.py")}
    others = sorted(path for path in files if FOLDERS["hubgen"] / "cli" not in path.parents)
    assert ROOT / "spaces" / "text_to_image" / "app.py" in others
    found = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in others
        for name in sorted(imports(path.stem, path))
        if f"{name}.".startswith("hubgen.cli.")
    ]
    assert found == []


def test_no_module_takes_names_from_the_package_root() -> None:
    """The root names everything, so importing from it would be importing upwards in disguise."""
    import hubgen

    public = {f"hubgen.{name}" for name in hubgen.__all__}
    above = {"hubgen", "hubgen.cli", "hubgen.cli.generate"}
    found = [f"{name}: {taken}" for name, path in MODULES.items() for taken in imports(name, path) & public]
    assert [line for line in found if line.split(":")[0] not in above] == []


def test_module_imports_form_no_cycle() -> None:
    graph = {
        name: {other for other in imports(name, path) if other in MODULES and other not in ("hubgen", name)}
        for name, path in MODULES.items()
        if name != "hubgen"  # the root names all, lazily
    }
    finished: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, "import cycle: " + " -> ".join((*trail[trail.index(name) :], name))
        if name not in finished:
            for other in sorted(graph[name]):
                visit(other, (*trail, name))
            finished.add(name)

    for name in graph:
        visit(name, ())


def test_nothing_is_called_utils() -> None:
    vague = {"utils", "util", "helpers", "helper", "misc", "common", "tools"}
    named = [str(path.relative_to(ROOT)) for path in MODULES.values() if path.stem in vague]
    assert named == []


def test_nothing_imports_torchvision() -> None:
    tests = {str(path): path for path in sorted((ROOT / "tests").rglob("*.py"))}
    found = [
        name
        for name, path in {**MODULES, **tests}.items()
        if any(other.split(".")[0] == "torchvision" for other in imports(name, path))
    ]
    assert found == []


def test_no_folder_is_named_like_a_folder_of_diffusers_pipelines() -> None:
    """Such a name in a class's module path would be looked up in diffusers when a saved pipeline loads."""
    import diffusers.pipelines

    theirs = {path.name for path in Path(diffusers.pipelines.__file__).parent.iterdir() if path.is_dir()}
    ours = {piece for name in MODULES for piece in name.split(".")[:-1]} | {
        name.split(".")[-1] for name, path in MODULES.items() if path.name == "__init__.py"
    }
    assert ours & theirs == set()


def test_every_package_is_in_pyproject() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = sorted(name for name, path in MODULES.items() if path.name == "__init__.py")
    assert settings["packages"] == packages


def test_every_public_name_resolves() -> None:
    import hubgen

    assert hubgen.__all__, "hubgen names nothing"
    for name in hubgen.__all__:
        assert getattr(hubgen, name) is not None
        assert name in dir(hubgen)


def loaded_after(statement: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after `statement`."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


HEAVY = {"torch", "diffusers", "transformers", "accelerate", "peft", "datasets", "numpy", "PIL", "huggingface_hub"}


@pytest.mark.parametrize("statement", ["import hubgen", "import hubgen.cli; hubgen.cli.build_parser()"])
def test_the_first_import_is_light(statement: str) -> None:
    assert loaded_after(statement) & HEAVY == set()


def test_naming_a_component_loads_that_component_alone() -> None:
    loaded = {name for name in loaded_after("import hubgen\nhubgen.AutoencoderKL") if name.startswith("hubgen.")}
    assert "hubgen.autoencoders.autoencoder_kl" in loaded
    assert not any(name.startswith(("hubgen.backbones.", "hubgen.training", "hubgen.pipelines.")) for name in loaded)


def test_no_two_files_of_training_share_a_block() -> None:
    """Eight lines that stand in two files, imports and blank lines aside, have an owner that was not found."""
    seen: dict[tuple[str, ...], str] = {}
    copies = []
    for path in sorted((ROOT / "training").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        imported = {
            number
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)
        }
        lines = [line.strip() for number, line in enumerate(text.splitlines(), start=1) if number not in imported]
        lines = [line for line in lines if line]
        for first in range(len(lines) - 7):
            block = tuple(lines[first : first + 8])
            other = seen.setdefault(block, path.name)
            if other != path.name:
                copies.append(f"{other} and {path.name}: {block[0]} ...")
    assert copies == []


def test_training_scripts_are_short() -> None:
    long = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "training").glob("train_*.py")}
    assert len(long) >= 4 and max(long.values()) <= 300, long
