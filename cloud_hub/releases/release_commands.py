"""`cloud-hub release sign|floor|revoke`: what needs keys. Offline ones are files, so REST has none of it."""

# ruff: noqa: T201 - what a command prints is its result

from __future__ import annotations

import argparse
import getpass
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from cloud_hub.commands import database_of, print_json
from cloud_hub.config import add_config_argument, load_config
from cloud_hub.releases.key_files import add_key_arguments, print_progress, read_keys

if TYPE_CHECKING:
    from cloud_hub.releases.repository import SignedRepository
    from cloud_hub.releases.sign import ReleaseSigner

_SIGN = """\
With --key: sign both parts of a release with the offline keys of `targets`; with fewer than their threshold
it waits for the others. Without: sign its weights with the hub's online key, where its graph is signed
already and they keep to the bounds that were signed with it.
"""
_FLOOR = """\
Have boards refuse releases of a model that are older than this one, whoever signed them. A board that goes
back by itself to what ran before is not bound by it.
"""
_REVOKE = """\
Take the signature from a release's weights. Boards that run them go on (`cloud-hub rollout kill` takes them
back), no other board will take them. Where the online key may be stolen, set a floor as well.
"""


def register(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands to those of `cloud-hub release`."""
    sign = actions.add_parser("sign", help="sign one, so that boards may take it", description=_SIGN)
    sign.set_defaults(run=_sign)
    floor = actions.add_parser("floor", help="the oldest release that boards may take", description=_FLOOR)
    floor.add_argument("id", type=_number_or_show, help="a release's number, or `show`")
    floor.add_argument("--json", action="store_true", help="with `show`: print JSON, and nothing else")
    floor.set_defaults(run=_floor)
    revoke = actions.add_parser("revoke", help="take a release's signature away", description=_REVOKE)
    revoke.add_argument("--why", required=True, help="why, for people")
    revoke.add_argument(
        "--graph", action="store_true", help="and that of its graph, which all releases on it need"
    )
    revoke.set_defaults(run=_revoke)
    for action in (sign, revoke):
        action.add_argument("id", type=_number, help="its number")
    sign.add_argument(
        "--offline",
        action="store_true",
        help="without --key: it waits for offline keys (`keys export`)",
    )
    for action in (sign, floor, revoke):
        add_key_arguments(
            action, "a key of targets; may be given more than once; without one it waits for them"
        )
        add_config_argument(action)


def _sign(args: argparse.Namespace) -> int:
    from cloud_hub.releases.commands import repository_of

    repository, keys = repository_of(args), read_keys(args)
    with _signer(args, repository) as signer:
        if not keys and not args.offline:
            signer.sign_online(args.id)
            print(f"release {args.id}: its weights are signed online")
            return 0
        progress = signer.sign(args.id, keys)
    print_progress(progress, f"release {args.id}: signed offline")
    return 0


def _floor(args: argparse.Namespace) -> int:
    from cloud_hub.releases.commands import repository_of

    repository = repository_of(args)
    if args.id is None:
        _show_floors(repository.policy().security_floor, as_json=args.json)
        return 0
    keys = read_keys(args)
    with _signer(args, repository) as signer:
        progress = signer.set_floor(args.id, keys)
    print_progress(progress, f"boards refuse what is older than release {args.id}")
    return 0


def _show_floors(floors: Mapping[str, int], *, as_json: bool) -> None:
    if as_json:
        print_json(floors)
        return
    for model, release in sorted(floors.items()):
        print(f"{model}: boards refuse releases below {release}")
    if not floors:
        print("no model has a floor")


def _revoke(args: argparse.Namespace) -> int:
    from cloud_hub.releases.commands import repository_of

    repository, keys = repository_of(args), read_keys(args)
    with _signer(args, repository) as signer:
        progress = signer.revoke(args.id, keys, with_graph=args.graph, why=args.why)
    print_progress(progress, f"release {args.id}: signed no more")
    return 0


@contextmanager
def _signer(args: argparse.Namespace, repository: SignedRepository) -> Iterator[ReleaseSigner]:
    from cloud_hub.releases.sign import ReleaseSigner

    config = load_config(args.config)
    with database_of(config) as database:
        yield ReleaseSigner(database, config.state_dir, repository, getpass.getuser(), datetime.now(UTC))


def _number_or_show(text: str) -> int | None:
    return None if text == "show" else _number(text)


def _number(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) < 2**31):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)
