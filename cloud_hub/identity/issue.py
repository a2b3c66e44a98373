"""Gives accounts their credentials: makes them, hands them over in files, keeps only hash or fingerprint.

Files first, database second: a power cut between the two leaves a credential that nobody accepts, and the
same command can be typed again.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cloud_hub.errors import NotFoundError
from cloud_hub.identity.accounts import IdentityError, Role, check_account_name
from cloud_hub.identity.authority import Authority
from cloud_hub.identity.broker_directory import write_file
from cloud_hub.identity.passwords import hash_password, new_password
from cloud_hub.identity.roster import Credential, Roster


@dataclass(frozen=True, slots=True)
class Applicant:
    """Who is to get a credential: somebody new, or with `is_known` somebody in place of the old one."""

    name: str
    role: Role
    device: str | None
    is_known: bool = False


@dataclass(frozen=True, slots=True)
class Handed:
    """What was made: the files, and the password where there is no file for it."""

    files: Sequence[Path]
    password: str | None = None


class Issuer:
    """Makes, renews and revokes credentials. Any call may raise what the store and the file system do."""

    def __init__(self, roster: Roster, authority: Authority) -> None:
        self._roster = roster
        self._authority = authority

    def check(self, applicant: Applicant) -> None:
        """Refuse who cannot get a credential, before anything is made.

        Raises:
            IdentityError: for a name that cannot be had, or a sensor of a board that it cannot feed.
            NotFoundError: for a renewal of nobody, or a sensor of no board.
        """
        if applicant.role != "hub":
            check_account_name(applicant.name)
        if not applicant.is_known:
            self._roster.check_free(applicant.name)
        else:
            found = self._roster.require(applicant.name, applicant.role)
            if found.device != applicant.device:
                raise IdentityError(
                    f"{found.role} {found.name!r} belongs to {found.device!r}: give that --device"
                )
        if applicant.role == "sensor":
            self._check_feeds(applicant.device or "")

    def give_password(self, applicant: Applicant, *, out: Path | None, now: datetime.datetime) -> Handed:
        """A new password, in `out`/NAME.password or, without `out`, in the result. The old one ends."""
        password = new_password()
        files = []
        if out is not None:
            path = out / f"{applicant.name}.password"
            files = [write_file(path, f"{password}\n".encode(), is_secret=True), *self._copy_ca(out)]
        self._authority.revoke_client(applicant.name, now=now)
        self._keep(applicant, Credential(password_hash=hash_password(password)), now)
        return Handed(files, None if out is not None else password)

    def give_certificate(self, applicant: Applicant, *, out: Path, now: datetime.datetime) -> Handed:
        """A new key and certificate in `out`/NAME.key and NAME.pem beside ca.pem. The old credential ends."""
        issued = self._authority.issue_client(applicant.name, now=now)
        files = [
            write_file(out / f"{applicant.name}.key", issued.key, is_secret=True),
            write_file(out / f"{applicant.name}.pem", issued.certificate, is_secret=False),
            *self._copy_ca(out),
        ]
        self._keep(applicant, Credential(certificate_fingerprint=issued.fingerprint), now)
        return Handed(files)

    def revoke(self, name: str, role: Role, *, now: datetime.datetime) -> bool:
        """End an account; whether it was still active.

        Raises:
            NotFoundError: when there is none.
        """
        account = self._roster.require(name, role)
        # Also where the database has it revoked: the list may be what the last attempt did not reach.
        self._authority.revoke_client(name, now=now)
        if account.is_active:
            self._roster.revoke(name, now_ms=_milliseconds(now))
        return account.is_active

    def _check_feeds(self, device: str) -> None:
        found = self._roster.find(device)
        if found is None or found.role != "device":
            raise NotFoundError(f"there is no device {device!r}: `cloud-hub device add {device}` makes one")
        if not found.is_active:
            raise IdentityError(
                f"device {device!r} is revoked: `cloud-hub device add {device} --renew` readmits it"
            )

    def _keep(self, applicant: Applicant, credential: Credential, now: datetime.datetime) -> None:
        if applicant.is_known:
            self._roster.renew(applicant.name, credential)
            return
        self._roster.add(
            applicant.name, applicant.role, credential, device=applicant.device, now_ms=_milliseconds(now)
        )

    def _copy_ca(self, out: Path) -> list[Path]:
        source = self._authority.ca_file
        return [write_file(out / "ca.pem", source.read_bytes(), is_secret=False)] if source.exists() else []


def _milliseconds(now: datetime.datetime) -> int:
    return int(now.timestamp() * 1000)
