"""Watches temperatures and watts over a stretch of the run, between calls and never within one."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from edge_daemon.sensors import SYSFS, read_energy, read_rails, read_temperatures, watts_between

INTERVAL_S: Final = 0.25


class Stretch(msgspec.Struct, frozen=True):
    """Mean watts of each rail and highest temperature of each sensor; empty where there is none."""

    watts: dict[str, float]
    max_celsius: dict[str, float]


class Rail(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A rail's mean watts at rest and while the ladder ran without a pause.

    `mj_per_sample` is what a sample took above rest, in millijoules; below zero it is noise.
    """

    name: str
    idle_w: float
    busy_w: float
    mj_per_sample: float


class Temperature(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The highest reading of a sensor at rest and while the ladder ran without a pause."""

    name: str
    idle_celsius: float
    busy_celsius: float


class Watch:
    """Reads the board's sensors at most every 250 ms for as long as it is told to look."""

    def __init__(self, sysfs: Path = SYSFS, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._sysfs = sysfs
        self._clock_s = clock_s
        self._started_s = self._read_s = clock_s()
        self._energy = read_energy(sysfs)
        self._watts: dict[str, list[float]] = defaultdict(list)
        self._celsius: dict[str, list[float]] = defaultdict(list)

    def look(self) -> None:
        """Read the sensors if it is time to."""
        now_s = self._clock_s()
        if now_s - self._read_s >= INTERVAL_S:
            self._read_s = now_s
            self._read()

    def finish(self) -> Stretch:
        """Read once more and sum up."""
        self._read()
        seconds = max(self._clock_s() - self._started_s, 1e-3)
        return Stretch(
            watts={
                **{name: sum(values) / len(values) for name, values in self._watts.items()},
                **watts_between(self._energy, read_energy(self._sysfs), seconds),
            },
            max_celsius={name: max(values) for name, values in self._celsius.items()},
        )

    def _read(self) -> None:
        for name, value in read_rails(self._sysfs).items():
            self._watts[name].append(value)
        for name, value in read_temperatures(self._sysfs).items():
            self._celsius[name].append(value)


def rails_of(idle: Stretch, busy: Stretch, samples_per_s: float) -> tuple[Rail, ...]:
    """The rails that told something in both stretches."""
    return tuple(
        Rail(name, idle.watts[name], watts, (watts - idle.watts[name]) / samples_per_s * 1e3)
        for name, watts in busy.watts.items()
        if name in idle.watts
    )


def temperatures_of(idle: Stretch, busy: Stretch) -> tuple[Temperature, ...]:
    """The sensors that told something in both stretches."""
    return tuple(
        Temperature(name, idle.max_celsius[name], celsius)
        for name, celsius in busy.max_celsius.items()
        if name in idle.max_celsius
    )
