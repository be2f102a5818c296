"""What hubgen takes of diffusers' private side stands in one file, and is there in the installed version."""

import ast
import importlib
from pathlib import Path

import pytest

from hubgen.diffusers_contract import ATTRIBUTES
from tests.test_architecture import MODULES

LIBRARIES = ("diffusers", "transformers", "accelerate", "peft", "huggingface_hub")
HOME = "hubgen.diffusers_contract"


@pytest.mark.parametrize(("place", "name"), [(place, name) for place, names in ATTRIBUTES.items() for name in names])
def test_the_installed_version_has_the_private_name(place: str, name: str) -> None:
    try:
        owner = importlib.import_module(place)
    except ImportError:
        module, _, attribute = place.rpartition(".")
        owner = getattr(importlib.import_module(module), attribute)
    assert hasattr(owner, name)


def private_names(path: Path) -> list[str]:
    """Names that begin with an underscore, or lie in a module that does, which a file imports from a library."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LIBRARIES:
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            found += [name for name in names if name.startswith("_")]
    return found


def test_no_other_file_imports_a_private_name() -> None:
    assert [name for name, path in MODULES.items() if name != HOME and private_names(path)] == []


def test_no_other_file_calls_a_private_method_of_these_libraries_that_is_not_listed() -> None:
    """Attributes with an underscore that hubgen itself defines nowhere come from a library: each must be listed."""
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
    own: set[str] = set()
    used: dict[str, set[str]] = {}
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
            elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                if isinstance(node.ctx, ast.Store):
                    own.add(node.attr)
                else:
                    used.setdefault(node.attr, set()).add(name)
    listed = {name for names in ATTRIBUTES.values() for name in names}
    # Of torch and Python: what modules hold and their hooks, the version of a tensor, `os._exit`.
    others = {"_modules", "_parameters", "_compiled_call_impl"}
    others |= {"_C", "_version", "_forward_hooks", "_forward_pre_hooks", "_global_forward_hooks", "_exit"}
    others |= {"_global_forward_pre_hooks", "_are_functorch_transforms_active", "_foreach_lerp_"}
    others |= {"_queue"}  # of Gradio's pages; tests/spaces fills it
    kernels = "hubgen.acceleration.cpu.kernels"  # private operators of torch, which it tries before it uses them
    unlisted = {
        attribute: sorted(names)
        for attribute, names in used.items()
        if attribute not in own | listed | others and names != {kernels}
    }
    assert unlisted == {}
