"""Bearer tokens: made once, shown once, kept as a SHA-256. No HTTP.

A token is `<id>.<secret>`. The id finds the row, the secret is compared in constant time; for an id that
nobody has, the same comparison runs against a digest that nothing has, so that both answers take as long.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal, get_args

from sqlalchemy import Connection, RowMapping, select, update

from cloud_hub.errors import ConfigError, NotFoundError
from cloud_hub.store.schema import tokens

Scope = Literal["read", "label", "fetch", "admin"]
SCOPES: Final[tuple[Scope, ...]] = get_args(Scope)

MAX_TOKEN_CHARACTERS: Final = 200
# A row is written for its use at most this often.
USE_NOTED_EVERY_MS: Final = 60_000
_NOBODYS_DIGEST: Final = bytes(32)


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """What is known of a token; its secret is not."""

    token_id: str
    name: str
    scopes: tuple[str, ...]
    created_at_ms: int
    expires_at_ms: int | None
    last_used_ms: int | None
    revoked_at_ms: int | None

    def allows(self, scope: Scope) -> bool:
        """Whether it may be used for this; `admin` may everything."""
        return scope in self.scopes or "admin" in self.scopes


def create_token(
    connection: Connection, name: str, scopes: Iterable[str], *, now_ms: int, expires_at_ms: int | None
) -> str:
    """Make a token and return it: the only time that it exists in the clear.

    Raises:
        ConfigError: for a scope that does not exist, or a name that cannot be printed.
    """
    wanted = tuple(dict.fromkeys(scopes))
    unknown = [scope for scope in wanted if scope not in SCOPES]
    if unknown or not wanted:
        raise ConfigError(f"token scopes {' '.join(wanted)!r}: choose from {', '.join(SCOPES)}")
    if not name.isprintable() or not 1 <= len(name) <= 128:
        raise ConfigError(f"token name {name!r} is not 1 to 128 printable characters")
    token_id = secrets.token_hex(6)
    secret = secrets.token_urlsafe(32)
    row = {
        "id": token_id,
        "name": name,
        "sha256": _digest(secret),
        "scopes": " ".join(wanted),
        "created_at_ms": now_ms,
        "expires_at_ms": expires_at_ms,
    }
    connection.execute(tokens.insert(), row)
    return f"{token_id}.{secret}"


def list_tokens(connection: Connection) -> list[TokenInfo]:
    """Every token, the oldest first."""
    rows = connection.execute(select(tokens).order_by(tokens.c.created_at_ms, tokens.c.id)).mappings()
    return [_info(row) for row in rows]


def revoke_token(connection: Connection, token_id: str, *, now_ms: int) -> None:
    """End a token at once. Revoking twice changes nothing.

    Raises:
        NotFoundError: when there is no such token.
    """
    if connection.execute(select(tokens.c.id).where(tokens.c.id == token_id)).first() is None:
        raise NotFoundError(f"there is no token {token_id!r}; `cloud-hub token list` shows them")
    connection.execute(
        update(tokens)
        .where(tokens.c.id == token_id, tokens.c.revoked_at_ms.is_(None))
        .values(revoked_at_ms=now_ms)
    )


def check_token(connection: Connection, token: str, *, now_ms: int) -> TokenInfo | None:
    """Whose token this is; None for one that is unknown, wrong, expired or revoked."""
    # Ours are ASCII; what HTTP lets through beyond it no database takes.
    text = token[:MAX_TOKEN_CHARACTERS].encode("ascii", "replace").decode("ascii")
    token_id, _, secret = text.partition(".")
    row = connection.execute(select(tokens).where(tokens.c.id == token_id)).mappings().first()
    expected = _NOBODYS_DIGEST if row is None else bytes(row["sha256"])
    is_right = hmac.compare_digest(_digest(secret), expected)
    if row is None or not is_right or row["revoked_at_ms"] is not None:
        return None
    if row["expires_at_ms"] is not None and row["expires_at_ms"] <= now_ms:
        return None
    if row["last_used_ms"] is None or now_ms - row["last_used_ms"] >= USE_NOTED_EVERY_MS:
        connection.execute(update(tokens).where(tokens.c.id == token_id).values(last_used_ms=now_ms))
    return _info(row)


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def _info(row: RowMapping) -> TokenInfo:
    return TokenInfo(
        row["id"],
        row["name"],
        tuple(row["scopes"].split()),
        row["created_at_ms"],
        row["expires_at_ms"],
        row["last_used_ms"],
        row["revoked_at_ms"],
    )
