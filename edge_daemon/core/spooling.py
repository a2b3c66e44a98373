"""What waits for the hub, in which order it leaves, and what goes first when room is short. No I/O.

Rows leave in the order of `Priority`, then age. At the byte limit they are given up in this order: expired,
then lowest priority, then oldest. An audited case has one priority whether the gate escalated it, accepted
it or failed, and neither rule looks at its size or content: which audits survive a full spool says nothing
about their outcome, so those that reach the hub are still a fair draw.
"""

from __future__ import annotations

import enum
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

import msgspec

from edge_cascade.messages import (
    BOOT_BYTES,
    DIGEST_BYTES,
    Case,
    ClientUpdate,
    Reason,
    Report,
    ShadowReport,
    SwapReport,
)

ROW_OVERHEAD_BYTES: Final = 64
"""What a row takes beside its body: its other columns, two index entries, the slack of its page."""

SWAP_PLAN: Final = "swap"
SHADOW_PLAN: Final = "shadow"
"""In the key of a row that is a report, but not of counters: which one, so that rows of old stay readable."""

_NO_BUNDLE: Final = bytes(DIGEST_BYTES)
_encode = msgspec.msgpack.Encoder().encode


class ItemKind(enum.IntEnum):
    """Which message a row becomes."""

    CASE = 1
    UPDATE = 2
    REPORT = 3


class Priority(enum.IntEnum):
    """Who leaves first, and who is given up last; the name is the `kind` under which a drop is counted."""

    FAILED = 10
    """No stage answered. Often one broken sensor, many times."""
    ESCALATION = 20
    UPDATE = 30
    """Large, but a round waits for it."""
    AUDIT = 40
    """Few, and what the field's certificate rests on."""
    REPORT = 50
    """Small, and says what was lost of the others."""


class DropReason(enum.StrEnum):
    """Why a row left the spool without the hub having it."""

    EXPIRED = "expired"
    LIMIT = "limit"
    REJECTED = "rejected"
    """The hub will never take this item."""
    REFUSED = "refused"
    """The hub could not read it alone, many times over a long time."""
    DAMAGED = "damaged"
    """Its bytes on disk are no message any more."""
    DISK = "disk"
    """The disk did not take it when it came; counted on disk with the next commit that succeeds."""
    CORRUPT = "corrupt"
    """It was on a page of the file that could not be read; the bytes are not known."""


@dataclass(frozen=True, slots=True)
class BatchKey:
    """What items must have in common to share a frame. A report of counters has no model, bundle and plan."""

    kind: ItemKind
    boot: bytes
    model: str
    bundle: bytes
    plan: str

    def __post_init__(self) -> None:
        assert len(self.boot) == BOOT_BYTES
        assert len(self.bundle) == DIGEST_BYTES


@dataclass(frozen=True, slots=True)
class SpoolItem:
    """One row: known by `(key.boot, seq)`; `body` is the msgpack of the message (a `Case` for a case)."""

    key: BatchKey
    seq: int
    priority: Priority
    body: bytes

    @property
    def size_bytes(self) -> int:
        """What the item counts against the spool's limit."""
        return len(self.body) + ROW_OVERHEAD_BYTES


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one key that are in flight until acknowledged, rejected, deferred or released."""

    token: int
    key: BatchKey
    bodies: Mapping[int, bytes]
    """Body by `seq`, in the order in which they are to leave."""

    @property
    def size_bytes(self) -> int:
        """Sum of the bodies."""
        return sum(map(len, self.bodies.values()))


@dataclass(frozen=True, slots=True)
class SpoolLimits:
    """`max_age_s` counts time in which the daemon runs; `commit_window_ms` bounds the wait for company."""

    max_bytes: int = 64 * 2**20
    max_age_s: float = 7 * 86400.0
    commit_window_ms: float = 10.0
    max_in_flight_batches: int = 4


@dataclass(frozen=True, slots=True)
class Dropped:
    """How many rows of one kind went for one reason, and the bytes that they counted."""

    count: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class SpoolCounts:
    """Where the spool stands. `drops` are those on disk; what follows them counts since the daemon's start.

    Of what the daemon accepted, every row is in `rows`, in `acknowledged` or in `drops`.
    """

    rows: int = 0
    size_bytes: int = 0
    in_flight_rows: int = 0
    in_flight_bytes: int = 0
    deferred_rows: int = 0
    leaving_rows: int = 0
    drops: Mapping[tuple[DropReason, Priority], Dropped] = field(default_factory=dict)
    appended: int = 0
    acknowledged: int = 0
    commits: int = 0
    spool_failed: int = 0
    corruptions: int = 0

    @property
    def waiting_rows(self) -> int:
        """Rows that a claim could take now."""
        return self.rows - self.in_flight_rows - self.deferred_rows - self.leaving_rows

    @property
    def waiting_bytes(self) -> int:
        """Bytes that are not in flight."""
        return self.size_bytes - self.in_flight_bytes


@dataclass(frozen=True, slots=True)
class Row:
    """A row without its body, as the selections below see it."""

    id: int
    priority: Priority
    stored_ms: int
    size_bytes: int


def priority_of_case(case: Case) -> Priority:
    """The audit coin alone decides for an audited case; see the module's head."""
    if case.audited:
        return Priority.AUDIT
    return Priority.FAILED if case.reason is Reason.FAILED else Priority.ESCALATION


def case_item(case: Case, *, boot: bytes, model: str, bundle: bytes, plan: str) -> SpoolItem:
    """The row of a case; `bundle` is the 32 bytes of the bundle's id."""
    key = BatchKey(ItemKind.CASE, boot, model, bundle, plan)
    return SpoolItem(key, case.seq, priority_of_case(case), _encode(case))


def update_item(update: ClientUpdate) -> SpoolItem:
    """The row of a client update."""
    key = BatchKey(ItemKind.UPDATE, update.boot, update.model, update.training_base, "")
    return SpoolItem(key, update.seq, Priority.UPDATE, _encode(update))


def report_item(report: Report) -> SpoolItem:
    """The row of a report."""
    key = BatchKey(ItemKind.REPORT, report.boot, "", _NO_BUNDLE, "")
    return SpoolItem(key, report.seq, Priority.REPORT, _encode(report))


def swap_item(report: SwapReport) -> SpoolItem:
    """The row of a report of a swap."""
    key = BatchKey(ItemKind.REPORT, report.boot, report.model, report.bundle, SWAP_PLAN)
    return SpoolItem(key, report.seq, Priority.REPORT, _encode(report))


def shadow_item(report: ShadowReport) -> SpoolItem:
    """The row of a report of shadowed pairs."""
    key = BatchKey(ItemKind.REPORT, report.boot, report.model, report.bundle, SHADOW_PLAN)
    return SpoolItem(key, report.seq, Priority.AUDIT, _encode(report))


def select_expired(by_age: Iterable[Row], *, stored_before_ms: int, in_flight: Container[int]) -> list[Row]:
    """The rows that are too old, of rows in the order of their storing. What is in flight is left alone."""
    expired = []
    for row in by_age:
        if row.stored_ms >= stored_before_ms:
            break
        if row.id not in in_flight:
            expired.append(row)
    return expired


def select_surplus(by_rank: Iterable[Row], *, excess_bytes: int, in_flight: Container[int]) -> list[Row]:
    """Rows to give up so that `excess_bytes` become free, of rows by rising priority, then age.

    What is in flight goes last: the hub may have it already, and its acknowledgement be on the way.
    """
    surplus: list[Row] = []
    spared: list[Row] = []
    for row in by_rank:
        if excess_bytes <= 0:
            return surplus
        if row.id in in_flight:
            spared.append(row)
            continue
        surplus.append(row)
        excess_bytes -= row.size_bytes
    for row in spared:
        if excess_bytes <= 0:
            break
        surplus.append(row)
        excess_bytes -= row.size_bytes
    return surplus


def count_drops(rows: Iterable[Row]) -> dict[Priority, Dropped]:
    """The rows by the kind under which they are counted."""
    counted: dict[Priority, Dropped] = {}
    for row in rows:
        before = counted.get(row.priority, Dropped(0, 0))
        counted[row.priority] = Dropped(before.count + 1, before.size_bytes + row.size_bytes)
    return counted
