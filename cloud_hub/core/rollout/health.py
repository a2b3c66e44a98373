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

A board without a past (it is new, or its sensor was silent) is compared with boards left alone in its errors
and crashes. Not in time, memory and heat: new boards are often other boards, and their own trial has weighed
the new bundle against the old one. Where nothing can be compared the metric is `Unknown`, and waiting for
longer would bring nothing: it `lapses`. What a board stopped reporting, and crashes, never do.

These are tests at fixed levels, looked at again and again, not anytime-valid ones. The levels are set so far
out that hundreds of looks stay quiet (docs/benchmarks.md counts it). What is not reported is `Unknown`, never
fine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cloud_hub.core.rollout.findings import (
    Course,
    Finding,
    Fine,
    Health,
    HealthRules,
    Metric,
    Unknown,
    Vitals,
    Worse,
)

Array: TypeAlias = NDArray[np.float64]

RESTARTS_A_BOARD: Final = 3
SHORTEST_RUN_S: Final = 1.0
MIN_CONTROLS: Final = 5
"""Fewer boards than this say nothing about the day; then only the own past counts."""

_MAD_TO_SIGMA: Final = 1.4826
_MEDIAN_ERROR: Final = 1.2533
"""The standard error of a median over that of a mean: sqrt(pi / 2)."""

_OUTLIER_SIGMAS: Final = 6.0
_FALLEN_BY_CHANCE: Final = 0.02
"""Share of boards that fall out on any day."""


@dataclass(frozen=True, slots=True)
class _Level:
    """A metric that has a level: `read` is on a scale on which changes are differences.

    `is_common`: it is comparable from board to board, whatever they are made of.
    """

    metric: Metric
    read: Callable[[Vitals], float | None]
    limit: Callable[[HealthRules], float]
    shown: Callable[[float], float]
    is_common: bool = False


def decide_health(treated: Sequence[Course], controls: Sequence[Course], rules: HealthRules) -> Health:
    """Compare the boards that swapped with those that did not."""
    findings = [_decide_level(level, treated, controls, rules) for level in _LEVELS]
    return Health((*findings, _decide_restarts(treated, controls, rules)))


def _error_share(vitals: Vitals) -> float | None:
    if vitals.errors is None or vitals.samples <= 0:
        return None
    return vitals.errors / vitals.samples


def _log(value: float | None) -> float | None:
    return math.log(value) if value is not None and 0.0 < value < math.inf else None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


_LEVELS: Final = (
    _Level(Metric.ERRORS, _error_share, lambda rules: rules.max_error_rise, float, is_common=True),
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
    tolerated = level.limit(rules)
    changes, of_others = _changes(level, treated), _changes(level, controls)
    new, of_controls = _levels_of_new(level, treated), _levels(level, controls)
    if not level.is_common or of_controls.size < MIN_CONTROLS:
        new = new[:0]
    # Boards that fell silent may be the sick ones; but what the others say may already be enough.
    worse = _worse(level, changes, of_others, tolerated, rules) or _worse(
        level, new, of_controls, tolerated, rules
    )
    reported = changes.size + new.size
    if worse is not None:
        return worse
    if unknown := _unknown(level.metric, level.read, treated, reported, rules):
        return unknown
    shift = _shift(changes, of_others) if changes.size else _shift(new, of_controls)
    return Fine(level.metric, level.shown(shift), reported, new.size)


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


def _levels(level: _Level, courses: Sequence[Course]) -> Array:
    """What boards report after the swap, whether they have a past or not."""
    found = [None if course.after is None else level.read(course.after) for course in courses]
    return np.array([each for each in found if each is not None], np.float64)


def _levels_of_new(level: _Level, courses: Sequence[Course]) -> Array:
    """The same, of boards that have no past of it."""
    return _levels(
        level, [each for each in courses if each.before is None or level.read(each.before) is None]
    )


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
        factor, boards = 1.0, 0
    unknown = _unknown(Metric.RESTARTS, lambda vitals: vitals.restarts, treated, boards, rules)
    if unknown is not None:
        return replace(unknown, lapses=unknown.lapses and count == 0)
    return Fine(Metric.RESTARTS, factor, boards)


def _restarts(windows: Sequence[Vitals | None]) -> tuple[int, float, int]:
    """Restarts with the cap, hours, and how many boards said so."""
    told = [(each.restarts, each.running_s) for each in windows if each and each.restarts is not None]
    return (
        sum(min(restarts, RESTARTS_A_BOARD) for restarts, _ in told),
        # Who crashes at once has reported no time.
        sum(max(running_s, SHORTEST_RUN_S * restarts) for restarts, running_s in told) / 3600.0,
        len(told),
    )


def _rate_chance(count: int, hours: float, events: int, reference_hours: float, factor: float) -> float:
    """How likely so many, if the rate were `factor` times the reference's."""
    weighted = factor * hours
    return binomial_tail(count, count + events, weighted / (weighted + reference_hours))


def _rate_factor(count: int, hours: float, events: int, reference_hours: float) -> float:
    """The ratio of the rates, half an event added to each so that it is a number; 0 where nothing was."""
    if not count:
        return 0.0
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
    least, most_ceased = rules.min_reported * len(treated), (1.0 - rules.min_reported) * len(treated)
    if treated and reported >= least:
        return None
    heard = sum(course.after is not None for course in treated)
    is_required, have_ceased = metric in rules.required, ceased > most_ceased
    return Unknown(
        metric,
        reported,
        len(treated),
        ceased,
        holds_back=is_required or have_ceased,
        lapses=is_required and not have_ceased and bool(treated) and heard >= least,
    )


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
