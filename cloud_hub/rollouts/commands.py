"""`cloud-hub rollout ...` and `cloud-hub acts`: beside a hub at work, through the database."""

# ruff: noqa: T201 - what a command prints is its result

from __future__ import annotations

import argparse
import getpass
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cloud_hub.commands import database_of, parse_label, print_json, shown_time
from cloud_hub.config import add_config_argument, load_config

if TYPE_CHECKING:
    from cloud_hub.rollouts.figures import Rollout, RolloutDetail

_START = """\
Take a signed release through the fleet, wave by wave. A running hub takes it up within a second or two: it
offers the release to a few boards, compares answers and health with what was before, and widens only when
nothing is worse and every answer that it needs is there. Anything worse takes it back from every board.
"""

_ORDERS = {
    "approve": "let the next wave open",
    "pause": "offer the release to no more boards",
    "resume": "let a paused rollout go on",
    "halt": "take the release back from every board",
    "kill": "take the release back for good, even after the rollout is done",
}


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands to the program's."""
    parser = subparsers.add_parser("rollout", help="releases on their way through the fleet")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    start = actions.add_parser("start", help="take a signed release through the fleet", description=_START)
    start.add_argument("release", type=_number, help="the release's number")
    start.add_argument(
        "--waves",
        type=Path,
        metavar="FILE",
        help="[[waves]], [limits], [health] and scene_s, TOML or JSON; default: 1, 10 %%, 50 %%, all",
    )
    start.add_argument(
        "--group", type=parse_label, action="append", default=[], metavar="KEY=VALUE",
        help="only boards with this label; may be given more than once",
    )  # fmt: skip
    start.add_argument(
        "--same-canaries", action="store_true", help="the same boards are first in every rollout of the model"
    )
    start.set_defaults(run=_start)
    listing = actions.add_parser("list", help="show all, the newest first")
    listing.set_defaults(run=_list)
    show = actions.add_parser("show", help="what one waits for, how its boards answered, what happened")
    show.add_argument("id", help="the rollout's id")
    show.set_defaults(run=_show)
    label = actions.add_parser("label", help="set a board's labels, by which groups and waves are chosen")
    label.add_argument("device", help="the board's name")
    label.add_argument(
        "labels", nargs="*", type=parse_label, metavar="KEY=VALUE", help="an empty value takes it away"
    )
    label.set_defaults(run=_set_labels)
    acts = subparsers.add_parser("acts", help="who did what to releases and rollouts, the newest first")
    acts.add_argument("--subject", help="only what was done to this, for example 'rollout 3f2a'")
    acts.add_argument("--limit", type=_number, default=100, metavar="N", help="default: 100")
    acts.set_defaults(run=_acts)
    for action in (listing, show, acts):
        action.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    for action in (start, listing, show, label, acts, *_register_orders(actions)):
        add_config_argument(action)


def _register_orders(
    actions: argparse._SubParsersAction[argparse.ArgumentParser],
) -> Iterator[argparse.ArgumentParser]:
    for kind, text in _ORDERS.items():
        parser = actions.add_parser(kind, help=text)
        parser.add_argument("id", help="the rollout's id")
        if kind == "approve":
            parser.add_argument(
                "--wave", type=_number, metavar="N", help="its index, from 0; default: the next one"
            )
        else:
            parser.add_argument("--reason", default="", help="why, for people")
        parser.set_defaults(run=_order)
        yield parser


def _start(args: argparse.Namespace) -> int:
    from cloud_hub.rollouts.settings import is_signed_in, rules_for
    from cloud_hub.rollouts.start import start_rollout
    from cloud_hub.rollouts.waves_file import Plan, read_plan

    config = load_config(args.config)
    plan = Plan() if args.waves is None else read_plan(args.waves)
    with database_of(config) as database:
        rollout = database.run(
            lambda c: start_rollout(
                c,
                args.release,
                by=_who(),
                now_ms=_now_ms(),
                is_signed=is_signed_in(config.state_dir),
                waves=plan.waves,
                group=dict(args.group),
                limits=plan.limits,
                health=plan.health,
                scene_s=plan.scene_s,
                rules=rules_for(config),
                same_canaries=args.same_canaries,
            )
        )
    print(rollout)
    return 0


def _list(args: argparse.Namespace) -> int:
    from cloud_hub.rollouts.figures import rollout_page

    with database_of(load_config(args.config)) as database:
        page = database.run(lambda c: rollout_page(c, model=None, offset=0, limit=500))
    if args.json:
        print_json(page.rollouts)
        return 0
    print(
        f"{'rollout':<14}{'model':<20}{'release':<9}{'phase':<9}{'wave':<18}{'devices':<12}{'started':<22}group"
    )
    for each in page.rollouts:
        print(
            f"{each.id:<14}{each.model:<20}{each.release:<9}{each.phase:<9}{_wave(each):<18}"
            f"{f'{each.committed}/{each.fleet}':<12}{shown_time(each.created_at_ms):<22}{_group(each)}"
        )
    return 0


def _show(args: argparse.Namespace) -> int:
    from cloud_hub.rollouts.figures import rollout_detail

    with database_of(load_config(args.config)) as database:
        detail = database.run(lambda c: rollout_detail(c, args.id, now_s=time.time()))
    if args.json:
        print_json(detail)
    else:
        for line in _lines_of(detail):
            print(line)
    return 0


def _order(args: argparse.Namespace) -> int:
    from cloud_hub.rollouts.orders import order

    with database_of(load_config(args.config)) as database:
        database.run(
            lambda c: order(
                c,
                args.id,
                args.action,
                by=_who(),
                now_ms=_now_ms(),
                reason=getattr(args, "reason", ""),
                wave=getattr(args, "wave", None),
            )
        )
    print(f"rollout {args.id}: {args.action} ordered")
    return 0


def _set_labels(args: argparse.Namespace) -> int:
    from cloud_hub.rollouts.labels import change_labels

    with database_of(load_config(args.config)) as database:
        changes = {key: value or None for key, value in args.labels}
        labels = database.run(lambda c: change_labels(c, args.device, changes, by=_who(), now_ms=_now_ms()))
    print(" ".join(f"{key}={value}" for key, value in labels.items()) or "no labels")
    return 0


def _acts(args: argparse.Namespace) -> int:
    from cloud_hub.rollouts.figures import act_page

    with database_of(load_config(args.config)) as database:
        page = database.run(lambda c: act_page(c, subject=args.subject, before=None, limit=args.limit))
    if args.json:
        print_json(page.acts)
        return 0
    print(f"{'at':<22}{'by':<18}{'act':<20}{'subject':<24}detail")
    for act in page.acts:
        print(f"{shown_time(act.at_ms):<22}{act.by:<18}{act.act:<20}{act.subject:<24}{act.detail}")
    return 0


def _lines_of(detail: RolloutDetail) -> Iterator[str]:
    rollout = detail.rollout
    ended = " (killed)" if rollout.is_killed else " (closed)" if rollout.is_closed else ""
    yield f"rollout {rollout.id}: release {rollout.release} of {rollout.model} is {rollout.phase}{ended}"
    yield f"  started   {shown_time(rollout.created_at_ms)} by {rollout.created_by}"
    yield f"  before    {rollout.previous or 'what boards were shipped with'}"
    yield f"  group     {_group(rollout)}"
    yield f"  wave      {_wave(rollout)}"
    yield (
        f"  devices   {rollout.committed} committed, {rollout.failed} failed ({rollout.silent} silent), "
        f"{rollout.reached} reached of {rollout.devices} in open waves, {rollout.fleet} in all"
    )
    yield f"  quality   {detail.quality}"
    yield f"  health    {'; '.join(detail.health)}"
    for line in detail.waits_for:
        yield f"  waits for {line}"
    failed = [each for each in detail.devices if each.outcome in {"reverted", "silent"}]
    for each in failed:
        yield f"  failed    {each.name}: {each.outcome}{f', {each.reason}' if each.reason else ''}"
    for entry in detail.history:
        yield f"  {shown_time(entry.at_ms)} {entry.what}{f', by {entry.by}' if entry.by else ''}"


def _wave(rollout: Rollout) -> str:
    return f"{rollout.wave + 1}/{rollout.waves} {rollout.wave_name}".rstrip()


def _group(rollout: Rollout) -> str:
    return " ".join(f"{key}={value}" for key, value in rollout.group.items()) or "all"


def _number(text: str) -> int:
    if not text.isdecimal() or len(text) > 18:
        raise argparse.ArgumentTypeError(f"{text!r} is no number")
    return int(text)


def _who() -> str:
    try:
        return getpass.getuser()[:128]
    except (KeyError, OSError):
        return "somebody"


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
