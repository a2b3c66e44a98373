"""The key files that a command names, each under its own passphrase."""

# ruff: noqa: T201 - what a command prints is its result

from __future__ import annotations

import argparse
import getpass
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cloud_hub.errors import SigningError

if TYPE_CHECKING:
    from securesystemslib.signer import Signer

    from cloud_hub.releases.pending import Progress


def add_key_arguments(parser: argparse.ArgumentParser, help_text: str, *, required: bool = False) -> None:
    """`--key` and `--passphrase-file`, both as often as there are keys."""
    parser.add_argument(
        "--key", type=Path, action="append", default=[], required=required, metavar="FILE", help=help_text
    )
    add_passphrase_argument(parser)


def add_passphrase_argument(parser: argparse.ArgumentParser) -> None:
    """`--passphrase-file`."""
    parser.add_argument(
        "--passphrase-file",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="its first line; one for all keys, or one for each in their order; asked for without it",
    )


def read_keys(args: argparse.Namespace) -> list[Signer]:
    """The keys that `add_key_arguments` was given.

    Raises:
        SigningError: naming the file that cannot be used.
    """
    from cloud_hub.releases.keys import read_key

    passphrases = _passphrases(args.passphrase_file, args.key, are_new=False)
    return [read_key(path, passphrase) for path, passphrase in zip(args.key, passphrases, strict=True)]


def make_keys(paths: Sequence[Path], passphrase_files: Sequence[Path]) -> list[Signer]:
    """New keys in these files; passphrases as `add_passphrase_argument` takes them.

    Raises:
        SigningError: when one is there, or the passphrases do not do; then nothing was made.
    """
    from cloud_hub.releases.keys import make_key

    if there := [path for path in paths if path.exists()]:
        raise SigningError(f"{there[0]}: there is a file already; keys are never replaced")
    return [
        make_key(path, passphrase)
        for path, passphrase in zip(paths, _passphrases(passphrase_files, paths, are_new=True), strict=True)
    ]


def print_progress(progress: Progress, done: str) -> None:
    """What was published, or who still has to sign."""
    if progress.is_published:
        print(done)
        return
    for role, number in progress.missing.items():
        has = ", ".join(keyid[:12] for keyid in progress.signed[role]) or "nobody"
        wanted = ", ".join(keyid[:12] for keyid in progress.waiting_for[role])
        print(f"pending {progress.name}: {role} is signed by {has}, {number} missing of {wanted}")
    print(f"boards see nothing of it until then; `cloud-hub keys sign {progress.name} --key FILE` adds one")


def _passphrases(files: Sequence[Path], paths: Sequence[Path], *, are_new: bool) -> list[bytes]:
    if not files:
        return [_asked(path, is_new=are_new) for path in paths]
    if len(files) not in {1, len(paths)}:
        raise SigningError(
            f"--passphrase-file is given {len(files)} times for {len(paths)} keys; once, or once for each"
        )
    read = [_first_line(path) for path in files]
    return read * len(paths) if len(read) == 1 else read


def _first_line(path: Path) -> bytes:
    try:
        text = path.read_text(encoding="utf-8").partition("\n")[0]
    except (OSError, UnicodeDecodeError) as error:
        raise SigningError(f"{path}: no passphrase can be read: {error}") from error
    return _not_empty(text)


def _asked(path: Path, *, is_new: bool) -> bytes:
    text = getpass.getpass(f"passphrase of {path}: ")
    if is_new and text != getpass.getpass("once more: "):
        raise SigningError("the two passphrases differ; nothing was made")
    return _not_empty(text)


def _not_empty(text: str) -> bytes:
    if not text:
        raise SigningError("an empty passphrase protects nothing; nothing was made or read")
    return text.encode()
