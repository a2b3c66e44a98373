"""When a board takes part in a round of federated averaging, for one model. No I/O.

    idle -> offered -> (fetching the base) -> training -> appending -> appended -> idle

Rules:

- One update per round, ever: a round is voted in as soon as its training is done. Offers are retained and
  come again with every connection; the last `REMEMBERED_ROUNDS` that were voted in are not taken up again.
- An offer that expires, is cleared or is replaced stops the training that runs for it. An update that is
  done is sent all the same: whether it comes too late is for the hub to say.
- The topic holds one offer for all models of a board, so the end of another model's round clears it too. What
  is cleared therefore ends after `CLEARED_GRACE_S`, unless the hub offers it again.
- Before the base is fetched, before training, and every `LOOK_AGAIN_S` while training runs, the board is
  surveyed. Too few examples or bad vitals: tried again for as long as the offer stands.
- The request for the base is repeated, the wait for it growing with full jitter (AWS Architecture Blog,
  2015). Bases that are not what the offer names are asked for from zeros, and given up after
  `BAD_BASES_A_ROUND`.
- A training that fails is tried at most `TRAININGS_A_ROUND` times in a round, whatever became of its offer
  in between; one that was stopped did not fail. One that diverged is not tried again.
  However often they are stopped, no more than `STARTS_A_ROUND` are begun.

Time is an argument, and so is chance.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, assert_never

from edge_cascade.messages import RoundTerms
from edge_daemon.core.rounds_events import (
    AppendUpdate,
    BaseArrived,
    BaseFailed,
    Cleared,
    Declined,
    Effect,
    Event,
    Note,
    Offered,
    Phase,
    RequestBase,
    StartTraining,
    StopTraining,
    Survey,
    Surveyed,
    Tick,
    TrainingDone,
    TrainingFailed,
    UpdateNotStored,
    UpdateSettled,
    UpdateStored,
)

REMEMBERED_ROUNDS: Final = 256
REMEMBERED_FAILURES: Final = 64
TRAININGS_A_ROUND: Final = 2
STARTS_A_ROUND: Final = 6
BAD_BASES_A_ROUND: Final = 3
OFFER_SPREAD_S: Final = 2.0
"""Every board of a cohort hears the offer at once; they must not ask at once."""
LONGEST_OFFER_S: Final = 7 * 86400.0
"""The time left is not signed: nobody can make a board train for longer than this."""
CLEARED_GRACE_S: Final = 5.0
LOOK_AGAIN_S: Final = 10.0
LONGEST_RECHECK_S: Final = 60.0
SHORTEST_RECHECK_S: Final = 0.5
FIRST_PAUSE_S: Final = 1.0
LONGEST_PAUSE_S: Final = 300.0
BASE_PATIENCE_S: Final = 5.0
SLOW_LINK_BYTES_PER_S: Final = 16 * 1024
"""A base is not asked for again before it could have come over such a link."""


@dataclass(frozen=True, slots=True)
class RoundLimits:
    """`max_passes`: examples times epochs that one training may cost, whatever the hub asks for."""

    max_passes: int


@dataclass(frozen=True, slots=True)
class Offer:
    """An offer that was believed, and the monotonic second at which it ends.

    `is_cleared`: nothing is begun for it any more.
    """

    terms: RoundTerms
    ends_at_s: float
    is_cleared: bool = False


@dataclass(frozen=True, slots=True)
class RoundsState:
    """Where one model's rounds stand. `due_s`: when something is done next without an event.

    `failures`, `starts`: failed and begun trainings by round; `noted`: why the present offer is not being
    worked on.
    """

    phase: Phase = Phase.IDLE
    offer: Offer | None = None
    voted: tuple[str, ...] = ()
    failures: Mapping[str, int] = field(default_factory=dict)
    starts: Mapping[str, int] = field(default_factory=dict)
    due_s: float = 0.0
    is_surveying: bool = False
    requests: int = 0
    bad_bases: int = 0
    pauses: int = 0
    noted: Declined | None = None


def examples_wanted(terms: RoundTerms, limits: RoundLimits) -> int:
    """How many examples a training of these terms may use; fewer than `min_examples`: it is too costly."""
    return min(terms.max_examples, limits.max_passes // terms.epochs)


def next_state(  # noqa: PLR0912 - one branch an event
    state: RoundsState, event: Event, *, now_s: float, limits: RoundLimits, rng: random.Random
) -> tuple[RoundsState, list[Effect]]:
    """What becomes of the state, and what is to be done, in this order. `now_s` is monotonic."""
    effects: list[Effect] = []
    if state.offer is not None and now_s >= state.offer.ends_at_s and not isinstance(event, Offered):
        state, effects = _withdraw(state, Declined.CLEARED if state.offer.is_cleared else Declined.EXPIRED)
    match event:
        case Offered():
            state, effects = _take_up(state, event, now_s, limits, rng)
        case Cleared():
            state = _cleared(state, now_s)
        case Surveyed():
            state, more = _surveyed(replace(state, is_surveying=False), event, now_s, limits, rng)
            effects += more
        case BaseArrived():
            if state.phase is Phase.FETCHING:
                state = replace(state, phase=Phase.OFFERED, due_s=now_s)
        case BaseFailed():
            if state.phase is Phase.FETCHING:
                state, more = _bad_base(state, event, now_s, rng)
                effects += more
        case TrainingDone():
            if state.phase is Phase.TRAINING and state.offer is not None:
                voted = (*state.voted, state.offer.terms.round_id)[-REMEMBERED_ROUNDS:]
                state = replace(state, phase=Phase.APPENDING, voted=voted, pauses=0, due_s=now_s)
        case TrainingFailed():
            if state.phase is Phase.TRAINING and state.offer is not None:
                state, more = _failed(state, state.offer, event, now_s, rng)
                effects += more
        case UpdateStored():
            if state.phase is Phase.APPENDING:
                state = _stored(state, now_s)
        case UpdateNotStored():
            if state.phase is Phase.APPENDING:
                pauses = state.pauses + 1
                state = replace(state, pauses=pauses, due_s=now_s + _pause_s(pauses, rng))
        case UpdateSettled():
            if state.phase is Phase.APPENDED:
                state = replace(state, phase=Phase.IDLE)
            elif state.phase is Phase.OFFERED:
                # It may have been what the board waited for.
                state = replace(state, due_s=min(state.due_s, now_s))
        case Tick():
            pass
        case _:
            assert_never(event)
    return _with_due(state, effects, now_s, rng)


def next_due_s(state: RoundsState) -> float | None:
    """When a `Tick` is wanted next, None if only events can move anything."""
    due = [state.offer.ends_at_s] if state.offer is not None else []
    if state.phase is Phase.APPENDING or (_may_begin(state) and not state.is_surveying):
        due.append(state.due_s)
    return min(due, default=None)


def _is_at_work(state: RoundsState) -> bool:
    return state.phase in {Phase.OFFERED, Phase.FETCHING, Phase.TRAINING}


def _may_begin(state: RoundsState) -> bool:
    return state.offer is not None and not state.offer.is_cleared and _is_at_work(state)


def _take_up(
    state: RoundsState, offered: Offered, now_s: float, limits: RoundLimits, rng: random.Random
) -> tuple[RoundsState, list[Effect]]:
    terms = offered.terms
    offer = Offer(terms, now_s + min(offered.seconds_left, LONGEST_OFFER_S))
    if state.offer is not None and state.offer.terms == terms:
        # The same one, as it comes with every connection.
        return replace(state, offer=offer), []
    state, effects = _withdraw(state, Declined.REPLACED)
    if terms.round_id in state.voted or offered.seconds_left <= 0:
        return state, effects
    if state.failures.get(terms.round_id, 0) >= TRAININGS_A_ROUND:
        return state, effects
    wanted = examples_wanted(terms, limits)
    if wanted < terms.min_examples:
        detail = (
            f"{terms.epochs} epochs of {terms.min_examples} examples are more than the "
            f"{limits.max_passes} passes that training.max_passes allows"
        )
        return _give_up(state, terms.round_id), [*effects, Note(Declined.TOO_COSTLY, detail)]
    state = replace(state, offer=offer, noted=None, requests=0, bad_bases=0)
    if state.phase is Phase.APPENDING:
        # First what is done already: `_stored` goes on from there.
        return state, effects
    spread_s = min(OFFER_SPREAD_S, offered.seconds_left / 20)
    return replace(state, phase=Phase.OFFERED, due_s=now_s + rng.uniform(0.0, spread_s)), effects


def _cleared(state: RoundsState, now_s: float) -> RoundsState:
    if state.offer is None:
        return state
    ends_at_s = min(state.offer.ends_at_s, now_s + CLEARED_GRACE_S)
    return replace(state, offer=replace(state.offer, ends_at_s=ends_at_s, is_cleared=True))


def _withdraw(state: RoundsState, why: Declined) -> tuple[RoundsState, list[Effect]]:
    """The present offer is gone. What is done for it already is still sent."""
    if state.offer is None:
        return state, []
    effects: list[Effect] = []
    if state.phase is Phase.TRAINING:
        effects.append(StopTraining(why.value))
    if _is_at_work(state):
        effects.append(Note(why, f"round {state.offer.terms.round_id}"))
        state = replace(state, phase=Phase.IDLE)
    return replace(state, offer=None), effects


def _surveyed(
    state: RoundsState, survey: Surveyed, now_s: float, limits: RoundLimits, rng: random.Random
) -> tuple[RoundsState, list[Effect]]:
    offer = state.offer
    if offer is None or offer.is_cleared or state.phase not in {Phase.OFFERED, Phase.TRAINING}:
        return state, []
    is_training = state.phase is Phase.TRAINING
    note = _objection(offer.terms, survey, is_training=is_training)
    if note is not None:
        stops: list[Effect] = [StopTraining(note.detail)] if is_training else []
        state, effects = _put_off(state, offer, note, now_s, rng)
        return state, stops + effects
    if is_training:
        return replace(state, due_s=now_s + LOOK_AGAIN_S), []
    if not survey.has_base:
        return _request(replace(state, phase=Phase.FETCHING, noted=None), offer, now_s, rng)
    return _start(state, offer, now_s, limits)


def _start(
    state: RoundsState, offer: Offer, now_s: float, limits: RoundLimits
) -> tuple[RoundsState, list[Effect]]:
    round_id = offer.terms.round_id
    starts = state.starts.get(round_id, 0) + 1
    if starts > STARTS_A_ROUND:
        note = Note(Declined.TOO_COSTLY, f"{STARTS_A_ROUND} trainings were begun and none came to its end")
        return replace(_give_up(state, round_id), phase=Phase.IDLE, offer=None), [note]
    state = replace(state, starts=_remembered({**state.starts, round_id: starts}))
    state = replace(state, phase=Phase.TRAINING, due_s=now_s + LOOK_AGAIN_S, noted=None)
    return state, [StartTraining(offer.terms, examples_wanted(offer.terms, limits), offer.ends_at_s)]


def _objection(terms: RoundTerms, survey: Surveyed, *, is_training: bool) -> Note | None:
    """Why not now. What trains has its examples."""
    if not is_training and survey.examples < terms.min_examples:
        return Note(Declined.TOO_FEW, f"{survey.examples} examples, the round asks for {terms.min_examples}")
    return None if survey.obstacle is None else Note(Declined.NOT_NOW, survey.obstacle)


def _put_off(
    state: RoundsState, offer: Offer, note: Note, now_s: float, rng: random.Random
) -> tuple[RoundsState, list[Effect]]:
    """Look again later, within what is left of the offer; say so once for each reason."""
    ceiling_s = min(LONGEST_RECHECK_S, max((offer.ends_at_s - now_s) / 8, SHORTEST_RECHECK_S))
    due_s = now_s + rng.uniform(ceiling_s / 2, ceiling_s)
    effects: list[Effect] = [] if state.noted is note.why else [note]
    return replace(state, phase=Phase.OFFERED, due_s=due_s, noted=note.why), effects


def _request(
    state: RoundsState, offer: Offer, now_s: float, rng: random.Random
) -> tuple[RoundsState, list[Effect]]:
    patience_s = BASE_PATIENCE_S + offer.terms.base_bytes / SLOW_LINK_BYTES_PER_S
    requests = state.requests + 1
    due_s = now_s + patience_s + _pause_s(requests, rng)
    effect = RequestBase(offer.terms, from_zeros=state.bad_bases > 0)
    return replace(state, requests=requests, due_s=due_s), [effect]


def _bad_base(
    state: RoundsState, event: BaseFailed, now_s: float, rng: random.Random
) -> tuple[RoundsState, list[Effect]]:
    assert state.offer is not None
    round_id, bad_bases = state.offer.terms.round_id, state.bad_bases + 1
    note = Note(Declined.BAD_BASE, event.reason)
    if bad_bases >= BAD_BASES_A_ROUND:
        state = _give_up(state, round_id)
        return replace(state, phase=Phase.IDLE, offer=None), [note]
    return replace(state, bad_bases=bad_bases, due_s=now_s + _pause_s(bad_bases, rng)), [note]


def _failed(
    state: RoundsState, offer: Offer, event: TrainingFailed, now_s: float, rng: random.Random
) -> tuple[RoundsState, list[Effect]]:
    round_id = offer.terms.round_id
    failures = state.failures.get(round_id, 0) + 1
    state = replace(state, failures=_remembered({**state.failures, round_id: failures}))
    if failures >= TRAININGS_A_ROUND or event.why is Declined.DIVERGED:
        state = _give_up(state, round_id)
        return replace(state, phase=Phase.IDLE, offer=None), [Note(event.why, event.reason)]
    return replace(state, phase=Phase.OFFERED, due_s=now_s + _pause_s(failures, rng)), []


def _stored(state: RoundsState, now_s: float) -> RoundsState:
    if state.offer is None or state.offer.terms.round_id in state.voted:
        return replace(state, phase=Phase.APPENDED)
    return replace(state, phase=Phase.OFFERED, due_s=now_s)


def _with_due(
    state: RoundsState, effects: list[Effect], now_s: float, rng: random.Random
) -> tuple[RoundsState, list[Effect]]:
    """What is due. One survey at a time: its answer is an event."""
    if state.phase is Phase.APPENDING and now_s >= state.due_s:
        state = replace(state, due_s=now_s + LONGEST_RECHECK_S)
        return state, [*effects, AppendUpdate()]
    offer = state.offer
    if offer is None or not _may_begin(state) or state.is_surveying or now_s < state.due_s:
        return state, effects
    if state.phase is Phase.FETCHING:
        state, more = _request(state, offer, now_s, rng)
        return state, [*effects, *more]
    return replace(state, is_surveying=True), [*effects, Survey(offer.terms)]


def _give_up(state: RoundsState, round_id: str) -> RoundsState:
    return replace(state, failures=_remembered({**state.failures, round_id: TRAININGS_A_ROUND}))


def _remembered(counts: dict[str, int]) -> dict[str, int]:
    while len(counts) > REMEMBERED_FAILURES:
        del counts[next(iter(counts))]
    return counts


def _pause_s(failures: int, rng: random.Random) -> float:
    return rng.uniform(0.0, min(FIRST_PAUSE_S * 2.0 ** min(failures, 16), LONGEST_PAUSE_S))
