"""What offline keys are asked to agree to: edits of `root` and `targets`. No I/O, nothing is signed here.

An edit is made on drafts of both roles. Made again on the same ones it gives the same bytes: that is how the
second person who signs is known to mean what the first one did.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final

import msgspec
from securesystemslib.signer import Key
from tuf.api.metadata import Root, Snapshot, TargetFile, Targets, Timestamp

from cloud_hub.errors import SigningError
from cloud_hub.releases.metadata import sha256
from edge_cascade.manifest import Norms
from edge_cascade.signed_releases import (
    CUSTOM,
    ONLINE_ROLE,
    POLICY_TARGET,
    PartNote,
    Policy,
    graph_target,
    note_fields,
    weights_target,
)

OFFLINE_ROLES: Final = (Root.type, Targets.type)

LIFETIMES: Final[Mapping[str, timedelta]] = {
    Root.type: timedelta(days=365),
    Targets.type: timedelta(days=365),
    ONLINE_ROLE: timedelta(days=90),
    Snapshot.type: timedelta(days=14),
    Timestamp.type: timedelta(days=3),
}


@dataclass(slots=True)
class Draft:
    """The next versions of both roles; `changed` are those that are to be signed.

    `blobs` are files that targets name; of the online role's targets the `withdrawn` go with it.
    """

    root: Root
    targets: Targets
    changed: set[str] = field(default_factory=set)
    blobs: list[bytes] = field(default_factory=list)
    withdrawn: list[str] = field(default_factory=list)


Edit = Callable[[Draft], None]


def name_release(model: str, release: int, *, graph: bytes, weights: bytes, norms: Norms | None) -> Edit:
    """Name the manifests of both parts of a release."""

    def edit(draft: Draft) -> None:
        graph_sha256 = sha256(graph)
        name_part(draft.targets, graph_target(model, graph_sha256), graph, PartNote(release, norms=norms))
        name_part(
            draft.targets, weights_target(model, sha256(weights)), weights, PartNote(release, graph_sha256)
        )
        draft.changed.add(Targets.type)

    return edit


def put_policy(policy: Policy) -> Edit:
    """Name another policy."""

    def edit(draft: Draft) -> None:
        content = msgspec.json.encode(policy, order="sorted")
        draft.targets.targets[POLICY_TARGET] = TargetFile.from_data(POLICY_TARGET, content, ["sha256"])
        draft.blobs.append(content)
        draft.changed.add(Targets.type)

    return edit


def withdraw(names: Sequence[str], online: Targets) -> Edit:
    """Name these targets no more; `online` are those of the online role.

    Raises:
        SigningError: when one is not signed (as the edit is made).
    """

    def edit(draft: Draft) -> None:
        for name in names:
            if name not in draft.targets.targets and name not in online.targets:
                raise SigningError(f"{name}: not signed, so there is nothing to revoke")
            draft.targets.targets.pop(name, None)
        draft.withdrawn += names
        draft.changed.add(Targets.type)

    return edit


def trust_online(key: Key) -> Edit:
    """Trust this online key and no other."""

    def edit(draft: Draft) -> None:
        for role in (Snapshot.type, Timestamp.type):
            _trust(draft.root, role, [key], draft.root.roles[role].keyids)
        _trust(draft.targets, ONLINE_ROLE, [key], delegated_keys(draft.targets))
        draft.changed |= {Root.type, Targets.type}

    return edit


def trust_offline(role: str, keys: Sequence[Key], *, keep: Sequence[str], threshold: int) -> Edit:
    """Have `root` or `targets` trust these keys and those of its own that begin like one of `keep`.

    Raises:
        SigningError: when the threshold cannot be met, or `keep` names none (as the edit is made).
    """

    def edit(draft: Draft) -> None:
        named = list(draft.root.roles[role].keyids)
        kept = check_keys(named, role, len(keys), keep=keep, threshold=threshold)
        _trust(draft.root, role, keys, [keyid for keyid in named if keyid not in kept])
        draft.root.roles[role].threshold = threshold
        draft.changed |= {Root.type, role}

    return edit


def check_keys(
    named: Sequence[str], role: str, new_keys: int, *, keep: Sequence[str], threshold: int
) -> list[str]:
    """Those of a role's keys that begin like one of `keep`.

    Raises:
        SigningError: when the threshold cannot be met with the new ones, or `keep` names none.
    """
    if odd := [each for each in keep if not each or not any(keyid.startswith(each) for keyid in named)]:
        raise SigningError(f"{role} has no key {odd[0]!r}; `cloud-hub keys show` lists them")
    kept = [keyid for keyid in named if any(keyid.startswith(each) for each in keep)]
    if not 1 <= threshold <= len(kept) + new_keys:
        raise SigningError(f"{role}: a threshold of {threshold} cannot be met by {len(kept) + new_keys} keys")
    return kept


def renew(role: str) -> Edit:
    """Nothing but another year."""

    def edit(draft: Draft) -> None:
        draft.changed.add(role)

    return edit


def name_part(role: Targets, name: str, content: bytes, note: PartNote) -> None:
    """Have a role name a manifest, with its note."""
    target = TargetFile.from_data(name, content, ["sha256"])
    target.unrecognized_fields[CUSTOM] = note_fields(note)
    role.targets[name] = target


def delegated_keys(targets: Targets) -> list[str]:
    """The ids of the keys that the online role has."""
    if targets.delegations is None or targets.delegations.roles is None:
        return []
    return targets.delegations.roles[ONLINE_ROLE].keyids


def _trust(signed: Root | Targets, role: str, keys: Sequence[Key], instead_of: Sequence[str]) -> None:
    wanted = {key.keyid for key in keys}
    for keyid in list(instead_of):
        if keyid not in wanted:
            signed.revoke_key(keyid, role)
    for key in keys:
        signed.add_key(key, role)
