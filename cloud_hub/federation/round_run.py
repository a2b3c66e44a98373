"""One round at work: what its state machine asks for, carried out in order, each state stored first.

Whatever happens reaches the machine by `hear`. Its new state and all that belongs to it are one transaction,
and only then are its effects carried out; after a fault in between the round is loaded again and resumes
from what was stored.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence, Set
from dataclasses import dataclass
from typing import assert_never

import msgspec
from sqlalchemy import Connection

from cloud_hub.core.federation import round_events as heard
from cloud_hub.core.federation.cohort import select_eligible
from cloud_hub.core.federation.round_events import Effect, Ended, Event, Phase
from cloud_hub.core.federation.rounds import BufferRules, RoundState, next_due_s, next_round
from cloud_hub.core.federation.screening import Reason
from cloud_hub.core.federation.standing import is_quarantined
from cloud_hub.federation.closing import Finding
from cloud_hub.federation.membership import Facts, ask, eligible_of
from cloud_hub.federation.offers import Offers
from cloud_hub.federation.settings import terms_of
from cloud_hub.federation.workshop import NoResultError, RoundOfSeries, Workshop
from cloud_hub.store import schema
from cloud_hub.store.bases import BaseRow
from cloud_hub.store.members import (
    Member,
    MemberState,
    StoredUpdate,
    judge_members,
    note_updates,
    save_members,
    save_standings,
    standings_of,
    votes_in,
)
from cloud_hub.store.releases import look_at_holdout
from cloud_hub.store.rounds import save_round, save_series
from cloud_hub.store.store import Store
from edge_cascade.durable import crash_point
from edge_cascade.messages import RoundTerms

log = logging.getLogger(__name__)

Write = Callable[[Connection], None]


@dataclass(frozen=True, slots=True)
class Parts:
    """What the rounds of a series work with. `flush` publishes what `offers` holds."""

    store: Store
    workshop: Workshop
    offers: Offers
    flush: Callable[[], None]
    clock_s: Callable[[], float]


@dataclass(frozen=True, slots=True)
class After:
    """What the end of a round means to its series: written with it, and done once that is stored."""

    write: Write
    then: Callable[[], None]


class RoundRun:
    """A round that has not ended. `on_end` tells what its end means."""

    def __init__(
        self,
        parts: Parts,
        facts: Facts,
        *,
        round_id: str,
        number: int,
        lead: Sequence[BaseRow],
        state: RoundState,
        on_end: Callable[[int, Ended], After],
        result: bytes | None = None,
    ) -> None:
        self._parts = parts
        self._facts = facts
        self._ages = {base.digest: age for age, base in enumerate(lead)}
        self._on_end = on_end
        self._result = result
        self._has_offered = False
        self.base = lead[0]
        self.id = round_id
        self.number = number
        self.state = state

    @property
    def waiting(self) -> frozenset[str]:
        """The devices before which the offer stands."""
        if self.state.phase is not Phase.COLLECTING:
            return frozenset()
        return self.state.cohort - self.state.votes.keys()

    @property
    def terms(self) -> RoundTerms:
        """What the boards are told."""
        return terms_of(
            self._facts.settings,
            self._facts.model,
            self.id,
            graph=self._facts.graph,
            base=self.base.digest,
            base_bytes=self.base.size_bytes,
        )

    def may_take(self, round_id: str) -> bool:
        """Whether an update that names this round may be a vote here: its own, or an earlier one's."""
        return round_id == self.id or isinstance(self.state.rules, BufferRules)

    def hear(self, event: Event, *writes: Write) -> None:
        """Let the machine hear an event; `writes` belong to it."""
        state, effects = next_round(self.state, event, now_s=self._parts.clock_s())
        self.enter(state, effects, *writes)

    def enter(self, state: RoundState, effects: Iterable[Effect], *writes: Write) -> None:
        """Store a state with what belongs to it, then carry out what it asks for."""
        effects = tuple(effects)
        ended = next((effect for effect in effects if isinstance(effect, Ended)), None)
        after = None if ended is None else self._on_end(self.number, ended)

        def write(connection: Connection) -> None:
            for one in writes:
                one(connection)
            self._save(connection, state, ended)
            if after is not None:
                after.write(connection)

        self._parts.store.database.run(write)
        _pass_crash_points(self.state.phase, state.phase)
        self.state = state
        for effect in effects:
            self._carry_out(effect)
        self._publish()
        if after is not None:
            after.then()

    def resume(self) -> None:
        """Go on where the store says that the last run stopped."""
        stored = self._parts.store.database.run(lambda c: votes_in(c, self.id))
        self.hear(heard.Resumed({name: self._ages.get(u.training_base, 0) for name, u in stored.items()}))

    def tick(self) -> None:
        """Hear that time has passed, if that matters now."""
        due_s = next_due_s(self.state)
        if due_s is not None and self._parts.clock_s() >= due_s:
            self.hear(heard.Tick())

    def offer_again(self, devices: Collection[str]) -> None:
        """Put the offer anew before those of these devices that have not answered."""
        state = self.state
        waiting = [name for name in devices if name in state.cohort and name not in state.votes]
        if waiting and state.phase is Phase.COLLECTING:
            now_s = self._parts.clock_s()
            left_s = state.rules.offer_s if isinstance(state.rules, BufferRules) else _left_s(state, now_s)
            self._parts.offers.offer(sorted(waiting), self.terms, seconds_left=left_s)

    def came_online(self, devices: Collection[str]) -> None:
        """Put the offer before those of these devices that it is for."""
        if not isinstance(self.state.rules, BufferRules):
            self.offer_again(devices)
            return
        fleet = self._parts.store.database.run(lambda c: eligible_of(c, self._facts, devices, self._now_ms()))
        fresh = [
            each.device
            for each in select_eligible(fleet, round_number=self.number)
            if each.device not in self.state.votes
        ]
        state, effects = self.state, list[Effect]()
        for device in fresh:
            state, asked = next_round(state, heard.DeviceCameOnline(device), now_s=self._parts.clock_s())
            effects += asked
        if not fresh:
            return
        new = sorted(state.cohort - self.state.cohort)
        self.enter(state, effects, lambda c: ask(c, self._facts.model, self.id, self.number, new))

    def hear_updates(self, updates: Sequence[StoredUpdate]) -> None:
        """Count what was committed, a transaction for all of it.

        What comes late for a round without a cohort is left: it may be a vote in the next.
        """
        barred = self._barred({update.device for update in updates})
        state, effects, notes = self.state, list[Effect](), list[_Note]()
        is_buffer = isinstance(state.rules, BufferRules)
        for update in updates:
            if notes and is_buffer and state.phase is not Phase.COLLECTING:
                break
            reason = self._claim(update, barred)
            if reason is None:
                event = heard.UpdateCommitted(update.device, self._ages[update.training_base])
                following, asked = next_round(state, event, now_s=self._heard_s(state))
                reason = _said(state, following, update.device)
                state = following
                effects += asked
            notes.append(_Note(update, reason))
        self.enter(state, effects, lambda c: self._keep(c, notes, state.votes.keys()))

    def _heard_s(self, state: RoundState) -> float:
        """When an update is heard of: before the round closes, whatever kept this thread from closing it.

        As after a restart, what was committed before the round was closed counts.
        """
        now_s = self._parts.clock_s()
        return now_s if state.closes_s is None else min(now_s, math.nextafter(state.closes_s, -math.inf))

    def _claim(self, update: StoredUpdate, barred: Collection[str]) -> str | None:
        """Why an update is no vote whatever the machine says of it; None where it may be one."""
        if update.training_base not in self._ages:
            return Reason.WRONG_BASE.value
        return Reason.QUARANTINED.value if update.device in barred else None

    def _barred(self, devices: Collection[str]) -> set[str]:
        found = self._parts.store.database.run(lambda c: standings_of(c, self._facts.model, devices))
        return {name for name, one in found.items() if is_quarantined(one, round_number=self.number)}

    def _keep(self, connection: Connection, notes: Sequence[_Note], votes: Set[str]) -> None:
        note_updates(
            connection, [(note.update.id, self.id if note.reason is None else None) for note in notes]
        )
        cohort = self.state.cohort
        members = [
            note.member
            for note in notes
            if note.reason is None
            # Why a member has no vote; not what came from elsewhere, or beside its vote.
            or (note.update.round_id == self.id and note.update.device in cohort - votes)
        ]
        save_members(connection, self.id, members)
        counts = Counter(f"votes/{note.reason}" for note in notes if note.reason is not None)
        counts["round_bytes/up"] += sum(note.update.place.length for note in notes)
        schema.add_to_counters(connection, counts)

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case heard.SendOffer(devices, seconds_left):
                self._parts.offers.offer(devices, self.terms, seconds_left=seconds_left)
                self._has_offered = True
            case heard.ClearOffers(devices):
                self._parts.offers.clear(devices, self._facts.model)
            case heard.Aggregate(votes):
                # Boards need not wait for the arithmetic to hear that it is too late.
                self._publish()
                self._aggregate(tuple(votes))
            case heard.Judge():
                self._judge()
            case heard.Commit():
                assert self._result is not None
                self._facts.base = self._result
                base = self._result
                self.hear(heard.Committed(), lambda c: save_series(c, self._facts.id, base=base))
            case heard.RollBack():
                self.hear(heard.RolledBack())
            case Ended(outcome, reason):
                log.info("round ended round=%s outcome=%s reason=%s", self.id, outcome.value, reason)
            case _:
                assert_never(effect)

    def _publish(self) -> None:
        """All offers of a transaction together."""
        self._parts.flush()
        if self._has_offered:
            self._has_offered = False
            crash_point("hub.round-offered")

    def _aggregate(self, order: Sequence[str]) -> None:
        stored = self._parts.store.database.run(lambda c: votes_in(c, self.id))
        votes = [stored[device] for device in order if device in stored]
        older = {digest: age for digest, age in self._ages.items() if age > 0}
        try:
            made = self._parts.workshop.aggregate(self._of_series(), self._facts.settings, votes, older)
        except NoResultError as error:
            self.hear(heard.Failed(str(error)))
            return
        findings, new = made.of_boards, made.new

        def write(connection: Connection) -> None:
            judge_members(connection, self.id, map(_member_of, findings))
            save_standings(connection, self._facts.model, made.closed.standings)
            counts = Counter(f"votes/{_reason_of(finding) or 'counted'}" for finding in findings)
            schema.add_to_counters(connection, counts)
            if new is not None:
                new.keep(connection, now_ms=self._now_ms())
                save_round(connection, self.id, result=new.row.digest, **new.rule_columns)

        self._result = None if new is None else new.row.digest
        self.hear(heard.Aggregated(made.counted, len(findings) - made.counted), write)

    def _judge(self) -> None:
        try:
            judged = self._parts.workshop.judge(
                self._of_series(), self._facts.settings, self._facts.window_start
            )
        except NoResultError as error:
            self.hear(heard.Failed(str(error)))
            return
        self._facts.window_start = judged.window_start

        def write(connection: Connection) -> None:
            save_round(connection, self.id, guard=msgspec.json.encode(judged.figures).decode())
            save_series(connection, self._facts.id, window_start=judged.window_start)
            look_at_holdout(connection, self._facts.model, upto_id=judged.window_start)

        self.hear(heard.Judged(judged.judgement), write)

    def _of_series(self) -> RoundOfSeries:
        return RoundOfSeries(self._facts.id, self.id, self.number, self.base.digest, self._result)

    def _save(self, connection: Connection, state: RoundState, ended: Ended | None) -> None:
        encoded = msgspec.json.encode(state).decode()
        if ended is None:
            save_round(connection, self.id, state=encoded)
            return
        outcome = ended.outcome.value
        save_round(
            connection,
            self.id,
            state=encoded,
            outcome=outcome,
            why=ended.reason,
            closed_at_ms=self._now_ms(),
        )
        schema.add_to_counters(connection, {f"rounds/{self._facts.model}/{outcome}": 1})

    def _now_ms(self) -> int:
        return round(self._parts.clock_s() * 1000)


@dataclass(frozen=True, slots=True)
class _Note:
    """What is kept of an update: the reason why it is no vote, None where it is one."""

    update: StoredUpdate
    reason: str | None

    @property
    def member(self) -> Member:
        match self.reason:
            case None:
                state = MemberState.ANSWERED
            case "late":
                state = MemberState.LATE
            case _:
                state = MemberState.REJECTED
        update = self.update
        return Member(update.device, state, self.reason, None, update.num_examples, update.place.length)


def _said(before: RoundState, after: RoundState, device: str) -> str | None:
    """What the machine made of an update: the counter that it went into, None where it is a vote."""
    if device in after.votes and device not in before.votes:
        return None
    for name in ("foreign", "repeated", "stale", "late"):
        if getattr(after, name) > getattr(before, name):
            return name
    return "late"


def _member_of(finding: Finding) -> Member:
    state = MemberState.COUNTED if finding.reason is None else MemberState.REJECTED
    return Member(finding.device, state, _reason_of(finding), finding.detail or None)


def _reason_of(finding: Finding) -> str | None:
    return None if finding.reason is None else finding.reason.value


def _left_s(state: RoundState, now_s: float) -> float:
    return 0.0 if state.closes_s is None else state.closes_s - now_s


def _pass_crash_points(before: Phase, after: Phase) -> None:
    if before is Phase.COLLECTING and after is Phase.AGGREGATING:
        crash_point("hub.round-closing")
    if before is Phase.AGGREGATING and after is not before:
        crash_point("hub.round-aggregated")
    if before is Phase.JUDGING and after is not before:
        crash_point("hub.round-judged")
    if after is Phase.COMMITTED and before is not after:
        crash_point("hub.round-committed")
