"""A stop is over in time, whatever hangs, and what must be closed is closed."""

import sqlite3
import threading
import time
from contextlib import closing

import pytest

from edge_daemon import daemon as daemon_module
from edge_daemon.config import (
    Config,
    DeviceConfig,
    HubConfig,
    InletConfig,
    ModelConfig,
    SourceConfig,
)
from edge_daemon.daemon import SPOOL_FILE, Daemon
from edge_daemon.past_life import was_stopped
from edge_daemon.stopping import stop_together

WAIT_S = 30.0
STEPS = ("WORKERS_STOP_S", "UPLINK_STOP_S", "CLOSE_S", "GOODBYE_S")


@pytest.fixture
def hang():
    """Something that was asked to stop and does not, until the test is over."""
    over, asked = threading.Event(), []

    def hang_as(name):
        def stop(*_):
            asked.append(name)
            over.wait(WAIT_S)

        return stop

    hang_as.asked = asked
    yield hang_as
    over.set()


def test_all_are_asked_although_the_first_hangs(hang):
    assert not stop_together([hang("first"), hang("second")], 0.5)
    assert sorted(hang.asked) == ["first", "second"]


def test_whoever_is_done_is_not_waited_for():
    began_s = time.monotonic()
    assert stop_together([lambda: None] * 3, WAIT_S)
    assert stop_together([], WAIT_S)
    assert time.monotonic() - began_s < WAIT_S / 2


def test_a_defect_in_one_is_said_and_ends_no_other(caplog):
    done = []

    def fail():
        raise ValueError("odd")

    assert stop_together([fail, lambda: done.append(True)], WAIT_S)
    assert done == [True]
    assert "defect while stopping" in caplog.text


def test_the_steps_of_a_stop_stay_below_the_units_timeout():
    steps_s = sum(getattr(daemon_module, name) for name in STEPS)
    assert steps_s + DeviceConfig(id="d").drain_s <= 25.0


def test_a_daemon_in_which_everything_hangs_ends_and_keeps_its_cases(
    tmp_path, tiny_model_dir, hang, monkeypatch
):
    for name in STEPS:
        monkeypatch.setattr(daemon_module, name, 0.2)
    daemon = Daemon(
        Config(
            device=DeviceConfig(id="d", state_dir=str(tmp_path), drain_s=0.2),
            models=(ModelConfig(bundle=str(tiny_model_dir / "bundle")),),
            inlet=InletConfig(sources=(SourceConfig(topic="s/{sensor}"),)),
            hub=HubConfig(),
        )
    )
    daemon.start()
    daemon.report()
    uplink = daemon.uplink
    for name in ("swapper", "follower", "personal", "shadow", "uplink"):
        setattr(daemon, name, Hanging(hang(name)))
    began_s = time.monotonic()
    daemon.stop()
    assert time.monotonic() - began_s < WAIT_S / 2
    assert sorted(hang.asked) == ["follower", "personal", "shadow", "swapper", "uplink"]
    assert was_stopped(tmp_path)
    with closing(sqlite3.connect(tmp_path / SPOOL_FILE)) as database:
        assert database.execute("SELECT count(*) FROM item").fetchone() == (1,)
    uplink.stop(0.0)


class Hanging:
    def __init__(self, stop):
        self.stop = stop
