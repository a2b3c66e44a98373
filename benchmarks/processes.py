"""The processes that a benchmark measures and needs: broker, hub's stand-in, boards, each pinned to a core.

The broker is configured to lose nothing by itself: 1,000 messages in flight, no limit on what is queued,
TCP_NODELAY. A board is `edge-daemon run` with everything at its defaults but for what is said; it is fed on
`<root>/raw/<sensor>` in raw float32 and answers on `<root>/results/<sensor>`.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from edge_daemon.simulate.brokers import find_mosquitto, free_port


@dataclass(frozen=True, slots=True)
class Subject:
    """A process that answers what is published below `root`; `metrics_port` is None where nothing is told."""

    name: str
    root: str
    pid: int
    metrics_port: int | None

    def counter(self, name: str) -> int:
        """One of its counters, summed over its labels; 0 where nothing is told."""
        return 0 if self.metrics_port is None else _metric(self.metrics_port, name)

    def cpu_s(self) -> float:
        """Processor time it has used so far: another process's clock, by Linux's rule for its number."""
        return time.clock_gettime(~self.pid << 3 | 2)


@contextmanager
def running(
    name: str,
    command: Sequence[str],
    directory: Path,
    core: int | None,
    environ: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """A child process on one core, ended at the end; its output in `<name>.log`."""
    with (directory / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            env={**os.environ, **(environ or {})},
            preexec_fn=None if core is None else partial(os.sched_setaffinity, 0, {core}),  # noqa: PLW1509
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(15.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def running_broker(port: int, directory: Path, core: int | None) -> Iterator[subprocess.Popen[bytes]]:
    """mosquitto, once it listens."""
    configuration = directory / "mosquitto.conf"
    configuration.write_text(_BROKER.format(port=port), encoding="utf-8")
    mosquitto = find_mosquitto()
    if mosquitto is None:
        raise SystemExit("benchmarks: no mosquitto (apt-get install mosquitto)")
    with running("mosquitto", [mosquitto, "-c", str(configuration)], directory, core) as process:
        wait_for_port(port)
        yield process


@contextmanager
def running_hub(broker: int, directory: Path, core: int | None) -> Iterator[subprocess.Popen[bytes]]:
    """A consumer that acknowledges cases as a hub does and keeps nothing."""
    command = [sys.executable, "-m", "benchmarks.acknowledging_hub", "--port", str(broker)]
    with running("hub", command, directory, core) as process:
        yield process


@contextmanager
def running_board(
    name: str,
    bundle: Path,
    broker: int,
    directory: Path,
    core: int | None,
    *,
    root: str = "a",
    tables: str = "",
    environ: Mapping[str, str] | None = None,
) -> Iterator[Subject]:
    """A board, once it is ready; `name` is its device's id and its log's name.

    `tables` is added to its configuration; `environ` may override a key of it, see `edge_daemon.config_file`.
    What it keeps stays in `directory` for the next one of that name.
    """
    port = free_port()
    state = directory / name
    state.mkdir(exist_ok=True)
    config = directory / f"{name}.toml"
    common = _BOARD.format(device=name, state=state, bundle=bundle, broker=broker, root=root, http=port)
    config.write_text(common + tables, encoding="utf-8")
    command = [sys.executable, "-m", "edge_daemon", "run", "--config", str(config)]
    with running(name, command, directory, core, environ) as process:
        wait_until_ready(port)
        yield Subject(name, root, process.pid, port)


def wait_for_port(port: int) -> None:
    """Until somebody listens there."""
    for _ in range(500):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise SystemExit(f"benchmarks: nobody listens on port {port}")


def wait_until_ready(port: int) -> None:
    """Until a board or a hub says so of itself, which serves HTTP there."""
    for _ in range(1000):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=1.0):
                return
        except OSError:
            time.sleep(0.02)
    raise SystemExit(f"benchmarks: what serves port {port} did not become ready")


def choose_cores() -> tuple[int | None, int | None]:
    """The core of the subjects and the one of everything else; (None, None) where there is only one."""
    available = sorted(os.sched_getaffinity(0))
    return (available[1], available[0]) if len(available) > 1 else (None, None)


def _metric(port: int, name: str) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5.0) as response:
        text = response.read().decode()
    return sum(
        int(float(value)) for value in re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
    )


_BROKER: Final = """\
listener {port} 127.0.0.1
allow_anonymous true
set_tcp_nodelay true
max_inflight_messages 1000
max_queued_messages 0
log_type error
"""

_BOARD: Final = """\
[device]
id = "{device}"
state_dir = "{state}"

[[models]]
bundle = "{bundle}"

[inlet]
broker.port = {broker}

[[inlet.sources]]
topic = "{root}/raw/{{sensor}}"
format = "float32le"

[results]
prefix = "{root}/results"
qos = 1

[hub]
broker.port = {broker}

[http]
port = {http}

"""
