"""What a page or a picture's server asks of crawlers: the words of `X-Robots-Tag` and of `<meta name="robots">`.

Google's specification of the header: an agent's name and a colon before words say for whom they are, up to the next
name (`otherbot: noai, noindex`). `noai`, `noimageai` are DeviantArt's words, `noml` is Noml's.
"""

import re
from collections.abc import Iterable

CRAWLER = "hubgen"
"""The name that pages may call us by"""
OPT_OUTS = ("noai", "noimageai", "noindex", "noimageindex", "noml")
WITH_VALUE = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")
AGENT = re.compile(r"[a-z][\w.+-]*|\*")


def robots_words(values: Iterable[str], agent: str = CRAWLER) -> frozenset[str]:
    """The words that are meant for everybody or for `agent`, in lower case; `none` counts as `noindex, nofollow`.

    Args:
        values: Each of a header, or the content of a meta element.
        agent: The crawler's own name.
    """
    words: set[str] = set()
    for value in values:
        meant = True
        for part in value.lower().split(","):
            name, colon, rest = part.partition(":")
            name = name.strip()
            if colon and AGENT.fullmatch(name) and name not in WITH_VALUE:
                meant, part = name in ("*", agent.lower()), rest
            if meant:
                words.add(part.strip())
    if "none" in words:
        words |= {"noindex", "nofollow"}
    return frozenset(words - {""})
