"""Time of the ladder beside the same network run whole, on the same samples, in the same run.

Both are compared at one precision: the ladder of fp32 stages with the whole network in fp32, that of int8
stages with the whole in int8. `tight`: calls follow each other at once. `paced`: they come 20 ms apart, as from
a sensor, and find cold caches. The ladder is given the sensor's reading, the whole a sample that is normalised
already. Ratios are taken within a round: whatever else the machine does happens to both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from statistics import median
from typing import Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.cascade.plain import plain_network
from edge_cascade.backends.onnx import open_whole_model
from edge_cascade.bundle import Bundle
from edge_cascade.ladder import Ladder
from edge_cascade.policy import Plan, Precision
from edge_cascade.preprocess import normalise
from edge_cascade.timing import Case, Stopwatch, collector_off, measure_paced, measure_tight
from edge_daemon.models import open_stage

Floats = NDArray[np.float32]
Run = Callable[[Floats], object]
Microseconds = dict[Precision, tuple[float, float]]
"""Of the ladder and of the whole network, a sample, in one round."""

SAMPLES: Final = 500
ROUNDS: Final = 9
GAP_S: Final = 0.02

# So many samples are one tight call: which exit answers differs between them, and the mean is what counts.
_BATCH: Final = 50


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


def measure_times(bundle: Bundle, x: Floats, *, seconds: float = 20.0) -> Times:
    """Both ways of running, for about `seconds` each.

    `x` `(n, *input_shape)` are samples in the sensor's unit, of which the first 500 are used.
    """
    rivals = {
        precision: Rival(Ladder(bundle, plan, open_stage), open_whole_model(plain_network(bundle, precision)))
        for precision, plan in _plans(bundle).items()
    }
    samples = list(x[:SAMPLES])
    normalised = normalise(x[:SAMPLES], bundle.graph.preprocess)
    whole = [normalised[row : row + 1] for row in range(len(samples))]
    share = seconds / ROUNDS
    with collector_off():
        tight = [_tight_round(rivals, samples, whole, share) for _ in range(ROUNDS)]
        paced = [_paced_round(rivals, samples, whole, share) for _ in range(ROUNDS)]
    return Times(_pairs(tight), _pairs(paced))


def _plans(bundle: Bundle) -> dict[Precision, Plan]:
    """The plans that stay at one precision."""
    found: dict[Precision, Plan] = {}
    for plan in bundle.weights.plans:
        precisions = {rung.precision for rung in plan.rungs}
        if len(precisions) == 1:
            found.setdefault(precisions.pop(), plan)
    return found


def _tight_round(
    rivals: Mapping[Precision, Rival], samples: Sequence[Floats], whole: Sequence[Floats], seconds: float
) -> Microseconds:
    cases = []
    for precision, rival in rivals.items():
        cases.append(Case((precision, "ladder"), _some(rival.ladder.climb, samples, _BATCH)))
        cases.append(Case((precision, "whole"), _some(rival.whole, whole, _BATCH)))
    timings = measure_tight(cases, seconds, Stopwatch())
    p50_us = {key: timing.p50_us / _BATCH for key, timing in timings.items()}
    return {precision: (p50_us[precision, "ladder"], p50_us[precision, "whole"]) for precision in rivals}


def _paced_round(
    rivals: Mapping[Precision, Rival], samples: Sequence[Floats], whole: Sequence[Floats], seconds: float
) -> Microseconds:
    """Medians exit by exit, weighted by how many samples climb that far: one median would be one exit's."""
    climbed = {
        precision: np.array([len(rival.ladder.climb(sample).exits) for sample in samples])
        for precision, rival in rivals.items()
    }
    cases = []
    for precision, rival in rivals.items():
        for rungs in np.unique(climbed[precision]):
            some = [samples[row] for row in np.flatnonzero(climbed[precision] == rungs).tolist()]
            cases.append(Case((precision, int(rungs)), _some(rival.ladder.climb, some, 1)))
        cases.append(Case((precision, 0), _some(rival.whole, whole, 1)))
    timings = measure_paced(cases, GAP_S, seconds, Stopwatch())
    return {
        precision: (
            float(np.mean([timings[precision, int(rungs)].p50_us for rungs in climbed[precision]])),
            timings[precision, 0].p50_us,
        )
        for precision in rivals
    }


def _some(run: Run, samples: Sequence[Floats], count: int) -> Callable[[], object]:
    """A call that runs the next `count` samples, one by one."""
    turns = cycle(samples)

    def run_some() -> None:
        for _ in range(count):
            run(next(turns))

    return run_some


def _pairs(rounds: Sequence[Microseconds]) -> dict[Precision, Pair]:
    pairs = {}
    for precision in rounds[0]:
        ladder_us, whole_us = zip(*(taken[precision] for taken in rounds), strict=True)
        ratios = [ladder / whole for ladder, whole in zip(ladder_us, whole_us, strict=True)]
        pairs[precision] = Pair(median(ladder_us), median(whole_us), median(ratios), min(ratios), max(ratios))
    return pairs
