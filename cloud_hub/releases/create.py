"""Begins the signed metadata of a hub."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from securesystemslib.signer import Signer
from tuf.api.metadata import DelegatedRole, Delegations, Root, Snapshot, Targets, Timestamp

from cloud_hub.errors import SigningError
from cloud_hub.releases.changes import LIFETIMES
from cloud_hub.releases.metadata import TIMESTAMP, MetadataFiles
from cloud_hub.releases.online import OnlineRoles
from cloud_hub.releases.repository import SignedRepository
from edge_cascade.signed_releases import ONLINE_PATHS, ONLINE_ROLE


def create_repository(
    directory: Path,
    root_keys: Sequence[Signer],
    targets_keys: Sequence[Signer],
    *,
    root_threshold: int,
    targets_threshold: int,
    now: datetime,
) -> SignedRepository:
    """Begin a repository with a fresh online key and nothing signed in it.

    Raises:
        SigningError: when there is one already, a threshold cannot be met, or the disk does not take it.
    """
    for name, keys, threshold in (
        ("root", root_keys, root_threshold),
        ("targets", targets_keys, targets_threshold),
    ):
        if not 1 <= threshold <= len({key.public_key.keyid for key in keys}):
            raise SigningError(f"{name}: a threshold of {threshold} cannot be met by {len(keys)} keys")
    repository = refuse_second(directory)
    files = MetadataFiles(directory)
    roles = OnlineRoles(files)
    online = roles.first_key()
    root = Root(expires=now + LIFETIMES[Root.type], consistent_snapshot=True)
    for role, keys, threshold in (
        (Root.type, root_keys, root_threshold),
        (Targets.type, targets_keys, targets_threshold),
        (Snapshot.type, [online], 1),
        (Timestamp.type, [online], 1),
    ):
        for key in keys:
            root.add_key(key.public_key, role)
        root.roles[role].threshold = threshold
    delegated = DelegatedRole(
        ONLINE_ROLE, [online.public_key.keyid], 1, terminating=True, paths=list(ONLINE_PATHS)
    )
    targets = Targets(
        expires=now + LIFETIMES[Targets.type],
        delegations=Delegations({online.public_key.keyid: online.public_key}, {ONLINE_ROLE: delegated}),
    )
    with files.held():
        roles.write(root, Root.type, root_keys)
        roles.write(targets, Targets.type, targets_keys)
        roles.write(Targets(expires=now + LIFETIMES[ONLINE_ROLE]), ONLINE_ROLE, [online])
        roles.publish(now)
    return repository


def refuse_second(directory: Path) -> SignedRepository:
    """The repository that can be made in a directory.

    Raises:
        SigningError: when there is one already.
    """
    repository = SignedRepository(directory)
    if (repository.metadata_directory / TIMESTAMP).exists():
        raise SigningError(f"{directory}: there is a repository already")
    return repository
