"""Temperatures and watts, where the board tells. Pure functions over a root directory; absent is empty.

Layouts, none of which was at hand when this was written:

    class/hwmon/hwmon*/name = ina3221         in[123]_label, in[123]_input (mV), curr[123]_input (mA): Jetson
                                              Orin, and Xavier from JetPack 5 on. in[4-7] and curr4 are shunt
                                              voltages and sums, no rails (docs.kernel.org/hwmon/ina3221.html)
    bus/i2c/drivers/ina3221x/*/iio:device*/   rail_name_<n>, in_power<n>_input (mW): Xavier with JetPack 4
    class/hwmon/hwmon*/power*_{input,average} microwatts (docs.kernel.org/hwmon/sysfs-interface.html)
    class/powercap/intel-rapl:<n>/energy_uj   microjoules that wrap, mostly for root alone
                                              (docs.kernel.org/power/powercap/powercap.html)
    class/thermal/thermal_zone*/{type,temp}   millidegrees
    class/hwmon/hwmon*/temp*_input            millidegrees

A Raspberry Pi has the last two and no watts: those of a Pi 5 are behind its firmware, not in sysfs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

SYSFS: Final = Path("/sys")

_RAILS_OF_INA3221: Final = (1, 2, 3)
_NOT_CONNECTED: Final = "NC"


class Energy(NamedTuple):
    """A counter in joules, and the value at which it starts again."""

    joules: float
    range_joules: float


def read_rss_bytes() -> int:
    """The resident memory of this process, 0 where the system does not say."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except (OSError, IndexError):
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def read_temperatures(sysfs: Path = SYSFS) -> dict[str, float]:
    """Degrees Celsius by the sensor's name; what cannot be read (a powered-off core) is absent."""
    found: dict[str, float] = {}
    for zone in _directories(sysfs / "class/thermal", "thermal_zone*"):
        _add(found, _text(zone / "type") or zone.name, zone.name, _number(zone / "temp", 1e-3))
    # The kernel shows most zones a second time as hwmon chips, with '_' for '-'.
    zones = {_plain(name) for name in found}
    for chip in _directories(sysfs / "class/hwmon", "hwmon*"):
        name = _text(chip / "name") or chip.name
        if _plain(name) in zones:
            continue
        for path, index in _numbered(chip, r"temp(\d+)_input"):
            label = _text(chip / f"temp{index}_label") or f"temp{index}"
            _add(found, f"{name} {label}", chip.name, _number(path, 1e-3))
    return found


def read_milli_celsius(sysfs: Path = SYSFS) -> int | None:
    """Thousandths of a degree Celsius of the hottest sensor, None where there is none."""
    temperatures = read_temperatures(sysfs)
    return round(max(temperatures.values()) * 1000) if temperatures else None


def read_rails(sysfs: Path = SYSFS) -> dict[str, float]:
    """Watts by the rail's name. Rails overlap on some boards (`VDD_IN` is the sum): do not add them up."""
    found: dict[str, float] = {}
    for chip in _directories(sysfs / "class/hwmon", "hwmon*"):
        name = _text(chip / "name") or chip.name
        if name == "ina3221":
            _add_ina3221(found, chip)
            continue
        for path, index in _numbered(chip, r"power(\d+)_(?:input|average)"):
            # Some chips have both; the input is the newer value.
            if path.name.endswith("_average") and (chip / f"power{index}_input").exists():
                continue
            label = _text(chip / f"power{index}_label") or f"power{index}"
            _add(found, f"{name} {label}", chip.name, _number(path, 1e-6))
    for chip in _directories(sysfs / "bus/i2c/drivers/ina3221x", "*/iio:device*"):
        for path, index in _numbered(chip, r"in_power(\d+)_input"):
            label = _text(chip / f"rail_name_{index}") or f"channel {index}"
            if label != _NOT_CONNECTED:
                _add(found, label, chip.name, _number(path, 1e-3))
    return found


def read_energy(sysfs: Path = SYSFS) -> dict[str, Energy]:
    """The processor's energy counters (RAPL), one a package; empty where they may not be read."""
    found: dict[str, Energy] = {}
    for zone in _directories(sysfs / "class/powercap", "intel-rapl:*"):
        # `intel-rapl:0:1` is a part of `intel-rapl:0`.
        if zone.name.count(":") > 1:
            continue
        joules = _number(zone / "energy_uj", 1e-6)
        range_joules = _number(zone / "max_energy_range_uj", 1e-6)
        if joules is not None and range_joules is not None:
            found[f"RAPL {_text(zone / 'name') or zone.name}"] = Energy(joules, range_joules)
    return found


def watts_between(
    before: Mapping[str, Energy], after: Mapping[str, Energy], seconds: float
) -> dict[str, float]:
    """The mean of the time between two readings of the counters, which may have wrapped once."""
    watts: dict[str, float] = {}
    for name in before.keys() & after.keys():
        joules = after[name].joules - before[name].joules
        if joules < 0:
            joules += before[name].range_joules
        watts[name] = joules / seconds
    return watts


def _add_ina3221(found: dict[str, float], chip: Path) -> None:
    for channel in _RAILS_OF_INA3221:
        volts, amperes = (
            _number(chip / f"in{channel}_input", 1e-3),
            _number(chip / f"curr{channel}_input", 1e-3),
        )
        label = _text(chip / f"in{channel}_label") or f"channel {channel}"
        if volts is not None and amperes is not None and label != _NOT_CONNECTED:
            _add(found, label, chip.name, volts * amperes)


def _add(found: dict[str, float], name: str, chip: str, value: float | None) -> None:
    if value is not None:
        found[f"{name} ({chip})" if name in found else name] = value


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _directories(parent: Path, pattern: str) -> list[Path]:
    try:
        found = list(parent.glob(pattern))
    except OSError:
        return []
    return sorted(found, key=lambda path: [(len(part), part) for part in path.parts])


def _numbered(directory: Path, pattern: str) -> Iterator[tuple[Path, int]]:
    try:
        paths = sorted(directory.iterdir())
    except OSError:
        return
    for path in paths:
        if matched := re.fullmatch(pattern, path.name):
            yield path, int(matched[1])


def _text(path: Path) -> str | None:
    try:
        # Device-tree strings end in NUL.
        return path.read_bytes()[:256].decode("utf-8", "replace").strip("\0 \n\t") or None
    except OSError:
        return None


def _number(path: Path, scale: float) -> float | None:
    text = _text(path)
    try:
        return None if text is None else int(text) * scale
    except ValueError:
        return None
