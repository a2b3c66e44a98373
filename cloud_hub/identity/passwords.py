"""Passwords of broker accounts: made here, kept only as the broker's hash. No I/O but the system's chance."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from typing import Final

# Iterations make guessing slow; 256 random bits cannot be guessed at any speed (NIST SP 800-63B, 5.1.1.2 asks
# for them where people choose). The broker pays them in its one thread at every login and, for each connected
# client, at every reload: at 100,000 it took 0.14 s a board, and a reload stopped 300 boards for 36 s.
ITERATIONS: Final = 1_000
# mosquitto 2.0 refuses every login of an account whose salt has another length.
SALT_BYTES: Final = 12
_SCHEME: Final = "7"


def new_password() -> str:
    """A password of 256 random bits, in characters that need no quoting."""
    return secrets.token_urlsafe(32)


def hash_password(password: str, *, iterations: int = ITERATIONS, salt: bytes | None = None) -> str:
    """`$7$iterations$salt$key`: PBKDF2-HMAC-SHA-512 (RFC 8018) as mosquitto 2.0's password file has it."""
    salt = secrets.token_bytes(SALT_BYTES) if salt is None else salt
    key = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, iterations)
    return f"${_SCHEME}${iterations}${_base64(salt)}${_base64(key)}"


def is_password_of(password: str, hashed: str) -> bool:
    """Whether `hashed` was made from `password`; False for anything that is no such hash."""
    parts = hashed.split("$")
    if len(parts) != 5 or parts[0] or parts[1] != _SCHEME or not parts[2].isdecimal():
        return False
    try:
        salt = base64.b64decode(parts[3], validate=True)
        again = hash_password(password, iterations=int(parts[2]), salt=salt)
    except (ValueError, OverflowError):
        return False
    return hmac.compare_digest(again, hashed)


def _base64(value: bytes) -> str:
    return base64.b64encode(value).decode("ascii")
