"""The store: a database and a place for blobs, opened together, and the group commit of ingest.

The order within a commit is what makes kill -9 harmless: first the pack, durably, then the rows that name it,
then the acknowledgements. A crash after the pack leaves an orphan, a crash after the rows costs a repeated
delivery that is recognised as a duplicate.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final

from sqlalchemy import Connection, select

from cloud_hub.core.delivery import Committed, Delivery, ItemId, NewCase, NewUpdate
from cloud_hub.errors import StoreBusyError, StoreUnavailableError
from cloud_hub.store import deliveries as sql
from cloud_hub.store import schema
from cloud_hub.store.blobs import Blobs, FolderBlobs
from cloud_hub.store.database import Database
from cloud_hub.store.deliveries import Place
from cloud_hub.store.release_reports import insert_release_reports
from cloud_hub.store.verdicts import send_everything_again
from edge_cascade.durable import crash_point
from edge_cascade.tensors import deflate_bytes, inflate_bytes

log = logging.getLogger(__name__)

DATABASE_NAME: Final = "hub.db"
BLOBS_NAME: Final = "blobs"
LOCK_NAME: Final = "hub.lock"


def database_url(state_dir: Path, url: str | None) -> str:
    """The database that is meant: the one of the configuration, or SQLite in the state directory."""
    return url or f"sqlite:///{state_dir.absolute() / DATABASE_NAME}"


class Store:
    """What the hub keeps. One hub at a time holds a state directory."""

    def __init__(self, state_dir: Path, *, url: str | None = None, blobs: Blobs | None = None) -> None:
        self._state_dir = state_dir
        self.database = Database(database_url(state_dir, url))
        self.blobs: Blobs = blobs if blobs is not None else FolderBlobs(state_dir / BLOBS_NAME)
        self._lock: int | None = None

    def open(self) -> None:
        """Take the state directory, open the database, remove orphans, make unconfirmed verdicts due.

        Raises:
            StoreBusyError: when another hub holds the directory.
            StoreError: when it cannot be opened, or another version wrote it.
        """
        self._lock = _take_directory(self._state_dir)
        try:
            self.database.open()
            named = self.database.run(_blob_names)
            orphans = self.blobs.remove_orphans(named)
            self.database.run(send_everything_again)
        except BaseException:
            self.close()
            raise
        if orphans:
            log.info("orphaned packs removed count=%d", orphans)

    @property
    def state_dir(self) -> Path:
        """Where everything lies that is not in the database."""
        return self._state_dir

    def close(self) -> None:
        """Finish the work at hand and let go of the directory."""
        self.database.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Store:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def commit(self, deliveries: Sequence[Delivery], *, now_ms: int) -> Committed:
        """Commit what some frames brought, all of it or nothing.

        Raises:
            StoreUnavailableError: nothing was committed; the same call may succeed later.
            StoreRefusedError: nothing was committed; the database will never take this group as it is.
        """
        cases = _first_of_each(case for delivery in deliveries for case in delivery.cases)
        updates = _first_per_round(d.update for d in deliveries if d.update is not None)
        if cases:
            known = self.database.run(lambda connection: sql.known_cases(connection, cases))
            cases = {item: case for item, case in cases.items() if item not in known}
        if updates:
            known_rounds = self.database.run(
                lambda connection: sql.known_updates(connection, updates.values())
            )
            updates = {key: new for key, new in updates.items() if key not in known_rounds}
        pack = _Pack()
        placed_cases = [(case, pack.add_deflated(case.tensor)) for case in cases.values()]
        placed_updates = [(new, pack.add(new.delta)) for new in updates.values()]
        content = pack.content
        name = self.blobs.put(content) if content else ""
        # Statuses and receipts come at times that nobody can foretell: only what must survive is counted.
        if name:
            crash_point("hub.before-commit")

        def write(connection: Connection) -> Committed:
            counts: Counter[str] = Counter()
            for delivery in deliveries:
                counts.update(delivery.counts)
            if name:
                sql.insert_blob(connection, name, len(content), now_ms=now_ms)
            counts.update(
                sql.insert_cases(connection, [(c, p.in_pack(name)) for c, p in placed_cases], now_ms=now_ms)
            )
            counts.update(
                sql.insert_updates(
                    connection, [(u, p.in_pack(name)) for u, p in placed_updates], now_ms=now_ms
                )
            )
            reports, came_online = sql.apply_devices(connection, deliveries, now_ms=now_ms)
            sql.apply_receipts(connection, deliveries)
            reports |= insert_release_reports(connection, deliveries, now_ms=now_ms)
            fresh = frozenset(cases) | {new.item for new in updates.values()} | reports
            asked = sum(len(d.cases) + len(d.single_items) for d in deliveries)
            counts["reports"] += len(reports)
            counts["duplicates"] += asked - len(fresh)
            schema.add_to_counters(connection, {key: value for key, value in counts.items() if value})
            return Committed(fresh, frozenset(came_online))

        committed = self.database.run(write)
        if name:
            crash_point("hub.after-commit")
        return committed

    def tensor_bytes(self, place: Place, tensor_bytes: int) -> bytes:
        """A case's tensor, encoded as its device sent it.

        Raises:
            NotFoundError: when the pack is missing or short.
            ProtocolError: when it is damaged.
            StoreUnavailableError: when it cannot be read now.
        """
        stored = self.blobs.get(place.blob, place.offset, place.length)
        return stored if place.length == tensor_bytes else inflate_bytes(stored, tensor_bytes)


class _Pack:
    def __init__(self) -> None:
        self._content = bytearray()

    @property
    def content(self) -> bytes:
        return bytes(self._content)

    def add(self, data: bytes) -> Place:
        place = Place("", len(self._content), len(data))
        self._content += data
        return place

    def add_deflated(self, data: bytes) -> Place:
        packed = deflate_bytes(data)
        return self.add(packed if len(packed) < len(data) else data)


def _first_of_each(cases: Iterable[NewCase]) -> dict[ItemId, NewCase]:
    first: dict[ItemId, NewCase] = {}
    for case in cases:
        first.setdefault(case.item, case)
    return first


def _first_per_round(updates: Iterable[NewUpdate]) -> dict[tuple[str, str], NewUpdate]:
    first: dict[tuple[str, str], NewUpdate] = {}
    for new in updates:
        first.setdefault((new.round_id, new.device), new)
    return first


def _blob_names(connection: Connection) -> set[str]:
    return set(connection.execute(select(schema.blobs.c.name)).scalars())


def _take_directory(directory: Path) -> int:
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StoreUnavailableError(f"hub.state_dir: {error.strerror} ({error.filename})") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise StoreBusyError(
            f"hub.state_dir = {str(directory)!r} is held by another running hub; stop it or choose another"
        ) from error
    return descriptor
