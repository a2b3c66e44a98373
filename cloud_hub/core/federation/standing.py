"""How much a device is trusted after what it sent. No I/O, no clock: time is counted in rounds.

A fault costs `FAULT_POINTS`, an accepted update takes one point back, and at `QUARANTINE_POINTS` the device
is left out for a while, twice as long each time. So a device that sends one fault in four votes or fewer is
borne with; one that sends more cannot buy its way back with good updates in between.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cloud_hub.core.federation.screening import Reason, Rejected, Verdict

FAULTS: Final = frozenset(
    {
        Reason.EXAMPLES,
        Reason.KEYS,
        Reason.SHAPE,
        Reason.DTYPE,
        Reason.NOT_FINITE,
        Reason.MALFORMED,
        Reason.NORM,
    }
)
"""What a sound device does not send. To be late, or to send twice after a restart, is no fault."""

FAULT_POINTS: Final = 3
QUARANTINE_POINTS: Final = 9
FIRST_QUARANTINE_ROUNDS: Final = 8
MAX_QUARANTINE_ROUNDS: Final = 512


@dataclass(frozen=True, slots=True)
class Standing:
    """A device's record. It is in quarantine in every round before `barred_until`."""

    points: int = 0
    quarantines: int = 0
    barred_until: int = 0


def is_quarantined(standing: Standing, *, round_number: int) -> bool:
    """Whether the device is left out of this round."""
    return round_number < standing.barred_until


def next_standing(standing: Standing, verdict: Verdict, *, round_number: int) -> Standing:
    """The record after a verdict of this round.

    What arrives during a quarantine changes nothing. Whoever comes out of one is on probation: one more
    fault before the points have melted away, and it is back, for longer.
    """
    if is_quarantined(standing, round_number=round_number):
        return standing
    if not isinstance(verdict, Rejected):
        return Standing(max(standing.points - 1, 0), standing.quarantines, standing.barred_until)
    if verdict.reason not in FAULTS:
        return standing
    points = standing.points + FAULT_POINTS
    if points < QUARANTINE_POINTS:
        return Standing(points, standing.quarantines, standing.barred_until)
    # The shift is bounded as well as its result: a count read from a store may be anything.
    rounds = min(FIRST_QUARANTINE_ROUNDS << min(standing.quarantines, 16), MAX_QUARANTINE_ROUNDS)
    return Standing(QUARANTINE_POINTS - FAULT_POINTS, standing.quarantines + 1, round_number + 1 + rounds)
