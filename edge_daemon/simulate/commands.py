"""`edge-daemon --simulate`: arguments, a live table, the report."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
from rich.console import Console
from rich.live import Live
from rich.table import Table

from edge_cascade.durable import write_durably
from edge_cascade.shipped import shipped_models
from edge_daemon.arguments import between
from edge_daemon.errors import EXIT_LOST, EXIT_OK, EXIT_UNEXPECTED, SimulationError
from edge_daemon.simulate.brokers import BrokerKind, available_broker
from edge_daemon.simulate.rollout_kinds import KINDS

if TYPE_CHECKING:
    from edge_daemon.simulate.fleet import Progress
    from edge_daemon.simulate.learning import LearningReport
    from edge_daemon.simulate.ledger import SimulationReport
    from edge_daemon.simulate.rollout_report import RolloutReport

REFRESH_S: Final = 0.2

_HEADINGS: Final = ("sent", "answered", "to the hub", "verdicts", "in the spools", "hub's broker", "rounds")
_ROUND_HEADINGS: Final = ("round", "asked", "votes", "bytes up", "bytes down", "holdout", "outcome")


def simulate(arguments: Sequence[str]) -> int:
    """Run a simulation; not 0 if anything was lost.

    Raises:
        EdgeError: for what is missing or does not start.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.rollout is not None and (options.rounds or options.outage or options.drift):
        parser.error("--rollout goes with none of --rounds, --outage and --drift")
    missing = [name for name in ("sqlalchemy", "onnx") if importlib.util.find_spec(name) is None]
    if missing:
        raise SimulationError("--simulate runs a hub: install edge-daemon[hub]")
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(name)s %(message)s")
    kind = available_broker()
    console = Console(stderr=True)
    console.print(
        f"{options.model}: {options.devices} boards, {options.samples} samples each at {options.rate:g}/s; "
        f"broker: {'mosquitto' if kind == 'mosquitto' else 'embedded (mosquitto is not installed)'}"
    )
    if options.rollout is not None:
        return _simulate_rollout(options, kind, console)
    return _simulate_fleet(options, kind, console)


def _simulate_fleet(options: argparse.Namespace, kind: BrokerKind, console: Console) -> int:
    from edge_daemon.simulate.fleet import Fleet, Scenario

    scenario = Scenario(
        options.model,
        options.devices,
        options.samples,
        options.rate,
        options.seed,
        options.drift,
        options.outage,
        options.rounds,
    )
    with tempfile.TemporaryDirectory(prefix="edge-daemon-") as directory:
        fleet = Fleet(scenario, kind, Path(directory))
        with Live(console=console, auto_refresh=False, transient=True) as live:
            report = fleet.run(_Watcher(live))
    _print_report(Console(), report)
    _write_json(options.json, report)
    return EXIT_LOST if report.lost or report.duplicates else EXIT_OK


def _simulate_rollout(options: argparse.Namespace, kind: BrokerKind, console: Console) -> int:
    from edge_daemon.simulate.rollout import RolloutFleet, RolloutScenario
    from edge_daemon.simulate.rollout_view import RolloutWatcher, print_rollout

    scenario = RolloutScenario(
        options.rollout, options.model, options.devices, options.samples, options.rate, options.seed
    )
    with tempfile.TemporaryDirectory(prefix="edge-daemon-") as directory:
        fleet = RolloutFleet(scenario, kind, Path(directory))
        with Live(console=console, auto_refresh=False, transient=True) as live:
            report = fleet.run(RolloutWatcher(live))
    print_rollout(Console(), report)
    _write_json(options.json, report)
    if report.lost:
        return EXIT_LOST
    return EXIT_OK if report.is_as_expected else EXIT_UNEXPECTED


def _write_json(path: Path | None, report: SimulationReport | RolloutReport) -> None:
    if path is None:
        return
    content = msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n"
    try:
        write_durably(path, content)
    except OSError as error:
        raise SimulationError(f"--json {path}: {error.strerror}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="edge-daemon --simulate",
        description="A virtual fleet around the real device, a real broker and the real hub.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--devices", type=_whole, default=4, metavar="N", help="boards")
    parser.add_argument("--samples", type=_whole, default=500, metavar="N", help="samples of each board")
    parser.add_argument(
        "--rate", type=_rate, default=50.0, metavar="HZ", help="samples a second of each board"
    )
    parser.add_argument(
        "--model", default="vibration", choices=shipped_models(), help="what the boards classify"
    )
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="of sensors and audit coins")
    parser.add_argument(
        "--drift", type=_share, default=0.0, metavar="X", help="0..1: how far the world has moved"
    )
    parser.add_argument(
        "--outage",
        type=_seconds,
        default=0.0,
        metavar="SECONDS",
        help="take the hub's broker away for so long",
    )
    parser.add_argument(
        "--rounds",
        type=_whole,
        default=0,
        metavar="N",
        help="after half of the samples, N rounds of federated averaging from verdicts alone",
    )
    parser.add_argument(
        "--rollout",
        choices=KINDS,
        default=None,
        help="after these samples, a signed release that is such goes through the fleet, wave by wave",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there, too")
    return parser


class _Watcher:
    """Draws the live table, a few times a second at most."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._drawn_s = 0.0

    def __call__(self, progress: Progress) -> None:
        now_s = time.monotonic()
        if now_s - self._drawn_s < REFRESH_S:
            return
        self._drawn_s = now_s
        table = Table(box=None, pad_edge=False)
        for heading in _HEADINGS:
            table.add_column(heading, justify="right")
        table.add_row(
            f"{progress.sent}/{progress.total}",
            str(progress.answered),
            str(progress.awaited_verdicts),
            str(progress.verdicts),
            str(progress.spooled),
            "[red]away[/]" if progress.hub_away else "up",
            progress.rounds,
        )
        self._live.update(table, refresh=True)


def _print_report(console: Console, report: SimulationReport) -> None:
    total = max(report.samples, 1)
    by_exit = ", ".join(
        f"exit {name}: {count / total:.1%}" for name, count in report.answered_by_exit.items()
    )
    by_precision = ", ".join(
        f"{name}: {count / total:.1%}" for name, count in report.answered_by_precision.items()
    )
    table = Table(
        title=f"{report.model}: {report.devices} boards, {report.samples} samples",
        title_justify="left",
        show_header=False,
    )
    table.add_column("")
    table.add_column("", justify="left")
    rows = [
        ("answered by", f"{by_exit}  ({by_precision})"),
        (
            "sent to the hub",
            f"{report.escalated} unsure ({report.escalated / total:.1%}), {report.audited} audits",
        ),
        ("verdicts back", f"{report.verdicts}"),
        (
            "accuracy",
            (
                f"board at once {report.accuracy.edge:.2%}, with verdicts {report.accuracy.cascade:.2%}, "
                f"full model on everything {report.accuracy.cloud:.2%}"
            ),
        ),
        ("bytes up", f"{report.bytes_up:,} {_compared(report)}"),
        ("bytes down", f"{report.bytes_down:,}"),
        ("answer latency", f"p50 {report.latency_us.p50:,.0f} us, p99 {report.latency_us.p99:,.0f} us"),
        (
            "verdict latency",
            f"p50 {report.verdict_latency_ms.p50:,.0f} ms, p99 {report.verdict_latency_ms.p99:,.0f} ms",
        ),
        (
            "lost",
            (
                f"{report.lost}  (duplicates {report.duplicates}, shed {report.shed}, "
                f"dropped {report.dropped}, redelivered {report.redelivered})"
            ),
        ),
        ("broker", report.broker),
    ]
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if report.learning is not None:
        _print_learning(console, report.learning)


def _compared(report: SimulationReport) -> str:
    """Bytes and accuracy beside sending everything."""
    if report.learning is not None:
        return "with audits raised so far that a holdout comes together within minutes"
    saved = 1.0 - report.bytes_up / max(report.bytes_cloud_only, 1)
    points = (report.accuracy.cascade - report.accuracy.cloud) * 100
    return (
        f"instead of {report.bytes_cloud_only:,}: {saved:.1%} saved, "
        f"{abs(points):.2f} points {'below' if points < 0 else 'above'} the full model"
    )


def _print_learning(console: Console, learning: LearningReport) -> None:
    # Without lines it fits into sixty columns.
    table = Table(title="rounds: learned from verdicts alone", title_justify="left", box=None, pad_edge=False)
    for heading in _ROUND_HEADINGS:
        table.add_column(heading, justify="left" if heading == "outcome" else "right", overflow="fold")
    for each in learning.rounds:
        table.add_row(
            str(each.number),
            str(each.asked),
            str(each.counted),
            f"{each.bytes_up:,}",
            f"{each.bytes_down:,}",
            f"{_percent(each.before)} -> {_percent(each.after)}",
            each.phase.replace("_", " "),
        )
    console.print(table)
    for each in learning.rounds:
        if each.why and each.phase != "committed":
            console.print(f"round {each.number}: {each.why}", markup=False)
    before, after = learning.before, learning.after
    exits = [" / ".join(map(_percent, each)) for each in (learning.exits_before, learning.exits_after)]
    rows = [("exits alone, fp32", f"{exits[0]}  ->  {exits[1]}")]
    if after is None:
        rows.append(("draft", f"none: {learning.why or learning.phase}"))
    else:
        rows.append(("draft", f"bundle {str(learning.draft)[:12]}, certified"))
        rows += [
            ("board at once", f"{_percent(before.edge)}  ->  {_percent(after.edge)}"),
            ("unsure", f"{_percent(before.upload_share)}  ->  {_percent(after.upload_share)}"),
            ("with verdicts", f"{_percent(before.cascade)}  ->  {_percent(after.cascade)}"),
            ("avoidable errors", f"{_percent(before.loss)}  ->  {_percent(after.loss)}"),
        ]
    worth = Table(
        title=f"before and after, on {learning.fresh_samples:,} samples that nobody has seen",
        title_justify="left",
        show_header=False,
    )
    for row in rows:
        worth.add_row(*row)
    console.print(worth)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _whole(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if not 1 <= value <= 10_000_000:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return value


def _rate(text: str) -> float:
    return between(text, 0.001, 1e6, "a rate above 0")


def _share(text: str) -> float:
    return between(text, 0.0, 1.0, "a number from 0 to 1")


def _seconds(text: str) -> float:
    return between(text, 0.0, 86400.0, "a number of seconds from 0 on")
