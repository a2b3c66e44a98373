"""The store for a command beside a hub at work: the same database and blobs, without the hub's lock.

Nothing is tidied up here: what looks like an orphan may be a pack that the hub is about to name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cloud_hub.store.blobs import Blobs, FolderBlobs
from cloud_hub.store.database import Database
from cloud_hub.store.store import BLOBS_NAME, database_url


@dataclass(frozen=True, slots=True)
class StoreBeside:
    """Implements `examples.CaseStore`."""

    database: Database
    blobs: Blobs


@contextmanager
def open_beside(state_dir: Path, url: str | None) -> Iterator[StoreBeside]:
    """Open the database and find the blobs.

    Raises:
        StoreError: when it cannot be opened, or another version wrote it.
    """
    with Database(database_url(state_dir, url)) as database:
        yield StoreBeside(database, FolderBlobs(state_dir / BLOBS_NAME))
