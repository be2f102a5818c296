"""A site that does all it can against a download; each row has its stated status, and memory stays bounded."""

import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from hubgen.data.web.downloading.fetch import Fetcher, Limits
from hubgen.data.web.downloading.transfer import LocalFault, Unusable, checked_url, is_public
from hubgen.data.web.shards import open_shards
from tests.data.web.site import Answer, Site, file_of, in_turn, picture, redirect, reply, serving

GOOD = file_of(picture(40, 30))
ALLOWED = frozenset({"127.0.0.1", "localhost"})
DEADLINE = 1.5


def png(width: int, height: int) -> bytes:
    """A black PNG of one bit a pixel, small however large it says it is."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer, row = zlib.compressobj(1), bytes(1 + (width + 7) // 8)
    packed = b"".join(packer.compress(row * 100) for _ in range(height // 100)) + packer.flush()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def endlessly(piece: bytes, pause: float) -> Answer:
    """A body without a length and without an end."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(piece)
            time.sleep(pause)

    return answer


def dripping_headers(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
    while True:
        handler.wfile.write(b"a")
        time.sleep(0.1)


def silent(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(3)


def promised(length: int, sent: bytes) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(length))
        handler.end_headers()
        handler.wfile.write(sent)

    return answer


def not_http(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"SSH-2.0-OpenSSH_9.9\r\n")


OK = ("success", None)


def refused(message: str) -> tuple[str, str]:
    return ("failed_to_download", message)


def unreadable(message: str = "Image decoding error") -> tuple[str, str]:
    return ("failed_to_resize", message)


def asked_of(site: Site) -> dict[str, tuple[Answer | None, tuple[str, str | None]]]:
    """Path or URL to the site's answer, and what shall become of the row. `localhost` is allowed, 127.0.0.1 is not."""
    busy = reply(b"later", "text/plain", 503)
    return {
        "/good.jpg": (reply(GOOD), OK),
        "file:///etc/hostname": (None, refused("unsupported scheme: file")),
        "data:image/png;base64,iVBORw0KGgo=": (None, refused("unsupported scheme: data")),
        "ftp://localhost/a.jpg": (None, refused("unsupported scheme: ftp")),
        "": (None, refused("no URL")),
        "http://": (None, refused("invalid URL")),
        "http://user:secret@localhost/a.jpg": (None, refused("URL with a user name or password")),
        "http://[::1]/a.jpg": (None, refused("address not public: ::1")),
        "http://10.1.2.3/a.jpg": (None, refused("address not public: 10.1.2.3")),
        "http://169.254.169.254/latest/meta-data": (None, refused("address not public: 169.254.169.254")),
        f"http://2130706433:{site.port}/good.jpg": (None, refused("address not public: 127.0.0.1")),
        f"http://{'a' * 70}.example/a.jpg": (None, refused("no such host")),
        "/to-file": (redirect("file:///etc/hostname"), refused("unsupported scheme: file")),
        "/to-loopback": (redirect(site.url("/good.jpg")), refused("address not public: 127.0.0.1")),
        "/round": (redirect("/round"), refused("too many redirects")),
        "/drip.jpg": (endlessly(b"\xff", 0.1), refused("deadline passed")),
        "/drip-headers.jpg": (dripping_headers, refused("deadline passed")),
        "/silent.jpg": (silent, refused("timed out")),
        "/huge.jpg": (promised(10**10, b"\xff\xd8" * 1000), refused("body too large")),
        "/endless.jpg": (endlessly(b"\xff" * 2**20, 0), refused("body too large")),
        "/short.jpg": (promised(len(GOOD), GOOD[:-100]), refused("body ended 100 bytes early")),
        "/ssh.jpg": (not_http, refused("no HTTP: BadStatusLine")),
        "/bomb.png": (reply(png(30_000, 30_000), "image/png"), unreadable("image area too large")),
        "/thread.png": (reply(png(600_000, 100), "image/png"), unreadable("image area too large")),
        "/kind.jpg": (reply(GOOD, "text/html"), OK),
        "/page.jpg": (reply(b"<html><script>alert(1)</script></html>"), unreadable()),
        "/cut.jpg": (reply(GOOD[: len(GOOD) // 2]), unreadable()),
        "/404.jpg": (reply(b"", status=404), refused("HTTP Error 404: Not Found")),
        "/503-200.jpg": (in_turn(busy, reply(GOOD)), OK),
        "/503.jpg": (busy, refused("HTTP Error 503: Service Unavailable")),
        "/noai.jpg": (reply(GOOD, headers=(("X-Robots-Tag", "noai"),)), refused(TAGGED)),
        "/other.jpg": (reply(GOOD, headers=(("X-Robots-Tag", "otherbot: noai"),)), OK),
        "/tdm.jpg": (
            reply(GOOD, headers=(("TDM-Reservation", "1"),)),
            refused("Use of image disallowed by TDM-Reservation"),
        ),
        "/private/a.jpg": (reply(GOOD), refused("Use of image disallowed by robots.txt")),
        "/a space/ü.jpg": (None, OK),
    }


TAGGED = "Use of image disallowed by X-Robots-Tag directive"


def test_each_row_has_its_status_in_time_and_in_little_memory(tmp_path: Path) -> None:
    with serving() as site:
        rows = asked_of(site)
        site.answers = {path: answer for path, (answer, _) in rows.items() if answer is not None}
        site.answers["/robots.txt"] = reply(b"User-agent: *\nDisallow: /private/\n", "text/plain")
        site.answers["/a%20space/%C3%BC.jpg"] = reply(GOOD)
        urls = [site.url(path, "localhost") if path.startswith("/") else path for path in rows]
        pa.parquet.write_table(pa.table({"url": urls, "text": urls}), tmp_path / "c.parquet")
        code = (
            "import re, sys; from pathlib import Path; from hubgen.cli import main; status = main(sys.argv[1:]);"
            # its own peak: ru_maxrss would begin with that of the process that started it
            "print(re.search('VmHWM:(.*)kB', Path('/proc/self/status').read_text())[1]); sys.exit(status)"
        )
        options = ["--allow-host", "localhost", "--threads", "40", "--per-host", "40", "--retries", "1"]
        options += ["--backoff", "0.05", "--timeout", "0.6", "--deadline", str(DEADLINE), "--size", "16"]
        command = [sys.executable, "-c", code, "data", "download", str(tmp_path / "c.parquet"), "--out"]
        done = subprocess.run([*command, str(tmp_path / "out"), *options], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = {
        row["caption"]: (row["status"], row["error_message"])
        for row in open_shards(tmp_path / "out")[0].read().to_pylist()
    }
    assert found == {url: outcome for url, (_, outcome) in zip(urls, rows.values(), strict=True)}
    assert {
        path: site.asked[path] for path in ("/404.jpg", "/503-200.jpg", "/503.jpg", "/silent.jpg", "/drip.jpg")
    } == {
        "/404.jpg": 1,
        "/503-200.jpg": 2,
        "/503.jpg": 2,
        "/silent.jpg": 2,
        "/drip.jpg": 1,
    }
    assert site.asked["/robots.txt"] == 1 and site.asked["/private/a.jpg"] == 0
    kilobytes = int(done.stdout.splitlines()[-1]) / (1024 if sys.platform == "darwin" else 1)
    assert kilobytes < 500_000
    assert not list((tmp_path / "out").glob(".tmp*"))


def fetch(url: str, folder: Path, **limits: float) -> tuple[str | None, bytes, float]:
    """What is wrong, the bytes, and the seconds that it took."""
    fetcher = Fetcher(
        Limits(**{"timeout": 5, "deadline": DEADLINE, "backoff": 0.01} | limits), "hubgen", ALLOWED, folder
    )  # type: ignore[arg-type]
    begun = time.monotonic()
    fetched = fetcher.fetch(url, "body")
    fetcher.close()
    return fetched.problem, fetched.content.read(), time.monotonic() - begun


@pytest.mark.parametrize(
    "answer", [endlessly(b"\xff", 0.05), dripping_headers, silent], ids=["body", "headers", "none"]
)
def test_a_drip_ends_at_the_deadline(answer: Answer, tmp_path: Path) -> None:
    with serving({"/a.jpg": answer}) as site:
        problem, content, seconds = fetch(site.url("/a.jpg"), tmp_path)
    assert (problem, content) == ("deadline passed", b"") and DEADLINE - 0.1 < seconds < DEADLINE + 1


def test_robots_that_drip_end_at_the_deadline_too(tmp_path: Path) -> None:
    with serving({"/robots.txt": endlessly(b"#", 0.05), "/a.jpg": reply(GOOD)}) as site:
        problem, _, seconds = fetch(site.url("/a.jpg"), tmp_path)
    assert problem == "robots.txt unreachable: deadline passed" and seconds < DEADLINE + 1
    assert site.asked["/a.jpg"] == 0


def test_retry_after_is_waited_for_if_the_deadline_allows(tmp_path: Path) -> None:
    def wait(seconds: str) -> Answer:
        return reply(status=429, headers=(("Retry-After", seconds),))

    with serving({"/1": in_turn(wait("1"), reply(GOOD)), "/9": in_turn(wait("9"), reply(GOOD))}) as site:
        problem, content, seconds = fetch(site.url("/1"), tmp_path, deadline=3)
        assert (problem, content) == (None, GOOD) and 1 <= seconds < 2
        problem, _, seconds = fetch(site.url("/9"), tmp_path, deadline=3)
        assert problem == "HTTP Error 429: Too Many Requests" and seconds < 1
    assert site.asked["/1"] == 2 and site.asked["/9"] == 1


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_passing_troubles_are_asked_about_again(status: int, tmp_path: Path) -> None:
    with serving({"/a": in_turn(reply(status=status), reply(GOOD))}) as site:
        assert fetch(site.url("/a"), tmp_path)[:2] == (None, GOOD)
        assert site.asked["/a"] == 2


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 418, 451])
def test_answers_that_stay_are_asked_for_once(status: int, tmp_path: Path) -> None:
    with serving({"/a": in_turn(reply(status=status), reply(GOOD))}) as site:
        problem = fetch(site.url("/a"), tmp_path)[0]
        assert problem is not None and problem.startswith(f"HTTP Error {status}:") and site.asked["/a"] == 1


def test_long_bodies_lie_in_a_file_and_are_whole(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    with serving({"/a": reply(content)}) as site:
        assert fetch(site.url("/a"), tmp_path)[:2] == (None, content)
    assert (tmp_path / "body").read_bytes() == content


def test_a_second_attempt_begins_anew(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000

    def stalls(handler: BaseHTTPRequestHandler) -> None:
        promised(len(content), content[:600_000])(handler)
        time.sleep(1)

    with serving({"/a": in_turn(stalls, reply(content))}) as site:
        assert fetch(site.url("/a"), tmp_path, timeout=0.3, deadline=5)[:2] == (None, content)


def test_robots_is_asked_for_once_a_site_by_many_threads(tmp_path: Path) -> None:
    with serving({f"/{n}": reply(GOOD) for n in range(20)}) as site:
        fetcher = Fetcher(Limits(), "hubgen", ALLOWED, tmp_path)
        threads = [threading.Thread(target=fetcher.fetch, args=(site.url(f"/{n}"), str(n))) for n in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        fetcher.close()
        assert site.asked == {"/robots.txt": 1} | {f"/{n}": 1 for n in range(20)}


@pytest.mark.parametrize(
    ("status", "problem"), [(403, None), (503, "robots.txt unreachable: HTTP Error 503: Service Unavailable")]
)
def test_without_robots_all_is_allowed_and_with_a_broken_one_nothing(
    status: int, problem: str | None, tmp_path: Path
) -> None:
    with serving({"/robots.txt": reply(b"Disallow: /", status=status), "/a": reply(GOOD)}) as site:
        assert fetch(site.url("/a"), tmp_path)[0] == problem


def test_a_redirect_obeys_the_robots_of_where_it_leads(tmp_path: Path) -> None:
    with serving({"/robots.txt": reply(b"User-agent: *\nDisallow: /"), "/a": reply(GOOD)}) as closed:
        with serving({"/go": redirect(closed.url("/a"))}) as site:
            assert fetch(site.url("/go"), tmp_path)[0] == "Use of image disallowed by robots.txt"
        assert closed.asked == {"/robots.txt": 1}


def test_a_name_is_asked_at_the_address_that_was_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that says another address at the second question leads nowhere else."""
    real, asked = socket.getaddrinfo, []

    def rebinding(host: str, *rest: object, **options: object) -> object:
        if host == "pictures.test":
            asked.append(host)
            host = "93.184.216.34" if len(asked) == 1 else "127.0.0.1"
        return real(host, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    with serving({"/a": reply(GOOD)}) as site:
        problem, content, _ = fetch(site.url("/a", "pictures.test"), tmp_path, deadline=0.5)
        assert problem is not None and not content and not site.asked
    assert asked == ["pictures.test"]


def test_public_addresses_are_told_from_others() -> None:
    public = ("8.8.8.8", "93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946")
    others = ("127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
              "224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:127.0.0.1",
              "64:ff9b::7f00:1", "2002:7f00:1::", "2001:db8::1")  # fmt: skip
    assert [address for address in public if not is_public(address)] == []
    assert [address for address in others if is_public(address)] == []


def test_urls_are_brought_to_the_form_that_is_sent() -> None:
    forms = {
        " http://Example.org ": "http://example.org/",
        "http://example.org:80/a b?q=ü#part": "http://example.org/a%20b?q=%C3%BC",
        "https://example.org:443/%41": "https://example.org/%41",
        "http://bücher.example/ü": "http://xn--bcher-kva.example/%C3%BC",
        "http://example.org:8080/a\r\nHost: b": "http://example.org:8080/aHost:%20b",
        "http://[2606:2800::1]:81/": "http://[2606:2800::1]:81/",
    }
    assert {url: checked_url(url).geturl() for url in forms} == forms
    for url in ("example.org/a", "//example.org/a", "http://a b/", "http://a:99999/", "http://[::1/", "http://%00/"):
        with pytest.raises(Unusable):
            checked_url(url)


def test_a_full_disk_is_no_fault_of_a_site(tmp_path: Path) -> None:
    with serving({"/a": reply(bytes(2**20))}) as site, pytest.raises(LocalFault, match="No such file or directory"):
        fetch(site.url("/a"), tmp_path / "no such folder")
