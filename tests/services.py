"""Real services for tests: mosquitto as a child process. Where it is not installed the test is skipped.

With EDGE_REQUIRE_SERVICES=1 (as in the project's own runs) a missing service is a failure, never a skip.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

START_TIMEOUT_S = 10.0
_LASTING_PORTS = range(10_000, 32_768)

_given_ports: set[int] = set()


def require_program(name: str, *, package: str) -> str:
    """The path of an installed program; skips the test, or fails it, where there is none."""
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if path is not None:
        return path
    reason = f"{name} is not installed (Debian: apt-get install {package})"
    if os.environ.get("EDGE_REQUIRE_SERVICES") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def free_port() -> int:
    """A TCP port on loopback that nobody listens on, and that no connection is given in the meantime.

    It lies below the range from which Linux gives connections theirs (ip(7), `ip_local_port_range`): a service
    may start on it later, and again.
    """
    for port in random.SystemRandom().sample(_LASTING_PORTS, 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in _given_ports:
            _given_ports.add(port)
            return port
    raise AssertionError("no free port")


class Mosquitto:
    """A running mosquitto; what it logs is read along, so that a test can wait for a line of it."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process = process
        self.port = port
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self._has_ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def reload(self) -> None:
        """Make it read accounts and rules again (SIGHUP); what is asked of it afterwards is under the new."""
        seen = len(self._lines)
        self.process.send_signal(signal.SIGHUP)
        self.wait_for_log("Reloading config", after=seen)

    def kill(self) -> None:
        """End it without a chance to save anything."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """End it in order."""
        self.process.terminate()
        try:
            self.process.wait(START_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
        self._reader.join(START_TIMEOUT_S)

    def wait_for_log(self, text: str, *, after: int = 0) -> None:
        """Block until a line with `text` was logged at or behind line number `after`."""

        def is_there() -> bool:
            return any(text in line for line in self._lines[after:]) or self._has_ended

        with self._changed:
            self._changed.wait_for(is_there, START_TIMEOUT_S)
            if not any(text in line for line in self._lines[after:]):
                raise AssertionError(f"mosquitto never logged {text!r}:\n" + "".join(self._lines))

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr:
            for line in self.process.stderr:
                with self._changed:
                    self._lines.append(line)
                    self._changed.notify_all()
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()


@contextmanager
def start_mosquitto(
    directory: Path, *, configuration: Path | None = None, port: int | None = None, extra: str = ""
) -> Iterator[Mosquitto]:
    """A broker on loopback, up when the block is entered, gone when it is left.

    Without `configuration` it takes anybody and keeps nothing, plus the lines in `extra`; with it, the file
    says everything and `port` only says where that is.
    """
    program = require_program("mosquitto", package="mosquitto")
    port = port or free_port()
    if configuration is None:
        configuration = directory / "mosquitto.conf"
        # Started by root it would become a user that cannot enter the test's directory.
        user = "user root\n" if os.geteuid() == 0 else ""
        configuration.write_text(
            f"{user}listener {port} 127.0.0.1\nallow_anonymous true\nset_tcp_nodelay true\n{extra}\n",
            encoding="utf-8",
        )
    process = subprocess.Popen(
        [program, "-c", str(configuration)], stderr=subprocess.PIPE, text=True, errors="replace"
    )
    broker = Mosquitto(process, port)
    try:
        broker.wait_for_log(" running")
        yield broker
    finally:
        broker.stop()
