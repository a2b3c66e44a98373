"""What one group commit of ingest writes, as functions of the connection."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from sqlalchemy import Connection, Row, select, update

from cloud_hub.core.delivery import Delivery, ItemId, NewCase, NewReport, NewUpdate
from cloud_hub.store import schema
from cloud_hub.store.verdicts import confirm, send_again
from edge_cascade.messages import RunningModel


@dataclass(frozen=True, slots=True)
class Place:
    """Where a case's tensor or an update's delta lies. A pack has no name before it is whole."""

    blob: str
    offset: int
    length: int

    def in_pack(self, name: str) -> Place:
        """The same place, now that the pack has its name."""
        return Place(name, self.offset, self.length)


class _ModelJson(msgspec.Struct, frozen=True):
    model: str
    bundle: str
    plan: str
    point: int
    takes_releases: bool


def known_cases(connection: Connection, items: Iterable[ItemId]) -> set[ItemId]:
    """Those of the items that are cases here already."""
    seqs_of: dict[tuple[str, bytes], list[int]] = defaultdict(list)
    for device, boot, seq in items:
        seqs_of[device, boot].append(seq)
    table = schema.cases
    known: set[ItemId] = set()
    for (device, boot), seqs in seqs_of.items():
        query = select(table.c.seq).where(
            table.c.device == device, table.c.boot == boot, table.c.seq.in_(seqs)
        )
        known.update((device, boot, seq) for seq in connection.execute(query).scalars())
    return known


def known_updates(connection: Connection, updates: Iterable[NewUpdate]) -> set[tuple[str, str]]:
    """Those `(round, device)` of the updates that are here already."""
    table = schema.updates
    wanted = {(update.round_id, update.device) for update in updates}
    query = select(table.c.round_id, table.c.device).where(
        table.c.round_id.in_({round_id for round_id, _ in wanted}),
        table.c.device.in_({device for _, device in wanted}),
    )
    return {(row.round_id, row.device) for row in connection.execute(query)} & wanted


def insert_blob(connection: Connection, name: str, size_bytes: int, *, now_ms: int) -> None:
    """Name a pack, so that it is no orphan."""
    schema.insert_if_absent(
        connection, schema.blobs, [{"name": name, "size_bytes": size_bytes, "created_at_ms": now_ms}]
    )


def insert_cases(
    connection: Connection, cases: Sequence[tuple[NewCase, Place]], *, now_ms: int
) -> Counter[str]:
    """Insert new cases; what to add to the counters."""
    schema.insert_if_absent(
        connection, schema.cases, [_case_row(case, place, now_ms) for case, place in cases]
    )
    counts: Counter[str] = Counter()
    for case, place in cases:
        counts[f"cases/{case.model}/{case.reason.name.lower()}"] += 1
        counts["tensor_bytes"] += len(case.tensor)
        counts["stored_bytes"] += place.length
    return counts


def insert_updates(
    connection: Connection, updates: Sequence[tuple[NewUpdate, Place]], *, now_ms: int
) -> Counter[str]:
    """Insert client updates; what to add to the counters."""
    rows = [
        {
            "round_id": new.round_id,
            "device": new.device,
            "boot": new.boot,
            "seq": new.seq,
            "model": new.model,
            "training_base": new.training_base,
            "num_examples": new.num_examples,
            "encoding": new.encoding,
            "received_at_ms": now_ms,
            "blob": place.blob,
            "blob_offset": place.offset,
            "blob_length": place.length,
        }
        for new, place in updates
    ]
    schema.insert_if_absent(connection, schema.updates, rows)
    return Counter({"updates": len(rows), "stored_bytes": sum(place.length for _, place in updates)})


def apply_devices(
    connection: Connection, deliveries: Sequence[Delivery], *, now_ms: int
) -> tuple[set[ItemId], set[str]]:
    """Statuses, reports and times of last sight; the new reports and the devices that came online."""
    names = {delivery.device for delivery in deliveries if delivery.device is not None}
    _note_seen(connection, names, now_ms)
    before = _devices_by_name(
        connection,
        {d.device for d in deliveries if d.device is not None and (d.status is not None or d.report)},
    )
    online_before = {name for name, row in before.items() if row.online}
    online = set(online_before)
    reports: dict[str, NewReport] = {}
    for delivery in deliveries:
        status, report = delivery.status, delivery.report
        if status is not None:
            (online.add if status.online else online.discard)(status.device)
            values = {
                "online": status.online,
                "boot": status.boot,
                "daemon_version": status.daemon_version,
            }
            if status.online:
                # A last will names no models: what a board ran when it fell asleep stays known.
                values["models"] = _models_json(status.models)
            connection.execute(
                update(schema.devices).where(schema.devices.c.name == status.device).values(values)
            )
        if report is not None and _is_newer(report, reports.get(report.device), before[report.device]):
            reports[report.device] = report
    for report in reports.values():
        connection.execute(
            update(schema.devices)
            .where(schema.devices.c.name == report.device)
            .values(
                report_boot=report.boot,
                report_seq=report.seq,
                report_at_ms=report.taken_at_ms,
                counters=msgspec.json.encode(report.counters).decode(),
            )
        )
    came_online = online - online_before
    send_again(connection, came_online)
    return {report.item for report in reports.values()}, came_online


def apply_receipts(connection: Connection, deliveries: Iterable[Delivery]) -> None:
    """Mark what the devices confirm."""
    confirm(
        connection,
        [(d.device, receipt) for d in deliveries if d.device is not None for receipt in d.receipts],
    )


def _case_row(case: NewCase, place: Place, now_ms: int) -> dict[str, Any]:
    return {
        "device": case.device,
        "boot": case.boot,
        "seq": case.seq,
        "model": case.model,
        "bundle": case.bundle,
        "plan": case.plan,
        "point": case.point,
        "sensor": case.sensor,
        "taken_at_ms": case.taken_at_ms,
        "received_at_ms": now_ms,
        "exits": case.exits,
        "device_label": case.device_label,
        "escalated": case.escalated,
        "audit_ppm": case.audit_ppm,
        "reason": int(case.reason),
        "deferred": case.deferred,
        "uncertified": case.uncertified,
        "use": int(case.use),
        "blob": place.blob,
        "blob_offset": place.offset,
        "blob_length": place.length,
        "tensor_bytes": len(case.tensor),
        "state": schema.CaseState.PENDING.value,
    }


def _note_seen(connection: Connection, names: Collection[str], now_ms: int) -> None:
    rows = [
        {
            "name": name,
            "first_seen_ms": now_ms,
            "last_seen_ms": now_ms,
            "online": False,
            "models": "[]",
            "counters": "{}",
        }
        for name in sorted(names)
    ]
    schema.upsert(connection, schema.devices, rows, update=["last_seen_ms"])


def _devices_by_name(connection: Connection, names: Collection[str]) -> Mapping[str, Row[Any]]:
    if not names:
        return {}
    table = schema.devices
    return {row.name: row for row in connection.execute(select(table).where(table.c.name.in_(names)))}


def _is_newer(report: NewReport, in_group: NewReport | None, stored: Row[Any]) -> bool:
    """Whether this is not a repetition: within one boot `seq` grows; another boot is always news."""
    if in_group is not None and in_group.boot == report.boot:
        return report.seq > in_group.seq
    if stored.report_boot == report.boot and stored.report_seq is not None:
        return report.seq > int(stored.report_seq)
    return True


def _models_json(models: Sequence[RunningModel]) -> str:
    return msgspec.json.encode(
        [_ModelJson(m.model, m.bundle.hex(), m.plan, m.point, m.takes_releases) for m in models]
    ).decode()
