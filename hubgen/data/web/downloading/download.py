"""Candidates (`url`, `text`) -> shards of pictures: the stage of `hubgen data download`.

    download = Download(Columns(), Resizing(512, "keep_ratio"))
    works = download.works(Path("cand"))
    report = run(download, works, Path("shards"), workers=4)

A shard holds a row for each candidate. What could not be had keeps its row, with a status and the reason; it is asked
for again by `replace(download, retry_failed=True)`, and then those rows alone.
"""

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa

from hubgen.data.errors import DataError
from hubgen.data.web.downloading.candidates import candidate_files, read_rows, schema_of, works_of
from hubgen.data.web.downloading.fetch import Fetched, Fetcher, Limits
from hubgen.data.web.downloading.resize import Resizing
from hubgen.data.web.downloading.turns import InOrder
from hubgen.data.web.shards import (
    COLUMNS,
    NOT_DOWNLOADED,
    NOT_RESIZED,
    PLACE,
    STATS,
    SUCCESS,
    Outcome,
    StoredShard,
    read_stats,
    write_shard,
)
from hubgen.data.web.stages import Stage, Work, is_committed

DIGESTS = ("md5", "sha256", "sha512")
RESERVED = (*COLUMNS, *PLACE)


@dataclass(frozen=True)
class Columns:
    """What is read of the candidates; further columns are kept under their names."""

    url: str = "url"
    caption: str | None = "text"
    """Becomes `caption`; `None`: there are none"""
    digest: str | None = "sha256"
    """Algorithm of a column that holds the downloaded bytes' digest; `None`: no such column"""
    expected_digest: str | None = None
    """Column of the digests that the files must have (img2dataset's `verify_hash`)"""

    def check(self, path: Path) -> None:
        """Raises DataError unless a table has these columns, and none that a shard has for itself."""
        schema = schema_of(path)
        found = list(schema.names)
        for name in (self.url, self.caption, self.expected_digest):
            if name is not None and name not in found:
                raise DataError(f"{path}: got the columns {found}, expected {name!r} too")
        used = [name for name in (self.url, self.caption, self.expected_digest) if name is not None]
        for name in used:
            if found.count(name) > 1:
                raise DataError(f"{path}: got the column {name!r} twice, expected it once")
            try:
                _as_text(pa.chunked_array([], schema.field(name).type))
            except pa.ArrowException:
                raise DataError(f"{path}: got {schema.field(name).type} in {name!r}, expected text") from None
        names = [name for name in found if name not in used]
        taken = {*RESERVED, "url", *([self.digest] if self.digest else []), *(["caption"] if self.caption else [])}
        for name in names:
            if name in taken or names.count(name) > 1:
                raise DataError(f"{path}: got the column {name!r}, a name that shards use otherwise; rename it")

    def of(self, table: Any) -> Any:
        """A table as a shard has it: further columns, `caption`, `url`."""
        used = {self.url, self.caption, self.expected_digest}
        names = [name for name in table.column_names if name not in used]
        chosen = {name: table.column(name) for name in names}
        if self.caption is not None:
            chosen["caption"] = _as_text(table.column(self.caption))
        chosen["url"] = _as_text(table.column(self.url))
        return pa.table(chosen)


def _as_text(column: Any) -> Any:
    return column.cast(pa.string())


@dataclass(frozen=True)
class Manners:
    """How a crawler behaves; see `Fetcher` and `InOrder`."""

    agent: str = "hubgen"
    """Product token, which robots.txt and X-Robots-Tag may name"""
    allowed_hosts: tuple[str, ...] = ()
    """Hosts whose addresses need not be public"""
    threads: int = 64
    """Of each worker"""
    per_host: int = 4
    """Requests of a worker to one host at a time"""
    pause: float = 0.0
    """Seconds from one request of a worker to a host to the next"""


@dataclass(frozen=True)
class Download(Stage):
    """Downloads the rows of a shard.

    Threads fetch, several at a time; decoding is done in the order of the rows, one picture at a time, so that memory
    is bounded whatever the sites send. More workers decode in parallel.
    """

    columns: Columns = field(default_factory=Columns)
    resizing: Resizing = field(default_factory=Resizing)
    limits: Limits = field(default_factory=Limits)
    manners: Manners = field(default_factory=Manners)
    rows: int = 10_000
    """Of a shard"""
    retry_failed: bool = False
    """Ask for the failed rows of shards that are there, and keep the others as they are"""

    name = "download"

    @property
    def settings(self) -> Mapping[str, Any]:  # type: ignore[override]
        """What a shard follows from; how long and how often a site is asked is not part of it."""
        columns = {f"{name}_column": value for name, value in asdict(self.columns).items()}
        others = {"max_bytes": self.limits.max_bytes, "agent": self.manners.agent}
        allowed = sorted(self.manners.allowed_hosts)
        return {**columns, **asdict(self.resizing), **others, "allowed_hosts": allowed, "rows": self.rows}

    def works(self, source: Path) -> list[Work]:
        """The input of each shard.

        Args:
            source: A table of candidates, or a folder of some.

        Raises:
            DataError: A table cannot be read, or lacks a column.
        """
        files = candidate_files(source)
        for path in files:
            self.columns.check(path)
        return works_of(files, self.rows)

    def is_done(self, work: Work, folder: Path) -> bool:
        """Whether a shard is there; with `retry_failed`, whether it is there and without failures."""
        if not is_committed(folder, work, self):
            return False
        if not self.retry_failed:
            return True
        stats = read_stats(folder / f"{work.name}{STATS}")
        return stats["successes"] == stats["count"]

    def __call__(self, work: Work, folder: Path) -> dict[str, Any]:
        """Downloads a shard; see `Stage`."""
        given = read_rows(work)
        table = self.columns.of(given)
        expected = given.column(self.columns.expected_digest).to_pylist() if self.columns.expected_digest else None
        kept: dict[int, Outcome | tuple[StoredShard, dict[str, Any]]] = {}
        if self.retry_failed and (folder.parent / f"{work.name}{STATS}").exists():
            stored = StoredShard(folder.parent, work.name)
            for row, values in enumerate(stored.read([*COLUMNS, *self._digest_columns(), *PLACE]).to_pylist()):
                if values["status"] == SUCCESS:
                    kept[row] = (stored, values)
        scratch = folder.with_name(f"{folder.name}-bodies")  # begins like what a killed run leaves, and is swept so
        scratch.mkdir()
        fetcher = Fetcher(self.limits, self.manners.agent, frozenset(self.manners.allowed_hosts), scratch)
        try:
            outcomes = self._outcomes(table.column("url").to_pylist(), expected, kept, fetcher)
            return write_shard(
                folder,
                work.number,
                self.rows,
                table,
                outcomes,
                digest=self.columns.digest,
                ending=self.resizing.encoding,
            )
        finally:
            fetcher.close()
            shutil.rmtree(scratch, ignore_errors=True)

    def _digest_columns(self) -> list[str]:
        return [self.columns.digest] if self.columns.digest else []

    def _outcomes(
        self, urls: list[str | None], expected: list[str | None] | None, kept: Mapping[int, Any], fetcher: Fetcher
    ) -> Iterator[Outcome]:
        """Of each row: as it was, or fetched."""
        wanted = [row for row in range(len(urls)) if row not in kept]
        fetched = iter(
            InOrder(
                lambda index: fetcher.fetch(urls[wanted[index]], str(wanted[index])),
                [_host(urls[row]) for row in wanted],
                self.manners.threads,
                self.manners.per_host,
                self.manners.pause,
            )
        )
        for row in range(len(urls)):
            if row in kept:
                stored, values = kept[row]
                fields = {name: values[name] for name in COLUMNS if name != "key"}
                digest = values[self.columns.digest] if self.columns.digest else None
                yield Outcome(**fields, picture=stored.picture(values["offset"], values["size"]), digest=digest)
            else:
                yield self._outcome(next(fetched), expected[row] if expected is not None else None)

    def _outcome(self, fetched: Fetched, expected: str | None) -> Outcome:
        if fetched.problem is not None:
            return Outcome(NOT_DOWNLOADED, fetched.problem)
        content = fetched.content.read()
        fetched.content.clear()
        digest = hashlib.new(self.columns.digest, content).hexdigest() if self.columns.digest else None
        if self.columns.expected_digest is not None and (expected or "").strip().lower() != digest:
            return Outcome(NOT_DOWNLOADED, "hash mismatch")
        outcome = self.resizing(content)
        if outcome.status == NOT_RESIZED:
            return outcome
        return Outcome(**{**vars(outcome), "digest": digest})


def _host(url: str | None) -> str:
    try:
        return (urlsplit((url or "").strip()).hostname or "").lower()
    except ValueError:
        return ""
