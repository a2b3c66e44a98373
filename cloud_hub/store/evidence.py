"""What speaks for and against a release, page by page in the order of ids. Functions of the connection."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
from sqlalchemy import Connection, Label, RowMapping, and_, case, func, or_, select

from cloud_hub.core.rollout.judge import NO_REFERENCE
from cloud_hub.core.rollout.windows import CounterRow
from cloud_hub.store import schema
from edge_cascade.messages import Reason, ShadowScene, Source

_cases = schema.cases
_verdicts = schema.verdicts
_shadows = schema.shadow_reports
_vitals = schema.vitals
_reports = schema.swap_reports

_SEQS_A_QUERY: Final = 500


@dataclass(frozen=True, slots=True)
class StoredShadow:
    """A board's scenes: `bundle` answered, `other` was asked as well."""

    id: int
    device: str
    boot: bytes
    bundle: bytes
    other: bytes
    scenes: list[ShadowScene]


def audited_page(
    connection: Connection, model: str, full_model: bytes, *, after_id: int, limit: int
) -> Sequence[RowMapping]:
    """Cases that the audit coin sent, with ids above `after_id`: where from, when, the tensor's place.

    `reference` is a person's label, else that of this full model, else `NO_REFERENCE`.
    """
    query = (
        select(
            _cases.c.id,
            _cases.c.device,
            _cases.c.sensor,
            _cases.c.received_at_ms,
            _cases.c.blob,
            _cases.c.blob_offset,
            _cases.c.blob_length,
            _cases.c.tensor_bytes,
            _reference(full_model),
        )
        .outerjoin(_verdicts, _verdicts.c.case_id == _cases.c.id)
        .where(
            _cases.c.model == model,
            _cases.c.id > after_id,
            _cases.c.audit_ppm > 0,
            _cases.c.reason != int(Reason.SHADOW),
        )
        .order_by(_cases.c.id)
        .limit(limit)
    )
    return connection.execute(query).mappings().all()


def shadow_page(
    connection: Connection, model: str, bundles: tuple[bytes, bytes], *, after_id: int, limit: int
) -> list[StoredShadow]:
    """Shadow reports of these two bundles, whichever answered, with ids above `after_id`."""
    one, two = bundles
    query = (
        select(
            _shadows.c.id,
            _shadows.c.device,
            _shadows.c.boot,
            _shadows.c.bundle,
            _shadows.c.other,
            _shadows.c.scenes,
        )
        .where(
            _shadows.c.model == model,
            _shadows.c.id > after_id,
            or_(
                and_(_shadows.c.bundle == one, _shadows.c.other == two),
                and_(_shadows.c.bundle == two, _shadows.c.other == one),
            ),
        )
        .order_by(_shadows.c.id)
        .limit(limit)
    )
    return [
        StoredShadow(
            row.id,
            row.device,
            row.boot,
            row.bundle,
            row.other,
            msgspec.msgpack.decode(row.scenes, type=list[ShadowScene]),
        )
        for row in connection.execute(query)
    ]


def references_of(
    connection: Connection,
    model: str,
    full_model: bytes,
    *,
    device: str,
    boot: bytes,
    seqs: Collection[int],
) -> dict[int, int]:
    """What is right, by the number of a case of one start of a board; those with a reference only."""
    wanted = sorted(seqs)
    found: dict[int, int] = {}
    for start in range(0, len(wanted), _SEQS_A_QUERY):
        query = (
            select(_cases.c.seq, _reference(full_model))
            .join(_verdicts, _verdicts.c.case_id == _cases.c.id)
            .where(
                _cases.c.device == device,
                _cases.c.boot == boot,
                _cases.c.seq.in_(wanted[start : start + _SEQS_A_QUERY]),
                _cases.c.model == model,
            )
        )
        found |= {row.seq: row.reference for row in connection.execute(query)}
    return {seq: label for seq, label in found.items() if label != NO_REFERENCE}


def labelled_shadows(connection: Connection, model: str, *, after_label: int) -> tuple[int, bool]:
    """The id of the newest label of a person, and whether one after `after_label` is of a shadowed case."""
    labels = schema.labels
    newest = connection.execute(select(func.max(labels.c.id))).scalar() or 0
    query = (
        select(labels.c.id)
        .join(_cases, _cases.c.id == labels.c.case_id)
        .where(
            labels.c.id > after_label,
            labels.c.id <= newest,
            _cases.c.model == model,
            _cases.c.reason == int(Reason.SHADOW),
        )
        .limit(1)
    )
    return newest, connection.execute(query).first() is not None


def vitals_between(
    connection: Connection, device: str, *, since_ms: int, until_ms: int, limit: int
) -> list[CounterRow]:
    """A board's newest `limit` reports received from one time to another, both included; oldest first."""
    query = (
        select(_vitals.c.boot, _vitals.c.received_at_ms, _vitals.c.counters)
        .where(
            _vitals.c.device == device,
            _vitals.c.received_at_ms >= since_ms,
            _vitals.c.received_at_ms <= until_ms,
        )
        .order_by(_vitals.c.received_at_ms.desc(), _vitals.c.id.desc())
        .limit(limit)
    )
    rows = connection.execute(query).all()
    return [
        CounterRow(
            row.boot, row.received_at_ms / 1000, msgspec.json.decode(row.counters, type=dict[str, int])
        )
        for row in reversed(rows)
    ]


def committed_at(connection: Connection, model: str, release: str, *, since_ms: int) -> dict[str, int]:
    """When each board last said that it runs a release, as the hub received it, in milliseconds."""
    query = (
        select(_reports.c.device, _reports.c.received_at_ms)
        .where(
            _reports.c.model == model,
            _reports.c.release == release,
            _reports.c.failure == "",
            _reports.c.received_at_ms >= since_ms,
        )
        .order_by(_reports.c.id)
    )
    return {row.device: row.received_at_ms for row in connection.execute(query)}


def _reference(full_model: bytes) -> Label[int]:
    is_known = or_(
        _verdicts.c.source == int(Source.HUMAN),
        and_(_verdicts.c.source == int(Source.MODEL), _verdicts.c.full_model == full_model),
    )
    return case((is_known, _verdicts.c.label), else_=NO_REFERENCE).label("reference")
