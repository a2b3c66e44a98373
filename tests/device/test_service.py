"""Health, readiness, metrics and the watchdog, over real HTTP and a real notification socket."""

import asyncio
import os
import signal
import socket
import threading
import urllib.error
import urllib.request

import pytest

from edge_daemon.config import Config, DeviceConfig, HttpConfig, InletConfig, ModelConfig, SourceConfig
from edge_daemon.errors import ListenError
from edge_daemon.http_api import Health, HttpApi
from edge_daemon.metrics import Metrics
from edge_daemon.service import serve
from tests.services import free_port

WAIT_S = 10.0


class FakeDaemon:
    def __init__(self):
        self.metrics = Metrics()
        self.alive = True
        self.problems = ()
        self.calls = []
        self.started = threading.Event()

    def start(self):
        self.calls.append("start")
        self.started.set()

    def stop(self):
        self.calls.append("stop")

    def report(self):
        self.calls.append("report")

    def is_alive(self):
        return self.alive

    def health(self):
        return Health(not self.problems, tuple(self.problems))


def config(port):
    return Config(
        device=DeviceConfig(id="d"),
        models=(ModelConfig(bundle="digits"),),
        inlet=InletConfig(sources=(SourceConfig(topic="s/{sensor}"),)),
        http=HttpConfig(port=port),
    )


def get(port, path):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=WAIT_S) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


@pytest.fixture
def notifications(monkeypatch):
    """What systemd would hear."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("")  # an abstract name of the kernel's choice
        listener.settimeout(WAIT_S)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + listener.getsockname()[1:].decode())
        yield lambda: listener.recv(1000).decode()


def run_service(daemon, port, during):
    """Serve, call `during` from another thread, then send this process SIGTERM as systemd would."""
    failures = []

    def drive():
        try:
            during()
        except BaseException as error:
            failures.append(error)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    async def main():
        task = asyncio.create_task(serve(config(port), daemon))
        await asyncio.get_running_loop().run_in_executor(None, daemon.started.wait, WAIT_S)
        thread = threading.Thread(target=drive)
        thread.start()
        await task
        await asyncio.get_running_loop().run_in_executor(None, thread.join)

    asyncio.run(main())
    if failures:
        raise failures[0]


def test_health_readiness_and_metrics_are_served_until_sigterm_and_then_the_daemon_is_drained(notifications):
    daemon, port, seen = FakeDaemon(), free_port(), []

    def during():
        seen.append(get(port, "/healthz"))
        seen.append(get(port, "/readyz"))
        daemon.problems = ("hub's broker: connecting",)
        seen.append(get(port, "/readyz"))
        daemon.alive = False
        seen.append(get(port, "/healthz"))
        seen.append(get(port, "/nothing")[0])
        seen.append("edge_samples" in get(port, "/metrics")[1])

    run_service(daemon, port, during)
    assert seen == [
        (200, "ok\n"),
        (200, '{"ready":true,"problems":[]}'),
        (503, '{"ready":false,"problems":["hub\'s broker: connecting"]}'),
        (503, "a sample is stuck\n"),
        404,
        True,
    ]
    assert daemon.calls == ["start", "report", "stop"]
    assert [notifications(), notifications()] == ["READY=1", "STOPPING=1"]


def test_the_watchdog_is_fed_except_while_a_sample_is_stuck(notifications, monkeypatch):
    monkeypatch.setenv("WATCHDOG_USEC", "20000")
    daemon, port, heard = FakeDaemon(), free_port(), []

    def during():
        heard.extend(notifications() for _ in range(3))
        daemon.alive = False
        get(port, "/healthz")

    run_service(daemon, port, during)
    assert heard == ["READY=1", "WATCHDOG=1", "WATCHDOG=1"]
    rest = []
    while not rest or rest[-1] != "STOPPING=1":
        rest.append(notifications())
    # At most what was on its way when the sample got stuck.
    assert len(rest) <= 4


def test_numbers_that_cannot_be_read_do_not_end_the_service(caplog):
    daemon, port, seen = FakeDaemon(), free_port(), []
    daemon.report = [].pop
    run_service(daemon, port, lambda: seen.append(get(port, "/healthz")))
    assert seen == [(200, "ok\n")]
    assert daemon.calls == ["start", "stop"]
    assert "defect in the report to the hub" in caplog.text


def test_a_port_in_use_is_one_clear_line():
    async def main():
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            api = HttpApi(
                "127.0.0.1", taken.getsockname()[1], is_alive=bool, health=bool, render_metrics=bytes
            )
            with pytest.raises(ListenError, match=r"http\.port=\d+: .*; choose another port"):
                await api.start()

    asyncio.run(main())
