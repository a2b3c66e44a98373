"""What the pipeline costs above the bare sessions, on the same stages of the same bundle.

Four cases, each doing the work of the one before it and more:

    bare        the prebound runs of exactly the rungs that are climbed, nothing else
    climb       `Ladder.climb`: normalising, the gate after each exit
    pipeline    `Pipeline.process` and the answer's JSON; the case for the hub where one is made
    payload     the same from the bytes of an MQTT message: decoding (float32le), the shape

They take turns, in blocks of a few calls in the tight loop and call by call when paced, so that whatever else
the machine does happens to all of them. What is above bare is the median over the rounds of the difference
within one round; p50 and p99 are over all calls.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from benchmarks import bundle as benchmark_bundle
from benchmarks.harness import Spread, machine_line, parse_options, print_table, spread_of, write_json
from edge_cascade.bundle import Bundle, load_bundle
from edge_cascade.ladder import Ladder
from edge_cascade.policy import ACCEPT_ALL, ACCEPT_NONE
from edge_cascade.shipped import shipped_model_dir, shipped_models
from edge_daemon.audit import AuditCoin
from edge_daemon.clock import SystemClock
from edge_daemon.config import AuditConfig
from edge_daemon.inlet.decode import make_decoder, shape_sample
from edge_daemon.models import open_stage
from edge_daemon.pipeline import Pipeline, Sample

Array = NDArray[np.float64]
Call = Callable[[], object]

_BLOCK: Final = 25
_WARM_UP: Final = 500


@dataclass(frozen=True, slots=True)
class Setting:
    """One bundle whose gate is set so that it is known which rungs are climbed."""

    name: str
    bundle: Bundle
    max_score: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Pace:
    """How calls follow each other; None: at once."""

    rate_hz: float | None
    calls: int

    @property
    def name(self) -> str:
        """As the table says it."""
        return "tight" if self.rate_hz is None else f"{self.rate_hz:g}/s"


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one case: all calls, and how its rounds compare with the bare ones."""

    us: Spread
    above_bare_us: float
    ratio: float


def make_calls(setting: Setting) -> dict[str, Call]:
    """The four cases on one set of sessions and buffers."""
    plan = benchmark_bundle.with_thresholds(setting.bundle.plan(), setting.max_score)
    ladder = Ladder(setting.bundle, plan, open_stage)
    audit, clock = AuditConfig(), SystemClock()
    pipeline = Pipeline(
        setting.bundle,
        ladder,
        AuditCoin(audit.rate, audit.max_per_hour, random.Random(0)),
        boot=bytes(8),
        next_seq=count().__next__,
        now_s=clock.monotonic_s,
    )
    shape = setting.bundle.graph.input_shape
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    payload = x.astype("<f4").tobytes()
    sample = Sample("press-3", x, time.monotonic(), 0)
    decode = make_decoder("float32le")
    encode = msgspec.json.Encoder().encode

    climbed = len(ladder.climb(x).exits)
    # The ladder's own stages, called past everything of ours.
    bare = [(step.bound._run, step.bound._binding, step.bound._options) for step in ladder._steps[:climbed]]

    def call_bare() -> None:
        for run, binding, options in bare:
            run(binding, options)

    def call_payload() -> bytes:
        received_s = clock.monotonic_s()
        shaped = shape_sample(decode(payload), shape)
        return encode(pipeline.process(Sample("press-3", shaped, received_s, clock.wall_ms())).answer)

    return {
        "bare": call_bare,
        "climb": lambda: ladder.climb(x),
        "pipeline": lambda: encode(pipeline.process(sample).answer),
        "payload": call_payload,
    }


def measure(calls: Mapping[str, Call], pace: Pace) -> dict[str, Cost]:
    """Microseconds per call of every case."""
    for call in calls.values():
        for _ in range(_WARM_UP):
            call()
    if pace.rate_hz is None:
        taken_us = _tight(calls, pace.calls // _BLOCK)
    else:
        taken_us = _paced(calls, pace.calls, pace.rate_hz)
    each_round = {name: np.median(values, axis=1) for name, values in taken_us.items()}
    bare = each_round["bare"]
    return {
        name: Cost(
            spread_of(values.ravel()),
            float(np.median(each_round[name] - bare)),
            float(np.median(each_round[name] / bare)),
        )
        for name, values in taken_us.items()
    }


def _tight(calls: Mapping[str, Call], rounds: int) -> dict[str, Array]:
    """`(rounds, calls) float64` by case."""
    clock = time.perf_counter_ns
    taken_ns = {name: np.zeros((rounds, _BLOCK)) for name in calls}
    for row in range(rounds):
        for name, call in calls.items():
            call()  # the one that finds the caches as the case before left them
            for column in range(_BLOCK):
                start_ns = clock()
                call()
                taken_ns[name][row, column] = clock() - start_ns
    return {name: values / 1e3 for name, values in taken_ns.items()}


def _paced(calls: Mapping[str, Call], rounds: int, rate_hz: float) -> dict[str, Array]:
    """`(rounds, 1) float64` by case."""
    clock = time.perf_counter_ns
    taken_ns = {name: np.zeros((rounds, 1)) for name in calls}
    due_s = time.monotonic()
    for row in range(rounds):
        for name, call in calls.items():
            due_s += 1.0 / rate_hz
            time.sleep(max(due_s - time.monotonic(), 0.0))
            start_ns = clock()
            call()
            taken_ns[name][row] = clock() - start_ns
    return {name: values / 1e3 for name, values in taken_ns.items()}


def settings_of(name: str, bundle: Bundle) -> list[Setting]:
    """One exit; all exits with the last one accepting; all exits and the hub asked."""
    rungs = len(bundle.plan().rungs)
    climbing = (ACCEPT_NONE,) * (rungs - 1)
    return [
        Setting(f"{name}, one exit", bundle, (ACCEPT_ALL, *climbing)),
        Setting(f"{name}, all {rungs} exits", bundle, (*climbing, ACCEPT_ALL)),
        Setting(f"{name}, all {rungs} exits, escalated", bundle, (*climbing, ACCEPT_NONE)),
    ]


def _rows(setting: str, pace: str, costs: Mapping[str, Cost]) -> list[list[str]]:
    return [
        [
            f"{setting}, {pace}" if case == "bare" else "",
            case,
            f"{cost.us.p50:.1f}",
            f"{cost.us.p99:.1f}",
            "" if case == "bare" else f"{cost.above_bare_us:+.1f}",
            "" if case == "bare" else f"{cost.ratio:.2f}",
        ]
        for case, cost in costs.items()
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--calls", type=int, default=10_000, help="calls per case in the tight loop")
    parser.add_argument("--paced", type=int, default=300, help="calls per case when paced (0: none)")
    options = parse_options(parser)
    print(machine_line())
    with tempfile.TemporaryDirectory() as directory:
        own = load_bundle(benchmark_bundle.build(Path(directory)).bundle)
    shipped = [name for name in ("vibration", "digits") if name in shipped_models()]
    tight = Pace(None, options.calls)
    paced = [Pace(rate_hz, options.paced) for rate_hz in (50.0, 200.0) if options.paced]
    plan = [(setting, pace) for setting in settings_of("128 floats", own) for pace in (tight, *paced)]
    for name in shipped:
        found = load_bundle(shipped_model_dir(name) / "bundle")
        plan += [(setting, pace) for setting in settings_of(name, found) for pace in (tight, *paced[1:])]

    rows: list[list[str]] = []
    figures: list[dict[str, Any]] = []
    for setting, pace in plan:
        costs = measure(make_calls(setting), pace)
        rows += _rows(setting.name, pace.name, costs)
        figures.append({"setting": setting.name, "pace": pace.name, "cases": costs})
    print_table("Microseconds per sample", ["", "case", "p50", "p99", "above bare", "ratio"], rows)
    write_json(options.json, figures)


if __name__ == "__main__":
    main()
