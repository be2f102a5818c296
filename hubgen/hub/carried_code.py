"""A class of hubgen's in one file, for repositories that load where hubgen is not installed.

A repository whose pipeline diffusers lacks brings along the code of its pipeline, and of those components that
diffusers lacks too:

    model_index.json            {"_class_name": ["hubgen_text_to_image", "TextToImagePipeline"], ...}
    hubgen_text_to_image.py
    scheduler/hubgen_annealed_langevin.py

diffusers loads it by `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)`. Where hubgen is imported,
nothing of it is run, and no trust is asked for: hubgen's classes stand in for those that an index names so
(`as_installed`).

Such a file holds, word for word, every module of hubgen that its class imports, and `hubgen.hub.carried_loader`, which
imports them from there. Lines begin with a bar, so that diffusers, which looks for imports with a regular expression,
does not take them for the file's own.
"""

import ast
import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import diffusers

from hubgen.formats.folders import is_component
from hubgen.hub.carried_loader import without_bars

PREFIX = "hubgen_"
"""Of the names of files, by which an index's entries are known"""
BAR = "|"  # carried_loader takes it away
LOADER = "hubgen.hub.carried_loader"

QUOTES = 3 * "'"
HEAD = """\
{name} of hubgen {version} in one file, for machines where hubgen is not installed.

Where it is installed, the installed one is used, and nothing of this file but its last line. Otherwise the modules of
hubgen that stand in SOURCES, each as it is in the package with a bar before every line, can be imported. Written by
hubgen.hub.carried_code; changes belong there. Licence: Apache-2.0.

Needs {needs}.
"""


def file_name(cls: type) -> str:
    """The name of a class's file, without its ending."""
    return PREFIX + cls.__module__.rpartition(".")[2]


def is_carried(value: object) -> bool:
    """Whether an index's `[library, class]` names a file of this kind."""
    return is_component(value) and value[0].startswith(PREFIX)  # type: ignore[index]


def as_installed(index: Mapping[str, Any]) -> dict[str, Any]:
    """An index with hubgen's own classes: for those whose code the repository brings along, and for diffusers'."""
    read: dict[str, Any] = {}
    for name, value in index.items():
        if is_component(value) and (is_carried(value) or value[0] == "diffusers") and is_here(value[1]):
            value = value[1] if name == "_class_name" else ["hubgen", value[1]]
        read[name] = value
    return read


@functools.cache
def is_here(class_name: str) -> bool:
    """Whether hubgen has a class of this name; where it was carried itself, whether that was among it."""
    home = importlib.import_module("hubgen").HOMES.get(class_name)
    return home is not None and is_module(home)


def as_carried(
    index: Mapping[str, Any], settings: Callable[[str], Mapping[str, Any]]
) -> tuple[dict[str, Any], dict[str, type]]:
    """An index by which diffusers loads a pipeline of hubgen's without hubgen, and the files that it names.

    A pipeline that is none of hubgen's own, but somebody's subclass, has its index unchanged and no files.

    Args:
        index: As hubgen writes it, every component of its own as ["hubgen", class].
        settings: The config of a component, by its name.

    Returns:
        The index; by the path of each file in the repository, the class whose code it holds.
    """
    hubgen = importlib.import_module("hubgen")
    if index["_class_name"] not in hubgen.HOMES:
        return dict(index), {}
    pipeline = getattr(hubgen, index["_class_name"])
    read = {**index, "_class_name": [file_name(pipeline), pipeline.__name__]}
    files = {f"{file_name(pipeline)}.py": pipeline}
    for name, value in index.items():
        if is_component(value) and value[0] == "hubgen":
            cls = getattr(hubgen, value[1])
            native = is_native(cls, settings(name))
            read[name] = ["diffusers" if native else file_name(cls), value[1]]
            if not native:
                files[f"{name}/{file_name(cls)}.py"] = cls
    return read, files


def is_native(cls: type, settings: Mapping[str, Any]) -> bool:
    """Whether diffusers' class of the same name does what hubgen's does with a config: it knows every setting."""
    theirs: Any = getattr(diffusers, cls.__name__, None)
    if theirs is None:
        return False
    ours, known = inspect.signature(cls).parameters, inspect.signature(theirs.__init__).parameters
    return not any(
        name in ours and name not in known and value != ours[name].default for name, value in settings.items()
    )


@functools.cache
def code_of(cls: type) -> str:
    """The text of the one file from which a class of hubgen's can be imported."""
    version = importlib.import_module("hubgen").__version__
    modules = sorted(closure(cls.__module__))
    sources = {module: source_of(module) for module in modules}
    needs = sorted({name for text in sources.values() for name in others(text)})
    loader = source_of(LOADER)
    head = HEAD.format(name=cls.__name__, version=version, needs=", ".join(needs))
    _, _, rest = loader.split('"""', 2)  # its docstring speaks of the package
    texts = [f"SOURCES[{module!r}] = {quoted(text)}\n" for module, text in sources.items()]
    last = f"{cls.__name__} = carried({version!r}, SOURCES, {cls.__module__!r}, {cls.__name__!r})\n"
    return "\n".join([f'"""{head}"""{rest}\n', "SOURCES: dict[str, str] = {}\n", *texts, last])


def quoted(text: str) -> str:
    """A module's text as a literal: raw, with a bar before every line."""
    lines = "".join(f"{BAR}{line}\n" for line in text.splitlines())
    literal = f"r{QUOTES}\n{lines}{QUOTES}"
    if QUOTES in text or without_bars(ast.literal_eval(literal)) != text:
        raise ValueError(f"a module that shall be carried has {QUOTES} in it, or does not end with a newline")
    return literal


def closure(module: str) -> set[str]:
    """A module of hubgen's with all modules of hubgen's that it imports, sooner or later, and their packages."""
    found: set[str] = set()
    ahead = [module, LOADER]
    while ahead:
        name = ahead.pop()
        if name not in found:
            found.add(name)
            ahead += [name.rpartition(".")[0]] if "." in name else []
            ahead += imported(name)
    return found


def imported(module: str) -> Iterator[str]:
    """The modules of hubgen's that a module imports, also within functions; not those for a type checker alone."""
    ahead: list[ast.AST] = [ast.parse(source_of(module))]
    while ahead:
        node = ahead.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        ahead += ast.iter_child_nodes(node)
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        yield from (name for name in names if name.partition(".")[0] == "hubgen" and is_module(name))


def others(text: str) -> Iterator[str]:
    """The packages of others that a module imports when it is imported itself."""
    import sys

    for node in ast.parse(text).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        for name in names:
            package = name.partition(".")[0]
            if package != "hubgen" and package not in sys.stdlib_module_names:
                yield package


def is_module(name: str) -> bool:
    """Whether a name is a module, and not something inside of one."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def source_of(module: str) -> str:
    """The text of a module of hubgen's: of its file, or where hubgen itself was carried of that."""
    spec = importlib.util.find_spec(module)
    source = None if spec is None or spec.loader is None else spec.loader.get_source(module)  # type: ignore[attr-defined]
    if source is None:
        raise ValueError(f"{module}: there is no source of it here, expected a .py file.")
    return str(source)
