"""The signed metadata of releases on disk, as The Update Framework has them (specification 1.0).

    <directory>/metadata/<version>.<role>.json, timestamp.json     what boards fetch
    <directory>/keys/online.pem                                    signs snapshot, timestamp and weights
    <directory>/pending/<name>.json                                changes that wait for offline keys
    <directory>/blobs/<sha256>                                     the policy's content

What is signed under which name: see `edge_cascade.signed_releases`. Files are written durably, a role's new
version first, then the snapshot, the timestamp last: a process that dies in between leaves metadata that hold
together, and what the timestamp does not reach yet is signed anew. How the offline roles change: see
`offline`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

import msgspec
from securesystemslib.signer import Key, Signer
from tuf.api.metadata import (
    Root,
)

from cloud_hub.errors import SigningError
from cloud_hub.releases.changes import (
    check_keys,
    name_part,
    name_release,
    put_policy,
    renew,
    trust_offline,
    trust_online,
    withdraw,
)
from cloud_hub.releases.layout import BLOBS
from cloud_hub.releases.metadata import MetadataFiles, sha256
from cloud_hub.releases.offline import ROTATE_ONLINE, OfflineChanges
from cloud_hub.releases.online import OnlineRoles
from cloud_hub.releases.pending import (
    Progress,
)
from edge_cascade.manifest import Norms
from edge_cascade.signed_releases import (
    CUSTOM,
    POLICY_TARGET,
    PartNote,
    Policy,
    graph_target,
    read_note,
    weights_target,
)

RENEW_WEIGHTS_BEFORE: Final = timedelta(days=30)


class SignedRepository:
    """Signs what boards are to believe, and says what is signed.

    What offline keys sign returns a `Progress`: it is published once enough have signed, and waits until then
    under a name of its own. Asking for the same again, with another key, goes on where it was.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files = MetadataFiles(directory)
        self._roles = OnlineRoles(self._files)
        self.changes = OfflineChanges(self._files, self._roles)
        """What offline keys sign."""

    @property
    def metadata_directory(self) -> Path:
        """What is served to boards as it is."""
        return self._files.metadata_directory

    def first_root(self) -> bytes:
        """The newest root: what a new board is given to trust first.

        Raises:
            SigningError: when there is no repository.
        """
        return self._files.read(self._files.name_of(Root.type))

    def is_signed(self, model: str, graph: str, weights: str) -> bool:
        """Whether boards would take a bundle of these parts: the graph offline, the weights by either role.

        Raises:
            SigningError: when the metadata cannot be read.
        """
        name = weights_target(model, weights)
        targets = self._roles.targets().targets
        if graph_target(model, graph) not in targets:
            return False
        return name in targets or name in self._roles.weights().targets

    def norms_of(self, model: str, graph: str) -> Norms | None:
        """The norms that a graph was signed with, if it was.

        Raises:
            SigningError: when the metadata cannot be read.
        """
        target = self._roles.targets().targets.get(graph_target(model, graph))
        if target is None:
            return None
        return read_note(target.unrecognized_fields[CUSTOM]).norms

    def policy(self) -> Policy:
        """What boards are asked beside signatures.

        Raises:
            SigningError: when it cannot be read.
        """
        target = self._roles.targets().targets.get(POLICY_TARGET)
        if target is None:
            return Policy()
        path = self._directory / BLOBS / target.hashes["sha256"]
        try:
            return msgspec.json.decode(path.read_bytes(), type=Policy)
        except (OSError, msgspec.MsgspecError) as error:
            raise SigningError(f"{path}: {error}") from error

    # --- by offline keys -----------------------------------------------------------------------------------

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
    ) -> Progress:
        """Sign the manifests of both parts of a release with the keys of `targets`.

        `norms` are for a graph whose manifest states none.

        Raises:
            SigningError: see `OfflineChanges.change`.
        """
        edit = name_release(model, release, graph=graph, weights=weights, norms=norms)
        return self.changes.change(f"release-{release}", edit, keys, now)

    def set_policy(self, policy: Policy, *, keys: Sequence[Signer], now: datetime) -> Progress:
        """Have boards refuse releases below a floor.

        Raises:
            SigningError: see `OfflineChanges.change`.
        """
        return self.changes.change("floor", put_policy(policy), keys, now)

    def revoke(self, name: str, targets: Sequence[str], *, keys: Sequence[Signer], now: datetime) -> Progress:
        """Take targets out of both roles: boards that do not run them will not take them any more.

        Raises:
            SigningError: when one is not signed; see `OfflineChanges.change`.
        """
        return self.changes.change(f"revoke-{name}", withdraw(targets, self._roles.weights()), keys, now)

    def rotate_online_key(self, *, keys: Sequence[Signer], now: datetime) -> Progress:
        """Replace the online key, for one that was stolen or may have been. What it signed is forgotten.

        The new key lies beside the old one until root and targets both name it.

        Raises:
            SigningError: see `OfflineChanges.change`.
        """
        with self._files.held():
            fresh = self._roles.next_key()
        return self.changes.change(ROTATE_ONLINE, trust_online(fresh.public_key), keys, now)

    def check_rotation(
        self, role: str, *, new_keys: int, threshold: int, keep: Sequence[str], keys: Sequence[Signer]
    ) -> int:
        """Whether keys that are made now could replace those of a role; the version of root to be.

        Raises:
            SigningError: when such a change waits already, the threshold cannot be met, or `keep` or one of
                `keys` names nobody.
        """
        name = f"rotate-{role}"
        if name in self.changes.names():
            raise SigningError(
                f"pending {name}: waits already; sign it by `cloud-hub keys sign {name}`, or "
                f"`cloud-hub keys drop {name}` and begin again"
            )
        root = self._roles.root()
        kept = check_keys(root.roles[role].keyids, role, new_keys, keep=keep, threshold=threshold)
        for keyid in (key.public_key.keyid for key in keys):
            if keyid not in {*root.roles[Root.type].keyids, *kept}:
                raise SigningError(f"the key {keyid[:12]} is none of root, nor one of {role} that stays")
        return root.version + 1

    def rotate_offline_keys(
        self,
        role: str,
        fresh: Sequence[Signer],
        *,
        threshold: int,
        keys: Sequence[Signer],
        now: datetime,
        keep: Sequence[str] = (),
        brought: Sequence[Key] = (),
    ) -> Progress:
        """Replace the keys of `root` or `targets`; those that `keep` names by their ids stay.

        Both the old and the new threshold of root sign a new root. `fresh` keys sign at once; of those that
        are `brought` the private parts are with other people.

        Raises:
            SigningError: see `OfflineChanges.change`, and when the threshold cannot be met.
        """
        publics = [*(key.public_key for key in fresh), *brought]
        edit = trust_offline(role, publics, keep=keep, threshold=threshold)
        return self.changes.change(f"rotate-{role}", edit, [*keys, *fresh], now)

    def renew_offline(self, role: str, *, keys: Sequence[Signer], now: datetime) -> Progress:
        """Sign `root` or `targets` for another year, changing nothing.

        Raises:
            SigningError: see `OfflineChanges.change`.
        """
        return self.changes.change(f"renew-{role}", renew(role), keys, now)

    # --- by the online key ---------------------------------------------------------------------------------

    def sign_weights_online(
        self, model: str, release: int, *, weights: bytes, graph_sha256: str, now: datetime
    ) -> None:
        """Sign the manifest of a weights part with the online key. Its bounds are checked by whoever asks.

        Raises:
            SigningError: when no offline key has signed its graph, or the disk does not take it.
        """
        with self.changes.alone(now):
            if graph_target(model, graph_sha256) not in self._roles.targets().targets:
                raise SigningError(
                    f"the graph {graph_sha256[:12]} of {model!r} is not signed: the online key signs weights "
                    "of signed graphs alone; sign the whole release with the offline keys"
                )
            role = self._roles.weights()
            name_part(role, weights_target(model, sha256(weights)), weights, PartNote(release, graph_sha256))
            self._roles.sign_weights(role, now)
            self._roles.publish(now)

    def forget_weights(self, names: Iterable[str], now: datetime) -> int:
        """Take weights that nobody needs any more from what the online key signs; how many it had signed.

        Raises:
            SigningError: when the key or the metadata cannot be read, or the disk does not take it.
        """
        with self.changes.alone(now):
            role = self._roles.weights()
            gone = role.targets.keys() & set(names)
            if gone:
                for name in gone:
                    del role.targets[name]
                self._roles.sign_weights(role, now)
                self._roles.publish(now)
        return len(gone)

    def renew_online(self, now: datetime, *, clock_was_ahead: bool = False) -> None:
        """Sign snapshot and timestamp again, and the weights' role where it expires soon.

        `clock_was_ahead`: somebody says that the last timestamp was made by a wrong clock.

        Raises:
            SigningError: when root has expired by this clock or it is behind, the key or the metadata cannot
                be read, or the disk does not take it.
        """
        with self.changes.alone(now, clock_was_ahead=clock_was_ahead):
            # Boards move their time forward by what is signed here, and never back: far ahead nothing holds.
            if (expires := self._roles.root().expires) <= now:
                raise SigningError(
                    f"root expired on {expires:%Y-%m-%d}, by this machine's clock, which says "
                    f"{now:%Y-%m-%d}: set the clock, or renew it by "
                    "`cloud-hub keys renew --role root --key FILE`"
                )
            role = self._roles.weights()
            if role.expires - now < RENEW_WEIGHTS_BEFORE:
                self._roles.sign_weights(role, now)
            self._roles.publish(now)
