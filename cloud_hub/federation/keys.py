"""The key that signs the terms of rounds: made on first use, readable by the hub's user alone.

`rounds.key` holds 32 raw bytes of an Ed25519 private key as hexadecimal. Boards pin its public half.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Final

from cloud_hub.errors import StoreError, StoreUnavailableError
from edge_cascade.durable import sync_directory, write_durably
from edge_cascade.round_terms import KEY_BYTES, public_key_of

KEY_NAME: Final = "rounds.key"


def private_key(state_dir: Path) -> bytes:
    """The private key in the state directory, made if there is none.

    Raises:
        StoreUnavailableError: when it can be neither read nor written.
        StoreError: when the file holds something else.
    """
    path = state_dir / KEY_NAME
    try:
        if not path.exists():
            _make(path)
        text = path.read_text(encoding="ascii").strip()
        key = bytes.fromhex(text)
    except OSError as error:
        raise StoreUnavailableError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise _no_key(path) from error
    if len(key) != KEY_BYTES:
        raise _no_key(path)
    return key


def public_key(state_dir: Path) -> str:
    """What boards pin as `training.hub_key`: 64 hexadecimal digits.

    Raises:
        StoreError: as `private_key`.
    """
    return public_key_of(private_key(state_dir)).hex()


def _make(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = path.with_name(f".{KEY_NAME}.{secrets.token_hex(8)}")
    write_durably(draft, f"{secrets.token_hex(KEY_BYTES)}\n".encode(), mode=0o600)
    try:
        # Unlike a rename this never replaces: of a hub and a command that both make one, the first wins.
        os.link(draft, path)
    except FileExistsError:
        pass
    finally:
        draft.unlink(missing_ok=True)
    sync_directory(path.parent)


def _no_key(path: Path) -> StoreError:
    return StoreError(
        f"{path}: is not {2 * KEY_BYTES} hexadecimal digits; restore it, or remove it and pin the new key on "
        "every board"
    )
