"""How many wrong tokens an address may show before it has to wait. No I/O; time is an argument."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Final

BURST: Final = 10.0
REFILL_PER_S: Final = 0.5
MAX_ADDRESSES: Final = 4096


class FailureLimit:
    """A leaking bucket of failures per address, of a bounded number of addresses."""

    def __init__(
        self, *, burst: float = BURST, refill_per_s: float = REFILL_PER_S, max_addresses: int = MAX_ADDRESSES
    ) -> None:
        self._burst = burst
        self._refill_per_s = refill_per_s
        self._max_addresses = max_addresses
        self._failures: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def note_failure(self, address: str, *, now_s: float) -> None:
        """Count one."""
        self._failures[address] = (self._level(address, now_s) + 1.0, now_s)
        self._failures.move_to_end(address)
        while len(self._failures) > self._max_addresses:
            self._failures.popitem(last=False)

    def wait_s(self, address: str, *, now_s: float) -> int:
        """Whole seconds that the address has to wait; 0 when it may try."""
        excess = self._level(address, now_s) - self._burst + 1.0
        return math.ceil(excess / self._refill_per_s) if excess > 0 else 0

    def _level(self, address: str, now_s: float) -> float:
        level, at_s = self._failures.get(address, (0.0, now_s))
        return max(0.0, level - (now_s - at_s) * self._refill_per_s)
