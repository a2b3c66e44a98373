"""Tests of "the risk is above epsilon", and the bounds that follow from them. No I/O, no chance.

Two ways to measure the same risk, the expected share of lost samples:

- `SampleLosses`: samples are independent. The number of losses has a binomial tail that is at most the one at
  epsilon, whatever n is. No valid test that looks at the number of losses is sharper (docs/adr/0012).
- `GroupLosses`: samples come in groups (a recording, a subject), and only the groups are independent. Betting
  (Waudby-Smith and Ramdas 2024, arXiv 2010.09686, section 4): a gambler who stakes a fraction of the capital
  on "this group loses less than epsilon" must not get rich if the risk is epsilon or more. With sizes n_g and
  losses L_g, X_g = (epsilon n_g - L_g) / max n, and for each bet b in 0..1 / (1 - epsilon) the capital
  prod_g (1 + b X_g) is never negative. Its expectation is at most 1 if the expected losses sum to at least
  epsilon times the samples, for log(1 + y) <= y: the groups need not be alike, and the sizes are taken as
  given. So is the mean over a fixed grid of bets, and p = 1 / capital by Markov's inequality. What is bounded
  is the risk over samples, for groups of these sizes. The order of the groups does not matter.

Risks are tested at many points at once: arrays are `(points,)` or `(points, groups)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

Method = Literal["binomial", "betting"]

# Fractions of the largest bet that can never ruin the gambler. Kelly's bet on independent losses is the
# fraction 1 - risk / epsilon, so an even grid is near the best one wherever the test has a chance.
_BETS: Final = np.arange(1, 21) / 20.0

_BISECTIONS: Final = 26


@dataclass(frozen=True, slots=True)
class SampleLosses:
    """How many of `samples` independent samples were lost, `(points,)`; fractions count as a whole loss."""

    losses: Array
    samples: int

    def p_values(self, epsilon: float) -> Array:
        """How likely it is to lose so few at a risk of `epsilon`, `(points,)`: the exact binomial tail."""
        lost = np.minimum(np.ceil(self.losses - 1e-9), self.samples).astype(np.intp)
        tails: Array = np.exp(_log_tails(int(lost.max(initial=0)), self.samples, epsilon))
        return tails[lost]


@dataclass(frozen=True, slots=True)
class GroupLosses:
    """How many samples of each group were lost, `(points, groups)`, and the `sizes` of the groups.

    `repeats` counts every group so many times: for plans made on other data than will be tested, never for
    the test itself.
    """

    losses: Array
    sizes: Array
    repeats: float = 1.0

    def p_values(self, epsilon: float) -> Array:
        """One over the capital won by betting on a risk below `epsilon`, at most 1, `(points,)`."""
        gains = (epsilon * self.sizes - self.losses) / self.sizes.max()
        with np.errstate(divide="ignore"):
            # A group lost whole may leave exactly nothing; rounding must not leave less.
            capitals = np.stack(
                [
                    self.repeats * np.log(np.maximum(0.0, 1.0 + bet / (1.0 - epsilon) * gains)).sum(axis=1)
                    for bet in _BETS
                ]
            )
        capital = np.logaddexp.reduce(capitals, axis=0) - np.log(len(_BETS))
        p_values: Array = np.exp(-np.maximum(capital, 0.0))
        return p_values


Losses = SampleLosses | GroupLosses


def last_passed(p_values: Array, level: float) -> int:
    """Fixed-sequence testing: the last point before the first whose p-value is above `level`; -1 for none.

    With the order fixed beforehand no correction for the number of points is due (Angelopoulos et al. 2021,
    arXiv 2110.01052, section 4.2).
    """
    failed = np.flatnonzero(~(p_values <= level))
    return int(failed[0]) - 1 if len(failed) else len(p_values) - 1


def upper_bounds(losses: Losses, level: float) -> Array:
    """The smallest epsilon that each point passes at `level`, `(points,)`; 1 where none does.

    For independent samples these are Clopper and Pearson's one-sided bounds.
    """
    points = len(losses.losses)
    low, high = np.zeros(points), np.ones(points)
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        passes = _each_p_value(losses, middle) <= level
        low, high = np.where(passes, low, middle), np.where(passes, middle, high)
    return high


def units_needed(epsilon: float, level: float, method: Method) -> int:
    """How many samples (or groups of one size) without a single loss pass at `epsilon` and `level`."""
    low, high = 0, 1
    while not _passes_without_loss(high, epsilon, level, method):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if _passes_without_loss(middle, epsilon, level, method):
            high = middle
        else:
            low = middle
    return high


def _passes_without_loss(units: int, epsilon: float, level: float, method: Method) -> bool:
    if method == "binomial":
        losses: Losses = SampleLosses(np.zeros(1), units)
    else:
        losses = GroupLosses(np.zeros((1, 1)), np.ones(1), repeats=units)
    return bool(losses.p_values(epsilon)[0] <= level)


def _each_p_value(losses: Losses, epsilons: Array) -> Array:
    """Each point's p-value at its own epsilon."""
    return np.array(
        [
            _point_of(losses, index).p_values(float(epsilon))[0] if epsilon < 1.0 else 0.0
            for index, epsilon in enumerate(epsilons)
        ]
    )


def _point_of(losses: Losses, index: int) -> Losses:
    one = losses.losses[index : index + 1]
    if isinstance(losses, SampleLosses):
        return SampleLosses(one, losses.samples)
    return GroupLosses(one, losses.sizes, losses.repeats)


def _log_tails(most: int, samples: int, epsilon: float) -> Array:
    """Logarithms of P(losses <= k) for k = 0..most, of `samples` at a risk of `epsilon`.

    Each term of the binomial distribution from the one before it, so that nothing underflows.
    """
    k = np.arange(most, dtype=np.float64)
    ratios = np.log((samples - k) / (k + 1.0)) + np.log(epsilon) - np.log1p(-epsilon)
    terms = samples * np.log1p(-epsilon) + np.concatenate([[0.0], np.cumsum(ratios)])
    tails: Array = np.minimum(np.logaddexp.accumulate(terms), 0.0)
    return tails
