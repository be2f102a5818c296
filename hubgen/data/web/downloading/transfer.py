"""One request over HTTP/1.1 to an address that was checked, and its answer, within a deadline.

Names are resolved here, and the connection goes to an address that was found public, so that neither a name nor a
redirect leads into the network of whoever runs this. The deadline holds for all of it: resolving, connecting, TLS,
headers and body, however slowly they drip.
"""

import errno
import http.client
import io
import ipaddress
import socket
import ssl
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from functools import lru_cache
from typing import Any
from urllib.parse import SplitResult, quote, urlsplit

CHUNK = 2**16
KNOWN_NAMES = 10_000
KNOWN_SECONDS = 300.0
MAX_URL = 8_000

EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
NAT64 = ipaddress.ip_network("64:ff9b::/96")


class Unusable(Exception):
    """A URL that is not asked for: what it names is refused, or it is none."""


class LocalFault(Exception):
    """Something of this machine failed (its disk, its number of open files): no fact about a URL."""


class TimedOut(Exception):
    """Nothing came for too long, or not all of it in time."""

    def __init__(self, past_deadline: bool) -> None:
        super().__init__("deadline passed" if past_deadline else "timed out")
        self.past_deadline = past_deadline


class Clock:
    """How long a transfer may still take.

    Args:
        timeout: Seconds without a byte.
        deadline: Seconds in all.
    """

    def __init__(self, timeout: float, deadline: float) -> None:
        self.timeout, self.end = timeout, time.monotonic() + deadline

    def left(self) -> float:
        """Seconds up to the deadline.

        Raises:
            TimedOut: It has passed.
        """
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimedOut(past_deadline=True)
        return left

    def next(self) -> float:
        """Seconds to wait for the next bytes, and no longer."""
        return min(self.left(), self.timeout)

    def stop(self) -> TimedOut:
        """The error of a wait that was in vain."""
        return TimedOut(past_deadline=time.monotonic() >= self.end)


def checked_url(url: str) -> SplitResult:
    """A URL's parts, its host in ASCII and its path escaped.

    Raises:
        Unusable: It is no http or https URL with a host.
    """
    text = url.strip()
    if len(text) > MAX_URL:
        raise Unusable("URL too long")
    try:
        parts = urlsplit(text)
        port = parts.port
        host = (parts.hostname or "").rstrip(".")
        if not host.isascii():
            host = host.encode("idna").decode()
    except ValueError:  # UnicodeError too
        raise Unusable("invalid URL") from None
    if parts.scheme not in ("http", "https"):
        raise Unusable(f"unsupported scheme: {parts.scheme[:20] or 'none'}")
    if not host or any(character <= " " or character in "%\x7f" for character in host):
        raise Unusable("invalid URL")
    if parts.username is not None or parts.password is not None:
        raise Unusable("URL with a user name or password")
    authority = f"[{host}]" if ":" in host else host
    if port is not None and port != DEFAULT_PORTS[parts.scheme]:
        authority += f":{port}"
    path = quote(parts.path, safe="/%:@!$&'()*+,;=~-._") or "/"
    query = quote(parts.query, safe="/?%:@!$&'()*+,;=~-._[]|")
    return SplitResult(parts.scheme, authority, path, query, "")


DEFAULT_PORTS = {"http": 80, "https": 443}


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open Internet."""
    ip: Any = ipaddress.ip_address(address.partition("%")[0])
    inner = None
    if ip.version == 6:
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    if inner is not None:
        return is_public(str(inner))
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


class Names:
    """Addresses by name, kept for some minutes.

    Args:
        allowed: Names of hosts whose addresses need not be public.
        threads: Names that are resolved at a time.
    """

    def __init__(self, allowed: frozenset[str], threads: int = 16) -> None:
        self.allowed = allowed
        self._pool = ThreadPoolExecutor(threads, "resolve")
        self._known: OrderedDict[str, tuple[float, list[str] | None]] = OrderedDict()
        self._lock = threading.Lock()

    def addresses(self, host: str, clock: Clock) -> list[str]:
        """The addresses of a host that may be asked.

        Raises:
            Unusable: It has none, or no public one.
            TimedOut: No name server answered in time.
        """
        found = self._resolve(host, clock)
        if not found:
            raise Unusable("no such host")
        usable = [address for address in found if host in self.allowed or is_public(address)]
        if not usable:
            raise Unusable(f"address not public: {found[0]}")
        return usable

    def _resolve(self, host: str, clock: Clock) -> list[str] | None:
        with self._lock:
            until, found = self._known.get(host, (0.0, None))
        if time.monotonic() < until:
            return found
        future = self._pool.submit(_lookup, host)
        try:
            # A resolver cannot be interrupted; it goes on in its thread, and its answer is not waited for.
            found = future.result(clock.left())
        except FutureTimeout:
            future.cancel()
            raise clock.stop() from None
        except _NoAnswer:  # of the name servers, and so not kept
            raise TimedOut(past_deadline=False) from None
        with self._lock:
            self._known[host] = (time.monotonic() + KNOWN_SECONDS, found)
            while len(self._known) > KNOWN_NAMES:
                self._known.popitem(last=False)
        return found

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class _NoAnswer(Exception):
    """No name server answered."""


def _lookup(host: str) -> list[str] | None:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno == socket.EAI_AGAIN:
            raise _NoAnswer from None
        return None
    except (OSError, UnicodeError):
        return None
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class _Incoming(io.RawIOBase):
    """The bytes of a socket, none of which is waited for longer than the clock allows."""

    def __init__(self, sock: socket.socket, clock: Clock) -> None:
        super().__init__()
        self._sock, self._clock = sock, clock

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._sock.settimeout(self._clock.next())
        try:
            return self._sock.recv_into(buffer)
        except TimeoutError:
            raise self._clock.stop() from None


class _Line:
    """A socket in the form that `http.client` wants, with the clock on both ways."""

    def __init__(self, sock: socket.socket, clock: Clock) -> None:
        self._sock, self._clock = sock, clock

    def makefile(self, *_: Any, **__: Any) -> io.BufferedReader:
        return io.BufferedReader(_Incoming(self._sock, self._clock), CHUNK)

    def sendall(self, content: bytes) -> None:
        self._sock.settimeout(self._clock.next())
        try:
            self._sock.sendall(content)
        except TimeoutError:
            raise self._clock.stop() from None

    def close(self) -> None:
        """Nothing: `http.client` lets go of it while the body is still to be read."""


@lru_cache(maxsize=1)
def _tls() -> ssl.SSLContext:
    """The system's certificates, and those that Python packages bring along."""
    context = ssl.create_default_context()
    try:
        import certifi
    except ImportError:
        return context
    context.load_verify_locations(certifi.where())
    return context


def _connect(parts: SplitResult, addresses: list[str], clock: Clock) -> socket.socket:
    port = parts.port or DEFAULT_PORTS[parts.scheme]
    problem: Exception = OSError("no address")
    for address in addresses:
        try:
            sock = socket.create_connection((address, port), timeout=clock.next())
        except TimeoutError:
            problem = clock.stop()
            continue
        except OSError as error:
            if error.errno in EXHAUSTED:
                raise LocalFault(f"no connection can be opened ({error.strerror}); try fewer threads") from error
            problem = error
            continue
        if parts.scheme == "http":
            return sock
        try:
            sock.settimeout(clock.next())
            return _tls().wrap_socket(sock, server_hostname=parts.hostname)
        except TimeoutError:
            sock.close()
            raise clock.stop() from None
        except BaseException:
            sock.close()
            raise
    raise problem


@contextmanager
def answer(
    parts: SplitResult, names: Names, clock: Clock, headers: dict[str, str]
) -> Iterator[http.client.HTTPResponse]:
    """The answer to a GET, its headers read and its body not yet.

    Args:
        parts: As `checked_url` gives them.
        names: Resolves the host.
        clock: Of the transfer.
        headers: Of the request.

    Raises:
        Unusable: The host has no address that may be asked.
        TimedOut: It took too long.
        LocalFault: This machine can open no more connections.
        OSError: The connection failed.
        http.client.HTTPException: What came is not HTTP.
    """
    host = parts.hostname or ""
    sock = _connect(parts, names.addresses(host, clock), clock)
    connection = http.client.HTTPConnection(host, parts.port or DEFAULT_PORTS[parts.scheme])
    connection.auto_open = 0  # to no other address
    connection.sock = _Line(sock, clock)  # type: ignore[assignment]
    try:
        target = parts.path + (f"?{parts.query}" if parts.query else "")
        connection.putrequest("GET", target, skip_host=True, skip_accept_encoding=True)
        for name, value in {"Host": parts.netloc, **headers, "Connection": "close"}.items():
            connection.putheader(name, value)
        connection.endheaders()
        response = connection.getresponse()
        try:
            yield response
        finally:
            response.close()
    finally:
        connection.close()
        sock.close()


def body(response: http.client.HTTPResponse, clock: Clock) -> Iterator[bytes]:
    """The body of an answer in pieces.

    Raises:
        TimedOut: It took too long.
        http.client.IncompleteRead: It ended before the length that its header tells.
    """
    expected = response.length
    received = 0
    while True:
        clock.left()
        piece = response.read1(CHUNK)
        if not piece:
            break
        received += len(piece)
        yield piece
    if expected is not None and received < expected:
        raise http.client.IncompleteRead(b"", expected - received)
