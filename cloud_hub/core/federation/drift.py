"""Has a series walked downhill in steps that are each too small to see? Judged in pairs. No I/O, no chance.

The guard's test (`guard`) asks whether one round was worse beyond noise. On a few hundred samples a loss of
two points is within noise, and a round that takes it is followed by the next: a series may lose five points
of accuracy and be found worse nowhere. So each round is also held against the *best* base that its series
has had, its start included, and the burden of proof is turned round: what lies above the best by more than
`max_drift` standard errors is not kept, significant or not. However many rounds there are, the walk ends
there.

Accuracy is too coarse for that: of 228 samples a round changes ten. What is compared is the loss over all
exits, made bounded so that a few samples of which a network is wrongly sure do not outvote the others: with
L the mean cross-entropy of the exits, (1 - exp(-L))^2 is the square of what the truth lacks of certainty,
as in the score of Brier 1950, over the geometric mean of the exits.

`max_drift` buys the one error with the other. A round exactly as good as the best lies above it by half a
standard error in 31 of 100 cases (the normal tail), and is then rolled back; what that costs is a round's
bytes. A round that is worse by one standard error is kept in 31 of 100 cases, by two in 7. Where nothing
moved but the last digits, standard errors are as small: a difference of less than `NEGLIGIBLE` is none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

NEGLIGIBLE: Final = 0.001
"""Of a loss in 0..1. From the best base, not from round to round: it adds up to nothing."""

Losses = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Drifted:
    """Above the best base: mean losses of both, and by how many standard errors of their difference."""

    best: float
    after: float
    errors: float


def bounded_losses(losses: NDArray[np.floating], exits: int) -> Losses:
    """Losses in 0..1 of what a train step gives, the sum over `exits`; NaN and infinity are 1."""
    with np.errstate(over="ignore"):
        bounded = np.square(1.0 - np.exp(-np.asarray(losses, np.float64) / exits))
    return np.where(np.isfinite(bounded), bounded, 1.0)


def decide_drift(best: Losses, after: Losses, *, max_drift: float) -> Drifted | None:
    """Whether weights lie too far above the series' best; both losses `(n,)`, of the same samples.

    A single sample has no standard error: nothing is said of it.

    Raises:
        ValueError: when the shapes differ, or there is none.
    """
    if best.shape != after.shape or best.ndim != 1 or best.size == 0:
        raise ValueError(f"losses of shapes {best.shape} and {after.shape}")
    if best.size == 1:
        return None
    above = after - best
    mean = float(above.mean())
    error = float(above.std(ddof=1)) / math.sqrt(above.size)
    if mean <= max(NEGLIGIBLE, max_drift * error):
        return None
    return Drifted(float(best.mean()), float(after.mean()), mean / error if error > 0.0 else math.inf)
