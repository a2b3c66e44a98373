"""What `benchmarks.training` measured, what follows from it, and the tables that it prints. No I/O but the tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

import numpy as np

from benchmarks.harness import Spread, print_table, spread_of

Kind = Literal["nothing", "nothing again", "busy loop", "training"]

RATE_HZ: Final = 200.0
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
_REDRAWS: Final = 2000


@dataclass(frozen=True, slots=True)
class Segment:
    """One stretch of one kind. Shares: `child` of one core, `others` and `stolen` of all cores of the machine."""

    round: int
    kind: Kind
    sent: int
    latency_us: list[float]
    child: float
    others: float
    stolen: float
    load_1min: float


@dataclass(frozen=True, slots=True)
class Row:
    """All segments of one kind. Latencies in us; `p99_segments`: lowest, median, highest of them."""

    kind: Kind
    sent: int
    answered: int
    us: Spread
    p99_segments: tuple[float, float, float]
    child: float
    others: float
    stolen: float
    load_1min: float


@dataclass(frozen=True, slots=True)
class Ratio:
    """What one kind takes of another, pooled, with the range that redrawn rounds give for the p99."""

    kind: Kind
    of: Kind
    p50: float
    p99: float
    p99_low: float
    p99_high: float


def row_of(kind: Kind, segments: Sequence[Segment]) -> Row:
    """The segments of one kind together."""
    chosen = [segment for segment in segments if segment.kind == kind]
    pooled = np.concatenate([segment.latency_us for segment in chosen])
    low, middle, high = np.percentile([spread_of(segment.latency_us).p99 for segment in chosen], (0, 50, 100))
    return Row(
        kind=kind,
        sent=sum(segment.sent for segment in chosen),
        answered=len(pooled),
        us=spread_of(pooled),
        p99_segments=(float(low), float(middle), float(high)),
        child=float(np.mean([segment.child for segment in chosen])),
        others=float(np.mean([segment.others for segment in chosen])),
        stolen=float(np.mean([segment.stolen for segment in chosen])),
        load_1min=float(np.mean([segment.load_1min for segment in chosen])),
    )


def ratio_of(kind: Kind, of: Kind, segments: Sequence[Segment]) -> Ratio:
    """How much longer `kind` takes than `of`."""
    us = {
        each: [np.array(segment.latency_us) for segment in segments if segment.kind == each]
        for each in (kind, of)
    }
    rng = np.random.default_rng(0)
    redrawn = []
    for _ in range(_REDRAWS):
        rounds = rng.integers(0, len(us[kind]), len(us[kind]))
        a, b = (np.percentile(np.concatenate([us[each][i] for i in rounds]), 99) for each in (kind, of))
        redrawn.append(a / b)
    low, high = np.percentile(redrawn, (5, 95))
    above, below = spread_of(np.concatenate(us[kind])), spread_of(np.concatenate(us[of]))
    return Ratio(kind, of, above.p50 / below.p50, above.p99 / below.p99, float(low), float(high))


def print_rows(name: str, rows: Sequence[Row]) -> None:
    """The latencies of one bundle."""
    print_table(
        f"{name} at {RATE_HZ:g} samples/s, milliseconds; p99 of the segments: lowest, median, highest",
        [
            "",
            "sent",
            "answered",
            "p50",
            "p99",
            "p99 of segments",
            "child, of a core",
            "others",
            "stolen",
            "load",
        ],
        [
            [
                row.kind,
                str(row.sent),
                f"{row.answered / row.sent:.2%}",
                f"{row.us.p50 / 1e3:.2f}",
                f"{row.us.p99 / 1e3:.2f}",
                " / ".join(f"{p99 / 1e3:.1f}" for p99 in row.p99_segments),
                f"{row.child:.0%}",
                f"{row.others:.0%}",
                f"{row.stolen:.0%}",
                f"{row.load_1min:.1f}",
            ]
            for row in rows
        ],
    )


def print_ratios(name: str, ratios: Sequence[Ratio]) -> None:
    """What each kind takes of another."""
    print_table(
        f"{name}, ratios",
        ["", "p50", "p99", "p99, 90 % of redraws"],
        [
            [
                f"{ratio.kind} / {ratio.of}",
                f"{ratio.p50:.2f}",
                f"{ratio.p99:.2f}",
                f"{ratio.p99_low:.2f} to {ratio.p99_high:.2f}",
            ]
            for ratio in ratios
        ],
    )
