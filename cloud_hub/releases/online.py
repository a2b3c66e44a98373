"""The roles that the hub's own key signs: the weights it vouches for, the snapshot, the timestamp.

The key of a rotation under way lies beside the old one until the metadata name it everywhere; until then
either is used where it is named. Whoever calls is alone with the files (`MetadataFiles.held`).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

from securesystemslib.signer import Signer
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, MetaFile, Root, Signed, Snapshot, Targets, Timestamp

from cloud_hub.errors import SigningError
from cloud_hub.releases.changes import LIFETIMES, delegated_keys
from cloud_hub.releases.keys import make_key, read_key
from cloud_hub.releases.metadata import TIMESTAMP, MetadataFiles, sha256, version_of
from edge_cascade.durable import crash_point, sync_directory
from edge_cascade.signed_releases import ONLINE_ROLE

ONLINE_KEY: Final = "keys/online.pem"
NEXT_KEY: Final = "keys/online.next.pem"
"""Of a rotation under way."""
ISSUED: Final = "issued"
"""In the timestamp, signed with it: when it was made. A board's idea of time moves forward by it alone."""

ISSUED_AS: Final = "%Y-%m-%dT%H:%M:%SZ"


class OnlineRoles:
    """Signs what needs no offline key, in the files of one repository."""

    def __init__(self, files: MetadataFiles) -> None:
        self._files = files
        self._directory = files.directory

    def root(self) -> Root:
        """The newest root."""
        return self._files.load(Root, Root.type).signed

    def targets(self) -> Targets:
        """What offline keys have signed last."""
        return self._files.load(Targets, Targets.type).signed

    def weights(self) -> Targets:
        """What the online key has signed last."""
        return self._files.load(Targets, ONLINE_ROLE).signed

    def first_key(self) -> Signer:
        """The key of a repository that is begun; made unless an attempt before has made it."""
        path = self._directory / ONLINE_KEY
        return read_key(path, None) if path.exists() else make_key(path, None)

    def next_key(self) -> Signer:
        """The key that is to replace the present one; made unless a rotation is under way."""
        path = self._directory / NEXT_KEY
        return read_key(path, None) if path.exists() else make_key(path, None)

    def forget_next_key(self) -> None:
        """Throw away the key of a rotation that is given up: the next one makes another.

        Raises:
            SigningError: when it cannot be read or removed.
        """
        path = self._directory / NEXT_KEY
        if not path.exists():
            return
        keyid = read_key(path, None).public_key.keyid
        if any(keyid in self._keys_of(role) for role in (Timestamp.type, ONLINE_ROLE)):
            return
        try:
            path.unlink()
            sync_directory(path.parent)
        except OSError as error:
            raise SigningError(f"{path}: {error.strerror or error}") from error

    def write(self, signed: Signed, role: str, keys: Sequence[Signer]) -> None:
        """Sign and write one version of a role.

        Raises:
            SigningError: when the keys do not meet the role's threshold.
        """
        metadata: Metadata[Any] = Metadata(signed)
        for key in keys:
            metadata.sign(key, append=True)
        delegator: Root | Targets = signed if isinstance(signed, Root) else self.root()
        if role == ONLINE_ROLE:
            delegator = self.targets()
        try:
            delegator.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
        except (RepositoryError, ValueError) as error:
            raise SigningError(f"{role}: these keys do not meet its threshold: {error}") from error
        name = TIMESTAMP if role == Timestamp.type else f"{signed.version}.{role}.json"
        self._files.write_metadata(name, metadata.to_bytes())

    def publish(self, now: datetime) -> None:
        """A new snapshot of what there is, and a new timestamp of it."""
        self._settle(now)
        online = [self._key_of(Timestamp.type)]
        meta = {}
        for role in (Targets.type, ONLINE_ROLE):
            name = self._files.name_of(role)
            content = self._files.read(name)
            meta[f"{role}.json"] = MetaFile(version_of(name), len(content), {"sha256": sha256(content)})
        # A number that was never used: a process that died may have left a snapshot without a timestamp.
        version = self._files.newest(Snapshot.type) + 1
        snapshot = Snapshot(version=version, expires=now + LIFETIMES[Snapshot.type], meta=meta)
        self.write(snapshot, Snapshot.type, online)
        crash_point("tuf.snapshot-written")
        content = self._files.read(f"{version}.{Snapshot.type}.json")
        timestamp = Timestamp(
            version=self._timestamp_version() + 1,
            expires=now + LIFETIMES[Timestamp.type],
            snapshot_meta=MetaFile(version, len(content), {"sha256": sha256(content)}),
        )
        timestamp.unrecognized_fields[ISSUED] = now.astimezone(UTC).strftime(ISSUED_AS)
        self.write(timestamp, Timestamp.type, online)

    def check_clock(self, now: datetime) -> None:
        """See that what is signed now is worth something to boards that have seen the last timestamp.

        Raises:
            SigningError: when for them it would have expired before it was made.
        """
        issued = self._issued_at()
        if issued is not None and now + LIFETIMES[Timestamp.type] <= issued:
            raise SigningError(
                f"this machine's clock says {now:%Y-%m-%d}, the last timestamp was made on "
                f"{issued:%Y-%m-%d}: boards would refuse what is signed now, set the clock; "
                "if it is right and was ahead then, `cloud-hub keys renew --clock-was-ahead`"
            )

    def _issued_at(self) -> datetime | None:
        if not self._timestamp_version():
            return None
        said = self._files.load(Timestamp, Timestamp.type).signed.unrecognized_fields.get(ISSUED)
        try:
            return datetime.strptime(str(said), ISSUED_AS).replace(tzinfo=UTC)
        except ValueError:
            return None

    def sign_weights(self, role: Targets, now: datetime) -> None:
        """Sign and write the next version of the weights' role."""
        role.version = self._files.newest(ONLINE_ROLE) + 1
        role.expires = now + LIFETIMES[ONLINE_ROLE]
        self.write(role, ONLINE_ROLE, [self._key_of(ONLINE_ROLE)])
        crash_point("tuf.weights-written")

    def _settle(self, now: datetime) -> None:
        """Finish what a rotation has left: signatures and files of the key before."""
        try:
            metadata = self._files.load(Targets, ONLINE_ROLE)
            self.targets().verify_delegate(ONLINE_ROLE, metadata.signed_bytes, metadata.signatures)
        except RepositoryError:
            metadata.signed.targets.clear()
            self.sign_weights(metadata.signed, now)
        fresh = self._directory / NEXT_KEY
        if fresh.exists():
            keyid = read_key(fresh, None).public_key.keyid
            if all(keyid in self._keys_of(role) for role in (Timestamp.type, ONLINE_ROLE)):
                fresh.replace(self._directory / ONLINE_KEY)
                sync_directory(fresh.parent)

    def _key_of(self, role: str) -> Signer:
        """The key on this disk that the metadata name for an online role."""
        for path in (self._directory / ONLINE_KEY, self._directory / NEXT_KEY):
            if path.exists():
                key = read_key(path, None)
                if key.public_key.keyid in self._keys_of(role):
                    return key
        raise SigningError(
            f"{self._directory / ONLINE_KEY}: not the key that is named for {role}; put that one back, or "
            "make another by `cloud-hub keys rotate`"
        )

    def _keys_of(self, role: str) -> list[str]:
        return delegated_keys(self.targets()) if role == ONLINE_ROLE else self.root().roles[role].keyids

    def _timestamp_version(self) -> int:
        if not (self._files.metadata_directory / TIMESTAMP).exists():
            return 0
        return self._files.load(Timestamp, Timestamp.type).signed.version
