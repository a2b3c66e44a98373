"""The machine's clocks, behind the port `Clock`."""

from __future__ import annotations

import time


class SystemClock:
    """Monotonic time for everything that is measured, wall time for people to read."""

    def monotonic_s(self) -> float:
        """Seconds since some point that does not move."""
        return time.monotonic()

    def wall_ms(self) -> int:
        """Milliseconds since 1970 as this board believes; 0 before that."""
        return max(time.time_ns() // 1_000_000, 0)
