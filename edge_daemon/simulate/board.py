"""A board of the virtual fleet as a process of its own, started again when it dies, as by an init system."""

from __future__ import annotations

import http.client
import json
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from edge_cascade.mqtt import Broker
from edge_daemon.core.swap_state import SwapState
from edge_daemon.errors import SimulationError
from edge_daemon.releases.state_file import DamagedStateError, read_state
from edge_daemon.simulate.brokers import ChildProcess, free_port

RESTART_S: Final = 0.5
"""How long an init system waits before it starts a service again."""

Table = Mapping[str, object]


class Board:
    """`edge-daemon run` under a supervisor; `start` and `stop` are called once each."""

    def __init__(self, name: str, directory: Path, tables: Mapping[str, Table], *, model: str) -> None:
        """`tables`: of the configuration, beside those that only this board can know."""
        directory.mkdir(parents=True)
        self.name = name
        self._model = model
        self._state_dir = directory / "state"
        self._port = free_port()
        path = directory / "edge.toml"
        own: dict[str, Table] = {
            "device": {"id": name, "state_dir": str(self._state_dir), "drain_s": 10.0},
            "http": {"port": self._port},
            "log": {"level": "warning"},
        }
        path.write_text(_toml({**own, **tables}, model, f"sensors/{name}/{{sensor}}"), encoding="utf-8")
        self._process = ChildProcess(
            f"board {name}",
            [sys.executable, "-m", "edge_daemon", "run", "--config", str(path)],
            directory / "edge.log",
        )
        self._stopping = threading.Event()
        self._supervisor = threading.Thread(target=self._supervise, name=f"supervisor-{name}", daemon=True)
        self.starts = 0

    def start(self) -> None:
        """Start it, and watch over it."""
        self._supervisor.start()

    def stop(self) -> None:
        """End it as an init system would."""
        self._stopping.set()
        if self._supervisor.is_alive():
            self._supervisor.join()
        self._process.stop(timeout_s=20.0)

    def kill(self) -> None:
        """What a fault in a driver or the kernel's want of memory does."""
        self._process.kill()

    def swap_state(self) -> SwapState | None:
        """What it has written down of its bundles; None before it has, and where it cannot be read."""
        try:
            kept = read_state(self._state_dir / "releases" / self._model)
        except (OSError, DamagedStateError):
            return None
        return None if kept is None else kept.state

    def is_ready(self) -> bool:
        """Whether it does all of its work."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/readyz", timeout=5):
                return True
        except (urllib.error.URLError, http.client.HTTPException, OSError):
            return False

    def counters(self) -> dict[str, float]:
        """Its metrics summed over their labels; empty while it does not answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/metrics", timeout=5) as answer:
                lines = answer.read().decode("utf-8").splitlines()
        except (urllib.error.URLError, http.client.HTTPException, OSError):
            return {}
        sums: dict[str, float] = {}
        for line in lines:
            name, _, value = line.rpartition(" ")
            if name and not line.startswith("#"):
                plain = name.partition("{")[0]
                sums[plain] = sums.get(plain, 0.0) + float(value)
        return sums

    def last_words(self) -> str:
        """The end of its log."""
        return self._process.last_words()

    def _supervise(self) -> None:
        while not self._stopping.is_set():
            self._process.start()
            self.starts += 1
            while self._process.is_running():
                if self._stopping.wait(0.05):
                    return
            self._stopping.wait(RESTART_S)


def broker_tables(broker: Broker) -> Table:
    """A broker as the configuration has it."""
    return {
        "port": broker.port,
        "username": broker.username,
        "password_file": broker.password_file,
        "protocol": broker.protocol,
    }


def _toml(tables: Mapping[str, Table], model: str, topic: str) -> str:
    lines = ["[[models]]", f"bundle = {json.dumps(model)}"]
    lines += ["[[inlet.sources]]", f"topic = {json.dumps(topic)}", 'format = "float32le"']
    for name, table in tables.items():
        lines.append(f"[{name}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in table.items() if value is not None]
    return "\n".join([*lines, ""])


def wait_until_ready(boards: list[Board], patience_s: float) -> None:
    """Until every board does all of its work.

    Raises:
        SimulationError: with the last words of one that does not.
    """
    waited = threading.Event()
    for _ in range(int(patience_s / 0.1)):
        if all(board.is_ready() for board in boards):
            return
        waited.wait(0.1)
    late = next(board for board in boards if not board.is_ready())
    raise SimulationError(f"{late.name} did not come up: {late.last_words()}")
