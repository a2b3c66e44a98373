"""What people and programs ask the store: cases by filter and page, one case, the fleet, the counters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, RowMapping, Select, func, select

from cloud_hub.errors import NotFoundError
from cloud_hub.store import schema
from cloud_hub.store.verdicts import count_unconfirmed
from edge_cascade.messages import Source

_cases = schema.cases
_verdicts = schema.verdicts


@dataclass(frozen=True, slots=True)
class CaseFilter:
    """Which cases; None: whatever. Times are those of receipt, `since` included, `until` not."""

    device: str | None = None
    model: str | None = None
    label: int | None = None
    source: Source | None = None
    escalated: bool | None = None
    audited: bool | None = None
    since_ms: int | None = None
    until_ms: int | None = None
    has_verdict: bool | None = None


@dataclass(frozen=True, slots=True)
class Totals:
    """The counters, and what is counted when asked."""

    counters: dict[str, int]
    pending: int
    unconfirmed: int
    devices: int
    devices_online: int


def find_cases(
    connection: Connection, wanted: CaseFilter, *, before: int | None, limit: int
) -> Sequence[RowMapping]:
    """Cases with their verdicts, the newest first, those with an id below `before`."""
    query = _with_verdicts().where(*_conditions(wanted))
    if before is not None:
        query = query.where(_cases.c.id < before)
    return connection.execute(query.order_by(_cases.c.id.desc()).limit(limit)).mappings().all()


def get_case(connection: Connection, case_id: int) -> tuple[RowMapping, Sequence[RowMapping]]:
    """A case with its verdict, and what people said of it, in that order.

    Raises:
        NotFoundError: when there is no such case.
    """
    row = connection.execute(_with_verdicts().where(_cases.c.id == case_id)).mappings().first()
    if row is None:
        raise NotFoundError(f"there is no case {case_id}")
    labels = select(schema.labels).where(schema.labels.c.case_id == case_id).order_by(schema.labels.c.id)
    return row, connection.execute(labels).mappings().all()


def list_devices(connection: Connection, *, after: str, limit: int) -> Sequence[RowMapping]:
    """Devices by name."""
    table = schema.devices
    query = select(table).where(table.c.name > after).order_by(table.c.name).limit(limit)
    return connection.execute(query).mappings().all()


def totals(connection: Connection) -> Totals:
    """What /v1/stats and /metrics show, from counters that every commit keeps: no table is read through."""
    pending = connection.execute(
        select(func.count()).select_from(_cases).where(_cases.c.state == schema.PENDING)
    ).scalar_one()
    devices = schema.devices
    return Totals(
        counters={row.name: row.value for row in connection.execute(select(schema.counters))},
        pending=pending,
        unconfirmed=count_unconfirmed(connection),
        devices=connection.execute(select(func.count()).select_from(devices)).scalar_one(),
        devices_online=connection.execute(
            select(func.count()).select_from(devices).where(devices.c.online)
        ).scalar_one(),
    )


def _with_verdicts() -> Select[tuple[object, ...]]:
    named = [
        _verdicts.c[name].label(f"verdict_{name}")
        for name in (
            "label",
            "probabilities",
            "full_model",
            "model_label",
            "source",
            "revision",
            "created_at_ms",
            "confirmed_revision",
        )
    ]
    return select(_cases, *named).join_from(
        _cases, _verdicts, _verdicts.c.case_id == _cases.c.id, isouter=True
    )


def _conditions(wanted: CaseFilter) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = []
    for column, value in (
        (_cases.c.device, wanted.device),
        (_cases.c.model, wanted.model),
        (_cases.c.escalated, wanted.escalated),
        (_verdicts.c.label, wanted.label),
        (_verdicts.c.source, None if wanted.source is None else int(wanted.source)),
    ):
        if value is not None:
            conditions.append(column == value)
    if wanted.audited is not None:
        conditions.append(_cases.c.audit_ppm > 0 if wanted.audited else _cases.c.audit_ppm == 0)
    if wanted.since_ms is not None:
        conditions.append(_cases.c.received_at_ms >= wanted.since_ms)
    if wanted.until_ms is not None:
        conditions.append(_cases.c.received_at_ms < wanted.until_ms)
    if wanted.has_verdict is not None:
        found = _verdicts.c.case_id.is_not(None)
        conditions.append(found if wanted.has_verdict else ~found)
    return conditions
