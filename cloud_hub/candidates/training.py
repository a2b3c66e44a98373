"""Training in the hub, on what was uploaded: by the loop and the graph that boards train with. No files.

This is the baseline that federation is compared with, and the hub's own vote in a round where a series asks
for one. Uploaded cases are not a fair sample of what the fleet sees: most were sent because a board was
unsure. The guard judges on a fair one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cloud_hub.candidates.outcome import Base, Refused, Waiting
from cloud_hub.core.federation.guard import (
    CannotJudge,
    GuardFigures,
    GuardRules,
    Kept,
    Worse,
    decide_guard,
    figures_of,
)
from cloud_hub.examples import LabelledCases
from cloud_hub.federation.evaluation import labels_of_exits
from edge_cascade.backends.onnx import OnnxTrainStep
from edge_cascade.bundle import Bundle
from edge_cascade.preprocess import normalise
from edge_cascade.training import Examples, Schedule, Trained, one_hot, train
from edge_cascade.weights import Weights

JUDGING_SHARE: Final = 0.3


def examples_of(bundle: Bundle, cases: LabelledCases, soft_share: float) -> Examples:
    """Cases as a train step takes them, each of the same weight.

    `soft_share` of a target are the full model's probabilities, the rest is its label; a person's label is
    taken whole.
    """
    targets = one_hot(cases.labels, len(bundle.graph.labels))
    soft = np.isfinite(cases.probabilities).all(axis=1)
    targets[soft] = (1.0 - soft_share) * targets[soft] + soft_share * cases.probabilities[soft]
    x = normalise(cases.x, bundle.graph.preprocess)
    return Examples(x, targets.astype(np.float32), np.ones(len(cases), np.float32))


def train_on_cases(
    bundle: Bundle,
    base: Weights,
    cases: LabelledCases,
    schedule: Schedule,
    *,
    soft_share: float,
    rng: np.random.Generator,
    on_batch: Callable[[], None] = lambda: None,
    threads: int = 1,
) -> Trained:
    """Train the network of a bundle from `base` on uploaded cases. `on_batch` is called before each step.

    Raises:
        TrainingError: without cases, or when loss or weights stop being finite.
        BackendError: when a step cannot be run.
    """
    assert bundle.train_step is not None, "see `base.base_of`"
    step = OnnxTrainStep(bundle.train_step, threads=threads)
    return train(step, base, examples_of(bundle, cases, soft_share), schedule, rng=rng, on_batch=on_batch)


@dataclass(frozen=True, slots=True)
class Guarded:
    """The trained weights are not worse than the base's."""

    figures: GuardFigures


def guard_training(
    base: Base, before: Weights, after: Weights, seen: LabelledCases, rules: GuardRules
) -> Guarded | Refused | Waiting:
    """Whether the trained weights may be kept, judged as a round is, on holdout cases.

    Raises:
        BackendError: when a stage does not run.
    """
    judgement = decide_guard(
        labels_of_exits(base.bundle, before, seen.x),
        labels_of_exits(base.bundle, after, seen.x),
        seen.labels,
        rules,
    )
    match judgement:
        case CannotJudge(has, needs):
            return Waiting(has, needs, "holdout cases for the guard")
        case Worse():
            return Refused(figures_of(judgement, len(seen)).says)
        case Kept():
            return Guarded(figures_of(judgement, len(seen)))


def window_of(ids: NDArray[np.int64], looked_at: int, *, min_samples: int) -> int:
    """Up to which id of the holdout the guard may look, where no series of rounds has said so.

    `ids` are all holdout cases', ascending. Three in ten judge and choose thresholds, and at least
    `min_samples`, seven certify: as a build divides its calibration data. What was looked at stays that.
    """
    wanted = max(min_samples, round(JUDGING_SHARE * len(ids)))
    seen = int(np.searchsorted(ids, looked_at, side="right"))
    if seen >= wanted or len(ids) == 0:
        return looked_at
    return int(ids[min(wanted, len(ids)) - 1])
