"""What is in the spool and whose turn it is: rows on disk, ownership in memory. Used by one thread.

What is in flight is known in memory alone: after a crash everything is offered again, and the hub says
"duplicate". An acknowledgement is believed at once and written with the next transaction; on a full disk
that may be much later, and meanwhile the row is not offered again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sqlite3
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from edge_cascade.durable import crash_point
from edge_daemon.core.spooling import (
    ROW_OVERHEAD_BYTES,
    Batch,
    BatchKey,
    Dropped,
    DropReason,
    Priority,
    Row,
    SpoolCounts,
    SpoolItem,
    SpoolLimits,
    count_drops,
    select_expired,
    select_surplus,
)
from edge_daemon.errors import SpoolError
from edge_daemon.ports import Clock
from edge_daemon.spool_file import Candidate, SpoolFile
from edge_daemon.sqlite_files import DamagedFileError, is_damage, is_full, move_aside

log = logging.getLogger(__name__)

RETRY_S: Final = 1.0
"""How long a disk that refused is left alone before it is asked again for what can wait."""
CLOCK_TICK_S: Final = 60.0
"""How often the running time is written: a crash makes rows younger by no more than this."""
LOOKAHEAD_ROWS: Final = 1024
"""How many rows of other keys a claim passes over to fill its batch."""


GoneUpdate = tuple[bytes, int, DropReason | None]
"""Boot and sequence number of a client update; None where the hub has it."""


@dataclass(frozen=True, slots=True)
class _Leaving:
    """A row that is gone, as soon as it can be written. `reason` None: the hub has it."""

    row: Row
    reason: DropReason | None


class SpoolLedger:
    """The rows, and who has them. Methods raise `sqlite3.Error` and `OSError` as they come; the caller hands
    them to `note_failure`, which says what is to become of the file."""

    def __init__(self, path: Path, limits: SpoolLimits, clock: Clock) -> None:
        self.counts = SpoolCounts()
        self.retry_at_s = 0.0
        self._path = path
        self._limits = limits
        self._clock = clock
        self._file: SpoolFile | None = None
        self._problem: str | None = None
        self._reopen_at_s = 0.0
        self._clock_written_s = 0.0
        self._reserve_checked_s = 0.0
        self._running_base_ms = 0
        self._running_since_s: float | None = None
        self._last_id = 0
        self._last_token = 0
        self._flights: dict[int, dict[int, Row]] = {}
        self._token_of: dict[int, int] = {}
        self._name_of: dict[int, tuple[bytes, int]] = {}
        self._id_of: dict[tuple[bytes, int], int] = {}
        self._deferred: dict[int, float] = {}
        self._leaving: dict[int, _Leaving] = {}
        self._lost: dict[Priority, Dropped] = {}
        self._going: list[GoneUpdate] = []

    @property
    def has_leaving(self) -> bool:
        """Whether rows wait for a transaction to be gone, or losses to be written down."""
        return bool(self._leaving or self._lost)

    def open(self) -> None:
        """Open, make or repair the file, unless it is open.

        Raises:
            SpoolError: while a disk that refused is left alone, or for a file that must not be touched.
        """
        self._ready_file()

    def close(self) -> None:
        """Give the file up, having written for how long the daemon ran."""
        if self._file is None:
            return
        with contextlib.suppress(sqlite3.Error), self._file.transaction():
            self._file.set_running_ms(self._running_ms())
        self._file.close()
        self._file = None

    def write(self, items: Sequence[SpoolItem]) -> list[GoneUpdate]:
        """One transaction: in with the items, out with what has left, has expired or has no room.

        Returns the client updates that it removed.
        """
        file = self._ready_file()
        now_ms = self._running_ms()
        added: list[SpoolItem] = []
        self._going = []
        with file.transaction():
            for item in items:
                self._last_id += 1
                if file.add(self._last_id, item, now_ms):
                    added.append(item)
            acknowledged, drops = self._remove_leaving(file)
            self._drop_expired(file, now_ms, drops)
            self._drop_surplus(file, added, acknowledged, drops)
            for reason, rows in drops.items():
                file.count_drops(reason, count_drops(rows))
            file.count_drops(DropReason.DISK, self._lost)
            if self.counts.rows and time.monotonic() >= self._clock_written_s + CLOCK_TICK_S:
                self._clock_written_s = time.monotonic()
                file.set_running_ms(now_ms)
            if items:
                crash_point("spool.before-commit")
        if items:
            crash_point("spool.after-commit")
        gone = acknowledged + [row for rows in drops.values() for row in rows]
        self._forget(row.id for row in gone)
        self._publish(
            rows=self.counts.rows + len(added) - len(gone),
            size_bytes=self.counts.size_bytes + _total(added) - _total(gone),
            drops=file.drops() if drops or self._lost else self.counts.drops,
            appended=self.counts.appended + len(added),
            acknowledged=self.counts.acknowledged + len(acknowledged),
            commits=self.counts.commits + 1,
        )
        self._lost.clear()
        self._problem = None
        if time.monotonic() >= self._reserve_checked_s + CLOCK_TICK_S:
            self._reserve_checked_s = time.monotonic()
            file.keep_reserve()
        return self._going

    def note_lost(self, items: Iterable[SpoolItem]) -> None:
        """Items that were not stored; the next transaction writes that they were."""
        for item in items:
            before = self._lost.get(item.priority, Dropped(0, 0))
            self._lost[item.priority] = Dropped(before.count + 1, before.size_bytes + item.size_bytes)

    def _remove_leaving(self, file: SpoolFile) -> tuple[list[Row], dict[DropReason, list[Row]]]:
        acknowledged: list[Row] = []
        drops: dict[DropReason, list[Row]] = {}
        for leaving in self._leaving.values():
            (acknowledged if leaving.reason is None else drops.setdefault(leaving.reason, [])).append(
                leaving.row
            )
        self._note_going(file, acknowledged, None)
        for reason, rows in drops.items():
            self._note_going(file, rows, reason)
        file.remove(self._leaving)
        return acknowledged, drops

    def _drop_expired(self, file: SpoolFile, now_ms: int, drops: dict[DropReason, list[Row]]) -> None:
        stored_before_ms = now_ms - round(self._limits.max_age_s * 1000)
        with closing(file.by_age()) as rows:
            expired = select_expired(rows, stored_before_ms=stored_before_ms, in_flight=self._token_of)
        if expired:
            self._note_going(file, expired, DropReason.EXPIRED)
            file.remove(row.id for row in expired)
            drops.setdefault(DropReason.EXPIRED, []).extend(expired)

    def _drop_surplus(
        self,
        file: SpoolFile,
        added: list[SpoolItem],
        acknowledged: list[Row],
        drops: dict[DropReason, list[Row]],
    ) -> None:
        freed_bytes = _total(acknowledged) + sum(map(_total, drops.values()))
        excess_bytes = self.counts.size_bytes + _total(added) - freed_bytes - self._limits.max_bytes
        if excess_bytes <= 0:
            return
        with closing(file.by_rank()) as rows:
            surplus = select_surplus(rows, excess_bytes=excess_bytes, in_flight=self._token_of)
        self._note_going(file, surplus, DropReason.LIMIT)
        file.remove(row.id for row in surplus)
        drops.setdefault(DropReason.LIMIT, []).extend(surplus)

    def _note_going(self, file: SpoolFile, rows: Iterable[Row], reason: DropReason | None) -> None:
        """Before they are deleted: which client updates are among them."""
        for row in rows:
            if row.priority is Priority.UPDATE and (name := file.name(row.id)) is not None:
                self._going.append((*name, reason))

    def claim(self, max_items: int, max_bytes: int) -> Batch | None:
        """Take rows of one key in flight, see `ports.Spool`."""
        if len(self._flights) >= self._limits.max_in_flight_batches:
            return None
        file = self._ready_file()
        while picked := self._pick(file, max_items, max_bytes):
            key = file.key(picked[0].key_no)
            bodies: dict[int, bytes] = {}
            rows: dict[int, Row] = {}
            for candidate in picked:
                row_id = candidate.row.id
                body = file.body(row_id)
                if body is None:
                    self._leaving[row_id] = _Leaving(candidate.row, DropReason.DAMAGED)
                    continue
                bodies[candidate.seq] = body
                rows[row_id] = candidate.row
            if rows:
                return self._take_off(key, bodies, rows)
        self._publish()
        return None

    def _take_off(self, key: BatchKey, bodies: dict[int, bytes], rows: dict[int, Row]) -> Batch:
        self._last_token += 1
        self._flights[self._last_token] = rows
        for row_id, seq in zip(rows, bodies, strict=True):
            self._token_of[row_id] = self._last_token
            self._name_of[row_id] = (key.boot, seq)
            self._id_of[key.boot, seq] = row_id
        self._publish()
        return Batch(self._last_token, key, bodies)

    def _land(self, row_id: int) -> None:
        """No longer in flight; a batch without rows frees its slot."""
        token = self._token_of.pop(row_id, None)
        if token is None:
            return
        del self._flights[token][row_id]
        if not self._flights[token]:
            del self._flights[token]
        del self._id_of[self._name_of.pop(row_id)]

    def _pick(self, file: SpoolFile, max_items: int, max_bytes: int) -> list[Candidate]:
        """The rows of the next batch: all of one key, that of the row whose turn it is."""
        now_s = time.monotonic()
        for row_id in [row_id for row_id, until_s in self._deferred.items() if until_s <= now_s]:
            del self._deferred[row_id]
        picked: list[Candidate] = []
        size_bytes = passed_over = 0
        with closing(file.in_send_order()) as candidates:
            for candidate in candidates:
                row_id = candidate.row.id
                if row_id in self._token_of or row_id in self._deferred or row_id in self._leaving:
                    continue
                if picked and candidate.key_no != picked[0].key_no:
                    passed_over += 1
                    if passed_over >= LOOKAHEAD_ROWS:
                        break
                    continue
                body_bytes = candidate.row.size_bytes - ROW_OVERHEAD_BYTES
                if picked and size_bytes + body_bytes > max_bytes:
                    break
                picked.append(candidate)
                size_bytes += body_bytes
                if len(picked) >= max_items:
                    break
        return picked

    def leave(self, boot: bytes, seqs: Sequence[int], reason: DropReason | None) -> None:
        """These rows go with the next transaction, counted as dropped if there is a reason."""
        for row in self._rows_named(boot, seqs):
            if row.id not in self._leaving:
                self._leaving[row.id] = _Leaving(row, reason)
                self._land(row.id)
        self._publish()

    def defer(self, boot: bytes, seqs: Sequence[int], delay_s: float) -> None:
        """Put rows back, not to be claimed for a while."""
        for row in self._rows_named(boot, seqs):
            if row.id not in self._leaving:
                self._deferred[row.id] = time.monotonic() + delay_s
                self._land(row.id)
        self._publish()

    def release(self, token: int) -> None:
        """Put back what is left of a batch."""
        for row_id in list(self._flights.get(token, ())):
            self._land(row_id)
        self._publish()

    def _rows_named(self, boot: bytes, seqs: Sequence[int]) -> list[Row]:
        """What is in flight is known without the disk, so that its slot is freed whatever the disk says."""
        found: list[Row] = []
        for seq in seqs:
            row_id = self._id_of.get((boot, seq))
            if row_id is not None:
                found.append(self._flights[self._token_of[row_id]][row_id])
        missing = [seq for seq in seqs if (boot, seq) not in self._id_of]
        if missing and self._file is not None:
            found += [row for seq in missing if (row := self._file.find(boot, seq)) is not None]
        return found

    def _forget(self, row_ids: Iterable[int]) -> None:
        for row_id in row_ids:
            self._leaving.pop(row_id, None)
            self._deferred.pop(row_id, None)
            self._land(row_id)

    def _publish(self, **changes: Any) -> None:
        in_flight_bytes = sum(_total(rows.values()) for rows in self._flights.values())
        self.counts = dataclasses.replace(
            self.counts,
            in_flight_rows=len(self._token_of),
            in_flight_bytes=in_flight_bytes,
            deferred_rows=len(self._deferred),
            leaving_rows=len(self._leaving),
            **changes,
        )

    # --- the file, and what may happen to it ---------------------------------------------------------------

    def _running_ms(self) -> int:
        """How long the daemon has run in all its lives: the only clock by which rows grow old."""
        assert self._running_since_s is not None
        return self._running_base_ms + round((self._clock.monotonic_s() - self._running_since_s) * 1000)

    def _ready_file(self) -> SpoolFile:
        if self._file is None and time.monotonic() < self._reopen_at_s:
            raise SpoolError(self._problem or "the spool's file is not open")
        return self._file or self._open_file()

    def _open_file(self) -> SpoolFile:
        try:
            file = SpoolFile.open(self._path)
        except DamagedFileError as damage:
            file = self._replace_damaged(damage)
        rows, size_bytes, last_id = file.totals()
        # Not below what it was: a fresh file knows of no time, and rows must not grow younger.
        running_ms = file.running_ms()
        if self._running_since_s is not None:
            running_ms = max(running_ms, self._running_ms())
        self._running_since_s = self._clock.monotonic_s()
        self._running_base_ms = running_ms
        self._last_id = max(last_id, self._last_id)
        self._file = file
        self._problem = None
        self._publish(rows=rows, size_bytes=size_bytes, drops=file.drops())
        return file

    def _replace_damaged(self, damage: DamagedFileError) -> SpoolFile:
        aside = move_aside(self._path)
        self._publish(corruptions=self.counts.corruptions + 1)
        # Ids may be given anew; whatever was in flight is offered again.
        for ids in (self._leaving, self._deferred, self._flights, self._token_of, self._name_of, self._id_of):
            ids.clear()
        file = SpoolFile.open(self._path)
        lost: dict[Priority, Dropped] = {}
        try:
            with file.transaction():
                lost = file.salvage(aside)
                file.count_drops(DropReason.CORRUPT, lost)
        except sqlite3.Error as error:
            log.warning("nothing could be salvaged from %s: %s", aside, error)
        log.error(
            "spool damaged (%s): moved to %s, rows saved=%d, rows known lost=%d",
            damage,
            aside,
            file.totals()[0],
            sum(dropped.count for dropped in lost.values()),
        )
        return file

    def note_failure(self, error: Exception) -> str:
        """Say it once, and decide what the file needs before it is asked again."""
        problem = f"{self._path}: {error}"
        if problem != self._problem:
            log.warning("the spool takes nothing: %s", problem)
        self._problem = problem
        self.retry_at_s = time.monotonic() + RETRY_S
        if isinstance(error, sqlite3.Error) and is_full(error) and self._file is not None:
            with contextlib.suppress(sqlite3.Error, OSError):
                self._file.use_reserve()
        elif isinstance(error, (sqlite3.OperationalError, sqlite3.DatabaseError, OSError)):
            # After a failed fsync nobody knows what the kernel kept: only a fresh look at the file does.
            if self._file is not None:
                self._file.close()
                self._file = None
            is_broken = isinstance(error, sqlite3.Error) and is_damage(error)
            self._reopen_at_s = 0.0 if is_broken else self.retry_at_s
        else:
            log.error("a defect in the spool", exc_info=error)
        return problem


def _total(rows: Iterable[Row | SpoolItem]) -> int:
    return sum(row.size_bytes for row in rows)
