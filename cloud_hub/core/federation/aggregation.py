"""Many votes into one step, in the memory of one model. No I/O.

Votes are added in double precision, in place, block by block through a scratch buffer that stays in the
cache. Double, because then the order of arrival cannot be seen in the float32 result but for its last digit:
each product of a float32 and an integer weight below 2**29 is exact, and only the additions round. A plain
float32 sum was measured at about twice the speed, a compensated one at less than the double one's, and it
needs a second array as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cloud_hub.core.federation.screening import Accepted
from cloud_hub.core.federation.update import Layout

Step: TypeAlias = NDArray[np.float64]
"""A flat vector in the order of a `Layout`: what the votes together say should be added to the base."""

# 256 kB of doubles: the quickest of 4,096 to 131,072 on the machine where it was measured.
_BLOCK: Final = 32_768


class AggregationError(Exception):
    """A round that can have no result: no votes, too many for its buffer, or numbers out of range."""


class Combiner(Protocol):
    """Takes votes one by one and gives one step. Used once: after `close` it takes no more."""

    @property
    def votes(self) -> int:
        """How many were added."""

    def add(self, vote: Accepted) -> None:
        """Count one vote.

        Raises:
            AggregationError: when it cannot be counted; then nothing has changed.
        """

    def close(self) -> Step:
        """The step.

        Raises:
            AggregationError: when there was no vote.
        """


@dataclass(frozen=True, slots=True)
class Say:
    """How much a vote counts (`weight`, above zero) and by what its delta is multiplied (`scale`)."""

    weight: float
    scale: float = 1.0


Weigh: TypeAlias = Callable[[Accepted], Say]


def weigh_by_examples(vote: Accepted) -> Say:
    """By the number of examples (McMahan 2017, algorithm 1), which screening has capped."""
    return Say(float(vote.update.num_examples))


def weigh_by_staleness(vote: Accepted) -> Say:
    """Each vote the same, shrunk by 1 / sqrt(1 + staleness) (FedBuff, Nguyen 2022).

    The sum is divided by the number of votes and not by the sum of the factors: a buffer of old updates makes
    a shorter step.
    """
    return Say(1.0, 1.0 / math.sqrt(1.0 + vote.staleness))


def weigh_clipped(max_norm: float) -> Weigh:
    """By the number of examples, each delta shortened to at most `max_norm` (Sun 2019, norm clipping).

    Raises:
        ValueError: when `max_norm` is not above zero and finite.
    """
    if not 0.0 < max_norm < math.inf:
        raise ValueError(f"clipping to a norm of {max_norm}: it must be above 0 and finite")

    def weigh(vote: Accepted) -> Say:
        return Say(float(vote.update.num_examples), min(1.0, max_norm / vote.norm) if vote.norm else 1.0)

    return weigh


class WeightedMean:
    """sum(weight * scale * delta) / sum(weight), in two times the memory of a float32 model."""

    def __init__(self, layout: Layout, weigh: Weigh) -> None:
        self._layout = layout
        self._weigh = weigh
        self._sum: Step = np.zeros(layout.size, np.float64)
        self._scratch = np.empty(_BLOCK, np.float64)
        self._total = 0.0
        self._votes = 0
        self._open = True

    @property
    def votes(self) -> int:
        """How many were added."""
        return self._votes

    def add(self, vote: Accepted) -> None:
        """Count one vote.

        Raises:
            AggregationError: when its weight is not above zero and finite, or its tensors are not this
                model's; then nothing has changed.
        """
        check_open(self._open)
        say = self._weigh(vote)
        if not (0.0 < say.weight < math.inf and math.isfinite(say.scale)):
            raise AggregationError(f"{vote.update.device}: weight {say.weight}, scale {say.scale}: no vote")
        factor = say.weight * say.scale
        for place, delta in parts_of(vote, self._layout):
            _add_scaled(self._sum[place], delta, factor, self._scratch)
        self._total += say.weight
        self._votes += 1

    def close(self) -> Step:
        """The mean. The sum's memory becomes the step's.

        Raises:
            AggregationError: when there was no vote.
        """
        check_open(self._open)
        check_votes(self._votes)
        self._open = False
        self._sum /= self._total
        return self._sum


def parts_of(vote: Accepted, layout: Layout) -> list[tuple[slice, NDArray[np.float32]]]:
    """The flat tensors of a vote and their places.

    Raises:
        AggregationError: when they are not this model's.
    """
    try:
        return list(layout.parts(vote.update.delta))
    except ValueError as error:
        raise AggregationError(f"{vote.update.device}: {error}") from error


def check_open(is_open: bool) -> None:
    """Refuse a second use.

    Raises:
        AggregationError: when the round was closed.
    """
    if not is_open:
        raise AggregationError("this round is closed")


def check_votes(votes: int) -> None:
    """Refuse a round without votes.

    Raises:
        AggregationError: when there was none.
    """
    if votes == 0:
        raise AggregationError("no vote in this round")


def _add_scaled(total: Step, delta: NDArray[np.float32], factor: float, scratch: Step) -> None:
    for start in range(0, delta.size, scratch.size):
        block = delta[start : start + scratch.size]
        wide = scratch[: block.size]
        # Widen first: a multiplication of float32 into a double array would round to float32 on the way.
        np.copyto(wide, block)
        wide *= factor
        total[start : start + scratch.size] += wide
