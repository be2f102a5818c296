"""A picture's bytes from its URL: redirects, retries, limits, and what sites say about the use of their pictures.

    fetcher = Fetcher(Limits(deadline=30), agent="hubgen", allowed=frozenset(), scratch=folder)
    fetched = fetcher.fetch("https://example.org/a.jpg", "000000012")
    fetched.problem                 # None, or why there is nothing
    fetched.content.read()          # bytes

Messages are img2dataset's where it has one ("HTTP Error 404: Not Found").
"""

import email.utils
import http.client
import ssl
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import SplitResult, urljoin

from hubgen.data.web.downloading.optout import Robots, forbidding_header
from hubgen.data.web.downloading.transfer import Clock, LocalFault, Names, TimedOut, Unusable, answer, body, checked_url

RETRIED = frozenset({408, 425, 429})
"""And 500 to 599"""
REDIRECTS = frozenset({301, 302, 303, 307, 308})
MAX_REDIRECTS = 8
IN_MEMORY = 2**18
"""Bytes of a body that are held in memory; longer ones go to a file"""
ROBOTS_BYTES = 500 * 1024
KNOWN_ROBOTS = 10_000


@dataclass(frozen=True)
class Limits:
    """How long a transfer may take, and how large it may be; none of it changes a picture that arrives."""

    timeout: float = 10.0
    """Seconds without a byte, of connecting too"""
    deadline: float = 30.0
    """Seconds for a URL in all: redirects, retries and the pauses before them"""
    retries: int = 2
    """Further attempts after a time-out and after the statuses 408, 425, 429 and 5xx"""
    backoff: float = 1.0
    """Seconds before the second attempt, twice as long before each further one; Retry-After can make it longer"""
    max_bytes: int = 32 * 2**20
    """Of a body"""


class Body:
    """Bytes as they arrive, in memory while they are few, else in a file.

    Args:
        path: Of that file.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._start, self.size = path, bytearray(), 0

    def write(self, piece: bytes) -> None:
        """Adds bytes; raises `LocalFault` where the file cannot take them."""
        self.size += len(piece)
        if self.size <= IN_MEMORY:
            self._start += piece
            return
        try:
            with self._path.open("ab") as file:
                file.write(self._start)
                file.write(piece)
        except OSError as error:
            raise LocalFault(f"{self._path}: {error.strerror or error}") from error
        self._start.clear()

    def read(self) -> bytes:
        """All of them."""
        return bytes(self._start) if self.size <= IN_MEMORY else self._path.read_bytes()

    def clear(self) -> None:
        """Forgets them."""
        self._path.unlink(missing_ok=True)
        self._start.clear()
        self.size = 0


@dataclass(frozen=True)
class Fetched:
    """What came of a URL."""

    content: Body
    problem: str | None = None


class _Failed(Exception):
    """No use in asking again."""


class _Again(Exception):
    """Another attempt may succeed, not before `wait` seconds."""

    def __init__(self, problem: str, wait: float = 0.0) -> None:
        super().__init__(problem)
        self.wait = wait


class Fetcher:
    """Fetches pictures; used by many threads at a time.

    Args:
        limits: Of each transfer.
        agent: Product token of the crawler, which robots.txt and X-Robots-Tag may name.
        allowed: Hosts whose addresses need not be public.
        scratch: Folder for bodies that are long.
    """

    def __init__(self, limits: Limits, agent: str, allowed: frozenset[str], scratch: Path) -> None:
        self.limits, self.agent, self.scratch = limits, agent.lower(), scratch
        self.names = Names(allowed)
        self._headers = {
            "User-Agent": f"Mozilla/5.0 (compatible; {agent})",
            "Accept": "image/*,*/*;q=0.8",
            "Accept-Encoding": "identity",
        }
        self._robots: OrderedDict[str, Future[Robots | str]] = OrderedDict()
        self._lock = threading.Lock()

    def close(self) -> None:
        """Lets go of its threads."""
        self.names.close()

    def fetch(self, url: str | None, name: str) -> Fetched:
        """The body of a URL's answer, or why there is none; never raises over what the other side does.

        Args:
            url: Anything.
            name: Of a file in the scratch folder, of this URL alone.

        Raises:
            LocalFault: This machine's disk is full, or it can open no more connections.
        """
        content = Body(self.scratch / name)
        problem = "no URL"
        if url:
            try:
                self._may_ask(checked_url(url))
                self._patiently(lambda clock: self._follow(url, clock, content))
                return Fetched(content)
            except (_Failed, Unusable) as failure:
                problem = str(failure)
        content.clear()
        return Fetched(content, problem)

    def _patiently(self, ask: Callable[[Clock], None]) -> None:
        """Asks again where that may help, while the deadline allows."""
        clock = Clock(self.limits.timeout, self.limits.deadline)
        for attempt in range(self.limits.retries + 1):
            try:
                ask(clock)
                return
            except _Again as again:
                problem, wait = str(again), again.wait
            except TimedOut as late:
                if late.past_deadline:
                    raise _Failed(str(late)) from None
                problem, wait = str(late), 0.0
            except http.client.IncompleteRead as error:
                raise _Failed(f"body ended {error.expected} bytes early") from None
            except http.client.HTTPException as error:
                raise _Failed(f"no HTTP: {type(error).__name__}") from None
            except ssl.SSLError as error:
                raise _Failed(f"<urlopen error [SSL] {error.reason}>") from None
            except OSError as error:
                raise _Failed(f"<urlopen error {_printable(str(error))}>") from None
            pause = max(wait, self.limits.backoff * 2**attempt)
            if attempt == self.limits.retries or time.monotonic() + pause >= clock.end:
                raise _Failed(problem)
            time.sleep(pause)

    def _follow(self, url: str, clock: Clock, content: Body) -> None:
        """The body of a URL's answer, through redirects; each address on the way is asked for by the same rules."""
        for _ in range(MAX_REDIRECTS + 1):
            parts = checked_url(url)
            self._may_ask(parts)
            with answer(parts, self.names, clock, self._headers) as response:
                following = self._redirected(response, parts)
                if following is None:
                    tags = response.headers.get_all("X-Robots-Tag", [])
                    forbidden = forbidding_header(tags, response.headers.get("TDM-Reservation"), self.agent)
                    if forbidden is not None:
                        raise _Failed(forbidden)
                    self._receive(response, clock, content, self.limits.max_bytes)
                    return
            url = following
        raise _Failed("too many redirects")

    def _redirected(self, response: http.client.HTTPResponse, parts: SplitResult) -> str | None:
        """Where an answer sends us; `None` where it is the answer itself."""
        status, reason = response.status, _printable(response.reason)
        location = response.headers.get("Location")
        if status in REDIRECTS and location:
            return urljoin(parts.geturl(), location.strip())
        if not 200 <= status < 300:
            problem = f"HTTP Error {status}: {reason}"
            if status in RETRIED or 500 <= status < 600:
                raise _Again(problem, _retry_after(response.headers.get("Retry-After")))
            raise _Failed(problem)
        return None

    @staticmethod
    def _receive(response: http.client.HTTPResponse, clock: Clock, content: Body, most: int) -> None:
        content.clear()
        if response.length is not None and response.length > most:
            raise _Failed("body too large")
        for piece in body(response, clock):
            if content.size + len(piece) > most:
                raise _Failed("body too large")
            content.write(piece)

    # ---- robots.txt ----

    def _may_ask(self, parts: SplitResult) -> None:
        """Raises where a site's robots.txt forbids a URL, or cannot be had (RFC 9309, 2.3.1)."""
        site = f"{parts.scheme}://{parts.netloc}"
        with self._lock:
            future = self._robots.get(site)
            is_first = future is None
            if future is None:
                future = self._robots[site] = Future()
                while len(self._robots) > KNOWN_ROBOTS:
                    self._robots.popitem(last=False)
            else:
                self._robots.move_to_end(site)
        if is_first:
            try:
                future.set_result(self._ask_robots(site))
            except BaseException as error:
                future.set_exception(error)
                raise
        robots = future.result()
        if isinstance(robots, str):
            raise _Failed(robots)
        if not robots.allows(parts.geturl()):
            raise _Failed("Use of image disallowed by robots.txt")

    def _ask_robots(self, site: str) -> Robots | str:
        """The rules of a site, or why no URL of it can be asked for. No file (4xx): everything is allowed."""
        content = Body(self.scratch / f"robots-{threading.get_ident()}")

        def ask(clock: Clock) -> None:
            url = f"{site}/robots.txt"
            for _ in range(MAX_REDIRECTS + 1):
                parts = checked_url(url)
                with answer(parts, self.names, clock, self._headers) as response:
                    if 400 <= response.status < 500 and response.status not in RETRIED:
                        return
                    following = self._redirected(response, parts)
                    if following is None:
                        content.clear()
                        for piece in body(response, clock):
                            content.write(piece)
                            if content.size >= ROBOTS_BYTES:
                                return
                        return
                url = following

        try:
            self._patiently(ask)
        except Unusable as problem:
            return str(problem)
        except _Failed as problem:
            return str(problem) if str(problem).startswith("<urlopen") else f"robots.txt unreachable: {problem}"
        robots = Robots(content.read()[:ROBOTS_BYTES].decode("utf-8-sig", "replace"), self.agent)
        content.clear()
        return robots


def _printable(text: str) -> str:
    return "".join(character for character in text if character.isprintable())[:200]


def _retry_after(value: str | None) -> float:
    """Seconds that an answer asks to wait; 0 where it does not say."""
    if value is None:
        return 0.0
    text = value.strip()
    if text.isascii() and text.isdecimal():
        return float(text[:9])
    try:
        when = email.utils.parsedate_to_datetime(text)
    except ValueError:
        return 0.0
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return max((when - datetime.now(UTC)).total_seconds(), 0.0)
