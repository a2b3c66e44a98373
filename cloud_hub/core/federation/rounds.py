"""One round of federated averaging, from its offer to its end. No I/O; time is an argument.

A round is a transaction. It collects updates, closes, is aggregated, judged, and then committed or rolled
back. When too few answer it is aborted. Two kinds:

- `RoundRules`: offered to a cohort. Once `quorum` of it have answered, the round waits `grace_s` more for
  stragglers and closes, or at once when all have. At `deadline_s` it closes with a quorum, and is aborted
  without.
- `BufferRules`: for devices that sleep (FedBuff, Nguyen 2022). The offer stands to every eligible device and
  there is no deadline: the round closes as soon as `buffer_size` have answered, from this training base or
  one at most `max_staleness` rounds older.

A device has one vote a round: its first. What comes from outside the cohort, again, too stale, or after
closing, is counted in the state and changes nothing else. An update belongs to the round that has it in
`votes`, and is spent with it, whatever becomes of the round; one that came late for a `BufferRules` round may
be offered to the next as a staler one.

What the shell owes, so that kill -9 at any moment neither loses the round nor counts anything twice:

- It stores the state before it carries out the effects that came with it, at least whenever `phase` or
  `cohort` changed; in between a lost state costs counters and what had passed of the grace. It carries the
  effects out in order.
- What an effect makes (the next base, the judgement) it stores before it says so by an event.
- Any effect may be asked for again and must then come to the same: `Aggregate` names its votes in their
  order, `Commit` and `RollBack` are known by their round, offers are retained.
- After a restart it says `Resumed` with the devices whose updates are in the store: what had not been heard
  of is counted, and what the phase asks for is asked for anew.

Times are seconds on the hub's wall clock, because a round survives restarts. Where it was set back while the
hub was down, a round closes as if it had begun, or reached its quorum, at the restart.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TypeAlias

import msgspec
from msgspec.structs import replace

from cloud_hub.core.federation.drift import Drifted
from cloud_hub.core.federation.guard import CannotJudge, Judgement, Kept, Worse, describe
from cloud_hub.core.federation.round_events import (
    Abort,
    Aggregate,
    Aggregated,
    ClearOffers,
    Commit,
    Committed,
    DeviceCameOnline,
    Effect,
    Ended,
    Event,
    Failed,
    Judge,
    Judged,
    Phase,
    Resumed,
    RollBack,
    RolledBack,
    SendOffer,
    Tick,
    UpdateCommitted,
)


class RoundRules(msgspec.Struct, frozen=True, tag="cohort"):
    """A round of a cohort. `max_late`: how many rounds old the training base of a vote may be.

    `min_votes` of those that close the round must stand screening; a result that the holdout is too small to
    judge is committed only with `commits_unjudged`.
    """

    cohort_size: int
    quorum: int
    grace_s: float
    deadline_s: float
    max_late: int = 0
    min_votes: int = 1
    commits_unjudged: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError where they contradict each other."""
        if not 1 <= self.quorum <= self.cohort_size:
            raise ValueError(f"quorum {self.quorum} is not in 1..{self.cohort_size}, the cohort's size")
        if not (0.0 < self.deadline_s < math.inf and 0.0 <= self.grace_s < math.inf):
            raise ValueError(f"grace {self.grace_s} s is below 0 or deadline {self.deadline_s} s not above")
        _check_votes(self.min_votes, self.quorum, self.max_late)


class BufferRules(msgspec.Struct, frozen=True, tag="buffer"):
    """A round of whoever answers. An offer stands for `offer_s` and is then made anew."""

    buffer_size: int
    max_staleness: int
    offer_s: float = 7 * 86_400.0
    min_votes: int = 1
    commits_unjudged: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError where they are out of range."""
        if not (self.buffer_size >= 1 and 0.0 < self.offer_s < math.inf):
            raise ValueError(f"a buffer of {self.buffer_size} with offers for {self.offer_s} s")
        _check_votes(self.min_votes, self.buffer_size, self.max_staleness)


Rules: TypeAlias = RoundRules | BufferRules


class RoundState(msgspec.Struct, frozen=True):
    """All that a round is, `msgspec` reads and writes it; with its rules, so that none change under it.

    `votes`: who has answered, in order, and how stale. `closes_s`: when time closes or aborts it, None where
    only votes do. `reason` is why it ended as it did. `counted` and `rejected` are the votes after screening;
    the other counts are of updates that changed nothing.
    """

    rules: Rules
    phase: Phase
    opened_s: float
    offered_s: float
    closes_s: float | None
    cohort: frozenset[str]
    votes: dict[str, int]
    reason: str = ""
    counted: int = 0
    rejected: int = 0
    foreign: int = 0
    repeated: int = 0
    stale: int = 0
    late: int = 0


Next: TypeAlias = tuple[RoundState, tuple[Effect, ...]]


def open_round(rules: Rules, cohort: Collection[str], *, now_s: float) -> Next:
    """A round offered to these devices; over at once when there are fewer than its quorum.

    Raises:
        ValueError: when the cohort is larger than the rules say.
    """
    closes_s = now_s + rules.deadline_s if isinstance(rules, RoundRules) else None
    state = RoundState(rules, Phase.COLLECTING, now_s, now_s, closes_s, frozenset(cohort), {})
    if isinstance(rules, RoundRules):
        if len(state.cohort) > rules.cohort_size:
            raise ValueError(f"a cohort of {len(state.cohort)}, the rules say {rules.cohort_size}")
        if len(state.cohort) < rules.quorum:
            reason = f"{len(state.cohort)} devices can be asked, quorum {rules.quorum}"
            return _enter(replace(state, reason=reason), Phase.ABORTED, now_s)
    return _enter(state, Phase.COLLECTING, now_s)


def next_round(state: RoundState, event: Event, *, now_s: float) -> Next:
    """What becomes of the round, and what is to be done, in this order. `now_s` is the wall clock."""
    if isinstance(event, Resumed):
        return _resume(state, event, now_s)
    # What time has closed is closed before the event is heard.
    state, first = _with_time(state, now_s)
    state, then = _hear(state, event, now_s)
    state, last = _with_time(state, now_s)
    return state, (*first, *then, *last)


def next_due_s(state: RoundState) -> float | None:
    """When a `Tick` is wanted next, None if only other events can move anything."""
    if state.phase is not Phase.COLLECTING:
        return None
    if isinstance(state.rules, BufferRules):
        return state.offered_s + state.rules.offer_s
    return state.closes_s


def _hear(state: RoundState, event: Event, now_s: float) -> Next:  # noqa: PLR0911 - a table
    match state.phase, event:
        case _, UpdateCommitted(device, staleness):
            return _count(state, device, staleness, now_s)
        case Phase.COLLECTING, DeviceCameOnline(device):
            return _offer(state, device, now_s)
        case Phase.COLLECTING, Tick():
            return _renew(state, now_s)
        case Phase.AGGREGATING, Aggregated(votes, rejected):
            return _screened(replace(state, counted=votes, rejected=rejected), now_s)
        case Phase.JUDGING, Judged(judgement):
            return _judged(replace(state, reason=describe(judgement)), judgement, now_s)
        case Phase.AGGREGATING | Phase.JUDGING, Failed(reason):
            return _enter(replace(state, reason=reason), Phase.ROLLING_BACK, now_s)
        case Phase.COLLECTING | Phase.AGGREGATING | Phase.JUDGING, Abort(reason):
            return _enter(replace(state, reason=reason), Phase.ABORTING, now_s)
        case Phase.COMMITTING, Committed():
            return _enter(state, Phase.COMMITTED, now_s)
        case Phase.ROLLING_BACK, RolledBack():
            return _enter(state, Phase.ROLLED_BACK, now_s)
        case Phase.ABORTING, RolledBack():
            return _enter(state, Phase.ABORTED, now_s)
        case _:
            # What comes at another time is an echo: of an effect asked for twice, or of an earlier round.
            return state, ()


def _enter(state: RoundState, phase: Phase, now_s: float) -> Next:
    state = replace(state, phase=phase)
    return state, _asked(state, now_s)


def _asked(state: RoundState, now_s: float) -> tuple[Effect, ...]:  # noqa: PLR0911 - a table
    """What this phase asks for, on entering it and again after a restart."""
    waiting = tuple(sorted(state.cohort - state.votes.keys()))
    cleared = (ClearOffers(waiting),) if waiting else ()
    match state.phase:
        case Phase.COLLECTING:
            return (SendOffer(waiting, _seconds_left(state, now_s)),) if waiting else ()
        case Phase.AGGREGATING:
            return (*cleared, Aggregate(state.votes))
        case Phase.JUDGING:
            return (Judge(),)
        case Phase.COMMITTING:
            return (Commit(),)
        case Phase.ROLLING_BACK:
            return (RollBack(state.reason),)
        case Phase.ABORTING:
            return (*cleared, RollBack(state.reason))
        case Phase.COMMITTED | Phase.ROLLED_BACK | Phase.ABORTED:
            return (Ended(state.phase, state.reason),)


def _resume(state: RoundState, resumed: Resumed, now_s: float) -> Next:
    """Votes first: they were in the store before the hub went down, whatever the time is now."""
    if state.phase is Phase.COLLECTING:
        state = replace(state, offered_s=now_s)
        for device, staleness in resumed.committed.items():
            if device not in state.votes:
                state, _ = _count(state, device, staleness, now_s)
        state, _ = _with_time(_not_beyond(state, now_s), now_s)
    asked = _asked(state, now_s)
    if state.votes and state.phase in {Phase.COLLECTING, Phase.AGGREGATING, Phase.ABORTING}:
        return state, (ClearOffers(tuple(sorted(state.votes))), *asked)
    return state, asked


def _not_beyond(state: RoundState, now_s: float) -> RoundState:
    """No round closes later than its rules allow from now: the clock may have been set back meanwhile."""
    rules = state.rules
    if isinstance(rules, BufferRules) or state.closes_s is None:
        return state
    longest_s = rules.grace_s if len(state.votes) >= rules.quorum else rules.deadline_s
    return replace(state, closes_s=min(state.closes_s, now_s + longest_s))


def _with_time(state: RoundState, now_s: float) -> Next:
    if state.phase is not Phase.COLLECTING:
        return state, ()
    if _is_full(state):
        return _enter(state, Phase.AGGREGATING, now_s)
    if not isinstance(state.rules, RoundRules) or state.closes_s is None or now_s < state.closes_s:
        return state, ()
    if len(state.votes) >= state.rules.quorum:
        return _enter(state, Phase.AGGREGATING, now_s)
    reason = (
        f"{len(state.votes)} of {len(state.cohort)} asked have answered, quorum {state.rules.quorum}, "
        f"after {now_s - state.opened_s:.0f} s"
    )
    return _enter(replace(state, reason=reason), Phase.ABORTING, now_s)


def _is_full(state: RoundState) -> bool:
    match state.rules:
        case RoundRules():
            return len(state.votes) == len(state.cohort)
        case BufferRules(buffer_size=buffer_size):
            return len(state.votes) >= buffer_size


def _count(state: RoundState, device: str, staleness: int, now_s: float) -> Next:
    match state.rules:
        case RoundRules(max_late=max_staleness):
            is_foreign = device not in state.cohort
        case BufferRules(max_staleness=max_staleness):
            is_foreign = False
    if is_foreign:
        return replace(state, foreign=state.foreign + 1), ()
    if device in state.votes:
        return replace(state, repeated=state.repeated + 1), ()
    if state.phase is not Phase.COLLECTING or _is_full(state):
        return replace(state, late=state.late + 1), ()
    if staleness > max_staleness:
        return replace(state, stale=state.stale + 1), ()
    cohort = state.cohort if device in state.cohort else state.cohort | {device}
    state = replace(state, votes={**state.votes, device: staleness}, cohort=cohort)
    return _with_grace(state, now_s), (ClearOffers((device,)),)


def _with_grace(state: RoundState, now_s: float) -> RoundState:
    """The vote that makes the quorum starts the grace."""
    rules = state.rules
    if isinstance(rules, BufferRules) or state.closes_s is None or len(state.votes) != rules.quorum:
        return state
    return replace(state, closes_s=min(state.closes_s, now_s + rules.grace_s))


def _offer(state: RoundState, device: str, now_s: float) -> Next:
    if isinstance(state.rules, BufferRules):
        state = replace(state, cohort=state.cohort | {device})
    if device not in state.cohort or device in state.votes:
        return state, ()
    return state, (SendOffer((device,), _seconds_left(state, now_s)),)


def _renew(state: RoundState, now_s: float) -> Next:
    """Make offers anew that have run out."""
    rules = state.rules
    if isinstance(rules, RoundRules) or now_s < state.offered_s + rules.offer_s:
        return state, ()
    state = replace(state, offered_s=now_s)
    return state, _asked(state, now_s)


def _seconds_left(state: RoundState, now_s: float) -> float:
    match state.rules:
        case RoundRules():
            return 0.0 if state.closes_s is None else state.closes_s - now_s
        case BufferRules(offer_s=offer_s):
            return offer_s


def _screened(state: RoundState, now_s: float) -> Next:
    if state.counted >= state.rules.min_votes:
        return _enter(state, Phase.JUDGING, now_s)
    reason = (
        f"{state.counted} votes stood screening and {state.rejected} did not, {state.rules.min_votes} needed"
    )
    return _enter(replace(state, reason=reason), Phase.ROLLING_BACK, now_s)


def _judged(state: RoundState, judgement: Judgement, now_s: float) -> Next:
    match judgement:
        case Kept():
            return _enter(state, Phase.COMMITTING, now_s)
        case Worse() | Drifted():
            return _enter(state, Phase.ROLLING_BACK, now_s)
        case CannotJudge():
            commits = state.rules.commits_unjudged
            return _enter(state, Phase.COMMITTING if commits else Phase.ROLLING_BACK, now_s)


def _check_votes(min_votes: int, votes: int, max_staleness: int) -> None:
    if not (1 <= min_votes <= votes and max_staleness >= 0):
        raise ValueError(
            f"at least {min_votes} votes of {votes} from bases at most {max_staleness} rounds old"
        )
