"""From the counters that boards report to the windows that health compares. No I/O, no clock.

A board reports its counters whole, again and again; they begin at 0 with each start of the daemon. What
happened in a stretch of time is the sum over its starts of how far each counter rose: from the first report
in the stretch for the start that was running then, from 0 for the starts that came in it: what crashes as
soon as it has swapped is heard of by its next start. In which order the reports of one start arrive changes
nothing, and one that is missing only shortens the stretch.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

import msgspec

from cloud_hub.core.rollout.findings import Course, Vitals

_RUNNING: Final = "edge_running_s"
_CRASHES: Final = "edge_crashes"
_MEMORY: Final = "edge_rss_bytes"
_TEMPERATURE: Final = "edge_celsius_milli"


class CounterRow(msgspec.Struct, frozen=True):
    """One report of a board: which start of the daemon, when the hub received it (seconds), its numbers."""

    boot: bytes
    received_s: float
    counters: Mapping[str, int]


class Stretch(msgspec.Struct, frozen=True):
    """A stretch of the hub's time in seconds, both ends included."""

    since_s: float
    until_s: float


def vitals_of(rows: Iterable[CounterRow], model: str, *, since_s: float = math.inf) -> Vitals | None:
    """What a board did in the time of these reports, as far as one model goes; None without any report.

    A start that came after `since_s`, by its own time, counts from 0, whichever is the first here.

    What no report names is None. A tally has no series before its first count: no failures where samples
    are reported are 0 failures.
    """
    reports = _starts_of(rows)
    if not reports:
        return None
    is_older = min(row.received_s - row.counters.get(_RUNNING, 0) for row in reports[0]) <= since_s
    starts = [[row.counters for row in start] for start in reports]
    # Where nothing was running before, the first start is one of those that came.
    starts = starts if is_older else [[], *starts]
    samples = _rise(starts, lambda counters: _sum_of(counters, f"edge_samples{{model={model},"))
    errors = _rise(starts, lambda counters: counters.get(f"edge_failed{{model={model}}}"))
    if errors is None and samples is not None:
        errors = 0
    count = _rise(starts, lambda counters: counters.get(f"edge_latency_count{{model={model}}}"))
    sum_us = _rise(starts, lambda counters: counters.get(f"edge_latency_sum_us{{model={model}}}"))
    every = [counters for start in starts for counters in start]
    memory = _median(every, _MEMORY)
    milli_celsius = _median(every, _TEMPERATURE)
    return Vitals(
        running_s=float(_rise(starts, lambda counters: counters.get(_RUNNING)) or 0),
        # Samples that failed may have no answer, and so be in no other counter.
        samples=max(samples or 0, errors or 0),
        errors=errors,
        restarts=_rise(starts, lambda counters: counters.get(_CRASHES)),
        latency_ms=sum_us / count / 1000.0 if sum_us is not None and count else None,
        memory_bytes=None if memory is None else round(memory),
        temp_celsius=None if milli_celsius is None else milli_celsius / 1000.0,
    )


def course_of(rows: Sequence[CounterRow], model: str, before: Stretch, after: Stretch) -> Course:
    """A board's windows: before it was offered a release and after it swapped, or the same of a control."""
    return Course(
        vitals_of(_within(rows, before), model, since_s=before.since_s),
        vitals_of(_within(rows, after), model, since_s=after.since_s),
    )


def _within(rows: Sequence[CounterRow], stretch: Stretch) -> list[CounterRow]:
    return [row for row in rows if stretch.since_s <= row.received_s <= stretch.until_s]


def _starts_of(rows: Iterable[CounterRow]) -> list[list[CounterRow]]:
    """The reports of each start, the start that was heard of first in front."""
    found: dict[bytes, list[CounterRow]] = {}
    for row in rows:
        found.setdefault(row.boot, []).append(row)
    return sorted(found.values(), key=lambda start: (min(row.received_s for row in start), start[0].boot))


def _rise(
    starts: Sequence[Sequence[Mapping[str, int]]], read: Callable[[Mapping[str, int]], int | None]
) -> int | None:
    """How far a counter rose; None when no report has it.

    A series that appears in the middle of a start began there with 0.
    """
    total: int | None = None
    for index, start in enumerate(starts):
        values = [read(counters) for counters in start]
        told = [value for value in values if value is not None]
        if told:
            is_whole = len(told) == len(values)
            total = (total or 0) + max(told) - (min(told) if index == 0 and is_whole else 0)
    return total


def _sum_of(counters: Mapping[str, int], prefix: str) -> int | None:
    found = [value for key, value in counters.items() if key.startswith(prefix)]
    return sum(found) if found else None


def _median(reports: Sequence[Mapping[str, int]], key: str) -> float | None:
    values = [counters[key] for counters in reports if counters.get(key, 0) > 0]
    return statistics.median(values) if values else None
