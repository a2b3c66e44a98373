"""Steps that a share of liars cannot move far: coordinate median and trimmed mean (Yin 2018). No I/O.

Both need all votes at once, so their number is bounded and their memory is `max_votes` models; it is worked
through in blocks of coordinates, so that sorting needs no second copy. Every device counts the same: the
number of examples is what a device says of itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, TypeAlias

import numpy as np

from cloud_hub.core.federation.aggregation import AggregationError, Step, check_open, check_votes, parts_of
from cloud_hub.core.federation.screening import Accepted
from cloud_hub.core.federation.update import Layout

Trim: TypeAlias = Callable[[int], int]
"""Of so many votes, how many are left out at either end of each coordinate: fewer than half."""

_BLOCK_NUMBERS: Final = 1 << 18


def trim_to_median(votes: int) -> int:
    """All but the middle one, or the middle two. Resists fewer than half of the votes (definition 1)."""
    return (votes - 1) // 2


def trim_share(share: float) -> Trim:
    """This share of the votes at either end, rounded down (definition 2). Resists as many liars.

    Raises:
        ValueError: when the share is not in 0..0.5 (exclusive).
    """
    if not 0.0 <= share < 0.5:
        raise ValueError(f"trimming a share of {share} at either end: it must be from 0 to below 0.5")

    # 0.29 * 100 is a little less than 29.
    return lambda votes: min(math.floor(share * votes + 1e-9), trim_to_median(votes))


class TrimmedMean:
    """For each coordinate, the mean of the votes that are left without the largest and smallest few.

    While no more votes lie than are trimmed at one end, each coordinate stays within the honest votes' range.
    """

    def __init__(self, layout: Layout, trim: Trim, max_votes: int) -> None:
        self._layout = layout
        self._trim = trim
        self._max_votes = max_votes
        self._rows = np.empty((max_votes, layout.size), np.float32)
        self._votes = 0
        self._open = True

    @property
    def votes(self) -> int:
        """How many were added."""
        return self._votes

    def add(self, vote: Accepted) -> None:
        """Keep one vote.

        Raises:
            AggregationError: when there are `max_votes` already, or its tensors are not this model's.
        """
        check_open(self._open)
        if self._votes == self._max_votes:
            raise AggregationError(f"more than {self._max_votes} votes: the buffer of this round is full")
        row = self._rows[self._votes]
        for place, delta in parts_of(vote, self._layout):
            row[place] = delta
        self._votes += 1

    def close(self) -> Step:
        """The trimmed mean.

        Raises:
            AggregationError: when there was no vote.
        """
        check_open(self._open)
        check_votes(self._votes)
        self._open = False
        rows = self._rows[: self._votes]
        trimmed = self._trim(self._votes)
        step: Step = np.empty(self._layout.size, np.float64)
        width = max(1, _BLOCK_NUMBERS // self._votes)
        for start in range(0, step.size, width):
            # One line per coordinate: short lines next to each other sort several times quicker.
            lines = np.ascontiguousarray(rows[:, start : start + width].T)
            lines.sort(axis=1)
            middle = lines[:, trimmed : self._votes - trimmed]
            np.mean(middle, axis=1, dtype=np.float64, out=step[start : start + width])
        return step
