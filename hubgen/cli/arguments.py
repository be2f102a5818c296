"""The parser of every command, and what a word on the command line may be: each function reads one kind of argument."""

from __future__ import annotations

import argparse
import difflib
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from hubgen.hub.finding import HUB_ID
from hubgen.hub.provenance import LARGEST_SEED, LARGEST_SIDE

EXIT_ERROR = 2


class Parser(argparse.ArgumentParser):
    """argparse with its errors in hubgen's one line."""

    def refuse_unknown(self, words: Sequence[str]) -> NoReturn:
        """Ends with the options that this parser does not know, and the nearest ones that it does."""
        known = re.findall(r"--[\w-]+", self.format_usage())
        for word in words:
            name = word.split("=")[0]
            inside = [option for option in known if len(name) > 4 and name.lstrip("-") in option]
            near = inside or difflib.get_close_matches(name, known, n=1)
            if near:
                self.error(f"unrecognized arguments: {' '.join(words)}; the nearest option is {near[0]}")
        self.error(f"unrecognized arguments: {' '.join(words)}")

    def error(self, message: str) -> NoReturn:
        print(f"hubgen: error: {' '.join(message.split())} (see `{self.prog} --help`)", file=sys.stderr)
        raise SystemExit(EXIT_ERROR)


def add_command(commands: Any, name: str, *, summary: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """A subcommand's parser; line breaks in `description` and `epilog` are kept."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(parser=parser)
    return parser


def positive(text: str) -> int:
    """From 1 to 10,000; for `type=` of argparse."""
    number = whole(text)
    if not 1 <= number <= 10_000:  # more would be a slip of the keyboard, and days of work
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number from 1 to 10000")
    return number


def count(text: str) -> int:
    """From 1, and however large, such as pixels of a picture or steps of a run."""
    number = whole(text)
    if not 1 <= number <= 10**12:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number from 1")
    return number


def seed(text: str) -> int:
    """A seed that every generator takes."""
    number = whole(text)
    if not 0 <= number <= LARGEST_SEED:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number from 0 to 2^63 - 1")
    return number


def whole(text: str) -> int:
    """An integer, in decimal digits."""
    if not re.fullmatch(r"[+-]?[0-9]{1,30}", text):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number")
    return int(text)


def finite(text: str) -> float:
    """A number other than infinity and NaN."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a finite number")
    return number


def file_and_weight(text: str) -> tuple[str, float]:
    """`style.safetensors:0.8` to the file and its weight, which is 1 where none is given.

    Only a number behind the last colon is a weight: colons may stand in names, and in those of Windows' drives.
    """
    file, colon, weight = text.rpartition(":")
    if not text or (colon and not file):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a file or owner/name, and :WEIGHT behind it or not")
    if not colon or Path(text).exists():
        return text, 1.0
    try:
        number = float(weight)
    except ValueError:
        if not Path(file).exists():
            return text, 1.0
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"got the weight {weight!r} for {file}, expected a finite number")
    return file, number


CONTROL = re.compile(
    r"(?P<net>[^=]+)=(?P<image>.+?)(:(?P<scale>-?[\d.]+)(:(?P<start>[\d.]+)-(?P<end>[\d.]+))?)?", re.DOTALL
)


def control(text: str) -> dict[str, Any]:
    """`owner/canny=edges.png:0.8:0-0.6` to the fields of `UsedControl`."""
    expected = "NET=PICTURE, and :SCALE or :SCALE:START-END behind it or not"
    match = CONTROL.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected {expected}")
    try:
        numbers = {name: float(match[name]) for name in ("scale", "start", "end") if match[name] is not None}
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected {expected}") from error
    found = {"net": match["net"], "image": match["image"], "scale": 1.0, "start": 0.0, "end": 1.0, **numbers}
    if not 0 <= found["start"] < found["end"] <= 1:
        raise argparse.ArgumentTypeError(
            f"got {match['start']}-{match['end']} in {text!r}, expected 0 <= START < END <= 1"
        )
    return found


def file_and_word(text: str) -> tuple[str, str | None]:
    """`frog.safetensors=<zog>` to the file and what prompts are to call its word; `None` for the file's own name."""
    file, equals, word = text.rpartition("=")
    if not equals or Path(text).exists():
        file, word = text, ""
    if not file or (equals and not word.strip() and not Path(text).exists()):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a file or owner/name, and =WORD behind it or not")
    return file, word or None


def positive_number(text: str) -> float:
    """Above 0, and finite."""
    number = finite(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number above 0")
    return number


def repository(text: str) -> str:
    """`owner/name` on the Hub."""
    if not HUB_ID.fullmatch(text):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected owner/name on the Hub")
    return text


def size(text: str) -> tuple[int, int]:
    """`64` or `96x64` to (width, height) in pixels."""
    match = re.fullmatch(r"([0-9]{1,9})(?:[xX×]([0-9]{1,9}))?", text)
    sides = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not all(1 <= side <= LARGEST_SIDE for side in sides):
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected N or WIDTHxHEIGHT in pixels, from 1 to {LARGEST_SIDE}, such as 64 or 96x64"
        )
    return sides


# ---------------------------------------------------------------------------------------------------------------------


def fraction(text: str) -> float:
    """Above 0, up to 1."""
    number = finite(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number above 0 and at most 1")
    return number
