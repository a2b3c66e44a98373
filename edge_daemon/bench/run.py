"""Measures a bundle, or the stages of several bundles, on this board. Prints nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_cascade.bundle import Bundle, load_bundle
from edge_cascade.golden import golden_errors
from edge_cascade.ladder import Climb, Ladder, OpenStage
from edge_cascade.policy import Plan
from edge_cascade.profile import VERSION as PROFILE_VERSION
from edge_cascade.profile import Pace, Profile, StageCost
from edge_cascade.stage_timing import StageKey, runnable_cases, runnable_plans, stage_costs
from edge_cascade.timing import (
    Case,
    Stopwatch,
    Timing,
    collector_off,
    measure_paced,
    measure_rate,
    measure_tight,
)
from edge_daemon.bench.board import describe_machine, peak_resident_bytes, resident_bytes
from edge_daemon.bench.plans import PlanCost, price_plan, recommend_plan, with_exit_points
from edge_daemon.bench.report import (
    VERSION,
    BenchReport,
    GoldenCheck,
    Memory,
    PacedLadder,
    PrecisionGain,
    RungCost,
    Start,
)
from edge_daemon.bench.samples import Samples
from edge_daemon.bench.vitals import Stretch, Watch, rails_of, temperatures_of
from edge_daemon.config import Runtime

Floats = NDArray[np.float32]
Advance = Callable[[float], None]

PROFILE_GAP_S: Final = 0.02
IDLE_SHARE: Final = 0.05
CHUNK: Final = 64


@dataclass(frozen=True, slots=True)
class Setting:
    """How to measure: for how long, on what, at what rate; `advance` is told the seconds that passed."""

    seconds: float
    runtime: Runtime
    open_stage: OpenStage
    rate_hz: float = 1.0 / PROFILE_GAP_S
    advance: Advance = field(default=lambda _: None)


class ExitKey(NamedTuple):
    """The way to the exit of one rung of a plan."""

    plan: str
    rung: int


class _Opened(NamedTuple):
    bundle: Bundle
    ladder: Ladder
    start: Start
    before_bytes: int | None
    loaded_bytes: int | None


class _Found(NamedTuple):
    """Stages alone and the ways to every exit, by key; the ladder at its point; the board meanwhile."""

    tight: Mapping[StageKey | ExitKey, Timing]
    paced: Mapping[StageKey | ExitKey, Timing]
    samples_per_s: float
    latency: Timing
    idle: Stretch
    busy: Stretch


def profile_bundles(bundles: Sequence[Bundle], setting: Setting) -> Profile:
    """Every stage of every bundle at every precision, in a tight loop and paced.

    Raises:
        BackendError: when the runtime refuses a stage.
    """
    cases = [
        Case((index, case.key), case.run)
        for index, bundle in enumerate(bundles)
        for case in runnable_cases(bundle, setting.runtime, setting.open_stage)
    ]
    with collector_off():
        # Paced calls bring few figures a second, so they get most of the time.
        stopwatch = Stopwatch(watch=setting.advance)
        tight = measure_tight(cases, setting.seconds * 0.4, stopwatch)
        paced = measure_paced(cases, PROFILE_GAP_S, setting.seconds * 0.6, stopwatch)
    costs: list[StageCost] = []
    measured: list[tuple[Pace, dict[tuple[int, StageKey], Timing]]] = [("tight", tight), ("paced", paced)]
    for pace, timings in measured:
        for index, bundle in enumerate(bundles):
            own = [(key, timing) for (of, key), timing in timings.items() if of == index]
            costs += stage_costs(bundle, setting.runtime, pace, own)
    return Profile(PROFILE_VERSION, _now(), describe_machine(), PROFILE_GAP_S * 1e3, tuple(costs))


def bench_bundle(
    directory: Path,
    setting: Setting,
    *,
    plan: str | None,
    point: int | None,
    samples_of: Callable[[Bundle], Samples],
) -> BenchReport:
    """Everything about one bundle; see `report.BenchReport`.

    Raises:
        BundleError: a bundle, plan or point that is not there.
        BackendError: when the runtime refuses a stage or fails in it.
        DataError: samples that do not fit.
    """
    opened = _open(directory, setting.open_stage, plan, point)
    bundle, ladder = opened.bundle, opened.ladder
    samples = samples_of(bundle)
    golden = _check_golden(bundle, setting)
    climbs = _climb_all(ladder, samples.x)
    found = _measure(bundle, ladder, samples.x, setting)
    plans = _price_plans(bundle, ladder, climbs, samples.x, found=found, setting=setting)
    stages_tight, stages_paced = _stages_in(found.tight), _stages_in(found.paced)
    return BenchReport(
        version=VERSION,
        measured_at=_now(),
        machine=describe_machine(),
        runtime=setting.runtime,
        model=bundle.graph.model,
        bundle_id=bundle.bundle_id,
        plan=ladder.plan.name,
        point=ladder.point,
        samples=len(samples.x),
        samples_source=samples.source,
        golden=golden,
        start=opened.start,
        memory=Memory(opened.before_bytes, opened.loaded_bytes, peak_resident_bytes()),
        rungs=_rung_costs(ladder.plan, climbs, found),
        escalated_share=sum(not climb.accepted for climb in climbs) / len(climbs),
        samples_per_s=found.samples_per_s,
        paced=PacedLadder(setting.rate_hz, found.latency),
        stages=(
            *stage_costs(bundle, setting.runtime, "tight", stages_tight.items()),
            *stage_costs(bundle, setting.runtime, "paced", stages_paced.items()),
        ),
        gains=_gains(stages_tight, stages_paced),
        plans=plans,
        recommended=recommend_plan(plans[0], plans[1:]),
        temperatures=temperatures_of(found.idle, found.busy),
        rails=rails_of(found.idle, found.busy, found.samples_per_s),
    )


def _open(directory: Path, open_stage: OpenStage, plan: str | None, point: int | None) -> _Opened:
    before_bytes = resident_bytes()
    started_s = time.perf_counter()
    bundle = load_bundle(directory)
    read_s = time.perf_counter()
    ladder = Ladder(bundle, bundle.plan(plan), open_stage, point=point)
    opened_s = time.perf_counter()
    ladder.climb(bundle.golden_inputs[0])
    answered_s = time.perf_counter()
    start = Start((read_s - started_s) * 1e3, (opened_s - read_s) * 1e3, (answered_s - opened_s) * 1e3)
    return _Opened(bundle, ladder, start, before_bytes, resident_bytes())


def _check_golden(bundle: Bundle, setting: Setting) -> tuple[GoldenCheck, ...]:
    checks: list[GoldenCheck] = []
    for plan in runnable_plans(bundle, setting.runtime):
        for precision, error in golden_errors(bundle, plan, setting.open_stage).items():
            tolerance = bundle.weights.tolerance.get(precision, 0.0)
            deviation = error if math.isfinite(error) else None
            checks.append(GoldenCheck(plan.name, precision, deviation, tolerance, error <= tolerance))
    return tuple(checks)


def _climb_all(ladder: Ladder, x: Floats) -> list[Climb]:
    return [
        climb for first in range(0, len(x), CHUNK) for climb in ladder.climb_batch(x[first : first + CHUNK])
    ]


def _measure(bundle: Bundle, ladder: Ladder, x: Floats, setting: Setting) -> _Found:
    cases = _cases(bundle, x, setting)
    stopwatch = Stopwatch(watch=setting.advance)
    with collector_off():
        idle = _rest(setting)
        samples_per_s, busy = _measure_tight_ladder(ladder, x, setting)
        latency = _measure_paced_ladder(ladder, x, setting)
        tight = measure_tight(cases, setting.seconds * 0.2, stopwatch)
        paced = measure_paced(cases, 1.0 / setting.rate_hz, setting.seconds * 0.4, stopwatch)
    return _Found(tight, paced, samples_per_s, latency, idle, busy)


def _rest(setting: Setting) -> Stretch:
    """The board's sensors while nothing is asked of it."""
    watch = Watch()
    until_s = time.monotonic() + setting.seconds * IDLE_SHARE
    while (left_s := until_s - time.monotonic()) > 0:
        pause_s = min(left_s, 0.1)
        time.sleep(pause_s)
        setting.advance(pause_s)
        watch.look()
    return watch.finish()


def _measure_tight_ladder(ladder: Ladder, x: Floats, setting: Setting) -> tuple[float, Stretch]:
    watch = Watch()

    def passed(seconds: float) -> None:
        watch.look()
        setting.advance(seconds)

    following = cycle(x)
    rate = measure_rate(
        lambda: ladder.climb(next(following)), setting.seconds * 0.15, Stopwatch(watch=passed)
    )
    return rate, watch.finish()


def _measure_paced_ladder(ladder: Ladder, x: Floats, setting: Setting) -> Timing:
    following = cycle(x)
    case = Case("ladder", lambda: ladder.climb(next(following)))
    stopwatch = Stopwatch(watch=setting.advance)
    return measure_paced([case], 1.0 / setting.rate_hz, setting.seconds * 0.2, stopwatch)["ladder"]


def _cases(bundle: Bundle, x: Floats, setting: Setting) -> list[Case[StageKey | ExitKey]]:
    following = cycle(x)
    cases: list[Case[StageKey | ExitKey]] = [
        Case(case.key, case.run) for case in runnable_cases(bundle, setting.runtime, setting.open_stage)
    ]
    for plan in runnable_plans(bundle, setting.runtime):
        exits = Ladder(bundle, with_exit_points(plan), setting.open_stage)
        run = partial(_climb_next, exits, following)
        cases += [
            Case(ExitKey(plan.name, rung), run, prepare=partial(exits.set_point, rung))
            for rung in range(len(plan.rungs))
        ]
    return cases


def _climb_next(ladder: Ladder, following: Iterator[Floats]) -> None:
    ladder.climb(next(following))


def _stages_in(timings: Mapping[StageKey | ExitKey, Timing]) -> dict[StageKey, Timing]:
    return {key: timing for key, timing in timings.items() if isinstance(key, StageKey)}


def _rung_costs(plan: Plan, climbs: Sequence[Climb], found: _Found) -> tuple[RungCost, ...]:
    answered = [climb.answer.rung for climb in climbs if climb.accepted]
    return tuple(
        RungCost(
            rung=index,
            stage=rung.stage,
            precision=rung.precision,
            alone_tight=found.tight[StageKey(rung.stage, rung.precision)],
            alone_paced=found.paced[StageKey(rung.stage, rung.precision)],
            to_exit_tight=found.tight[ExitKey(plan.name, index)],
            to_exit_paced=found.paced[ExitKey(plan.name, index)],
            answered_share=answered.count(index) / len(climbs),
        )
        for index, rung in enumerate(plan.rungs)
    )


def _gains(tight: Mapping[StageKey, Timing], paced: Mapping[StageKey, Timing]) -> tuple[PrecisionGain, ...]:
    stages = sorted({key.stage for key in tight})
    pairs = [(stage, StageKey(stage, "int8"), StageKey(stage, "fp32")) for stage in stages]
    return tuple(
        PrecisionGain(stage, tight[int8].p50_us / tight[fp32].p50_us, paced[int8].p50_us / paced[fp32].p50_us)
        for stage, int8, fp32 in pairs
        if int8 in tight and fp32 in tight
    )


def _price_plans(
    bundle: Bundle, ladder: Ladder, climbs: Sequence[Climb], x: Floats, *, found: _Found, setting: Setting
) -> tuple[PlanCost, ...]:
    """The plan in use first, then the others at their chosen points."""
    costs = [_price_plan(bundle, ladder.plan, ladder.point, climbs, found)]
    for plan in runnable_plans(bundle, setting.runtime):
        if plan.name != ladder.plan.name:
            own = _climb_all(Ladder(bundle, plan, setting.open_stage), x)
            costs.append(_price_plan(bundle, plan, plan.chosen, own, found))
    return tuple(costs)


def _price_plan(bundle: Bundle, plan: Plan, point: int, climbs: Sequence[Climb], found: _Found) -> PlanCost:
    keys = [ExitKey(plan.name, rung) for rung in range(len(plan.rungs))]
    return price_plan(
        plan,
        point,
        climbs,
        tight_us=[found.tight[key].p50_us for key in keys],
        paced_us=[found.paced[key].p50_us for key in keys],
        certified_point=bundle.certified_point(plan),
    )


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
