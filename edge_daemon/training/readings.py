"""Reads the board's vitals: sysfs and psutil. Decides nothing; see `core.vitals`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import psutil

from edge_daemon.core.vitals import Vitals
from edge_daemon.sensors import SYSFS, read_temperatures

SHORTEST_TIME_S: Final = 0.5
"""Of all cores together."""


class VitalsReader:
    """Reads when asked; the load is that since the reading before. Used by one thread."""

    def __init__(self, queued: Callable[[], int], sysfs: Path = SYSFS) -> None:
        """`queued`: how many samples wait for their answer."""
        self._queued = queued
        self._sysfs = sysfs
        self._process = psutil.Process()
        self._before: tuple[float, float, float] | None = None

    def read(self, child_pid: int | None = None) -> Vitals:
        """The vitals now; what this process and its child use is not what others use."""
        temperatures = read_temperatures(self._sysfs)
        return Vitals(
            celsius=max(temperatures.values(), default=None),
            other_load=self._other_load(child_pid),
            free_bytes=int(psutil.virtual_memory().available),
            on_battery=_on_battery(),
            queued=self._queued(),
        )

    def _other_load(self, child_pid: int | None) -> float | None:
        times = psutil.cpu_times()
        total_s = float(sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0))
        idle_s = float(times.idle + getattr(times, "iowait", 0.0))
        own = self._process.cpu_times()
        # A child that has ended is in the last two.
        own_s = float(own.user + own.system + own.children_user + own.children_system)
        own_s += _cpu_seconds(child_pid)
        before = self._before
        if before is not None and total_s - before[0] < SHORTEST_TIME_S:
            # The kernel counts in hundredths of a second.
            return None
        self._before = (total_s, idle_s, own_s)
        if before is None:
            return None
        passed_s, idle_s, own_s = total_s - before[0], idle_s - before[1], own_s - before[2]
        share = (passed_s - idle_s - own_s) / passed_s
        # A container's processors may be fewer than the machine's: then this is a lower bound.
        return min(max(share, 0.0), 1.0)


def _cpu_seconds(pid: int | None) -> float:
    if pid is None:
        return 0.0
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)


def _on_battery() -> bool | None:
    if not hasattr(psutil, "sensors_battery"):
        return None
    try:
        battery = psutil.sensors_battery()
    except OSError:
        return None
    if battery is None or battery.power_plugged is None:
        return None
    return not battery.power_plugged
