"""When to take rows from the spool, when to send them again, and when to give one up. No I/O.

A batch taken from the spool is a *flight*. It travels in *parts*, one frame each: cases that nobody has
complained about share one, everything else goes alone. Rules:

- Rows gather for `linger_s`, or until they fill a batch; at most `max_in_flight` flights.
- A part has `PUBLISH_TIMEOUT_S` to reach the broker and then `ack_timeout_s` to be acknowledged by the hub.
  When one is late, its flight goes back to the spool, and sending pauses: full jitter below a ceiling that
  doubles (AWS Architecture Blog, 2015). After a pause one row is sent, not a batch: a hub that is away for
  a week must not cost a week of batches on a metered line.
- A frame that the hub cannot read is split into its rows. A row refused alone is put back for a while, and
  given up only after `REFUSALS_BEFORE_DROP` refusals over at least `REFUSED_FOR_S`: an older hub, soon to be
  updated, looks just like a damaged row. A restart counts anew; in the end the row expires.
- Any acknowledgement ends the pause. The hub's greeting shortens it, and the wait for what is in the air.

Time is an argument, and so is chance.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, assert_never

from edge_daemon.core.sending_events import (
    Acked,
    Acknowledge,
    Claim,
    Claimed,
    Connected,
    Defer,
    Disconnected,
    Draining,
    Drop,
    Effect,
    Event,
    Greeted,
    NothingClaimed,
    NotSent,
    Published,
    Refused,
    Rejected,
    Release,
    Send,
    Tick,
    Waiting,
)
from edge_daemon.core.spooling import DropReason

PUBLISH_TIMEOUT_S: Final = 120.0
FIRST_PAUSE_S: Final = 1.0
LONGEST_PAUSE_S: Final = 300.0
FIRST_DEFER_S: Final = 60.0
LONGEST_DEFER_S: Final = 3600.0
REFUSALS_BEFORE_DROP: Final = 8
REFUSED_FOR_S: Final = 6 * 3600.0
GREETING_SPREAD_S: Final = 2.0
"""Every board hears the hub's greeting at once; they must not answer at once."""
POLL_S: Final = 30.0
"""The spool is asked this often even if nothing woke us: deferred rows make no noise when they are due."""
MAX_SUSPECTS: Final = 4096

Name = tuple[bytes, int]
"""Boot and sequence number."""


@dataclass(frozen=True, slots=True)
class SendingLimits:
    """What the configuration says of sending."""

    max_in_flight: int = 4
    max_items: int = 64
    max_bytes: int = 98_304
    linger_s: float = 0.2
    ack_timeout_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Part:
    """The rows of one frame that are not settled, and until when they may take."""

    seqs: tuple[int, ...]
    deadline_s: float


@dataclass(frozen=True, slots=True)
class Flight:
    """A batch on its way."""

    boot: bytes
    parts: Mapping[int, Part]
    next_part: int


@dataclass(frozen=True, slots=True)
class Suspect:
    """A row that was refused alone."""

    refusals: int
    first_s: float


@dataclass(frozen=True, slots=True)
class SendingState:
    """Where sending stands. `failures` in a row; `claim_at_s` is when the spool is asked next."""

    is_up: bool = False
    is_draining: bool = False
    is_claiming: bool = False
    claim_at_s: float = 0.0
    pause_until_s: float = 0.0
    failures: int = 0
    flights: Mapping[int, Flight] = field(default_factory=dict)
    suspects: Mapping[Name, Suspect] = field(default_factory=dict)


def next_state(  # noqa: PLR0912 - one branch an event
    state: SendingState, event: Event, *, now_s: float, limits: SendingLimits, rng: random.Random
) -> tuple[SendingState, list[Effect]]:
    """What becomes of the state, and what is to be done, in this order. `now_s` is monotonic."""
    effects: list[Effect] = []
    match event:
        case Connected():
            state = replace(state, is_up=True, claim_at_s=now_s, pause_until_s=now_s)
        case Disconnected():
            effects += [Release(token) for token in state.flights]
            state = replace(state, is_up=False, flights={})
        case Waiting():
            state = _with_waiting(state, event, now_s, limits)
        case Claimed():
            state, effects = _take_off(state, event, now_s, limits)
        case NothingClaimed():
            state = replace(state, is_claiming=False, claim_at_s=now_s + POLL_S)
        case Published():
            state = _with_deadline(state, event.token, event.part, now_s + limits.ack_timeout_s)
        case NotSent():
            if event.token in state.flights:
                state, effects = _give_back(state, [event.token], now_s, rng)
        case Acked():
            effects.append(Acknowledge(event.boot, event.seqs))
            state = _heard(_settle(state, event.boot, event.seqs), now_s)
        case Greeted():
            # One row is tried first, as after any pause: the hub may have fallen again.
            soon_s = now_s + rng.uniform(0.0, GREETING_SPREAD_S)
            state = replace(_hurried(state, soon_s), pause_until_s=min(state.pause_until_s, soon_s))
        case Rejected():
            effects += [Drop(event.boot, seq, DropReason.REJECTED) for seq in event.seqs]
            state = _heard(_settle(state, event.boot, event.seqs), now_s)
        case Refused():
            state, effects = _refused(state, event, now_s, rng)
        case Draining():
            state = replace(state, is_draining=True, claim_at_s=now_s)
        case Tick():
            late = [token for token, flight in state.flights.items() if _deadline_s(flight) <= now_s]
            if late:
                state, effects = _give_back(state, late, now_s, rng)
        case _:
            assert_never(event)
    return _with_claim(state, effects, now_s, limits)


def next_due_s(state: SendingState, limits: SendingLimits) -> float | None:
    """When a `Tick` is wanted next, None if only events can move anything."""
    due = [_deadline_s(flight) for flight in state.flights.values()]
    if state.is_up and len(state.flights) < _slots(state, limits):
        due.append(max(state.claim_at_s, state.pause_until_s))
    return min(due, default=None)


def _with_claim(
    state: SendingState, effects: list[Effect], now_s: float, limits: SendingLimits
) -> tuple[SendingState, list[Effect]]:
    """Claim, if it is time and there is a slot. One claim at a time: its answer is an event."""
    if (
        state.is_up
        and not state.is_claiming
        and len(state.flights) < _slots(state, limits)
        and now_s >= max(state.claim_at_s, state.pause_until_s)
    ):
        max_items = 1 if state.failures else limits.max_items
        return replace(state, is_claiming=True), [*effects, Claim(max_items, limits.max_bytes)]
    return state, effects


def _slots(state: SendingState, limits: SendingLimits) -> int:
    return 1 if state.failures else limits.max_in_flight


def _with_waiting(state: SendingState, waiting: Waiting, now_s: float, limits: SendingLimits) -> SendingState:
    if waiting.rows <= 0:
        return state
    is_full = waiting.rows >= limits.max_items or waiting.size_bytes >= limits.max_bytes
    due_s = now_s if is_full or state.is_draining else now_s + limits.linger_s
    return replace(state, claim_at_s=min(state.claim_at_s, due_s))


def _take_off(
    state: SendingState, claimed: Claimed, now_s: float, limits: SendingLimits
) -> tuple[SendingState, list[Effect]]:
    if claimed.is_shared:
        together = tuple(seq for seq in claimed.seqs if (claimed.boot, seq) not in state.suspects)
        alone = [seq for seq in claimed.seqs if (claimed.boot, seq) in state.suspects]
        groups = [together, *((seq,) for seq in alone)] if together else [(seq,) for seq in alone]
    else:
        groups = [(seq,) for seq in claimed.seqs]
    parts = {index: Part(seqs, now_s + PUBLISH_TIMEOUT_S) for index, seqs in enumerate(groups)}
    flight = Flight(claimed.boot, parts, len(parts))
    state = replace(
        state,
        is_claiming=False,
        claim_at_s=now_s + POLL_S,
        flights={**state.flights, claimed.token: flight},
    )
    state = _with_waiting(state, claimed.left, now_s, limits)
    if not state.is_up:
        # The session went down while the spool was asked.
        return replace(state, flights=_without(state.flights, [claimed.token])), [Release(claimed.token)]
    return state, [Send(claimed.token, index, part.seqs) for index, part in parts.items()]


def _with_deadline(state: SendingState, token: int, part: int, deadline_s: float) -> SendingState:
    flight = state.flights.get(token)
    if flight is None or part not in flight.parts:
        return state
    parts = {**flight.parts, part: replace(flight.parts[part], deadline_s=deadline_s)}
    return replace(state, flights={**state.flights, token: replace(flight, parts=parts)})


def _hurried(state: SendingState, deadline_s: float) -> SendingState:
    """What is in the air may have reached the broker before the hub did: then nobody will acknowledge it."""
    flights = {
        token: replace(
            flight,
            parts={
                index: replace(part, deadline_s=min(part.deadline_s, deadline_s))
                for index, part in flight.parts.items()
            },
        )
        for token, flight in state.flights.items()
    }
    return replace(state, flights=flights)


def _settle(state: SendingState, boot: bytes, seqs: tuple[int, ...]) -> SendingState:
    """Take settled rows out of their flights, and flights without rows out of the air."""
    settled = frozenset(seqs)
    flights: dict[int, Flight] = {}
    for token, flight in state.flights.items():
        if flight.boot == boot:
            parts = {
                index: replace(part, seqs=left)
                for index, part in flight.parts.items()
                if (left := tuple(seq for seq in part.seqs if seq not in settled))
            }
            if parts:
                flights[token] = replace(flight, parts=parts)
        else:
            flights[token] = flight
    names = {(boot, seq) for seq in seqs}
    suspects = {name: suspect for name, suspect in state.suspects.items() if name not in names}
    return replace(state, flights=flights, suspects=suspects)


def _heard(state: SendingState, now_s: float) -> SendingState:
    """The hub is there and can read us."""
    if not state.failures:
        return state
    return replace(state, failures=0, pause_until_s=now_s, claim_at_s=now_s)


def _refused(
    state: SendingState, event: Refused, now_s: float, rng: random.Random
) -> tuple[SendingState, list[Effect]]:
    flight = state.flights.get(event.token)
    if flight is None or event.part not in flight.parts:
        return state, []
    refused = flight.parts[event.part]
    if len(refused.seqs) > 1:
        return _split(state, event.token, event.part, now_s)
    (seq,) = refused.seqs
    name = (flight.boot, seq)
    before = state.suspects.get(name, Suspect(0, now_s))
    suspect = replace(before, refusals=before.refusals + 1)
    state = _settle(state, flight.boot, (seq,))
    if suspect.refusals >= REFUSALS_BEFORE_DROP and now_s - suspect.first_s >= REFUSED_FOR_S:
        return _failed(state, now_s, rng), [Drop(flight.boot, seq, DropReason.REFUSED)]
    suspects = {**state.suspects, name: suspect}
    while len(suspects) > MAX_SUSPECTS:
        del suspects[next(iter(suspects))]
    ceiling_s = min(FIRST_DEFER_S * 2 ** (suspect.refusals - 1), LONGEST_DEFER_S)
    delay_s = rng.uniform(ceiling_s / 2, ceiling_s)
    return _failed(replace(state, suspects=suspects), now_s, rng), [Defer(flight.boot, seq, delay_s)]


def _split(state: SendingState, token: int, part: int, now_s: float) -> tuple[SendingState, list[Effect]]:
    """Send each row of a refused frame alone: one of them may be what the hub cannot read."""
    flight = state.flights[token]
    parts = dict(flight.parts)
    seqs = parts.pop(part).seqs
    singles = {
        index: Part((seq,), now_s + PUBLISH_TIMEOUT_S)
        for index, seq in enumerate(seqs, start=flight.next_part)
    }
    flight = replace(flight, parts={**parts, **singles}, next_part=flight.next_part + len(seqs))
    return (
        replace(state, flights={**state.flights, token: flight}),
        [Send(token, index, single.seqs) for index, single in singles.items()],
    )


def _give_back(
    state: SendingState, tokens: list[int], now_s: float, rng: random.Random
) -> tuple[SendingState, list[Effect]]:
    state = replace(state, flights=_without(state.flights, tokens), claim_at_s=now_s)
    return _failed(state, now_s, rng), [Release(token) for token in tokens]


def _failed(state: SendingState, now_s: float, rng: random.Random) -> SendingState:
    """Pause. What fails during a pause was on its way before it, and makes the pause no longer."""
    if now_s < state.pause_until_s:
        return state
    ceiling_s = min(FIRST_PAUSE_S * 2.0 ** min(state.failures, 16), LONGEST_PAUSE_S)
    return replace(state, failures=state.failures + 1, pause_until_s=now_s + rng.uniform(0.0, ceiling_s))


def _without(flights: Mapping[int, Flight], tokens: list[int]) -> dict[int, Flight]:
    return {token: flight for token, flight in flights.items() if token not in tokens}


def _deadline_s(flight: Flight) -> float:
    return min(part.deadline_s for part in flight.parts.values())
