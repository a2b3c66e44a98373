"""`cloud-hub keys init|root|renew|rotate`: the keys that boards trust, beside a hub at work.

The offline keys belong on a machine, or a medium, that is not the hub: `init` writes them to a directory of
their own, and whoever signs names their files.
"""

# ruff: noqa: T201 - what a command prints is its result

from __future__ import annotations

import argparse
import getpass
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from cloud_hub.config import add_config_argument, load_config
from cloud_hub.errors import SigningError

if TYPE_CHECKING:
    from securesystemslib.signer import Signer

    from cloud_hub.releases.repository import SignedRepository

_INIT = """\
Make the keys of `root` and `targets` in a directory, under one passphrase, and an online key in the hub's
state directory; begin the signed metadata. Afterwards carry the directory away: whoever has these keys and
their passphrase decides what every board runs. Give `cloud-hub keys root` to the boards as releases.root.
"""
_ROTATE = """\
Replace the hub's online key, for one that was stolen or may have been. Weights that it has signed are signed
by nobody afterwards; boards that run them go on, and sign them again where they are wanted.
"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands to the program's."""
    parser = subparsers.add_parser("keys", help="the keys that boards trust for releases")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    init = actions.add_parser("init", help="make keys and begin the signed metadata", description=_INIT)
    init.add_argument(
        "--offline", type=Path, required=True, metavar="DIR", help="where the offline keys are written"
    )
    for role in ("root", "targets"):
        init.add_argument(
            f"--{role}-keys", type=_count, default=1, metavar="N", help=f"keys of {role} (default: 1)"
        )
        init.add_argument(
            f"--{role}-threshold",
            type=_count,
            default=1,
            metavar="N",
            help="how many of them must sign (default: 1)",
        )
    init.set_defaults(run=_init)
    root = actions.add_parser("root", help="print what boards trust first: their releases.root")
    root.set_defaults(run=_root)
    renew = actions.add_parser("renew", help="sign snapshot and timestamp again, as the hub does daily")
    renew.set_defaults(run=_renew)
    rotate = actions.add_parser("rotate", help="replace the online key", description=_ROTATE)
    for role in ("root", "targets"):
        rotate.add_argument(
            f"--{role}-key",
            type=Path,
            action="append",
            required=True,
            metavar="FILE",
            help=f"a key of {role}; as many as its threshold wants",
        )
    rotate.set_defaults(run=_rotate)
    for action in (init, rotate):
        action.add_argument(
            "--passphrase-file", type=Path, metavar="FILE", help="its first line; asked for without it"
        )
    for action in (init, root, renew, rotate):
        add_config_argument(action)


def read_keys(paths: Sequence[Path], passphrase_file: Path | None) -> list[Signer]:
    """The offline keys in some files, under one passphrase.

    Raises:
        SigningError: naming the file that cannot be used.
    """
    from cloud_hub.releases.keys import read_key

    passphrase = _passphrase(passphrase_file)
    return [read_key(path, passphrase) for path in paths]


def repository_of(args: argparse.Namespace) -> SignedRepository:
    """The repository of the configuration that a command names."""
    from cloud_hub.releases.repository import SignedRepository
    from cloud_hub.rollouts.settings import TUF

    return SignedRepository(load_config(args.config).state_dir / TUF)


def _init(args: argparse.Namespace) -> int:
    from cloud_hub.releases.keys import make_key
    from cloud_hub.releases.repository import create_repository
    from cloud_hub.rollouts.settings import TUF

    for role in ("root", "targets"):
        keys, threshold = getattr(args, f"{role}_keys"), getattr(args, f"{role}_threshold")
        if threshold > keys:
            raise SigningError(f"--{role}-threshold {threshold} cannot be met by --{role}-keys {keys}")
    directory = load_config(args.config).state_dir / TUF
    passphrase = _passphrase(args.passphrase_file, is_new=True)
    made = {
        role: [
            make_key(args.offline / f"{role}-{number}.pem", passphrase)
            for number in range(1, getattr(args, f"{role}_keys") + 1)
        ]
        for role in ("root", "targets")
    }
    create_repository(
        directory,
        made["root"],
        made["targets"],
        root_threshold=args.root_threshold,
        targets_threshold=args.targets_threshold,
        now=datetime.now(UTC),
    )
    print(f"{args.offline}: carry these keys away from the hub")
    print(f"{directory}: signed metadata; `cloud-hub keys root > root.json` is for the boards")
    return 0


def _root(args: argparse.Namespace) -> int:
    sys.stdout.buffer.write(repository_of(args).first_root())
    return 0


def _renew(args: argparse.Namespace) -> int:
    repository_of(args).renew_online(datetime.now(UTC))
    return 0


def _rotate(args: argparse.Namespace) -> int:
    keys = read_keys([*args.root_key, *args.targets_key], args.passphrase_file)
    repository_of(args).rotate_online_key(
        root_keys=keys[: len(args.root_key)],
        targets_keys=keys[len(args.root_key) :],
        now=datetime.now(UTC),
    )
    print("the online key is another one; sign again what it had signed and is still wanted")
    return 0


def _passphrase(path: Path | None, *, is_new: bool = False) -> bytes:
    if path is not None:
        try:
            text = path.read_text(encoding="utf-8").partition("\n")[0]
        except (OSError, UnicodeDecodeError) as error:
            raise SigningError(f"{path}: no passphrase can be read: {error}") from error
    else:
        text = getpass.getpass("passphrase of the offline keys: ")
        if is_new and text != getpass.getpass("once more: "):
            raise SigningError("the two passphrases differ; nothing was made")
    if not text:
        raise SigningError("an empty passphrase protects nothing; nothing was made or read")
    return text.encode()


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= 32):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to 32")
    return int(text)
