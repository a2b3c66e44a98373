"""Prints what the cascade benchmark measured. Measures nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks.cascade.times import Pair, Times
from benchmarks.harness import print_table
from cloud_hub.builder.reports.card import Card
from edge_cascade.policy import Precision

PRECISIONS: Final[tuple[Precision, ...]] = ("fp32", "int8")


@dataclass(frozen=True, slots=True)
class Measured:
    """One bundle on its test data, and what it took to make it."""

    name: str
    card: Card
    times: Times
    build_s: float


def print_measured(measured: Sequence[Measured]) -> None:
    """Accuracy, bytes, work and time: a row a bundle."""
    print_table(
        "Accuracy on test data, percent",
        (
            "",
            "parameters",
            "exits alone",
            "board alone",
            "cascade",
            "cloud only",
            "difference",
            "upload",
            "naive",
            "naive upload",
        ),
        [_accuracy_row(each) for each in measured],
    )
    print_table(
        "Bytes up a sample: MQTT (TCP/IP beside it)",
        ("", "cascade", "all deflated", "saved", "one message each", "saved", "all raw", "saved"),
        [_bytes_row(each) for each in measured],
    )
    print_table(
        "Work",
        ("", "multiply-adds, share", "built in s"),
        [
            (each.name, f"{each.card.evaluation.compute_share:.2f}", f"{each.build_s:.0f}")
            for each in measured
        ],
    )
    for title, pace in (("at once", "tight"), ("20 ms apart", "paced")):
        print_table(
            f"Microseconds a sample, {title}: ladder beside the whole network (extremes of the rounds' ratios)",
            ("", "fp32 ladder", "whole", "ratio", "int8 ladder", "whole", "ratio"),
            [_times_row(each.name, getattr(each.times, pace)) for each in measured],
        )


def _times_row(name: str, pairs: Mapping[Precision, Pair]) -> tuple[str, ...]:
    row = [name]
    for precision in PRECISIONS:
        pair = pairs.get(precision)
        row += (
            ["-"] * 3
            if pair is None
            else [
                f"{pair.ladder_us:.0f}",
                f"{pair.whole_us:.0f}",
                f"{pair.ratio:.2f} ({pair.lowest:.2f} to {pair.highest:.2f})",
            ]
        )
    return tuple(row)


def _accuracy_row(each: Measured) -> tuple[str, ...]:
    seen, naive = each.card.evaluation, each.card.naive
    return (
        each.name,
        each.card.made_by.get("parameters", "-"),
        " / ".join(f"{100 * rung.accuracy:.1f}" for rung in seen.rungs),
        f"{100 * seen.edge_accuracy:.2f}",
        f"{100 * seen.cascade_accuracy:.2f}",
        f"{100 * seen.full_accuracy:.2f}",
        f"{100 * (seen.cascade_accuracy - seen.full_accuracy):+.2f}",
        f"{100 * seen.upload_share:.1f}",
        "-" if naive is None else f"{100 * naive.accuracy:.2f}",
        "-" if naive is None else f"{100 * naive.upload_share:.1f}",
    )


def _bytes_row(each: Measured) -> tuple[str, ...]:
    uplink, samples = each.card.evaluation.uplink, each.card.evaluation.samples
    row = [each.name, f"{uplink.cascade.up / samples:.1f} ({uplink.cascade.tcp['5'].up / samples:.1f})"]
    for other in (uplink.all_deflated, uplink.one_by_one, uplink.all_raw):
        row += [
            f"{other.up / samples:.1f} ({other.tcp['5'].up / samples:.1f})",
            f"{100 * (1 - uplink.cascade.up / other.up):.1f} % ({100 * (1 - uplink.cascade.tcp['5'].up / other.tcp['5'].up):.1f} %)",
        ]
    return tuple(row)
