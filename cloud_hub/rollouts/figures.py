"""Rollouts as people and programs see them. No I/O but the functions of the connection at the end."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from sqlalchemy import Connection, RowMapping

from cloud_hub.core.rollout.findings import HealthRules
from cloud_hub.core.rollout.state import Outcome, Phase, RolloutLimits, RolloutState, tally_of
from cloud_hub.core.rollout.waiting import describe, waits_for
from cloud_hub.core.rollout.waves import Wave
from cloud_hub.store.acts import list_acts
from cloud_hub.store.rollouts import RolloutRow, get_rollout, list_rollouts


class Rollout(msgspec.Struct, frozen=True, kw_only=True):
    """A rollout in one line. `wave` is the last one opened, -1 before the first.

    Of `devices`, those of the waves opened so far, `reached` were online with the offer; `failed` counts
    reverted and silent ones.
    """

    id: str
    model: str
    release: str
    previous: str | None
    phase: Phase
    group: dict[str, str]
    wave: int
    waves: int
    wave_name: str
    devices: int
    reached: int
    committed: int
    failed: int
    silent: int
    fleet: int
    is_closed: bool
    is_killed: bool
    created_by: str
    created_at_ms: int


class RolloutDevice(msgspec.Struct, frozen=True, kw_only=True):
    """A device in a rollout. `wave` is the index of the one that it belongs to.

    `before` is the release that it was to run and goes back to; empty: what the group runs, if anything.
    """

    name: str
    wave: int
    is_online: bool
    is_offered: bool
    outcome: Outcome
    reason: str
    before: str


class HistoryLine(msgspec.Struct, frozen=True, kw_only=True):
    """What happened; `by` is empty where the rules decided."""

    at_ms: int
    what: str
    by: str


class RolloutDetail(msgspec.Struct, frozen=True, kw_only=True):
    """A rollout with all that is known of it. `waits_for` is a line for each thing that is missing."""

    rollout: Rollout
    waits_for: list[str]
    quality: str
    health: list[str]
    plan: list[Wave]
    limits: RolloutLimits
    health_rules: HealthRules
    scene_s: int
    approved: list[int]
    devices: list[RolloutDevice]
    history: list[HistoryLine]


class RolloutPage(msgspec.Struct, frozen=True, kw_only=True):
    """Rollouts, the newest first; `next` is the `cursor` of the following page."""

    rollouts: list[Rollout]
    next: str | None


class Act(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the audit log."""

    id: int
    at_ms: int
    by: str
    act: str
    subject: str
    detail: str


class ActPage(msgspec.Struct, frozen=True, kw_only=True):
    """Acts, the newest first; `next` is the `cursor` of the following page."""

    acts: list[Act]
    next: str | None


def rollout_of(row: RolloutRow) -> Rollout:
    """A row in one line."""
    state, tally = row.state, tally_of(row.state)
    return Rollout(
        id=state.id,
        model=state.model,
        release=state.release,
        previous=state.previous,
        phase=state.phase,
        group=state.group,
        wave=state.wave,
        waves=len(state.waves),
        wave_name=state.waves[state.wave].name if state.wave >= 0 else "",
        devices=tally.devices,
        reached=tally.reached,
        committed=tally.committed,
        failed=tally.failed,
        silent=tally.silent,
        fleet=len(state.members),
        is_closed=state.is_closed,
        is_killed=state.is_killed,
        created_by=row.created_by,
        created_at_ms=row.created_at_ms,
    )


def detail_of(row: RolloutRow, *, now_s: float) -> RolloutDetail:
    """A row with everything."""
    state = row.state
    return RolloutDetail(
        rollout=rollout_of(row),
        waits_for=waiting_lines(state, now_s=now_s),
        quality=state.quality_said,
        health=list(state.health_said),
        plan=list(state.waves),
        limits=state.limits,
        health_rules=state.health_rules,
        scene_s=state.scene_s,
        approved=list(state.approved),
        devices=[
            RolloutDevice(
                name=name,
                wave=member.wave,
                is_online=member.online_since_s is not None,
                is_offered=member.is_offered,
                outcome=member.outcome,
                reason=member.reason,
                before=member.before,
            )
            for name, member in sorted(state.members.items(), key=lambda item: (item[1].wave, item[0]))
        ],
        history=[
            HistoryLine(at_ms=round(entry.at_s * 1000), what=entry.what, by=entry.by)
            for entry in state.history
        ],
    )


def waiting_lines(state: RolloutState, *, now_s: float) -> list[str]:
    """What a rollout that is not at its end waits for, a line each."""
    if not state.is_widening:
        return []
    lines = [describe(each) for each in waits_for(state, now_s=now_s)]
    return ["a person: it is paused", *lines] if state.phase is Phase.PAUSED else lines


def rollout_page(connection: Connection, *, model: str | None, offset: int, limit: int) -> RolloutPage:
    """A page of rollouts."""
    rows = list_rollouts(connection, model=model, offset=offset, limit=limit + 1)
    page = [rollout_of(row) for row in rows[:limit]]
    return RolloutPage(rollouts=page, next=str(offset + limit) if len(rows) > limit else None)


def rollout_detail(connection: Connection, rollout_id: str, *, now_s: float) -> RolloutDetail:
    """One rollout.

    Raises:
        NotFoundError: when there is none of this id.
    """
    return detail_of(get_rollout(connection, rollout_id), now_s=now_s)


def act_page(connection: Connection, *, subject: str | None, before: int | None, limit: int) -> ActPage:
    """A page of the audit log."""
    rows: Sequence[RowMapping] = list_acts(connection, subject=subject, before=before, limit=limit + 1)
    page = [
        Act(
            id=row["id"],
            at_ms=row["at_ms"],
            by=row["act_by"],
            act=row["act"],
            subject=row["subject"],
            detail=row["detail"],
        )
        for row in rows[:limit]
    ]
    return ActPage(acts=page, next=str(page[-1].id) if len(rows) > limit else None)
