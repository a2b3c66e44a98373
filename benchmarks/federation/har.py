"""HAR by subject: what each encoding of the updates costs and reaches, beside training in the hub alone.

A network that one subject has trained goes to 20 devices, a subject each; 20 rounds. `hub alone` is the baseline: the
windows of which the weak start is unsure are uploaded once, and the hub trains on them, true labels given, by the same
loop and for as many passes. `both` is a series with `include_hub`: the hub votes as one more device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from benchmarks.federation.bench import Bench, kilobytes, percent
from benchmarks.federation.fleet import Fleet, Manner, Run, run_fleet
from benchmarks.federation.learner import Labelled, learner_of
from benchmarks.federation.sets import Subjects, har, joined
from benchmarks.harness import print_table
from cloud_hub.federation.settings import SeriesSettings, schedule_of
from edge_cascade.manifest import Wire
from edge_cascade.scores import SCORE_COLUMN, head_of_logits
from edge_cascade.tensors import encode_tensor
from edge_cascade.training import Schedule, train
from edge_cascade.weights import Weights

SEEDS: Final = 5
ROUNDS: Final = 20
WEAK_START: Final = Schedule(epochs=40, batch_size=8, learning_rate=0.01, momentum=0.9)
MAX_MARGIN: Final = 0.05
"""The gate of the table: at the last exit a score (margin) above this is escalated."""

_WIRE: Final = Wire("int8", scale=None)
_ENVELOPE_BYTES: Final = (
    109  # of a case of its own beside its tensor: FACTS of the transport, docs/protocol.md
)


@dataclass(frozen=True, slots=True)
class Arm:
    """One row: a series, or the baseline."""

    name: str
    settings: SeriesSettings
    manner: Manner = Manner()  # noqa: RUF009 - frozen
    is_hub_alone: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """An arm over its seeds."""

    name: str
    start: tuple[float, ...]
    final: tuple[float, ...]
    settled: tuple[float, ...]
    up_bytes: float
    down_bytes: float
    curve: tuple[float, ...]
    plain_bytes: float
    """Of the weights at four bytes a number, as other frameworks send them."""
    uploaded_bytes: float
    """Of cases, a device, once."""


def series(**changes: Any) -> SeriesSettings:
    """What all runs on HAR have in common; chosen on seeds from 100 on."""
    common: dict[str, Any] = {
        "rounds": ROUNDS,
        "strategy": "fedavgm",
        "server_momentum": 0.6,
        "epochs": 2,
        "batch_size": 8,
        "learning_rate": 0.01,
        "momentum": 0.9,
        "min_examples": 1,
        "encoding": "fp32",
    }
    return SeriesSettings(**(common | changes))


def hub_series(**changes: Any) -> SeriesSettings:
    """How the hub trains alone: what was best for it on seeds from 100 on."""
    return series(**({"batch_size": 32, "learning_rate": 0.001} | changes))


def arms(rounds: int) -> tuple[Arm, ...]:
    """The rows of the table."""
    return (
        Arm("fp32", series(rounds=rounds)),
        Arm("int8", series(rounds=rounds, encoding="int8")),
        Arm("sign + error feedback", series(rounds=rounds, encoding="sign")),
        Arm("sign without", series(rounds=rounds, encoding="sign"), Manner(forgets=True)),
        Arm("top 1 % + error feedback", series(rounds=rounds, encoding="topk")),
        Arm("hub alone", hub_series(rounds=rounds), is_hub_alone=True),
        Arm("both, int8", series(rounds=rounds, encoding="int8", include_hub=True)),
    )


def run(bench: Bench) -> dict[str, Any]:
    """Measure and print."""
    chosen = arms(bench.some(ROUNDS, 2))
    seeds = bench.seeds(SEEDS)
    jobs = [(one, (bench.data, arm, seed)) for arm in chosen for seed in seeds]
    results = bench.run("har", jobs)
    plain_bytes = 4.0 * har(bench.data).network.parameter_count
    rows = [
        _row(arm, results[index * len(seeds) : (index + 1) * len(seeds)], plain_bytes)
        for index, arm in enumerate(chosen)
    ]
    _print(rows, len(seeds))
    return {"rows": msgspec.to_builtins(rows)}


def one(data: Path | None, arm: Arm, seed: int) -> tuple[Run, float]:
    """One seed of one arm, and the bytes of cases that a device uploads for it."""
    subjects = har(data)
    fleet = fleet_of(subjects, seed)
    unsure = [device.rows(is_unsure(subjects, fleet.start, device)) for device in subjects.devices]
    uploaded_bytes = float(np.mean([case_bytes(part) for part in unsure]))
    if arm.is_hub_alone:
        return _hub_alone(fleet, joined(unsure), arm.settings, seed), uploaded_bytes
    if not arm.settings.include_hub:
        return run_fleet(fleet, arm.settings, seed=seed, manner=arm.manner), 0.0
    fleet = Fleet(
        fleet.network,
        fleet.start,
        fleet.devices,
        fleet.test,
        uploaded=joined(unsure).examples(fleet.network.classes),
    )
    return run_fleet(fleet, arm.settings, seed=seed, manner=arm.manner), uploaded_bytes


def fleet_of(subjects: Subjects, seed: int) -> Fleet:
    """The fleet by subject."""
    devices = tuple(device.examples(subjects.network.classes) for device in subjects.devices)
    return Fleet(subjects.network, weak_start(subjects, seed), devices, subjects.test)


@cache
def weak_start(subjects: Subjects, seed: int) -> Weights:
    """What one subject has trained."""
    learner = learner_of(subjects.network)
    rng = np.random.default_rng((seed, 0))
    examples = subjects.weak.examples(subjects.network.classes)
    return train(learner.step, learner.fresh(rng), examples, WEAK_START, rng=rng).weights


def is_unsure(subjects: Subjects, weights: Weights, given: Labelled) -> np.ndarray:
    """Which samples `(n,)` the gate would escalate with these weights."""
    logits = learner_of(subjects.network).logits(weights, given.x)[-1]
    return np.asarray(head_of_logits(logits)[:, SCORE_COLUMN["margin"]] > MAX_MARGIN)


def case_bytes(cases: Labelled) -> int:
    """What samples take on the wire as int8, deflated, one by one."""
    return sum(len(encode_tensor(sample, _WIRE, deflate=True)) + _ENVELOPE_BYTES for sample in cases.x)


def _hub_alone(fleet: Fleet, uploaded: Labelled, settings: SeriesSettings, seed: int) -> Run:
    """As many passes over the uploaded cases as a device makes over its own."""
    learner = learner_of(fleet.network)
    rng = np.random.default_rng((seed, 5))
    weights: Weights = fleet.start
    accuracies = [learner.accuracy(weights, fleet.test)]
    examples = uploaded.examples(fleet.network.classes)
    for _ in range(settings.rounds):
        weights = train(learner.step, weights, examples, schedule_of(settings), rng=rng).weights
        accuracies.append(learner.accuracy(weights, fleet.test))
    return Run(tuple(accuracies), ())


def _row(arm: Arm, results: Sequence[tuple[Run, float]], plain_bytes: float) -> Row:
    runs = [run for run, _ in results]
    has_turns = not arm.is_hub_alone
    return Row(
        arm.name,
        tuple(run.accuracies[0] for run in runs),
        tuple(run.final for run in runs),
        tuple(run.settled for run in runs),
        float(np.mean([run.up_bytes for run in runs])) if has_turns else 0.0,
        float(np.mean([run.down_bytes for run in runs])) if has_turns else 0.0,
        tuple(float(value) for value in np.mean([run.accuracies for run in runs], axis=0)),
        plain_bytes,
        float(np.mean([uploaded for _, uploaded in results])),
    )


def _print(rows: Sequence[Row], seeds: int) -> None:
    full = rows[0].up_bytes
    print_table(
        f"HAR by subject: accuracy on the test part, percent, means of {seeds} seeds; weak start {percent(rows[0].start)}",
        (
            "",
            "last round",
            "mean of last 5",
            "to fp32, points",
            "up a device and round",
            "fewer than fp32",
            "than 4 bytes a number",
            "down",
            "cases, once",
        ),
        [
            (
                row.name,
                percent(row.final),
                percent(row.settled),
                f"{100 * (np.mean(row.final) - np.mean(rows[0].final)):+.2f}",
                kilobytes(row.up_bytes) if row.up_bytes else "-",
                f"{full / row.up_bytes:.1f}" if row.up_bytes else "-",
                f"{row.plain_bytes / row.up_bytes:.1f}" if row.up_bytes else "-",
                kilobytes(row.down_bytes) if row.up_bytes else "-",
                kilobytes(row.uploaded_bytes) if row.uploaded_bytes else "-",
            )
            for row in rows
        ],
    )
