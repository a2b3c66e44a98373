"""Finds temperatures, thresholds and operating points on held-out data. No I/O; stages are run by the caller.

The plan made here is naive: one threshold shared by all rungs, fitted to the calibration data and promising
nothing beyond it. That one threshold serves every rung is its limit (Jazbec et al. 2024, arXiv 2405.20915,
section 5), so early rungs stop following it where they would start to cost accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_cascade.policy import ACCEPT_ALL, ACCEPT_NONE, OperatingPoint, Plan, Rung
from edge_cascade.scores import LABEL, SCORE_COLUMN, ScoreName

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]

MAX_LOSS = 0.005
"""Accuracy below the full model's that the chosen point may cost on the calibration data."""

MAX_ACCEPT_SCORE = 0.99
"""No point but the last lets a rung accept a score above this."""

_SHARES = np.linspace(0.02, 0.98, 33)
_PREFERENCE: tuple[ScoreName, ...] = ("margin", "max_prob", "entropy")


@dataclass(frozen=True, slots=True)
class Outcomes:
    """What calibration saw: each rung's head `(rungs, n, 5)`, the full model's and the true labels `(n,)`."""

    heads: Floats
    full_labels: Labels
    labels: Labels

    @property
    def full_accuracy(self) -> float:
        """Share of samples that the full model gets right."""
        return float(np.mean(self.full_labels == self.labels))

    @property
    def rung_accuracy(self) -> tuple[float, ...]:
        """Share of samples that each rung alone gets right."""
        return tuple(float(np.mean(head[:, LABEL] == self.labels)) for head in self.heads)


def fit_temperature(logits: Floats, labels: Labels) -> float:
    """The temperature of least negative log-likelihood (Guo et al. 2017, arXiv 1706.04599, section 4.2).

    Golden-section search over its logarithm, in which the loss has one minimum; four digits are kept.
    """
    low, high = np.log(0.05), np.log(20.0)
    ratio = (np.sqrt(5.0) - 1.0) / 2.0
    scaled = logits.astype(np.float64)
    while high - low > 1e-5:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if _loss(scaled, labels, left) < _loss(scaled, labels, right):
            high = right
        else:
            low = left
    return float(f"{np.exp(0.5 * (low + high)):.4g}")


def make_plan(name: str, rungs: Sequence[Rung], outcomes: Outcomes) -> Plan:
    """The naive plan of a ladder, with the score that uploads least at its chosen point."""
    plans = [_plan_for_score(name, rungs, outcomes, score) for score in _PREFERENCE]
    return min(plans, key=lambda plan: _price(plan.points[plan.chosen]))


def select_paying(plans: Sequence[Plan]) -> tuple[list[Plan], str]:
    """The plans that pay, and the name of the default; the first plan is the one that others must beat.

    A plan that mixes precisions climbs higher than the first, and is kept if that saves uploads. One that
    never uses the first's precision is kept always, and never the default: which precision is faster is for
    each board to measure, and a clock must not decide what a bundle's digest is.
    """
    first = plans[0]
    kept = [plan for plan in plans if plan is first or not _extends(plan, first) or _saves(plan, first)]
    default = min((plan for plan in kept if plan is first or _extends(plan, first)), key=_uploads)
    return kept, default.name


def evaluate_point(
    max_score: Sequence[float], rungs: Sequence[Rung], outcomes: Outcomes, score: ScoreName
) -> OperatingPoint:
    """What one threshold per rung would have cost on the calibration data."""
    answer = outcomes.full_labels.copy()
    alive = np.ones(len(answer), bool)
    work = np.zeros(len(answer))
    for rung, head, limit in zip(rungs, outcomes.heads, max_score, strict=True):
        work[alive] += rung.mult_adds
        accepted = alive & (head[:, SCORE_COLUMN[score]] <= limit)
        answer[accepted] = head[accepted, LABEL].astype(np.int64)
        alive &= ~accepted
    return OperatingPoint(
        max_score=tuple(max_score),
        upload_share=round(float(alive.mean()), 6),
        accuracy=round(float(np.mean(answer == outcomes.labels)), 6),
        mult_adds=round(float(work.mean()), 1),
    )


def _plan_for_score(name: str, rungs: Sequence[Rung], outcomes: Outcomes, score: ScoreName) -> Plan:
    scores = outcomes.heads[:, :, SCORE_COLUMN[score]]
    grid = sorted({_rounded(value) for value in np.quantile(scores, _SHARES)})
    early_limit = _early_limit(rungs, outcomes, score, grid)
    early = len(rungs) - 1
    chain = [
        [ACCEPT_NONE] * len(rungs),
        *([min(limit, early_limit)] * early + [limit] for limit in grid),
        [early_limit] * early + [ACCEPT_ALL],
    ]
    points = tuple(evaluate_point(max_score, rungs, outcomes, score) for max_score in chain)
    enough = outcomes.full_accuracy - MAX_LOSS
    # The first point uploads everything and is as good as the full model, so one always qualifies.
    good = [index for index, point in enumerate(points) if point.accuracy >= enough]
    chosen = min(good, key=lambda index: _price(points[index]))
    return Plan(name=name, score=score, rungs=tuple(rungs), points=points, chosen=chosen, method="naive")


def _early_limit(rungs: Sequence[Rung], outcomes: Outcomes, score: ScoreName, grid: Sequence[float]) -> float:
    """The largest shared threshold at which leaving early costs the device's own answers at most MAX_LOSS."""
    early = len(rungs) - 1
    enough = outcomes.rung_accuracy[-1] - MAX_LOSS
    allowed = [
        limit
        for limit in grid
        if evaluate_point([limit] * early + [ACCEPT_ALL], rungs, outcomes, score).accuracy >= enough
    ]
    return max(allowed, default=ACCEPT_NONE)


def _loss(logits: NDArray[np.float64], labels: Labels, log_temperature: float) -> float:
    scaled = logits / np.exp(log_temperature)
    scaled -= scaled.max(axis=1, keepdims=True)
    own = scaled[np.arange(len(labels)), labels]
    return float(np.mean(np.log(np.exp(scaled).sum(axis=1)) - own))


def _rounded(value: float) -> float:
    return round(min(float(value), MAX_ACCEPT_SCORE), 4)


def _price(point: OperatingPoint) -> tuple[float, float]:
    return (point.upload_share, point.mult_adds)


def _extends(plan: Plan, first: Plan) -> bool:
    return first.rungs[0].precision in {rung.precision for rung in plan.rungs}


def _saves(plan: Plan, first: Plan) -> bool:
    return _uploads(plan) < _uploads(first)


def _uploads(plan: Plan) -> float:
    return plan.points[plan.chosen].upload_share
