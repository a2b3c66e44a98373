"""`cloud-hub keys ...`: the keys that boards trust, beside a hub at work.

The offline keys belong on a machine, or a medium, that is not the hub: `init` and `rotate` write them to a
directory of their own, and whoever signs names their files.
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

import msgspec

from cloud_hub.commands import database_of, print_json
from cloud_hub.config import add_config_argument, load_config
from cloud_hub.errors import SigningError
from cloud_hub.releases.key_files import (
    add_key_arguments,
    add_passphrase_argument,
    make_keys,
    print_progress,
    read_keys,
)
from cloud_hub.store.acts import note_act
from edge_cascade.durable import write_durably

if TYPE_CHECKING:
    from securesystemslib.signer import Signer

    from cloud_hub.releases.pending import Progress
    from cloud_hub.releases.repository import SignedRepository
    from cloud_hub.releases.status import KeysStatus

_INIT = """\
Make the keys of `root` and `targets` in a directory, each under a passphrase, and an online key in the hub's
state directory; begin the signed metadata. Afterwards carry the keys away: whoever has enough of them and
their passphrases decides what every board runs. Give `cloud-hub keys root` to the boards as releases.root.
"""
_MAKE = """\
Make a key on a machine of your own; nobody else sees it. It counts once `keys rotate --public` has named it.
"""
_RENEW = """\
Without --role: sign snapshot and timestamp again, as a running hub does daily. With it: sign `root` or
`targets` for another year, by their offline keys, changing nothing.
"""
_ROTATE = """\
Replace the keys of a role. `online`, for one that was stolen or may have been: weights that it has signed are
signed by nobody afterwards; boards that run them go on, and sign them again where they are wanted. `root` and
`targets`: new keys are made in a directory, all others but those that --keep names are trusted no more. The
keys of root sign it, the old ones and the new ones; for `online` and `targets` those of targets too.
"""
_AWAY = """\
Say what an exported change would make hold, and sign it. Needs no configuration and no hub: the key stays on
a machine of its own. Compare releases and digests with what you meant before you give a key.
"""
_SIGN = """\
Add signatures to a change that waits for them. It is published with the last one.
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
    add_passphrase_argument(init)
    init.set_defaults(run=_init)
    make = actions.add_parser("make", help="make a key of your own, for others to name", description=_MAKE)
    make.add_argument("file", type=Path, help="where it is written, its public part beside it as .pub")
    add_passphrase_argument(make)
    make.set_defaults(run=_make)
    root = actions.add_parser("root", help="print what boards trust first: their releases.root")
    root.set_defaults(run=_root)
    show = actions.add_parser("show", help="roles, keys, how long they hold, what is due, what waits")
    show.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    show.set_defaults(run=_show)
    renew = actions.add_parser("renew", help="sign again what expires", description=_RENEW)
    renew.add_argument("--role", choices=("root", "targets"), help="default: what the hub itself signs")
    add_key_arguments(renew, "a key of the role; may be given more than once")
    renew.add_argument(
        "--clock-was-ahead", action="store_true", help="the last signatures were made by a wrong clock"
    )
    renew.set_defaults(run=_renew)
    sign = actions.add_parser("sign", help="add a signature to what waits for it", description=_SIGN)
    add_key_arguments(sign, "a key that is asked for; may be given more than once", required=True)
    sign.set_defaults(run=_sign)
    export = actions.add_parser("export", help="print a change that waits, to sign it on another machine")
    export.set_defaults(run=_export)
    away = actions.add_parser("sign-file", help="sign an exported change anywhere", description=_AWAY)
    away.add_argument("file", type=Path, help="what `export` printed; the signature is written into it")
    add_key_arguments(away, "without one it is only shown what would be signed")
    away.set_defaults(run=_sign_file)
    take = actions.add_parser("import", help="take the signatures that were made elsewhere")
    take.add_argument("file", type=Path, help="the signed file")
    take.set_defaults(run=_import)
    drop = actions.add_parser("drop", help="forget a change that waits, and its signatures")
    drop.set_defaults(run=_drop)
    for action in (sign, drop, export):
        action.add_argument("name", help="the change's, by `cloud-hub keys show`")
    rotate = _register_rotate(actions)
    for action in (init, root, show, renew, sign, export, take, drop, rotate):
        add_config_argument(action)


def _register_rotate(
    actions: argparse._SubParsersAction[argparse.ArgumentParser],
) -> argparse.ArgumentParser:
    rotate = actions.add_parser("rotate", help="replace the keys of a role", description=_ROTATE)
    rotate.add_argument(
        "--role", choices=("online", "root", "targets"), default="online", help="default: online"
    )
    rotate.add_argument("--offline", type=Path, metavar="DIR", help="where new offline keys are written")
    rotate.add_argument(
        "--new-keys", type=_count, metavar="N", help="how many (default: 1, or none with --public)"
    )
    rotate.add_argument(
        "--public", type=Path, action="append", default=[], metavar="FILE",
        help="a public key that somebody made by `keys make`; they add their signature by `keys sign`",
    )  # fmt: skip
    rotate.add_argument(
        "--keep", action="append", default=[], metavar="KEYID", help="a present key that stays, by its id"
    )
    rotate.add_argument(
        "--threshold", type=_count, default=1, metavar="N", help="how many must sign then (default: 1)"
    )
    add_key_arguments(rotate, "a present key of root or targets; may be given more than once")
    rotate.add_argument(
        "--new-passphrase-file", type=Path, action="append", default=[], metavar="FILE",
        help="for the new keys, as --passphrase-file",
    )  # fmt: skip
    rotate.set_defaults(run=_rotate)
    return rotate


def repository_of(args: argparse.Namespace) -> SignedRepository:
    """The repository of the configuration that a command names."""
    from cloud_hub.releases.repository import SignedRepository

    return SignedRepository(_directory_of(args))


def _directory_of(args: argparse.Namespace) -> Path:
    from cloud_hub.rollouts.settings import TUF

    return load_config(args.config).state_dir / TUF


def _init(args: argparse.Namespace) -> int:
    from cloud_hub.releases.create import create_repository, refuse_second

    roles = ("root", "targets")
    for role in roles:
        keys, threshold = getattr(args, f"{role}_keys"), getattr(args, f"{role}_threshold")
        if threshold > keys:
            raise SigningError(f"--{role}-threshold {threshold} cannot be met by --{role}-keys {keys}")
    directory = _directory_of(args)
    paths = [
        args.offline / f"{role}-{number}.pem"
        for role in roles
        for number in range(1, getattr(args, f"{role}_keys") + 1)
    ]
    # Before there are keys that would open nothing.
    refuse_second(directory)
    made = make_keys(paths, args.passphrase_file)
    create_repository(
        directory,
        made[: args.root_keys],
        made[args.root_keys :],
        root_threshold=args.root_threshold,
        targets_threshold=args.targets_threshold,
        now=datetime.now(UTC),
    )
    print(f"{args.offline}: carry these keys away from the hub")
    print(f"{directory}: signed metadata; `cloud-hub keys root > root.json` is for the boards")
    return 0


def _make(args: argparse.Namespace) -> int:
    from cloud_hub.releases.keys import write_public_key

    public = args.file.with_suffix(".pub")
    if args.file.suffix.lower() == ".pub":
        raise SigningError(f"{args.file}: the public part goes there; name the key otherwise, as in mine.pem")
    if public.exists():
        raise SigningError(f"{public}: there is a file already, another key's; name this one otherwise")
    (key,) = make_keys([args.file], args.passphrase_file)
    write_public_key(public, key)
    print(f"{args.file}: the key {key.public_key.keyid[:12]}, yours alone")
    print(f"{public}: for whoever has it named, by `cloud-hub keys rotate --public`")
    return 0


def _root(args: argparse.Namespace) -> int:
    sys.stdout.buffer.write(repository_of(args).first_root())
    return 0


def _show(args: argparse.Namespace) -> int:
    from cloud_hub.releases.metadata import MetadataFiles
    from cloud_hub.releases.status import keys_status

    status = keys_status(repository_of(args), MetadataFiles(_directory_of(args)), datetime.now(UTC))
    if args.json:
        print_json(status)
    else:
        _print_status(status)
    return 0


def _print_status(status: KeysStatus) -> None:
    print(f"{'role':<11}{'version':<9}{'sign':<9}{'expires':<13}{'days left':<11}keys")
    for each in status.roles:
        needed = f"{each.threshold} of {len(each.keys)}"
        keys = ", ".join(key[:12] for key in each.keys)
        print(
            f"{each.role:<11}{each.version:<9}{needed:<9}{each.expires:%Y-%m-%d}   {each.days_left:<11}{keys}"
        )
    for each in status.roles:
        if each.due:
            print(f"due: {each.role} expires in {each.days_left} days: {each.due}")
    for waiting in status.pending:
        missing = ", ".join(f"{number} of {role}" for role, number in waiting.missing.items())
        says = "stale, `cloud-hub keys drop` and begin again" if waiting.stale else f"waits for {missing}"
        print(f"pending {waiting.name}, begun {waiting.begun_at:%Y-%m-%d %H:%M} UTC: {says}")


def _renew(args: argparse.Namespace) -> int:
    repository = repository_of(args)
    if args.role is None:
        if args.key:
            raise SigningError("--key needs --role root or --role targets: the hub's own key is with the hub")
        repository.renew_online(datetime.now(UTC), clock_was_ahead=args.clock_was_ahead)
        return 0
    progress = repository.renew_offline(args.role, keys=read_keys(args), now=datetime.now(UTC))
    _note(args, "keys.renew", args.role, progress)
    print_progress(progress, f"{args.role}: signed for another year")
    return 0


def _sign(args: argparse.Namespace) -> int:
    progress = repository_of(args).changes.sign(args.name, keys=read_keys(args), now=datetime.now(UTC))
    _note(args, "keys.sign", args.name, progress)
    print_progress(progress, f"{args.name}: signed by enough, published")
    return 0


def _export(args: argparse.Namespace) -> int:
    sys.stdout.buffer.write(msgspec.json.encode(repository_of(args).changes.get(args.name)))
    return 0


def _sign_file(args: argparse.Namespace) -> int:
    from cloud_hub.releases.elsewhere import lines_of, sign_blindly
    from cloud_hub.releases.pending import read_change

    pending = read_change(args.file)
    print("\n".join(lines_of(pending)))
    if not args.key:
        print(f"{args.file}: nothing signed, --key FILE does")
        return 0
    try:
        write_durably(args.file, msgspec.json.encode(sign_blindly(pending, read_keys(args))))
    except OSError as error:
        raise SigningError(f"{args.file}: {error.strerror or error}") from error
    print(f"{args.file}: signed; take it to the hub, `cloud-hub keys import` reads it")
    return 0


def _import(args: argparse.Namespace) -> int:
    from cloud_hub.releases.pending import read_change

    signed = read_change(args.file)
    progress = repository_of(args).changes.take_signatures(signed, now=datetime.now(UTC))
    _note(args, "keys.import", signed.name, progress)
    print_progress(progress, f"{signed.name}: signed by enough, published")
    return 0


def _drop(args: argparse.Namespace) -> int:
    repository_of(args).changes.drop(args.name)
    _note(args, "keys.drop", args.name, None)
    print(f"{args.name}: forgotten")
    return 0


def _rotate(args: argparse.Namespace) -> int:
    repository = repository_of(args)
    keys = read_keys(args)
    now = datetime.now(UTC)
    if args.role == "online":
        progress = repository.rotate_online_key(keys=keys, now=now)
        done = "the online key is another one; sign again what it had signed and is still wanted"
    else:
        progress = _rotate_offline(args, repository, keys, now)
        done = f"{args.role}: the new keys hold; carry them away from the hub"
    _note(args, "keys.rotate", args.role, progress)
    print_progress(progress, done)
    return 0


def _rotate_offline(
    args: argparse.Namespace, repository: SignedRepository, keys: Sequence[Signer], now: datetime
) -> Progress:
    from cloud_hub.releases.keys import read_public_key

    brought = [read_public_key(path) for path in args.public]
    new_keys = args.new_keys if args.new_keys is not None else int(not brought)
    if new_keys and args.offline is None:
        raise SigningError("--offline DIR is needed: where the new keys are written")
    version = repository.check_rotation(
        args.role, new_keys=new_keys + len(brought), threshold=args.threshold, keep=args.keep, keys=keys
    )
    made = make_keys(
        [args.offline / f"{args.role}-v{version}-{index + 1}.pem" for index in range(new_keys)],
        args.new_passphrase_file,
    )
    return repository.rotate_offline_keys(
        args.role,
        made,
        threshold=args.threshold,
        keep=args.keep,
        brought=brought,
        keys=keys,
        now=now,
    )


def _note(args: argparse.Namespace, act: str, subject: str, progress: Progress | None) -> None:
    detail = "" if progress is None else progress.summary()
    with database_of(load_config(args.config)) as database:
        database.run(
            lambda c: note_act(
                c,
                getpass.getuser(),
                act,
                f"keys {subject}",
                detail,
                now_ms=round(datetime.now(UTC).timestamp() * 1000),
            )
        )


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= 32):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to 32")
    return int(text)
