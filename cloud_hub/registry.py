"""Releases on disk and in the database: `releases/<bundle id>/bundle` in the state directory, then a row.

The files are there, durably, before the row that names them, and beside the bundle a file that says what
the row will. A process that dies in between leaves a folder without a row; `recover_drafts` makes up for it,
since the cases that certified it are spent and certify nothing else.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec
from sqlalchemy import RowMapping

from cloud_hub.builder.write import write_bundle
from cloud_hub.candidates.outcome import Candidate, Figures, Lineage
from cloud_hub.core.rollout.events import ReleaseState
from cloud_hub.errors import BuildError, StoreError, StoreUnavailableError
from cloud_hub.store.database import Database
from cloud_hub.store.releases import get_release, insert_release, registered_bundles
from edge_cascade.bundle import GRAPH, WEIGHTS, Bundle, load_bundle
from edge_cascade.durable import crash_point, sync_directory, write_durably
from edge_cascade.errors import BundleError

log = logging.getLogger(__name__)

RELEASES: Final = "releases"
BUNDLE: Final = "bundle"
RECORD: Final = "release.json"

_LOCK: Final = ".lock"
_FRESH: Final = ".new"
_GONE: Final = ".gone"
_WITHOUT_FILES: Final = frozenset({ReleaseState.COLLECTED.value, ReleaseState.RETIRED.value})


class _Record(msgspec.Struct, frozen=True, kw_only=True):
    """What a draft's row says beside its bundle's digests."""

    lineage: Lineage
    figures: Figures
    created_at_ms: int
    created_by: str


class Release(msgspec.Struct, frozen=True, kw_only=True):
    """A row of `releases`; digests are hexadecimal."""

    id: int
    model: str
    bundle: str
    graph: str
    weights: str
    state: str
    lineage: Lineage
    figures: Figures
    created_at_ms: int
    created_by: str


class UnreadableRelease(msgspec.Struct, frozen=True, kw_only=True):
    """A row of `releases` of which the rest is not what was written, and what is wrong with it."""

    id: int
    model: str
    state: str
    why: str


def releases_of(rows: Iterable[RowMapping]) -> tuple[list[Release], list[UnreadableRelease]]:
    """Rows as values, and those that cannot be read: one of them must not hide the others."""
    found, unreadable = [], []
    for row in rows:
        try:
            found.append(release_of(row))
        except StoreError as error:
            unreadable.append(
                UnreadableRelease(id=row["id"], model=row["model"], state=row["state"], why=str(error))
            )
    return found, unreadable


def release_of(row: RowMapping) -> Release:
    """A row as a value.

    Raises:
        StoreError: naming the release, when what is kept of it is not what was written.
    """
    try:
        lineage = msgspec.json.decode(row["lineage"], type=Lineage)
        figures = msgspec.json.decode(row["figures"], type=Figures)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise StoreError(f"release {row['id']}: what is kept of it cannot be read: {error}") from error
    return Release(
        id=row["id"],
        model=row["model"],
        bundle=row["bundle"].hex(),
        graph=row["graph"].hex(),
        weights=row["weights"].hex(),
        state=row["state"],
        lineage=lineage,
        figures=figures,
        created_at_ms=row["created_at_ms"],
        created_by=row["created_by"],
    )


def release_directory(state_dir: Path, bundle_id: str) -> Path:
    """Where a release's bundle lies."""
    return state_dir / RELEASES / bundle_id / BUNDLE


def register_draft(
    database: Database,
    state_dir: Path,
    candidate: Candidate,
    lineage: Lineage,
    *,
    created_by: str,
    now_ms: int,
) -> Release:
    """Write a candidate's bundle, read it back as a board would, and register it as a draft.

    A candidate that is registered already, or whose series is, gives the release that there is.

    Raises:
        StoreUnavailableError: disk full or database away; asking again may succeed.
        BuildError: what was written is no bundle that a board would take.
    """
    record = _Record(lineage=lineage, figures=candidate.figures, created_at_ms=now_ms, created_by=created_by)
    return _place_and_register(
        database,
        state_dir / RELEASES,
        lambda fresh: write_bundle(fresh, candidate.graph, candidate.weights),
        record,
    )


def register_bundle(
    database: Database,
    state_dir: Path,
    directory: Path,
    lineage: Lineage,
    figures: Figures,
    *,
    created_by: str,
    now_ms: int,
) -> Release:
    """Copy a bundle that was built elsewhere, and register it as a draft; see `register_draft`.

    One that was collected becomes a draft again.

    Raises:
        StoreUnavailableError: disk full or database away; asking again may succeed.
        BuildError: what was copied is no bundle that a board would take.
    """
    record = _Record(lineage=lineage, figures=figures, created_at_ms=now_ms, created_by=created_by)
    return _place_and_register(database, state_dir / RELEASES, lambda fresh: _copy(directory, fresh), record)


def remove_release(database: Database, state_dir: Path, release_id: int, bundle_id: str) -> None:
    """Remove a release's folder, unless it was registered anew since it was taken out of service.

    Nothing is there in the next moment, whoever dies meanwhile.

    Raises:
        OSError: as it came.
        StoreUnavailableError: the database is away.
    """
    releases = state_dir / RELEASES
    with _held(releases):
        if database.run(lambda c: get_release(c, release_id))["state"] not in _WITHOUT_FILES:
            return
        _remove_folder(releases, bundle_id)


def _remove_folder(releases: Path, bundle_id: str) -> None:
    gone = releases / f"{_GONE}.{bundle_id}"
    try:
        (releases / bundle_id).rename(gone)
    except FileNotFoundError:
        return
    sync_directory(releases)
    shutil.rmtree(gone, ignore_errors=True)


def recover_drafts(database: Database, state_dir: Path) -> list[Release]:
    """Register the bundles that a process wrote and did not live to register; those that it did.

    Raises:
        StoreUnavailableError: they cannot be read now, or the database is away.
    """
    releases = state_dir / RELEASES
    if not releases.is_dir():
        return []
    known = database.run(registered_bundles)
    found = []
    with _held(releases):
        for record in releases.glob(f"[0-9a-f]*/{RECORD}"):
            if record.parent.name not in known:
                try:
                    said = msgspec.json.decode(record.read_bytes(), type=_Record)
                    bundle = load_bundle(record.parent / BUNDLE)
                except (OSError, BundleError, msgspec.MsgspecError, UnicodeDecodeError) as error:
                    log.warning("release cannot be recovered folder=%s reason=%s", record.parent, error)
                    continue
                release = _register(database, releases, bundle, said)
                if release.bundle == bundle.bundle_id:
                    found.append(release)
                    log.info("release recovered id=%d bundle=%s", release.id, release.bundle)
    return found


def _register(database: Database, releases: Path, bundle: Bundle, record: _Record) -> Release:
    """The bundle's row, or that of the release that its series has become; then its folder is nobody's."""
    values = {
        "model": bundle.graph.model,
        "bundle": bytes.fromhex(bundle.bundle_id),
        "graph": bytes.fromhex(bundle.graph_sha256),
        "weights": bytes.fromhex(bundle.weights_sha256),
        "state": ReleaseState.DRAFT.value,
        "series": record.lineage.series,
        "lineage": msgspec.json.encode(record.lineage).decode(),
        "figures": msgspec.json.encode(record.figures).decode(),
        "created_at_ms": record.created_at_ms,
        "created_by": record.created_by,
    }
    row = database.run(lambda c: get_release(c, insert_release(c, values)))
    crash_point("hub.release-registered")
    release = release_of(row)
    if release.bundle != bundle.bundle_id:
        log.info("series is registered already id=%d removed=%s", release.id, bundle.bundle_id)
        _remove_folder(releases, bundle.bundle_id)
    return release


def _copy(bundle: Path, fresh: Path) -> None:
    """The files of both parts and nothing else, durably."""
    for part in (GRAPH, WEIGHTS):
        (fresh / part).mkdir(parents=True)
        for path in sorted((bundle / part).iterdir()):
            write_durably(fresh / part / path.name, path.read_bytes())
    sync_directory(fresh)


def _place_and_register(
    database: Database, releases: Path, write: Callable[[Path], object], record: _Record
) -> Release:
    try:
        # Held until the row is there: files without one could be taken for those of a release that goes.
        with _held(releases):
            bundle = _place(releases, write, record)
            crash_point("hub.release-written")
            return _register(database, releases, bundle, record)
    except BundleError as error:
        raise BuildError(f"a board would refuse it: {error}") from error
    except OSError as error:
        where = error.filename or releases
        raise StoreUnavailableError(f"releases: {error.strerror or error} ({where})") from error


def _place(releases: Path, write: Callable[[Path], object], record: _Record) -> Bundle:
    fresh = releases / f"{_FRESH}.{os.getpid()}"
    try:
        write(fresh / BUNDLE)
        bundle = load_bundle(fresh / BUNDLE)
        write_durably(fresh / RECORD, msgspec.json.encode(record))
        place = releases / bundle.bundle_id
        if not place.exists():
            fresh.rename(place)
            sync_directory(releases)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return bundle


@contextmanager
def _held(releases: Path) -> Iterator[None]:
    """Alone in the directory, tidied up after whoever died there."""
    releases.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(releases / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        for left in (*releases.glob(f"{_FRESH}.*"), *releases.glob(f"{_GONE}.*")):
            shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        os.close(descriptor)
