"""The closed loop on HAR: a fleet learns from the verdicts of a full model that has seen nobody of it.

Of the 20 subjects of the fleet, drawn anew for each seed, eight and the weak start's train the full model, twelve are
devices. A device's windows come once, in as many parts as there are rounds: it classifies a part with the round's base, its
gate (fixed, the margin at the last exit) sends what it is unsure of, and only what came back as a verdict trains, here and in
all rounds after. `true labels` is the same with the truth in place of verdicts. `with own answers` adds what was not sent,
as soft targets at half the weight. `hub alone` trains on the same kind of uploads in the hub.

Uploads are counted on windows that nothing has trained on yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from benchmarks.federation.bench import Bench, percent
from benchmarks.federation.fleet import FleetRun
from benchmarks.federation.har import is_unsure, weak_start
from benchmarks.federation.learner import Labelled, Labels, learner_of
from benchmarks.federation.sets import Subjects, har, joined
from benchmarks.harness import print_table
from cloud_hub.federation.settings import SeriesSettings, schedule_of
from edge_cascade.scores import softmax
from edge_cascade.training import Examples, Schedule, one_hot, softened, train
from edge_cascade.weights import Weights

SEEDS: Final = 5
ROUNDS: Final = 24
TEACHERS: Final = 8
LAST_ROUNDS: Final = 6
"""So many are compared with what the weak start would send of everything."""

_TEACHER: Final = Schedule(epochs=30, batch_size=16, learning_rate=0.003, momentum=0.9)

ARMS: Final = (
    "true labels",
    "verdicts",
    "verdicts, with own answers",
    "hub alone, verdicts",
    "hub and fleet, verdicts",
    "hub and fleet, with own answers",
)


@dataclass(frozen=True, slots=True)
class Trace:
    """One seed: accuracy on the test part before the first round and after each; shares of fresh windows sent.

    `start_upload`: what the weak start would send of all windows.
    `answered`: accuracy of what the boards answer alone, `together`: with verdicts (or the truth) for what was sent,
    both over all rounds. `teacher`: the full model's accuracy on the devices' windows.
    """

    accuracies: tuple[float, ...]
    uploads: tuple[float, ...]
    start_upload: float
    answered: float
    together: float
    teacher: float


@dataclass(frozen=True, slots=True)
class Row:
    """An arm over its seeds, curves as means."""

    name: str
    final: tuple[float, ...]
    start_uploads: tuple[float, ...]
    last_uploads: tuple[float, ...]
    curve: tuple[float, ...]
    uploads: tuple[float, ...]
    answered: float
    together: float
    teacher: tuple[float, ...]


def run(bench: Bench) -> dict[str, Any]:
    """Measure and print."""
    seeds = bench.seeds(SEEDS)
    rounds = bench.some(ROUNDS, 2)
    results: list[Trace] = bench.run(
        "loop", [(one, (bench.data, arm, rounds, seed)) for arm in ARMS for seed in seeds]
    )
    rows = [
        _row(arm, results[index * len(seeds) : (index + 1) * len(seeds)]) for index, arm in enumerate(ARMS)
    ]
    _print(rows)
    return {"rows": msgspec.to_builtins(rows)}


def one(data: Path | None, arm: str, rounds: int, seed: int) -> Trace:
    """One seed of one arm."""
    loop = _Loop(har(data), arm, rounds, seed)
    for number in range(rounds):
        loop.turn(number)
    return loop.trace()


@dataclass(frozen=True, slots=True, eq=False)
class _Site:
    """Who is a device in this seed, and what the full model says of its windows."""

    devices: tuple[Labelled, ...]
    verdicts: tuple[Labels, ...]


class _Loop:
    """A fleet in the middle of its stream."""

    def __init__(self, subjects: Subjects, arm: str, rounds: int, seed: int) -> None:
        self._subjects, self._arm, self._rounds = subjects, arm, rounds
        self._classes = subjects.network.classes
        self._learner = learner_of(subjects.network)
        self._site = _site(subjects, seed)
        self._settings = _settings(rounds, include_hub=arm.startswith("hub and"))
        self._run = FleetRun(
            subjects.network,
            weak_start(subjects, seed),
            len(self._site.devices),
            self._settings,
            seed=seed,
        )
        self._hub: Weights = self._run.weights
        self._rng = np.random.default_rng((seed, 9))
        nothing = Examples(
            subjects.weak.x[:0], one_hot(subjects.weak.y[:0], self._classes), np.zeros(0, np.float32)
        )
        self._known = [nothing for _ in self._site.devices]
        self._sent = [nothing for _ in self._site.devices]
        self._accuracies = [self._learner.accuracy(self._weights, subjects.test)]
        everything = joined(self._site.devices)
        self._start_upload = float(is_unsure(subjects, self._weights, everything).mean())
        self._uploads: list[float] = []
        self._right: list[tuple[int, int, int, int]] = []

    @property
    def _weights(self) -> Weights:
        return self._hub if self._is_hub_alone else self._run.weights

    @property
    def _is_hub_alone(self) -> bool:
        return self._arm.startswith("hub alone")

    def turn(self, number: int) -> None:
        """Look at the next windows, learn from what is known by now."""
        sent = seen = 0
        for index, (device, verdicts) in enumerate(zip(self._site.devices, self._site.verdicts, strict=True)):
            rows = np.array_split(np.arange(len(device)), self._rounds)[number]
            unsure = self._look(index, device.rows(rows), verdicts[rows])
            sent, seen = sent + unsure, seen + len(rows)
        self._uploads.append(sent / seen)
        if self._is_hub_alone:
            examples = _together(self._sent)
            if len(examples):
                schedule = schedule_of(self._settings)
                self._hub = train(self._learner.step, self._hub, examples, schedule, rng=self._rng).weights
        else:
            self._run.turn(self._known, _together(self._sent))
        self._accuracies.append(self._learner.accuracy(self._weights, self._subjects.test))

    def _look(self, index: int, fresh: Labelled, verdicts: Labels) -> int:
        """Classify, send, learn what the answer is; how many were sent."""
        logits = self._learner.logits(self._weights, fresh.x)[-1]
        answers = logits.argmax(axis=1)
        unsure = is_unsure(self._subjects, self._weights, fresh)
        truth = fresh.y if self._arm == "true labels" else verdicts
        own = ~unsure
        kept = int((answers == fresh.y)[own].sum())
        self._right.append((kept, int(own.sum()), kept + int((truth == fresh.y)[unsure].sum()), len(fresh)))
        told = Examples(
            fresh.x[unsure], one_hot(truth[unsure], self._classes), np.ones(int(unsure.sum()), np.float32)
        )
        self._sent[index] = _together([self._sent[index], told])
        learned = [self._known[index], told]
        if self._arm.endswith("own answers"):
            probability = softmax(logits).max(axis=1)[own]
            weight = np.full(int(own.sum()), 0.5, np.float32)
            learned.append(Examples(fresh.x[own], softened(answers[own], probability, self._classes), weight))
        self._known[index] = _together(learned)
        return int(unsure.sum())

    def trace(self) -> Trace:
        """What was seen."""
        kept, answered, right, seen = np.sum(self._right, axis=0)
        agree = [
            float((verdicts == device.y).mean())
            for device, verdicts in zip(self._site.devices, self._site.verdicts, strict=True)
        ]
        return Trace(
            tuple(self._accuracies),
            tuple(self._uploads),
            self._start_upload,
            float(kept / max(answered, 1)),
            float(right / seen),
            float(np.mean(agree)),
        )


@cache
def _site(subjects: Subjects, seed: int) -> _Site:
    rng = np.random.default_rng((seed, 10))
    order = rng.permutation(len(subjects.devices))
    cut = TEACHERS * len(order) // 20
    seen = joined([subjects.weak, *(subjects.devices[index] for index in order[:cut])])
    teacher = learner_of(subjects.teacher)
    weights = train(
        teacher.step, teacher.fresh(rng), seen.examples(subjects.network.classes), _TEACHER, rng=rng
    ).weights
    # The file has a subject's windows activity by activity; a stream has them mixed.
    devices = tuple(
        subjects.devices[index].rows(rng.permutation(len(subjects.devices[index]))) for index in order[cut:]
    )
    return _Site(devices, tuple(teacher.labels(weights, device.x)[-1] for device in devices))


def _settings(rounds: int, *, include_hub: bool) -> SeriesSettings:
    return SeriesSettings(
        rounds=rounds,
        strategy="fedavgm",
        server_momentum=0.5,
        epochs=4,
        batch_size=8,
        learning_rate=0.005,
        momentum=0.9,
        min_examples=8,
        encoding="int8",
        include_hub=include_hub,
    )


def _together(parts: Sequence[Examples]) -> Examples:
    return Examples(
        np.concatenate([part.x for part in parts]),
        np.concatenate([part.targets for part in parts]),
        np.concatenate([part.weight for part in parts]),
    )


def _row(arm: str, traces: Sequence[Trace]) -> Row:
    return Row(
        arm,
        tuple(trace.accuracies[-1] for trace in traces),
        tuple(trace.start_upload for trace in traces),
        tuple(float(np.mean(trace.uploads[-LAST_ROUNDS:])) for trace in traces),
        tuple(float(value) for value in np.mean([trace.accuracies for trace in traces], axis=0)),
        tuple(float(value) for value in np.mean([trace.uploads for trace in traces], axis=0)),
        float(np.mean([trace.answered for trace in traces])),
        float(np.mean([trace.together for trace in traces])),
        tuple(trace.teacher for trace in traces),
    )


def _print(rows: Sequence[Row]) -> None:
    print_table(
        f"Closed loop on HAR, 12 devices: percent, {len(rows[0].final)} seeds; full model on the devices' windows "
        f"{percent(rows[0].teacher)}; start {percent(rows[0].curve[0])}",
        (
            "",
            "test, last round",
            "to true labels, points",
            "the start would send",
            f"sent in the last {LAST_ROUNDS}",
            "boards' own answers",
            "with verdicts",
        ),
        [
            (
                row.name,
                percent(row.final),
                f"{100 * (np.mean(row.final) - np.mean(rows[0].final)):+.1f}",
                percent(row.start_uploads),
                percent(row.last_uploads),
                percent(row.answered),
                percent(row.together),
            )
            for row in rows
        ],
    )
    rounds = len(rows[0].uploads)
    shown = [0, *range(3, rounds, 4)]
    print_table(
        "Accuracy on the test part after a round / share of its fresh windows sent, percent",
        ("", *(str(number + 1) for number in shown)),
        [
            (
                row.name,
                *(f"{100 * row.curve[number + 1]:.0f} / {100 * row.uploads[number]:.0f}" for number in shown),
            )
            for row in rows
        ],
    )
