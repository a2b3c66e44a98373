"""One round of federated averaging: from the training base and its votes to the next base. No I/O.

A strategy is how votes are combined and what the hub makes of the result; any combiner goes with any rule.
    round_ = fed_adam().begin(base)
    for vote in votes: round_.add(vote)
    outcome = round_.finish(state)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from cloud_hub.core.federation.aggregation import (
    AggregationError,
    Combiner,
    Step,
    Weigh,
    WeightedMean,
    weigh_by_examples,
    weigh_by_staleness,
    weigh_clipped,
)
from cloud_hub.core.federation.robust import Trim, TrimmedMean, trim_share, trim_to_median
from cloud_hub.core.federation.screening import Accepted
from cloud_hub.core.federation.server import Adam, Momentum, Plain, ServerRule, ServerState
from cloud_hub.core.federation.update import FloatArray, Layout, Weights

MAX_BUFFERED_VOTES: Final = 64
"""Of the robust strategies: 640 MB for a model of 10 MB."""


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """The next training base (float32, the base's names and shapes), the rule's state, the votes counted."""

    weights: dict[str, FloatArray]
    state: ServerState
    votes: int


@dataclass(frozen=True, slots=True)
class Strategy:
    """A way to combine votes, and what is made of the result."""

    combine: Callable[[Layout], Combiner]
    rule: ServerRule

    def begin(self, base: Weights) -> Round:
        """A round from this training base."""
        layout = Layout.of(base)
        return Round(base, layout, self.combine(layout), self.rule)


class Round:
    """A round that is being counted."""

    def __init__(self, base: Weights, layout: Layout, combiner: Combiner, rule: ServerRule) -> None:
        self._base = base
        self._layout = layout
        self._combiner = combiner
        self._rule = rule

    @property
    def votes(self) -> int:
        """How many were counted."""
        return self._combiner.votes

    def add(self, vote: Accepted) -> None:
        """Count one vote that passed screening.

        Raises:
            AggregationError: when it cannot be counted; the votes before it still stand.
        """
        self._combiner.add(vote)

    def finish(self, state: ServerState) -> Outcome:
        """The next base. Neither the base nor `state` is changed.

        Raises:
            AggregationError: when there was no vote, `state` is of another model, or a number left the range
                of float32. The round is then lost, the base and `state` stand.
        """
        step, following = self._rule.apply(self._combiner.close(), state)
        return Outcome(_moved(self._base, self._layout, step), following, self._combiner.votes)


def fed_avg(learning_rate: float = 1.0) -> Strategy:
    """The mean by examples (McMahan 2017, algorithm 1)."""
    return Strategy(_mean(weigh_by_examples), Plain(learning_rate))


def fed_prox(learning_rate: float = 1.0) -> Strategy:
    """FedProx (Li 2020, algorithm 2), counted as `fed_avg`: its proximal term acts on the devices.

    There clients are drawn by their share of examples and counted alike; here they are drawn alike and
    counted by their examples, as in FedAvg.
    """
    return fed_avg(learning_rate)


def fed_avg_m(learning_rate: float = 1.0, beta: float = 0.9) -> Strategy:
    """The mean by examples with momentum (Hsu 2019)."""
    return Strategy(_mean(weigh_by_examples), Momentum(learning_rate, beta))


def fed_adam(
    learning_rate: float = 0.01, beta_1: float = 0.9, beta_2: float = 0.99, tau: float = 1e-3
) -> Strategy:
    """The mean by examples, scaled per coordinate (Reddi 2021)."""
    return Strategy(_mean(weigh_by_examples), Adam(learning_rate, beta_1, beta_2, tau))


def fed_buff(learning_rate: float = 1.0) -> Strategy:
    """Votes from several bases, shrunk by their age (Nguyen 2022)."""
    return Strategy(_mean(weigh_by_staleness), Plain(learning_rate))


def norm_clipped(max_norm: float, learning_rate: float = 1.0) -> Strategy:
    """The mean by examples of deltas shortened to `max_norm`: a vote moves the base by its share of that."""
    return Strategy(_mean(weigh_clipped(max_norm)), Plain(learning_rate))


def coordinate_median(max_votes: int = MAX_BUFFERED_VOTES, learning_rate: float = 1.0) -> Strategy:
    """The median of each coordinate: stands while fewer than half of the votes lie (Yin 2018)."""
    return Strategy(_trimmed(trim_to_median, max_votes), Plain(learning_rate))


def trimmed_mean(
    share: float = 0.2, max_votes: int = MAX_BUFFERED_VOTES, learning_rate: float = 1.0
) -> Strategy:
    """Each coordinate's mean without `share` at either end: stands while no more than that lie (Yin 2018)."""
    return Strategy(_trimmed(trim_share(share), max_votes), Plain(learning_rate))


def _mean(weigh: Weigh) -> Callable[[Layout], Combiner]:
    return lambda layout: WeightedMean(layout, weigh)


def _trimmed(trim: Trim, max_votes: int) -> Callable[[Layout], Combiner]:
    if max_votes < 1:
        raise ValueError(f"a buffer of {max_votes} votes holds none")
    return lambda layout: TrimmedMean(layout, trim, max_votes)


def _moved(base: Weights, layout: Layout, step: Step) -> dict[str, FloatArray]:
    """`step` is overwritten."""
    for place, flat in layout.parts(base):
        step[place] += flat
    moved: dict[str, FloatArray] = {}
    for name, shape, place in layout.places():
        with np.errstate(over="ignore", under="ignore"):
            moved[name] = step[place].astype(np.float32).reshape(shape)
        if not np.isfinite(moved[name]).all():
            raise AggregationError(f"tensor {name!r} left the range of float32")
    return moved
