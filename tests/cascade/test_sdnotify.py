"""What reaches systemd's socket, with a real one; and that its absence costs nothing."""

import os
import socket
import uuid

import pytest

from edge_cascade.sdnotify import notify, watchdog_interval_s


@pytest.fixture(params=["path", "abstract"])
def supervisor(request, tmp_path, monkeypatch):
    if request.param == "path":
        address = name = str(tmp_path / "notify")
    else:
        unique = f"edge-daemon-{uuid.uuid4()}"
        address, name = f"\0{unique}", f"@{unique}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(address)
        listener.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        yield listener


def test_each_state_is_one_datagram(supervisor):
    assert notify("READY=1")
    assert notify("WATCHDOG=1\nSTATUS=12 in the spool")
    assert supervisor.recv(4096) == b"READY=1"
    assert supervisor.recv(4096) == b"WATCHDOG=1\nSTATUS=12 in the spool"


def test_text_that_is_no_utf_8_is_sent_all_the_same(supervisor):
    assert notify("STATUS=\udcff")
    assert supervisor.recv(4096) == b"STATUS=?"


def test_a_supervisor_that_does_not_read_is_given_up_on(supervisor):
    assert notify("WATCHDOG=1")
    # The kernel's queue holds a few hundred; the first that does not fit is dropped.
    assert not all(notify("WATCHDOG=1") for _ in range(100_000))


@pytest.mark.parametrize(
    "address", [None, "", "relative", "/nowhere/notify", "@nobody-" + "x" * 20, "/" + "x" * 200]
)
def test_nothing_happens_where_nobody_listens(monkeypatch, address):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    if address is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", address)
    assert not notify("READY=1")


@pytest.mark.parametrize(
    ("usec", "pid", "expected"),
    [
        ("30000000", "own", 15.0),
        ("30000000", None, 15.0),
        ("30000000", "1", None),
        (None, "own", None),
        ("0", "own", None),
        ("-5", "own", None),
        ("soon", "own", None),
        ("", "own", None),
        ("²", "own", None),
    ],
)
def test_the_watchdog_is_fed_at_half_of_what_systemd_waits_for(monkeypatch, usec, pid, expected):
    for name, value in (("WATCHDOG_USEC", usec), ("WATCHDOG_PID", str(os.getpid()) if pid == "own" else pid)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert watchdog_interval_s() == expected
