"""Time of the ladder beside the same network run whole, on the same samples, in the same run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle

import numpy as np
from numpy.typing import NDArray

from benchmarks.cascade.plain import plain_network
from edge_cascade.backends.onnx import open_whole_model
from edge_cascade.bundle import Bundle
from edge_cascade.ladder import Ladder
from edge_cascade.policy import Plan
from edge_cascade.preprocess import normalise
from edge_cascade.timing import Case, Stopwatch, collector_off, measure_tight
from edge_daemon.models import open_stage

Floats = NDArray[np.float32]

SAMPLES = 500


@dataclass(frozen=True, slots=True)
class Times:
    """Microseconds a sample: means over the same samples, taken in turns."""

    plan: str
    ladder_us: float
    whole_us: float
    whole_int8_us: float


def measure_times(bundle: Bundle, plan: Plan, x: Floats, *, seconds: float = 20.0) -> Times:
    """`Ladder.climb` at the chosen point beside one session of the whole network, fp32 and int8."""
    ladder = Ladder(bundle, plan, open_stage)
    samples = x[:SAMPLES]
    normalised = normalise(samples, bundle.graph.preprocess)
    runs: dict[str, Callable[[], object]] = {"ladder": _one_by_one(ladder.climb, list(samples))}
    for precision in ("fp32", "int8"):
        run = open_whole_model(plain_network(bundle, precision))
        runs[precision] = _one_by_one(run, [normalised[row : row + 1] for row in range(len(samples))])
    cases = [Case(name, run) for name, run in runs.items()]
    with collector_off():
        timings = measure_tight(cases, seconds, Stopwatch())
    per_sample = {name: timing.p50_us / _BATCH for name, timing in timings.items()}
    return Times(plan.name, per_sample["ladder"], per_sample["fp32"], per_sample["int8"])


# So many samples are one call: which exit answers differs from sample to sample, and the mean is what counts.
_BATCH = 50


def _one_by_one(run: Callable[[Floats], object], samples: list[Floats]) -> Callable[[], object]:
    turns = cycle(samples)

    def climb_some() -> None:
        for _ in range(_BATCH):
            run(next(turns))

    return climb_some
