"""The audit coin: which samples are sent whatever the gate says. No I/O; chance and time are arguments.

The coin is thrown before the gate sees the sample, so that audited samples are a fair draw of all samples.
The cap is a token bucket: while it is empty no coin is thrown at all, which keeps the draw fair, too. While a
release is judged the hub may ask for more; how much at most is this board's configuration, not the hub's.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field


@dataclass(slots=True)
class AuditCoin:
    """Falls with probability `rate`, at most `max_per_hour` times an hour (that many at once at first).

    While it is raised the cap is `max_raised_per_hour`, if that is more.
    """

    rate: float
    max_per_hour: float
    rng: random.Random
    max_raised_per_hour: float = 0.0
    _raised: float = field(init=False, default=0.0)
    _tokens: float = field(init=False)
    _filled_s: float | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._tokens = float(self.max_per_hour)

    def raise_to(self, rate: float) -> None:
        """Fall with at least this probability (0..1) from the next sample on; 0.0: as configured."""
        self._raised = min(max(rate, 0.0), 1.0)

    def throw(self, *, now_s: float) -> float:
        """The probability with which it fell, 0.0 if it did not. `now_s` is monotonic."""
        # Once: another thread may raise it meanwhile, and what is told must be what was thrown with.
        raised = self._raised
        rate = max(self.rate, raised)
        if rate <= 0.0:
            return 0.0
        cap = self.max_per_hour
        if raised > self.rate:
            cap = max(cap, self.max_raised_per_hour)
        earned = 0.0 if self._filled_s is None else (now_s - self._filled_s) * cap / 3600.0
        # Below one an hour there must be room for one all the same.
        self._tokens = min(self._tokens + earned, max(cap, 1.0) if cap > 0 else 0.0)
        self._filled_s = now_s
        if self._tokens < 1.0 or self.rng.random() >= rate:
            return 0.0
        self._tokens -= 1.0
        return rate
