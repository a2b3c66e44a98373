"""The accounts in the hub's database. Rows are never deleted: a revoked name stays taken, and denied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, select, update

from cloud_hub.errors import NotFoundError
from cloud_hub.identity.accounts import HUB_NAME, Account, IdentityError, Role
from cloud_hub.store.database import Database
from cloud_hub.store.schema import accounts, insert_if_absent


@dataclass(frozen=True, slots=True)
class Credential:
    """What proves an account: exactly one of the two."""

    password_hash: str | None = None
    certificate_fingerprint: str | None = None


class Roster:
    """Reads and changes the accounts, a transaction each. Any call may raise what `Database.run` does."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def find(self, name: str) -> Account | None:
        """The account, active or revoked; None for a name that nobody ever had."""
        return self._database.run(lambda connection: _find(connection, name))

    def require(self, name: str, role: Role) -> Account:
        """The account with this name and role, active or revoked.

        Raises:
            NotFoundError: when there is none.
        """
        found = self.find(name)
        if found is None or found.role != role:
            raise NotFoundError(f"there is no {role} {name!r}")
        return found

    def list_all(self) -> list[Account]:
        """Every account, by name."""
        return self._database.run(
            lambda connection: [
                _account(row)
                for row in connection.execute(select(accounts).order_by(accounts.c.name)).mappings()
            ]
        )

    def check_free(self, name: str) -> None:
        """Refuse a name that is or was somebody's.

        Raises:
            IdentityError: naming the role that has it, and the fix.
        """
        found = self.find(name)
        if found is not None:
            raise _taken(found)

    def add(
        self, name: str, role: Role, credential: Credential, *, device: str | None, now_ms: int
    ) -> Account:
        """Make an account.

        Raises:
            IdentityError: when the name is or was somebody's.
        """
        wanted = Account(
            name, role, device, credential.password_hash, credential.certificate_fingerprint, now_ms, None
        )

        def work(connection: Connection) -> Account:
            row = {column.name: getattr(wanted, column.name) for column in accounts.columns}
            insert_if_absent(connection, accounts, [row])
            # Another command may have been quicker: its credential is another one.
            found = _find(connection, name)
            assert found is not None
            if found != wanted:
                raise _taken(found)
            return wanted

        return self._database.run(work)

    def renew(self, name: str, credential: Credential) -> None:
        """Give an account a new credential in place of the old one; a revoked account lives again."""
        self._change(
            name,
            password_hash=credential.password_hash,
            certificate_fingerprint=credential.certificate_fingerprint,
            revoked_at_ms=None,
        )

    def revoke(self, name: str, *, now_ms: int) -> None:
        """End an account. The name stays taken."""
        self._change(name, password_hash=None, certificate_fingerprint=None, revoked_at_ms=now_ms)

    def _change(self, name: str, **values: Any) -> None:
        self._database.run(
            lambda connection: (
                connection.execute(update(accounts).where(accounts.c.name == name).values(**values)).rowcount
            )
        )


def _find(connection: Connection, name: str) -> Account | None:
    row = connection.execute(select(accounts).where(accounts.c.name == name)).mappings().first()
    return None if row is None else _account(row)


def _account(row: Mapping[Any, Any]) -> Account:
    return Account(**{str(key): value for key, value in row.items()})


def _taken(found: Account) -> IdentityError:
    if found.name == HUB_NAME:
        return IdentityError(f"the name {HUB_NAME!r} is the hub's own")
    state = "exists" if found.is_active else "was revoked"
    return IdentityError(
        f"{found.role} {found.name!r} {state}: --renew gives it a new credential in place of the old one"
    )
