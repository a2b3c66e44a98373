"""What a chain is expected to do at other promises than the one asked for. No I/O.

Read off D_opt alone, as if D_cal were samples of the same kind: whoever picks an epsilon from here has not
looked at the data that will test it. The chain is fitted to D_opt, so expect a little worse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

TRADE_EPSILONS: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05)


@dataclass(frozen=True, slots=True)
class Trade:
    """The point expected to be certified at `epsilon`: uploads a sample, and mean multiply-adds."""

    epsilon: float
    point: int
    upload_share: float
    mult_adds: float


@dataclass(frozen=True, slots=True)
class Outlook:
    """One plan's points: the epsilon it takes to be certified that far, and what they cost on D_opt."""

    plan: str
    epsilons: tuple[float, ...]
    upload_shares: tuple[float, ...]
    mult_adds: tuple[float, ...]

    def at(self, epsilon: float) -> Trade:
        """The last point that is expected to pass at `epsilon`."""
        point = max(int(np.searchsorted(self.epsilons, epsilon, side="right")) - 1, 0)
        return Trade(epsilon, point, self.upload_shares[point], self.mult_adds[point])

    def trades(self, asked: float) -> tuple[Trade, ...]:
        """The trade table: a list of epsilons, with the one asked for among them."""
        return tuple(self.at(epsilon) for epsilon in sorted({*TRADE_EPSILONS, asked}))

    def epsilon_for_upload(self, max_upload_share: float) -> float:
        """The smallest epsilon at which no more than this share is expected to be uploaded."""
        enough = [
            epsilon
            for epsilon, upload in zip(self.epsilons, self.upload_shares, strict=True)
            if upload <= max_upload_share
        ]
        return enough[0]
