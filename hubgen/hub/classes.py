"""The class of a component, by the library and the name that an index gives."""

import difflib
import importlib
import inspect
import sys
from typing import Any

import diffusers


def require_class(library: str, class_name: str, where: str) -> type:
    """The class of a component; ValueError unless `library` is one that components come from and has such a class.

    Libraries are hubgen, diffusers, transformers, the folders of diffusers' pipelines (for parts such as
    `StableDiffusionSafetyChecker`), and what the program has imported itself.
    """
    libraries = ("hubgen", "diffusers", "transformers")
    if library in libraries:
        module = importlib.import_module(library)
    elif "." not in library and hasattr(diffusers.pipelines, library):
        module = getattr(diffusers.pipelines, library)
    elif library in sys.modules:
        module = sys.modules[library]
    else:
        raise ValueError(
            f"{where} comes from an unknown library, {library!r}; known are {', '.join(libraries)} and what is "
            "imported. Code that lies in a repository is not run."
        )
    if not inspect.isclass(getattr(module, class_name, None)):
        raise ValueError(
            f"{where}: {library} has no class {class_name!r}; known are {', '.join(similar(module, class_name))}."
        )
    return getattr(module, class_name)


def similar(module: Any, class_name: str) -> list[str]:
    """Classes of a library, for a message: the nearest by name, of libraries with hundreds of them."""
    names = [name for name in dir(module) if name[:1].isupper()]
    near = difflib.get_close_matches(class_name, names, n=5, cutoff=0.5)
    return near or [f"{len(names)} others"]
