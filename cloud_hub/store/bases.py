"""Training bases in the store, and what of the rounds is removed after a while. Functions of the connection.

A pack is removed in two steps: here its row in `blobs`, once nothing names it; then, by the caller and once
that is committed, the file.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection, delete, func, select, tuple_, update

from cloud_hub.store import schema
from cloud_hub.store.deliveries import Place
from edge_cascade.messages import DIGEST_BYTES

NO_ORIGIN: Final = bytes(DIGEST_BYTES)
MAX_CHAIN: Final = 64
"""As many steps as a `TrainingBase` holds."""

KEEP_UPDATES_MS: Final = 7 * 86_400_000
"""After the end of the round that counted them, or of their receipt where none did."""
KEEP_BASES_MS: Final = 30 * 86_400_000
_MAX_REMOVED: Final = 1000

_bases = schema.training_bases


@dataclass(frozen=True, slots=True)
class BaseRow:
    """A training base: where its step and the whole of it lie, and which base the step begins at."""

    digest: bytes
    model: str
    graph: bytes
    origin: bytes
    step: Place
    whole: Place
    size_bytes: int


def insert_base(connection: Connection, base: BaseRow, *, now_ms: int) -> None:
    """Keep a base; one of this digest that is there already stays as it is."""
    row = {
        "digest": base.digest,
        "model": base.model,
        "graph": base.graph,
        "origin": base.origin,
        "blob": base.whole.blob,
        "step_offset": base.step.offset,
        "step_length": base.step.length,
        "whole_offset": base.whole.offset,
        "whole_length": base.whole.length,
        "size_bytes": base.size_bytes,
        "created_at_ms": now_ms,
    }
    schema.insert_if_absent(connection, _bases, [row])


def find_base(connection: Connection, digest: bytes) -> BaseRow | None:
    """The base of a digest."""
    row = connection.execute(select(_bases).where(_bases.c.digest == digest)).mappings().first()
    if row is None:
        return None
    return BaseRow(
        row["digest"],
        row["model"],
        row["graph"],
        row["origin"],
        Place(row["blob"], row["step_offset"], row["step_length"]),
        Place(row["blob"], row["whole_offset"], row["whole_length"]),
        row["size_bytes"],
    )


def lead_up_to(connection: Connection, digest: bytes, *, limit: int = MAX_CHAIN) -> list[BaseRow]:
    """The base, the one its step begins at, and so on backwards, as far as they are there."""
    found: list[BaseRow] = []
    while len(found) < limit:
        base = find_base(connection, digest)
        if base is None:
            break
        found.append(base)
        if base.origin == NO_ORIGIN:
            break
        digest = base.origin
    return found


@dataclass(frozen=True, slots=True)
class Removed:
    """So many rows of updates and bases are gone, and nothing names these packs any more."""

    rows: int
    packs: frozenset[str]


def remove_old(connection: Connection, *, now_ms: int, open_bases: Collection[bytes] = ()) -> Removed:
    """Remove updates of rounds long over, bases that nothing starts from, and what rules no longer need.

    A bounded number at a time: the next call goes on. Updates from `open_bases` stay: were one sent again,
    nothing but its row would tell that it has been a vote.
    """
    names = _remove_updates(connection, now_ms - KEEP_UPDATES_MS, open_bases)
    names += _remove_bases(connection, now_ms - KEEP_BASES_MS)
    return Removed(len(names), _forget_packs(connection, {*names, *_forget_rules(connection)}))


def _remove_updates(connection: Connection, before_ms: int, open_bases: Collection[bytes]) -> list[str]:
    updates, rounds = schema.updates, schema.rounds
    still_needed = select(rounds.c.id).where(
        rounds.c.outcome.is_(None) | (rounds.c.closed_at_ms >= before_ms)
    )
    old = (
        select(updates.c.id, updates.c.blob)
        .where(
            updates.c.noted,
            updates.c.received_at_ms < before_ms,
            updates.c.counted_in.is_(None) | updates.c.counted_in.not_in(still_needed),
            updates.c.training_base.not_in(sorted(open_bases)),
        )
        .limit(_MAX_REMOVED)
    )
    found = connection.execute(old).all()
    connection.execute(delete(updates).where(updates.c.id.in_([row.id for row in found])))
    return [row.blob for row in found]


def _remove_bases(connection: Connection, before_ms: int) -> list[str]:
    series = schema.series
    open_ones = select(series.c.base, series.c.first_base).where(series.c.ended_at_ms.is_(None))
    needed = {digest for row in connection.execute(open_ones) for digest in row}
    # What a model's last series came to is where its next one may start.
    newest = select(func.max(series.c.id)).group_by(series.c.model)
    needed.update(connection.execute(select(series.c.base).where(series.c.id.in_(newest))).scalars())
    needed.update(
        connection.execute(select(schema.rounds.c.result).where(schema.rounds.c.outcome.is_(None))).scalars()
    )
    # With the steps that lead to them: a board may hold any base on the way.
    kept = {base.digest for digest in needed if digest is not None for base in lead_up_to(connection, digest)}
    old = select(_bases.c.digest, _bases.c.blob).where(_bases.c.created_at_ms < before_ms)
    found = [row for row in connection.execute(old) if row.digest not in kept][:_MAX_REMOVED]
    connection.execute(delete(_bases).where(_bases.c.digest.in_([row.digest for row in found])))
    return [row.blob for row in found]


def _forget_rules(connection: Connection) -> list[str]:
    """Packs of server rules' states: a series goes on from that of its last committed round alone."""
    rounds, series = schema.rounds, schema.series
    newest = (
        select(rounds.c.series, func.max(rounds.c.number))
        .join_from(rounds, series, rounds.c.series == series.c.id)
        .where(rounds.c.outcome == "committed", series.c.ended_at_ms.is_(None))
        .group_by(rounds.c.series)
    )
    is_over = rounds.c.rule_blob.is_not(None) & rounds.c.outcome.is_not(None)
    found = connection.execute(
        select(rounds.c.id, rounds.c.rule_blob).where(
            is_over, tuple_(rounds.c.series, rounds.c.number).not_in(newest)
        )
    ).all()
    connection.execute(
        update(rounds)
        .where(rounds.c.id.in_([row.id for row in found]))
        .values(rule_blob=None, rule_offset=None, rule_length=None)
    )
    return [row.rule_blob for row in found]


def _forget_packs(connection: Connection, names: Collection[str]) -> frozenset[str]:
    """Remove the rows of packs that nothing names any more, whichever tables there are; which they are."""
    left = set(names)
    for table in schema.metadata.sorted_tables:
        for key in table.foreign_keys:
            if left and key.column is schema.blobs.c.name:
                query = select(key.parent).where(key.parent.in_(sorted(left))).distinct()
                left -= set(connection.execute(query).scalars())
    connection.execute(delete(schema.blobs).where(schema.blobs.c.name.in_(sorted(left))))
    return frozenset(left)
