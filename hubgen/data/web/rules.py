"""The rules by which image-text data is chosen from the web: each is a function with a name, a recipe lists them.

    recipe = load_recipe("laion-5b")
    sieve = Sieve(recipe.steps["crawl"])
    kept = [row for row in rows if sieve(row)]
    sieve.dropped                                     # {"page_opt_out": 2, "valid_url": 1, ...}

A rule is given the columns that it names and says whether the row stays. What is equal to a threshold stays. A value
that is missing (`None`: a score that was not computed) is no reason to stay where a rule asks for one.

Sources: LAION-400M (Schuhmann et al., 2021) and LAION-5B (2022) with the crawler's published code; DataComp (Gadre et
al., 2023). Where code and report differ, or the code has a known fault, the rule says which is followed.
"""

import inspect
import re
import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hubgen.checks import is_number, is_whole
from hubgen.data.errors import DataError
from hubgen.data.web.crawling.wat import IMAGE
from hubgen.data.web.downloading.robots import OPT_OUTS

STAGES = ("crawl", "download", "filter")
RECIPES = Path(__file__).parent / "recipes"
CRAWLED = (
    "url",
    "text",
    "language",
    "language_score",
    "license",
    "page_url",
    "crawl_file",
    "hash",
)
"""Columns of candidates, as `crawl` writes them"""


@dataclass(frozen=True)
class Rule:
    """A rule as recipes know it.

    Attributes:
        name: Of the function.
        stage: Which stage has the columns: "crawl", "download" or "filter".
        columns: What the function is given, in order.
        keeps: The function.
        limits: Least and most of each threshold.
        remembers: Whether it is also given what it has seen in this file (`seen`, a set).
    """

    name: str
    stage: str
    columns: tuple[str, ...]
    keeps: Callable[..., bool]
    limits: Mapping[str, tuple[float, float]]
    remembers: bool

    @property
    def thresholds(self) -> dict[str, Any]:
        """The thresholds that a recipe may set, with what they are if it does not."""
        named = inspect.signature(self.keeps).parameters.values()
        return {one.name: one.default for one in named if one.kind is one.KEYWORD_ONLY and one.name != "seen"}


RULES: dict[str, Rule] = {}


def rule(stage: str, *columns: str, **limits: tuple[float, float]) -> Callable[[Callable[..., bool]], Any]:
    """Makes a function a rule of a stage, on these columns; `limits` are least and most of its thresholds."""

    def register(keeps: Callable[..., bool]) -> Callable[..., bool]:
        remembers = "seen" in inspect.signature(keeps).parameters
        RULES[keeps.__name__] = Rule(keeps.__name__, stage, columns, keeps, limits, remembers)
        return keeps

    return register


# --- crawl: before anything is downloaded ---------------------------------------------------------------------------


@rule("crawl", "robots")
def page_opt_out(robots: Collection[str], *, words: Sequence[str] = OPT_OUTS) -> bool:
    """Pages that say none of `words` to robots stay, by meta element or by header."""
    return not any(word in robots for word in words)


@rule("crawl", "alt")
def has_alt(alt: str | None) -> bool:
    """Links with an `alt` that is not empty stay."""
    return bool(alt)


@rule("crawl", "path")
def image_source(path: str) -> bool:
    """The `src` of `img` elements stays (cc2dataset); LAION took each link that has an `alt`."""
    return path == IMAGE


@rule("crawl", "url")
def http_url(url: str) -> bool:
    """Addresses of http and https stay."""
    return url.lower().startswith(("http://", "https://"))


LABEL = re.compile(r"[^\W_](([^\W_]|-){0,61}[^\W_])?")
LAST_LABEL = re.compile(r"xn--[a-z0-9-]{1,59}|[^\W\d_]([^\W\d_]|-){0,61}[^\W\d_]", re.IGNORECASE)


@rule("crawl", "url")
def valid_url(url: str) -> bool:
    """Addresses of http and https stay that have no white space and a host that can be one.

    A host is an address in numbers, `localhost`, or names of letters, digits and inner hyphens of which the last has
    no digits and two letters or more; as Django's URLValidator has it, which LAION called. LAION's crawler tested
    relative addresses too, and so lost them; here they are absolute by now.
    """
    if not http_url(url) or re.search(r"[\s\x00-\x1f\x7f\ufffd]", url):
        return False
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:  # brackets that do not fit, a port beyond 65535
        return False
    if not host or port == 0 or len(host) > 253:
        return False
    if ":" in host or host == "localhost":
        return True
    if re.fullmatch(r"[0-9.]+", host):
        numbers = host.split(".")
        return len(numbers) == 4 and all(one.isdigit() and len(one) <= 3 and int(one) < 256 for one in numbers)
    labels = host.removesuffix(".").split(".")
    return len(labels) > 1 and all(map(LABEL.fullmatch, labels)) and LAST_LABEL.fullmatch(labels[-1]) is not None


@rule("crawl", "url")
def url_without(url: str, *, parts: Sequence[str] = (".svg", ".gif", "data:image", "javascript:")) -> bool:
    """Addresses with none of `parts` anywhere in them stay; upper case differs, as in LAION."""
    return not any(part in url for part in parts)


@rule("crawl", "host", most=(1, 253))
def host_length(host: str, *, most: int = 60) -> bool:
    """Hosts of 1 to `most` characters stay."""
    return 1 <= len(host) <= most


@rule("crawl", "text", least=(0, 100_000))
def text_length(text: str, *, least: int = 5) -> bool:
    """Texts of at least `least` characters stay."""
    return len(text) >= least


@rule("crawl", "text", least=(0, 10_000))
def word_count(text: str, *, least: int = 3) -> bool:
    """Texts of at least `least` words stay; white space parts words."""
    return len(text.split()) >= least


@rule("crawl", "language")
def languages(language: str, *, allowed: Sequence[str] = ("en",)) -> bool:
    """Texts in one of these languages stay; "" is a language that the detector is not sure of."""
    return language in allowed


@rule("crawl", "url")
def first_in_file(url: str, *, seen: set[str]) -> bool:
    """The first use of an address in a WAT file stays, of those that came this far."""
    if url in seen:
        return False
    seen.add(url)
    return True


# --- download: of the file that was fetched -------------------------------------------------------------------------


@rule("download", "byte_count", least=(0, 2**40))
def file_size(byte_count: int | None, *, least: int = 5000) -> bool:
    """Files of at least `least` bytes stay."""
    return byte_count is not None and byte_count >= least


@rule("download", "original_width", "original_height", most=(1, 2**40))
def pixel_count(original_width: int | None, original_height: int | None, *, most: int = 89_478_484) -> bool:
    """Pictures of at most `most` pixels stay; the default is a third of what Pillow calls a decompression bomb."""
    return bool(original_width and original_height) and original_width * original_height <= most  # type: ignore[operator]


@rule("download", "format")
def picture_format(format: str | None, *, allowed: Sequence[str] = ("JPEG", "PNG", "WEBP")) -> bool:
    """Pictures of these formats stay, named as Pillow names what it finds in the file."""
    return format in allowed


@rule("download", "original_width", "original_height", least=(1, 2**20))
def smaller_side(original_width: int | None, original_height: int | None, *, least: int = 200) -> bool:
    """Pictures whose smaller side has at least `least` pixels stay."""
    return min(original_width or 0, original_height or 0) >= least


@rule("download", "original_width", "original_height", most=(1, 2**20))
def aspect_ratio(original_width: int | None, original_height: int | None, *, most: float = 3.0) -> bool:
    """Pictures whose longer side is at most `most` times the smaller one stay."""
    short, long = sorted((original_width or 0, original_height or 0))
    return short > 0 and long <= most * short


# --- filter: of scores ------------------------------------------------------------------------------------------------


def single(number: float) -> float:
    """A threshold no higher than its value in single precision, in which scores are stored: equality stays."""
    return float(min(number, struct.unpack("f", struct.pack("f", number))[0]))


@rule("filter", "similarity", "language", least=(-1, 1), least_other=(-1, 1))
def similarity(similarity: float | None, language: str, *, least: float = 0.28, least_other: float = 0.26) -> bool:
    """Pairs stay whose cosine of picture and text is at least `least` in English, `least_other` else.

    0.28 and 0.26 are LAION-5B's, of CLIP ViT-B/32 and its multilingual twin; 0.3 is LAION-400M's. Other models have
    other scales.
    """
    if similarity is None:
        return False
    return similarity >= single(least if language == "en" else least_other)


FIRST_UNSAFE = 18
"""Of the 35 prompts of LAION's NSFW tag, those from here on are unsafe. Its code has 19: a comma was missing between
two prompts, so that the numbers of all that follow are one less, and prompt 18, unsafe, counted as safe."""


def nsfw_tag(nearest: Sequence[int], first_unsafe: int = FIRST_UNSAFE) -> str:
    """LAION's tag by the two prompts that are nearest to a picture: both unsafe `NSFW`, one `UNSURE`, none `UNLIKELY`.

    Args:
        nearest: The numbers of the two prompts.
        first_unsafe: See `FIRST_UNSAFE`.
    """
    return ("UNLIKELY", "UNSURE", "NSFW")[sum(number >= first_unsafe for number in nearest[:2])]


@rule("filter", "nsfw", "text", "under_age_prompts", first_adult=(0, 8))
def under_age(
    nsfw: str | None,
    text: str,
    under_age_prompts: Sequence[int] | None,
    *,
    first_adult: int = 4,
    words: Sequence[str] = ("teen", "kid", "child", "baby"),
) -> bool:
    """Of pictures tagged NSFW or UNSURE, those stay that neither prompts nor words say to show the young.

    Two of eight prompts are nearest; the first four name the young. Words are parts of the text, upper case differs.
    Pictures tagged UNLIKELY all stay.
    """
    if nsfw == "UNLIKELY":
        return True
    if under_age_prompts is None or any(number < first_adult for number in under_age_prompts[:2]):
        return False
    return not any(word in text for word in words)


@rule("filter", "nsfw", "animal_prompts", first_animal=(0, 33), nearest=(1, 2))
def animals(
    nsfw: str | None, animal_prompts: Sequence[int] | None, *, first_animal: int = 21, nearest: int = 2
) -> bool:
    """Of pictures tagged NSFW or UNSURE, those stay whose nearest prompts of 33 name no animal.

    LAION-400M's report looks at the two nearest prompts, LAION-5B's code at the nearest one.
    """
    if nsfw == "UNLIKELY":
        return True
    return animal_prompts is not None and all(number < first_animal for number in animal_prompts[:nearest])


# --- recipes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A rule with its thresholds."""

    rule: Rule
    thresholds: Mapping[str, Any]


class Sieve:
    """Applies steps in order and counts what each dropped; the first that drops a row is the one that counts.

    Args:
        steps: Of one stage.
        columns: Those that rows have; `None`: not known yet.

    Raises:
        DataError: A rule asks for a column that is not there.
    """

    def __init__(self, steps: Sequence[Step], columns: Collection[str] | None = None) -> None:
        for step in steps:
            missing = [name for name in step.rule.columns if columns is not None and name not in columns]
            if missing:
                raise DataError(
                    f"rule {step.rule.name}: found the columns {', '.join(sorted(columns or ()))}, expected "
                    f"{', '.join(missing)} among them"
                )
        self.steps = steps
        self.dropped = {step.rule.name: 0 for step in steps}
        self._keeps = [(step.rule.name, step.rule.columns, step.rule.keeps, self._given(step)) for step in steps]

    @staticmethod
    def _given(step: Step) -> dict[str, Any]:
        return {**step.thresholds, **({"seen": set()} if step.rule.remembers else {})}

    def __call__(self, row: Mapping[str, Any]) -> bool:
        """Whether a row stays; it need only give the columns that rules ask for."""
        for name, columns, keeps, given in self._keeps:
            if not keeps(*[row[column] for column in columns], **given):
                self.dropped[name] += 1
                return False
        return True


@dataclass(frozen=True)
class Recipe:
    """What a data set takes from the web.

    Attributes:
        name: Of the recipe.
        steps: Of each stage, in order.
        clean: Names of what is done to a text, in order; see `hubgen.data.web.crawling.text`.
        longest_url: Characters that an address is cut to; `None`: it is not.
        longest_text: As `longest_url`, of texts.
        detector: "cld3" or "fasttext".
        least_score: Probability from which a language counts as known, where the detector does not say so itself.
        unique: Columns that no two rows have alike.
    """

    name: str
    steps: Mapping[str, Sequence[Step]]
    clean: Sequence[str] = ()
    longest_url: int | None = None
    longest_text: int | None = None
    detector: str = "cld3"
    least_score: float = 0.0
    unique: Sequence[str] = ("url", "text")

    def settings(self, stage: str) -> dict[str, Any]:
        """What the rows that leave a stage follow from, as JSON values: each threshold is `rule.name`."""
        own = {name: getattr(self, name) for name in FIELDS} if stage == "crawl" else {}
        steps = self.steps[stage]
        thresholds = {f"{step.rule.name}.{key}": value for step in steps for key, value in step.thresholds.items()}
        return {**own, "rules": [step.rule.name for step in steps], **thresholds}


FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "clean": ("a list of steps", lambda value: is_words(value)),
    "longest_url": ("a whole number from 1, or null", lambda value: value is None or is_whole(value)),
    "longest_text": ("a whole number from 1, or null", lambda value: value is None or is_whole(value)),
    "detector": ("cld3 or fasttext", lambda value: value in ("cld3", "fasttext")),
    "least_score": ("a number from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1),
    "unique": (f"columns among {', '.join(CRAWLED)}", lambda value: is_words(value) and bool(value)),
}


def is_words(value: Any) -> bool:
    """Whether it is a list of texts."""
    return isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value)


def known_recipes() -> list[str]:
    """Names of the recipes that come with hubgen."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name: str) -> Recipe:
    """A recipe by its name, or of a YAML file of one's own.

    Raises:
        DataError: There is no such recipe; it is not of the form that recipes have; a rule, threshold or column is
            unknown, or a threshold out of its range. The message names the file.
    """
    import yaml

    path = RECIPES / f"{name}.yaml" if name in known_recipes() else Path(name)
    if not path.is_file():
        raise DataError(
            f"recipe {name}: found none of that name, expected {', '.join(known_recipes())}, or a .yaml file"
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: found no YAML ({' '.join(str(error).split())}), expected a recipe") from error
    return recipe_of(content, path.stem, str(path))


def recipe_of(content: Any, name: str, where: str) -> Recipe:
    """A recipe of what its file has.

    Args:
        content: As YAML gives it.
        name: Of the recipe.
        where: Name of the file, for messages.

    Raises:
        DataError: See `load_recipe`.
    """
    if not isinstance(content, dict):
        raise DataError(f"{where}: found {type(content).__name__}, expected a mapping with {', '.join(STAGES)}")
    unknown = sorted(str(key) for key in content if key not in (*STAGES, *FIELDS))
    if unknown:
        raise DataError(f"{where}: found {unknown[0]}, expected one of {', '.join((*STAGES, *FIELDS))}")
    given: dict[str, Any] = {}
    for key, (expected, is_right) in FIELDS.items():
        if key in content:
            if not is_right(content[key]):
                raise DataError(f"{where}: {key}: found {content[key]!r}, expected {expected}")
            given[key] = tuple(content[key]) if isinstance(content[key], list) else content[key]
    from hubgen.data.web.crawling.text import CLEANING

    for key, known in (("unique", CRAWLED), ("clean", tuple(CLEANING))):
        for one in given.get(key, ()):
            if one not in known:
                raise DataError(f"{where}: {key}: found {one!r}, expected some of {', '.join(known)}")
    steps = {stage: tuple(steps_of(content.get(stage) or [], stage, f"{where}: {stage}")) for stage in STAGES}
    return Recipe(name, steps, **given)


def steps_of(listed: Any, stage: str, where: str) -> list[Step]:
    """The steps of a stage: each item is a rule's name, or a mapping of the name to its thresholds.

    Raises:
        DataError: See `load_recipe`.
    """
    if not isinstance(listed, list):
        raise DataError(f"{where}: found {listed!r}, expected a list of rules")
    steps: list[Step] = []
    for item in listed:
        name, given = item, None
        if isinstance(item, dict) and len(item) == 1:
            name, given = next(iter(item.items()))
        known = [one for one in RULES if RULES[one].stage == stage]
        if name not in known:
            raise DataError(f"{where}: found the rule {name!r}, expected one of {', '.join(known)}")
        if any(step.rule.name == name for step in steps):
            raise DataError(f"{where}: found {name} twice, expected each rule once")
        steps.append(Step(RULES[name], thresholds_of(RULES[name], given or {}, f"{where}: {name}")))
    return steps


def thresholds_of(rule: Rule, given: Any, where: str) -> dict[str, Any]:
    """A rule's thresholds: those given, and its own for the rest.

    Raises:
        DataError: One is unknown, of another type, or out of its range.
    """
    usual = rule.thresholds
    if not isinstance(given, dict):
        raise DataError(f"{where}: found {given!r}, expected thresholds by name: {', '.join(usual) or 'it has none'}")
    for key, value in given.items():
        if key not in usual:
            raise DataError(f"{where}: found the threshold {key!r}, expected one of {', '.join(usual) or 'none'}")
        if isinstance(usual[key], tuple):
            is_right, expected = is_words(value), "a list of words"
        else:
            least, most = rule.limits[key]
            is_right = is_number(value) and least <= value <= most
            is_right = is_right and (isinstance(usual[key], float) or is_whole(value, least=int(least)))
            kind = "number" if isinstance(usual[key], float) else "whole number"
            expected = f"a {kind} from {least:g} to {most:g}"
        if not is_right:
            raise DataError(f"{where}: {key}: found {value!r}, expected {expected}")
    return {**usual, **{key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}}
