"""A chain of operating points, and what each of its points does with every sample. No I/O.

A chain is nested: no threshold ever falls from one point to the next. So a rung that would accept a sample at
one point would accept it at every later one, and a rung answers a sample on one unbroken stretch of the
chain: from where it first would, until an earlier rung would too. All points are counted at once from the two
ends of these stretches, in one pass over the samples instead of one walk per point. `outcomes.walk` is the
definition; the tests hold this against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cloud_hub.builder.calibration.outcomes import Outcomes
from edge_cascade.policy import ACCEPT_ALL, OperatingPoint, Rung
from edge_cascade.scores import LABEL, SCORE_COLUMN, ScoreName

Array = NDArray[np.float64]
Marks = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Chain:
    """Operating points of one ladder, from "escalate all" (first) to "escalate nothing" (last).

    `max_scores` is `(points, rungs)`: one threshold per rung, no column ever falling.
    """

    rungs: tuple[Rung, ...]
    score: ScoreName
    max_scores: Array

    def __len__(self) -> int:
        return len(self.max_scores)


@dataclass(frozen=True, slots=True)
class Track:
    """Who answers every sample at every point of a chain.

    Rung r answers sample i at the points `start[r, i] <= point < stop[r, i]`; the sample is escalated at the
    points before `answered[i]`.
    """

    points: int
    start: NDArray[np.intp]
    stop: NDArray[np.intp]
    answered: NDArray[np.intp]

    def totals(self, if_answered: NDArray[np.generic], if_escalated: NDArray[np.generic] | float) -> Array:
        """Sum over the samples at every point, `(points,)`.

        A sample counts `if_answered[r, i]` (or `[r, 0]`) where rung r answers it, else `if_escalated[i]`.
        """
        only = np.zeros(len(self.answered), np.intp)
        return self.totals_by_unit(if_answered, if_escalated, only, 1)[:, 0]

    def totals_by_unit(
        self,
        if_answered: NDArray[np.generic],
        if_escalated: NDArray[np.generic] | float,
        unit: NDArray[np.intp],
        units: int,
    ) -> Array:
        """As `totals`, apart for each unit: `(points, units)`, where `unit` `(n,)` says whose a sample is."""
        shape = self.start.shape
        weights = np.broadcast_to(if_answered, shape).astype(np.float64)
        escalated = np.broadcast_to(if_escalated, shape[1:]).astype(np.float64)
        size = (self.points + 1) * units
        change = np.bincount(unit, escalated, size)
        change -= np.bincount(self.answered * units + unit, escalated, size)
        for start, stop, weight in zip(self.start, self.stop, weights, strict=True):
            answers = np.flatnonzero((start < stop) & (weight != 0))
            change += np.bincount(start[answers] * units + unit[answers], weight[answers], size)
            change -= np.bincount(stop[answers] * units + unit[answers], weight[answers], size)
        totals: Array = change.reshape(-1, units).cumsum(axis=0)[:-1]
        return totals


def follow(chain: Chain, outcomes: Outcomes) -> Track:
    """Follow every sample along the chain, by the gate's rule (`edge_cascade.gate.decide_exit`)."""
    points, n = len(chain), len(outcomes)
    start = np.empty((len(chain.rungs), n), np.intp)
    for index, (rung, head) in enumerate(zip(chain.rungs, outcomes.heads, strict=True)):
        limits = chain.max_scores[:, index]
        # The device compares doubles. NaN sorts behind every threshold: no rung accepts it.
        start[index] = np.searchsorted(limits, head[:, SCORE_COLUMN[chain.score]].astype(np.float64))
        if rung.must_agree and index:
            differs = head[:, LABEL] != outcomes.heads[index - 1][:, LABEL]
            regardless = np.searchsorted(limits, ACCEPT_ALL)
            start[index][differs] = np.maximum(start[index][differs], regardless)
    earliest = np.minimum.accumulate(start, axis=0)
    stop = np.vstack([np.full((1, n), points, np.intp), earliest[:-1]])
    return Track(points, start, stop, earliest[-1])


def losses_if_answered(outcomes: Outcomes) -> Marks:
    """Where each rung's own answer would be wrong and the full model is right, `(rungs, n)`."""
    right = outcomes.full_labels == outcomes.reference
    marks: Marks = (outcomes.heads[:, :, LABEL] != outcomes.reference) & right
    return marks


def disagreements_if_answered(outcomes: Outcomes) -> Marks:
    """Where each rung's own answer is not the full model's, `(rungs, n)`."""
    marks: Marks = outcomes.heads[:, :, LABEL] != outcomes.full_labels
    return marks


def risk_if_answered(outcomes: Outcomes) -> Marks:
    """Losses where the truth is known, else disagreements, `(rungs, n)`."""
    if outcomes.labels is None:
        return disagreements_if_answered(outcomes)
    return losses_if_answered(outcomes)


def upload_shares(track: Track) -> Array:
    """The share of samples that is escalated at every point."""
    return track.totals(np.zeros((len(track.start), 1)), 1.0) / len(track.answered)


def mean_costs(track: Track, costs: Sequence[float]) -> Array:
    """What a sample costs on the device at every point, on average; `costs` are those of each rung alone."""
    climbed = np.cumsum(np.asarray(costs, np.float64))
    return track.totals(climbed[:, None], climbed[-1]) / len(track.answered)


def operating_points(chain: Chain, outcomes: Outcomes) -> tuple[OperatingPoint, ...]:
    """The chain's points with what they do on these samples."""
    track = follow(chain, outcomes)
    right = outcomes.heads[:, :, LABEL] == outcomes.reference
    accuracies = track.totals(right, outcomes.full_labels == outcomes.reference) / len(outcomes)
    mult_adds = mean_costs(track, [rung.mult_adds for rung in chain.rungs])
    return tuple(
        OperatingPoint(
            max_score=tuple(limits),
            upload_share=round(upload, 6),
            accuracy=round(accuracy, 6),
            mult_adds=round(work, 1),
        )
        for limits, upload, accuracy, work in zip(
            chain.max_scores.tolist(),
            upload_shares(track).tolist(),
            accuracies.tolist(),
            mult_adds.tolist(),
            strict=True,
        )
    )
