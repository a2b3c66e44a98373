"""The programs of the loop as child processes, started and ended again and again, and what they say of themselves."""

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from tests.services import free_port, start_mosquitto

ROOT = Path(__file__).parents[2]
DEVICE = "pump-1"
TIMEOUT_S = 45.0
"""For anything to happen at all: far above what it takes, so that a busy machine fails no test."""


def wait_until(is_so, what, *, timeout_s=TIMEOUT_S):
    """Poll with a deadline; the value that was true."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        value = is_so()
        if value:
            return value
        time.sleep(0.01)
    raise AssertionError(f"waited {timeout_s} s for {what}")


def http(url, *, token=None, method="GET", body=None):
    """Status and body of an answer, whatever the status."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    request = urllib.request.Request(url, data=body, headers=headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def status_of(url):
    """The status alone, None where nobody listens."""
    try:
        return http(url)[0]
    except OSError:
        return None


class Program:
    """A program of ours as a child process, again and again; everything it says is kept in one file."""

    def __init__(self, arguments, log_file):
        self._arguments = [str(argument) for argument in arguments]
        self._log_file = log_file
        self._process = None

    @property
    def is_running(self):
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self):
        return self._process.pid

    @property
    def log(self):
        return self._log_file.read_text(encoding="utf-8") if self._log_file.exists() else ""

    def start(self, **environ):
        assert not self.is_running
        with self._log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *self._arguments],
                env={**os.environ, "PYTHONPATH": str(ROOT), **environ},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def kill(self):
        """SIGKILL: nothing is saved, nobody is told."""
        self._process.kill()
        self._process.wait()

    @contextlib.contextmanager
    def frozen(self):
        """Stopped in its tracks for the length of the block, its connections open."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def wait_killed(self):
        """Wait until it has killed itself at its crash point."""
        wait_until(lambda: not self.is_running, f"the crash of {self._arguments}")
        assert self._process.returncode == -signal.SIGKILL, self.log

    def stop(self):
        """SIGTERM, and the exit code that follows; None if it was not running."""
        if not self.is_running:
            return None
        self._process.terminate()
        try:
            return self._process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self._arguments} does not end: {self.log}") from None


class Broker:
    """mosquitto with the configuration that `cloud-hub broker config` wrote, on one port for all its lives."""

    def __init__(self, folder):
        self.folder = folder
        self.port = free_port()
        self._running = None
        self._stack = contextlib.ExitStack()

    def start(self):
        if self._running is None:
            self._running = self._stack.enter_context(
                start_mosquitto(self.folder, configuration=self.folder / "mosquitto.conf", port=self.port)
            )

    def stop(self):
        """In order: what it has to keep is saved."""
        self._running = None
        self._stack.close()

    def kill_and_wipe(self):
        """SIGKILL, and nothing of what it kept is left for the next process."""
        self._running.kill()
        self.stop()
        shutil.rmtree(self.folder / "persistence")
        (self.folder / "persistence").mkdir()


class Hub:
    """`cloud-hub run`, and its REST interface."""

    def __init__(self, config, port, state_dir, log_file):
        self.config = config
        self.url = f"http://127.0.0.1:{port}"
        self.program = Program(["cloud_hub", "run", "--config", config], log_file)
        self.state_dir = state_dir
        self.token = ""

    def start(self, **environ):
        if not self.program.is_running:
            self.program.start(**environ)

    def stop(self):
        code = self.program.stop()
        assert code in {0, None}, f"exit code {code}: {self.program.log}"

    def wait_ready(self):
        wait_until(lambda: status_of(f"{self.url}/readyz") == 200, "the hub to be ready")

    def get(self, path):
        status, body = http(self.url + path, token=self.token)
        assert status == 200, body
        return json.loads(body)

    def cases(self, *, device=DEVICE):
        """Every case of a device."""
        found, cursor = [], ""
        while True:
            page = self.get(f"/v1/cases?limit=500&device={device}{cursor}")
            found += page["cases"]
            if page["next"] is None:
                return found
            cursor = f"&cursor={page['next']}"

    def stats(self):
        return self.get("/v1/stats")

    def cases_on_disk(self):
        """How many cases a hub that is not running has committed."""
        assert not self.program.is_running
        return on_disk(self.state_dir / "hub.db", "SELECT count(*) FROM cases")[0][0]


class Device:
    """`edge-daemon run` with a state directory, and what its HTTP face says."""

    def __init__(self, config, port, state_dir, log_file):
        self.config = config
        self.url = f"http://127.0.0.1:{port}"
        self.program = Program(["edge_daemon", "run", "--config", config], log_file)
        self.state_dir = state_dir

    def start(self, **environ):
        self.program.start(**environ)

    def stop(self):
        code = self.program.stop()
        assert code in {0, None}, f"exit code {code}: {self.program.log}"

    def wait_ready(self):
        wait_until(lambda: status_of(f"{self.url}/readyz") == 200, "the device to be ready")
        # The first report is committed as well, so that the next commit is of what the test sends.
        wait_until(lambda: self.metric("edge_spool_appended_total") > 0, "the first report")

    def health(self):
        """What it says of itself: whether it is ready, and why not."""
        return json.loads(http(f"{self.url}/readyz")[1])

    def metric(self, name):
        """The sum over all labels of a metric, 0 if it is not there."""
        lines = http(f"{self.url}/metrics")[1].decode().splitlines()
        return sum(
            int(float(line.rpartition(" ")[2]))
            for line in lines
            if line.startswith((f"{name} ", f"{name}{{"))
        )

    def is_drained(self):
        return status_of(f"{self.url}/healthz") == 200 and self.metric("edge_spool_rows") == 0

    def spooled_cases(self):
        """How many cases lie on the disk of a device that is not running."""
        return self._spool("SELECT count(*) FROM item JOIN batch_key ON key_no = no WHERE kind = 1")[0][0]

    def spooled_updates(self):
        """How many client updates lie on the disk of a device that is not running."""
        return self._spool("SELECT count(*) FROM item JOIN batch_key ON key_no = no WHERE kind = 2")[0][0]

    def dropped_cases(self):
        """The drop counters on the disk of a device that is not running: count by reason and kind."""
        rows = self._spool("SELECT reason, kind, count FROM dropped")
        return {(reason, kind): dropped for reason, kind, dropped in rows}

    def _spool(self, statement):
        assert not self.program.is_running
        return on_disk(self.state_dir / "spool.sqlite", statement)


def on_disk(database, statement):
    """What a database says that nobody has open."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        return connection.execute(statement).fetchall()
