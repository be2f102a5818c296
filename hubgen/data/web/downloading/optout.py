"""What a site says about the use of its pictures: robots.txt, and headers of an answer.

robots.txt as RFC 9309 has it: the group of our product token, else of `*`; of its rules the longest match wins, and
Allow wins a tie. What the words of X-Robots-Tag mean, `robots` says.
"""

import re
from collections.abc import Iterable
from functools import cached_property
from urllib.parse import quote, unquote_to_bytes, urlsplit

from hubgen.data.web.downloading.robots import OPT_OUTS, robots_words


def forbidding_header(robots_tags: Iterable[str], tdm_reservation: str | None, agent: str) -> str | None:
    """What an answer's headers say against the use of its picture; `None` where they allow it.

    Args:
        robots_tags: Values of all X-Robots-Tag headers.
        tdm_reservation: Value of the TDM-Reservation header (W3C's protocol for text and data mining); "1": reserved.
        agent: Our product token.
    """
    if robots_words(robots_tags, agent) & set(OPT_OUTS):
        return "Use of image disallowed by X-Robots-Tag directive"
    if tdm_reservation is not None and tdm_reservation.strip() == "1":
        return "Use of image disallowed by TDM-Reservation"
    return None


class Robots:
    """The rules of a robots.txt for one crawler.

    Args:
        text: Of the file.
        agent: The crawler's product token, lower case.
    """

    def __init__(self, text: str, agent: str) -> None:
        groups: dict[str, list[tuple[bool, str]]] = {}
        names: list[str] = []
        in_rules = False
        for line in text.splitlines():
            field, colon, value = line.partition("#")[0].partition(":")
            field, value = field.strip().lower(), value.strip()
            if not colon:
                continue
            if field == "user-agent":
                if in_rules:
                    names, in_rules = [], False
                token = re.match(r"[a-zA-Z_-]+|\*", value)
                names.append(token[0].lower() if token else "")
                groups.setdefault(names[-1], [])
            elif field in ("allow", "disallow"):
                in_rules = True
                for name in names:
                    groups[name].append((field == "allow", value))
        self.rules = groups.get(agent, groups.get("*", []))

    @cached_property
    def _patterns(self) -> list[tuple[int, bool, re.Pattern[str]]]:
        """Rules by their length, the longest first, and of equal ones those that allow."""
        rules = []
        for allows, path in self.rules:
            if not path:  # "Disallow:" forbids nothing
                continue
            path, ends = _normal(path.removesuffix("$")), path.endswith("$")
            # One pass over the path for each star: no rule can make the match slow.
            pieces = [re.escape(piece) for piece in re.split(r"\*+", path)]
            pattern = pieces[0] + "".join(f"(?>.*?{piece})" for piece in pieces[1:-1] if piece)
            if len(pieces) > 1:
                last = pieces[-1]
                pattern += f"(?>.*{last})" if ends else f"(?>.*?{last})"
            rules.append((len(path) + ends, allows, re.compile(pattern + (r"\Z" if ends else ""), re.DOTALL)))
        return sorted(rules, key=lambda rule: (-rule[0], not rule[1]))

    def allows(self, url: str) -> bool:
        """Whether the crawler may ask for an address."""
        parts = urlsplit(url)
        path = _normal((parts.path or "/") + (f"?{parts.query}" if parts.query else ""))
        if path == "/robots.txt":
            return True
        return next((allows for _, allows, pattern in self._patterns if pattern.match(path)), True)


def _normal(path: str) -> str:
    """A path with each character escaped in one way, so that two spellings of it are equal."""
    return re.sub(
        r"(?:%[0-9a-fA-F]{2})+|[^\x00-\x7f]+",
        lambda match: quote(unquote_to_bytes(match[0]), safe="-._~"),
        path,
    )
