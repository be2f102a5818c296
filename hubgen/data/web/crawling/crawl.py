"""Candidates of image-text pairs from the files of a crawl: parsed, sieved by a recipe's rules, none of them twice.

    report = crawl(sorted(Path("crawl").glob("*.wat.gz")), load_recipe("laion-5b"), Path("cand"), workers=8)

    cand/00000.parquet        the pairs of the first file that are left: url, text, language, language_score, license,
                              page_url, crawl_file, hash
    cand/00000_stats.json     what each rule dropped; written last
    cand/report.json          the same of all files

Each file is a unit: a run that was killed is finished by starting it again, and gives the same tables, with any number
of workers. First every file is parsed (`.parsed`), then keys are compared bucket by bucket (`.repeats`), then the
tables are written without what stands in an earlier place; the folders in between go.
"""

import hashlib
import json
import shutil
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

from hubgen.data.errors import DataError
from hubgen.data.web.crawling.dedup import (
    Bloom,
    buckets_for,
    check_bloom,
    laion_hash,
    repeats_in,
    row_key,
    write_keys,
)
from hubgen.data.web.crawling.text import Detector, clean, needed
from hubgen.data.web.crawling.wat import CutFile, Link, Page, check_file, read_pages
from hubgen.data.web.engines.attempts import Engine
from hubgen.data.web.engines.engine import Report, run
from hubgen.data.web.rules import CRAWLED, Recipe, Sieve
from hubgen.data.web.shards import STATS, TABLE, read_stats, read_table, shard_name, table_rows, write_table
from hubgen.data.web.stages import Stage, Work, alone_in, to_do
from hubgen.formats.atomic import written

PARSED, REPEATS, SEEN = ".parsed", ".repeats", ".seen"
KEYS = ".keys"
REPORT = "report.json"
LICENSES = "creativecommons.org/licenses/"
LONGEST_LICENSE = 80
UNKNOWN = "?"
"""The licence of a picture with no link to one before it on its page, as LAION has it"""
SAMPLED = 2**16
"""Bytes at each end of a file that its digest is made of, beside name and size: hashing a crawl would be reading it"""
REPEATED = "repeated"
"""What the report calls rows that stand in an earlier place"""


class Pair(Mapping[str, Any]):
    """A picture's link and its text, with the columns that rules ask for; each is made when it is asked for.

    Args:
        page: Where it stands.
        link: The link.
        license: The last link to a Creative Commons licence before it, or "?".
        recipe: How texts are made fit.
        detector: Of languages.
    """

    def __init__(self, page: Page, link: Link, license: str, recipe: Recipe, detector: Detector) -> None:
        self.robots, self.page_url = page.robots, page.url
        self.path, self.alt, self.license = link.path, link.alt, license
        self._page, self._link, self._recipe, self._detector = page, link, recipe, detector

    def __getitem__(self, column: str) -> Any:
        return getattr(self, column)

    def __iter__(self) -> Any:
        return iter(COLUMNS)

    def __len__(self) -> int:
        return len(COLUMNS)

    @cached_property
    def url(self) -> str:
        """The whole address; as it stands on the page where it cannot be joined to the page's."""
        given = self._link.url.strip().translate(NO_LINES)
        with suppress(ValueError):
            given = urljoin(self._page.base, given)
        return given[: self._recipe.longest_url]

    @cached_property
    def host(self) -> str:
        """Of the address, in lower case; "" where it has none."""
        try:
            return urlsplit(self.url).hostname or ""
        except ValueError:
            return ""

    @cached_property
    def text(self) -> str:
        """The `alt`, made fit and cut."""
        return clean(self.alt or "", self._recipe.clean)[: self._recipe.longest_text]

    @cached_property
    def _found(self) -> tuple[str, float]:
        return self._detector(self.text)

    @property
    def language(self) -> str:
        """As a code of ISO 639; "" where the detector is not sure."""
        return self._found[0]

    @property
    def language_score(self) -> float:
        """The detector's probability."""
        return self._found[1]

    @cached_property
    def hash(self) -> int:
        """LAION's."""
        return laion_hash(self.url, self.text)


NO_LINES = str.maketrans("", "", "\n\r\t")
COLUMNS = ("robots", "path", "alt", "host", *CRAWLED[:-2], "hash")
"""What rules of a crawl may ask for"""


def pairs_of(page: Page, recipe: Recipe, detector: Detector) -> list[Pair]:
    """The pictures of a page, in order: each link that is an image or has an `alt`."""
    license, pairs = UNKNOWN, []
    for link in page.links:
        if LICENSES in link.url:
            license = link.url.translate(NO_LINES)[:LONGEST_LICENSE]
        if link.alt is not None or link.path.startswith("IMG@"):
            pairs.append(Pair(page, link, license, recipe, detector))
    return pairs


def schema() -> Any:
    """The table's columns and types."""
    import pyarrow as pa

    other = {"language_score": pa.float32(), "hash": pa.int64()}
    return pa.schema({name: other.get(name, pa.string()) for name in CRAWLED})


@dataclass
class Parse(Stage):
    """A file of a crawl to the pairs that the rules leave, with their keys.

    Args:
        recipe: The rules.
        on_error: Of a file that is cut off or broken: "fail", or "skip" for what comes after the fault.
    """

    recipe: Recipe
    on_error: str = "fail"
    name = "parse"
    unit = "files"

    @property
    def settings(self) -> dict[str, Any]:  # type: ignore[override]
        """The recipe's; `on_error` is none, for whole files are the same with both."""
        return self.recipe.settings("crawl")

    def setup(self) -> None:
        """Opens the detector."""
        self._detector = Detector(self.recipe.detector, self.recipe.least_score)

    def __call__(self, work: Work, folder: Path) -> dict[str, Any]:
        """Writes 00000.parquet and 00000.keys."""
        import pyarrow as pa

        sieve = Sieve(self.recipe.steps["crawl"], COLUMNS)
        counts: Counter[str] = Counter()
        columns: dict[str, list[Any]] = {name: [] for name in CRAWLED}
        keys = []
        problem = None
        try:
            for page in read_pages(work.source, counts):
                for pair in pairs_of(page, self.recipe, self._detector):
                    counts["links"] += 1
                    if not sieve(pair):
                        continue
                    row = {name: work.source.name if name == "crawl_file" else pair[name] for name in CRAWLED}
                    keys.append(row_key(row[name] for name in self.recipe.unique))
                    for name, value in row.items():
                        columns[name].append(value)
        except CutFile as error:
            if self.on_error == "fail":
                raise
            problem = str(error)
        write_table(folder / f"{work.name}{TABLE}", pa.table(columns, schema=schema()))
        write_keys(folder / f"{work.name}{KEYS}", keys)
        counted = {name: counts[name] for name in COUNTS}
        return {"count": len(keys), "file": work.source.name, "cut": problem, **counted, "dropped": sieve.dropped}


COUNTS = ("records", "broken_records", "pages", "links")


@dataclass
class Compare(Stage):
    """A bucket of keys to the rows of it that stand in an earlier place."""

    parsed: Path
    shards: int
    buckets: int
    name = "compare"
    unit = "buckets"

    @property
    def settings(self) -> dict[str, Any]:  # type: ignore[override]
        """How many buckets there are."""
        return {"buckets": self.buckets}

    def __call__(self, work: Work, folder: Path) -> dict[str, Any]:
        """Writes 00000.parquet: shard and row."""
        import pyarrow as pa

        files = [self.parsed / f"{shard_name(number)}{KEYS}" for number in range(self.shards)]
        shard, row = repeats_in(files, work.number, self.buckets)
        write_table(folder / f"{work.name}{TABLE}", pa.table({"shard": shard, "row": row}))
        return {"count": len(row)}


class Keep(Stage):
    """A table of pairs to the same without rows that stand in an earlier place; subclasses know which these are."""

    name = "crawl"
    unit = "files"
    parsed: Path

    @abstractmethod
    def stays(self, work: Work, table: Any) -> Any:
        """Whether each row stays: (N,), of truth values."""

    def __call__(self, work: Work, folder: Path) -> dict[str, Any]:
        """Writes 00000.parquet."""
        import pyarrow as pa

        table = read_table(self.parsed / f"{work.name}{TABLE}")
        stays = self.stays(work, table)
        kept = table.filter(pa.array(stays, pa.bool_()))
        write_table(folder / f"{work.name}{TABLE}", kept)
        stats = read_stats(self.parsed / f"{work.name}{STATS}")
        before = {name: stats[name] for name in ("file", "cut", *COUNTS)}
        dropped = {**stats["dropped"], REPEATED: len(table) - len(kept)}
        return {"count": len(kept), **before, "dropped": dropped}


@dataclass
class KeepFirst(Keep):
    """Exact: the rows that buckets named go."""

    parse: Parse
    parsed: Path
    repeats: Path
    buckets: int = 1

    @property
    def settings(self) -> dict[str, Any]:  # type: ignore[override]
        """Those of parsing, and that all is compared."""
        return {**self.parse.settings, "dedup": "exact"}

    def stays(self, work: Work, table: Any) -> Any:
        """Looks the shard up in each bucket's table."""
        import numpy as np
        import pyarrow.parquet as pq

        stays = np.ones(len(table), bool)
        for bucket in range(self.buckets):
            path = self.repeats / f"{shard_name(bucket)}{TABLE}"
            named = pq.read_table(path, columns=["row"], filters=[("shard", "==", work.number)])
            stays[named["row"].to_numpy()] = False
        return stays


@dataclass
class KeepNew(Keep):
    """By a Bloom filter: rows whose key it takes for known go. Files come one after the other."""

    parse: Parse
    parsed: Path
    out: Path
    capacity: int
    error: float

    @property
    def settings(self) -> dict[str, Any]:  # type: ignore[override]
        """Those of parsing, and of the filter."""
        return {**self.parse.settings, "dedup": "bloom", "capacity": self.capacity, "error": self.error}

    def setup(self) -> None:
        """Takes the filter of the run before, and adds what was committed since."""
        saved = self.out / SEEN
        done = int((saved / "shards").read_text()) if saved.is_dir() else 0
        self.bloom = Bloom(self.capacity, self.error, saved / "filter" if done else None)
        self.next = done
        while self._is_committed(self.next):
            table = read_table(self.out / f"{shard_name(self.next)}{TABLE}", list(self.parse.recipe.unique))
            for key in self._keys(table):
                self.bloom.add(key)
            self.next += 1

    def _is_committed(self, number: int) -> bool:
        return number < 0 or (self.out / f"{shard_name(number)}{STATS}").exists()

    def _keys(self, table: Any) -> list[int]:
        values = [table[name].to_pylist() for name in self.parse.recipe.unique]
        return list(map(row_key, zip(*values, strict=True)))

    def stays(self, work: Work, table: Any) -> Any:
        """Asks the filter, and adds what is new."""
        if work.number != self.next or not self._is_committed(work.number - 1):
            raise DataError("an earlier file failed, and must be compared before")
        stays = [self.bloom.add(key) for key in self._keys(table)]
        self.next += 1
        return stays

    def close(self) -> None:
        """Saves the filter, if all that it holds was committed."""
        if not self._is_committed(self.next - 1):
            return
        with written(self.out / SEEN) as folder:
            folder.mkdir()
            self.bloom.save(folder / "filter")
            (folder / "shards").write_text(str(self.next))


class IncompleteCrawl(DataError):
    """Some files could not be read: the others are, and starting again after mending them goes on."""


def crawl(
    files: Sequence[Path],
    recipe: Recipe,
    out: Path,
    *,
    dedup: str = "exact",
    capacity: int = 100_000_000,
    error: float = 0.001,
    on_error: str = "fail",
    engine: str | Engine = "local",
    workers: int = 1,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Candidates from WAT or WARC files, in a folder; what was done before stays.

    Args:
        files: In the order that decides which of two equal pairs is the first.
        recipe: See `load_recipe`.
        out: The folder, new or of an earlier run with the same files and settings. With `dedup` "bloom", further files
            may follow those of the earlier run.
        dedup: "exact" or "bloom".
        capacity: Of the Bloom filter: pairs that it is made for.
        error: Of the Bloom filter: share of new pairs that it may drop once it holds so many.
        on_error: What becomes of a file that ends too soon or is broken from some byte on: "fail", or "skip" to take
            what stands before.
        engine: See `hubgen.data.web.engines.engine`; a Bloom filter's turn is always local.
        workers: Processes.
        show_progress: Whether bars show how far it is.

    Returns:
        The content of `report.json`: `recipe`, `files`, `cut_files`, `records`, `broken_records`, `pages`, `links`,
        `dropped` (a count for each rule, and `repeated`), `kept`, `dedup`. `links` is the sum of `dropped` and `kept`.

    Raises:
        ValueError: An argument is out of range.
        DataError: A file is no WAT or WARC, or the folder holds something else; before anything is parsed.
        IncompleteCrawl: Some files are broken, and `on_error` is "fail".
    """
    if dedup not in ("exact", "bloom"):
        raise ValueError(f"`dedup`: got {dedup!r}, expected exact or bloom.")
    if on_error not in ("fail", "skip"):
        raise ValueError(f"`on_error`: got {on_error!r}, expected fail or skip.")
    check_bloom(capacity, error)
    if not files:
        raise ValueError("`files`: got none, expected WAT or WARC files.")
    twice = [path for path, times in Counter(path.resolve() for path in files).items() if times > 1]
    if twice:
        raise DataError(f"{twice[0]}: found twice among the files, expected each once")
    for path in files:
        check_file(path)
    Sieve(recipe.steps["crawl"], COLUMNS)

    for module in (
        "mmh3",
        *(["ftfy"] if "mojibake" in recipe.clean else []),
        *(["rbloom"] if dedup == "bloom" else []),
    ):
        needed(module)
    Detector(recipe.detector)  # which says what is not installed
    parse = Parse(recipe, on_error)
    parsed, repeats = out / PARSED, out / REPEATS
    exact = KeepFirst(parse, parsed, repeats)
    keep: Keep = exact if dedup == "exact" else KeepNew(parse, parsed, out, capacity, error)
    own = [digest_of(path) for path in files]
    works = [Work(number, path, 0, 1, digest) for number, (path, digest) in enumerate(zip(files, own, strict=True))]
    outcomes = [
        Work(work.number, parsed / f"{work.name}{TABLE}", 0, 1, digest)
        for work, digest in zip(works, together(own, all_at_once=dedup == "exact"), strict=True)
    ]

    def do(stage: Stage, works: Sequence[Work], folder: Path) -> None:
        is_ordered = isinstance(stage, KeepNew)
        report = run(
            stage,
            works,
            folder,
            engine="local" if is_ordered else engine,
            workers=1 if is_ordered else min(workers, len(works)),  # one needs no pool
            show_progress=show_progress,
        )
        require(report, works, stage.name)

    with alone_in(out):
        pending = to_do(keep, outcomes, out)
    if pending:
        if dedup == "bloom":  # the others' are removed
            works = works[pending[0].number :]
            for name in [path.name.removesuffix(STATS) for path in parsed.glob(f"*{STATS}")]:
                if int(name) < works[0].number:
                    for path in parsed.glob(f"{name}*"):
                        path.unlink()
        do(parse, works, parsed)
        if dedup == "exact":
            rows = sum(table_rows(parsed / f"{work.name}{TABLE}") for work in works)
            exact.buckets = buckets_for(rows)
            compare = Compare(parsed, len(works), exact.buckets)
            buckets = [Work(number, parsed, 0, 1, outcomes[0].digest) for number in range(exact.buckets)]
            do(compare, buckets, repeats)
        do(keep, outcomes, out)
    for folder in (parsed, repeats):
        shutil.rmtree(folder, ignore_errors=True)
    return write_report(recipe, keep, outcomes, out)


def digest_of(path: Path) -> str:
    """Of a file's name, size, first and last bytes."""
    size = path.stat().st_size
    digest = hashlib.sha256(f"{path.name} {size}\n".encode())
    with path.open("rb") as file:
        digest.update(file.read(SAMPLED))
        file.seek(max(0, size - SAMPLED))
        digest.update(file.read(SAMPLED))
    return digest.hexdigest()


def together(digests: Sequence[str], *, all_at_once: bool) -> list[str]:
    """What each shard follows from: all files, or those up to its own."""
    joined, chain = [], hashlib.sha256()
    for digest in digests:
        chain.update(digest.encode())
        joined.append(chain.hexdigest())
    return [joined[-1]] * len(joined) if all_at_once else joined


def require(report: Report, works: Sequence[Work], stage: str) -> None:
    """Raises IncompleteCrawl, with what went wrong first, if something did."""
    if report.failed:
        name, problem = next(iter(sorted(report.failed.items())))
        raise IncompleteCrawl(
            f"{stage}: {len(report.failed)} of {len(works)} failed, such as {name}: {problem}; the others are done, "
            "and starting again goes on"
        )


def write_report(recipe: Recipe, keep: Keep, works: Sequence[Work], out: Path) -> dict[str, Any]:
    """Adds up the shards' counts, and writes `report.json`."""
    counts: Counter[str] = Counter()
    dropped: dict[str, int] = {}
    cut = {}
    for work in works:
        stats = read_stats(out / f"{work.name}{STATS}")
        counts.update({name: stats[name] for name in ("count", *COUNTS)})
        for name, number in stats["dropped"].items():
            dropped[name] = dropped.get(name, 0) + number
        if stats["cut"]:
            cut[stats["file"]] = stats["cut"]
    report: dict[str, Any] = {"recipe": recipe.name, "files": len(works), "cut_files": cut}
    report |= {name: counts[name] for name in COUNTS} | {"dropped": dropped, "kept": counts["count"]}
    report["dedup"] = {"kind": "exact", "columns": list(recipe.unique)}
    if isinstance(keep, KeepNew):
        keep.setup()
        bloom = {"kind": "bloom", "capacity": keep.capacity, "error": keep.error}
        report["dedup"] |= bloom | {"error_now": keep.bloom.expected_error()}
    text = json.dumps(report, indent=4, ensure_ascii=False) + "\n"
    path = out / REPORT
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        with written(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return report
