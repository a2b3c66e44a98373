"""Signatures that are made on another machine, so that an offline key is never where the hub is. No I/O.

A change that waits is taken there as a file, said in words, signed, and brought back to `take_signatures`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from securesystemslib.signer import Key, Signer, SSlibKey
from tuf.api.metadata import Root, Targets

from cloud_hub.errors import SigningError
from cloud_hub.releases.changes import OFFLINE_ROLES
from cloud_hub.releases.pending import Pending
from edge_cascade.signed_releases import CUSTOM, ONLINE_ROLE, POLICY_TARGET, read_note


def sign_blindly(pending: Pending, keys: Sequence[Signer]) -> Pending:
    """Sign every role of a change with every key: which of them count is known where the root is.

    Raises:
        SigningError: when the change cannot be read.
    """
    roles = {}
    for role in pending.roles:
        metadata = pending.metadata(role)
        for key in keys:
            metadata.sign(key, append=True)
        roles[role] = metadata.to_bytes().decode()
    return msgspec.structs.replace(pending, roles=roles)


def lines_of(pending: Pending) -> list[str]:
    """What somebody who signs a change is to read first: all that would hold, by what is signed alone.

    Raises:
        SigningError: when it cannot be read, or shows something else than is signed.
    """
    lines = []
    policies = {hashlib.sha256(blob.encode()).hexdigest(): blob for blob in pending.blobs}
    for role in (role for role in OFFLINE_ROLES if role in pending.roles):
        signed = pending.metadata(role).signed
        _refuse_unsaid(signed)
        lines.append(f"{role} version {signed.version}, until {signed.expires:%Y-%m-%d}")
        lines += _root_lines(signed) if isinstance(signed, Root) else _targets_lines(signed, policies)
    if policies:
        raise SigningError("a policy comes with it that it does not name: do not sign this")
    for line in lines:
        # Whoever has taken over a hub could move the cursor over what was said, or begin lines of his own.
        if not line.isprintable():
            raise SigningError(f"{line!r}: it holds what cannot be shown, do not sign this")
    return lines


def _root_lines(root: Root) -> list[str]:
    return [
        f"  {role}: {each.threshold} of {', '.join(keyid[:12] for keyid in each.keyids)}"
        for role, each in root.roles.items()
    ]


def _refuse_unsaid(signed: Root | Targets) -> None:
    """Refuse what would hold and is in no line: other roles, files by hashes, a key under a false id.

    Raises:
        SigningError: naming it.
    """
    keys: Mapping[str, Any] = signed.keys if isinstance(signed, Root) else {}
    if isinstance(signed, Targets) and signed.delegations is not None:
        roles, keys = signed.delegations.roles, signed.delegations.keys
        if roles is None or roles.keys() != {ONLINE_ROLE}:
            named = (
                "roles by the bins of hashes" if roles is None else ", ".join(map(repr, roles)) or "no role"
            )
            raise SigningError(f"delegates to {named}, not to {ONLINE_ROLE!r} alone: do not sign this")
        if roles[ONLINE_ROLE].path_hash_prefixes is not None:
            raise SigningError(f"{ONLINE_ROLE}: may sign by hashes of names, not by names: do not sign this")
    for keyid, key in keys.items():
        if _id_of(key) != keyid:
            raise SigningError(f"the key {keyid[:12]!r} is not the one of that id: do not sign this")


def _id_of(key: Key) -> str:
    try:
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(key.keyval["public"]))
    except (ValueError, KeyError, TypeError) as error:
        raise SigningError(f"the key {key.keyid[:12]!r} is no Ed25519 key: do not sign this") from error
    return SSlibKey.from_crypto(public).keyid


def _targets_lines(targets: Targets, policies: dict[str, str]) -> list[str]:
    """Takes those of the policies that it names."""
    lines = [f"  {ONLINE_ROLE}: nobody, may sign nothing"]
    if targets.delegations is not None and targets.delegations.roles is not None:
        online = targets.delegations.roles[ONLINE_ROLE]
        keys = ", ".join(keyid[:12] for keyid in online.keyids) or "nobody"
        allowed = ", ".join(online.paths or []) or "nothing"
        lines = [f"  {ONLINE_ROLE}: {online.threshold} of {keys}, may sign {allowed}"]
    for name, target in sorted(targets.targets.items()):
        digest = target.hashes.get("sha256", "")
        if name == POLICY_TARGET:
            lines.append(f"  {name}: sha256 {digest}")
            if digest in policies:
                lines.append(f"  policy: {policies.pop(digest)}")
            continue
        try:
            note = read_note(target.unrecognized_fields.get(CUSTOM))
        except msgspec.ValidationError as error:
            raise SigningError(f"{name!r}: its note cannot be read, do not sign this: {error}") from error
        bounds = "" if note.norms is None else f", weights of all together up to {note.norms.together:g}"
        lines.append(f"  release {note.release}: {name}{bounds}")
    return lines
