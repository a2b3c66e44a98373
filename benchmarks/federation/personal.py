"""Private heads: served never, always, or as a board judges them, on later samples of each board.

A fleet learns in rounds of everything. From the weights of these, the bundle, it goes on for as many rounds, once with
everything and once with private heads. Boards then answer their own later samples: with the bundle's heads, with their own,
and as `edge_daemon.core.personal` has it, which knows the truth of samples that the gate of whoever answers is unsure of and of
one in a hundred. This on two bodies: that of the bundle, which is what a board has until the next release, and that of the
private rounds, which is the next release.

Digits in shards of two labels, 20 boards: a board's later samples are those of the test part with its labels. HAR by
subject: of each activity the first half trains, the second is later (windows overlap, so they are not mixed). Later samples are
few and stand in for a stream: it is drawn from them with replacement, each draw a scene of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from benchmarks.federation.bench import Bench, percent
from benchmarks.federation.fleet import FleetRun
from benchmarks.federation.har import MAX_MARGIN, series, weak_start
from benchmarks.federation.learner import Labelled, Learner, learner_of
from benchmarks.federation.sets import DEVICES, digits, har, spread_in_shards
from benchmarks.harness import print_table
from cloud_hub.builder.networks.network import Network
from cloud_hub.federation.settings import SeriesSettings
from edge_cascade.scores import SCORE_COLUMN, head_of_logits
from edge_cascade.training import Examples
from edge_cascade.weights import Weights
from edge_daemon.core.personal import Standing, next_standing

SEEDS: Final = 3
STREAM: Final = 1000
"""Samples that each board answers."""
AUDITED: Final = 0.01
BODIES: Final = ("the bundle's", "of the private rounds")


@dataclass(frozen=True, slots=True, eq=False)
class Boards:
    """A fleet of boards: what each learns from, what it sees later, and the weights that the first rounds begin with."""

    network: Network
    start: Weights
    known: tuple[Labelled, ...]
    later: tuple[Labelled, ...]


@dataclass(frozen=True, slots=True)
class Served:
    """On one body, over a fleet. Accuracies are of all boards' streams; counts are of boards.

    `worse`: boards whose own heads answer less well than the bundle's; `worse_served`: those that ever served them.
    `after`: samples until heads were first served, over boards that served them, NaN without any.
    """

    shared: float
    always: float
    judged: float
    served: int
    worse: int
    worse_served: int
    after: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """One seed. `everything`: accuracy after as many rounds of everything."""

    everything: float
    bodies: tuple[Served, ...]


def run(bench: Bench) -> dict[str, Any]:
    """Measure and print."""
    seeds, figures = bench.seeds(SEEDS), {}
    for what in ("digits", "har"):
        settings = settings_of(bench, what)
        results: list[Outcome] = bench.run(
            what, [(one, (bench.data, what, settings, seed)) for seed in seeds]
        )
        _print(what, results)
        figures[what] = msgspec.to_builtins(results)
    return figures


def settings_of(bench: Bench, what: str) -> SeriesSettings:
    """Those of the parts `digits` and `har`."""
    if what == "har":
        return series(rounds=bench.some(10, 1))
    return SeriesSettings(
        rounds=bench.some(40, 1),
        cohort=DEVICES // 5,
        sleeper_share=0.0,
        strategy="fedavg",
        epochs=5,
        batch_size=10,
        learning_rate=0.1,
        momentum=0.0,
        min_examples=1,
        encoding="fp32",
    )


def one(data: Path | None, what: str, settings: SeriesSettings, seed: int) -> Outcome:
    """One seed of one set."""
    boards = _har_boards(data, seed) if what == "har" else _digit_boards(data, seed)
    learner = learner_of(boards.network)
    examples = [each.examples(boards.network.classes) for each in boards.known]
    bundle = _after_rounds(boards.network, boards.start, examples, settings, seed).weights
    everything = _after_rounds(boards.network, bundle, examples, settings, seed).weights
    private = msgspec.structs.replace(settings, private_heads=True)
    own = _after_rounds(boards.network, bundle, examples, private, seed)
    rng = np.random.default_rng((seed, 20))
    streams = [rng.integers(len(later), size=STREAM) for later in boards.later]
    right = [
        learner.labels(everything, later.x)[-1][stream] == later.y[stream]
        for later, stream in zip(boards.later, streams, strict=True)
    ]
    heads = [own.heads(index) for index in range(len(examples))]
    return Outcome(
        float(np.mean(right)),
        tuple(_serve(learner, body, heads, boards.later, streams, rng) for body in (bundle, own.weights)),
    )


def _after_rounds(
    network: Network, start: Weights, examples: list[Examples], settings: SeriesSettings, seed: int
) -> FleetRun:
    run_ = FleetRun(network, start, len(examples), settings, seed=seed)
    for _ in range(settings.rounds):
        run_.turn(examples)
    return run_


def _serve(
    learner: Learner,
    body: Weights,
    heads: list[Weights],
    later: tuple[Labelled, ...],
    streams: list[NDArray[np.int64]],
    rng: np.random.Generator,
) -> Served:
    """All boards, each with its own heads on this body. Boards that were never asked have none and are as they were."""
    traces = [
        _trace(learner, body, {**body, **own}, part.rows(stream), rng)
        for own, part, stream in zip(heads, later, streams, strict=True)
    ]
    worse = [trace for trace in traces if trace.always < trace.shared]
    first = [trace.first for trace in traces if trace.first is not None]
    return Served(
        float(np.mean([trace.shared for trace in traces])),
        float(np.mean([trace.always for trace in traces])),
        float(np.mean([trace.judged for trace in traces])),
        len(first),
        len(worse),
        sum(trace.first is not None for trace in worse),
        float(np.mean(first)) if first else float("nan"),
    )


@dataclass(frozen=True, slots=True)
class _Trace:
    """One board: accuracies over its stream, and when its own heads first answered."""

    shared: float
    always: float
    judged: float
    first: int | None


def _trace(
    learner: Learner, shared: Weights, own: Weights, stream: Labelled, rng: np.random.Generator
) -> _Trace:
    right, unsure = [], []
    for weights in (shared, own):
        logits = learner.logits(weights, stream.x)[-1]
        right.append(logits.argmax(axis=1) == stream.y)
        unsure.append(head_of_logits(logits)[:, SCORE_COLUMN["margin"]] > MAX_MARGIN)
    audited = rng.random(len(stream)) < AUDITED
    standing, first = Standing(), None
    answered = []
    for number in range(len(stream)):
        serves = int(standing.is_preferred)
        answered.append(right[serves][number])
        if (unsure[serves][number] or audited[number]) and right[0][number] != right[1][number]:
            standing = next_standing(standing, is_won=bool(right[1][number]))
            if first is None and standing.is_preferred:
                first = number
    return _Trace(float(right[0].mean()), float(right[1].mean()), float(np.mean(answered)), first)


def _digit_boards(data: Path | None, seed: int) -> Boards:
    whole = digits(tiny=data is None)
    parts = spread_in_shards(whole.train, DEVICES, np.random.default_rng((seed, 0)))
    later = tuple(whole.test.rows(np.isin(whole.test.y, np.unique(part.y))) for part in parts)
    start = learner_of(whole.network).fresh(np.random.default_rng((seed, 7)))
    return Boards(whole.network, start, parts, later)


def _har_boards(data: Path | None, seed: int) -> Boards:
    subjects = har(data)
    known, later = [], []
    for device in subjects.devices:
        is_known = np.zeros(len(device), bool)
        for label in np.unique(device.y):
            rows = np.flatnonzero(device.y == label)
            is_known[rows[: (len(rows) + 1) // 2]] = True
        known.append(device.rows(is_known))
        later.append(device.rows(~is_known))
    return Boards(subjects.network, weak_start(subjects, seed), tuple(known), tuple(later))


def _print(what: str, results: list[Outcome]) -> None:
    rows: list[tuple[str, ...]] = [
        ("as many rounds of everything", percent([each.everything for each in results]), *[""] * 5)
    ]
    for index, name in enumerate(BODIES):
        served = [each.bodies[index] for each in results]
        first = [each.after for each in served if not np.isnan(each.after)]
        rows.append(
            (
                f"body {name}",
                percent([each.shared for each in served]),
                percent([each.always for each in served]),
                percent([each.judged for each in served]),
                " / ".join(str(each.served) for each in served),
                " / ".join(f"{each.worse_served} of {each.worse}" for each in served),
                f"{np.mean(first):.0f}" if first else "-",
            )
        )
    print_table(
        f"{what}: boards' later samples, percent right, means of {len(results)} seeds",
        (
            "",
            "the bundle's heads",
            "own, always",
            "own, as judged",
            "boards that served own, by seed",
            "of those whose own are worse",
            "after samples",
        ),
        rows,
    )
