"""The audit coin: which samples are sent whatever the gate says. No I/O; chance and time are arguments.

The coin is thrown before the gate sees the sample, so that audited samples are a fair draw of all samples.
The cap is a token bucket: while it is empty no coin is thrown at all, which keeps the draw fair, too.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field


@dataclass(slots=True)
class AuditCoin:
    """Falls with probability `rate`, at most `max_per_hour` times an hour (that many at once at first)."""

    rate: float
    max_per_hour: float
    rng: random.Random
    _raised: float = field(init=False, default=0.0)
    _tokens: float = field(init=False)
    _filled_s: float | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._tokens = float(self.max_per_hour)

    def raise_to(self, rate: float) -> None:
        """Fall with at least this probability (0..1) from the next sample on; 0.0: as configured.

        The cap per hour holds all the same: what leaves the board stays what its owner allowed.
        """
        self._raised = min(max(rate, 0.0), 1.0)

    def throw(self, *, now_s: float) -> float:
        """The probability with which it fell, 0.0 if it did not. `now_s` is monotonic."""
        # Once: another thread may raise it meanwhile, and what is told must be what was thrown with.
        rate = max(self.rate, self._raised)
        if rate <= 0.0:
            return 0.0
        if self._filled_s is not None and self._tokens < self.max_per_hour:
            earned = (now_s - self._filled_s) * self.max_per_hour / 3600.0
            self._tokens = min(self._tokens + earned, float(self.max_per_hour))
        self._filled_s = now_s
        if self._tokens < 1.0 or self.rng.random() >= rate:
            return 0.0
        self._tokens -= 1.0
        return rate
