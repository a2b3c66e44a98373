"""One connection on one thread, and commits that several callers share.

Every piece of work is a function of the connection. The thread takes what has gathered, runs each piece in a
savepoint of one transaction, commits once and only then hands out the results: a result in hand is on disk.

SQLite runs in WAL with synchronous=FULL. A second process (`cloud-hub token create` beside a running hub)
shares a lock file that is held from the first write to the end of the commit, because SQLite from 3.7 to
3.51.2 can corrupt a WAL when two connections write or checkpoint at the same instant.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import queue
import re
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DataError,
    DBAPIError,
    IntegrityError,
    NoSuchModuleError,
    ProgrammingError,
    SQLAlchemyError,
    StatementError,
)
from sqlalchemy.pool import NullPool

from cloud_hub.errors import ConfigError, StoreError, StoreRefusedError, StoreUnavailableError
from cloud_hub.store.schema import create_or_check

log = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")
Work = Callable[[Connection], ResultT]

# One transaction takes at most so many pieces of work; the next ones wait for the next commit.
MAX_SHARED: Final = 64
LOCK_SUFFIX: Final = ".lock"
# Greedy: a password may hold an @.
_SECRETS: Final = re.compile(r"//.*@")


class Database:
    """The hub's database. `open` it before use; any thread and any event loop may hand it work."""

    def __init__(self, url: str) -> None:
        self._url = _parse_url(url)
        self._where = _where_of(self._url)
        self._engine: Engine | None = None
        self._connection: Connection | None = None
        self._work: queue.SimpleQueue[tuple[Work[Any], Future[Any]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._gate = threading.Lock()
        self._lock: int | None = None
        self._problem: StoreUnavailableError | None = None

    @property
    def problem(self) -> StoreUnavailableError | None:
        """What the last commit failed with, None after one that succeeded."""
        return self._problem

    def open(self) -> None:
        """Connect and create or check the tables.

        Raises:
            StoreVersionError: when another version wrote the database.
            StoreUnavailableError: when it cannot be opened.
        """
        self._engine = _create_engine(self._url)
        if self._url.get_backend_name() == "sqlite" and self._url.database:
            path = Path(self._url.database)
            try:
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                self._lock = os.open(f"{path}{LOCK_SUFFIX}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                # SQLite would make it by the umask, and its journals are like it.
                os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            except OSError as error:
                raise StoreUnavailableError(f"{error.filename}: {error.strerror}") from error
        self._thread = threading.Thread(target=self._run, name="store", daemon=True)
        self._thread.start()
        try:
            self.run(create_or_check)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Finish the work at hand and disconnect. Work handed over later fails."""
        with self._gate:
            thread, self._thread = self._thread, None
            # Under the gate: nothing can be queued behind the sign to stop.
            self._work.put(None)
        if thread is not None:
            thread.join()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Database:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def submit(self, work: Work[ResultT]) -> Future[ResultT]:
        """Queue work; its future is done once it is committed, or holds what it failed with."""
        future: Future[ResultT] = Future()
        with self._gate:
            if self._thread is not None:
                self._work.put((work, future))
                return future
        future.set_exception(StoreUnavailableError("the store is closed"))
        return future

    def run(self, work: Work[ResultT]) -> ResultT:
        """Run work and wait for its commit.

        Raises:
            StoreUnavailableError: when the same call may succeed later.
            StoreRefusedError: when it never will.
        """
        return self.submit(work).result()

    async def run_async(self, work: Work[ResultT]) -> ResultT:
        """`run`, without blocking the event loop."""
        return await asyncio.wrap_future(self.submit(work))

    def _run(self) -> None:
        running = True
        while running:
            jobs = [self._work.get()]
            while len(jobs) < MAX_SHARED and not self._work.empty():
                jobs.append(self._work.get())
            running = None not in jobs
            todo = [job for job in jobs if job is not None and job[1].set_running_or_notify_cancel()]
            if todo:
                self._run_together(todo)
        self._disconnect()

    def _run_together(self, jobs: list[tuple[Work[Any], Future[Any]]]) -> None:
        try:
            if self._lock is not None:
                fcntl.flock(self._lock, fcntl.LOCK_EX)
            try:
                done = self._transact([work for work, _ in jobs])
            finally:
                if self._lock is not None:
                    fcntl.flock(self._lock, fcntl.LOCK_UN)
        except (SQLAlchemyError, OSError, StoreUnavailableError) as error:
            self._drop_connection()
            self._problem = StoreUnavailableError(f"{self._where}: {_reason(error)}{_advice(error)}")
            for _, future in jobs:
                future.set_exception(self._problem)
            return
        self._problem = None
        for (_, future), (result, error_of_one) in zip(jobs, done, strict=True):
            if error_of_one is None:
                future.set_result(result)
            else:
                future.set_exception(error_of_one)

    def _transact(self, pieces: list[Work[Any]]) -> list[tuple[Any, Exception | None]]:
        connection = self._connected()
        # Not as a context: after a full disk SQLite has rolled back already, and a second rollback would
        # hide the reason. Whoever catches drops the connection.
        transaction = connection.begin()
        done = [_attempt(connection, work) for work in pieces]
        transaction.commit()
        return done

    def _connected(self) -> Connection:
        assert self._engine is not None
        if self._connection is None:
            self._connection = self._engine.connect()
        return self._connection

    def _drop_connection(self) -> None:
        """Close the connection as it is; whatever it had not committed is gone."""
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                connection.invalidate()
                connection.close()
            except SQLAlchemyError as error:
                log.debug("dropping the store's connection: %s", error)

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


def _attempt(connection: Connection, work: Work[Any]) -> tuple[Any, Exception | None]:
    """Result or error of one piece; an error that concerns everybody is raised instead."""
    savepoint = connection.begin_nested()
    try:
        result = work(connection)
        savepoint.commit()
    except (IntegrityError, DataError, ProgrammingError) as error:
        savepoint.rollback()
        return None, StoreRefusedError(f"store: {_reason(error)}")
    except (DBAPIError, StoreUnavailableError):
        raise
    except (StatementError, OverflowError) as error:
        savepoint.rollback()
        return None, StoreRefusedError(f"store: {_reason(error)}")
    except Exception as error:  # noqa: BLE001 - a caller's own error goes back to that caller
        savepoint.rollback()
        return None, error
    return result, None


def _reason(error: BaseException) -> str:
    """One line without SQL and parameters."""
    origin = error.orig if isinstance(error, StatementError) and error.orig is not None else error
    return " ".join(str(origin).split())[:300] or type(origin).__name__


def _advice(error: BaseException) -> str:
    """What to do about it, where more than waiting helps."""
    origin = error.orig if isinstance(error, StatementError) else None
    name = getattr(origin, "sqlite_errorname", "")
    return next((f"; {advice}" for part, advice in _ADVICE.items() if part in name), "")


_ADVICE: Final = {
    "NOTADB": "it is no database of a hub: restore it from a backup, or move it away to begin anew",
    "CORRUPT": "it is damaged: restore it from a backup",
    "BUSY": "another program holds it: end that, or wait",
    "READONLY": "let the hub's user write it and its directory",
}


def _where_of(url: URL) -> str:
    """The database in an error, without a password."""
    if url.get_backend_name() == "sqlite" and url.database:
        return f"store {url.database}"
    return f"store {url.render_as_string(hide_password=True)}"


def _parse_url(url: str) -> URL:
    try:
        return make_url(url)
    # The latter for a port that is no number.
    except (ArgumentError, ValueError) as error:
        raise ConfigError(
            f"store.url = {_SECRETS.sub('//...@', url)!r} is no database address; write it as "
            "sqlite:////path/hub.db or postgresql://..."
        ) from error


def _create_engine(url: URL) -> Engine:
    try:
        engine = create_engine(url, poolclass=NullPool)
    except (NoSuchModuleError, ImportError, ArgumentError) as error:
        raise StoreError(
            f"store.url: no driver for {url.drivername!r} is installed ({error}); install it beside the hub"
        ) from error
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: sqlite3.Connection, _: object) -> None:
    # The driver's own transaction handling would commit behind our back.
    connection.isolation_level = None
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        "busy_timeout=5000",
        "cache_size=-16000",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN")
