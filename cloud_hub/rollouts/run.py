"""One rollout at work: its state is on disk before anything is done about it. No thread of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeAlias

from msgspec.structs import replace
from sqlalchemy import Connection

from cloud_hub.core.rollout.events import (
    Closed,
    Effect,
    Event,
    HealthJudged,
    Heard,
    Judged,
    Lost,
    Removed,
    Seen,
    Sign,
    Tick,
)
from cloud_hub.core.rollout.findings import Health
from cloud_hub.core.rollout.judge import DriftHint, JudgeRules, Pairs, decide_drift, decide_quality
from cloud_hub.core.rollout.rollout import next_due_s, next_state, rules_of
from cloud_hub.core.rollout.state import Phase, RolloutState, noted
from cloud_hub.core.rollout.waves import Device, has, may_overlap
from cloud_hub.errors import HubError
from cloud_hub.rollouts.effects import carry_out
from cloud_hub.rollouts.ports import Evidence
from cloud_hub.store.database import Database
from cloud_hub.store.rollouts import RolloutRow, save_rollout
from edge_cascade.durable import crash_point
from edge_cascade.errors import first_line

log = logging.getLogger(__name__)

_DRIFT: Final = "the boards see what the hub has not"


@dataclass(frozen=True, slots=True)
class Quality:
    """All pairs, and whether those of the boards are like those of the hub."""

    pairs: Pairs
    drift: DriftHint


@dataclass(frozen=True, slots=True)
class Look:
    """What was measured, asked while this wave (its index) was open; `quality` may be why it is not known."""

    wave: int
    asked_s: float
    quality: Quality | HubError
    health: Health


Submit: TypeAlias = Callable[[Callable[[], Look]], "Future[Look]"]


class RolloutRun:
    """A rollout that is not closed. `row` is what the store has of it."""

    def __init__(
        self, database: Database, row: RolloutRow, *, rules: JudgeRules, look_every_s: float
    ) -> None:
        self._database = database
        self._row = row
        self.state: RolloutState = row.state
        self._rules = rules
        self._look_every_s = look_every_s
        self._look: Future[Look] | None = None
        self._looked_s: float | None = None

    def feed(
        self,
        events: Iterable[Event],
        *,
        now_s: float,
        note: Callable[[Connection], None] | None = None,
    ) -> frozenset[str]:
        """Let the rollout hear events; the boards that have to be told something new.

        `note` is written in the same commit as the state.

        Raises:
            StoreError: what is in memory may be behind the store; load it again.
        """
        state = self.state
        effects: list[Effect] = []
        for event in events:
            state, more = next_state(state, event, now_s=now_s)
            effects += more
        return self._take(state, effects, now_s=now_s, note=note)

    def _take(
        self,
        state: RolloutState,
        effects: list[Effect],
        *,
        now_s: float,
        note: Callable[[Connection], None] | None = None,
    ) -> frozenset[str]:
        if state != self.state or note is not None:

            def save(connection: Connection) -> None:
                save_rollout(connection, state)
                if note is not None:
                    note(connection)

            self._database.run(save)
            for entry in state.history[len(self.state.history) :]:
                log.info("rollout=%s %s%s", state.id, entry.what, f" by {entry.by}" if entry.by else "")
            self.state = state
        if not effects:
            return frozenset()
        crash_point("hub.rollout-stored")
        return self._database.run(
            partial(carry_out, rollout=state, effects=effects, now_ms=round(now_s * 1000))
        )

    # --- the fleet -----------------------------------------------------------------------------------------

    def knows(self, device: str) -> bool:
        """Whether a device is one of this rollout, or was and had its offer."""
        return device in self.state.members or device in self.state.left

    def is_superseded_by(self, newer: RolloutState) -> bool:
        """Whether every device of this one is now of a newer rollout of the same model."""
        group = self.state.group
        return (
            newer.model == self.state.model
            and not self.state.is_widening
            and all(group.get(key) == value for key, value in newer.group.items())
        )

    def events_of(self, fleet: Collection[Device], newer: Iterable[RolloutState]) -> list[Event]:
        """What this rollout has not heard of the fleet; a device is of the newest rollout that takes it."""
        state = self.state
        others = [
            each for each in newer if each.model == state.model and may_overlap(each.group, state.group)
        ]
        if any(self.is_superseded_by(other) for other in others):
            return [Closed()]
        gone = state.members.keys() - {device.name for device in fleet}
        signs: list[Sign] = [Removed(name) for name in sorted(gone)]
        for device in fleet:
            member = state.members.get(device.name)
            if any(has(device, other.group) for other in others):
                signs += [] if member is None else [Removed(device.name)]
            elif member is None:
                # After a halt it still sees to it that who is new gets what the others went back to.
                is_served = (
                    state.phase is not Phase.HALTED
                    or state.common is not None
                    or device.release == state.release
                )
                signs += [Seen(device)] if is_served and has(device, state.group) else []
            elif state.is_widening and device.is_online != (member.online_since_s is not None):
                signs.append(Seen(device) if device.is_online else Lost(device.name))
        return [Heard(tuple(signs))] if signs else []

    # --- time and evidence ---------------------------------------------------------------------------------

    def tick(self, *, now_s: float) -> frozenset[str]:
        """Let time pass, if that may change anything."""
        due_s = next_due_s(self.state)
        return self.feed([Tick()], now_s=now_s) if due_s is not None and due_s <= now_s else frozenset()

    def look(self, evidence: Callable[[], Evidence], submit: Submit, *, now_s: float) -> frozenset[str]:
        """Ask for evidence when it is time, and hear what was measured once it is there."""
        if not self.state.is_widening or self.state.wave < 0:
            return frozenset()
        if self._look is None and self._is_look_due(now_s):
            self._looked_s = now_s
            self._look = submit(partial(_measure, evidence, self._row, self.state, now_s))
        if self._look is None or not self._look.done():
            return frozenset()
        done, self._look = self._look, None
        error = done.exception()
        if error is not None:
            # Nothing is widened for want of evidence; what is wrong with it must not hold up a kill.
            fault = None if isinstance(error, HubError) else error
            log.warning("no evidence rollout=%s reason=%s", self.state.id, error, exc_info=fault)
            return self._take(_unjudged(self.state, error), [], now_s=now_s)
        return self._hear(done.result(), now_s=now_s)

    def _is_look_due(self, now_s: float) -> bool:
        if self._looked_s is None or not 0 <= now_s - self._looked_s < self._look_every_s:
            return True
        # The look that counts is the one at the end of the soak.
        soaked_s = (
            None
            if self.state.enough_s is None
            else self.state.enough_s + self.state.waves[self.state.wave].soak_s
        )
        return soaked_s is not None and self._looked_s < soaked_s <= now_s

    def _hear(self, look: Look, *, now_s: float) -> frozenset[str]:
        if look.wave != self.state.wave:
            return frozenset()
        state, effects, events = self.state, list[Effect](), list[tuple[Event, float]]()
        if isinstance(look.quality, HubError):
            log.warning("no evidence of quality rollout=%s reason=%s", state.id, look.quality)
            state = _unjudged(state, look.quality)
        else:
            state = _with_drift(state, look.quality.drift, now_s)
            judgement = decide_quality(look.quality.pairs, rules_of(state, self._rules))
            events.append((Judged(judgement), now_s))
        # Health is of the moment in which it was measured: what was still soaking then has not soaked.
        events += [(HealthJudged(look.health), look.asked_s), (Tick(), now_s)]
        for event, at_s in events:
            state, more = next_state(state, event, now_s=at_s)
            effects += more
        return self._take(state, effects, now_s=now_s)


def _with_drift(state: RolloutState, drift: DriftHint, now_s: float) -> RolloutState:
    if not drift.is_suspicious or any(entry.what.startswith(_DRIFT) for entry in state.history):
        return state
    what = (
        f"{_DRIFT}: bundles differ on {drift.on_board:.2%} of their inputs, "
        f"on {drift.in_hub:.2%} of the audits"
    )
    return noted(state, now_s, what)


def _unjudged(state: RolloutState, error: BaseException) -> RolloutState:
    """So that whoever looks at the rollout sees why it does not go on."""
    if state.quality_passed:
        return state
    return replace(state, quality_said=f"cannot be judged: {first_line(error)}")


def _measure(evidence: Callable[[], Evidence], row: RolloutRow, state: RolloutState, asked_s: float) -> Look:
    measured = evidence()
    quality: Quality | HubError
    try:
        shadowed, audited = measured.pairs(state, cases_after=row.cases_after, scenes_after=row.scenes_after)
        quality = Quality(shadowed + audited, decide_drift(shadowed, audited))
    except HubError as error:
        # Boards may be sick all the same.
        quality = error
    return Look(state.wave, asked_s, quality, measured.health(state, asked_s))
