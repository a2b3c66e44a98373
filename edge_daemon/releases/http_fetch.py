"""GET from the hub's fleet address: TLS with an own CA, a bearer token, Range. Stores and retries nothing.

Whoever reads says how much there may be; here what comes is counted, and a body that ends early or trickles
is an error like a cut connection. No redirect is followed and no encoding is asked for.
"""

from __future__ import annotations

import http.client
import ipaddress
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from edge_cascade.errors import first_line
from edge_daemon.errors import ConfigError, ReleaseError, StoppedError
from edge_daemon.ports import Clock
from edge_daemon.releases.limits import Bucket, next_bucket

TIMEOUT_S: Final = 20.0
"""For connecting, and for every single read."""
SLOW_AFTER_S: Final = 60.0
SLOWEST_BYTES_PER_S: Final = 64
"""TUF's slow retrieval attack (specification 1.0, section 1.5.2): less than this is as good as nothing."""
CHUNK_BYTES: Final = 16 * 1024
DENIED: Final = frozenset({http.HTTPStatus.UNAUTHORIZED, http.HTTPStatus.FORBIDDEN})
"""The token has expired, was revoked, or is for something else: until somebody exchanges it."""

_CONTENT_RANGE = re.compile(r"bytes (\d{1,15})-(\d{1,15})/(\d{1,15})")
_STRONG_ETAG = re.compile(r'"[\x21\x23-\x7e]{1,256}"')
_PATH = re.compile(r"[A-Za-z0-9._/-]{1,512}")


class UnreachableError(ReleaseError):
    """The hub is away, slow, or the connection was cut: worth another try."""


class StatusError(ReleaseError):
    """The hub answered, with something else than what was asked for."""

    def __init__(self, path: str, status: int) -> None:
        super().__init__(f"{path}: the hub answers {status}")
        self.status = status


Wait = Callable[[threading.Event, float], bool]
"""Wait so many seconds, or until the event is set; whether it is."""
FileMark = tuple[int, int, int]
"""A file's inode, size and time of change in nanoseconds; another one when it is written or replaced."""


@dataclass(frozen=True, slots=True)
class FleetAddress:
    """Where the hub's files are, and what this board shows to get them."""

    is_tls: bool
    host: str
    port: int
    path: str
    ca_file: Path | None = None
    token_file: Path | None = None


@dataclass(slots=True)
class Body:
    """A successful answer. `start` is the offset of its first byte; `etag` is a strong one or empty."""

    start: int
    etag: str
    chunks: Iterator[bytes] = field(repr=False)


def parse_address(url: str, *, ca_file: str | None, token_file: str | None) -> FleetAddress:
    """Check `releases.url`: https, or http to this machine itself.

    Raises:
        ConfigError: in one line.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"releases.url: {url!r}: {error}") from error
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.query or parts.username:
        raise ConfigError(f"releases.url: {url!r} is no address such as 'https://hub.example:8443/v1/fleet'")
    is_tls = parts.scheme == "https"
    if not is_tls and not _is_loopback(parts.hostname):
        raise ConfigError(f"releases.url: {url!r} would send the token in the clear; use https")
    return FleetAddress(
        is_tls=is_tls,
        host=parts.hostname,
        port=port or (443 if is_tls else 80),
        path=parts.path.rstrip("/"),
        ca_file=None if ca_file is None else Path(ca_file),
        token_file=None if token_file is None else Path(token_file),
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Received(threading.local):
    size_bytes = 0


class HttpFleet:
    """The hub's files. Any thread may ask, they share the rate; `stop` ends every wait.

    Token and authority are read from their files again when these change: no exchange needs a restart.
    """

    def __init__(self, address: FleetAddress, *, max_bytes_per_s: float, clock: Clock, wait: Wait) -> None:
        self._address = address
        self._max_bytes_per_s = max_bytes_per_s
        self._clock = clock
        self._wait = wait
        self._bucket = Bucket()
        self._gate = threading.Lock()
        self._tls: tuple[FileMark | None, ssl.SSLContext] | None = None
        self._received = _Received()

    @property
    def bytes_received(self) -> int:
        """What has come for the thread that asks."""
        return self._received.size_bytes

    def credentials(self) -> tuple[FileMark | None, ...] | None:
        """What this board shows and trusts, as its files are now: another value once somebody exchanges one.

        None where there are no such files.
        """
        files = [each for each in (self._address.token_file, self._address.ca_file) if each is not None]
        return tuple(map(_mark_of, files)) if files else None

    @contextmanager
    def open(self, path: str, stop: threading.Event, *, start: int = 0, etag: str = "") -> Iterator[Body]:
        """GET `path` under the fleet's address; from `start` where the file still has this strong `etag`.

        The body begins at 0 where the file has changed, or the hub does not do ranges.

        Raises:
            UnreachableError: also while the body is read.
            StatusError: for any answer but 200 and 206.
            StoppedError: `stop` was set, also while the body is read.
        """
        if not _PATH.fullmatch(path) or ".." in path:
            raise StatusError(path[:100], http.HTTPStatus.BAD_REQUEST)
        headers = {"Accept-Encoding": "identity", "Connection": "close", **self._credentials()}
        if start and etag:
            headers |= {"Range": f"bytes={start}-", "If-Range": etag}
        with closing(self._connection()) as connection:
            with _network_errors(path):
                connection.request("GET", f"{self._address.path}/{path}", headers=headers)
                response = connection.getresponse()
            # An answer that ends its connection owns the socket.
            with closing(response):
                if response.status not in {http.HTTPStatus.OK, http.HTTPStatus.PARTIAL_CONTENT}:
                    raise StatusError(path, response.status)
                yield self._body(path, response, stop)

    def stream(self, path: str, stop: threading.Event) -> Iterator[bytes]:
        """The whole of `path`, piece by piece. Raises as `open`."""
        with self.open(path, stop) as body:
            yield from body.chunks

    def _body(self, path: str, response: http.client.HTTPResponse, stop: threading.Event) -> Body:
        start = 0
        if response.status == http.HTTPStatus.PARTIAL_CONTENT:
            found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if found is None:
                raise UnreachableError(f"{path}: a part of the file that does not say which")
            start = int(found[1])
        etag = response.headers.get("ETag", "")
        return Body(start, etag if _STRONG_ETAG.fullmatch(etag) else "", self._chunks(path, response, stop))

    def _chunks(
        self, path: str, response: http.client.HTTPResponse, stop: threading.Event
    ) -> Iterator[bytes]:
        announced = response.length
        received = 0
        began_s = self._clock.monotonic_s()
        waited_s = 0.0
        while True:
            if stop.is_set():
                raise StoppedError(f"{path}: stopped after {received} bytes")
            with _network_errors(path):
                chunk = response.read1(CHUNK_BYTES)
            if not chunk:
                break
            received += len(chunk)
            self._received.size_bytes += len(chunk)
            yield chunk
            waited_s += self._hold_back(len(chunk), stop)
            took_s = self._clock.monotonic_s() - began_s - waited_s
            if took_s > SLOW_AFTER_S and received < took_s * SLOWEST_BYTES_PER_S:
                raise UnreachableError(f"{path}: {received} bytes in {took_s:.0f} s")
        # read1 takes a connection that was cut for the end of the file.
        if announced is not None and received < announced:
            raise UnreachableError(f"{path}: cut after {received} of {announced} bytes")

    def _hold_back(self, size_bytes: int, stop: threading.Event) -> float:
        with self._gate:
            self._bucket, delay_s = next_bucket(
                self._bucket, size_bytes, now_s=self._clock.monotonic_s(), bytes_per_s=self._max_bytes_per_s
            )
        if delay_s > 0:
            self._wait(stop, delay_s)
        return delay_s

    def _credentials(self) -> dict[str, str]:
        if self._address.token_file is None:
            return {}
        # Read every time: a token may be exchanged while the daemon runs.
        try:
            token = self._address.token_file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UnreachableError(f"releases.token_file: {first_line(error)}") from error
        if not token.isprintable() or not token:
            raise UnreachableError("releases.token_file: holds no token")
        return {"Authorization": f"Bearer {token}"}

    def _connection(self) -> http.client.HTTPConnection:
        host, port = self._address.host, self._address.port
        if not self._address.is_tls:
            return http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
        return http.client.HTTPSConnection(host, port, timeout=TIMEOUT_S, context=self._tls_context())

    def _tls_context(self) -> ssl.SSLContext:
        ca_file = self._address.ca_file
        # Before it is read: what is written meanwhile is read the next time.
        mark = None if ca_file is None else _mark_of(ca_file)
        if self._tls is not None and self._tls[0] == mark:
            return self._tls[1]
        try:
            context = ssl.create_default_context(cafile=ca_file)
        except OSError as error:
            raise UnreachableError(f"releases.ca_file: {first_line(error)}") from error
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._tls = (mark, context)
        return context


def _mark_of(path: Path) -> FileMark | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


@contextmanager
def _network_errors(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, http.client.HTTPException, socket.gaierror) as error:
        raise UnreachableError(f"{path}: {first_line(error)}") from error
