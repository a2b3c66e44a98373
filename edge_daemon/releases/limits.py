"""When to download, how fast, and how long to wait after a failure. No I/O; time and chance are arguments."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Final

from edge_daemon.errors import ConfigError

FIRST_PAUSE_S: Final = 1.0
LONGEST_PAUSE_S: Final = 600.0
BURST_S: Final = 1.0
"""A limited download may use at once what it did not use in this time."""
_DAY_S: Final = 86400

_HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")


@dataclass(frozen=True, slots=True)
class Hours:
    """A stretch of every day in seconds after midnight; over midnight where it ends before it begins."""

    begin_s: int
    end_s: int


@dataclass(frozen=True, slots=True)
class Bucket:
    """A token bucket (RFC 2697 without colours): bytes that may pass now; below 0 some passed too early."""

    tokens: float = 0.0
    at_s: float = 0.0


def parse_hours(text: str) -> Hours:
    """Read `22:00-06:00`; equal ends mean the whole day.

    Raises:
        ConfigError: in one line.
    """
    found = _HOURS.fullmatch(text)
    if found is None:
        raise ConfigError(f"releases.hours: {text!r} is no stretch of a day such as '22:00-06:00'")
    begin_h, begin_m, end_h, end_m = (int(each) for each in found.groups())
    return Hours(begin_h * 3600 + begin_m * 60, end_h * 3600 + end_m * 60)


def next_opening_s(hours: Hours | None, day_s: float) -> float:
    """Seconds until the hours begin, 0 within them. `day_s` is what has passed since local midnight."""
    if hours is None or hours.begin_s == hours.end_s:
        return 0.0
    length_s = (hours.end_s - hours.begin_s) % _DAY_S
    since_s = (day_s - hours.begin_s) % _DAY_S
    return 0.0 if since_s < length_s else _DAY_S - since_s


def next_bucket(bucket: Bucket, size_bytes: int, *, now_s: float, bytes_per_s: float) -> tuple[Bucket, float]:
    """The bucket after so many bytes have passed, and how long to wait before more may; 0 is no limit."""
    if bytes_per_s <= 0:
        return bucket, 0.0
    filled = bucket.tokens + max(now_s - bucket.at_s, 0.0) * bytes_per_s
    tokens = min(filled, BURST_S * bytes_per_s) - size_bytes
    return Bucket(tokens, now_s), max(-tokens, 0.0) / bytes_per_s


def next_pause_s(failures: int, rng: random.Random) -> float:
    """Full jitter below a ceiling that doubles with every failure (AWS Architecture Blog, 2015)."""
    return rng.uniform(0.0, min(FIRST_PAUSE_S * 2.0 ** min(failures - 1, 30), LONGEST_PAUSE_S))
