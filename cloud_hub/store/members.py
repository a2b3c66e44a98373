"""Who takes part in rounds: members, the fleet with its records, updates. Functions of the connection."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, Connection, Row, RowMapping, bindparam, func, select, update

from cloud_hub.core.federation.cohort import NEVER
from cloud_hub.core.federation.standing import Standing
from cloud_hub.store import schema
from cloud_hub.store.deliveries import Place

_members = schema.round_members
_updates = schema.updates
_NOT_NOTED = _updates.c.noted == schema.NO


class MemberState(Enum):
    """How a device stands in a round."""

    ASKED = "asked"
    ANSWERED = "answered"
    """Its update is in the store and waits for the round to close."""
    COUNTED = "counted"
    REJECTED = "rejected"
    LATE = "late"
    """Its update came after the round had closed."""


@dataclass(frozen=True, slots=True)
class StoredUpdate:
    """A client update in the store. `place` is where its delta lies."""

    id: int
    round_id: str
    device: str
    model: str
    training_base: bytes
    num_examples: int
    encoding: str
    place: Place


@dataclass(frozen=True, slots=True)
class Member:
    """What is to be kept of a device in a round."""

    device: str
    state: MemberState
    reason: str | None = None
    detail: str | None = None
    num_examples: int | None = None
    bytes_up: int = 0


@dataclass(frozen=True, slots=True)
class FleetDevice:
    """A board that may be asked: the bundles that it says it runs, and its record."""

    name: str
    online: bool
    last_seen_ms: int
    bundles: Mapping[str, str]
    """Bundle id, hexadecimal, by model."""
    standing: Standing
    last_round: int


# --- members -----------------------------------------------------------------------------------------------


def save_members(connection: Connection, round_id: str, members: Iterable[Member]) -> None:
    """Insert or overwrite what is known of devices in a round; bytes down stay."""
    rows = [
        {
            "round_id": round_id,
            "device": member.device,
            "state": member.state.value,
            "reason": member.reason,
            "detail": member.detail,
            "num_examples": member.num_examples,
            "bytes_up": member.bytes_up,
            "bytes_down": 0,
        }
        for member in members
    ]
    changed = ["state", "reason", "detail", "num_examples", "bytes_up"]
    schema.upsert(connection, _members, rows, update=changed)


def judge_members(connection: Connection, round_id: str, members: Iterable[Member]) -> None:
    """State, reason and detail of members that are there."""
    rows = [
        {
            "of_device": member.device,
            "to_state": member.state.value,
            "to_reason": member.reason,
            "to_detail": member.detail,
        }
        for member in members
    ]
    if rows:
        connection.execute(
            update(_members)
            .where(_members.c.round_id == round_id, _members.c.device == bindparam("of_device"))
            .values(
                state=bindparam("to_state"), reason=bindparam("to_reason"), detail=bindparam("to_detail")
            ),
            rows,
        )


def note_late(connection: Connection, updates: Iterable[StoredUpdate]) -> None:
    """Note that members have answered after their round had closed."""
    rows = [
        {
            "of_round": each.round_id,
            "of_device": each.device,
            "to_examples": each.num_examples,
            "to_bytes": each.place.length,
        }
        for each in updates
    ]
    if rows:
        connection.execute(
            update(_members)
            .where(
                _members.c.round_id == bindparam("of_round"),
                _members.c.device == bindparam("of_device"),
                _members.c.state == MemberState.ASKED.value,
            )
            .values(
                state=MemberState.LATE.value,
                num_examples=bindparam("to_examples"),
                bytes_up=bindparam("to_bytes"),
            ),
            rows,
        )


def add_bytes_down(connection: Connection, round_id: str, amounts: Mapping[str, int]) -> None:
    """Count what was published to members."""
    rows = [{"of_device": device, "more": amount} for device, amount in sorted(amounts.items())]
    if rows:
        connection.execute(
            update(_members)
            .where(_members.c.round_id == round_id, _members.c.device == bindparam("of_device"))
            .values(bytes_down=_members.c.bytes_down + bindparam("more")),
            rows,
        )


def member_of(connection: Connection, round_id: str, device: str) -> RowMapping | None:
    """A device in a round."""
    query = select(_members).where(_members.c.round_id == round_id, _members.c.device == device)
    return connection.execute(query).mappings().first()


def members_of(connection: Connection, round_id: str) -> Sequence[RowMapping]:
    """The devices of a round by name."""
    query = select(_members).where(_members.c.round_id == round_id).order_by(_members.c.device)
    return connection.execute(query).mappings().all()


def tally_members(connection: Connection, round_ids: Collection[str]) -> Sequence[Row[Any]]:
    """Per round, state and reason: how many, and their bytes up and down."""
    keys = (_members.c.round_id, _members.c.state, _members.c.reason)
    query = (
        select(
            *keys,
            func.count().label("devices"),
            func.sum(_members.c.bytes_up).label("bytes_up"),
            func.sum(_members.c.bytes_down).label("bytes_down"),
        )
        .where(_members.c.round_id.in_(sorted(round_ids)))
        .group_by(*keys)
    )
    return connection.execute(query).all()


# --- the fleet ---------------------------------------------------------------------------------------------


class _Runs(msgspec.Struct, frozen=True):
    model: str
    bundle: str


def fleet_of(connection: Connection, model: str, names: Collection[str] | None = None) -> list[FleetDevice]:
    """Every board, or those of these names, with its record for a model."""
    devices, standings = schema.devices, schema.standings
    is_its = (standings.c.device == devices.c.name) & (standings.c.model == model)
    query = select(
        devices.c.name,
        devices.c.online,
        devices.c.last_seen_ms,
        devices.c.models,
        standings.c.points,
        standings.c.quarantines,
        standings.c.barred_until,
        standings.c.last_round,
    ).join_from(devices, standings, is_its, isouter=True)
    if names is not None:
        query = query.where(devices.c.name.in_(sorted(names)))
    return [_fleet_device(row) for row in connection.execute(query).mappings()]


def bundles_of_graph(connection: Connection, graph: bytes) -> set[str]:
    """The ids, hexadecimal, of the releases with this graph part."""
    table = schema.releases
    query = select(table.c.bundle).where(table.c.graph == graph)
    return {digest.hex() for digest in connection.execute(query).scalars()}


def standings_of(connection: Connection, model: str, devices: Collection[str]) -> dict[str, Standing]:
    """The records of these devices; those without one are new."""
    table = schema.standings
    query = select(table.c.device, table.c.points, table.c.quarantines, table.c.barred_until).where(
        table.c.model == model
    )
    known = {row[0]: Standing(*row[1:]) for row in connection.execute(query)}
    return {device: known.get(device, Standing()) for device in devices}


def save_standings(connection: Connection, model: str, standings: Mapping[str, Standing]) -> None:
    """Keep the records of devices."""
    rows = [
        {
            "device": device,
            "model": model,
            "points": standing.points,
            "quarantines": standing.quarantines,
            "barred_until": standing.barred_until,
            "last_round": NEVER,
        }
        for device, standing in sorted(standings.items())
    ]
    changed = ["points", "quarantines", "barred_until"]
    schema.upsert(connection, schema.standings, rows, update=changed)


def note_asked(connection: Connection, model: str, devices: Iterable[str], number: int) -> None:
    """Note that these devices were asked in the round of this number."""
    rows = [
        {
            "device": device,
            "model": model,
            "points": 0,
            "quarantines": 0,
            "barred_until": 0,
            "last_round": number,
        }
        for device in sorted(devices)
    ]
    schema.upsert(connection, schema.standings, rows, update=["last_round"])


def ever_asked(connection: Connection) -> list[str]:
    """Every device that was ever asked in a round."""
    return list(connection.execute(select(schema.standings.c.device).distinct()).scalars())


def _fleet_device(row: RowMapping) -> FleetDevice:
    runs = msgspec.json.decode(row["models"], type=list[_Runs])
    is_known = row["points"] is not None
    return FleetDevice(
        row["name"],
        bool(row["online"]),
        row["last_seen_ms"],
        {each.model: each.bundle for each in runs},
        Standing(row["points"], row["quarantines"], row["barred_until"]) if is_known else Standing(),
        row["last_round"] if is_known else NEVER,
    )


# --- updates -----------------------------------------------------------------------------------------------


def new_updates(connection: Connection, limit: int) -> list[StoredUpdate]:
    """Updates that the coordinator has not seen, in the order of their commits."""
    return _stored_updates(connection, _NOT_NOTED, limit=limit)


def note_updates(connection: Connection, seen: Iterable[tuple[int, str | None]]) -> None:
    """Note updates as seen, each with the round that it is a vote in, if any."""
    rows = [{"of_id": number, "to_round": round_id} for number, round_id in seen]
    if rows:
        connection.execute(
            update(_updates)
            .where(_updates.c.id == bindparam("of_id"))
            .values(noted=True, counted_in=bindparam("to_round")),
            rows,
        )


def votes_in(connection: Connection, round_id: str) -> dict[str, StoredUpdate]:
    """The updates that are votes in a round, by device, in the order of their commits."""
    found = _stored_updates(connection, _updates.c.counted_in == round_id)
    return {each.device: each for each in found}


def _stored_updates(
    connection: Connection, condition: ColumnElement[bool], *, limit: int | None = None
) -> list[StoredUpdate]:
    query = select(_updates).where(condition).order_by(_updates.c.id)
    if limit is not None:
        query = query.limit(limit)
    return [_stored_update(row) for row in connection.execute(query).mappings()]


def _stored_update(row: RowMapping) -> StoredUpdate:
    return StoredUpdate(
        row["id"],
        row["round_id"],
        row["device"],
        row["model"],
        row["training_base"],
        row["num_examples"],
        row["encoding"],
        Place(row["blob"], row["blob_offset"], row["blob_length"]),
    )
