"""`cloud-hub release promote|halt|retire|collect`, beside a running hub or with it stopped."""

# ruff: noqa: T201 - what a command prints is its result

from __future__ import annotations

import argparse
import getpass
import time
from typing import Final

from cloud_hub.commands import database_of, parse_label, print_json
from cloud_hub.config import add_config_argument, load_config

_PROMOTE: Final = """\
Offer a signed release to all boards at once, without waves, soak and judgement of quality; `cloud-hub rollout
start` is the careful way. It halts all the same where too many boards fail.
"""
_RETIRE: Final = """\
Never offer a release again. Refused while it is live, boards are to run it, or a rollout takes it to some or
may take some back to it.
"""
_COLLECT: Final = """\
Remove the files of releases that nothing points at: no board is to run them or says that it does, no open
rollout carries them or may take boards back to them. The newest of each model stay in any case. What is
collected keeps its line in `release list`, and may be added again.
"""


def register(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands to those of `cloud-hub release`."""
    promote = actions.add_parser("promote", help="offer one to all boards at once", description=_PROMOTE)
    promote.add_argument(
        "--group",
        type=parse_label,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="only boards with this label; may be given more than once",
    )
    promote.set_defaults(run=_promote)
    halt = actions.add_parser("halt", help="halt the rollout that takes one through the fleet")
    halt.set_defaults(run=_halt)
    retire = actions.add_parser("retire", help="never offer one again", description=_RETIRE)
    retire.set_defaults(run=_retire)
    for action in (halt, retire):
        action.add_argument("--reason", default="", help="why, for people")
    for action in (promote, halt, retire):
        action.add_argument("id", type=_whole, help="its number")
    collect = actions.add_parser(
        "collect", help="remove the files of those that nobody needs", description=_COLLECT
    )
    collect.add_argument("--keep-live", type=_whole, default=3, metavar="N", help="default: 3 a model")
    collect.add_argument("--keep-drafts", type=_whole, default=5, metavar="N", help="default: 5 a model")
    collect.add_argument(
        "--min-age-days", type=_days, default=7.0, metavar="DAYS", help="keep what is younger (default: 7)"
    )
    collect.add_argument("--dry-run", action="store_true", help="only say what would go")
    collect.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    collect.set_defaults(run=_collect)
    for action in (promote, halt, retire, collect):
        add_config_argument(action)


def _promote(args: argparse.Namespace) -> int:
    from cloud_hub.rollouts.releases import promote
    from cloud_hub.rollouts.settings import is_signed_in

    config = load_config(args.config)
    with database_of(config) as database:
        rollout = database.run(
            lambda c: promote(
                c,
                args.id,
                by=getpass.getuser(),
                now_ms=_now_ms(),
                is_signed=is_signed_in(config.state_dir),
                group=dict(args.group),
            )
        )
    print(rollout)
    return 0


def _halt(args: argparse.Namespace) -> int:
    from cloud_hub.rollouts.releases import halt_release

    with database_of(load_config(args.config)) as database:
        rollout = database.run(
            lambda c: halt_release(c, args.id, by=getpass.getuser(), now_ms=_now_ms(), reason=args.reason)
        )
    print(f"rollout {rollout} is to halt")
    return 0


def _retire(args: argparse.Namespace) -> int:
    from cloud_hub.rollouts.releases import retire

    with database_of(load_config(args.config)) as database:
        database.run(lambda c: retire(c, args.id, by=getpass.getuser(), now_ms=_now_ms(), reason=args.reason))
    print(f"release {args.id} is retired")
    return 0


def _collect(args: argparse.Namespace) -> int:
    from cloud_hub.core.collecting import DAY_S, CollectRules
    from cloud_hub.releases.collect import collect

    config = load_config(args.config)
    rules = CollectRules(args.keep_live, args.keep_drafts, args.min_age_days * DAY_S)
    with database_of(config) as database:
        collected = collect(
            database,
            config.state_dir,
            rules,
            by=getpass.getuser(),
            now_ms=_now_ms(),
            dry_run=args.dry_run,
        )
    if args.json:
        print_json(collected)
        return 0
    for each in collected:
        print(f"release {each.id} of {each.model}, {each.state}: {each.size_bytes:,} bytes")
    total = sum(each.size_bytes for each in collected)
    print(f"{'would remove' if args.dry_run else 'removed'} {len(collected)} releases, {total:,} bytes")
    return 0


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) < 2**31):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def _days(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 36_500.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of days from 0")
    return value
