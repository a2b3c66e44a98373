"""Key files for signing: Ed25519, PKCS 8 in PEM; offline ones under a passphrase. Never replaced."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from securesystemslib.signer import CryptoSigner, SSlibKey

from cloud_hub.errors import SigningError
from edge_cascade.durable import sync_directory, write_durably

if TYPE_CHECKING:
    from securesystemslib.signer import Key, Signer

_NO_LINKS: Final = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS})
"""What a memory stick says, whose file system has no hard links."""


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
            _put(draft, path)
        finally:
            draft.unlink(missing_ok=True)
        sync_directory(path.parent)
    except OSError as error:
        raise SigningError(f"{path}: {error.strerror or error}; keys are never replaced") from error
    return CryptoSigner(key)


def _put(draft: Path, path: Path) -> None:
    """Unlike a rename this never replaces."""
    try:
        os.link(draft, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # A file of our own under this name, which the rename replaces.
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        draft.replace(path)


def write_public_key(path: Path, key: Signer) -> None:
    """Write the public part of a key in PEM, for those who are to name it.

    Raises:
        SigningError: when the disk does not take it.
    """
    public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(key.public_key.keyval["public"]))
    content = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    try:
        write_durably(path, content)
    except OSError as error:
        raise SigningError(f"{path}: {error.strerror or error}") from error


def read_public_key(path: Path) -> Key:
    """The public key in a file.

    Raises:
        SigningError: when it cannot be read, or is no Ed25519 key.
    """
    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except OSError as error:
        raise SigningError(f"{path}: {error.strerror or error}") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SigningError(f"{path}: no public key in PEM; `cloud-hub keys make` writes one") from error
    if not isinstance(key, Ed25519PublicKey):
        raise SigningError(f"{path}: holds another kind of key, Ed25519 is needed")
    return SSlibKey.from_crypto(key)


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
