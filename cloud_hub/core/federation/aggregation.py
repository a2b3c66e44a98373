"""Many votes into one step, in the memory of a few models whatever the number of votes. No I/O.

Votes are added in single precision, `GROUP` of them into a partial sum, block by block through a scratch
buffer that stays in the cache; each full group is folded into a total in double precision. Single precision,
because adding is bound by memory: all in double was measured at less than a third of the speed. Short groups,
because only the additions within one round to single precision, so that the error does not grow with the
number of votes (Higham 2002, section 4.2).

What that costs, with u = 2**-24 and for votes d_i of weight w_i and scale s_i: each coordinate of the mean is
within `MAX_ERROR` * sum(|w_i s_i d_i|) / sum(w_i) of the exact one, where `MAX_ERROR` is (GROUP + 2) u, that
is 1.1e-6: the vote's factor is rounded, its product is, and at most GROUP - 1 additions in its group are; the
rest is room for the rounding in double. It is relative to the mean size of the votes, so votes that cancel
leave the error of their size. Where products underflow, an absolute error below 2**-100 times the largest
scale is added. No sum of finite votes overflows. The same votes in the same order give the same bits; another
order moves the mean within the bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cloud_hub.core.federation.screening import Accepted
from cloud_hub.core.federation.update import FloatArray, Layout

Step: TypeAlias = NDArray[np.float64]
"""A flat vector in the order of a `Layout`: what the votes together say should be added to the base."""

GROUP: Final = 16
"""So many votes share a partial sum in single precision."""

MAX_ERROR: Final = (GROUP + 2) * 2.0**-24
"""Of a coordinate of the mean, relative to the mean size of what the votes say of it."""

# 256 kB of single precision: within a tenth of the quickest of 4,096 to 524,288 numbers where it was
# measured, and a block each of the vote, the partial sum and the scratch together stay below 1 MB.
_BLOCK: Final = 65_536

# Factors of a group are counted in a unit of 2**_UNIT_BITS times the first one's power of two. A later one
# may be so much larger, or smaller by what the range of single precision leaves, before a new group begins.
_UNIT_BITS: Final = 20
# GROUP products of a factor of at most so many units stay below the largest number of single precision.
_MAX_UNITS: Final = 0.5 / GROUP
_MIN_UNITS: Final = 2.0**-60
_MAX_WEIGHT: Final = 2.0**512


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
    """sum(weight * scale * delta) / sum(weight), in three times the memory of a float32 model.

    The total in double precision is two of them, a group's partial sum the third; nothing grows with votes.
    """

    def __init__(self, layout: Layout, weigh: Weigh) -> None:
        self._layout = layout
        self._weigh = weigh
        self._sum: Step = np.zeros(layout.size, np.float64)
        self._group = np.empty(layout.size, np.float32)
        self._scratch = np.empty(min(_BLOCK, layout.size), np.float32)
        self._in_group = 0
        self._unit = 1.0
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
            AggregationError: when its weight is not above zero and finite (2**-512 to 2**512), or its tensors
                are not this model's; then nothing has changed.
        """
        check_open(self._open)
        say = self._weigh(vote)
        factor = say.weight * say.scale
        if not (1.0 / _MAX_WEIGHT < say.weight < _MAX_WEIGHT and abs(factor) < _MAX_WEIGHT):
            raise AggregationError(f"{vote.update.device}: weight {say.weight}, scale {say.scale}: no vote")
        parts = parts_of(vote, self._layout)
        if factor != 0.0:
            self._add(parts, factor)
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
        self._fold()
        self._group = np.empty(0, np.float32)
        self._sum /= self._total
        return self._sum

    def _add(self, parts: list[tuple[slice, FloatArray]], factor: float) -> None:
        if self._in_group == GROUP or not _MIN_UNITS <= abs(factor) / self._unit <= _MAX_UNITS:
            self._fold()
        is_first = self._in_group == 0
        if is_first:
            self._unit = math.ldexp(1.0, math.frexp(factor)[1] + _UNIT_BITS)
        units = np.float32(factor / self._unit)
        # Products that underflow are in the bound.
        with np.errstate(under="ignore"):
            for place, delta in parts:
                if is_first:
                    np.multiply(delta, units, out=self._group[place])
                else:
                    _add_scaled(self._group[place], delta, units, self._scratch)
        self._in_group += 1

    def _fold(self) -> None:
        """Into the total, if there is anything."""
        if self._in_group:
            scratch = np.empty(self._scratch.size, np.float64)
            for start in range(0, self._sum.size, _BLOCK):
                block = self._group[start : start + _BLOCK]
                wide = scratch[: block.size]
                # Widen first: a product of two numbers in single precision would be rounded to it.
                np.copyto(wide, block)
                wide *= self._unit
                self._sum[start : start + _BLOCK] += wide
        self._in_group = 0


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


def _add_scaled(group: FloatArray, delta: FloatArray, units: np.float32, scratch: FloatArray) -> None:
    for start in range(0, delta.size, scratch.size):
        block, partial = delta[start : start + scratch.size], group[start : start + scratch.size]
        product = scratch[: block.size]
        np.multiply(block, units, out=product)
        np.add(partial, product, out=partial)
