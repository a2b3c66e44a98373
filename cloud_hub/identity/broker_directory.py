"""Writes the broker's folder, each file whole or not at all.

    mosquitto.conf                          from `broker config`
    acl passwords                           0600, from every run
    ca.pem crl.pem server.pem server.key    with TLS; server.key 0600
    persistence/                            mosquitto's own
    hub.password, or hub.pem and hub.key    0600, the hub's credential

Written as root, all but the hub's credential is given to the user that mosquitto becomes.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Sequence
from pathlib import Path

from cloud_hub.identity.accounts import Account, IdentityError
from cloud_hub.identity.authority import Authority
from cloud_hub.identity.broker_files import (
    MARK,
    BrokerSettings,
    render_acl,
    render_configuration,
    render_passwords,
)
from edge_cascade.durable import write_durably


class BrokerDirectory:
    """The folder that mosquitto reads. Written as root, its files are given to the broker's user."""

    def __init__(self, directory: Path, user: str | None) -> None:
        self._directory = directory
        self._owner = None if user is None else _owner(user)

    def prepare(self) -> None:
        """Create the folder and see that a `mosquitto.conf` in it is one of ours.

        Raises:
            IdentityError: when it is somebody else's, or the folder cannot be made.
        """
        configuration = self._directory / "mosquitto.conf"
        try:
            for directory, mode in ((self._directory, 0o755), (self._directory / "persistence", 0o700)):
                if not directory.exists():
                    directory.mkdir(mode=mode, parents=True)
                    self._give_away(directory)
            is_foreign = configuration.exists() and not configuration.read_text(
                encoding="utf-8", errors="replace"
            ).startswith(MARK)
        except OSError as error:
            raise _unwritable(self._directory, error) from error
        if is_foreign:
            raise IdentityError(
                f"{str(configuration)!r} was not written by cloud-hub and would be lost: choose another --out"
            )

    def write_accounts(self, prefix: str, accounts: Sequence[Account], authority: Authority) -> None:
        """Passwords, access rules, and the revocation list where there is one."""
        # The rules first: a name with rights it should not have must not be able to log in.
        self.write("acl", render_acl(prefix, accounts).encode(), is_secret=True)
        self.write("passwords", render_passwords(accounts).encode(), is_secret=True)
        if authority.crl_file.exists():
            self.copy(authority.ca_file, "ca.pem")
            self.copy(authority.crl_file, "crl.pem")

    def write_configuration(self, settings: BrokerSettings, authority: Authority) -> None:
        """`mosquitto.conf`, and with TLS the broker's certificate and key."""
        if settings.security != "plain":
            self.copy(authority.server_certificate_file, "server.pem")
            self.copy(authority.server_key_file, "server.key", is_secret=True)
        self.write("mosquitto.conf", render_configuration(settings).encode())

    def copy(self, source: Path, name: str, *, is_secret: bool = False) -> None:
        """A copy of `source` under `name`."""
        try:
            content = source.read_bytes()
        except OSError as error:
            raise _unwritable(source, error) from error
        self.write(name, content, is_secret=is_secret)

    def write(self, name: str, content: bytes, *, is_secret: bool = False) -> None:
        """One file of the folder, for the broker's user.

        Raises:
            IdentityError: when it cannot be written.
        """
        path = write_file(self._directory / name, content, is_secret=is_secret)
        try:
            self._give_away(path)
        except OSError as error:
            raise _unwritable(path, error) from error

    def _give_away(self, path: Path) -> None:
        if self._owner is not None and os.geteuid() == 0:
            os.chown(path, *self._owner, follow_symlinks=False)


def write_file(path: Path, content: bytes, *, is_secret: bool) -> Path:
    """Replace `path`, durably; a secret is readable by its owner only.

    Raises:
        IdentityError: when it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, content, mode=0o600 if is_secret else 0o644)
    except OSError as error:
        raise _unwritable(path, error) from error
    return path


def _owner(user: str) -> tuple[int, int]:
    try:
        entry = pwd.getpwnam(user)
    except KeyError as error:
        raise IdentityError(f"--user {user!r}: this machine has no such user") from error
    return entry.pw_uid, entry.pw_gid


def _unwritable(path: Path, error: OSError) -> IdentityError:
    return IdentityError(f"{error.filename or path}: {error.strerror or error}")
