"""The spool's SQLite file: schema, statements, damage. Used by one thread; decides nothing (see `spooling`).

WAL with `synchronous=FULL`: a commit that has returned survives a power cut. The file is locked for this one
process. SQLite keeps no checksum of its pages, so each body has a CRC of its own.

Even a deletion needs room. Beside the file lies a reserve of the size to which the log grows before it is
written back; on a full disk it is given up, the log is written back into its space, and the log's own space
then takes the deletions, which make room for the next rows.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from edge_cascade.durable import sync_directory
from edge_daemon.core.spooling import (
    ROW_OVERHEAD_BYTES,
    BatchKey,
    Dropped,
    DropReason,
    ItemKind,
    Priority,
    Row,
    SpoolItem,
)
from edge_daemon.errors import SpoolInUseError, SpoolVersionError
from edge_daemon.sqlite_files import SchemaError, is_busy, open_database, transaction

log = logging.getLogger(__name__)

SCHEMA_VERSION: Final = 1
RESERVE_BYTES: Final = 2**20

_SCHEMA: Final = """
BEGIN IMMEDIATE;
CREATE TABLE batch_key (
    no INTEGER PRIMARY KEY, kind INTEGER NOT NULL, boot BLOB NOT NULL,
    model TEXT NOT NULL, bundle BLOB NOT NULL, plan TEXT NOT NULL,
    UNIQUE (kind, boot, model, bundle, plan));
CREATE TABLE item (
    id INTEGER PRIMARY KEY, boot BLOB NOT NULL, seq INTEGER NOT NULL, key_no INTEGER NOT NULL,
    priority INTEGER NOT NULL, stored_ms INTEGER NOT NULL, crc INTEGER NOT NULL, body BLOB NOT NULL);
CREATE UNIQUE INDEX item_name ON item (boot, seq);
CREATE INDEX item_rank ON item (priority);
CREATE TABLE dropped (
    reason TEXT NOT NULL, kind INTEGER NOT NULL, count INTEGER NOT NULL, size_bytes INTEGER NOT NULL,
    PRIMARY KEY (reason, kind)) WITHOUT ROWID;
CREATE TABLE clock (one INTEGER PRIMARY KEY CHECK (one = 1), running_ms INTEGER NOT NULL);
INSERT INTO clock VALUES (1, 0);
PRAGMA user_version = 1;
COMMIT;
"""
_ROW: Final = "id, priority, stored_ms, length(body)"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A row that a claim may take."""

    row: Row
    key_no: int
    seq: int


class SpoolFile:
    """One open file. Methods raise `sqlite3.Error` as it comes; `sqlite_files` tells them apart."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection = connection
        self._reserve = path.with_name(f"{path.name}-reserve")
        self._key_nos: dict[BatchKey, int] = {}
        self._keys: dict[int, BatchKey] = {}

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open or create, and check every page.

        Raises:
            DamagedFileError: when it must be moved aside.
            SpoolVersionError: when a newer daemon wrote it.
            SpoolInUseError: when another process has it.
            sqlite3.Error, OSError: when the disk does not let us; it may later.
        """
        try:
            connection = open_database(path, lambda connection: _prepare(connection, path))
        except sqlite3.Error as error:
            if is_busy(error):
                raise SpoolInUseError(f"{path} is in use by another process") from error
            raise
        sync_directory(path.parent)
        return cls(connection, path)

    def close(self) -> None:
        """Give the file up; what was committed stays."""
        self._connection.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Everything inside is committed and fsynced at its end, or nothing is."""
        try:
            with transaction(self._connection):
                yield
        except BaseException:
            # Keys made inside are gone with it.
            self._key_nos.clear()
            raise

    def keep_reserve(self) -> None:
        """Have the reserve, if there is room for it."""
        try:
            if not self._reserve.exists():
                with self._reserve.open("wb") as file:
                    os.posix_fallocate(file.fileno(), 0, RESERVE_BYTES)
        except OSError as error:
            log.debug("no room for the spool's reserve: %s", error)
            with contextlib.suppress(OSError):
                self._reserve.unlink()

    def use_reserve(self) -> None:
        """The disk is full: write the log back, so that its space serves the next commits."""
        self._reserve.unlink(missing_ok=True)
        self._connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()

    # --- writing, inside a transaction ---------------------------------------------------------------------

    def add(self, row_id: int, item: SpoolItem, stored_ms: int) -> bool:
        """Insert one row; False where `(boot, seq)` is there already."""
        cursor = self._connection.execute(
            "INSERT INTO item VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (boot, seq) DO NOTHING",
            (
                *(row_id, item.key.boot, item.seq, self._key_no(item.key), int(item.priority)),
                *(stored_ms, zlib.crc32(item.body), item.body),
            ),
        )
        return cursor.rowcount == 1

    def remove(self, row_ids: Iterable[int]) -> None:
        """Delete rows."""
        self._connection.executemany("DELETE FROM item WHERE id = ?", ((row_id,) for row_id in row_ids))

    def count_drops(self, reason: DropReason, drops: Mapping[Priority, Dropped]) -> None:
        """Add to the drop counters."""
        self._connection.executemany(
            "INSERT INTO dropped VALUES (?, ?, ?, ?) ON CONFLICT (reason, kind) DO UPDATE SET "
            "count = count + excluded.count, size_bytes = size_bytes + excluded.size_bytes",
            ((reason.value, int(kind), dropped.count, dropped.size_bytes) for kind, dropped in drops.items()),
        )

    def set_running_ms(self, running_ms: int) -> None:
        """Remember for how long the daemon has run in all its lives."""
        self._connection.execute("UPDATE clock SET running_ms = ?", (running_ms,))

    # --- reading -------------------------------------------------------------------------------------------

    def running_ms(self) -> int:
        """For how long the daemon has run, as far as this file knows."""
        (persisted,) = self._connection.execute("SELECT running_ms FROM clock").fetchone()
        (newest,) = self._connection.execute(
            "SELECT coalesce((SELECT stored_ms FROM item ORDER BY id DESC LIMIT 1), 0)"
        ).fetchone()
        return max(int(persisted), int(newest))

    def totals(self) -> tuple[int, int, int]:
        """Rows, what they count in bytes, and the highest id given."""
        rows, size_bytes, last = self._connection.execute(
            "SELECT count(*), coalesce(sum(length(body)), 0), coalesce(max(id), 0) FROM item"
        ).fetchone()
        return int(rows), int(size_bytes) + int(rows) * ROW_OVERHEAD_BYTES, int(last)

    def drops(self) -> dict[tuple[DropReason, Priority], Dropped]:
        """The drop counters."""
        return {
            (DropReason(reason), Priority(kind)): Dropped(count, size_bytes)
            for reason, kind, count, size_bytes in self._connection.execute("SELECT * FROM dropped")
        }

    def by_age(self) -> Generator[Row, None, None]:
        """Every row, oldest first."""
        yield from map(_row, self._connection.execute(f"SELECT {_ROW} FROM item ORDER BY id"))  # noqa: S608

    def by_rank(self) -> Generator[Row, None, None]:
        """Every row, lowest priority first, then oldest."""
        yield from map(
            _row,
            self._connection.execute(f"SELECT {_ROW} FROM item ORDER BY priority, id"),  # noqa: S608
        )

    def in_send_order(self) -> Generator[Candidate, None, None]:
        """Every row, highest priority first, then oldest."""
        for priority in sorted(Priority, reverse=True):
            for *row, key_no, seq in self._connection.execute(
                f"SELECT {_ROW}, key_no, seq FROM item WHERE priority = ? ORDER BY id",  # noqa: S608
                (int(priority),),
            ):
                yield Candidate(_row(row), key_no, seq)

    def find(self, boot: bytes, seq: int) -> Row | None:
        """The row of that name."""
        found = self._connection.execute(
            f"SELECT {_ROW} FROM item WHERE boot = ? AND seq = ?",  # noqa: S608
            (boot, seq),
        ).fetchone()
        return None if found is None else _row(found)

    def name(self, row_id: int) -> tuple[bytes, int] | None:
        """Boot and sequence number of the row."""
        found = self._connection.execute("SELECT boot, seq FROM item WHERE id = ?", (row_id,)).fetchone()
        return None if found is None else (bytes(found[0]), int(found[1]))

    def body(self, row_id: int) -> bytes | None:
        """The bytes as they were given, None where they are not the same any more."""
        found = self._connection.execute("SELECT crc, body FROM item WHERE id = ?", (row_id,)).fetchone()
        if found is None or zlib.crc32(found[1]) != found[0]:
            return None
        return bytes(found[1])

    def key(self, key_no: int) -> BatchKey:
        """The batch key of that number."""
        if key_no not in self._keys:
            kind, boot, model, bundle, plan = self._connection.execute(
                "SELECT kind, boot, model, bundle, plan FROM batch_key WHERE no = ?", (key_no,)
            ).fetchone()
            self._keys[key_no] = BatchKey(ItemKind(kind), boot, model, bundle, plan)
        return self._keys[key_no]

    def _key_no(self, key: BatchKey) -> int:
        if key not in self._key_nos:
            values = (int(key.kind), key.boot, key.model, key.bundle, key.plan)
            self._connection.execute(
                "INSERT INTO batch_key (kind, boot, model, bundle, plan) VALUES (?, ?, ?, ?, ?) "
                "ON CONFLICT DO NOTHING",
                values,
            )
            (self._key_nos[key],) = self._connection.execute(
                "SELECT no FROM batch_key WHERE kind = ? AND boot = ? AND model = ? AND bundle = ? "
                "AND plan = ?",
                values,
            ).fetchone()
        return self._key_nos[key]

    # --- damage --------------------------------------------------------------------------------------------

    def salvage(self, damaged: Path) -> dict[Priority, Dropped]:
        """Take over what `damaged` still gives, inside a transaction; what is known to be lost, by kind.

        The rank index is a second witness of which rows there were: rows are read from both ends up to the
        damage, and what the index has beyond them is lost. Where the index is damaged as well, nobody knows.
        """
        source = sqlite3.connect(damaged, isolation_level=None, timeout=0.2)
        try:
            source.execute("PRAGMA locking_mode = EXCLUSIVE")
            expected: dict[int, int] = dict(
                _while_readable(source, "SELECT priority, count(*) FROM item INDEXED BY item_rank GROUP BY 1")
            )
            self._connection.executemany(
                "INSERT OR REPLACE INTO dropped VALUES (?, ?, ?, ?)",
                _while_readable(source, "SELECT * FROM dropped"),
            )
            for (running_ms,) in _while_readable(source, "SELECT running_ms FROM clock"):
                self.set_running_ms(running_ms)
            self._connection.executemany(
                "INSERT OR IGNORE INTO batch_key VALUES (?, ?, ?, ?, ?, ?)",
                _while_readable(source, "SELECT * FROM batch_key"),
            )
            known = {no for (no,) in self._connection.execute("SELECT no FROM batch_key")}
            for order in ("ASC", "DESC"):
                for row in _while_readable(source, f"SELECT * FROM item ORDER BY id {order}"):  # noqa: S608
                    if row[3] in known and row[4] in set(Priority) and zlib.crc32(row[7]) == row[6]:
                        self._connection.execute(
                            "INSERT OR IGNORE INTO item VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row
                        )
        finally:
            source.close()
        saved = dict(self._connection.execute("SELECT priority, count(*) FROM item GROUP BY 1"))
        return {
            kind: Dropped(expected[kind] - saved.get(kind, 0), 0)
            for kind in Priority
            if expected.get(kind, 0) > saved.get(kind, 0)
        }


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    connection.execute("PRAGMA locking_mode = EXCLUSIVE")
    connection.execute("PRAGMA journal_mode = WAL").fetchall()
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA temp_store = MEMORY")
    connection.execute(f"PRAGMA wal_autocheckpoint = {RESERVE_BYTES // 4096}")
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > SCHEMA_VERSION:
        raise SpoolVersionError(
            f"{path} has schema {version}, this daemon knows {SCHEMA_VERSION}: install the newer daemon "
            "again, or move the file away (what waits in it is then not sent)"
        )
    check = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if check != "ok":
        raise SchemaError(check)
    if version == 0:
        if connection.execute("SELECT count(*) FROM sqlite_master").fetchone() != (0,):
            raise SchemaError("tables of somebody else")
        connection.executescript(_SCHEMA)
        return
    # Takes the lock, so that a second process is found out here; boots that left no row are forgotten.
    with contextlib.closing(connection.execute("BEGIN IMMEDIATE")):
        connection.execute("DELETE FROM batch_key WHERE no NOT IN (SELECT key_no FROM item)")
        connection.execute("COMMIT")


def _row(values: Iterable[int]) -> Row:
    row_id, priority, stored_ms, body_bytes = values
    return Row(row_id, Priority(priority), stored_ms, body_bytes + ROW_OVERHEAD_BYTES)


def _while_readable(source: sqlite3.Connection, statement: str) -> Iterator[tuple[Any, ...]]:
    # sqlite3.Error for a damaged page, OverflowError and UnicodeDecodeError for what stands on one.
    with contextlib.suppress(sqlite3.Error, OverflowError, UnicodeDecodeError):
        yield from source.execute(statement)
