"""Searches thresholds that cost least at a given price of uploads. No I/O.

One search serves one ladder, one score and one choice of rungs that must agree. For a price p it minimises

    risk + p * (upload share + COMPUTE_WEIGHT * compute share)

over one threshold per rung by coordinate descent: with the other thresholds held, what a sample costs if this
rung accepts it and if it does not are both known, so one cumulative sum over the samples in order of their
score prices every threshold of the rung at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cloud_hub.builder.calibration.outcomes import Outcomes
from cloud_hub.builder.calibration.track import risk_if_answered
from edge_cascade.policy import ACCEPT_NONE, Rung
from edge_cascade.scores import LABEL, SCORE_COLUMN, ScoreName

Array = NDArray[np.float64]
Places = NDArray[np.intp]

MAX_ACCEPT_SCORE: Final = 0.99
"""No point but the last lets a rung accept a score above this."""

COMPUTE_WEIGHT: Final = 0.01
"""What climbing the whole ladder costs, in uploads.

Bytes are what is metered: all of the computing is worth one upload in a hundred, so it never buys more than a
point of upload share, and still decides between thresholds that upload and lose the same.
"""

PRICES: Final = np.geomspace(1.0, 1e-3, 24)
"""Losses that one upload is worth, dearest first.

At 1 nothing is uploaded that is lost less than always; at 0.001 every upload that saves a loss in a thousand.
"""

_SHARES: Final = np.linspace(0.0, 1.0, 257)
_MAX_SWEEPS: Final = 12

# A descent on bare losses ends just before the few that these samples happen to have. So most of what an
# answer counts is what answers of about this score cost on average, over this share of the samples.
_NEIGHBOURS: Final = 0.15
_OWN_WEIGHT: Final = 0.25


@dataclass(frozen=True, slots=True)
class Search:
    """The samples as the descent sees them. Places are indices into a rung's `candidates`.

    A rung accepts a sample at a threshold whose place is `first` `(rungs, n)` or later; `risk` `(rungs, n)`
    is how much its answer counts against it; `compute` `(rungs,)` is the share of the ladder climbed by then.
    """

    candidates: tuple[Array, ...]
    first: Places
    risk: Array
    compute: Array

    def frontier(self) -> Places:
        """Places of the best thresholds at every price, from careful to cheap, `(prices, rungs)`.

        Descent may end beside the best. It is started twice at every price, from what was best at the next
        higher price and at the next lower one, and the better of the two is kept.
        """
        start = np.array([len(limits) - 1 for limits in self.candidates], np.intp)
        down = self._chase(PRICES, start)
        up = self._chase(PRICES[::-1], down[-1][0])[::-1]
        best = [min(pair, key=lambda found: found[1])[0] for pair in zip(down, up, strict=True)]
        return np.stack(best[::-1])

    def _chase(self, prices: Array, start: Places) -> list[tuple[Places, float]]:
        found = []
        for price in prices.tolist():
            start, cost = self._descend(start, price)
            found.append((start, cost))
        return found

    def _descend(self, start: Places, price: float) -> tuple[Places, float]:
        """Places at which no single threshold can be improved, and their cost summed over samples."""
        places = start.copy()
        for _ in range(_MAX_SWEEPS):
            cost, improved = self._sweep(places, price)
            if not improved:
                break
        return places, cost

    def _sweep(self, places: Places, price: float) -> tuple[float, bool]:
        """Set each rung's threshold to its best, last rung first."""
        rungs, n = self.first.shape
        reached = np.ones((rungs, n), bool)
        for rung in range(rungs - 1):
            reached[rung + 1] = reached[rung] & (self.first[rung] > places[rung])
        improved = False
        refused = np.full(n, price * (1.0 + COMPUTE_WEIGHT))
        for rung in reversed(range(rungs)):
            first = self.first[rung]
            accepted = self.risk[rung] + price * COMPUTE_WEIGHT * self.compute[rung]
            limits = len(self.candidates[rung])
            gains = np.bincount(
                first[reached[rung]], (accepted - refused)[reached[rung]], limits + 1
            ).cumsum()
            best = int(gains[:limits].argmin())
            # A tie is no improvement, and rounding must not make the descent go in circles.
            if gains[best] < gains[places[rung]] - 1e-9:
                places[rung], improved = best, True
            refused = np.where(first <= places[rung], accepted, refused)
        return float(refused.sum()), improved


def prepare_search(rungs: Sequence[Rung], score: ScoreName, outcomes: Outcomes) -> Search:
    """Candidate thresholds of every rung, and where in them each sample begins to be accepted."""
    candidates, first = [], np.empty(outcomes.heads.shape[:2], np.intp)
    risk = risk_if_answered(outcomes).astype(np.float64)
    for index, (rung, head) in enumerate(zip(rungs, outcomes.heads, strict=True)):
        scores = head[:, SCORE_COLUMN[score]].astype(np.float64)
        limits = candidate_thresholds(scores)
        first[index] = np.searchsorted(limits, scores)
        if rung.must_agree and index:
            first[index][head[:, LABEL] != outcomes.heads[index - 1][:, LABEL]] = len(limits)
        candidates.append(limits)
        open_to = np.flatnonzero(first[index] < len(limits))
        risk[index][open_to] = _smoothed(risk[index][open_to], scores[open_to])
    return Search(
        candidates=tuple(candidates),
        first=first,
        risk=risk,
        compute=np.cumsum(rung_costs(rungs)) / sum(rung_costs(rungs)),
    )


def candidate_thresholds(scores: Array) -> Array:
    """`ACCEPT_NONE`, then rounded quantiles of the scores up to `MAX_ACCEPT_SCORE`, rising."""
    finite = scores[np.isfinite(scores)]
    quantiles = np.quantile(finite, _SHARES) if len(finite) else np.empty(0)
    # Six significant digits, because sure networks crowd their scores just above zero.
    rounded = {float(f"{min(value, MAX_ACCEPT_SCORE):.6g}") for value in quantiles.tolist()}
    return np.array([ACCEPT_NONE, *sorted(rounded)])


def _smoothed(risk: Array, scores: Array) -> Array:
    """Each sample's risk, and for the most part the mean over its neighbours in the order of the scores."""
    order = np.argsort(scores, kind="stable")
    sums = np.concatenate([[0.0], np.cumsum(risk[order])])
    place, reach = np.arange(len(risk)), int(0.5 * _NEIGHBOURS * len(risk))
    low, high = np.maximum(place - reach, 0), np.minimum(place + reach + 1, len(risk))
    smoothed = np.empty_like(risk)
    smoothed[order] = (sums[high] - sums[low]) / (high - low)
    return _OWN_WEIGHT * risk + (1.0 - _OWN_WEIGHT) * smoothed


def rung_costs(rungs: Sequence[Rung]) -> list[float]:
    """What each rung costs: microseconds where every rung has been timed, else multiply-adds."""
    timed = [rung.cost_us for rung in rungs if rung.cost_us is not None]
    return timed if len(timed) == len(rungs) else [max(float(rung.mult_adds), 1.0) for rung in rungs]
