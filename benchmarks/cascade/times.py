"""Time of the ladder beside the same network run whole, on the same samples, in the same run.

Both are compared at one precision: the ladder of fp32 stages with the whole network in fp32, that of int8
stages with the whole in int8. `tight`: calls follow each other at once. `paced`: they come 20 ms apart, as from
a sensor, and find cold caches. The ladder is given the sensor's reading, the whole a sample that is normalised
already. Ratios are taken within a round: whatever else the machine does happens to both.

A ladder's time is the mean over samples of the median of the exit where each leaves: one median of all would be
that of one exit, and a mean of all would be whatever else the machine did.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from statistics import mean, median
from typing import Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.cascade.plain import plain_network
from edge_cascade.backends.onnx import open_whole_model
from edge_cascade.bundle import Bundle
from edge_cascade.ladder import Ladder
from edge_cascade.policy import Plan, Precision
from edge_cascade.preprocess import normalise
from edge_cascade.timing import Case, Stopwatch, Timing, collector_off, measure_paced, measure_tight
from edge_daemon.models import open_stage

Floats = NDArray[np.float32]
Run = Callable[[Floats], object]
Runner = tuple[Precision, int]
"""A precision and how many rungs are climbed; none stands for the whole network."""
Microseconds = dict[Precision, tuple[float, float]]
"""Of the ladder and of the whole network, a sample, in one round."""

SAMPLES: Final = 500
ROUNDS: Final = 9
GAP_S: Final = 0.02
WHOLE: Final = 0


@dataclass(frozen=True, slots=True)
class Pair:
    """Microseconds a sample, medians over the rounds; `ratio` is ladder / whole within a round.

    `lowest` and `highest` are the rounds' extremes of it.
    """

    ladder_us: float
    whole_us: float
    ratio: float
    lowest: float
    highest: float


@dataclass(frozen=True, slots=True)
class Times:
    """By precision, for those of which the bundle has a plan."""

    tight: Mapping[Precision, Pair]
    paced: Mapping[Precision, Pair]


@dataclass(frozen=True, slots=True)
class Rival:
    """A ladder at its plan's chosen point, and the same network in one session."""

    ladder: Ladder
    whole: Run


@dataclass(frozen=True, slots=True)
class Race:
    """What is timed: each ladder at each of its exits, each whole network; and how far each sample climbs."""

    cases: Sequence[Case[Runner]]
    climbed: Mapping[Precision, Sequence[int]]


def measure_times(bundle: Bundle, x: Floats, *, seconds: float = 20.0) -> Times:
    """Both ways of running, for about `seconds` each.

    `x` `(n, *input_shape)` are samples in the sensor's unit, of which the first 500 are used.
    """
    rivals = {
        precision: Rival(Ladder(bundle, plan, open_stage), open_whole_model(plain_network(bundle, precision)))
        for precision, plan in _plans(bundle).items()
    }
    race = _race_of(rivals, list(x[:SAMPLES]), normalise(x[:SAMPLES], bundle.graph.preprocess))
    share, watch = seconds / ROUNDS, Stopwatch()
    with collector_off():
        tight = [_round(race, measure_tight(race.cases, share, watch)) for _ in range(ROUNDS)]
        paced = [_round(race, measure_paced(race.cases, GAP_S, share, watch)) for _ in range(ROUNDS)]
    return Times(_pairs(tight), _pairs(paced))


def _plans(bundle: Bundle) -> dict[Precision, Plan]:
    """The plans that stay at one precision."""
    found: dict[Precision, Plan] = {}
    for plan in bundle.weights.plans:
        precisions = {rung.precision for rung in plan.rungs}
        if len(precisions) == 1:
            found.setdefault(precisions.pop(), plan)
    return found


def _race_of(rivals: Mapping[Precision, Rival], samples: Sequence[Floats], normalised: Floats) -> Race:
    whole = [normalised[row : row + 1] for row in range(len(samples))]
    cases: list[Case[Runner]] = []
    climbed: dict[Precision, list[int]] = {}
    for precision, rival in rivals.items():
        climbed[precision] = [len(rival.ladder.climb(sample).exits) for sample in samples]
        for rungs in sorted(set(climbed[precision])):
            leaving = [
                sample for sample, so_far in zip(samples, climbed[precision], strict=True) if so_far == rungs
            ]
            cases.append(Case((precision, rungs), _in_turn(rival.ladder.climb, leaving)))
        cases.append(Case((precision, WHOLE), _in_turn(rival.whole, whole)))
    return Race(cases, climbed)


def _in_turn(run: Run, samples: Sequence[Floats]) -> Callable[[], object]:
    """A call that runs the next sample."""
    turns = cycle(samples)
    return lambda: run(next(turns))


def _round(race: Race, timings: Mapping[Runner, Timing]) -> Microseconds:
    return {
        precision: (
            mean(timings[precision, rungs].p50_us for rungs in climbed),
            timings[precision, WHOLE].p50_us,
        )
        for precision, climbed in race.climbed.items()
    }


def _pairs(rounds: Sequence[Microseconds]) -> dict[Precision, Pair]:
    pairs = {}
    for precision in rounds[0]:
        ladder_us, whole_us = zip(*(taken[precision] for taken in rounds), strict=True)
        ratios = [ladder / whole for ladder, whole in zip(ladder_us, whole_us, strict=True)]
        pairs[precision] = Pair(median(ladder_us), median(whole_us), median(ratios), min(ratios), max(ratios))
    return pairs
