"""Removes the files of releases that nobody needs any more. Who acted, and on what, is written down.

A release is marked before its files go, in the transaction that found that nothing points at it: so no
rollout can begin with it in between, and whoever is killed there leaves files that the next call removes.
"""

from __future__ import annotations

import logging
import stat
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from sqlalchemy import Connection

from cloud_hub.core.collecting import CollectRules, Held, select_collectable
from cloud_hub.core.rollout.events import ReleaseState
from cloud_hub.errors import StoreUnavailableError
from cloud_hub.registry import release_directory, remove_release
from cloud_hub.releases.blobs import prune_deltas
from cloud_hub.rollouts.settings import TUF
from cloud_hub.store.acts import note_act
from cloud_hub.store.database import Database
from cloud_hub.store.rollouts import mark_release
from cloud_hub.store.uses import registered, uses_of, weights_of_nothing
from edge_cascade.durable import crash_point
from edge_cascade.signed_releases import weights_target

log = logging.getLogger(__name__)


class Collected(msgspec.Struct, frozen=True, kw_only=True):
    """A release whose files went, or would; `state` is what it was before, `size_bytes` what they take."""

    id: int
    model: str
    bundle: str
    state: str
    size_bytes: int


def collect(
    database: Database,
    state_dir: Path,
    rules: CollectRules,
    *,
    by: str,
    now_ms: int,
    dry_run: bool = False,
) -> list[Collected]:
    """Mark and remove what nobody needs, and differences and signed metadata that led there.

    With `dry_run` only say what that would be.

    Raises:
        StoreUnavailableError: files that cannot be removed, or the database is away; ask again.
        SigningError: signed metadata, or the key, that cannot be read.
    """

    def choose(connection: Connection) -> list[Held]:
        here = [each for each in registered(connection) if release_directory(state_dir, each.bundle).exists()]
        found = select_collectable(here, uses_of(connection), rules, now_s=now_ms / 1000)
        for release in () if dry_run else found:
            mark_release(connection, release.id, ReleaseState.COLLECTED)
            note_act(
                connection,
                by,
                "release.collect",
                f"release {release.id}",
                f"was {release.state}",
                now_ms=now_ms,
            )
        return found

    found = database.run(choose)
    crash_point("hub.release-collected")
    collected = [_measured(state_dir, release) for release in found]
    if not dry_run:
        _remove(database, state_dir, found, now_s=now_ms / 1000)
    return collected


def _measured(state_dir: Path, release: Held) -> Collected:
    directory = release_directory(state_dir, release.bundle)
    return Collected(
        id=release.id,
        model=release.model,
        bundle=release.bundle,
        state=release.state.value,
        size_bytes=_size_of(directory),
    )


def _size_of(directory: Path) -> int:
    size_bytes = 0
    try:
        for path in directory.rglob("*"):
            status = path.lstat()
            size_bytes += status.st_size if stat.S_ISREG(status.st_mode) else 0
    except FileNotFoundError:
        log.debug("somebody else collects as well directory=%s", directory)
    return size_bytes


def _remove(database: Database, state_dir: Path, releases: Iterable[Held], *, now_s: float) -> None:
    try:
        for release in releases:
            remove_release(database, state_dir, release.id, release.bundle)
            log.info("release collected id=%d bundle=%s", release.id, release.bundle)
        prune_deltas(state_dir)
        if (state_dir / TUF).is_dir():
            _remove_signed(database, state_dir, now_s=now_s)
    except OSError as error:
        raise StoreUnavailableError(f"releases: {error.strerror or error} ({error.filename})") from error


def _remove_signed(database: Database, state_dir: Path, *, now_s: float) -> None:
    """Every board fetches the list of what is signed: what is gone only makes it longer."""
    from cloud_hub.releases.old_metadata import remove_old_metadata
    from cloud_hub.releases.repository import SignedRepository

    names = [
        weights_target(model, weights)
        for model, bundle, weights in database.run(weights_of_nothing)
        if not release_directory(state_dir, bundle).exists()
    ]
    SignedRepository(state_dir / TUF).forget_weights(names, datetime.fromtimestamp(now_s, UTC))
    remove_old_metadata(state_dir / TUF, now_s=now_s)
