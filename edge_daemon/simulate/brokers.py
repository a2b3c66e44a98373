"""Brokers as child processes on free loopback ports: mosquitto where installed, else the embedded one."""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Final, Literal

from edge_cascade.mqtt import Broker
from edge_daemon.errors import SimulationError

BrokerKind = Literal["mosquitto", "embedded"]

SITE_USER: Final = "site"
START_TIMEOUT_S: Final = 15.0


def available_broker() -> BrokerKind:
    """The broker to use.

    Raises:
        SimulationError: when there is none, with what to install.
    """
    if find_mosquitto() is not None:
        return "mosquitto"
    if importlib.util.find_spec("amqtt") is not None:
        return "embedded"
    raise SimulationError("no broker: install mosquitto (apt-get install mosquitto) or edge-daemon[demo]")


def find_mosquitto() -> str | None:
    """The mosquitto program; Debian keeps it outside the PATH of ordinary users."""
    return shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class ChildProcess:
    """A process of ours with its output in a file; ended, and killed if that does not help."""

    def __init__(
        self, name: str, command: list[str], log_file: Path, environ: dict[str, str] | None = None
    ) -> None:
        self._name = name
        self._command = command
        self._log_file = log_file
        self._environ = {**os.environ, **(environ or {})}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; its output is appended to the file."""
        with self._log_file.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self._environ
            )

    def stop(self, timeout_s: float = 10.0) -> None:
        """End it; nothing happens if it has ended."""
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def is_running(self) -> bool:
        """Whether it was started and has not ended."""
        process = self._process
        return process is not None and process.poll() is None

    def kill(self) -> None:
        """End it without a word; nothing happens if it has ended."""
        process = self._process
        if process is not None and process.poll() is None:
            process.kill()
            process.wait()

    def wait_until_listening(self, port: int) -> None:
        """Wait until the port is served.

        Raises:
            SimulationError: with the end of the log, when it ended or took too long.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                break
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.02)
        raise SimulationError(f"{self._name} did not start: {self.last_words()}")

    def last_words(self) -> str:
        """The end of what it printed, in one line."""
        lines = self._log_file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return " | ".join(lines[-3:]) or "it printed nothing"


class SiteBroker:
    """The sensors' broker on the virtual site: one account for sensors, boards and whoever reads results."""

    def __init__(self, kind: BrokerKind, directory: Path) -> None:
        directory.mkdir(parents=True)
        self.port = free_port()
        password = secrets.token_urlsafe(24)
        password_file = directory / "password"
        password_file.touch(mode=0o600)
        password_file.write_text(password, encoding="utf-8")
        log = directory / "broker.log"
        if kind == "mosquitto":
            self.process = mosquitto(_site_configuration(directory, self.port, password), log)
        else:
            self.process = embedded(self.port, SITE_USER, password, log)
        self.address = Broker(
            port=self.port,
            username=SITE_USER,
            password_file=str(password_file),
            protocol="5" if kind == "mosquitto" else "3.1.1",
        )

    def start(self) -> None:
        """Start and wait until it listens."""
        self.process.start()
        self.process.wait_until_listening(self.port)


def embedded(port: int, username: str, password: str, log: Path) -> ChildProcess:
    """The embedded broker on `port`, behind one name and password."""
    from edge_daemon.simulate.embedded_broker import PASSWORD_VARIABLE, USERNAME_VARIABLE

    return ChildProcess(
        "the embedded broker",
        [sys.executable, "-m", "edge_daemon.simulate.embedded_broker", str(port)],
        log,
        {USERNAME_VARIABLE: username, PASSWORD_VARIABLE: password},
    )


def mosquitto(configuration: Path, log: Path) -> ChildProcess:
    """mosquitto with this configuration."""
    program = find_mosquitto()
    assert program is not None
    return ChildProcess("mosquitto", [program, "-c", str(configuration)], log)


def _site_configuration(directory: Path, port: int, password: str) -> Path:
    from cloud_hub.identity.passwords import hash_password

    passwords = directory / "passwords"
    passwords.touch(mode=0o600)
    passwords.write_text(f"{SITE_USER}:{hash_password(password)}\n", encoding="utf-8")
    configuration = directory / "mosquitto.conf"
    configuration.write_text(
        "\n".join(
            [
                f"listener {port} 127.0.0.1",
                "allow_anonymous false",
                f"password_file {passwords}",
                "set_tcp_nodelay true",
                "max_inflight_messages 1000",
                "max_queued_messages 0",
                # Started by root, mosquitto becomes a user that cannot read this directory.
                *(["user root"] if os.geteuid() == 0 else []),
                "",
            ]
        ),
        encoding="utf-8",
    )
    return configuration
