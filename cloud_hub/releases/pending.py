"""Changes that wait for more offline keys, and those that are signed and not yet published: one file each.

    <directory>/pending/<name>.json

A threshold of two is two people, who seldom are in one room. The first one's signature is kept with the bytes
that it is over; the next one signs the same bytes. A change with all its signatures is `sealed`: from then on
it is carried out, by whoever comes next if need be. So a process that dies between two files leaves no half
of a change behind.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import msgspec
from securesystemslib.signer import Signer
from tuf.api.metadata import Metadata, Root, Targets

from cloud_hub.errors import SigningError
from cloud_hub.releases.metadata import parse
from edge_cascade.durable import sync_directory, write_durably

PENDING: Final = "pending"
_NAME = re.compile(r"[a-z0-9][A-Za-z0-9_-]{0,127}")
_KINDS: Final[Mapping[str, type[Root] | type[Targets]]] = {Root.type: Root, Targets.type: Targets}


class Pending(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A change of `root`, `targets` or both; `roles` are their metadata as TUF writes them."""

    name: str
    begun_at: datetime
    roles: dict[str, str]
    blobs: tuple[str, ...] = ()
    withdrawn: tuple[str, ...] = ()
    sealed: bool = False

    def metadata(self, role: str) -> Metadata[Any]:
        """One of its roles.

        Raises:
            SigningError: when it cannot be read.
        """
        return parse(self.roles[role].encode(), _KINDS[role], role, where=f"pending {self.name}: {role}")


@dataclass(frozen=True, slots=True)
class Progress:
    """Who has signed each role of a change, and who might of those that still have to; ids of keys."""

    name: str
    signed: Mapping[str, tuple[str, ...]]
    missing: Mapping[str, int]
    """How many signatures are missing at least; roles that need none are left out."""
    waiting_for: Mapping[str, tuple[str, ...]]

    @property
    def is_published(self) -> bool:
        """Whether boards can see it."""
        return not self.missing

    def summary(self) -> str:
        """For the log of acts."""
        if self.is_published:
            return "published"
        return "waits for " + ", ".join(f"{number} of {role}" for role, number in self.missing.items())


class PendingFiles:
    """The changes in one directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory / PENDING

    def names(self) -> list[str]:
        """Those that are under way."""
        return sorted(path.stem for path in self._directory.glob("*.json") if _NAME.fullmatch(path.stem))

    def get(self, name: str) -> Pending | None:
        """One of them.

        Raises:
            SigningError: when it cannot be read; `keys drop` takes it away.
        """
        path = self._path(name)
        if not path.exists():
            return None
        try:
            return read_change(path)
        except SigningError as error:
            raise SigningError(f"{error}; `cloud-hub keys drop {name}` takes it away") from error

    def put(self, pending: Pending) -> None:
        """Write one.

        Raises:
            SigningError: when the disk does not take it.
        """
        path = self._path(pending.name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_durably(path, msgspec.json.encode(pending))
        except OSError as error:
            raise SigningError(f"{path}: {error.strerror or error}") from error

    def drop(self, name: str) -> None:
        """Take one away.

        Raises:
            SigningError: when there is none of this name.
        """
        path = self._path(name)
        try:
            path.unlink()
            sync_directory(path.parent)
        except OSError as error:
            raise SigningError(f"{path}: {error.strerror or error}") from error

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise SigningError(
                f"{name!r} is no name of a change; `cloud-hub keys show` lists those that wait"
            )
        return self._directory / f"{name}.json"


def read_change(path: Path) -> Pending:
    """A change in a file.

    Raises:
        SigningError: when it cannot be read.
    """
    try:
        change = msgspec.json.decode(path.read_bytes(), type=Pending)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise SigningError(f"{path}: no change that waits can be read: {error}") from error
    if odd := change.roles.keys() - _KINDS.keys():
        raise SigningError(
            f"{path}: a change of {min(odd)!r}; of {' and '.join(_KINDS)} alone, do not sign this"
        )
    if not change.roles:
        raise SigningError(f"{path}: a change of nothing; there is nothing to sign")
    return change


def sign_with(pending: Pending, root: Root, keys: Sequence[Signer]) -> Pending:
    """Sign the roles of a change with those of the keys that may; `root` is the one that boards know.

    Raises:
        SigningError: for a key that none of them asks for, by its id.
    """
    signed = {role: pending.metadata(role) for role in pending.roles}
    for key in keys:
        keyid = key.public_key.keyid
        asked = [
            role
            for role in signed
            if any(keyid in each.roles[role].keyids for each in _delegators(role, signed, root))
        ]
        if not asked:
            raise SigningError(
                f"pending {pending.name}: the key {keyid[:12]} is none of {' or '.join(signed)}; "
                "`cloud-hub keys show` lists them"
            )
        for role in asked:
            signed[role].sign(key, append=True)
    return msgspec.structs.replace(
        pending, roles={role: each.to_bytes().decode() for role, each in signed.items()}
    )


def with_signatures_of(pending: Pending, signed: Pending, root: Root) -> Pending:
    """A change with the signatures that somebody brings from elsewhere, of those that are asked and verify.

    Raises:
        SigningError: when they are over something else.
    """
    metadata = {role: pending.metadata(role) for role in pending.roles}
    for role, each in metadata.items():
        if role not in signed.roles or signed.metadata(role).signed != each.signed:
            raise SigningError(
                f"pending {pending.name}: what was signed elsewhere is not what waits here; take it there "
                f"again by `cloud-hub keys export {pending.name}`"
            )
        brought = signed.metadata(role).signatures
        for delegator in _delegators(role, metadata, root):
            result = delegator.get_verification_result(role, each.signed_bytes, brought)
            each.signatures |= {keyid: brought[keyid] for keyid in result.signed}
    return msgspec.structs.replace(
        pending, roles={role: each.to_bytes().decode() for role, each in metadata.items()}
    )


def progress_of(pending: Pending, root: Root) -> Progress:
    """How far a change has come; `root` is the one that boards know.

    Raises:
        SigningError: when it cannot be read.
    """
    metadata = {role: pending.metadata(role) for role in pending.roles}
    signed, missing, waiting_for = {}, {}, {}
    for role, each in metadata.items():
        results = [
            delegator.get_verification_result(role, each.signed_bytes, each.signatures)
            for delegator in _delegators(role, metadata, root)
        ]
        signed[role] = tuple(sorted({keyid for result in results for keyid in result.signed}))
        if any(not result.verified for result in results):
            missing[role] = max(result.missing for result in results)
            waiting_for[role] = tuple(
                sorted({keyid for result in results if not result.verified for keyid in result.unsigned})
            )
    return Progress(pending.name, signed, missing, waiting_for)


def _delegators(role: str, metadata: Mapping[str, Metadata[Any]], root: Root) -> list[Root]:
    """Whose thresholds a role must meet: a root's those of the one before and its own (TUF 6.1)."""
    next_root = metadata[Root.type].signed if Root.type in metadata else root
    return [root, next_root] if role == Root.type else [next_root]
