"""Imports hubgen's modules from texts that a file carries; the end of every such file (`hubgen.hub.carried_code`).

It stands on Python's standard library alone, because it runs before anything of hubgen's can be imported.
"""

import importlib
import importlib.abc
import importlib.util
import logging
import sys
import types
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec
from typing import Any


class CarriedModules(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Finds and loads the modules of one package.

    Args:
        version: Of the package.
    """

    carries_hubgen = True

    def __init__(self, version: str):
        self.version = version
        self.sources: dict[str, str] = {}
        """By the name of the module"""

    def add(self, version: str, sources: Mapping[str, str]) -> None:
        """Takes the texts of one more file. Modules that are there already stay, and other versions are told."""
        if version != self.version:
            logging.getLogger(__name__).warning(
                "This program runs the code of hubgen %s that a model has brought along, and another model has brought "
                "%s. It is run with the first; `pip install hubgen` gives both the same.",
                self.version,
                version,
            )
        self.sources = {**sources, **self.sources}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        """The place of a module of hubgen's; `None` for those of others.

        Raises:
            ModuleNotFoundError: A module of hubgen's that no file has brought along.
        """
        if fullname.partition(".")[0] != "hubgen":
            return None
        if fullname not in self.sources:
            raise ModuleNotFoundError(
                f"No module named {fullname!r} in what this model has brought along of hubgen {self.version}; "
                "`pip install hubgen` gives all of it.",
                name=fullname,
            )
        return importlib.util.spec_from_loader(fullname, self, origin=self.file_of(fullname))

    def is_package(self, fullname: str) -> bool:
        """Whether other modules are inside."""
        return any(name.startswith(f"{fullname}.") for name in self.sources)

    def file_of(self, fullname: str) -> str:
        """What tracebacks call the file of a module."""
        return fullname.replace(".", "/") + ("/__init__.py" if self.is_package(fullname) else ".py")

    def get_source(self, fullname: str) -> str:
        """The text of a module."""
        return self.sources[fullname]

    def get_code(self, fullname: str) -> types.CodeType:
        """A module, compiled."""
        return self.source_to_code(self.sources[fullname], self.file_of(fullname))

    def exec_module(self, module: types.ModuleType) -> None:
        """Runs a module; the package itself learns its version."""
        if module.__name__ == "hubgen":
            module.__dict__["__version__"] = self.version
        super().exec_module(module)


def without_bars(text: str) -> str:
    """A module's text as it is in the package."""
    return text.replace("\n|", "\n").removeprefix("\n")


def carried(version: str, sources: Mapping[str, str], module: str, name: str) -> Any:
    """A name of a module of hubgen: of the installed one, or where there is none of these texts.

    Args:
        version: Of the texts.
        sources: By the names of the modules, with bars.
        module: Where the name is.
        name: The name.
    """
    finder: Any = next((one for one in sys.meta_path if hasattr(one, "carries_hubgen")), None)
    if finder is None:
        try:
            return getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            if error.name != "hubgen":
                raise
        finder = CarriedModules(version)
        sys.meta_path.insert(0, finder)
        sys.modules.pop("hubgen", None)
    finder.add(version, {one: without_bars(text) for one, text in sources.items()})
    return getattr(importlib.import_module(module), name)
