"""Key files for signing: Ed25519, PKCS 8 in PEM; offline ones under a passphrase. Never replaced."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import CryptoSigner

from cloud_hub.errors import SigningError
from edge_cascade.durable import sync_directory, write_durably

if TYPE_CHECKING:
    from securesystemslib.signer import Signer


def make_key(path: Path, passphrase: bytes | None) -> Signer:
    """Make a key and write it, readable by this user alone; without a passphrase it is not encrypted.

    Raises:
        SigningError: when there is a file already, or none can be written.
    """
    key = Ed25519PrivateKey.generate()
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase is not None:
        encryption = serialization.BestAvailableEncryption(passphrase)
    content = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            write_durably(draft, content, mode=0o600)
            # Unlike a rename this never replaces.
            os.link(draft, path)
        finally:
            draft.unlink(missing_ok=True)
        sync_directory(path.parent)
    except OSError as error:
        raise SigningError(f"{path}: {error.strerror or error}; keys are never replaced") from error
    return CryptoSigner(key)


def read_key(path: Path, passphrase: bytes | None) -> Signer:
    """The key in a file.

    Raises:
        SigningError: when it cannot be read, the passphrase is wrong, or it is no Ed25519 key.
    """
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), passphrase)
    except OSError as error:
        raise SigningError(f"{path}: {error.strerror or error}") from error
    except (ValueError, TypeError) as error:
        hint = "a passphrase is needed" if passphrase is None else "wrong passphrase, or no key"
        raise SigningError(f"{path}: {hint}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise SigningError(f"{path}: holds another kind of key, Ed25519 is needed")
    return CryptoSigner(key)
