"""The board's vitals as they are read: files in a directory that stands for /sys, processes that are real."""

from types import SimpleNamespace
from typing import NamedTuple

import psutil
import pytest

from edge_daemon.training import readings
from edge_daemon.training.readings import VitalsReader

CHILD = 7


class CpuTimes(NamedTuple):
    user: float
    idle: float
    iowait: float


class FakePsutil:
    """As much of psutil as is asked, with the seconds that the test says."""

    Error = psutil.Error

    def __init__(self, seconds, plugged=None):
        self.seconds, self.plugged = seconds, plugged

    def cpu_times(self):
        return CpuTimes(self.seconds["user"], self.seconds["idle"], self.seconds["iowait"])

    def Process(self, pid=None):  # noqa: N802 - psutil's name
        def cpu_times():
            used = self.seconds["own" if pid is None else "child"]
            return SimpleNamespace(user=used, system=0.0, children_user=0.0, children_system=0.0)

        return SimpleNamespace(cpu_times=cpu_times)

    def virtual_memory(self):
        return SimpleNamespace(available=2**30)

    def sensors_battery(self):
        return None if self.plugged is None else SimpleNamespace(power_plugged=self.plugged)


def test_the_hottest_sensor_counts_and_a_board_without_one_says_nothing(tmp_path):
    reader = VitalsReader(lambda: 3, tmp_path)
    assert reader.read().celsius is None
    for number, (kind, milli) in enumerate([("cpu-thermal", 61000), ("gpu-thermal", 64500)]):
        zone = tmp_path / f"class/thermal/thermal_zone{number}"
        zone.mkdir(parents=True)
        (zone / "type").write_text(f"{kind}\n")
        (zone / "temp").write_text(f"{milli}\n")
    vitals = reader.read()
    assert (vitals.celsius, vitals.queued) == (64.5, 3)
    assert vitals.free_bytes > 0


def test_what_this_process_and_its_child_burn_is_not_what_others_use(monkeypatch, tmp_path):
    """Ten seconds of two cores: 8 idle, 2 our own, 3 the child's, 1 waiting for the disk, so 6 of others."""
    seconds = {"user": 0.0, "idle": 0.0, "iowait": 0.0, "own": 0.0, "child": 0.0}
    monkeypatch.setattr(readings, "psutil", FakePsutil(seconds))
    reader = VitalsReader(lambda: 0, tmp_path)
    assert reader.read(child_pid=CHILD).other_load is None
    seconds |= {"user": 11.0, "idle": 8.0, "iowait": 1.0, "own": 2.0, "child": 3.0}
    assert reader.read(child_pid=CHILD).other_load == pytest.approx(6 / 20)
    # Too soon for the kernel's hundredths, and the reading before still counts.
    seconds["user"] += 0.4
    assert reader.read(child_pid=CHILD).other_load is None
    seconds["user"] += 0.6
    assert reader.read(child_pid=CHILD).other_load == 1.0


@pytest.mark.parametrize(("plugged", "on_battery"), [(True, False), (False, True), (None, None)])
def test_a_board_on_battery_says_so(monkeypatch, tmp_path, plugged, on_battery):
    seconds = {"user": 0.0, "idle": 0.0, "iowait": 0.0, "own": 0.0, "child": 0.0}
    monkeypatch.setattr(readings, "psutil", FakePsutil(seconds, plugged))
    assert VitalsReader(lambda: 0, tmp_path).read().on_battery is on_battery


def test_a_child_that_is_gone_used_nothing(tmp_path):
    reader = VitalsReader(lambda: 0, tmp_path)
    assert reader.read(child_pid=2**22 + 1).queued == 0
