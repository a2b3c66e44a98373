"""`cloud-hub round start|list|show|abort|key|privacy`: beside a hub at work, through the database.

The options of `start` are the fields of `SeriesSettings`: one source for both.
"""

# ruff: noqa: T201 - what a command prints is its result

from __future__ import annotations

import argparse
import getpass
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from cloud_hub.commands import database_of, print_json, shown_time
from cloud_hub.config import add_config_argument, load_config

if TYPE_CHECKING:
    from cloud_hub.federation.figures import Round, RoundDetail, Series, SeriesDetail

_START = """\
Start a series of rounds of federated averaging. A running hub takes it up within a second or two: it offers
each round to a cohort of boards, averages what they learned, and keeps it only where the holdout does not say
that it is worse. After so many committed rounds it makes a draft release.
"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands to the program's."""
    parser = subparsers.add_parser("round", help="rounds of federated averaging")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    start = actions.add_parser("start", help="start a series of rounds", description=_START)
    start.add_argument("model", help="the model's name")
    _add_settings(start)
    start.set_defaults(run=_start)
    listing = actions.add_parser("list", help="show all series, the newest first")
    listing.set_defaults(run=_list)
    show = actions.add_parser("show", help="show a series with its rounds, or one round with its boards")
    show.add_argument("id", help="a series' number, or a round's id")
    show.set_defaults(run=_show)
    abort = actions.add_parser("abort", help="end a series and its open round")
    abort.add_argument("id", type=_number, help="the series' number")
    abort.add_argument("--reason", default="", help="why, for people")
    abort.set_defaults(run=_abort)
    key = actions.add_parser("key", help="print what boards pin as training.hub_key; makes the key if needed")
    key.set_defaults(run=_key)
    privacy = actions.add_parser("privacy", help="what a series' noise is worth, as (epsilon, delta)")
    privacy.add_argument(
        "--fleet", type=_number, required=True, metavar="N", help="how many boards there are"
    )
    privacy.add_argument(
        "--delta", type=float, default=1e-5, help="default: 1e-5; below one over the fleet's size"
    )
    _add_settings(privacy)
    privacy.set_defaults(run=_privacy)
    for action in (listing, show, privacy):
        action.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    for action in (start, listing, show, abort, key):
        add_config_argument(action)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    from cloud_hub.federation.settings import SeriesSettings

    info = msgspec.inspect.type_info(SeriesSettings)
    assert isinstance(info, msgspec.inspect.StructType)
    group = parser.add_argument_group("settings", "bounds are explained when they are broken")
    for field in info.fields:
        kind, text = _plain(field.type)
        flag, target = f"--{field.encode_name.replace('_', '-')}", f"set_{field.encode_name}"
        if isinstance(kind, msgspec.inspect.BoolType):
            group.add_argument(flag, dest=target, action="store_true", default=None, help=text)
            continue
        default = "" if field.default is None else f"default: {field.default}"
        said = "; ".join(part for part in (text, default) if part)
        group.add_argument(flag, dest=target, metavar=_metavar(kind), help=said.replace("%", "%%"))


def _metavar(kind: msgspec.inspect.Type) -> str:
    if isinstance(kind, msgspec.inspect.LiteralType):
        return "|".join(map(str, kind.values))
    return "N" if isinstance(kind, msgspec.inspect.IntType) else "NUMBER"


def _plain(kind: msgspec.inspect.Type) -> tuple[msgspec.inspect.Type, str]:
    """A field's type without what is wrapped around it, and its description."""
    text = ""
    while isinstance(kind, msgspec.inspect.Metadata | msgspec.inspect.UnionType):
        if isinstance(kind, msgspec.inspect.UnionType):
            kind = next(each for each in kind.types if not isinstance(each, msgspec.inspect.NoneType))
        else:
            text = (kind.extra_json_schema or {}).get("description", "") or text
            kind = kind.type
    return kind, text


def _given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of the command line; numbers as numbers, so that bounds explain a wrong one."""
    return {
        name.removeprefix("set_"): _value(value)
        for name, value in vars(args).items()
        if name.startswith("set_") and value is not None
    }


def _value(text: str | bool) -> Any:
    if isinstance(text, bool):
        return text
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _start(args: argparse.Namespace) -> int:
    from cloud_hub.federation.settings import settings_of
    from cloud_hub.federation.start import start_series
    from cloud_hub.models import find_model

    settings = settings_of(_given_settings(args))
    config = load_config(args.config)
    _, bundle = find_model(config.models, args.model)
    with database_of(config) as database:
        number = database.run(
            lambda c: start_series(c, bundle, settings, created_by=_who(), now_ms=time.time_ns() // 1_000_000)
        )
    print(number)
    return 0


def _list(args: argparse.Namespace) -> int:
    from cloud_hub.federation.figures import series_page

    with database_of(load_config(args.config)) as database:
        page = database.run(lambda c: series_page(c, before=None, limit=500))
    if args.json:
        print_json(page.series)
        return 0
    print(f"{'series':<8}{'model':<20}{'phase':<10}{'committed':<11}{'strategy':<10}{'started':<22}why")
    for series in page.series:
        print(
            f"{series.id:<8}{series.model:<20}{series.phase:<10}"
            f"{f'{series.committed}/{series.settings.rounds}':<11}{series.settings.strategy:<10}"
            f"{shown_time(series.created_at_ms):<22}{series.why}"
        )
    return 0


def _show(args: argparse.Namespace) -> int:
    from cloud_hub.federation.figures import round_detail, series_detail

    shown: SeriesDetail | RoundDetail
    with database_of(load_config(args.config)) as database:
        if args.id.isdecimal() and len(args.id) <= 18:
            shown = database.run(lambda c: series_detail(c, int(args.id)))
        else:
            shown = database.run(lambda c: round_detail(c, args.id))
    if args.json:
        print_json(shown)
    else:
        for line in _lines_of(shown):
            print(line)
    return 0


def _abort(args: argparse.Namespace) -> int:
    from cloud_hub.federation.start import abort_series

    with database_of(load_config(args.config)) as database:
        database.run(lambda c: abort_series(c, args.id, args.reason or f"aborted by {_who()}"))
    print(f"series {args.id} is to end")
    return 0


def _key(args: argparse.Namespace) -> int:
    from cloud_hub.federation.keys import public_key

    print(public_key(load_config(args.config).state_dir))
    return 0


def _privacy(args: argparse.Namespace) -> int:
    from cloud_hub.federation.account import account_of, lines_of
    from cloud_hub.federation.settings import settings_of

    spent = account_of(settings_of(_given_settings(args)), fleet=args.fleet, delta=args.delta)
    if args.json:
        print_json(spent)
    else:
        for line in lines_of(spent, delta=args.delta):
            print(line)
    return 0


def _lines_of(shown: SeriesDetail | RoundDetail) -> Iterator[str]:
    from cloud_hub.federation.figures import RoundDetail

    if isinstance(shown, RoundDetail):
        yield from _round_lines(shown.round)
        yield f"  {'board':<24}{'state':<10}{'examples':<10}{'up':<10}{'down':<10}why"
        for member in shown.members:
            why = ": ".join(text for text in (member.reason, member.detail) if text)
            yield (
                f"  {member.device:<24}{member.state:<10}{member.num_examples or '-':<10}"
                f"{member.bytes_up:<10}{member.bytes_down:<10}{why}"
            )
        return
    yield from _series_lines(shown.series)
    for each in shown.rounds:
        yield from _round_lines(each)


def _series_lines(series: Series) -> Iterator[str]:
    yield f"series {series.id} of {series.model}: {series.phase}{f', {series.why}' if series.why else ''}"
    yield f"  started     {shown_time(series.created_at_ms)} by {series.created_by}"
    yield f"  committed   {series.committed} of {series.settings.rounds} rounds"
    changed = _changed(series)
    yield f"  settings    {changed or 'the defaults'}"
    if series.release is not None:
        yield f"  release     {series.release}"


def _round_lines(round_: Round) -> Iterator[str]:
    yield f"round {round_.number} {round_.id}: {round_.phase}{f', {round_.why}' if round_.why else ''}"
    rejected = ", ".join(f"{count} {reason}" for reason, count in round_.rejected.items())
    yield (
        f"  asked {round_.asked}, answered {round_.answered}, votes {round_.counted}, late {round_.late}, "
        f"rejected {rejected or '0'}"
    )
    yield f"  bytes up {round_.bytes_up:,}, down {round_.bytes_down:,}"
    if round_.guard is not None:
        samples = f", on {round_.guard.samples} samples" if round_.guard.judgement == "worse" else ""
        yield f"  guard {round_.guard.says}{samples}"


def _changed(series: Series) -> str:
    """The settings that are not the defaults."""
    given = msgspec.to_builtins(series.settings)
    defaults = msgspec.to_builtins(type(series.settings)())
    return ", ".join(f"{name} {value}" for name, value in given.items() if value != defaults[name])


def _number(text: str) -> int:
    if not text.isdecimal() or len(text) > 18:
        raise argparse.ArgumentTypeError(f"{text!r} is no series' number")
    return int(text)


def _who() -> str:
    try:
        return getpass.getuser()[:128]
    except (KeyError, OSError):
        return "somebody"
