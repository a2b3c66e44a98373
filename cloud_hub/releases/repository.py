"""The signed metadata of releases on disk, as The Update Framework has them (specification 1.0).

    <directory>/metadata/<version>.<role>.json, timestamp.json     what boards fetch
    <directory>/keys/online.pem                                    signs snapshot, timestamp and weights
    <directory>/blobs/<sha256>                                     the policy's content

What is signed under which name: see `edge_cascade.signed_releases`. Files are written durably, a role's new
version first, then the snapshot, the timestamp last: a process that dies in between leaves metadata that hold
together, and what the timestamp does not reach yet is signed anew. One process signs at a time (flock).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
from securesystemslib.exceptions import StorageError
from securesystemslib.signer import Signer
from tuf.api.exceptions import DownloadError, RepositoryError
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Signed,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from cloud_hub.errors import SigningError
from cloud_hub.releases.keys import make_key, read_key
from cloud_hub.releases.layout import BLOBS, METADATA
from edge_cascade.durable import crash_point, sync_directory, write_durably
from edge_cascade.manifest import Norms
from edge_cascade.signed_releases import (
    CUSTOM,
    ONLINE_PATHS,
    ONLINE_ROLE,
    POLICY_TARGET,
    PartNote,
    Policy,
    graph_target,
    weights_target,
)

ONLINE_KEY: Final = "keys/online.pem"
NEXT_KEY: Final = "keys/online.next.pem"
"""Of a rotation under way."""
TIMESTAMP: Final = "timestamp.json"
ISSUED: Final = "issued"
"""In the timestamp, signed with it: when it was made. A board's idea of time moves forward by it alone."""

LIFETIMES: Final[Mapping[str, timedelta]] = {
    Root.type: timedelta(days=365),
    Targets.type: timedelta(days=365),
    ONLINE_ROLE: timedelta(days=90),
    Snapshot.type: timedelta(days=14),
    Timestamp.type: timedelta(days=3),
}
RENEW_WEIGHTS_BEFORE: Final = timedelta(days=30)

SignedT = TypeVar("SignedT", Root, Targets, Timestamp)


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
    repository = SignedRepository(directory)
    if (repository.metadata_directory / TIMESTAMP).exists():
        raise SigningError(f"{directory}: there is a repository already")
    key_path = directory / ONLINE_KEY
    online = read_key(key_path, None) if key_path.exists() else make_key(key_path, None)
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
    with repository.held():
        repository.write(root, Root.type, root_keys)
        repository.write(targets, Targets.type, targets_keys)
        repository.write(Targets(expires=now + LIFETIMES[ONLINE_ROLE]), ONLINE_ROLE, [online])
        repository.publish(now)
    return repository


class SignedRepository:
    """Signs what boards are to believe, and says what is signed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @property
    def metadata_directory(self) -> Path:
        """What is served to boards as it is."""
        return self._directory / METADATA

    def first_root(self) -> bytes:
        """The newest root: what a new board is given to trust first.

        Raises:
            SigningError: when there is no repository.
        """
        return self._read(self._name_of(Root.type))

    def is_signed(self, model: str, graph: str, weights: str) -> bool:
        """Whether boards would take a bundle of these parts: the graph offline, the weights by either role.

        Raises:
            SigningError: when the metadata cannot be read.
        """
        name = weights_target(model, weights)
        targets = self._load(Targets, Targets.type).signed.targets
        if graph_target(model, graph) not in targets:
            return False
        return name in targets or name in self._load(Targets, ONLINE_ROLE).signed.targets

    def norms_of(self, model: str, graph: str) -> Norms | None:
        """The norms that a graph was signed with, if it was.

        Raises:
            SigningError: when the metadata cannot be read.
        """
        target = self._load(Targets, Targets.type).signed.targets.get(graph_target(model, graph))
        if target is None:
            return None
        return msgspec.convert(target.unrecognized_fields[CUSTOM], type=PartNote).norms

    def sign_offline(
        self,
        model: str,
        release: int,
        *,
        graph: bytes,
        weights: bytes,
        keys: Sequence[Signer],
        now: datetime,
        norms: Norms | None = None,
    ) -> None:
        """Sign the manifests of both parts of a release with the keys of `targets`.

        `norms` are for a graph whose manifest states none.

        Raises:
            SigningError: when these keys do not meet the threshold, or the disk does not take it.
        """
        graph_sha256 = _sha256(graph)
        with self._changed_targets(keys, now) as targets:
            _name(targets, graph_target(model, graph_sha256), graph, PartNote(release, norms=norms))
            _name(targets, weights_target(model, _sha256(weights)), weights, PartNote(release, graph_sha256))

    def sign_weights_online(
        self, model: str, release: int, *, weights: bytes, graph_sha256: str, now: datetime
    ) -> None:
        """Sign the manifest of a weights part with the online key. Its bounds are checked by whoever asks.

        Raises:
            SigningError: when no offline key has signed its graph, or the disk does not take it.
        """
        with self.held():
            if graph_target(model, graph_sha256) not in self._load(Targets, Targets.type).signed.targets:
                raise SigningError(
                    f"the graph {graph_sha256[:12]} of {model!r} is not signed: the online key signs weights "
                    "of signed graphs alone; sign the whole release with the offline keys"
                )
            role = self._load(Targets, ONLINE_ROLE).signed
            _name(role, weights_target(model, _sha256(weights)), weights, PartNote(release, graph_sha256))
            self._sign_weights_role(role, now)
            self.publish(now)

    def set_policy(self, policy: Policy, *, keys: Sequence[Signer], now: datetime) -> None:
        """Have boards refuse releases below a floor.

        Raises:
            SigningError: when these keys do not meet the threshold, or the disk does not take it.
        """
        content = msgspec.json.encode(policy)
        with self._changed_targets(keys, now) as targets:
            blobs = self._directory / BLOBS
            self._write_file(blobs / _sha256(content), content)
            targets.targets[POLICY_TARGET] = TargetFile.from_data(POLICY_TARGET, content, ["sha256"])

    def revoke(self, names: Sequence[str], *, keys: Sequence[Signer], now: datetime) -> None:
        """Take targets out of both roles: boards that do not run them will not take them any more.

        Raises:
            SigningError: when one is not signed, or these keys do not meet the threshold; nothing is changed.
        """
        with self.held():
            targets = self._load(Targets, Targets.type).signed
            role = self._load(Targets, ONLINE_ROLE).signed
            for name in names:
                if name not in targets.targets and name not in role.targets:
                    raise SigningError(f"{name}: not signed, so there is nothing to revoke")
                targets.targets.pop(name, None)
                role.targets.pop(name, None)
            self._renewed(targets, Targets.type, now)
            # Held against the threshold before anything is written.
            content = self._signed(targets, Targets.type, keys, self._load(Root, Root.type).signed)
            self._sign_weights_role(role, now)
            self._write_file(self.metadata_directory / f"{targets.version}.{Targets.type}.json", content)
            self.publish(now)

    def rotate_online_key(
        self, *, root_keys: Sequence[Signer], targets_keys: Sequence[Signer], now: datetime
    ) -> None:
        """Replace the online key, for one that was stolen or may have been. What it signed is forgotten.

        The new key lies beside the old one until root and targets both name it, so one that was interrupted
        is renewed by either key, and finished by asking again.

        Raises:
            SigningError: when the keys do not meet a threshold, or the disk does not take it.
        """
        with self.held():
            path = self._directory / NEXT_KEY
            fresh = read_key(path, None) if path.exists() else make_key(path, None)
            root = self._load(Root, Root.type).signed
            targets = self._load(Targets, Targets.type).signed
            for role in (Snapshot.type, Timestamp.type):
                _name_only(root, role, fresh, root.roles[role].keyids)
            _name_only(targets, ONLINE_ROLE, fresh, _delegated_keys(targets))
            self._renewed(root, Root.type, now)
            self._renewed(targets, Targets.type, now)
            # Both are held against their thresholds before either is written.
            content = [
                (f"{signed.version}.{name}.json", self._signed(signed, name, keys, root))
                for name, signed, keys in (
                    (Targets.type, targets, targets_keys),
                    (Root.type, root, root_keys),
                )
            ]
            for name, data in content:
                self._write_file(self.metadata_directory / name, data)
            self.publish(now)

    def renew_online(self, now: datetime) -> None:
        """Sign snapshot and timestamp again, and the weights' role where it expires soon.

        Raises:
            SigningError: when the key or the metadata cannot be read, or the disk does not take it.
        """
        with self.held():
            role = self._load(Targets, ONLINE_ROLE).signed
            if role.expires - now < RENEW_WEIGHTS_BEFORE:
                self._sign_weights_role(role, now)
            self.publish(now)

    # --- for `create_repository` as well -------------------------------------------------------------------

    @contextmanager
    def held(self) -> Iterator[None]:
        """Alone with the repository."""
        try:
            self.metadata_directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(self._directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise SigningError(f"{error.filename}: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def write(self, signed: Signed, role: str, keys: Sequence[Signer]) -> None:
        """Sign and write one version of a role.

        Raises:
            SigningError: when the keys do not meet the role's threshold.
        """
        root = signed if isinstance(signed, Root) else self._load(Root, Root.type).signed
        content = self._signed(signed, role, keys, root)
        name = TIMESTAMP if role == Timestamp.type else f"{signed.version}.{role}.json"
        self._write_file(self.metadata_directory / name, content)

    def publish(self, now: datetime) -> None:
        """A new snapshot of what there is, and a new timestamp of it."""
        self._settle(now)
        online = [self._key_of(Timestamp.type)]
        meta = {}
        for role in (Targets.type, ONLINE_ROLE):
            name = self._name_of(role)
            content = self._read(name)
            meta[f"{role}.json"] = MetaFile(_version_of(name), len(content), {"sha256": _sha256(content)})
        # A number that was never used: a process that died may have left a snapshot without a timestamp.
        version = self._newest(Snapshot.type) + 1
        snapshot = Snapshot(version=version, expires=now + LIFETIMES[Snapshot.type], meta=meta)
        self.write(snapshot, Snapshot.type, online)
        crash_point("tuf.snapshot-written")
        content = self._read(f"{version}.{Snapshot.type}.json")
        timestamp = Timestamp(
            version=self._timestamp_version() + 1,
            expires=now + LIFETIMES[Timestamp.type],
            snapshot_meta=MetaFile(version, len(content), {"sha256": _sha256(content)}),
        )
        timestamp.unrecognized_fields[ISSUED] = now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.write(timestamp, Timestamp.type, online)

    # --- parts ---------------------------------------------------------------------------------------------

    @contextmanager
    def _changed_targets(self, keys: Sequence[Signer], now: datetime) -> Iterator[Targets]:
        with self.held():
            targets = self._load(Targets, Targets.type).signed
            yield targets
            self._renewed(targets, Targets.type, now)
            self.write(targets, Targets.type, keys)
            crash_point("tuf.targets-written")
            self.publish(now)

    def _sign_weights_role(self, role: Targets, now: datetime) -> None:
        self._renewed(role, ONLINE_ROLE, now)
        self.write(role, ONLINE_ROLE, [self._key_of(ONLINE_ROLE)])
        crash_point("tuf.weights-written")

    def _renewed(self, signed: Signed, role: str, now: datetime) -> None:
        signed.version = self._newest(role) + 1
        signed.expires = now + LIFETIMES[role]

    def _signed(self, signed: Signed, role: str, keys: Sequence[Signer], root: Root) -> bytes:
        """The bytes of a role, once its threshold is met; of a root, the one before it agrees as well."""
        metadata: Metadata[Any] = Metadata(signed)
        for key in keys:
            metadata.sign(key, append=True)
        delegators: list[Root | Targets] = [root]
        if role == ONLINE_ROLE:
            delegators = [self._load(Targets, Targets.type).signed]
        elif role == Root.type and signed.version > 1:
            delegators.append(self._load(Root, Root.type).signed)
        try:
            for delegator in delegators:
                delegator.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
        except (RepositoryError, ValueError) as error:
            raise SigningError(f"{role}: these keys do not meet its threshold: {error}") from error
        return metadata.to_bytes()

    def _settle(self, now: datetime) -> None:
        """Finish what a rotation, whole or interrupted, has left: signatures and files of the key before."""
        try:
            metadata = self._load(Targets, ONLINE_ROLE)
            targets = self._load(Targets, Targets.type).signed
            targets.verify_delegate(ONLINE_ROLE, metadata.signed_bytes, metadata.signatures)
        except RepositoryError:
            metadata.signed.targets.clear()
            self._sign_weights_role(metadata.signed, now)
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
        if role == ONLINE_ROLE:
            return _delegated_keys(self._load(Targets, Targets.type).signed)
        return self._load(Root, Root.type).signed.roles[role].keyids

    def _load(self, kind: type[SignedT], role: str) -> Metadata[SignedT]:
        name = TIMESTAMP if role == Timestamp.type else self._name_of(role)
        try:
            metadata: Metadata[Any] = Metadata.from_bytes(self._read(name))
        except (RepositoryError, DownloadError, StorageError, ValueError, KeyError) as error:
            raise SigningError(f"{self.metadata_directory / name}: {error}") from error
        if not isinstance(metadata.signed, kind):
            raise SigningError(f"{self.metadata_directory / name}: is {metadata.signed.type}, not {role}")
        return metadata

    def _name_of(self, role: str) -> str:
        version = self._newest(role)
        if not version:
            raise SigningError(f"{self._directory}: no signed metadata; begin with `cloud-hub keys init`")
        return f"{version}.{role}.json"

    def _newest(self, role: str) -> int:
        names = (path.name for path in self.metadata_directory.glob(f"*.{role}.json"))
        return max((_version_of(name) for name in names), default=0)

    def _timestamp_version(self) -> int:
        if not (self.metadata_directory / TIMESTAMP).exists():
            return 0
        return self._load(Timestamp, Timestamp.type).signed.version

    def _read(self, name: str) -> bytes:
        path = self.metadata_directory / name
        try:
            return path.read_bytes()
        except OSError as error:
            raise SigningError(f"{path}: {error.strerror or error}") from error

    def _write_file(self, path: Path, content: bytes) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_durably(path, content)
        except OSError as error:
            raise SigningError(f"{path}: {error.strerror or error}") from error


def _name(role: Targets, name: str, content: bytes, note: PartNote) -> None:
    target = TargetFile.from_data(name, content, ["sha256"])
    target.unrecognized_fields[CUSTOM] = msgspec.to_builtins(note)
    role.targets[name] = target


def _delegated_keys(targets: Targets) -> list[str]:
    if targets.delegations is None or targets.delegations.roles is None:
        return []
    return targets.delegations.roles[ONLINE_ROLE].keyids


def _name_only(signed: Root | Targets, role: str, key: Signer, named: Sequence[str]) -> None:
    """Have a role trust this key and no other; `named` are those that it trusts now."""
    for keyid in list(named):
        if keyid != key.public_key.keyid:
            signed.revoke_key(keyid, role)
    signed.add_key(key.public_key, role)


def _version_of(name: str) -> int:
    version = name.partition(".")[0]
    return int(version) if version.isdecimal() else 0


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
