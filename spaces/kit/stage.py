"""Pictures on the page, as HTML of our own: what is being drawn, strips of several, and what is said about them.

Everything that a visitor typed is escaped here.
"""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from PIL import Image

CRISP = 160
"""Pixels of a side up to which enlarged pictures keep their pixels"""
SMALL = 256
"""Up to which frames are sent without loss"""


def data_url(picture: Image.Image) -> str:
    """A picture inside the page: for frames, which are seen for a moment."""
    buffer = io.BytesIO()
    small = max(picture.size) <= SMALL
    if small:
        picture.save(buffer, "PNG")
    else:
        picture.save(buffer, "WEBP", quality=80, method=0)
    return f"data:image/{'png' if small else 'webp'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def file_url(path: Path) -> str:
    """Of a file in the page's own folder, relative to the page."""
    return f"gradio_api/file={quote(str(path))}"


def image(source: str, alt: str, size: tuple[int, int], pixels: tuple[int, int] | None = None) -> str:
    """One picture, enlarged crisply where it is small.

    Args:
        source: Its address.
        alt: What it shows, for those who do not see it.
        size: (width, height) of its place.
        pixels: Its own, if they are others: fewer on its way.
    """
    crisp = ' class="crisp"' if max(pixels or size) <= CRISP else ""
    return f'<img{crisp} src="{escape(source)}" alt="{escape(alt)}" width="{size[0]}" height="{size[1]}">'


def figure(
    source: str,
    alt: str,
    size: tuple[int, int],
    caption: str = "",
    download: str = "",
    link: str = "Download PNG",
    pixels: tuple[int, int] | None = None,
) -> str:
    """A picture with what is said below it.

    Args:
        source: Its address.
        alt: What it shows, for those who do not see it.
        size: (width, height).
        caption: Below it.
        download: A file's name: adds a link that saves it.
        link: What that link reads.
        pixels: See `image`.
    """
    below = f"<span>{escape(caption)}</span>" if caption else ""
    if download:
        label = f"{link}: {alt}"
        below += (
            f'<a href="{escape(source)}" download="{escape(download)}" aria-label="{escape(label)}">{escape(link)}</a>'
        )
    below = f"<figcaption>{below}</figcaption>" if below else ""
    return f"<figure>{image(source, alt, size, pixels)}{below}</figure>"


def pictures(figures: Sequence[str]) -> str:
    """One large, or several in a square."""
    return f'<div class="pictures of-{min(len(figures), 4)}">{"".join(figures)}</div>'


def strip(figures: Sequence[str], title: str = "", large: bool = False) -> str:
    """Smaller ones side by side, with a title above."""
    head = f"<h3>{escape(title)}</h3>" if title else ""
    return (
        f'<section class="strip{" large" if large else ""}">{head}<div class="row">{"".join(figures)}</div></section>'
    )


def progress(step: int, of: int, text: str = "") -> str:
    """How far a call is."""
    text = text or f"Step {step} of {of}"
    return (
        f'<div class="progress"><p role="status">{escape(text)}</p>'
        f'<progress value="{step}" max="{max(of, 1)}" aria-label="{escape(text)}"></progress></div>'
    )


def said(text: str, kind: str = "note") -> str:
    """A line about the pictures."""
    return f'<p class="said {escape(kind)}" role="status">{escape(text)}</p>'


def stage(body: str, below: str = "") -> str:
    """The place where pictures appear."""
    return f'<div class="stage">{body}{below}</div>'


def empty(text: str) -> str:
    """The place before there are any."""
    dots = "".join(f'<rect x="{x}" y="{y}" width="1" height="1"/>' for x, y in SMILE)
    mark = f'<svg viewBox="0 0 12 12" aria-hidden="true">{dots}</svg>'
    return stage(f'<div class="empty">{mark}<p>{escape(text)}</p></div>')


SMILE = (
    *((x, 0) for x in range(4, 8)),
    *((2, 1), (3, 1), (8, 1), (9, 1), (1, 2), (10, 2), (1, 3), (10, 3)),
    *((x, y) for x in (0, 11) for y in range(4, 8)),
    *((4, 4), (7, 4), (4, 5), (7, 5), (3, 7), (8, 7), (4, 8), (5, 8), (6, 8), (7, 8)),
    *((1, 8), (10, 8), (1, 9), (10, 9), (2, 10), (3, 10), (8, 10), (9, 10)),
    *((x, 11) for x in range(4, 8)),
)
"""A face of pixels"""
MARK = "".join(f'<rect x="{x}" y="{y}" width="1" height="1"/>' for x, y in SMILE)


def header(title: str, text: str) -> str:
    """The top of a page, with the switch between light and dark."""
    return (
        f'<header class="top"><svg viewBox="0 0 12 12" aria-hidden="true">{MARK}</svg>'
        f"<div><h1>{escape(title)}</h1><p>{escape(text)}</p></div>"
        '<button type="button" onclick="hubgenTheme()" aria-label="Switch between light and dark">'
        '<svg viewBox="0 0 24 24" aria-hidden="true"><path d="M12 3a9 9 0 1 0 0 18z"/>'
        '<circle cx="12" cy="12" r="9" fill="none" stroke="currentColor" stroke-width="2"/></svg></button></header>'
    )


def footer(parts: Sequence[str]) -> str:
    """The line at the bottom."""
    return f'<p class="foot">{" · ".join(escape(part) for part in parts if part)}</p>'
