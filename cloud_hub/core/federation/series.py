"""Several committed rounds make one candidate for a release. No I/O, no clock.

After a committed round the next is opened. After one that was rolled back or aborted another is tried, from
the same base; its cohort will be another, for those just asked come last (`cohort.select_cohort`). After
`rounds` committed ones a candidate is made. More than `max_failures` in a row that were not committed are the
end. If the last was rolled back, there is nothing more to gain, or somebody pulls down; what was committed
before is good, and a candidate is made of it. Else, and where nothing was committed, the series fails.

Rounds are numbered without gaps, and every attempt has a number of its own: by it the shell knows whether it
has opened a round already, and the series which end it has heard of. So each effect may be asked for again
(after `Resumed`, or because the shell fell between storing and doing), and each event may come twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

import msgspec
from msgspec.structs import replace

from cloud_hub.core.federation.round_events import Phase


class SeriesPhase(Enum):
    """Where a series stands. The last three are its ends."""

    RUNNING = "running"
    MAKING = "making"
    MADE = "made"
    FAILED = "failed"
    ABORTED = "aborted"


class SeriesRules(msgspec.Struct, frozen=True):
    """`rounds` committed ones make a candidate; up to `max_failures` in a row are borne with."""

    rounds: int
    max_failures: int

    def __post_init__(self) -> None:
        """Raises ValueError where they are out of range."""
        if not (self.rounds >= 1 and self.max_failures >= 0):
            raise ValueError(f"a series of {self.rounds} rounds with at most {self.max_failures} failures")


class SeriesState(msgspec.Struct, frozen=True):
    """All that a series is; `msgspec` reads and writes it.

    `round_number`: the round that runs or ran last. `committed` rounds so far; `failures` in a row.
    """

    rules: SeriesRules
    phase: SeriesPhase
    round_number: int
    committed: int = 0
    failures: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class RoundEnded:
    """A round is over (`Ended`)."""

    number: int
    outcome: Phase
    reason: str


@dataclass(frozen=True, slots=True)
class SeriesResumed:
    """The hub has started again."""


@dataclass(frozen=True, slots=True)
class AbortSeries:
    """A person wants no more of it."""

    reason: str


@dataclass(frozen=True, slots=True)
class CandidateMade:
    """`MakeCandidate` is done: a draft is registered."""


@dataclass(frozen=True, slots=True)
class CandidateRefused:
    """What the rounds came to is no better than what is live, or could not be certified."""

    reason: str


SeriesEvent: TypeAlias = RoundEnded | SeriesResumed | AbortSeries | CandidateMade | CandidateRefused


@dataclass(frozen=True, slots=True)
class OpenRound:
    """Select a cohort and open the round of this number, if there is none. `failures` came before it."""

    number: int
    failures: int


@dataclass(frozen=True, slots=True)
class AbortRound:
    """Say `Abort` to the round of this number, if there is one."""

    number: int
    reason: str


@dataclass(frozen=True, slots=True)
class MakeCandidate:
    """Re-quantise, certify and register the training base as it stands; say `CandidateMade` or refused."""


@dataclass(frozen=True, slots=True)
class SeriesEnded:
    """The series is over."""

    outcome: SeriesPhase
    reason: str


SeriesEffect: TypeAlias = OpenRound | AbortRound | MakeCandidate | SeriesEnded
NextSeries: TypeAlias = tuple[SeriesState, tuple[SeriesEffect, ...]]


def open_series(rules: SeriesRules, *, first_round: int) -> NextSeries:
    """A series whose first round has this number."""
    return _enter(SeriesState(rules, SeriesPhase.RUNNING, first_round), SeriesPhase.RUNNING)


def next_series(state: SeriesState, event: SeriesEvent) -> NextSeries:
    """What becomes of the series, and what is to be done, in this order."""
    match state.phase, event:
        case _, SeriesResumed():
            return state, _asked(state)
        case SeriesPhase.RUNNING, RoundEnded(number, outcome, reason) if number == state.round_number:
            return _after_round(state, outcome, reason)
        case SeriesPhase.RUNNING | SeriesPhase.MAKING, AbortSeries(reason):
            return _enter(replace(state, reason=reason), SeriesPhase.ABORTED)
        case SeriesPhase.MAKING, CandidateMade():
            return _enter(state, SeriesPhase.MADE)
        case SeriesPhase.MAKING, CandidateRefused(reason):
            return _enter(replace(state, reason=reason), SeriesPhase.FAILED)
        case _:
            return state, ()


def _after_round(state: SeriesState, outcome: Phase, reason: str) -> NextSeries:
    if outcome is Phase.COMMITTED:
        state = replace(state, committed=state.committed + 1, failures=0)
        if state.committed >= state.rules.rounds:
            return _enter(state, SeriesPhase.MAKING)
        return _enter(replace(state, round_number=state.round_number + 1), SeriesPhase.RUNNING)
    state = replace(state, failures=state.failures + 1)
    if state.failures > state.rules.max_failures:
        told = (
            f"{state.failures} rounds in a row failed, {state.rules.max_failures} allowed; the last: {reason}"
        )
        if outcome is Phase.ROLLED_BACK and state.committed > 0:
            return _enter(replace(state, reason=told), SeriesPhase.MAKING)
        return _enter(replace(state, reason=told), SeriesPhase.FAILED)
    return _enter(replace(state, round_number=state.round_number + 1), SeriesPhase.RUNNING)


def _enter(state: SeriesState, phase: SeriesPhase) -> NextSeries:
    state = replace(state, phase=phase)
    return state, _asked(state)


def _asked(state: SeriesState) -> tuple[SeriesEffect, ...]:
    """What this phase asks for, on entering it and again after a restart."""
    match state.phase:
        case SeriesPhase.RUNNING:
            return (OpenRound(state.round_number, state.failures),)
        case SeriesPhase.MAKING:
            return (MakeCandidate(),)
        case SeriesPhase.ABORTED:
            # The round may not have heard of it before the hub went down.
            return (AbortRound(state.round_number, state.reason), SeriesEnded(state.phase, state.reason))
        case SeriesPhase.MADE | SeriesPhase.FAILED:
            return (SeriesEnded(state.phase, state.reason),)
