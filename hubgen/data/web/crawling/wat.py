"""Pages and their links, from the files of Common Crawl: WAT (what it found in each page, as JSON) and WARC (the HTML).

    for page in read_pages(Path("CC-MAIN-….warc.wat.gz"), counts := Counter()):
        page.base, page.links

Both are WARC 1.0 and 1.1 (ISO 28500), packed by gzip or not. In a WAT, `Links` has each link's place in the page
(`IMG@/src`), its address as it stands there, and the `alt` text of a picture; `Head` has `<base>` and meta elements.
"""

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import urljoin

from hubgen.data.errors import DataError
from hubgen.data.web.downloading.robots import robots_words

GZIP = b"\x1f\x8b"
WARC = b"WARC/"
LONGEST_LINE = 2**16
"""Bytes of a header's line at most"""
LARGEST_RECORD = 2**26
"""Bytes of a record that is read; larger ones are counted and passed over"""
IMAGE = "IMG@/src"
WHOLE = "expected a whole file"
SURROGATE = re.compile("[\ud800-\udfff]")
CHARSET = re.compile(rb"charset\s*=\s*[\"']?\s*([\w.:-]+)", re.IGNORECASE)


class Link(NamedTuple):
    """A link of a page: its place (`IMG@/src`, `A@/href`), its address as written, and its `alt`, if it has one."""

    path: str
    url: str
    alt: str | None


class Page(NamedTuple):
    """A page: its address, the one that relative links start from, the words for robots, and the links in order."""

    url: str
    base: str
    robots: frozenset[str]
    links: list[Link]


class CutFile(DataError):
    """A file that ends within a record, or whose packing is broken: what stands before is whole."""


def check_file(path: Path) -> None:
    """Looks at the first bytes alone.

    Raises:
        DataError: It is not there, or is neither packed by gzip nor a WARC file.
    """
    expected = "expected a WAT or WARC file of Common Crawl (.warc.wat.gz, .warc.gz)"
    try:
        with path.open("rb") as file:
            start = file.read(len(WARC))
    except OSError as error:
        raise DataError(f"{path}: found no file to read ({error.strerror}), {expected}") from error
    if start.startswith(GZIP):
        try:
            with gzip.open(path) as file:
                start = file.read(len(WARC))
        except EOFError:
            return  # cut in its first bytes: reading it says so
        except (gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path}: found broken gzip ({error}), {expected}") from error
    if start != WARC:
        raise DataError(f"{path}: found a file that starts with {start!r}, {expected}")


def read_pages(path: Path, counts: Counter[str]) -> Iterator[Page]:
    """The pages with pictures, in the order of the file; one cut between two records cannot be told from a whole one.

    Args:
        path: A WAT or WARC file.
        counts: Takes the numbers of `records` (pages and others, of whatever type), `pages` (with pictures) and
            `broken_records` (no JSON, HTML that cannot be parsed, an unknown packing, or larger than 64 MiB).

    Raises:
        CutFile: The file ends within a record, or is no WARC from some byte on; all pages before it were given.
    """
    with path.open("rb") as raw:
        packed = raw.read(2) == GZIP
        raw.seek(0)
        with gzip.GzipFile(fileobj=raw, mode="rb") if packed else raw as file:
            for headers, body in read_records(file, str(path)):  # type: ignore[arg-type]
                read = {"metadata": page_of_wat, "response": page_of_warc}.get(headers.get("warc-type", ""))
                if read is None:
                    continue
                counts["records"] += 1
                try:
                    page = read(headers, body)
                except (ValueError, AssertionError):  # html.parser asserts that markup is well-formed
                    counts["broken_records"] += 1
                    continue
                if page is not None:
                    counts["pages"] += 1
                    yield page


def read_records(file: BinaryIO, name: str) -> Iterator[tuple[dict[str, str], bytes | None]]:
    """Headers, with names in lower case, and content of each record; `None` for a content above `LARGEST_RECORD`.

    Raises:
        CutFile: See `read_pages`.
    """
    where = 0
    try:
        while line := file.readline(LONGEST_LINE):
            if not line.strip():  # between records
                where = file.tell()
                continue
            if not line.startswith(WARC):
                raise CutFile(f"{name}: found {line[:30]!r} at byte {where} (unpacked), expected a record of WARC")
            headers = {}
            while (line := file.readline(LONGEST_LINE)).strip():
                key, _, value = line.partition(b":")
                headers[key.decode("latin-1").strip().lower()] = value.decode("utf-8", "replace").strip()
            found = headers.get("content-length", "")
            if not line or not found:
                raise CutFile(f"{name}: found the end within a record's headers, at byte {where} (unpacked), {WHOLE}")
            if not re.fullmatch("[0-9]{1,18}", found):
                raise CutFile(f"{name}: found Content-Length {found!r} at byte {where}, expected a number of bytes")
            length = int(found)
            body = file.read(length) if length <= LARGEST_RECORD else None
            left = length - len(body) if body is not None else passed_over(file, length)
            if left:
                raise CutFile(f"{name}: found the end {left} bytes early, in the record of byte {where}, {WHOLE}")
            yield headers, body
            where = file.tell()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CutFile(
            f"{name}: found the end of what is packed, or a fault in it, after byte {where}, {WHOLE}"
        ) from error


def passed_over(file: BinaryIO, length: int) -> int:
    """Reads so many bytes away; how many of them were not there."""
    while length and (got := file.read(min(length, 2**20))):
        length -= len(got)
    return length


def page_of_wat(headers: dict[str, str], body: bytes | None) -> Page | None:
    """The page that a record of a WAT tells of; `None` where it has no pictures or is no page.

    Raises:
        ValueError: It is no JSON, or not of the form that WAT has.
    """
    if body is None:
        raise ValueError("too large")
    if b"IMG@" not in body:  # nine of ten; parsing would be most of the time
        return None
    envelope = json.loads(body)
    try:
        envelope = envelope["Envelope"]
        response = envelope["Payload-Metadata"].get("HTTP-Response-Metadata", {})
        html = response.get("HTML-Metadata", {})
        url = whole_text(envelope["WARC-Header-Metadata"]["WARC-Target-URI"])
        head = html.get("Head", {})
        said = [value for key, value in response.get("Headers", {}).items() if key.lower() == "x-robots-tag"]
        said += [meta.get("content") for meta in head.get("Metas", []) if str(meta.get("name")).lower() == "robots"]
        links = [
            Link(str(link.get("path", "")), whole_text(link["url"]), whole_text(link["alt"]) if "alt" in link else None)
            for link in html.get("Links", [])
            if "url" in link
        ]
        base = based(url, whole_text(head.get("Base", "")))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError("not of the form that WAT has") from error
    return Page(url, base, robots_words(map(str, flat(said))), links) if links else None


def flat(values: list[Any]) -> Iterator[Any]:
    """Values, and those in lists: a header that came twice is a list."""
    for value in values:
        yield from value if isinstance(value, list) else [value]


def whole_text(text: Any) -> str:
    """Text without halves of surrogate pairs, which no encoding has.

    Raises:
        TypeError: It is no text.
    """
    if not isinstance(text, str):
        raise TypeError(f"got {text!r}, expected text")
    return SURROGATE.sub("\ufffd", text)


def based(url: str, base: str) -> str:
    """The address that a page's relative links start from."""
    try:
        return urljoin(url, base.strip())
    except ValueError:
        return url


def page_of_warc(headers: dict[str, str], body: bytes | None) -> Page | None:
    """The page that a server sent; `None` where it has no pictures or is no HTML.

    Raises:
        ValueError: It is larger than is read, packed in another way than gzip or deflate, or no HTTP.
        AssertionError: html.parser's, of broken markup.
    """
    if body is None:
        raise ValueError("too large")
    start, empty, content = body.partition(b"\r\n\r\n")
    if not empty:
        raise ValueError("no HTTP")
    fields = [(key.strip().lower(), value.strip()) for key, _, value in map(split_field, start.split(b"\r\n")[1:])]
    kind = next((value for key, value in fields if key == "content-type"), "")
    if "html" not in kind.lower():
        return None
    packing = next((value.lower() for key, value in fields if key == "content-encoding"), "identity")
    if packing in ("gzip", "deflate"):
        try:
            content = zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(content, LARGEST_RECORD)
        except zlib.error as error:
            raise ValueError("broken packing") from error
    elif packing != "identity":
        raise ValueError("unknown packing")
    parser = LinkParser()
    parser.feed(decoded(content, kind))
    parser.close()
    url = whole_text(headers.get("warc-target-uri", "").strip("<>"))
    said = [value for key, value in fields if key == "x-robots-tag"]
    if not any(link.path == IMAGE for link in parser.links):
        return None
    return Page(url, based(url, parser.base or ""), robots_words(said + parser.robots), parser.links)


def split_field(line: bytes) -> tuple[str, str, str]:
    """A header's line, at its first colon."""
    return line.decode("latin-1").partition(":")


def decoded(content: bytes, kind: str) -> str:
    """HTML as text: by the header's charset, else the page's own, else UTF-8, else Windows-1252."""
    named = CHARSET.search(kind.encode()) or CHARSET.search(content[:1024])
    for encoding in (named[1].decode() if named else "utf-8", "utf-8"):
        try:
            return content.decode(encoding)
        except (LookupError, UnicodeDecodeError):
            continue
    return content.decode("windows-1252", "replace")


class LinkParser(HTMLParser):
    """Collects what a WAT has of a page: pictures and anchors in order, the first `<base>`, the words for robots."""

    def __init__(self) -> None:
        super().__init__()
        self.base: str | None = None
        self.robots: list[str] = []
        self.links: list[Link] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """One element, with its attributes unescaped."""
        given = {name: value or "" for name, value in reversed(attrs)}  # the first of two of a name counts
        if tag == "img" and "src" in given:
            alt = given.get("alt")
            self.links.append(Link(IMAGE, whole_text(given["src"]), None if alt is None else whole_text(alt)))
        elif tag == "a" and "href" in given:
            self.links.append(Link("A@/href", whole_text(given["href"]), None))
        elif tag == "base" and self.base is None and "href" in given:
            self.base = whole_text(given["href"])
        elif tag == "meta" and given.get("name", "").lower() == "robots":
            self.robots.append(given.get("content", ""))
