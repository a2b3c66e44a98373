"""The examples' SQLite file: schema, statements, damage. Used by one thread; `examples` decides.

WAL with `synchronous=NORMAL`: a commit costs no fsync, and a power cut may take the last ones back but leaves
the file whole. What is lost so were a few examples of many.
"""

from __future__ import annotations

import logging
import math
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from edge_daemon.core.example_index import Named
from edge_daemon.core.examples import ExampleRow, Label, Origin
from edge_daemon.sqlite_files import DamagedFileError, open_database, transaction

log = logging.getLogger(__name__)

SCHEMA_VERSION: Final = 2
ROW_OVERHEAD_BYTES: Final = 128
"""What a row takes beside tensor and probabilities: its other columns, an index entry, slack."""

_SCHEMA: Final = """
BEGIN IMMEDIATE;
CREATE TABLE example (
    id INTEGER PRIMARY KEY, boot BLOB NOT NULL, seq INTEGER NOT NULL, model TEXT NOT NULL,
    sensor TEXT NOT NULL, label INTEGER, origin INTEGER, revision INTEGER, is_pending INTEGER NOT NULL,
    confidence REAL, probabilities BLOB NOT NULL, tensor BLOB NOT NULL);
CREATE UNIQUE INDEX example_name ON example (boot, seq);
CREATE TABLE classes (model TEXT PRIMARY KEY, names BLOB NOT NULL) WITHOUT ROWID;
PRAGMA user_version = 2;
COMMIT;
"""
_ROWS: Final = """
SELECT id, model, label, origin, revision, is_pending, length(tensor) + length(probabilities),
    boot, seq, sensor
FROM example ORDER BY id
"""


@dataclass(frozen=True, slots=True)
class Content:
    """What is not kept in memory. `probabilities` may be empty, `confidence` NaN."""

    tensor: bytes
    probabilities: bytes
    confidence: float


class ExampleFile:
    """One open file. Methods raise `sqlite3.Error` as it comes."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open or create, and check every page.

        Raises:
            DamagedFileError: when it must be moved aside: damage, another program's tables, another version.
            sqlite3.Error, OSError: when the disk or another process does not let us; it may later.
        """
        return cls(open_database(path, _prepare))

    def close(self) -> None:
        """Give the file up; what was committed stays."""
        self._connection.close()

    def transaction(self) -> AbstractContextManager[None]:
        """Everything inside is committed at its end, or nothing is."""
        return transaction(self._connection)

    def add(self, named: Named, content: Content) -> None:
        """Insert one row, inside a transaction."""
        row = named.row
        confidence = None if math.isnan(content.confidence) else content.confidence
        self._connection.execute(
            "INSERT INTO example VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(row.id, *named.name, row.model, named.sensor, *_label_columns(row.label)),
                *(row.is_pending, confidence, content.probabilities, content.tensor),
            ),
        )

    def relabel(self, row: ExampleRow, probabilities: bytes | None) -> int:
        """Write a row's label and whether it waits, and its probabilities unless None; gives its new size."""
        self._connection.execute(
            "UPDATE example SET label = ?, origin = ?, revision = ?, is_pending = ?, "
            "probabilities = coalesce(?, probabilities) WHERE id = ?",
            (*_label_columns(row.label), row.is_pending, probabilities, row.id),
        )
        (size_bytes,) = self._connection.execute(
            "SELECT length(tensor) + length(probabilities) FROM example WHERE id = ?", (row.id,)
        ).fetchone()
        return int(size_bytes) + ROW_OVERHEAD_BYTES

    def remove(self, row_ids: Iterable[int]) -> None:
        """Delete rows, inside a transaction."""
        self._connection.executemany("DELETE FROM example WHERE id = ?", ((row_id,) for row_id in row_ids))

    def classes_of(self, model: str) -> bytes | None:
        """What `set_classes` was given for a model."""
        found = self._connection.execute("SELECT names FROM classes WHERE model = ?", (model,)).fetchone()
        return None if found is None else found[0]

    def set_classes(self, model: str, names: bytes) -> None:
        """Remember the classes among which a model's labels are given."""
        self._connection.execute("INSERT OR REPLACE INTO classes VALUES (?, ?)", (model, names))

    def rows(self) -> Iterator[Named]:
        """Every row, oldest first."""
        for (
            row_id,
            model,
            label,
            origin,
            revision,
            is_pending,
            size_bytes,
            boot,
            seq,
            sensor,
        ) in self._connection.execute(_ROWS):
            try:
                known = None if label is None else Label(label, Origin(origin), revision)
            except ValueError as error:
                raise DamagedFileError(str(error)) from error
            row = ExampleRow(row_id, model, known, bool(is_pending), size_bytes + ROW_OVERHEAD_BYTES)
            yield Named((boot, seq), sensor, row)

    def content(self, row_id: int) -> Content | None:
        """The rest of a row, None where there is none."""
        found = self._connection.execute(
            "SELECT tensor, probabilities, confidence FROM example WHERE id = ?", (row_id,)
        ).fetchone()
        if found is None:
            return None
        tensor, probabilities, confidence = found
        return Content(tensor, probabilities, math.nan if confidence is None else confidence)


def _label_columns(label: Label | None) -> tuple[int | None, int | None, int | None]:
    return (None, None, None) if label is None else (label.index, int(label.origin), label.revision)


def _prepare(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA locking_mode = EXCLUSIVE")
    connection.execute("PRAGMA journal_mode = WAL").fetchall()
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA temp_store = MEMORY")
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if version != SCHEMA_VERSION and (version, tables) != (0, 0):
        raise DamagedFileError(f"schema {version} with {tables} tables, this daemon knows {SCHEMA_VERSION}")
    (check,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if check != "ok":
        raise DamagedFileError(check)
    if version == 0:
        connection.executescript(_SCHEMA)
        return
    # Takes the lock, so that a second process is found out here.
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("COMMIT")
