"""The REST server's listening socket: how many connections, and how long a stranger may hold one. No HTTP.

A connection is a file descriptor, and whoever connects needs no token for that: without a bound anybody could
take the last one, and with it the hub's own files. So there are at most as many as `most_connections` says; a
stranger, who has shown no valid token yet, is given half a minute, and when there is no room the stranger who
came first goes. Whoever has shown a token stays.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import ssl
import time
from typing import TYPE_CHECKING, Final

from aiohttp import web

from edge_cascade.burst import Burst

if TYPE_CHECKING:
    from aiohttp.web_protocol import RequestHandler

log = logging.getLogger(__name__)

MAX_CONNECTIONS: Final = 4096
PATIENCE_S: Final = 30.0
HANDSHAKE_S: Final = 10.0
# So many are accepted in one turn of the loop; those that are too many are closed a few turns later.
BACKLOG: Final = 64


def most_connections() -> int:
    """A quarter of the file descriptors that this process may have: each download has a file open as well."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, max(soft // 4, 1))


class Listener:
    """Accepts connections for a server. On the event loop."""

    def __init__(
        self, server: web.Server, *, max_connections: int | None = None, patience_s: float = PATIENCE_S
    ) -> None:
        self._server = server
        self._max_connections = most_connections() if max_connections is None else max_connections
        self._patience_s = patience_s
        # In the order in which they came.
        self._strangers: dict[asyncio.BaseProtocol, asyncio.TimerHandle] = {}
        self._open: dict[asyncio.BaseProtocol, asyncio.BaseTransport] = {}
        self._burst = Burst()
        self._listening: asyncio.Server | None = None

    async def start(self, host: str, port: int, tls: ssl.SSLContext | None) -> int:
        """Listen; the port.

        Raises:
            OSError: when the address cannot be had.
        """
        self._listening = await asyncio.get_running_loop().create_server(
            self._accept,
            host,
            port,
            ssl=tls,
            backlog=BACKLOG,
            ssl_handshake_timeout=None if tls is None else HANDSHAKE_S,
        )
        return int(self._listening.sockets[0].getsockname()[1])

    def trust(self, connection: asyncio.BaseProtocol) -> None:
        """Say that a connection is somebody's who may ask; it is the one that the server made."""
        timer = self._strangers.pop(connection, None)
        if timer is not None:
            timer.cancel()

    def stop(self) -> None:
        """Accept no more; what is open stays open."""
        for timer in self._strangers.values():
            timer.cancel()
        self._strangers.clear()
        if self._listening is not None:
            self._listening.close()
            self._listening = None

    def _accept(self) -> asyncio.Protocol:
        return _Watched(self, self._server())

    def came(self, connection: asyncio.BaseProtocol, transport: asyncio.BaseTransport) -> bool:
        """A connection is there, its handshake is over; whether there is room for it."""
        if len(self._open) >= self._max_connections:
            more = self._burst.note(now_s=time.monotonic())
            if more is not None:
                log.warning("as many connections as there may be max=%d more=%d", self._max_connections, more)
            oldest = next(iter(self._strangers), None)
            if oldest is None:
                return False
            self._end(oldest)
        self._open[connection] = transport
        loop = asyncio.get_running_loop()
        self._strangers[connection] = loop.call_later(self._patience_s, self._end, connection)
        return True

    def went(self, connection: asyncio.BaseProtocol) -> None:
        """A connection is gone."""
        self._open.pop(connection, None)
        self.trust(connection)

    def _end(self, connection: asyncio.BaseProtocol) -> None:
        transport = self._open[connection]
        self.went(connection)
        assert isinstance(transport, asyncio.WriteTransport)
        transport.abort()


class _Watched(asyncio.Protocol):
    """Hands everything on to the server's own protocol, whose beginning and end the listener hears."""

    def __init__(self, listener: Listener, handler: RequestHandler) -> None:
        self._listener = listener
        self._handler = handler
        self._is_taken = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._is_taken = self._listener.came(self._handler, transport)
        if self._is_taken:
            self._handler.connection_made(transport)
        else:
            assert isinstance(transport, asyncio.WriteTransport)
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._is_taken:
            self._listener.went(self._handler)
            self._handler.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_taken:
            self._handler.data_received(data)

    def eof_received(self) -> bool | None:
        self._handler.eof_received()
        return None

    def pause_writing(self) -> None:
        self._handler.pause_writing()

    def resume_writing(self) -> None:
        self._handler.resume_writing()
