"""The commands of examples/quickstart/README.md, as they stand there, with free ports in place of its own."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from edge_cascade.shipped import shipped_models
from tests.faults.processes import status_of, wait_until
from tests.services import free_port, require_program

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/quickstart"
TIMEOUT_S = 60
# What is the same on every machine; the rest differs with the moment or with the processor's arithmetic.
STEADY = {"sensor", "model", "label", "label_index", "plan", "escalated", "deferred", "source", "revision"}


def blocks(language, text):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


README = (EXAMPLE / "README.md").read_text(encoding="utf-8")
INSTALL, ENTER, PREPARE, BROKER, HUB, DEVICE, READ, SEND, ASK = blocks("sh", README)
(RESULTS,) = blocks("text", README)


@pytest.fixture
def terminal():
    """Runs commands as a terminal would that has just been opened in a copy of the repository."""
    for program, package in (
        ("mosquitto", "mosquitto"),
        ("mosquitto_pub", "mosquitto-clients"),
        ("mosquitto_sub", "mosquitto-clients"),
        ("curl", "curl"),
    ):
        require_program(program, package=package)
    if "vibration" not in shipped_models():
        pytest.skip("the bundle of 'vibration' is not built: python models/vibration/recipe.py")
    # Not in pytest's folder: started by root, mosquitto becomes a user that cannot enter it.
    with tempfile.TemporaryDirectory(prefix="quickstart-") as name:
        top = Path(name)
        top.chmod(0o755)
        shutil.copytree(EXAMPLE, top / "examples/quickstart", ignore=shutil.ignore_patterns("state"))
        (top / ".venv").mkdir()
        (top / ".venv/bin").symlink_to(Path(sys.executable).parent)
        yield Terminal(top)


class Terminal:
    def __init__(self, top):
        self.folder = top / "examples/quickstart"
        self.hub_port, self.device_port = free_port(), free_port()
        self._top = top
        self._ports = {"18830": str(free_port()), "8080": str(self.hub_port)}
        for name in ("edge.toml", "hub.toml"):
            path = self.folder / name
            path.write_text(self._with_ports(path.read_text(encoding="utf-8")), encoding="utf-8")
        self._environ = {
            **os.environ,
            "CLOUD_HUB__HTTP__PORT": str(self.hub_port),
            "EDGE_DAEMON__HTTP__PORT": str(self.device_port),
        }

    def run(self, block):
        """What a block of commands prints; every one of them must succeed."""
        return subprocess.run(
            ["sh", "-euc", self._with_ports(ENTER + block)],
            cwd=self._top, env=self._environ, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_S, check=True,
        ).stdout  # fmt: skip

    @contextmanager
    def running(self, block, log):
        """A block that runs until the terminal is closed; its output is in `log`."""
        with (self.folder / log).open("wb") as output:
            process = subprocess.Popen(
                ["sh", "-euc", self._with_ports(ENTER + block)],
                cwd=self._top, env=self._environ, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        try:
            yield
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(TIMEOUT_S)

    def _with_ports(self, text):
        return re.sub("|".join(self._ports), lambda found: self._ports[found[0]], text)


def test_the_quickstart_shows_what_it_says(terminal):
    terminal.run(PREPARE)
    with ExitStack() as stack:
        for block, log in ((BROKER, "broker.log"), (HUB, "hub.log"), (DEVICE, "device.log")):
            stack.enter_context(terminal.running(block, log))
        for port in (terminal.hub_port, terminal.device_port):
            wait_until(lambda port=port: status_of(f"http://127.0.0.1:{port}/readyz") == 200, "a program")
        stack.enter_context(terminal.running(READ, "results"))
        wait_until(lambda: b"as auto-" in (terminal.folder / "broker.log").read_bytes(), "the reader")
        terminal.run(SEND)
        wait_until(lambda: shown().keys() <= seen(terminal).keys(), "answers and verdict")
        held = json.loads(terminal.run(ASK))
    # One sure answer in a hundred is audited, and then has a verdict that is not shown.
    found = {topic: seen(terminal)[topic] for topic in shown()}
    assert steady(found) == steady(shown())
    assert {topic: set(message) for topic, message in found.items()} == {
        topic: set(message) for topic, message in shown().items()
    }
    corrected = found["results/pump-1/unsure/verdict"]["id"]
    assert corrected == found["results/pump-1/unsure"]["id"]
    assert corrected in {f"{case['boot']}-{case['seq']}" for case in held["cases"]}
    for log in ("hub.log", "device.log"):
        assert "Traceback" not in (terminal.folder / log).read_text(encoding="utf-8")


def test_the_main_readme_has_the_same_commands():
    main = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = (INSTALL, ENTER, PREPARE, BROKER, HUB, DEVICE, READ, SEND)
    assert [block for block in blocks if block not in main] == []


def seen(terminal):
    return by_topic((terminal.folder / "results").read_text(encoding="utf-8"))


def shown():
    return by_topic(RESULTS)


def by_topic(text):
    lines = [line.partition(" ") for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return {topic: json.loads(message) for topic, _, message in lines}


def steady(messages):
    return {
        topic: {key: value for key, value in message.items() if key in STEADY}
        for topic, message in messages.items()
    }
