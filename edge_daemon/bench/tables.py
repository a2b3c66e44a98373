"""Profiles and reports for a person at a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from edge_cascade.profile import Machine, Profile, StageCost
from edge_daemon.bench.report import BenchReport, GoldenCheck

NOT_AVAILABLE = "not available"


def print_profile(console: Console, profile: Profile) -> None:
    """One row a stage and precision."""
    _print_machine(console, profile.machine)
    tight = [cost for cost in profile.stages if cost.pace == "tight"]
    paced = {_identity(cost): cost for cost in profile.stages if cost.pace == "paced"}
    rows = [
        [
            f"{cost.model} stage {cost.stage} {cost.precision}",
            f"{cost.mult_adds:,}",
            f"{cost.p50_us:,.1f}",
            f"{cost.p99_us:,.1f}",
            f"{paced[_identity(cost)].p50_us:,.0f}",
            f"{paced[_identity(cost)].p99_us:,.0f}",
        ]
        for cost in tight
    ]
    heads = ["", "mult-adds", "tight p50", "tight p99", "paced p50", "paced p99"]
    _print_table(console, f"Microseconds a sample; paced: {profile.gap_ms:g} ms apart", heads, rows)


def print_report(console: Console, report: BenchReport) -> None:
    """Facts, then stages, rungs, plans, then watts and temperatures."""
    _print_machine(console, report.machine)
    _print_facts(console, report)
    _print_stages(console, report)
    _print_rungs(console, report)
    _print_plans(console, report)
    _print_board(console, report)


def _print_facts(console: Console, report: BenchReport) -> None:
    table = Table(
        title=f"{report.model}, bundle {report.bundle_id[:12]}, plan {report.plan}, point {report.point}, "
        f"{report.runtime}",
        title_justify="left",
        show_header=False,
    )
    table.add_column("", no_wrap=True)
    table.add_column("")
    start, memory, latency = report.start, report.memory, report.paced.latency
    opening = (
        f"bundle read in {start.read_ms:,.1f} ms, runtime and sessions opened in {start.open_ms:,.1f} ms, "
        f"first answer {start.first_answer_ms:,.2f} ms"
    )
    held = f"before, {_mib(memory.loaded_bytes)} with the sessions open"
    for row in (
        ("golden outputs", _golden_line(report.golden)),
        ("samples", report.samples_source),
        ("tight loop", f"{report.samples_per_s:,.0f} samples a second, one at a time"),
        (
            f"at {report.paced.rate_hz:g} a second",
            f"p50 {latency.p50_us:,.0f} us, p99 {latency.p99_us:,.0f} us ({latency.samples} samples)",
        ),
        ("sent to the hub", f"{report.escalated_share:.1%} of the samples"),
        ("start", opening),
        ("memory", f"{_mib(memory.before_bytes)} {held}, peak of this command {_mib(memory.peak_bytes)}"),
    ):
        table.add_row(*row)
    console.print(table)


def _print_stages(console: Console, report: BenchReport) -> None:
    paced = {_identity(cost): cost for cost in report.stages if cost.pace == "paced"}
    gains = {gain.stage: gain for gain in report.gains}
    rows = []
    for cost in report.stages:
        if cost.pace != "tight":
            continue
        gain = gains.get(cost.stage) if cost.precision == "int8" else None
        rows.append(
            [
                f"stage {cost.stage} {cost.precision}",
                f"{cost.p50_us:,.1f}",
                f"{cost.p99_us:,.1f}",
                f"{paced[_identity(cost)].p50_us:,.0f}",
                f"{paced[_identity(cost)].p99_us:,.0f}",
                "" if gain is None else f"{gain.tight:.2f} / {gain.paced:.2f}",
            ]
        )
    heads = ["", "tight p50", "tight p99", "paced p50", "paced p99", "int8 / fp32, tight / paced"]
    _print_table(console, "Stages alone, microseconds", heads, rows)


def _print_rungs(console: Console, report: BenchReport) -> None:
    rows = [
        [
            f"exit of rung {rung.rung} (stage {rung.stage} {rung.precision})",
            f"{rung.to_exit_tight.p50_us:,.1f}",
            f"{rung.to_exit_tight.p99_us:,.1f}",
            f"{rung.to_exit_paced.p50_us:,.0f}",
            f"{rung.to_exit_paced.p99_us:,.0f}",
            f"{rung.answered_share:.1%}",
        ]
        for rung in report.rungs
    ]
    heads = ["", "tight p50", "tight p99", "paced p50", "paced p99", "answers"]
    _print_table(console, "From a sample to an exit's answer, microseconds", heads, rows)


def _print_plans(console: Console, report: BenchReport) -> None:
    rows = [
        [
            f"{cost.plan}, point {cost.point}{', certified' if cost.is_certified else ''}",
            f"{cost.tight_us:,.1f}",
            f"{cost.paced_us:,.0f}",
            f"{cost.mean_rungs:.2f}",
            f"{cost.upload_share:.1%}",
            f"{cost.escalated_share:.1%}",
        ]
        for cost in report.plans
    ]
    heads = ["", "tight us", "paced us", "rungs climbed", "uploads, calibrated", "uploads, here"]
    _print_table(console, "Plans: mean cost of a sample, by the exits that the samples left at", heads, rows)
    console.print(f"recommended plan: {report.recommended.plan} ({report.recommended.reason})")


def _print_board(console: Console, report: BenchReport) -> None:
    for temperature in report.temperatures:
        console.print(
            f"temperature {temperature.name}: {temperature.idle_celsius:.1f} C at rest, "
            f"{temperature.busy_celsius:.1f} C in the tight loop"
        )
    if not report.temperatures:
        console.print(f"temperature: {NOT_AVAILABLE} (no sensor that this user may read)")
    for rail in report.rails:
        console.print(
            f"watts {rail.name}: {rail.idle_w:.2f} at rest, {rail.busy_w:.2f} in the tight loop, "
            f"{rail.mj_per_sample:.3f} mJ a sample above rest"
        )
    if not report.rails:
        console.print(f"watts: {NOT_AVAILABLE} (no INA3221, hwmon power or RAPL that this user may read)")


def _print_machine(console: Console, machine: Machine) -> None:
    parts = [
        machine.board,
        machine.cpu,
        f"{machine.cores} cores",
        None if machine.memory_bytes is None else f"{machine.memory_bytes / 2**30:.1f} GiB",
        machine.os,
        f"Python {machine.python}",
        *(f"{name} {version}" for name, version in machine.packages.items()),
        f"int8: {', '.join(machine.features) or 'no special instructions'}",
        None if machine.governor is None else f"governor {machine.governor}",
        None if machine.max_mhz is None else f"up to {machine.max_mhz:,.0f} MHz",
        None if machine.load_1min is None else f"load {machine.load_1min}",
    ]
    console.print(", ".join(part for part in parts if part), highlight=False)


def _print_table(console: Console, title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for index, head in enumerate(heads):
        table.add_column(head, justify="right" if index else "left", no_wrap=index == 0)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _golden_line(checks: Sequence[GoldenCheck]) -> str:
    return "; ".join(
        f"{check.plan} {check.precision} {'passes' if check.passes else 'FAILS'} "
        f"({'NaN' if check.deviation is None else f'{check.deviation:.2g}'} of {check.tolerance:g})"
        for check in checks
    )


def _identity(cost: StageCost) -> tuple[str, int, str]:
    return (cost.bundle_id, cost.stage, cost.precision)


def _mib(size_bytes: int | None) -> str:
    return NOT_AVAILABLE if size_bytes is None else f"{size_bytes / 2**20:,.0f} MiB"
