"""One series at work: it opens rounds one after the other, and in the end asks for a candidate.

As in `round_run`, each state is stored before what it asks for is carried out.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Collection
from typing import Final, assert_never

import msgspec
import numpy as np
from sqlalchemy import Connection

from cloud_hub.core.federation.cohort import Eligible, select_cohort, select_eligible
from cloud_hub.core.federation.round_events import Abort, Ended, Phase
from cloud_hub.core.federation.rounds import BufferRules, RoundRules, RoundState, Rules, open_round
from cloud_hub.core.federation.series import (
    AbortRound,
    AbortSeries,
    CandidateMade,
    CandidateRefused,
    MakeCandidate,
    OpenRound,
    RoundEnded,
    SeriesEffect,
    SeriesEnded,
    SeriesEvent,
    SeriesPhase,
    SeriesResumed,
    SeriesRules,
    SeriesState,
    next_series,
    open_series,
)
from cloud_hub.federation.bases import Bases
from cloud_hub.federation.membership import Facts, ask, eligible_of
from cloud_hub.federation.ports import Declined, Registered, Waiting
from cloud_hub.federation.round_run import After, Parts, RoundRun, Write
from cloud_hub.federation.settings import SeriesSettings, votes_needed
from cloud_hub.models import HubModel
from cloud_hub.store.bases import BaseRow, lead_up_to
from cloud_hub.store.releases import look_at_holdout
from cloud_hub.store.rounds import (
    RoundRow,
    SeriesRow,
    insert_round,
    next_round_number,
    open_round_of,
    round_of_number,
    save_series,
)
from edge_cascade.durable import crash_point

log = logging.getLogger(__name__)

LOOK_AGAIN_S: Final = 5.0
"""After no device could be asked."""
CANDIDATE_AGAIN_S: Final = 60.0


class SeriesRun:
    """A series that has not ended."""

    def __init__(self, parts: Parts, facts: Facts, settings_json: str, machine: SeriesState) -> None:
        self._parts = parts
        self._facts = facts
        self._settings_json = settings_json
        self._machine = machine
        self._why = ""
        # What could not be done yet, and when it is tried again.
        self._later: tuple[float, OpenRound | MakeCandidate] | None = None
        self.round: RoundRun | None = None
        self.is_over = False

    @property
    def id(self) -> int:
        """Its number."""
        return self._facts.id

    @property
    def model(self) -> str:
        """The model that it trains."""
        return self._facts.model

    @property
    def base(self) -> bytes:
        """What its next round starts from."""
        return self._facts.base

    @property
    def open_bases(self) -> frozenset[bytes]:
        """The bases from which an update may be a vote whichever of its rounds it names."""
        if not self._facts.settings.is_asynchronous:
            return frozenset()
        return frozenset(base.digest for base in self._lead(self._facts.base))

    def hear(self, event: SeriesEvent, *writes: Write) -> None:
        """Let the machine hear an event; `writes` belong to it."""
        state, effects = next_series(self._machine, event)
        self._parts.store.database.run(lambda c: self._save(c, state, writes))
        self._machine = state
        if isinstance(event, CandidateMade):
            crash_point("hub.candidate-made")
        for effect in effects:
            self._carry_out(effect)

    def resume(self) -> None:
        """Go on where the store says that the last run stopped: the round first, for it may have ended."""
        row = self._parts.store.database.run(lambda c: open_round_of(c, self.id))
        before = self._machine
        if row is not None:
            state = msgspec.json.decode(row.state, type=RoundState)
            self.round = self._round_run(row, state, self._lead(row.base))
            self.round.resume()
        if self._machine is before:
            self.hear(SeriesResumed())

    def begin(self, effects: tuple[SeriesEffect, ...]) -> None:
        """Carry out what a new series asks for."""
        for effect in effects:
            self._carry_out(effect)

    def abort(self, reason: str) -> None:
        """End it."""
        self.hear(AbortSeries(reason))

    def tick(self) -> None:
        """Do what is due."""
        if self.round is not None:
            self.round.tick()
        if self._later is not None and self._parts.clock_s() >= self._later[0]:
            self._try_later()

    def came_online(self, devices: Collection[str]) -> None:
        """Devices are there."""
        if self.round is not None:
            self.round.came_online(devices)
        elif self._later is not None and isinstance(self._later[1], OpenRound):
            self._try_later()

    def _try_later(self) -> None:
        assert self._later is not None
        (_, effect), self._later = self._later, None
        self._carry_out(effect)

    def _carry_out(self, effect: SeriesEffect) -> None:
        match effect:
            case OpenRound(number, _):
                self._open(effect, number)
            case AbortRound(_, reason):
                self._later = None
                if self.round is not None:
                    self.round.hear(Abort(reason))
            case MakeCandidate():
                self._make_candidate(effect)
            case SeriesEnded(outcome, reason):
                self._end(outcome, reason)
            case _:
                assert_never(effect)

    def _open(self, effect: OpenRound, number: int) -> None:
        before = self._parts.store.database.run(lambda c: round_of_number(c, self.id, number))
        if before is not None:
            if before["outcome"] is not None:
                self.hear(RoundEnded(number, Phase(before["outcome"]), before["why"]))
            return
        settings = self._facts.settings
        fleet = self._parts.store.database.run(lambda c: eligible_of(c, self._facts, None, self._now_ms()))
        cohort = _cohort_of(fleet, settings, number)
        if not cohort:
            self._wait(effect, LOOK_AGAIN_S, f"no device can be asked: {len(fleet)} known, {_why_not(fleet)}")
            return
        rules = _rules_of(settings, len(cohort))
        state, effects = open_round(rules, cohort, now_s=self._parts.clock_s())
        row = RoundRow(secrets.token_hex(16), self.id, number, self._facts.base, _encoded(state), None)
        run = self._round_run(row, state, self._lead(row.base))

        def write(connection: Connection) -> None:
            insert_round(connection, row, now_ms=self._now_ms())
            ask(connection, self.model, row.id, number, cohort)
            save_series(connection, self.id, why="")

        self._parts.store.database.run(write)
        self._why = ""
        crash_point("hub.round-opened")
        log.info(
            "round opened round=%s model=%s number=%d cohort=%d", row.id, self.model, number, len(cohort)
        )
        self.round = run
        run.enter(state, effects)

    def _round_run(self, row: RoundRow, state: RoundState, lead: list[BaseRow]) -> RoundRun:
        return RoundRun(
            self._parts,
            self._facts,
            round_id=row.id,
            number=row.number,
            lead=lead,
            state=state,
            on_end=self._after_round,
            result=row.result,
        )

    def _lead(self, base: bytes) -> list[BaseRow]:
        settings = self._facts.settings
        older = settings.max_staleness if settings.is_asynchronous else 0
        return self._parts.store.database.run(lambda c: lead_up_to(c, base, limit=older + 1))

    def _after_round(self, number: int, ended: Ended) -> After:
        state, effects = next_series(self._machine, RoundEnded(number, ended.outcome, ended.reason))

        has_stalled = ended.outcome is Phase.ROLLED_BACK and state.failures > state.rules.max_failures

        def then() -> None:
            if has_stalled:
                log.warning(
                    "series stalled series=%d rolled_back=%d committed=%d hint=%s",
                    self.id,
                    state.failures,
                    state.committed,
                    _hint_of(self._facts.settings),
                )
            self._machine = state
            self.round = None
            for effect in effects:
                self._carry_out(effect)

        return After(lambda c: self._save(c, state, ()), then)

    def _make_candidate(self, effect: MakeCandidate) -> None:
        facts = self._facts
        outcome = self._parts.workshop.candidate(
            facts.id, facts.base, facts.first_base, self._settings_json, facts.window_start
        )
        match outcome:
            case Registered(release):
                self.hear(CandidateMade(), lambda c: save_series(c, self.id, release=release))
            case Waiting(reason):
                self._wait(effect, CANDIDATE_AGAIN_S, f"the candidate waits: {reason}")
            case Declined(reason):
                self.hear(CandidateRefused(reason))
            case _:
                assert_never(outcome)

    def _wait(self, effect: OpenRound | MakeCandidate, seconds: float, why: str) -> None:
        self._later = (self._parts.clock_s() + seconds, effect)
        if why != self._why:
            log.info("series waits series=%d reason=%s", self.id, why)
            self._why = why
            self._parts.store.database.run(lambda c: save_series(c, self.id, why=why))

    def _end(self, outcome: SeriesPhase, reason: str) -> None:
        self._parts.store.database.run(
            lambda c: save_series(c, self.id, ended_at_ms=self._now_ms(), why=reason, phase=outcome.value)
        )
        self.is_over = True
        log.info("series ended series=%d outcome=%s reason=%s", self.id, outcome.value, reason)

    def _save(self, connection: Connection, state: SeriesState, writes: Collection[Write]) -> None:
        for write in writes:
            write(connection)
        save_series(connection, self.id, phase=state.phase.value, machine=_encoded(state))

    def _now_ms(self) -> int:
        return round(self._parts.clock_s() * 1000)


def begin_series(parts: Parts, bases: Bases, row: SeriesRow, model: HubModel) -> SeriesRun:
    """Take up a series that was asked for: keep its first base, open its first round.

    Raises:
        CascadeError: when the bundle's parameters are no base.
        StoreError: when it cannot be kept now.
    """
    bundle = model.bundle
    assert bundle is not None
    settings = msgspec.json.decode(row.settings, type=SeriesSettings)
    first = bases.first(row.model, row.graph, bundle.parameters())

    def write(connection: Connection) -> tuple[SeriesState, tuple[SeriesEffect, ...]]:
        rules = SeriesRules(settings.rounds, settings.max_failures)
        state, effects = open_series(rules, first_round=next_round_number(connection, row.model))
        first.keep(connection, now_ms=round(parts.clock_s() * 1000))
        save_series(
            connection,
            row.id,
            phase=state.phase.value,
            machine=_encoded(state),
            first_base=first.row.digest,
            base=first.row.digest,
        )
        look_at_holdout(connection, row.model, upto_id=row.window_start)
        return state, effects

    state, effects = parts.store.database.run(write)
    log.info("series begun series=%d model=%s base=%s", row.id, row.model, first.row.digest.hex()[:12])
    run = SeriesRun(parts, _facts_of(row, settings, bundle.bundle_id, first.row.digest), row.settings, state)
    run.begin(effects)
    return run


def load_series(parts: Parts, row: SeriesRow, model: HubModel) -> SeriesRun:
    """A series as it was stored; `resume` sets it going."""
    assert model.bundle is not None
    assert row.machine is not None
    assert row.base is not None
    settings = msgspec.json.decode(row.settings, type=SeriesSettings)
    state = msgspec.json.decode(row.machine, type=SeriesState)
    return SeriesRun(parts, _facts_of(row, settings, model.bundle.bundle_id, row.base), row.settings, state)


def _facts_of(row: SeriesRow, settings: SeriesSettings, bundle_id: str, base: bytes) -> Facts:
    return Facts(
        row.id, row.model, bundle_id, row.graph, settings, row.first_base or base, base, row.window_start
    )


def _cohort_of(fleet: list[Eligible], settings: SeriesSettings, number: int) -> tuple[str, ...]:
    if settings.is_asynchronous:
        return tuple(each.device for each in select_eligible(fleet, round_number=number))
    rng = np.random.default_rng([settings.seed or 0, number])
    return select_cohort(
        fleet, settings.cohort, rng, round_number=number, sleeper_share=settings.sleeper_share
    )


def _rules_of(settings: SeriesSettings, asked: int) -> Rules:
    quorum = votes_needed(settings, asked)
    # Noise is accounted for a quorum's: a round of which screening leaves fewer must not be published.
    min_votes = quorum if settings.noise_multiplier > 0.0 else 1
    if settings.is_asynchronous:
        return BufferRules(quorum, settings.max_staleness, settings.deadline_s, min_votes)
    return RoundRules(asked, quorum, settings.grace_s, settings.deadline_s, min_votes=min_votes)


def _hint_of(settings: SeriesSettings) -> str:
    if settings.strategy in {"median", "trimmed", "clipped"}:
        return "there may be nothing more to gain; else look at the boards' examples"
    return "there may be nothing more to gain; if boards may send harm, try strategy median or trimmed"


def _why_not(fleet: list[Eligible]) -> str:
    matching = sum(each.graph_matches for each in fleet)
    return f"{matching} run a bundle of this graph, the others are in quarantine, away or run another"


def _encoded(state: RoundState | SeriesState) -> str:
    return msgspec.json.encode(state).decode()
