"""Did the new bundle make boards sick? Compared with their own past and with boards left alone. No I/O.

For every board there are two windows: before it was offered the release and after it swapped; for boards of
the control group, the same two stretches of time. What counts is the *change* of each board, so that a slow
board is compared with itself, less the median change of the control group, so that a hot afternoon is
nobody's fault. Two ways to be worse:

- The middle of the boards moved: the median change exceeds what is tolerated by more than `sigmas` standard
  errors. Medians, with the spread from the median absolute deviation (Huber and Ronchetti 2009, sections 5.1
  and 6.4): one broken fan on either side moves nothing.
- Some boards fell out: more of them changed by an outlier's distance than among the controls, beyond chance.
  It is what a median cannot see.

Restarts are few and whole numbers: their rate is tested against the own past *and* against the control group
(the exact binomial test of two Poisson rates, Przyborowski and Wilenski 1940), each board counted for at most
`RESTARTS_A_BOARD`, for a board that restarts all day is one sick board.

These are tests at fixed levels, looked at again and again, not anytime-valid ones. The levels are set so far
out that hundreds of looks stay quiet (docs/benchmarks.md counts it). What is not reported is `Unknown`, never
fine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]

RESTARTS_A_BOARD: Final = 3
MIN_CONTROLS: Final = 5
"""Fewer boards than this say nothing about the day; then only the own past counts."""

_MAD_TO_SIGMA: Final = 1.4826
_MEDIAN_ERROR: Final = 1.2533
"""The standard error of a median over that of a mean: sqrt(pi / 2)."""

_OUTLIER_SIGMAS: Final = 6.0
_FALLEN_BY_CHANCE: Final = 0.02
"""Share of boards that fall out on any day."""


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


@dataclass(frozen=True, slots=True)
class HealthRules:
    """What is tolerated, and how sure a finding must be.

    Factors are of the board's own past; `max_error_rise` is a share of samples, 0..1. `level` is the chance
    at which restarts and fallen boards are called worse. A metric in `required` holds a wave back until
    `min_reported` (0..1) of the boards report it; any other only where boards stopped reporting it.
    """

    max_latency_factor: float = 1.2
    max_memory_factor: float = 1.2
    max_temp_rise_celsius: float = 5.0
    max_error_rise: float = 0.01
    max_restart_factor: float = 2.0
    sigmas: float = 4.0
    level: float = 1e-3
    min_reported: float = 0.8
    required: frozenset[Metric] = field(
        default=frozenset({Metric.ERRORS, Metric.RESTARTS, Metric.LATENCY, Metric.MEMORY})
    )

    def __post_init__(self) -> None:
        if min(self.max_latency_factor, self.max_memory_factor, self.max_restart_factor) < 1.0:
            raise ValueError("health: a factor below 1 would call every board worse")
        if min(self.max_temp_rise_celsius, self.max_error_rise, self.sigmas) <= 0.0:
            raise ValueError("health: max_temp_rise_celsius, max_error_rise and sigmas must be above 0")
        if not (0.0 < self.level < 1.0 and 0.0 < self.min_reported <= 1.0):
            raise ValueError("health: level or min_reported is not in 0..1")


@dataclass(frozen=True, slots=True)
class Fine:
    """No worse than tolerated. `change` in the metric's unit (see `Worse`), of so many boards."""

    metric: Metric
    change: float
    boards: int


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
    """Reported by `reported` of `expected` boards; `ceased` reported it before the swap and not after."""

    metric: Metric
    reported: int
    expected: int
    ceased: int
    holds_back: bool


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


@dataclass(frozen=True, slots=True)
class _Level:
    """A metric that has a level: `read` is on a scale on which changes are differences."""

    metric: Metric
    read: Callable[[Vitals], float | None]
    limit: Callable[[HealthRules], float]
    shown: Callable[[float], float]


def decide_health(treated: Sequence[Course], controls: Sequence[Course], rules: HealthRules) -> Health:
    """Compare the boards that swapped with those that did not."""
    findings = [_decide_level(level, treated, controls, rules) for level in _LEVELS]
    return Health((*findings, _decide_restarts(treated, controls, rules)))


def describe(finding: Finding) -> str:
    """One line for a person."""
    match finding:
        case Fine(metric, change, boards):
            return f"{metric} fine: {_shown(metric, change)} on {boards} boards"
        case Worse(metric, change, limit, boards, fallen):
            where = f"{boards} boards" if fallen is None else f"{fallen} of {boards} boards"
            return f"{metric} worse: {_shown(metric, change)} on {where}, limit {_shown(metric, limit)}"
        case Unknown(metric, reported, expected, ceased, _):
            gone = f", {ceased} stopped reporting it" if ceased else ""
            return f"{metric} unknown: reported by {reported} of {expected} boards{gone}"


def _shown(metric: Metric, change: float) -> str:
    if metric is Metric.TEMPERATURE:
        return f"{change:+.1f} C"
    return f"{change:+.2%}" if metric is Metric.ERRORS else f"x{change:.2f}"


def _error_share(vitals: Vitals) -> float | None:
    if vitals.errors is None or vitals.samples <= 0:
        return None
    return vitals.errors / vitals.samples


def _log(value: float | None) -> float | None:
    return math.log(value) if value is not None and 0.0 < value < math.inf else None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


_LEVELS: Final = (
    _Level(Metric.ERRORS, _error_share, lambda rules: rules.max_error_rise, float),
    _Level(
        Metric.LATENCY,
        lambda vitals: _log(vitals.latency_ms),
        lambda rules: math.log(rules.max_latency_factor),
        math.exp,
    ),
    _Level(
        Metric.MEMORY,
        lambda vitals: _log(vitals.memory_bytes),
        lambda rules: math.log(rules.max_memory_factor),
        math.exp,
    ),
    _Level(
        Metric.TEMPERATURE,
        lambda vitals: _finite(vitals.temp_celsius),
        lambda rules: rules.max_temp_rise_celsius,
        float,
    ),
)


def _decide_level(
    level: _Level, treated: Sequence[Course], controls: Sequence[Course], rules: HealthRules
) -> Finding:
    changes = _changes(level, treated)
    others = _changes(level, controls)
    tolerated = level.limit(rules)
    if unknown := _unknown(level.metric, level.read, treated, changes.size, rules):
        # Boards that fell silent may be the sick ones; but what the others say may already be enough.
        return _worse(level, changes, others, tolerated, rules) or unknown
    return _worse(level, changes, others, tolerated, rules) or Fine(
        level.metric, level.shown(_shift(changes, others)), changes.size
    )


def _worse(
    level: _Level, changes: Array, others: Array, tolerated: float, rules: HealthRules
) -> Worse | None:
    if not changes.size:
        return None
    shift = _shift(changes, others)
    limit = tolerated + rules.sigmas * _standard_error(changes, others, tolerated / rules.sigmas)
    if shift > limit:
        return Worse(level.metric, level.shown(shift), level.shown(limit), changes.size)
    if others.size < MIN_CONTROLS or changes.size < 2:
        return None
    far = float(np.median(others)) + tolerated + _OUTLIER_SIGMAS * _sigma(others)
    fallen = int((changes > far).sum())
    by_chance = max(_FALLEN_BY_CHANCE, (int((others > far).sum()) + 1) / (others.size + 1))
    if binomial_tail(fallen, changes.size, by_chance) <= rules.level:
        middle = float(np.median(changes[changes > far]))
        return Worse(level.metric, level.shown(middle), level.shown(far), changes.size, fallen)
    return None


def _changes(level: _Level, courses: Sequence[Course]) -> Array:
    changes = []
    for course in courses:
        if course.before is not None and course.after is not None:
            before, after = level.read(course.before), level.read(course.after)
            if before is not None and after is not None:
                changes.append(after - before)
    return np.array(changes, np.float64)


def _shift(changes: Array, others: Array) -> float:
    of_the_day = float(np.median(others)) if others.size >= MIN_CONTROLS else 0.0
    return float(np.median(changes)) - of_the_day


def _standard_error(changes: Array, others: Array, if_unknown: float) -> float:
    """Of the difference of the two medians; `if_unknown` where there are too few boards to know a spread."""
    sigmas = [_sigma(boards) for boards in (changes, others) if boards.size >= MIN_CONTROLS]
    if not sigmas:
        return if_unknown
    # The treated boards may spread more; a handful of them cannot show it.
    of_treated = max(sigmas)
    variance = of_treated**2 / changes.size
    if others.size >= MIN_CONTROLS:
        variance += _sigma(others) ** 2 / others.size
    return _MEDIAN_ERROR * math.sqrt(variance)


def _sigma(values: Array) -> float:
    return _MAD_TO_SIGMA * float(np.median(np.abs(values - np.median(values))))


def _decide_restarts(treated: Sequence[Course], controls: Sequence[Course], rules: HealthRules) -> Finding:
    count, hours, boards = _restarts([course.after for course in treated])
    references = [_restarts([course.before for course in treated])]
    of_controls = _restarts([course.after for course in controls])
    if of_controls[2] >= MIN_CONTROLS:
        references.append(of_controls)
    known = [(events, time) for events, time, _ in references if time > 0.0]
    if boards and hours > 0.0 and known:
        # Worse than the own past alone may be the day's fault, worse than the controls alone the boards'.
        chances = [
            _rate_chance(count, hours, events, time, rules.max_restart_factor) for events, time in known
        ]
        factor = min(_rate_factor(count, hours, events, time) for events, time in known)
        if max(chances) <= rules.level:
            return Worse(Metric.RESTARTS, factor, rules.max_restart_factor, boards)
    else:
        factor = 1.0
    unknown = _unknown(Metric.RESTARTS, lambda vitals: vitals.restarts, treated, boards, rules)
    return unknown or Fine(Metric.RESTARTS, factor, boards)


def _restarts(windows: Sequence[Vitals | None]) -> tuple[int, float, int]:
    """Restarts with the cap, hours, and how many boards said so."""
    told = [(each.restarts, each.running_s) for each in windows if each and each.restarts is not None]
    return (
        sum(min(restarts, RESTARTS_A_BOARD) for restarts, _ in told),
        sum(running_s for _, running_s in told) / 3600.0,
        len(told),
    )


def _rate_chance(count: int, hours: float, events: int, reference_hours: float, factor: float) -> float:
    """How likely so many, if the rate were `factor` times the reference's."""
    weighted = factor * hours
    return binomial_tail(count, count + events, weighted / (weighted + reference_hours))


def _rate_factor(count: int, hours: float, events: int, reference_hours: float) -> float:
    """The ratio of the rates, with half an event added to each so that it is a number."""
    return ((count + 0.5) / hours) / ((events + 0.5) / reference_hours)


def _unknown(
    metric: Metric,
    read: Callable[[Vitals], float | None],
    treated: Sequence[Course],
    reported: int,
    rules: HealthRules,
) -> Unknown | None:
    """None when enough boards report a metric."""
    ceased = sum(
        course.before is not None
        and read(course.before) is not None
        and (course.after is None or read(course.after) is None)
        for course in treated
    )
    is_enough = bool(treated) and reported >= rules.min_reported * len(treated)
    if is_enough:
        return None
    holds_back = metric in rules.required or ceased > (1.0 - rules.min_reported) * len(treated)
    return Unknown(metric, reported, len(treated), ceased, holds_back)


def binomial_tail(least: int, trials: int, chance: float) -> float:
    """How likely at least so many of `trials` are, each with `chance` (0..1, exclusive)."""
    if least <= 0:
        return 1.0
    if least > trials:
        return 0.0
    k = np.arange(1, trials + 1, dtype=np.float64)
    log_terms = np.concatenate([[0.0], np.cumsum(np.log((trials - k + 1.0) / k))])
    log_terms += np.arange(trials + 1) * math.log(chance)
    log_terms += np.arange(trials, -1, -1) * math.log1p(-chance)
    return math.exp(min(float(np.logaddexp.reduce(log_terms[least:])), 0.0))
