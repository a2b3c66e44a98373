"""An evaluation and an ablation as tables for a terminal."""

from __future__ import annotations

from typing import Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cloud_hub.builder.reports.ablate import AS_BUILT, Ablation
from cloud_hub.builder.reports.evaluate import Evaluation, Way
from cloud_hub.builder.reports.traffic import Traffic

_NAMES: Final = 20
"""Columns that the names of rows have at least; in a terminal of 80 the figures need the rest."""


def print_evaluation(seen: Evaluation, console: Console | None = None) -> None:
    """Who answers how well, what is sent, and whether the certificates stand."""
    console = console or Console()
    measure = "accuracy" if seen.reference == "true labels" else "agreement"
    console.print(
        f"{escape(seen.model)} {seen.bundle_id[:12]}, plan {escape(seen.plan)}, point {seen.point}"
        f"{_certified(seen)}; {seen.samples:,} samples, against {_reference(seen)}"
    )
    answers = _table("", "answers", f"{measure}\nthere", f"{measure}\nalone", "multiply-adds")
    for rung in seen.rungs:
        there = "-" if rung.answered_accuracy is None else _percent(rung.answered_accuracy)
        answers.add_row(
            f"rung {rung.rung}: stage {rung.stage} in {rung.precision}",
            _percent(rung.answers),
            there,
            _percent(rung.accuracy),
            f"{rung.mult_adds_so_far:,}",
        )
    answers.add_row("hub: full model", _percent(seen.upload_share), "-", _percent(seen.full_accuracy), "-")
    answers.add_section()
    answers.add_row(
        "cascade",
        "",
        _percent(seen.cascade_accuracy),
        "",
        f"{seen.mult_adds:,.0f} ({seen.compute_share * 100:.0f} %)",
    )
    console.print(answers)

    uplink = seen.uplink
    sent = _table("uplink, bytes a sample", "up, MQTT", "up, TCP/IP", "down, MQTT", "saved by\nthe cascade")
    names: dict[Way, str] = {
        "cascade": "cascade",
        "all_deflated": "every sample, deflated in the same batches",
        "one_by_one": "every sample, a deflated message each",
        "all_raw": f"every sample, raw {uplink.raw_dtype}",
    }
    for way, name in names.items():
        traffic: Traffic = getattr(uplink, way)
        mqtt, tcp = traffic.mqtt["5"], traffic.tcp["5"]
        sent.add_row(
            name,
            *(f"{count / seen.samples:,.1f}" for count in (mqtt.up, tcp.up, mqtt.down)),
            _percent(uplink.saved[way]) if way in uplink.saved else "",
        )
    console.print(sent)
    if seen.point > seen.certified_point:
        console.print("no certificate covers this point: nothing is promised")
    for check in seen.checks:
        console.print(f"certificate: {check.sentence}", style="bold red" if check.contradicts else None)


def print_ablation(ablation: Ablation, console: Console | None = None) -> None:
    """One row per variant, with what its uploads are beside those as built."""
    console = console or Console()
    console.print(
        f"{escape(ablation.model)} {ablation.bundle_id[:12]}, plan {escape(ablation.plan)}: {ablation.kind} "
        f"at most {_percent(ablation.epsilon)} with confidence {(1 - ablation.delta) * 100:g} % "
        f"in every tested row; means of {ablation.splits} draws, {ablation.samples:,} samples test"
    )
    measure = "accuracy" if ablation.kind == "loss" else "agreement"
    table = _table(
        "", "to\nhub, %", "of draws", "more", measure, _two_lines(ablation.kind), "work", "bytes\nup"
    )
    built = next(row for row in ablation.rows if row.name == AS_BUILT)
    for row in ablation.rows:
        table.add_row(
            escape(row.name),
            f"{row.upload_share * 100:.1f}",
            f"{row.upload_range[0] * 100:.1f}..{row.upload_range[1] * 100:.1f}",
            "" if row is built else f"{(row.upload_share - built.upload_share) * 100:+.1f}",
            f"{row.accuracy * 100:.1f} %",
            _percent(row.risk),
            f"{row.compute_share * 100:.0f} %",
            f"{row.bytes_up:,.1f}",
        )
    console.print(table)


def _table(*heads: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for index, head in enumerate(heads):
        table.add_column(
            head, justify="right" if index else "left", no_wrap=index > 0, min_width=0 if index else _NAMES
        )
    return table


def _two_lines(kind: str) -> str:
    """A word that is longer than the figures below it."""
    return kind.replace("disagreement", "dis-\nagreement")


def _certified(seen: Evaluation) -> str:
    if seen.certified_point < 0:
        return " (not certified)"
    if seen.point > seen.certified_point:
        return f" (beyond the certified point {seen.certified_point})"
    return " (certified)"


def _reference(seen: Evaluation) -> str:
    return "their labels" if seen.reference == "true labels" else "the full model's answers (no labels)"


def _percent(share: float) -> str:
    return f"{share * 100:.2f} %"
