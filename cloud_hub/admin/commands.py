"""`cloud-hub token create|list|revoke`. Runs beside a hub at work, whose lock it does not need."""

# ruff: noqa: T201 - what a command prints is its result

from __future__ import annotations

import argparse
import sys
import time

from cloud_hub.admin.tokens import SCOPES, create_token, list_tokens, revoke_token
from cloud_hub.commands import database_of, shown_time
from cloud_hub.config import add_config_argument, load_config

_DAY_MS = 86_400_000


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands to the program's."""
    parser = subparsers.add_parser("token", help="bearer tokens of the REST interface")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    create = actions.add_parser("create", help="make a token and print it, this once")
    create.add_argument("name", help="for whom or what it is")
    create.add_argument("--scope", action="append", choices=SCOPES, help="may be given again; default: read")
    create.add_argument("--days", type=_days, default=None, help="ends after so many days; default: never")
    create.set_defaults(run=_create)
    listing = actions.add_parser("list", help="show all tokens, without their secrets")
    listing.set_defaults(run=_list)
    revoke = actions.add_parser("revoke", help="end a token at once")
    revoke.add_argument("id", help="the token, or its part before the dot")
    revoke.set_defaults(run=_revoke)
    for action in (create, listing, revoke):
        add_config_argument(action)


def _create(args: argparse.Namespace) -> int:
    now_ms = _now_ms()
    expires_at_ms = None if args.days is None else now_ms + args.days * _DAY_MS
    with database_of(load_config(args.config)) as database:
        token = database.run(
            lambda c: create_token(
                c, args.name, args.scope or ["read"], now_ms=now_ms, expires_at_ms=expires_at_ms
            )
        )
    print(token)
    print("keep it now: the hub stores only its SHA-256 and cannot show it again", file=sys.stderr)
    return 0


def _list(args: argparse.Namespace) -> int:
    with database_of(load_config(args.config)) as database:
        found = database.run(list_tokens)
    print(f"{'id':<14}{'scopes':<20}{'created':<22}{'expires':<22}{'last used':<22}{'state':<10}name")
    now_ms = _now_ms()
    for token in found:
        is_over = token.expires_at_ms is not None and token.expires_at_ms <= now_ms
        state = "revoked" if token.revoked_at_ms is not None else "expired" if is_over else "active"
        print(
            f"{token.token_id:<14}{','.join(token.scopes):<20}{shown_time(token.created_at_ms):<22}"
            f"{shown_time(token.expires_at_ms):<22}{shown_time(token.last_used_ms):<22}{state:<10}{token.name}"
        )
    return 0


def _revoke(args: argparse.Namespace) -> int:
    # Whoever has the whole token gives it whole: its secret is not said again.
    token_id = args.id.partition(".")[0]
    with database_of(load_config(args.config)) as database:
        database.run(lambda c: revoke_token(c, token_id, now_ms=_now_ms()))
    print(f"token {token_id} revoked")
    return 0


def _days(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 36_500:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of days from 1 to 36500")
    return int(text)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
