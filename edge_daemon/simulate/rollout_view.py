"""A rollout through a virtual fleet as people watch and read it."""

from __future__ import annotations

import time
from typing import Final

from rich.console import Console
from rich.live import Live
from rich.table import Table

from edge_daemon.simulate.rollout import DRIFT, RolloutProgress
from edge_daemon.simulate.rollout_kinds import Kind
from edge_daemon.simulate.rollout_report import Catcher, RolloutReport

REFRESH_S: Final = 0.2

_SAID_OF: Final[dict[Kind, str]] = {
    "good": "as good as the one before, and not the same",
    "bad": "worse by {points:.1f} points",
    "crash": "its board is killed each time that it has answered by it for a moment",
    "slow": "many times slower",
    "drifted": "as good as the one before; the world of all boards moves (--drift {drift:g}) as it goes out",
}
_CAUGHT_BY: Final[dict[Catcher, str]] = {
    "": "nobody",
    "trial": "the board, in its trial, before a sample was answered by it",
    "probation": "the board, on probation",
    "quality": "the hub's judge of quality, on pairs",
    "health": "the hub's comparison of health",
}


class RolloutWatcher:
    """Draws where a run stands, a few times a second at most."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._drawn_s = 0.0

    def __call__(self, progress: RolloutProgress) -> None:
        now_s = time.monotonic()
        if now_s - self._drawn_s < REFRESH_S:
            return
        self._drawn_s = now_s
        table = Table(box=None, pad_edge=False)
        for heading in ("sent", "answered", "by the release", "rollout"):
            table.add_column(heading, justify="left" if heading == "rollout" else "right")
        table.add_row(str(progress.sent), str(progress.answered), str(progress.by_release), progress.what)
        self._live.update(table, refresh=True)


def print_rollout(console: Console, report: RolloutReport) -> None:
    """The report in one table, and what happened in the hub's own words."""
    said = _SAID_OF[report.kind].format(points=100 * report.drop, drift=DRIFT)
    table = Table(
        title=f"a release that is {report.kind}: {report.model}, {report.devices} boards",
        title_justify="left",
        show_header=False,
    )
    ended = "went to every board" if report.phase == "done" else f"halted in wave {report.stopped_in!r}"
    rows = [
        ("release", f"{report.release[:12]}: {said}"),
        ("ended", ended + ("" if report.is_as_expected else "  [red]which it should not have[/]")),
        ("caught by", _CAUGHT_BY[report.caught_by]),
    ]
    if report.why:
        rows.append(("because", report.why))
    if report.quality not in report.why:
        rows.append(("quality", report.quality))
    rows += [
        ("answered by it", _answers(report)),
        ("boards", ", ".join(_boards(report))),
        ("lost", f"{report.lost} of {report.samples} samples"),
        ("took", f"{report.seconds:.0f} s"),
    ]
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for line in report.history:
        console.print(f"  {line}", markup=False, highlight=False)


def _answers(report: RolloutReport) -> str:
    release, shipped = report.by_release, report.by_shipped
    if not release.samples:
        return "no sample"
    return (
        f"{release.samples:,} samples ({release.samples / max(report.answered, 1):.1%}), "
        f"{release.accuracy:.1%} of them right at once; {shipped.accuracy:.1%} of those by the bundle before"
    )


def _boards(report: RolloutReport) -> list[str]:
    outcomes = [board.outcome for board in report.boards]
    return [f"{outcomes.count(outcome)} {outcome}" for outcome in dict.fromkeys(outcomes)]
