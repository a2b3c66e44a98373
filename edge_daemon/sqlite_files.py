"""What the daemon's SQLite files have in common: opened and checked, written whole, damaged, put aside.

A connection is used by one thread. Every statement is in a transaction that says so.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from edge_cascade.durable import sync_directory

KEPT_CORRUPT_FILES: Final = 3
"""More damaged files than these are not kept: they would fill the disk that damaged them."""


class DamagedFileError(Exception):
    """The file is no database of ours, or a page of it is damaged. Stays with whoever keeps the file."""


class SchemaError(sqlite3.DatabaseError):
    """A database, but not as we left it, or not ours."""


def open_database(path: Path, prepare: Callable[[sqlite3.Connection], None]) -> sqlite3.Connection:
    """Open or create a file, and have it checked and set up.

    Raises:
        DamagedFileError: when it must be moved aside.
        sqlite3.Error, OSError: when the disk or another process does not let us; it may later.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path, isolation_level=None, timeout=0.2, cached_statements=64)
    try:
        prepare(connection)
    except sqlite3.Error as error:
        connection.close()
        if is_damage(error):
            raise DamagedFileError(str(error)) from error
        raise
    except BaseException:
        connection.close()
        raise
    return connection


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Everything inside is committed at its end, or nothing is."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        raise


def move_aside(path: Path) -> Path:
    """Rename a damaged file, and its log, to `<stem>.corrupt-<n>`; keeps the last few of these.

    Raises:
        OSError: when the directory cannot be written.
    """
    numbers = sorted(
        int(other.name.rpartition("-")[2])
        for other in path.parent.glob(f"{path.stem}.corrupt-*")
        if other.name.rpartition("-")[2].isdecimal()
    )
    target = path.with_name(f"{path.stem}.corrupt-{numbers[-1] + 1 if numbers else 1}")
    path.replace(target)
    for suffix in ("-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + suffix).replace(target.with_name(target.name + suffix))
    for number in numbers[: max(len(numbers) + 1 - KEPT_CORRUPT_FILES, 0)]:
        for suffix in ("", "-wal", "-shm"):
            path.with_name(f"{path.stem}.corrupt-{number}{suffix}").unlink(missing_ok=True)
    sync_directory(path.parent)
    return target


def is_damage(error: sqlite3.Error) -> bool:
    """Whether the file itself is broken, rather than the disk unwilling."""
    codes = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
    return _code(error) in codes or isinstance(error, SchemaError)


def is_full(error: sqlite3.Error) -> bool:
    """Whether the disk had no room. SQLite then rolls back, and goes on as before."""
    return _code(error) == sqlite3.SQLITE_FULL


def is_busy(error: sqlite3.Error) -> bool:
    """Whether another process has the file."""
    return _code(error) == sqlite3.SQLITE_BUSY


def _code(error: sqlite3.Error) -> int:
    """The primary result code (SQLite, "Result Codes": the low eight bits)."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF
