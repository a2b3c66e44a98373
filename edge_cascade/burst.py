"""One log line per burst of the same trouble, with the number that were kept back. No I/O, no clock."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

QUIET_S: Final = 30.0


@dataclass(slots=True)
class Burst:
    """Says of each event whether it deserves a line: the first, then one per `quiet_s` while it goes on."""

    quiet_s: float = QUIET_S
    _last_line_s: float | None = field(default=None, init=False)
    _kept_back: int = field(default=0, init=False)

    def note(self, *, now_s: float) -> int | None:
        """How many were kept back since the last line, if this one deserves a line; else None."""
        if self._last_line_s is not None and now_s - self._last_line_s < self.quiet_s:
            self._kept_back += 1
            return None
        kept_back, self._kept_back = self._kept_back, 0
        self._last_line_s = now_s
        return kept_back
