"""Settings of a training script: groups of frozen dataclasses, from a YAML recipe and the command line, strictly typed.

A field's annotation is its check, the string below it is its help text; a field that is a dataclass is a group:

    @dataclass(frozen=True, kw_only=True)
    class Optim:
        learning_rate: Annotated[float, Range(0)] = 1e-4
        '''Peak learning rate.'''

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        optim: Optim = Optim()
        run: RunOptions

    settings = parse_settings(Settings, description=__doc__)    # --config recipe.yaml --optim.learning_rate 3e-4

A recipe is a mapping of groups to mappings. The command line wins over the recipe, the recipe over the defaults: those
of the group's own object where the script gives one, else those of its class. Annotations may be int, float, str, bool,
Path, Literal, dict[str, Any], tuple[T, ...] and list[T] of those, `T | None`, and Annotated[T, Range(...), FREE].

A field or group marked `FREE` may change between a run and its resumption, as it does not touch the weights;
`identity_of` gives the others.
"""

import argparse
import ast
import dataclasses
import difflib
import inspect
import itertools
import math
import sys
import tempfile
import textwrap
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

T = TypeVar("T")


class SettingsError(ValueError):
    """A setting is unknown, missing, of the wrong type or out of range; the message names it."""


@dataclass(frozen=True)
class Free:
    """Mark of settings that do not touch the weights."""


FREE = Free()


@dataclass(frozen=True)
class Range:
    """Bounds of a number, for `Annotated[int, Range(1)]`; both ends belong to it unless `open_minimum` is set."""

    minimum: float = -math.inf
    maximum: float = math.inf
    open_minimum: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.minimum if self.open_minimum else value >= self.minimum
        return above and value <= self.maximum

    def __str__(self) -> str:
        low = None if self.minimum == -math.inf else f"{'above' if self.open_minimum else 'at least'} {self.minimum:g}"
        high = None if self.maximum == math.inf else f"at most {self.maximum:g}"
        return " and ".join(part for part in (low, high) if part)


MISSING = dataclasses.MISSING


@dataclass(frozen=True)
class Leaf:
    """A setting: a field that is no group."""

    expected: Any
    """Its annotation"""
    default: Any
    """`MISSING` for one that has to be given"""
    doc: str


def parse_settings(cls: type[T], argv: Sequence[str] | None = None, *, description: str = "") -> T:
    """The settings from `--config recipe.yaml` and the command line.

    Args:
        cls: A dataclass of groups and settings; settings without a default are required.
        argv: Arguments without the program's name; `sys.argv[1:]` by default.
        description: Text above the list of settings in `--help`.

    Raises:
        SettingsError: An unknown or missing key, a wrong type, a value out of range, an unreadable recipe. The message
            names the key and where it stood, what was found, what was expected, and the closest known key.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    leaves = dict(leaves_of(cls))
    given, unknown = _build_parser(leaves, description).parse_known_args(argv)
    if unknown:
        name = unknown[0].lstrip("-").split("=")[0].replace("-", "_")
        _raise_unknown(unknown[0], name, list(leaves), "on the command line")
    given_values = {key: value for key, value in vars(given).items() if value is not None}
    values: dict[str, Any] = {}
    recipe = given_values.pop("config", None)
    if recipe is not None:
        for name, value in _flat(_read_recipe(Path(recipe)), leaves, recipe):
            if name in values:
                raise SettingsError(f"setting '{name}' stands twice in {recipe}; expected it once.")
            values[name] = _convert(value, leaves[name].expected, name, f"in {recipe}", from_text=False)
    for name, words in given_values.items():
        words = words if isinstance(words, list) else [words]
        values[name] = _convert(words, leaves[name].expected, name, "on the command line", from_text=True)
    for name, leaf in leaves.items():
        if name not in values and leaf.default is MISSING:
            where = f"in {recipe} or on the command line" if recipe is not None else "on the command line"
            raise SettingsError(f"setting '{name}' is missing; expected {_name(leaf.expected)} {where}.")
    return _built(cls, {name: leaf.default for name, leaf in leaves.items()} | values)


def settings_of(script: Any, values: Mapping[str, Any], further: Mapping[str, Sequence[str]]) -> Any:
    """The settings of a script, as its own command line would have read them.

    Args:
        script: Module of hubgen.training.
        values: By dotted name, what stands for a recipe.
        further: Words of the command line, by dotted name, which win over it.

    Raises:
        SettingsError: One is unknown, or none of its kind.
    """
    argv = []
    for name, words in further.items():
        argv += [f"--{name}={words[0]}"] if len(words) == 1 else [f"--{name}", *words]
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(dict(values), allow_unicode=True), encoding="utf-8")
        try:
            return parse_settings(script.Settings, ["--config", str(recipe), *argv])
        except SettingsError as error:
            raise SettingsError(str(error).replace(f" in {recipe}", "")) from None


def leaves_of(cls: type, default: Any = None, prefix: str = "") -> Iterator[tuple[str, Leaf]]:
    """The settings of a dataclass and its groups, by dotted name, in order.

    Args:
        cls: The dataclass.
        default: An object of it, whose values are the defaults; `None`: its fields' own.
        prefix: Of the names.
    """
    hints, docs = get_type_hints(cls, include_extras=True), field_docstrings(cls)
    for field in dataclasses.fields(cls):
        if default is not None:
            value = getattr(default, field.name)
        elif field.default_factory is not MISSING:
            value = field.default_factory()
        else:
            value = field.default
        group = _group(hints[field.name])
        if group is not None:
            yield from leaves_of(group, None if value is MISSING else value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, Leaf(hints[field.name], value, docs.get(field.name, ""))


def settings_to_dict(settings: Any) -> dict[str, Any]:
    """The settings as plain JSON values: groups are mappings, paths strings, tuples lists."""
    return {field.name: _plain(getattr(settings, field.name)) for field in dataclasses.fields(settings)}


def identity_of(settings: Any) -> dict[str, Any]:
    """The settings that are not `FREE`, as plain JSON values."""
    hints, kept = get_type_hints(type(settings), include_extras=True), {}
    for field in dataclasses.fields(settings):
        expected, value = hints[field.name], getattr(settings, field.name)
        if any(isinstance(mark, Free) for mark in get_args(expected)[1:] if get_origin(expected) is Annotated):
            continue
        kept[field.name] = identity_of(value) if dataclasses.is_dataclass(value) else _plain(value)
    return kept


def _group(expected: Any) -> type | None:
    """The dataclass of a field that is a group."""
    if get_origin(expected) is Annotated:
        expected = get_args(expected)[0]
    return expected if isinstance(expected, type) and dataclasses.is_dataclass(expected) else None


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return settings_to_dict(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value


def _built(cls: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """The dataclass with its groups, of all settings by dotted name."""
    hints, arguments = get_type_hints(cls, include_extras=True), {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        group = _group(hints[field.name])
        name = prefix + field.name
        arguments[field.name] = values[name] if group is None else _built(group, values, f"{name}.")
    return cls(**arguments)


def _flat(
    content: Mapping[Any, Any], leaves: Mapping[str, Leaf], recipe: str, prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """The settings of a recipe by dotted name; a group may be empty."""
    for key, value in content.items():
        given = f"{prefix}{key}"
        name = given.replace("-", "_")
        if name in leaves:
            yield name, value
        elif any(leaf.startswith(f"{name}.") for leaf in leaves):
            if value is not None and not isinstance(value, dict):
                found = _show(value, from_text=False)
                raise SettingsError(f"setting '{name}' in {recipe}: got {found}, expected a mapping of its settings.")
            yield from _flat(value or {}, leaves, recipe, f"{name}.")
        else:
            _raise_unknown(given, name, list(leaves), f"in {recipe}")


def _build_parser(leaves: Mapping[str, Leaf], description: str) -> argparse.ArgumentParser:
    """The command line: one `--group.key` (also with dashes) a setting, with its docstring and default as help."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.error = _raise_usage  # type: ignore[method-assign]
    parser.add_argument("--config", metavar="RECIPE.yaml", help="YAML file of settings; the command line wins over it.")
    sections: dict[str, Any] = {}
    for name, leaf in leaves.items():
        if name == "config":
            raise TypeError("a setting may not be called 'config', the option that names the recipe.")
        group = name.rpartition(".")[0]
        if group not in sections:
            sections[group] = parser.add_argument_group(group) if group else parser
        default = "required" if leaf.default is MISSING else f"default: {leaf.default}"
        sections[group].add_argument(
            *dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]),
            dest=name,
            **_argument_count(leaf.expected),
            metavar="VALUE",
            help=f"{leaf.doc} [{_name(leaf.expected)}; {default}]".replace("%", "%%"),
        )
    return parser


def _argument_count(expected: Any) -> dict[str, Any]:
    """How many words follow an option: any number for a list, one or none for a bool, else one."""
    if get_origin(expected) is Annotated:
        return _argument_count(get_args(expected)[0])
    if get_origin(expected) in (Union, types.UnionType):
        counts = [_argument_count(option) for option in get_args(expected) if option is not type(None)]
        return next((count for count in counts if count), {})
    if get_origin(expected) in (list, tuple):
        return {"nargs": "*"}
    return {"nargs": "?", "const": "true"} if expected is bool else {}


def field_docstrings(cls: type) -> dict[str, str]:
    """The string below each field of a dataclass, base classes included; empty where the source is not at hand."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]
        except (OSError, TypeError, SyntaxError):
            continue
        for node, below in itertools.pairwise(body):
            is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and is_text:
                docs[node.target.id] = inspect.cleandoc(str(below.value.value)).replace("\n", " ")  # type: ignore[attr-defined]
    return docs


def _read_recipe(path: Path) -> dict[Any, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"--config {path}: no such file; expected a YAML file of settings.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"--config {path}: cannot be read as YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError(f"--config {path}: got {type(content).__name__}, expected a mapping of setting to value.")
    return content


def _raise_usage(message: str) -> NoReturn:
    raise SettingsError(f"command line: {message}.")


def _raise_unknown(given: str, name: str, known: Sequence[str], where: str) -> NoReturn:
    if not given.startswith("-") and where == "on the command line":
        raise SettingsError(f"got '{given}' on the command line, expected --group.setting value.")
    known = [*known, "config"] if where == "on the command line" else list(known)
    advice = (
        f"did you mean '{nearest}'?" if (nearest := _nearest(name, known)) else f"known settings: {', '.join(known)}."
    )
    raise SettingsError(f"unknown setting '{given}' {where}; {advice}")


def _nearest(name: str, known: Sequence[str]) -> str | None:
    """The known setting that is spelled most like a name, its group left out or mistaken or not."""

    def likeness(setting: str) -> float:
        whole = difflib.SequenceMatcher(None, name, setting).ratio()
        last = difflib.SequenceMatcher(None, name.rpartition(".")[2], setting.rpartition(".")[2]).ratio()
        return max(whole, last) + whole / 100

    best = max(known, key=likeness)
    return best if likeness(best) > 0.6 else None


def _convert(value: Any, expected: Any, key: str, where: str, *, from_text: bool) -> Any:
    """`value` as the type that the annotation asks for.

    A recipe's values have types already; those of the command line (`from_text`) are lists of words.
    """
    mismatch = SettingsError(f"setting '{key}' {where}: got {_show(value, from_text)}, expected {_name(expected)}.")
    origin, arguments = get_origin(expected), get_args(expected)
    if origin is Annotated:
        try:
            converted = _convert(value, arguments[0], key, where, from_text=from_text)
        except SettingsError:
            raise mismatch from None
        for bounds in arguments[1:]:
            items = converted if isinstance(converted, list | tuple) else [converted]
            if isinstance(bounds, Range) and any(item is not None and item not in bounds for item in items):
                raise mismatch
        return converted
    if origin in (Union, types.UnionType):
        nothing = value is None or (from_text and [word.lower() for word in value] in (["none"], ["null"]))
        if nothing and type(None) in arguments:
            return None
        for option in arguments:
            if option is not type(None):
                try:
                    return _convert(value, option, key, where, from_text=from_text)
                except SettingsError:
                    continue
        raise mismatch
    if origin in (list, tuple):
        if not isinstance(value, list):
            raise mismatch
        words = [[word] for word in value] if from_text else value
        fixed_length = origin is tuple and not (len(arguments) == 2 and arguments[1] is Ellipsis)
        if fixed_length and len(words) != len(arguments):
            raise mismatch
        kinds = arguments if fixed_length else [arguments[0]] * len(words)
        try:
            items = [_convert(w, k, key, where, from_text=from_text) for w, k in zip(words, kinds, strict=True)]
        except SettingsError:
            raise mismatch from None
        return origin(items)
    if from_text:
        if len(value) != 1:
            raise mismatch
        value = value[0]
    if origin is Literal:
        for option in arguments:
            if (type(option) is type(value) and option == value) or (from_text and str(option) == value):
                return option
        raise mismatch
    if origin is dict or expected is dict:
        if from_text:
            try:
                value = yaml.safe_load(value)
            except yaml.YAMLError:
                raise mismatch from None
        if not isinstance(value, dict):
            raise mismatch
        if not arguments or arguments[1] is Any:
            return value
        try:
            return {name: _convert(one, arguments[1], key, where, from_text=False) for name, one in value.items()}
        except SettingsError:
            raise mismatch from None
    if expected is bool:
        if isinstance(value, bool):
            return value
        if from_text and value.lower() in ("true", "false"):
            return value.lower() == "true"
        raise mismatch
    if expected is float:
        # YAML 1.1 reads 1e-3 (no dot) as a string, so a string is accepted where it spells a number.
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            try:
                number = float(value)
            except ValueError:
                raise mismatch from None
            if not math.isnan(number):
                return number
        raise mismatch
    if expected is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if from_text:
            try:
                return int(value)
            except ValueError:
                raise mismatch from None
        raise mismatch
    if expected is Path and isinstance(value, str) and value:
        return Path(value).expanduser()
    if expected is str and isinstance(value, str):
        return value
    if expected not in (str, Path):
        raise TypeError(f"setting '{key}' has the annotation {expected!r}, which settings do not support.")
    raise mismatch


def _show(value: Any, from_text: bool) -> str:
    """What was found, in the words of the file or of the command line."""
    if from_text:
        return "'" + " ".join(value)[:80] + "'"
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"


def _name(expected: Any) -> str:
    """A type in words: 'float at least 0', 'one of constant, cosine', 'list of str'."""
    origin, arguments = get_origin(expected), get_args(expected)
    if origin is Annotated:
        bounds = " ".join(str(bound) for bound in arguments[1:] if isinstance(bound, Range))
        return f"{_name(arguments[0])} {bounds}".strip()
    if origin in (Union, types.UnionType):
        return " or ".join("none" if option is type(None) else _name(option) for option in arguments)
    if origin is Literal:
        return f"one of {', '.join(str(option) for option in arguments)}"
    if origin is list or (origin is tuple and arguments[-1] is Ellipsis):
        return f"list of {_name(arguments[0])}"
    if origin is tuple:
        return f"list of {len(arguments)}: {', '.join(_name(option) for option in arguments)}"
    if origin is dict or expected is dict:
        free = not arguments or arguments[1] is Any
        return "mapping" if free else f"mapping to {_name(arguments[1])}"
    return {Path: "path"}.get(expected, getattr(expected, "__name__", str(expected)))
