"""Downloads over TLS, from a site on loopback with a certificate of its own."""

import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hubgen.data.web.downloading import transfer
from hubgen.data.web.downloading.fetch import Fetcher, Limits
from tests.data.web.site import Site, file_of, picture, redirect, reply, serving

CONTENT = file_of(picture(10, 10)) * 1000
ALLOWED = frozenset({"localhost", "127.0.0.1"})

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of localhost, with its key in one file."""
    folder = tmp_path_factory.mktemp("certificate")
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    )
    subprocess.run(
        [*command.split(), "-keyout", "key.pem", "-out", "cert.pem"], cwd=folder, check=True, capture_output=True
    )
    (folder / "both.pem").write_text((folder / "key.pem").read_text() + (folder / "cert.pem").read_text())
    return folder


@pytest.fixture
def site(certificate: Path) -> Iterator[Site]:
    with serving({"/a.jpg": reply(CONTENT)}) as site:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate / "both.pem")
        site.server.socket = context.wrap_socket(site.server.socket, server_side=True)
        yield site


def fetch(url: str, folder: Path, **limits: float) -> tuple[str | None, bytes]:
    fetcher = Fetcher(Limits(**{"timeout": 2, "deadline": 4, "retries": 0} | limits), "hubgen", ALLOWED, folder)  # type: ignore[arg-type]
    fetched = fetcher.fetch(url, "body")
    fetcher.close()
    return fetched.problem, fetched.content.read()


@pytest.fixture
def trusted(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "cert.pem"))
    transfer._tls.cache_clear()
    yield
    transfer._tls.cache_clear()


@pytest.mark.usefixtures("trusted")
def test_a_picture_comes_over_tls(site: Site, tmp_path: Path) -> None:
    assert fetch(f"https://localhost:{site.port}/a.jpg", tmp_path) == (None, CONTENT)
    with serving({"/go": redirect(f"https://localhost:{site.port}/a.jpg")}) as plain:
        assert fetch(plain.url("/go"), tmp_path) == (None, CONTENT)


@pytest.mark.usefixtures("trusted")
def test_a_certificate_for_another_name_is_refused(site: Site, tmp_path: Path) -> None:
    problem, content = fetch(f"https://127.0.0.1:{site.port}/a.jpg", tmp_path)
    assert problem == "<urlopen error [SSL] CERTIFICATE_VERIFY_FAILED>" and not content
    assert not site.asked


def test_a_certificate_that_nobody_vouches_for_is_refused(site: Site, tmp_path: Path) -> None:
    transfer._tls.cache_clear()
    problem, content = fetch(f"https://localhost:{site.port}/a.jpg", tmp_path)
    assert problem == "<urlopen error [SSL] CERTIFICATE_VERIFY_FAILED>" and not content


def test_a_handshake_that_never_ends_does(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begun = time.monotonic()
        problem, _ = fetch(f"https://127.0.0.1:{silent.getsockname()[1]}/a.jpg", tmp_path, timeout=0.5)
    assert problem == "robots.txt unreachable: timed out" and time.monotonic() - begun < 1.5
