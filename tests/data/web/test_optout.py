import time

import pytest

from hubgen.data.web.downloading.optout import Robots, forbidding_header


@pytest.mark.parametrize(
    ("text", "allowed", "forbidden"),
    [
        ("User-agent: *\nDisallow: /a", ["/b", "/"], ["/a", "/a.jpg", "/a/b"]),
        ("User-agent: *\nDisallow:", ["/a"], []),
        # The longest rule wins, wherever it stands, and Allow wins a tie (RFC 9309, 2.2.2).
        ("User-agent: *\nDisallow: /a/\nAllow: /a/b", ["/a/b.jpg"], ["/a/c"]),
        ("User-agent: *\nDisallow: /a\nAllow: /a", ["/a"], []),
        ("User-agent: *\nDisallow: /*.gif$", ["/a.gif?x", "/a.jpg"], ["/a.gif", "/b/a.gif"]),
        ("User-agent: *\nDisallow: /a*b*c", ["/ab", "/acb"], ["/abc", "/axxbxxc/d"]),
        # Our own group stands for itself, and several of its name are one.
        ("User-agent: *\nDisallow: /\n\nUser-agent: HubGen/1.0\nAllow: /", ["/a"], []),
        ("User-agent: hubgen\nDisallow: /a\nUser-agent: x\nDisallow: /\nUser-agent: hubgen\nDisallow: /b",
         ["/c"], ["/a", "/b"]),
        ("User-agent: x\nUser-agent: hubgen\nDisallow: /a", ["/b"], ["/a"]),
        ("User-agent: hubgenerator\nDisallow: /", ["/a"], []),
        ("# all\nuser-agent : *  # everyone\nDISALLOW : /a # that\nSitemap: http://b/", ["/b"], ["/a"]),
        # Two spellings of a path are one.
        ("User-agent: *\nDisallow: /ü", ["/u"], ["/%C3%BC", "/%c3%bc"]),
        ("User-agent: *\nDisallow: /%61", ["/b"], ["/a"]),
        ("User-agent: *\nDisallow: /?", ["/", "/a?b"], ["/?a"]),
        ("Disallow: /\nnonsense\n:\n", ["/a"], []),
        ("User-agent: *\nDisallow: /", ["/robots.txt"], ["/"]),
    ],
)  # fmt: skip
def test_robots_are_read_as_the_standard_says(text: str, allowed: list[str], forbidden: list[str]) -> None:
    robots = Robots(text, "hubgen")
    assert [path for path in allowed if not robots.allows(f"http://a.example{path}")] == []
    assert [path for path in forbidden if robots.allows(f"http://a.example{path}")] == []


def test_no_pattern_takes_long() -> None:
    robots = Robots("User-agent: *\nDisallow: /" + "*a" * 200 + "b$", "hubgen")
    begun = time.monotonic()
    assert robots.allows("http://a.example/" + "a" * 5000)
    assert time.monotonic() - begun < 1


@pytest.mark.parametrize(
    ("tags", "is_forbidden"),
    [
        ([], False),
        (["noai"], True),
        (["nofollow, NoImageAI"], True),
        (["otherbot: noai"], False),
        (["otherbot: noai, noindex"], False),
        (["otherbot: noai", "noindex"], True),
        (["HubGen: noai"], True),
        (["hubgen: nofollow, noml"], True),
        (["max-snippet: 5, noai"], True),
        (["unavailable_after: 25 Jun 2027 15:00:00 PST"], False),
        (["none"], True),
        (["all", "nosnippet"], False),
    ],
)
def test_headers_are_heeded_where_they_mean_us(tags: list[str], is_forbidden: bool) -> None:
    assert (forbidding_header(tags, None, "hubgen") is not None) == is_forbidden


def test_reserved_rights_are_heeded() -> None:
    assert forbidding_header([], "1", "hubgen") is not None
    assert forbidding_header([], "0", "hubgen") is None
