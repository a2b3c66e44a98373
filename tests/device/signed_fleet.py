"""A hub's signed metadata in memory, in the way of python-tuf's own repository simulator: made anew on request."""

import datetime
import hashlib

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from edge_cascade.signed_releases import (
    BLOBS_PATH,
    CUSTOM,
    METADATA_PATH,
    ONLINE_PATHS,
    ONLINE_ROLE,
    POLICY_TARGET,
    PartNote,
    graph_target,
    note_fields,
    weights_target,
)
from edge_daemon.releases.http_fetch import StatusError

NOON = datetime.datetime(2030, 5, 1, 12, tzinfo=datetime.UTC)
DAY = datetime.timedelta(days=1)


def sha256(content):
    return hashlib.sha256(content).hexdigest()


class FakeClock:
    """Runs when told; its wall clock is whatever somebody set."""

    def __init__(self):
        self.now_s = 1000.0
        self.wall = 0

    def monotonic_s(self):
        return self.now_s

    def wall_ms(self):
        return self.wall


class SignedFleet:
    """Roles with one key each, root and targets for years, online roles for days. `files` is what is served."""

    def __init__(self):
        self.now = NOON
        self.signers = {
            role: CryptoSigner.generate_ed25519()
            for role in (Root.type, Targets.type, Snapshot.type, Timestamp.type, ONLINE_ROLE)
        }
        years = NOON + 1000 * DAY
        self.root = Root(expires=years, consistent_snapshot=True)
        for role in (Root.type, Targets.type, Snapshot.type, Timestamp.type):
            self.root.add_key(self.signers[role].public_key, role)
        online = self.signers[ONLINE_ROLE].public_key
        role = DelegatedRole(ONLINE_ROLE, [online.keyid], 1, terminating=True, paths=list(ONLINE_PATHS))
        self.targets = Targets(
            expires=years, delegations=Delegations({online.keyid: online}, {ONLINE_ROLE: role})
        )
        self.online = Targets(expires=NOON + 30 * DAY)
        self.snapshot = Snapshot(
            expires=NOON + 7 * DAY,
            meta={"targets.json": MetaFile(1), f"{ONLINE_ROLE}.json": MetaFile(1)},
        )
        self.timestamp = Timestamp(expires=NOON + DAY)
        self.files = {}
        self.publish_root()
        self.publish()
        self.first_root = self.files["1.root"]

    def stream(self, path):
        """What `Trust` reads from."""
        if path.startswith(f"{METADATA_PATH}/"):
            path = path.removeprefix(f"{METADATA_PATH}/").removesuffix(".json")
        if path not in self.files:
            raise StatusError(path, 404)
        content = self.files[path]
        yield from (content[at : at + 5000] for at in range(0, len(content), 5000))

    def signed(self, signed, role, *others):
        metadata = Metadata(signed)
        for signer in (self.signers[role], *others):
            metadata.sign(signer, append=True)
        return metadata.to_bytes()

    def publish_root(self, *others):
        self.files[f"{self.root.version}.root"] = self.signed(self.root, Root.type, *others)

    def publish(self):
        """Sign and serve everything but the root as it is now."""
        for name, signed in ((Targets.type, self.targets), (ONLINE_ROLE, self.online)):
            content = self.signed(signed, name)
            self.files[f"{signed.version}.{name}"] = content
            self.snapshot.meta[f"{name}.json"] = MetaFile(
                signed.version, len(content), {"sha256": sha256(content)}
            )
        self.publish_snapshot()

    def publish_snapshot(self):
        content = self.signed(self.snapshot, Snapshot.type)
        self.files[f"{self.snapshot.version}.snapshot"] = content
        self.timestamp.snapshot_meta = MetaFile(
            self.snapshot.version, len(content), {"sha256": sha256(content)}
        )
        self.publish_timestamp()

    def publish_timestamp(self):
        self.timestamp.unrecognized_fields["issued"] = self.now.strftime("%Y-%m-%dT%H:%M:%SZ")
        self.files["timestamp"] = self.signed(self.timestamp, Timestamp.type)

    def renew(self, now=None):
        """What the hub does daily, and after every change."""
        self.now = now or self.now
        for signed, days in ((self.snapshot, 7), (self.timestamp, 1)):
            signed.version += 1
            signed.expires = self.now + days * DAY
        for signed in (self.targets, self.online):
            signed.version += 1
        self.publish()

    def sign_graph(self, model, manifest, *, release=1, role=None):
        self._name(role or self.targets, graph_target(model, sha256(manifest)), manifest, PartNote(release))

    def sign_weights(self, model, manifest, graph, *, release=1, role=None):
        note = PartNote(release, graph)
        self._name(role or self.online, weights_target(model, sha256(manifest)), manifest, note)

    def sign_policy(self, content):
        target = TargetFile.from_data(POLICY_TARGET, content, ["sha256"])
        self.targets.targets[POLICY_TARGET] = target
        self.files[f"{BLOBS_PATH}/{sha256(content)}"] = content

    def _name(self, role, path, content, note):
        target = TargetFile.from_data(path, content, ["sha256"])
        target.unrecognized_fields[CUSTOM] = note_fields(note)
        role.targets[path] = target

    def rotate(self, role):
        """A new key for a role, by a new root."""
        old, new = self.signers[role], CryptoSigner.generate_ed25519()
        self.root.revoke_key(old.public_key.keyid, role)
        self.root.add_key(new.public_key, role)
        self.root.version += 1
        self.signers[role] = new
        self.publish_root(*([old] if role == Root.type else []))


__all__ = ["DAY", "NOON", "FakeClock", "SignedFleet", "sha256"]
