"""Health and metrics over HTTP, on loopback unless configured otherwise. Answers; changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec
from aiohttp import web

from edge_daemon.errors import ListenError

METRICS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


class Health(msgspec.Struct, frozen=True):
    """What `/readyz` says. `problems` is empty when the device is ready."""

    ready: bool
    problems: tuple[str, ...]


class HttpApi:
    """`/healthz`, `/readyz`, `/metrics`."""

    def __init__(
        self, host: str, port: int, *, is_alive: Callable[[], bool], health: Callable[[], Health],
        render_metrics: Callable[[], bytes],
    ) -> None:  # fmt: skip
        self._host = host
        self._port = port
        self._is_alive = is_alive
        self._health = health
        self._render_metrics = render_metrics
        self._runner: web.AppRunner | None = None

    @property
    def port(self) -> int:
        """The port in use, also where 0 was asked for."""
        assert self._runner is not None
        port: int = self._runner.addresses[0][1]
        return port

    async def start(self) -> None:
        """Listen.

        Raises:
            ListenError: naming the address and why.
        """
        app = web.Application(client_max_size=1024)
        app.add_routes(
            [
                web.get("/healthz", self._healthz),
                web.get("/readyz", self._readyz),
                web.get("/metrics", self._metrics),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self._host, self._port).start()
        except OSError as error:
            await self._runner.cleanup()
            raise ListenError(
                f"http.host={self._host!r} http.port={self._port}: {error.strerror}; choose another port"
            ) from error

    async def stop(self) -> None:
        """Stop listening."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _healthz(self, _: web.Request) -> web.Response:
        alive = self._is_alive()
        return web.Response(text="ok\n" if alive else "a sample is stuck\n", status=200 if alive else 503)

    async def _readyz(self, _: web.Request) -> web.Response:
        health = self._health()
        return web.Response(
            body=msgspec.json.encode(health),
            status=200 if health.ready else 503,
            content_type="application/json",
        )

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=self._render_metrics(), headers={"Content-Type": METRICS_TYPE})
