"""Was a round worse beyond noise, is a candidate better? Judged in pairs on the holdout. No I/O, no chance.

Old and new weights answer the same samples, so those on which both are right or both are wrong say nothing.
Of the others, if neither were better, each would be lost or won like the toss of a coin: how likely as many
losses are is the binomial tail (McNemar 1947, in its exact form), whatever the number of samples.

Every exit is tested over all samples, and the last exit also within each class: a class of one sample in
twenty may vanish without a trace in the whole. All tests share `alpha` by Holm 1979, so a round that changed
nothing for better or worse is rolled back with a probability of at most `alpha`. The plain bound `max_drop`
stands beside that and is not covered by it: it is there for holdouts so small that the test sees nothing. At
the defaults an equally good round meets it less often than once in fifty, as long as it answers no more than
a fifth of the samples differently.

What this test cannot see is a loss within the noise of this holdout, round after round: `drift` judges that.
Before a candidate is registered it is held against the live weights, not against its last step
(`decide_better`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from cloud_hub.core.federation.drift import Drifted

Labels: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class GuardRules:
    """`alpha`: how often noise alone may roll a round back. `max_drop`: a drop of the last exit's accuracy
    above it is never kept. `min_samples`: of the holdout, below which nothing is judged. `max_drift`: see
    `drift`, which judges rounds alone.
    """

    alpha: float = 0.05
    max_drop: float = 0.1
    min_samples: int = 100
    max_drift: float = 0.5

    def __post_init__(self) -> None:
        if not (0.0 < self.alpha < 1.0 and 0.0 < self.max_drop <= 1.0 and self.min_samples >= 1):
            raise ValueError(
                f"guard: alpha {self.alpha} is not in 0..1, max_drop {self.max_drop} not in 0..1 "
                f"or min_samples {self.min_samples} below 1"
            )
        if not self.max_drift >= 0.0:
            raise ValueError(f"guard: max_drift {self.max_drift} is below 0")


@dataclass(frozen=True, slots=True)
class Place:
    """An exit, counted from 0, and a class of it; all classes together where there is none."""

    exit: int
    label: int | None = None

    def __str__(self) -> str:
        """As a person reads it."""
        return f"exit {self.exit}" if self.label is None else f"exit {self.exit}, class {self.label}"


@dataclass(frozen=True, slots=True)
class Kept:
    """Not worse beyond noise: accuracy of the last exit before and after, on so many samples."""

    before: float
    after: float
    samples: int


@dataclass(frozen=True, slots=True)
class Better:
    """Better beyond noise at the last exit, and worse nowhere."""

    before: float
    after: float
    p_value: float


@dataclass(frozen=True, slots=True)
class Worse:
    """Worse beyond noise, or beyond `max_drop`: the surest place, its accuracies, its p-value after Holm.

    `also` are the other places that fail the test.
    """

    where: Place
    before: float
    after: float
    p_value: float
    also: tuple[Place, ...] = ()


@dataclass(frozen=True, slots=True)
class CannotJudge:
    """The holdout `has` fewer samples than the rules need."""

    has: int
    needs: int


Compared: TypeAlias = Kept | Worse | CannotJudge
Judgement: TypeAlias = Compared | Drifted


def decide_guard(before: Labels, after: Labels, labels: Labels, rules: GuardRules) -> Compared:
    """Whether the new weights may replace the old ones.

    `before` and `after` are the labels that each exit gives, `(exits, n) int64`; `labels` are the true ones,
    `(n,)`.

    Raises:
        ValueError: when the shapes do not fit together, or there is no exit.
    """
    pairs = _pairs_of(before, after, labels)
    if labels.size < rules.min_samples:
        return CannotJudge(labels.size, rules.min_samples)
    whole = pairs[len(before) - 1]
    adjusted = _adjust([tail_of_coins(pair.losses, pair.losses + pair.gains) for pair in pairs])
    # The surest first; of equals the first in the order of testing.
    order = sorted(range(len(pairs)), key=lambda i: adjusted[i])
    failed = [i for i in order if adjusted[i] <= rules.alpha]
    if failed:
        first = pairs[failed[0]]
        also = tuple(pairs[i].place for i in failed[1:])
        return Worse(first.place, first.before, first.after, adjusted[failed[0]], also)
    if whole.losses - whole.gains > rules.max_drop * labels.size:
        return Worse(whole.place, whole.before, whole.after, adjusted[len(before) - 1])
    return Kept(whole.before, whole.after, labels.size)


def decide_better(
    before: Labels, after: Labels, labels: Labels, rules: GuardRules
) -> Better | Kept | Worse | CannotJudge:
    """Whether a candidate (`after`) is better than what is live (`before`): shapes as for `decide_guard`.

    `Better` when it is worse nowhere and the last exit won more than noise wins, at `alpha`; `Kept` when it
    is neither better nor worse.

    Raises:
        ValueError: when the shapes do not fit together, or there is no exit.
    """
    judgement = decide_guard(before, after, labels, rules)
    if isinstance(judgement, Kept):
        whole = _pairs_of(before, after, labels)[len(before) - 1]
        p_value = tail_of_coins(whole.gains, whole.losses + whole.gains)
        if p_value <= rules.alpha:
            return Better(whole.before, whole.after, p_value)
    return judgement


def is_better(before: Labels, after: Labels, labels: Labels, rules: GuardRules) -> bool:
    """Whether `decide_better` says so."""
    return isinstance(decide_better(before, after, labels, rules), Better)


def describe(judgement: Better | Judgement) -> str:
    """One line for a person."""
    match judgement:
        case Kept(before, after, samples):
            return f"not worse: {before:.1%} before, {after:.1%} after, on {samples} samples"
        case Better(before, after, p_value):
            return f"better: {before:.1%} before, {after:.1%} after, p {p_value:.2g}"
        case Worse(where, before, after, p_value, also):
            others = f" and {len(also)} more" if also else ""
            return f"worse at {where}{others}: {before:.1%} before, {after:.1%} after, p {p_value:.2g}"
        case Drifted(best, after, errors):
            return (
                f"drifts away from the best base of the series: loss {best:.3f} there, {after:.3f} after, "
                f"{errors:.1f} standard errors"
            )
        case CannotJudge(has, needs):
            return f"cannot judge: {has} holdout samples, {needs} needed"


class GuardFigures(msgspec.Struct, frozen=True, kw_only=True):
    """A judgement as it is kept. Accuracies are of the last exit, of `where` for what is worse.

    `loss` in 0..1 of the weights after the round, and of the best base before it; see `drift`.
    """

    judgement: str
    says: str
    samples: int
    before: float | None = None
    after: float | None = None
    p_value: float | None = None
    where: str | None = None
    loss: float | None = None
    best_loss: float | None = None


def figures_of(
    judgement: Better | Judgement, samples: int, *, loss: float | None = None, best_loss: float | None = None
) -> GuardFigures:
    """A judgement on so many samples as it is kept."""
    before: float | None = None
    after: float | None = None
    p_value: float | None = None
    where: str | None = None
    match judgement:
        case Kept(before, after):
            name = "kept"
        case Better(before, after, p_value):
            name = "better"
        case Worse(place, before, after, p_value):
            name, where = "worse", str(place)
        case Drifted():
            name = "drifted"
        case CannotJudge():
            name = "cannot_judge"
    return GuardFigures(
        judgement=name,
        says=describe(judgement),
        samples=samples,
        before=before,
        after=after,
        p_value=p_value,
        where=where,
        loss=loss,
        best_loss=best_loss,
    )


def tail_of_coins(heads: int, coins: int) -> float:
    """How likely at least so many `heads` are of fair `coins`: the exact upper tail of the binomial.

    Each term from the one before it, in logarithms, so that nothing underflows before the sum does.
    """
    if heads <= 0:
        return 1.0
    # At least so many heads is at most so many tails.
    k = np.arange(coins - heads, dtype=np.float64)
    log_terms = np.concatenate([[0.0], np.cumsum(np.log((coins - k) / (k + 1.0)))])
    log_tail = float(np.logaddexp.reduce(log_terms)) - coins * math.log(2.0)
    return math.exp(min(log_tail, 0.0))


@dataclass(frozen=True, slots=True)
class _Pairs:
    """Of the samples at a place: accuracies, and how many were lost and won."""

    place: Place
    before: float
    after: float
    losses: int
    gains: int


def _pairs_of(before: Labels, after: Labels, labels: Labels) -> list[_Pairs]:
    """Each exit over all classes, then the last exit within each class that there is."""
    if (
        before.ndim != 2
        or len(before) == 0
        or before.shape != after.shape
        or before.shape[1:] != labels.shape
    ):
        raise ValueError(f"labels of shapes {before.shape} and {after.shape} for true ones of {labels.shape}")
    was, now = before == labels, after == labels
    last = len(before) - 1
    everything = np.ones(labels.size, np.bool_)
    places = [(Place(exit_), everything) for exit_ in range(len(before))]
    places += [(Place(last, int(label)), labels == label) for label in np.unique(labels)]
    return [_pairs_at(place, was[place.exit, chosen], now[place.exit, chosen]) for place, chosen in places]


def _pairs_at(place: Place, was: NDArray[np.bool_], now: NDArray[np.bool_]) -> _Pairs:
    size = max(was.size, 1)
    losses, gains = int((was & ~now).sum()), int((now & ~was).sum())
    return _Pairs(place, float(was.sum()) / size, float(now.sum()) / size, losses, gains)


def _adjust(p_values: Sequence[float]) -> list[float]:
    """Holm's: a place whose value is at most alpha fails, and all together do so wrongly in at most alpha."""
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted
