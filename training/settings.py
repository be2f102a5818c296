"""Settings of a training script: one frozen dataclass, read from a YAML recipe and the command line, strictly typed.

A field's annotation is its check, the string below it is its help text:

    @dataclass(frozen=True)
    class Settings:
        data_dir: Path
        '''Folder of the training pictures.'''

        learning_rate: Annotated[float, Range(0)] = 1e-4
        '''Peak learning rate.'''

    settings = parse_settings(Settings, description=__doc__)    # --config recipe.yaml --learning_rate 3e-4

The command line wins over the recipe, the recipe over the defaults. Annotations may be int, float, str, bool, Path,
Literal, dict[str, Any], tuple[T, ...] and list[T] of those, `T | None`, and Annotated[T, Range(...)].
"""

import argparse
import ast
import dataclasses
import difflib
import inspect
import itertools
import math
import os
import sys
import textwrap
import traceback
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from hubgen.errors import is_expected, one_line
from hubgen.training.finite import NonFiniteError
from hubgen.training.interruption import Interrupted

T = TypeVar("T")

USAGE_ERROR = 2
"""Exit code of a run that was refused because of what it was given."""

UNFINISHED_ERROR = 4
"""Exit code of a run that has trained and saved, but could not validate or publish."""

NON_FINITE_ERROR = 3
"""Exit code of a run that stopped at a loss or gradient that is not finite."""


class SettingsError(ValueError):
    """A setting is unknown, missing, of the wrong type or out of range; the message names it."""


class UnfinishedError(RuntimeError):
    """The weights are trained and saved; something beside them failed."""


@dataclasses.dataclass(frozen=True)
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


def parse_settings(cls: type[T], argv: Sequence[str] | None = None, *, description: str = "") -> T:
    """The settings from `--config recipe.yaml` and the command line.

    Args:
        cls: A dataclass; fields without a default are required.
        argv: Arguments without the program's name; `sys.argv[1:]` by default.
        description: Text above the list of settings in `--help`.

    Raises:
        SettingsError: An unknown or missing key, a wrong type, a value out of range, an unreadable recipe. The message
            names the key and where it stood, what was found, what was expected, and the closest known key.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser, hints = _build_parser(cls, description), get_type_hints(cls, include_extras=True)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        _raise_unknown(unknown[0], unknown[0].lstrip("-").split("=")[0], hints, "on the command line")
    given_values = {key: value for key, value in vars(given).items() if value is not None}
    values: dict[str, Any] = {}
    recipe = given_values.pop("config", None)
    if recipe is not None:
        content = {str(key): value for key, value in _read_recipe(Path(recipe)).items()}
        for key in content:
            if key.replace("-", "_") not in hints:
                _raise_unknown(key, key, hints, f"in {recipe}")
        for key, value in content.items():
            name = key.replace("-", "_")
            if name in values:
                raise SettingsError(f"setting '{name}' stands twice in {recipe}; expected it once.")
            values[name] = _convert(value, hints[name], name, f"in {recipe}", from_text=False)
    for name, words in given_values.items():
        words = words if isinstance(words, list) else [words]
        values[name] = _convert(words, hints[name], name, "on the command line", from_text=True)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if field.name not in values and not has_default:
            where = f"in {recipe} or on the command line" if recipe is not None else "on the command line"
            raise SettingsError(f"setting '{field.name}' is missing; expected {_name(hints[field.name])} {where}.")
    return cls(**values)


def settings_to_dict(settings: Any) -> dict[str, Any]:
    """The settings as plain JSON values (paths as strings, tuples as lists)."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items()}
        return value

    return {field.name: plain(getattr(settings, field.name)) for field in dataclasses.fields(settings)}


def run_script(main: Callable[[Any], None], cls: type, *, description: str = "") -> NoReturn:
    """Parse the settings, run `main(settings)` and exit; an expected error becomes one line on stderr and no traceback.

    Exit codes: 0 done; 2 for what the user gave (settings, data, paths, a full disk); 3 for a loss that is not finite;
    4 for a run that is trained and saved, but failed to validate or publish; 128 + signal for a run that saved and
    stopped on a signal. `HUBGEN_TRACEBACK=1` prints the traceback as well.
    """
    try:
        main(parse_settings(cls, description=description))
    except Interrupted as stop:
        print(f"stopped: {stop}", file=sys.stderr)
        sys.exit(stop.exit_code)
    except Exception as error:
        codes = {NonFiniteError: NON_FINITE_ERROR, UnfinishedError: UNFINISHED_ERROR}
        if type(error) not in codes and not is_expected(error):
            raise
        if os.environ.get("HUBGEN_TRACEBACK"):
            traceback.print_exc()
        print(f"error: {one_line(error, 'try a smaller batch_size or size')}", file=sys.stderr)
        sys.exit(codes.get(type(error), USAGE_ERROR))
    sys.exit(0)


def _build_parser(cls: type, description: str) -> argparse.ArgumentParser:
    """The command line: one `--key` (also `--ke-y` with dashes) a field, with its docstring and default as help."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.error = _raise_usage  # type: ignore[method-assign]
    parser.add_argument("--config", metavar="RECIPE.yaml", help="YAML file of settings; the command line wins over it.")
    hints, docs = get_type_hints(cls, include_extras=True), field_docstrings(cls)
    for field in dataclasses.fields(cls):
        if field.name == "config":
            raise TypeError(f"{cls.__name__}: a field may not be called 'config', the option that names the recipe.")
        if field.default is not dataclasses.MISSING:
            default = f"default: {field.default}"
        elif field.default_factory is not dataclasses.MISSING:
            default = f"default: {field.default_factory()}"
        else:
            default = "required"
        flags = dict.fromkeys([f"--{field.name}", f"--{field.name.replace('_', '-')}"])
        parser.add_argument(
            *flags,
            dest=field.name,
            **_argument_count(hints[field.name]),
            metavar="VALUE",
            help=f"{docs.get(field.name, '')} [{_name(hints[field.name])}; {default}]".replace("%", "%%"),
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


def _raise_unknown(given: str, name: str, hints: dict[str, Any], where: str) -> NoReturn:
    if not given.startswith("-") and where == "on the command line":
        raise SettingsError(f"got '{given}' on the command line, expected --setting value.")
    known = [*hints, "config"] if where == "on the command line" else list(hints)
    close = difflib.get_close_matches(name.replace("-", "_"), known, n=1, cutoff=0.5)
    advice = f"did you mean '{close[0]}'?" if close else f"known settings: {', '.join(sorted(known))}."
    raise SettingsError(f"unknown setting '{given}' {where}; {advice}")


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
        return value
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
        return "mapping"
    return {Path: "path"}.get(expected, getattr(expected, "__name__", str(expected)))
