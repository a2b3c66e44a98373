"""A daemon as a service: signals, systemd's watchdog, the HTTP face, the periodic report."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable

from edge_cascade.sdnotify import notify, watchdog_interval_s
from edge_daemon.config import Config
from edge_daemon.daemon import Daemon
from edge_daemon.http_api import HttpApi

log = logging.getLogger(__name__)


async def serve(config: Config, daemon: Daemon) -> None:
    """Run `daemon` until SIGTERM or SIGINT, then drain it.

    Raises:
        EdgeError: for what cannot be started; what fails later is lived with.
    """
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    api = _http_api(config, daemon)
    if api is not None:
        await api.start()
        log.info("listening url=http://%s:%d", config.http.host, api.port)
    try:
        daemon.start()
        notify("READY=1")
        async with asyncio.TaskGroup() as tasks:
            watchdog_s = watchdog_interval_s()
            periodic = [_every(config.hub.report_every_s, _report(daemon))]
            if watchdog_s is not None:
                periodic.append(_every(watchdog_s, _feed_watchdog(daemon)))
            running = [tasks.create_task(each) for each in periodic]
            await stopping.wait()
            for task in running:
                task.cancel()
        notify("STOPPING=1")
        log.info("stopping drain_s=%.1f", config.device.drain_s)
        await loop.run_in_executor(None, daemon.stop)
    finally:
        if api is not None:
            await api.stop()


def _http_api(config: Config, daemon: Daemon) -> HttpApi | None:
    if not config.http.enabled:
        return None
    return HttpApi(
        config.http.host,
        config.http.port,
        is_alive=daemon.is_alive,
        health=daemon.health,
        render_metrics=daemon.metrics.render,
    )


def _feed_watchdog(daemon: Daemon) -> Callable[[], Awaitable[None]]:
    async def feed() -> None:
        # Fed from the event loop, so that a blocked loop starves it; withheld only while a sample is stuck.
        if daemon.is_alive():
            notify("WATCHDOG=1")

    return feed


def _report(daemon: Daemon) -> Callable[[], Awaitable[None]]:
    async def report() -> None:
        try:
            daemon.report()
        except Exception:
            # A number that cannot be read must not end what answers samples.
            log.exception("defect in the report to the hub")

    return report


async def _every(interval_s: float, act: Callable[[], Awaitable[None]]) -> None:
    while True:
        await act()
        await asyncio.sleep(interval_s)
