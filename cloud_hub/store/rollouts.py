"""Rollouts, what people ordered of them, and what boards reported. Functions of the connection."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
from sqlalchemy import Connection, RowMapping, bindparam, delete, func, insert, select, update

from cloud_hub.core.rollout.events import ReleaseState
from cloud_hub.core.rollout.state import Phase, RolloutState
from cloud_hub.core.rollout.waves import Device
from cloud_hub.errors import NotFoundError
from cloud_hub.store import schema
from cloud_hub.store.desired import revoked_devices
from edge_cascade.messages import SHIPPED

_rollouts = schema.rollouts
_orders = schema.rollout_orders
_labels = schema.device_labels
_desired = schema.desired
_reports = schema.swap_reports

_LEADS_TO: Final = {
    # A rollout that starts takes up again what was halted or went by.
    ReleaseState.DRAFT: (ReleaseState.HALTED, ReleaseState.SUPERSEDED),
    ReleaseState.CANARY: (ReleaseState.DRAFT,),
    ReleaseState.LIVE: (ReleaseState.DRAFT, ReleaseState.CANARY),
    ReleaseState.SUPERSEDED: (ReleaseState.LIVE,),
    ReleaseState.HALTED: (
        ReleaseState.DRAFT,
        ReleaseState.CANARY,
        ReleaseState.LIVE,
        ReleaseState.SUPERSEDED,
    ),
    ReleaseState.RETIRED: (
        ReleaseState.DRAFT,
        ReleaseState.CANARY,
        ReleaseState.LIVE,
        ReleaseState.SUPERSEDED,
        ReleaseState.HALTED,
        ReleaseState.COLLECTED,
    ),
    ReleaseState.COLLECTED: (ReleaseState.DRAFT, ReleaseState.SUPERSEDED, ReleaseState.HALTED),
}
_OUT_OF_SERVICE: Final = (
    ReleaseState.HALTED.value,
    ReleaseState.RETIRED.value,
    ReleaseState.COLLECTED.value,
)


@dataclass(frozen=True, slots=True)
class RolloutRow:
    """A rollout as stored. Cases and shadow reports up to these ids were there before it began."""

    state: RolloutState
    cases_after: int
    scenes_after: int
    created_by: str
    created_at_ms: int


@dataclass(frozen=True, slots=True)
class Order:
    """What somebody ordered: 'approve' (of the wave of this index), 'pause', 'resume', 'halt' or 'kill'."""

    id: int
    rollout: str
    kind: str
    wave: int | None
    reason: str
    ordered_by: str


@dataclass(frozen=True, slots=True)
class StoredSwap:
    """How a board's attempt to run a release ended; `failure` is empty where it committed."""

    id: int
    device: str
    model: str
    release: str
    failure: str
    detail: str


class _Served(msgspec.Struct, frozen=True):
    model: str
    takes_releases: bool = False


# --- rollouts ----------------------------------------------------------------------------------------------


def insert_rollout(connection: Connection, state: RolloutState, *, created_by: str, now_ms: int) -> None:
    """Keep a new rollout; what was measured before now is no evidence of it."""
    connection.execute(
        insert(_rollouts).values(
            id=state.id,
            model=state.model,
            release=int(state.release),
            phase=state.phase.value,
            state=msgspec.json.encode(state).decode(),
            cases_after=connection.execute(select(func.max(schema.cases.c.id))).scalar() or 0,
            scenes_after=connection.execute(select(func.max(schema.shadow_reports.c.id))).scalar() or 0,
            created_by=created_by[:128],
            created_at_ms=now_ms,
            is_closed=False,
        )
    )


def save_rollout(connection: Connection, state: RolloutState) -> None:
    """Overwrite what is known of a rollout."""
    connection.execute(
        update(_rollouts)
        .where(_rollouts.c.id == state.id)
        .values(
            phase=state.phase.value,
            state=msgspec.json.encode(state).decode(),
            is_closed=state.is_closed,
        )
    )


def open_rollouts(connection: Connection) -> list[RolloutRow]:
    """Rollouts that are not closed, the oldest first."""
    query = (
        select(_rollouts)
        .where(_rollouts.c.is_closed == schema.NO)
        .order_by(_rollouts.c.created_at_ms, _rollouts.c.id)
    )
    return [_row_of(row) for row in connection.execute(query).mappings()]


def open_rollout_ids(connection: Connection) -> list[str]:
    """The ids of rollouts that are not closed, the oldest first."""
    query = (
        select(_rollouts.c.id)
        .where(_rollouts.c.is_closed == schema.NO)
        .order_by(_rollouts.c.created_at_ms, _rollouts.c.id)
    )
    return list(connection.execute(query).scalars())


def get_rollout(connection: Connection, rollout_id: str) -> RolloutRow:
    """One rollout.

    Raises:
        NotFoundError: when there is none of this id.
    """
    row = connection.execute(select(_rollouts).where(_rollouts.c.id == rollout_id)).mappings().first()
    if row is None:
        raise NotFoundError(f"there is no rollout {rollout_id[:64]!r}; `cloud-hub rollout list` shows them")
    return _row_of(row)


def list_rollouts(
    connection: Connection, *, model: str | None = None, offset: int = 0, limit: int | None = None
) -> list[RolloutRow]:
    """Rollouts, the newest first."""
    query = select(_rollouts).order_by(_rollouts.c.created_at_ms.desc(), _rollouts.c.id.desc())
    if model is not None:
        query = query.where(_rollouts.c.model == model)
    return [_row_of(row) for row in connection.execute(query.offset(offset).limit(limit)).mappings()]


def rollouts_done(connection: Connection, releases: Collection[int]) -> list[RolloutRow]:
    """Rollouts of these releases that came to a good end, the newest first."""
    query = (
        select(_rollouts)
        .where(_rollouts.c.release.in_(sorted(releases)), _rollouts.c.phase == Phase.DONE.value)
        .order_by(_rollouts.c.created_at_ms.desc(), _rollouts.c.id.desc())
    )
    return [_row_of(row) for row in connection.execute(query).mappings()]


def _row_of(row: RowMapping) -> RolloutRow:
    return RolloutRow(
        msgspec.json.decode(row["state"], type=RolloutState),
        row["cases_after"],
        row["scenes_after"],
        row["created_by"],
        row["created_at_ms"],
    )


# --- orders ------------------------------------------------------------------------------------------------


def insert_order(
    connection: Connection,
    rollout_id: str,
    kind: str,
    *,
    wave: int | None,
    reason: str,
    ordered_by: str,
    now_ms: int,
) -> None:
    """Order something of a rollout; a running hub takes it within a second or two."""
    connection.execute(
        insert(_orders).values(
            rollout=rollout_id,
            kind=kind,
            wave=wave,
            reason=reason,
            ordered_by=ordered_by[:128],
            created_at_ms=now_ms,
        )
    )


def new_orders(connection: Connection) -> list[Order]:
    """Orders that nobody has taken, in the order in which they were given."""
    query = select(_orders).where(_orders.c.noted == schema.NO).order_by(_orders.c.id)
    return [
        Order(row["id"], row["rollout"], row["kind"], row["wave"], row["reason"], row["ordered_by"])
        for row in connection.execute(query).mappings()
    ]


def note_orders(connection: Connection, ids: Iterable[int]) -> None:
    """Note orders as taken."""
    rows = [{"of_id": number} for number in ids]
    if rows:
        connection.execute(update(_orders).where(_orders.c.id == bindparam("of_id")).values(noted=True), rows)


# --- the fleet ---------------------------------------------------------------------------------------------


def devices_of_fleet(connection: Connection, model: str) -> list[Device]:
    """Every board that was ever heard of, by name: its labels, whether it is there, its release of a model.

    One whose account was revoked is no longer of the fleet, nor is one that says that it does not serve the
    model or takes no releases: it would be waited for in vain.
    """
    desired = select(_desired.c.device, _desired.c.release)
    desired = desired.where(_desired.c.model == model, _desired.c.release != SHIPPED)
    should_run = {row.device: row.release for row in connection.execute(desired)}
    labels: dict[str, dict[str, str]] = {}
    for device, key, value in connection.execute(select(_labels)):
        labels.setdefault(device, {})[key] = value
    query = (
        select(schema.devices.c.name, schema.devices.c.online, schema.devices.c.models)
        .where(schema.devices.c.name.not_in(revoked_devices()))
        .order_by(schema.devices.c.name)
    )
    return [
        Device(name, labels.get(name, {}), bool(online), should_run.get(name, ""))
        for name, online, models in connection.execute(query)
        if _may_take(models, model)
    ]


def _may_take(models: str, model: str) -> bool:
    """Whether a board with these models takes releases of one; so may a board that never said anything."""
    served = msgspec.json.decode(models, type=list[_Served])
    return not served or any(each.model == model and each.takes_releases for each in served)


def last_heard_ms(connection: Connection) -> int:
    """When any board was last heard of, 0 where none ever was."""
    return connection.execute(select(func.max(schema.devices.c.last_seen_ms))).scalar() or 0


def labels_of(connection: Connection, device: str) -> dict[str, str]:
    """A board's labels by key."""
    query = select(_labels.c.key, _labels.c.value).where(_labels.c.device == device).order_by(_labels.c.key)
    return {row.key: row.value for row in connection.execute(query)}


def set_labels(connection: Connection, device: str, changes: Mapping[str, str | None]) -> dict[str, str]:
    """Set labels of a board, take away those that are None; all of its labels then.

    Raises:
        NotFoundError: when no such board was ever heard of.
    """
    known = select(schema.devices.c.name).where(schema.devices.c.name == device)
    if connection.execute(known).first() is None:
        raise NotFoundError(f"no device {device[:64]!r} was ever heard of; labels are of devices that are")
    for key, value in sorted(changes.items()):
        if value is None:
            connection.execute(delete(_labels).where(_labels.c.device == device, _labels.c.key == key))
    rows = [
        {"device": device, "key": key, "value": value}
        for key, value in sorted(changes.items())
        if value is not None
    ]
    schema.upsert(connection, _labels, rows, update=["value"])
    return labels_of(connection, device)


# --- reports -----------------------------------------------------------------------------------------------


def new_swaps(connection: Connection, limit: int) -> list[StoredSwap]:
    """Reports of swaps that the rollouts have not heard of, in the order of their commits."""
    query = select(_reports).where(_reports.c.noted == schema.NO).order_by(_reports.c.id).limit(limit)
    return [
        StoredSwap(row["id"], row["device"], row["model"], row["release"], row["failure"], row["detail"])
        for row in connection.execute(query).mappings()
    ]


def note_swaps(connection: Connection, ids: Iterable[int]) -> None:
    """Note reports of swaps as heard."""
    rows = [{"of_id": number} for number in ids]
    if rows:
        connection.execute(
            update(_reports).where(_reports.c.id == bindparam("of_id")).values(noted=True), rows
        )


# --- releases ----------------------------------------------------------------------------------------------


def mark_release(connection: Connection, release_id: int, state: ReleaseState) -> bool:
    """Write where a release stands; whether that was news.

    What was taken out of service stays so: nothing here leads from HALTED, RETIRED or COLLECTED to CANARY or
    LIVE.
    """
    table = schema.releases
    from_states = [before.value for before in _LEADS_TO[state]]
    changed = connection.execute(
        update(table)
        .where(table.c.id == release_id, table.c.state.in_(from_states))
        .values(state=state.value)
    )
    return changed.rowcount == 1


def settle_live(connection: Connection, model: str, newest: int | None) -> list[tuple[int, ReleaseState]]:
    """After boards were given something else: what none is to run any more is superseded, and what was and is
    wanted again is live. `newest`: a release that has just become live, whether or not there are boards.

    The releases for which that is news, and where they stand now.
    """
    table = schema.releases
    desired = select(_desired.c.release).where(
        _desired.c.model == model,
        _desired.c.release != SHIPPED,
        _desired.c.device.not_in(revoked_devices()),
    )
    wanted = {int(number) for number in connection.execute(desired.distinct()).scalars()}
    rows = connection.execute(
        select(table.c.id, table.c.state)
        .where(
            table.c.model == model,
            table.c.state.in_([ReleaseState.LIVE.value, ReleaseState.SUPERSEDED.value]),
        )
        .order_by(table.c.id)
    ).all()
    changed = []
    for number, state in rows:
        now = ReleaseState.LIVE if number in wanted or number == newest else ReleaseState.SUPERSEDED
        if now is ReleaseState.SUPERSEDED and newest is None:
            # Boards were taken back: the one before them all stays what new boards are compared with.
            continue
        if now.value != state:
            connection.execute(update(table).where(table.c.id == number).values(state=now.value))
            changed.append((number, now))
    return changed


def out_of_service(connection: Connection, releases: Collection[str]) -> frozenset[str]:
    """Those of these releases that no board should be given: halted, retired, collected or unknown."""
    table = schema.releases
    query = select(table.c.id).where(
        table.c.id.in_(sorted(int(release) for release in releases)),
        table.c.state.not_in(_OUT_OF_SERVICE),
    )
    usable = {str(number) for number in connection.execute(query).scalars()}
    return frozenset(releases) - usable


def live_releases(connection: Connection, model: str) -> Sequence[int]:
    """The live releases of a model, the newest first."""
    table = schema.releases
    query = select(table.c.id).where(table.c.model == model, table.c.state == "live")
    return connection.execute(query.order_by(table.c.id.desc())).scalars().all()
