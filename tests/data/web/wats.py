"""Files of a crawl for tests, written by warcio."""

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

TEXT = "a cat on a red sofa in the garden"


def image(url: str = "http://pictures.org/1.jpg", alt: str | None = TEXT, path: str = "IMG@/src") -> dict[str, str]:
    """A picture, as a WAT has it."""
    return {"path": path, "url": url} | ({} if alt is None else {"alt": alt})


def anchor(url: str) -> dict[str, str]:
    """A link, as a WAT has it."""
    return {"path": "A@/href", "url": url, "text": "see here"}


@dataclass
class WebPage:
    """A page by its links, its `<base>`, its words for robots in a meta element and in the header."""

    url: str
    links: Sequence[dict[str, str]] = field(default_factory=lambda: [image()])
    base: str | None = None
    meta: str | None = None
    header: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The record of a WAT, with what else Common Crawl writes there."""
        head: dict[str, Any] = {"Title": "A page", "Metas": [{"name": "viewport", "content": "width=device-width"}]}
        if self.base is not None:
            head["Base"] = self.base
        if self.meta is not None:
            head["Metas"].append({"name": "Robots", "content": self.meta})
        headers = {"Content-Type": "text/html", **({} if self.header is None else {"X-Robots-Tag": self.header})}
        html = {"Head": head, "Links": list(self.links)}
        response = {"Response-Message": {"Status": "200"}, "Headers": headers, "HTML-Metadata": html}
        payload = {"Actual-Content-Type": "application/http; msgtype=response", "HTTP-Response-Metadata": response}
        warc = {"WARC-Type": "response", "WARC-Target-URI": self.url}
        return {"Container": {}, "Envelope": {"WARC-Header-Metadata": warc, "Payload-Metadata": payload}}

    def as_html(self) -> str:
        """The page itself."""
        from html import escape

        head = "" if self.base is None else f'<base href="{self.base}">'
        head += "" if self.meta is None else f'<META NAME=robots content="{self.meta}">'
        body = ""
        for link in self.links:
            if link["path"] == "A@/href":
                body += f'<a href="{escape(link["url"])}">see here</a>'
            else:
                alt = f'alt="{escape(link["alt"])}"' if "alt" in link else ""
                body += f'<img class=x src="{escape(link["url"])}" {alt}/>'
        return f"<!doctype html><title>A page</title>{head}<body><p>{body}<script>'<img src=no.jpg alt=no>'</script>"


def write_wat(path: Path, pages: Iterable[WebPage], *further: bytes, packed: bool = True) -> None:
    """Writes a WAT file; `further` are contents of records that are none."""
    with path.open("wb") as file:
        writer = WARCWriter(file, gzip=packed)
        writer.write_record(writer.create_warcinfo_record(path.name, {"software": "test"}))
        contents = [(page.url, json.dumps(page.as_json()).encode()) for page in pages]
        for url, content in [*contents, *(("http://broken.org/", content) for content in further)]:
            record = writer.create_warc_record(
                url, "metadata", payload=io.BytesIO(content), warc_content_type="application/json"
            )
            writer.write_record(record)


def write_warc(path: Path, pages: Iterable[WebPage], charset: str = "utf-8") -> None:
    """Writes a WARC file: each page's request and its response."""
    with path.open("wb") as file:
        writer = WARCWriter(file, gzip=True)
        for page in pages:
            sent = StatusAndHeaders("GET / HTTP/1.1", [("Host", "page.org")], is_http_request=True)
            writer.write_record(writer.create_warc_record(page.url, "request", http_headers=sent))
            headers = [("Content-Type", f"text/html; charset={charset}")]
            headers += [] if page.header is None else [("x-robots-tag", page.header)]
            got = StatusAndHeaders("200 OK", headers, protocol="HTTP/1.1")
            body = io.BytesIO(page.as_html().encode(charset))
            writer.write_record(writer.create_warc_record(page.url, "response", payload=body, http_headers=got))
