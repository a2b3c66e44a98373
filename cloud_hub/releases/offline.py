"""Changes of what offline keys sign: drafted, signed by as many as it takes, then published whole.

A change is a file with all its signatures before any of it is metadata; whoever comes next carries it out to
the end. Until it has them it waits under its name, for whoever signs next; one that another has overtaken is
stale, and signed no more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from datetime import datetime
from typing import Any, Final

import msgspec
from securesystemslib.signer import Signer
from tuf.api.metadata import Metadata, Root, Targets

from cloud_hub.errors import SigningError
from cloud_hub.releases.changes import LIFETIMES, Draft, Edit
from cloud_hub.releases.layout import BLOBS
from cloud_hub.releases.metadata import MetadataFiles, sha256
from cloud_hub.releases.online import OnlineRoles
from cloud_hub.releases.pending import (
    Pending,
    PendingFiles,
    Progress,
    progress_of,
    sign_with,
    with_signatures_of,
)
from edge_cascade.durable import crash_point

ROTATE_ONLINE: Final = "rotate-online"


class OfflineChanges:
    """The changes of one repository that are under way."""

    def __init__(self, files: MetadataFiles, roles: OnlineRoles) -> None:
        self._files = files
        self._roles = roles
        self._pending = PendingFiles(files.directory)

    def names(self) -> list[str]:
        """Those that are under way."""
        return self._pending.names()

    @contextmanager
    def alone(self, now: datetime, *, clock_was_ahead: bool = False) -> Iterator[None]:
        """Alone with the repository, once what another process had begun to publish is finished.

        Raises:
            SigningError: when this machine's clock is behind; see `OnlineRoles.check_clock`.
        """
        with self._files.held():
            if not clock_was_ahead:
                # Before anything is written: what cannot be published is not begun.
                self._roles.check_clock(now)
            for name in self._pending.names():
                if self._is_sealed(name):
                    pending = self._pending.get(name)
                    assert pending is not None
                    self._carry_out(pending, now)
            yield

    def change(self, name: str, edit: Edit, keys: Sequence[Signer], now: datetime) -> Progress:
        """Begin a change of the offline roles, or go on with the one of this name.

        Raises:
            SigningError: when a key is none that is asked for; the change that waits is another one, or
                another was published since it was begun; or the disk does not take it.
        """
        with self.alone(now):
            pending = self._pending.get(name)
            drafted = self._drafted(name, edit, now if pending is None else pending.begun_at)
            if pending is None:
                return self._sign(drafted, keys, now)
            self._check_fresh(pending)
            if any(
                drafted.roles.keys() != pending.roles.keys()
                or drafted.metadata(role).signed != pending.metadata(role).signed
                for role in pending.roles
            ):
                raise SigningError(
                    f"pending {name}: waits for signatures over something else than this; sign that by "
                    f"`cloud-hub keys sign {name}`, or `cloud-hub keys drop {name}` and begin again"
                )
            return self._sign(pending, keys, now)

    def sign(self, name: str, *, keys: Sequence[Signer], now: datetime) -> Progress:
        """Sign a change that waits, whatever it is.

        Raises:
            SigningError: when none of this name waits; see `change`.
        """
        with self.alone(now):
            return self._sign(self._waiting(name), keys, now)

    def take_signatures(self, signed: Pending, *, now: datetime) -> Progress:
        """Add the signatures that were made elsewhere over a change that waits.

        Raises:
            SigningError: when it waits no longer, or they are over something else; see `change`.
        """
        with self.alone(now):
            merged = with_signatures_of(self._waiting(signed.name), signed, self._roles.root())
            return self._sign(merged, [], now)

    def get(self, name: str) -> Pending:
        """A change that waits.

        Raises:
            SigningError: when none of this name waits, or another has overtaken it.
        """
        with self._files.held():
            return self._waiting(name)

    def drop(self, name: str) -> None:
        """Forget a change that waits, and its signatures.

        Raises:
            SigningError: when none of this name waits, or it has all its signatures.
        """
        with self._files.held():
            if self._is_sealed(name):
                raise SigningError(f"pending {name}: is signed already, and published at the next signature")
            self._pending.drop(name)
            if name == ROTATE_ONLINE:
                # It has lain on the hub all the while: whoever was there may have it.
                self._roles.forget_next_key()

    def waiting(self) -> list[tuple[Pending, Progress, bool]]:
        """The changes that wait, how far each has come, and whether another one made it stale.

        Raises:
            SigningError: when one cannot be read.
        """
        root = self._roles.root()
        found = [self._pending.get(name) for name in self._pending.names()]
        return [(each, progress_of(each, root), self._is_stale(each)) for each in found if each is not None]

    # --- parts ---------------------------------------------------------------------------------------------

    def _is_sealed(self, name: str) -> bool:
        try:
            pending = self._pending.get(name)
        except SigningError:
            # Damaged: `keys drop` must reach it, and it must not keep the hub from renewing.
            return False
        return pending is not None and pending.sealed

    def _drafted(self, name: str, edit: Edit, begun_at: datetime) -> Pending:
        draft = Draft(deepcopy(self._roles.root()), deepcopy(self._roles.targets()))
        edit(draft)
        signed: Mapping[str, Root | Targets] = {Root.type: draft.root, Targets.type: draft.targets}
        roles = {}
        for role in sorted(draft.changed):
            signed[role].version = self._files.newest(role) + 1
            # Whole seconds: that is how it is written.
            signed[role].expires = begun_at.replace(microsecond=0) + LIFETIMES[role]
            metadata: Metadata[Any] = Metadata(signed[role])
            roles[role] = metadata.to_bytes().decode()
        blobs = tuple(blob.decode() for blob in draft.blobs)
        return Pending(name, begun_at, roles, blobs, tuple(draft.withdrawn))

    def _waiting(self, name: str) -> Pending:
        pending = self._pending.get(name)
        if pending is None:
            raise SigningError(f"pending {name}: no such change waits; `cloud-hub keys show` lists them")
        self._check_fresh(pending)
        return pending

    def _check_fresh(self, pending: Pending) -> None:
        if self._is_stale(pending):
            raise SigningError(
                f"pending {pending.name}: another change was published since it was begun on "
                f"{pending.begun_at:%Y-%m-%d %H:%M} UTC; `cloud-hub keys drop {pending.name}` and begin again"
            )

    def _is_stale(self, pending: Pending) -> bool:
        return any(
            pending.metadata(role).signed.version != self._files.newest(role) + 1 for role in pending.roles
        )

    def _sign(self, pending: Pending, keys: Sequence[Signer], now: datetime) -> Progress:
        root = self._roles.root()
        signed = sign_with(pending, root, keys)
        progress = progress_of(signed, root)
        signed = msgspec.structs.replace(signed, sealed=progress.is_published)
        self._pending.put(signed)
        crash_point("tuf.pending-written")
        if signed.sealed:
            self._carry_out(signed, now)
        return progress

    def _carry_out(self, pending: Pending, now: datetime) -> None:
        """Write a sealed change as metadata, whole or what is missing of it."""
        for blob in pending.blobs:
            self._files.write_file(self._files.directory / BLOBS / sha256(blob.encode()), blob.encode())
        online = self._roles.weights()
        if any(name in online.targets for name in pending.withdrawn):
            for name in pending.withdrawn:
                online.targets.pop(name, None)
            self._roles.sign_weights(online, now)
        for role in (Targets.type, Root.type):
            if role in pending.roles:
                name = f"{pending.metadata(role).signed.version}.{role}.json"
                self._files.write_metadata(name, pending.roles[role].encode())
                crash_point(f"tuf.{role}-written")
        self._roles.publish(now)
        self._pending.drop(pending.name)
