"""What boards report of themselves, what is tolerated, and what was found. Values only; see `health`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TypeAlias

import msgspec


class Metric(StrEnum):
    """What is compared."""

    ERRORS = "errors"
    RESTARTS = "restarts"
    LATENCY = "latency"
    MEMORY = "memory"
    TEMPERATURE = "temperature"


class Vitals(msgspec.Struct, frozen=True):
    """One window of one board. None is what was not reported.

    `running_s`: how long the daemon ran in it. `errors`: samples that no stage answered, of `samples`.
    `restarts`: crashes, not stops that somebody asked for. `latency_ms` and `memory_bytes`: medians over the
    window, or any figure that is taken alike in every window.
    """

    running_s: float
    samples: int
    errors: int | None = None
    restarts: int | None = None
    latency_ms: float | None = None
    memory_bytes: int | None = None
    temp_celsius: float | None = None


class Course(msgspec.Struct, frozen=True):
    """A board before and after; None where no window was reported."""

    before: Vitals | None
    after: Vitals | None


class HealthRules(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is tolerated, and how sure a finding must be.

    Factors are of the board's own past; `max_error_rise` is a share of samples, 0..1. `level` is the chance
    at which restarts and fallen boards are called worse. A metric in `required` holds a wave back until it
    can be compared on `min_reported` (0..1) of the boards; any other only where boards stopped reporting it.
    Where boards report and there is nothing to compare with, it does so for `max_wait_s` after the soak.
    """

    max_latency_factor: float = 1.2
    max_memory_factor: float = 1.2
    max_temp_rise_celsius: float = 5.0
    max_error_rise: float = 0.01
    max_restart_factor: float = 2.0
    sigmas: float = 4.0
    level: float = 1e-3
    min_reported: float = 0.8
    max_wait_s: float = 3600.0
    required: frozenset[Metric] = frozenset({Metric.ERRORS, Metric.RESTARTS, Metric.LATENCY, Metric.MEMORY})

    def __post_init__(self) -> None:
        factors = (self.max_latency_factor, self.max_memory_factor, self.max_restart_factor)
        if not all(factor >= 1.0 for factor in factors):
            raise ValueError("health: a factor below 1 would call every board worse")
        if not all(each > 0.0 for each in (self.max_temp_rise_celsius, self.max_error_rise, self.sigmas)):
            raise ValueError("health: max_temp_rise_celsius, max_error_rise and sigmas must be above 0")
        if not 0.0 <= self.max_wait_s < math.inf:
            raise ValueError(f"health: max_wait_s {self.max_wait_s} is no time")
        if not (0.0 < self.level < 1.0 and 0.0 < self.min_reported <= 1.0):
            raise ValueError("health: level or min_reported is not in 0..1")


@dataclass(frozen=True, slots=True)
class Fine:
    """No worse than tolerated. `change` in the metric's unit (see `Worse`), of so many boards.

    `without_past` of them were compared with boards left alone, and with nothing else.
    """

    metric: Metric
    change: float
    boards: int
    without_past: int = 0


@dataclass(frozen=True, slots=True)
class Worse:
    """`change` beyond `limit`: a factor for latency, memory and restarts; degrees; a share of samples.

    `fallen` is None where the middle moved, else how many of `boards` fell out.
    """

    metric: Metric
    change: float
    limit: float
    boards: int
    fallen: int | None = None


@dataclass(frozen=True, slots=True)
class Unknown:
    """Comparable on `reported` of `expected` boards; `ceased` reported it before the swap and not after.

    `lapses`: boards do report, and waiting for longer brings nothing to compare with.
    """

    metric: Metric
    reported: int
    expected: int
    ceased: int
    holds_back: bool
    lapses: bool = False


Finding: TypeAlias = Fine | Worse | Unknown


@dataclass(frozen=True, slots=True)
class Health:
    """A finding per metric."""

    findings: tuple[Finding, ...]

    @property
    def worse(self) -> tuple[Worse, ...]:
        """What is reason to halt."""
        return tuple(each for each in self.findings if isinstance(each, Worse))

    @property
    def unknown(self) -> tuple[Unknown, ...]:
        """What is reason to wait."""
        return tuple(each for each in self.findings if isinstance(each, Unknown) and each.holds_back)

    @property
    def lapsing(self) -> tuple[Unknown, ...]:
        """What is reason to wait, but not for ever."""
        return tuple(each for each in self.unknown if each.lapses)

    def after_waiting(self) -> Health:
        """The same, where waiting longer for something to compare with is over."""
        lapsing = self.lapsing
        return Health(
            tuple(
                replace(each, holds_back=False) if isinstance(each, Unknown) and each in lapsing else each
                for each in self.findings
            )
        )


def describe(finding: Finding) -> str:
    """One line for a person."""
    match finding:
        case Fine(metric, change, boards, without_past):
            new = f", {without_past} of them beside boards left alone" if without_past else ""
            return f"{metric} fine: {_shown(metric, change)} on {boards} boards{new}"
        case Worse(metric, change, limit, boards, fallen):
            where = f"{boards} boards" if fallen is None else f"{fallen} of {boards} boards"
            return f"{metric} worse: {_shown(metric, change)} on {where}, limit {_shown(metric, limit)}"
        case Unknown(metric, reported, expected, ceased, holds_back, _):
            known = "unknown" if holds_back else "not judged"
            gone = f", {ceased} stopped reporting it" if ceased else ""
            return f"{metric} {known}: comparable on {reported} of {expected} boards{gone}"


def _shown(metric: Metric, change: float) -> str:
    if metric is Metric.TEMPERATURE:
        return f"{change:+.1f} C"
    return f"{change:+.2%}" if metric is Metric.ERRORS else f"x{change:.2f}"
