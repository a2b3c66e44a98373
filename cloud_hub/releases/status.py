"""Which keys boards trust, how long what they signed holds, and what somebody has to do about it."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final

import msgspec
from tuf.api.metadata import Root, Snapshot, Targets, Timestamp

from cloud_hub.releases.changes import OFFLINE_ROLES, delegated_keys
from cloud_hub.releases.metadata import MetadataFiles
from cloud_hub.releases.repository import SignedRepository
from edge_cascade.signed_releases import ONLINE_ROLE

RENEW_OFFLINE_BEFORE: Final = timedelta(days=60)
"""Two months to find the people and their keys."""
_OVERDUE: Final = {Snapshot.type: timedelta(days=11), Timestamp.type: timedelta(days=1)}
"""With less left than this the hub has not renewed for two days."""


class RoleStatus(msgspec.Struct, frozen=True):
    """One role. `due` says what to do, empty while there is nothing."""

    role: str
    keys: tuple[str, ...]
    threshold: int
    version: int
    expires: datetime
    days_left: float
    due: str


class PendingStatus(msgspec.Struct, frozen=True):
    """One change that waits for signatures; `stale`: another was published, so it has to be begun again."""

    name: str
    begun_at: datetime
    signed: dict[str, tuple[str, ...]]
    missing: dict[str, int]
    stale: bool


class KeysStatus(msgspec.Struct, frozen=True):
    """All of them."""

    roles: list[RoleStatus]
    pending: list[PendingStatus]


def keys_status(repository: SignedRepository, files: MetadataFiles, now: datetime) -> KeysStatus:
    """What `cloud-hub keys show` says.

    Raises:
        SigningError: when there is no repository, or it cannot be read.
    """
    root = files.load(Root, Root.type).signed
    targets = files.load(Targets, Targets.type).signed
    online = files.load(Targets, ONLINE_ROLE).signed
    snapshot = files.load(Snapshot, Snapshot.type).signed
    timestamp = files.load(Timestamp, Timestamp.type).signed
    roles = []
    for role, signed in (
        (Root.type, root),
        (Targets.type, targets),
        (ONLINE_ROLE, online),
        (Snapshot.type, snapshot),
        (Timestamp.type, timestamp),
    ):
        keys, threshold = delegated_keys(targets), 1
        if role != ONLINE_ROLE:
            keys, threshold = root.roles[role].keyids, root.roles[role].threshold
        left = signed.expires - now
        days_left = round(left / timedelta(days=1), 1)
        roles.append(
            RoleStatus(
                role, tuple(keys), threshold, signed.version, signed.expires, days_left, _due(role, left)
            )
        )
    pending = [
        PendingStatus(each.name, each.begun_at, dict(progress.signed), dict(progress.missing), is_stale)
        for each, progress, is_stale in repository.changes.waiting()
    ]
    return KeysStatus(roles, pending)


def _due(role: str, left: timedelta) -> str:
    if role in OFFLINE_ROLES:
        return f"`cloud-hub keys renew --role {role} --key FILE`" if left < RENEW_OFFLINE_BEFORE else ""
    if left < _OVERDUE.get(role, timedelta(days=27)):
        return "`cloud-hub keys renew`, which a running hub does daily: see its log"
    return ""
