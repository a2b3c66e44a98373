"""When a board of the virtual fleet is killed, so that a release looks like one that crashes. No I/O.

By what the board itself has written down, not by when somebody looks: a process that is killed before it has
noted its start has crashed for nobody, and one that has ended already cannot be killed again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from edge_daemon.core.swap_state import SwapState

KILLS: Final = 3
"""As many crashes as bring a board back by itself."""
KILL_AFTER: Final = 20
"""Answers of the release that crashes."""


@dataclass(frozen=True, slots=True)
class Victim:
    """How often a board was killed, and how many answers of the release it had given at the last time."""

    kills: int = 0
    answers: int = 0


def decide_kill(state: SwapState | None, bundle: str, victim: Victim, *, answers: int) -> bool:
    """Whether it is to be killed now: it has this bundle on probation, since its last kill, and has answered.

    `state` is what the board has on disk, None where there is nothing yet; `answers` counts all of its
    answers by `bundle`.
    """
    attempt = None if state is None else state.attempt
    if victim.kills >= KILLS or attempt is None or attempt.bundle != bundle:
        return False
    # A start that follows a crash is counted before anything answers.
    is_its_start = attempt.crashes >= victim.kills and attempt.probation_since_s is not None
    return is_its_start and answers >= victim.answers + KILL_AFTER
