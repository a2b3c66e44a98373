"""How a fetch goes on after a failure: when it is tried again, what is said of it, when it ends. No I/O."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from edge_daemon.core.swap_events import Failure
from edge_daemon.errors import RefusedError
from edge_daemon.releases.http_fetch import DENIED, StatusError, UnreachableError
from edge_daemon.releases.limits import next_pause_s

GONE: Final = frozenset({404, 410})
GONE_BEFORE_REFUSAL: Final = 3
GONE_PAUSE_S: Final = 60.0
"""At least. A proxy whose hub restarts, and a hub whose files are put back, say so too, for a while."""
FIRST_REMINDER_S: Final = 3600.0
LONGEST_REMINDER_S: Final = 86400.0
"""How long nothing is said again of a hub that does not let this board in; twice as long each time."""


@dataclass(frozen=True, slots=True)
class NextTry:
    """Wait `delay_s`. `told` is for people, for the log too where it `is_news`.

    `is_denied`: no try will do until somebody acts.
    """

    delay_s: float
    told: str
    is_news: bool
    is_denied: bool = False


@dataclass(slots=True)
class Tries:
    """The tries of one fetch with the same token and authority."""

    failures: int = 0
    gone: Counter[str] = field(default_factory=Counter)
    reminder_due_s: float = -math.inf
    reminder_s: float = FIRST_REMINDER_S

    def after(
        self, error: UnreachableError | StatusError, *, has_come: bool, now_s: float, rng: random.Random
    ) -> NextTry:
        """What follows from one more failure. `has_come`: bytes came before it.

        Raises:
            RefusedError: DOWNLOAD, for a file that the hub does not have, again and again.
        """
        is_cut = has_come and isinstance(error, UnreachableError)
        # A connection that is cut again and again but brings something is no reason to wait longer.
        self.failures = 1 if is_cut else self.failures + 1
        delay_s, told = next_pause_s(self.failures, rng), str(error)
        status = error.status if isinstance(error, StatusError) else None
        if status in DENIED:
            told = f"{told}: this board is not let in; exchange the token in releases.token_file"
            return NextTry(delay_s, told, self._is_reminder_due(now_s), is_denied=True)
        if status in GONE:
            self.gone[told] += 1
            if self.gone[told] >= GONE_BEFORE_REFUSAL:
                raise RefusedError(Failure.DOWNLOAD, told) from error
            delay_s += GONE_PAUSE_S
        return NextTry(delay_s, told, self.failures == 1)

    def _is_reminder_due(self, now_s: float) -> bool:
        if now_s < self.reminder_due_s:
            return False
        self.reminder_due_s = now_s + self.reminder_s
        self.reminder_s = min(2.0 * self.reminder_s, LONGEST_REMINDER_S)
        return True
