"""What boards report of swaps, of shadowed pairs and of their health, as functions of the connection."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec
from sqlalchemy import Connection, Table, delete, func, select, tuple_

from cloud_hub.core.delivery import Delivery, ItemId
from cloud_hub.store import schema
from cloud_hub.store.rollouts import open_rollouts
from edge_cascade.health_keys import HEALTH_KEYS

KEPT_MS: Final = 30 * 86_400_000
REMOVED_AT_ONCE: Final = 1000
MAX_ID: Final = 2**63 - 1


def insert_release_reports(
    connection: Connection, deliveries: Sequence[Delivery], *, now_ms: int
) -> set[ItemId]:
    """Keep reports of swaps and of shadowed pairs, and what health needs of counters; the new reports."""
    swaps = [
        {
            "device": swap.device,
            "boot": swap.boot,
            "seq": swap.seq,
            "model": swap.model,
            "release": swap.release,
            "bundle": swap.bundle,
            "serving": swap.serving,
            "failure": swap.failure,
            "detail": swap.detail,
            "taken_at_ms": swap.taken_at_ms,
            "received_at_ms": now_ms,
        }
        for swap in (delivery.swap for delivery in deliveries)
        if swap is not None
    ]
    shadows = [
        {
            "device": shadow.device,
            "boot": shadow.boot,
            "seq": shadow.seq,
            "model": shadow.model,
            "bundle": shadow.bundle,
            "other": shadow.other,
            "scenes": msgspec.msgpack.encode(shadow.scenes),
            "received_at_ms": now_ms,
        }
        for shadow in (delivery.shadow for delivery in deliveries)
        if shadow is not None
    ]
    schema.insert_if_absent(connection, schema.vitals, _vitals(deliveries, now_ms))
    return _insert_new(connection, schema.swap_reports, swaps) | _insert_new(
        connection, schema.shadow_reports, shadows
    )


def remove_old_vitals(connection: Connection, *, now_ms: int) -> int:
    """Remove what is too old to judge by; how many rows that were, `REMOVED_AT_ONCE` at most."""
    return _remove_old(connection, schema.vitals, now_ms)


def remove_old_shadows(connection: Connection, *, now_ms: int) -> int:
    """Remove old pairs that judge no rollout that is under way; how many rows, `REMOVED_AT_ONCE` at most."""
    newest = connection.execute(select(func.max(schema.shadow_reports.c.id))).scalar() or 0
    judging = [row.scenes_after for row in open_rollouts(connection) if row.state.is_widening]
    # The newest row stays: SQLite gives ids of an empty table anew, and rollouts remember where they began.
    return _remove_old(connection, schema.shadow_reports, now_ms, upto_id=min([newest - 1, *judging]))


def _remove_old(connection: Connection, table: Table, now_ms: int, *, upto_id: int = MAX_ID) -> int:
    # Rows are in the order of their receipt: nobody waits until a whole table was looked through.
    first = select(table.c.id).where(table.c.id <= upto_id).order_by(table.c.id).limit(REMOVED_AT_ONCE)
    # What was received in the future was received by a clock that was wrong.
    is_old = ~table.c.received_at_ms.between(now_ms - KEPT_MS, now_ms + KEPT_MS)
    return connection.execute(delete(table).where(table.c.id.in_(first), is_old)).rowcount


def _insert_new(connection: Connection, table: Table, rows: list[dict[str, Any]]) -> set[ItemId]:
    if not rows:
        return set()
    asked = {(row["device"], row["boot"], row["seq"]) for row in rows}
    name = tuple_(table.c.device, table.c.boot, table.c.seq)
    known = {
        tuple(row)
        for row in connection.execute(
            select(table.c.device, table.c.boot, table.c.seq).where(name.in_(list(asked)))
        )
    }
    schema.insert_if_absent(connection, table, rows)
    return asked - known


def _vitals(deliveries: Iterable[Delivery], now_ms: int) -> list[dict[str, Any]]:
    return [
        {
            "device": report.device,
            "boot": report.boot,
            "seq": report.seq,
            "received_at_ms": now_ms,
            "counters": msgspec.json.encode(
                {key: value for key, value in report.counters.items() if key.startswith(HEALTH_KEYS)}
            ).decode(),
        }
        for report in (delivery.report for delivery in deliveries)
        if report is not None
    ]
