"""The `cloud-hub` program as a process of its own: killed, drained, configured wrongly."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from cloud_hub.__main__ import main
from cloud_hub.store.queries import CaseFilter, find_cases
from cloud_hub.store.store import Store
from edge_cascade.bundle import load_bundle
from edge_cascade.messages import Acks, VerdictBatch
from edge_cascade.shipped import shipped_model_dir, shipped_models
from edge_cascade.tensors import encode_tensor
from tests.hub.fleet import BOOT, Device, a_batch, a_case, wait_until
from tests.services import free_port, start_mosquitto

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 20

Ended = namedtuple("Ended", "code out err")


@pytest.fixture(scope="module")
def broker(tmp_path_factory):
    with start_mosquitto(tmp_path_factory.mktemp("broker")) as broker:
        yield broker


@pytest.fixture
def config(tmp_path, broker):
    path = tmp_path / "hub.toml"
    path.write_text(
        f"""
        [hub]
        state_dir = "{tmp_path}/state"
        prefix = "{tmp_path.name}"
        [broker]
        port = {broker.port}
        [http]
        port = {free_port()}
        """,
        encoding="utf-8",
    )
    return path


def environment(**more):
    inherited = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return inherited | {"PYTHONPATH": str(ROOT)} | more


@pytest.fixture
def command(capsys, monkeypatch):
    """Runs a command in this process: its exit code, output and error output."""

    def run(*arguments, **variables):
        with monkeypatch.context() as patched:
            for name, value in variables.items():
                patched.setenv(name, value)
            capsys.readouterr()
            code = main([str(argument) for argument in arguments])
        return Ended(code, *capsys.readouterr())

    return run


class Process:
    """A `cloud-hub run`, and what it wrote once it has ended."""

    def __init__(self, config, **more):
        self._child = subprocess.Popen(
            [sys.executable, "-m", "cloud_hub", "run", "--config", str(config)],
            env=environment(**more),
            stderr=subprocess.PIPE,
            text=True,
        )
        text = config.read_text(encoding="utf-8")
        self._http = int(text.rpartition("port = ")[2].split()[0])
        self.log = ""

    def wait_ready(self):
        wait_until(self._is_ready, what="the hub to be ready")

    def _is_ready(self):
        if self._child.poll() is not None:
            raise AssertionError(f"the hub ended: {self._child.stderr.read()}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._http}/readyz", timeout=5) as response:
                return json.loads(response.read())["status"] == "ok"
        except OSError:
            return False

    def end(self, number=None):
        """Send a signal, if any, and wait; the exit code."""
        if number is not None:
            self._child.send_signal(number)
        _, self.log = self._child.communicate(timeout=TIMEOUT_S)
        return self._child.returncode


@contextmanager
def running(config, **more):
    process = Process(config, **more)
    try:
        yield process
    finally:
        if process._child.poll() is None:
            process.end(signal.SIGKILL)
        process._child.stderr.close()


def kept(tmp_path):
    with Store(tmp_path / "state") as store:
        rows = store.database.run(lambda c: find_cases(c, CaseFilter(), before=None, limit=500))
    return sorted(row["seq"] for row in rows)


@pytest.mark.parametrize(
    ("point", "answer"),
    [
        ("durable.before-rename", Acks(BOOT, committed=[1, 2])),
        ("hub.before-commit", Acks(BOOT, committed=[1, 2])),
        ("hub.after-commit", Acks(BOOT, duplicate=[1, 2])),
    ],
)
def test_killed_at_a_crash_point_nothing_is_lost_and_nothing_is_there_twice(
    tmp_path, config, broker, point, answer
):
    with Device(broker.port, prefix=tmp_path.name) as device:
        with running(config, EDGE_CRASH_AT=point) as hub:
            hub.wait_ready()
            device.send(a_batch(a_case(1), a_case(2)))
            assert hub.end() == -signal.SIGKILL
        with running(config) as hub:
            hub.wait_ready()
            # Nobody acknowledged, so the spool sends it again.
            device.send(a_batch(a_case(1), a_case(2)))
            assert device.next_of(Acks) == answer
            assert hub.end(signal.SIGTERM) == 0
    assert kept(tmp_path) == [1, 2]
    names = {file.name for file in (tmp_path / "state/blobs").glob("*/*")}
    assert len(names) == 1
    assert not any(name.startswith(".") for name in names)


def test_killed_under_load_everything_acknowledged_is_kept(tmp_path, config, broker):
    acknowledged = set()
    with Device(broker.port, prefix=tmp_path.name) as device, running(config) as hub:
        hub.wait_ready()
        for seq in range(200):
            device.send(a_batch(a_case(seq)))
        acknowledged.update(device.next_of(Acks).committed)
        assert hub.end(signal.SIGKILL) == -signal.SIGKILL
        while True:
            try:
                acknowledged.update(device.next_now(Acks).committed)
            except LookupError:
                break
    assert acknowledged
    assert acknowledged <= set(kept(tmp_path))


def test_sigterm_drains_and_the_service_manager_is_told(tmp_path, config, broker):
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        manager.settimeout(TIMEOUT_S)
        with (
            Device(broker.port, prefix=tmp_path.name) as device,
            running(config, NOTIFY_SOCKET=address, WATCHDOG_USEC="200000") as hub,
        ):
            said = [manager.recv(100), manager.recv(100), manager.recv(100)]
            assert said == [b"READY=1", b"WATCHDOG=1", b"WATCHDOG=1"]
            hub.wait_ready()
            device.send(a_batch(a_case(1)))
            assert device.next_of(Acks) == Acks(BOOT, committed=[1])
            assert hub.end(signal.SIGTERM) == 0
    lines = hub.log.splitlines()
    assert all(line.startswith("time=") for line in lines), hub.log
    assert lines[-1].endswith("hub stopped")


@pytest.mark.skipif("digits" not in shipped_models(), reason="models/digits is not built")
def test_the_shipped_full_model_answers_real_digits(tmp_path, config, broker):
    directory = shipped_model_dir("digits")
    wire = load_bundle(directory / "bundle").graph.wire
    with np.load(directory / "samples.npz") as samples:
        x, y = samples["x_test"][:200].astype(np.float32), samples["y_test"][:200]
    cases = [a_case(seq, tensor=encode_tensor(one, wire)) for seq, one in enumerate(x)]
    answered = {}
    with (
        Device(broker.port, prefix=tmp_path.name) as device,
        running(config, CLOUD_HUB__MODELS='[{"bundle": "digits"}]') as hub,
    ):
        hub.wait_ready()
        device.say_online()
        device.send(a_batch(*cases, model="digits"))
        while len(answered) < len(cases):
            answered |= {verdict.seq: verdict.label for verdict in device.next_of(VerdictBatch).verdicts}
        assert hub.end(signal.SIGTERM) == 0
    assert np.mean([answered[seq] == label for seq, label in enumerate(y)]) >= 0.95


def test_without_a_broker_it_runs_and_is_not_ready(config):
    with running(config, CLOUD_HUB__BROKER__PORT=str(free_port())) as hub:
        wait_until(lambda: status_of(hub._http, "/healthz") == 200, what="health")
        assert status_of(hub._http, "/readyz") == 503
        assert hub.end(signal.SIGTERM) == 0
    assert "Traceback" not in hub.log


def status_of(port, path):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as response:
            return response.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return None


def test_a_second_hub_on_the_same_state_ends_with_its_own_exit_code(command, config):
    with running(config) as hub:
        hub.wait_ready()
        second = command("run", "--config", config, CLOUD_HUB__HTTP__PORT="0")
        assert second.code == 4
        assert second.err.splitlines()[-1].startswith("cloud-hub: hub.state_dir = ")


@pytest.mark.parametrize(
    ("variable", "value", "code", "says"),
    [
        ("CLOUD_HUB__HTTP__PORT", "abc", 2, 'http.port = "abc"'),
        ("CLOUD_HUB__MODELS", '[{"bundle": "no-such-model"}]', 7, "no model 'no-such-model'"),
        ("CLOUD_HUB__BROKER__CA_FILE", "/nowhere/ca.pem", 2, "ca_file='/nowhere/ca.pem'"),
        ("CLOUD_HUB__STORE__URL", "nonsense", 2, "store.url = 'nonsense'"),
        ("CLOUD_HUB__HTTP__HOST", "203.0.113.7", 9, "http.host = '203.0.113.7'"),
    ],
)
def test_what_cannot_run_ends_with_one_line_and_its_exit_code(command, config, variable, value, code, says):
    ended = command("run", "--config", config, **{variable: value})
    assert ended.code == code, ended.err
    last = ended.err.splitlines()[-1]
    assert last.startswith("cloud-hub: ")
    assert says in last
    assert "Traceback" not in ended.err


def test_check_config_says_ok_or_why_not(command, config, tmp_path):
    good = command("check-config", "--config", config)
    assert (good.code, good.out) == (0, f"{config}: ok, models: none\n")
    bad = command("check-config", "--config", tmp_path / "none.toml")
    assert (bad.code, bad.err.count("\n")) == (2, 1)


def test_check_config_reads_the_files_that_run_would_read(command, config, tmp_path):
    named = {"CLOUD_HUB__BROKER__USERNAME": "hub", "CLOUD_HUB__BROKER__PASSWORD_FILE": str(tmp_path / "none")}
    bad = command("check-config", "--config", config, **named)
    assert (bad.code, bad.err.splitlines()[-1]) == (
        2,
        f"cloud-hub: broker: password_file '{tmp_path}/none': No such file or directory",
    )


def test_check_config_leaves_what_systemd_makes_at_the_start_of_the_unit(command, config):
    named = {
        "CLOUD_HUB__BROKER__USERNAME": "hub",
        "CLOUD_HUB__BROKER__PASSWORD_FILE": "/run/credentials/none.service/hub-password",
        "CLOUD_HUB__HTTP__CERTIFICATE_FILE": "/run/credentials/none.service/http.pem",
        "CLOUD_HUB__HTTP__KEY_FILE": "/run/credentials/none.service/http.key",
    }
    good = command("check-config", "--config", config, **named)
    assert (good.code, good.out) == (0, f"{config}: ok, models: none\n")
    for name in ("broker.password_file", "http.certificate_file", "http.key_file"):
        assert f"warning: {name} = '/run/credentials/none.service/" in good.err


def test_output_that_nobody_reads_or_no_disk_takes_is_no_traceback(config):
    listing = [sys.executable, "-m", "cloud_hub", "token", "list", "--config", str(config)]
    with subprocess.Popen(listing, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as gone:
        gone.stdout.close()
        said = gone.stderr.read()
    assert (gone.returncode, said) == (141, b"")
    with Path("/dev/full").open("wb") as full:
        ended = subprocess.run(listing, stdout=full, stderr=subprocess.PIPE, check=False)
    assert (ended.returncode, ended.stderr) == (1, b"cloud-hub: No space left on device\n")


def test_tokens_are_made_listed_used_beside_a_running_hub_and_revoked(command, config):
    with running(config) as hub:
        hub.wait_ready()
        made = command("token", "create", "ann", "--scope", "read", "--scope", "label", "--config", config)
        token = made.out.strip()
        assert made.code == 0
        request = urllib.request.Request(
            f"http://127.0.0.1:{hub._http}/v1/stats", headers={"Authorization": f"Bearer {token}"}
        )
        with urllib.request.urlopen(request, timeout=5) as response:
            assert json.loads(response.read())["pending"] == 0
        listed = command("token", "list", "--config", config).out
        token_id, _, secret = token.partition(".")
        assert f"{token_id}  read,label" in listed
        assert "active" in listed
        assert secret not in listed
        assert command("token", "revoke", token, "--config", config).out == f"token {token_id} revoked\n"
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=5)
        assert caught.value.code == 401
        caught.value.close()
        assert command("token", "revoke", "nobody", "--config", config).code == 8
