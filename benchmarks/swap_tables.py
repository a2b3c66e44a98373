"""What `benchmarks.swap` measured, what follows from it, and the tables that it prints. No I/O but the tables."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import Spread, print_table, spread_of

WINDOW_S: Final = 0.5
"""A flip's window: so long before the new bundle's first answer, and after."""
OUTSIDE: Final = "outside"
FLIP: Final = "flip, 0.5 s before to 0.5 s after"
ATTEMPT: Final = "from the wish to the commit"
_REDRAWS: Final = 500


@dataclass(slots=True)
class Answers:
    """Every answer in the order of arrival: when its sample was sent, how long it took, by which bundle."""

    sent_s: array[float] = field(default_factory=lambda: array("d"))
    took_us: array[float] = field(default_factory=lambda: array("d"))
    bundle: array[int] = field(default_factory=lambda: array("b"))
    mixed: int = 0
    """Neither bundle's own output, or of a third bundle."""
    deviation: float = 0.0
    """The most that one probability was away from what its bundle says alone."""


@dataclass(frozen=True, slots=True)
class Swap:
    """One attempt. Seconds as in `Answers`; `failure` is empty where it committed."""

    bundle: int
    wished_s: float
    ended_s: float
    rss_bytes: int
    failure: str


@dataclass(frozen=True, slots=True)
class Row:
    """All samples that were sent in one kind of time. Latencies in us.

    `p99_own`: each swap's p99 beside that of the time outside which followed it, the median over the swaps. On
    a machine that others keep busy it says more than the pooled one, which their worst moments decide.
    """

    kind: str
    us: Spread
    p50_ratio: float
    p99_ratio: float
    p99_low: float
    p99_high: float
    p99_own: float


def rows_of(answers: Answers, swaps: Sequence[Swap]) -> list[Row]:
    """The samples around flips and of whole attempts, beside all others.

    A ratio is that of the pooled samples; its range is the middle 90 % of redraws of whole swaps, each with
    the time outside that followed it.
    """
    sent_s = np.frombuffer(answers.sent_s)
    took_us = np.frombuffer(answers.took_us)
    cycle = np.searchsorted([swap.wished_s for swap in swaps], sent_s, side="right") - 1
    is_attempt = np.zeros(len(sent_s), bool)
    is_flip = np.zeros(len(sent_s), bool)
    for index, flip_s in enumerate(flips_of(answers, swaps)):
        swap = swaps[index]
        last_s = max(swap.ended_s, flip_s + WINDOW_S)
        is_attempt |= (sent_s >= swap.wished_s) & (sent_s <= last_s)
        is_flip |= np.abs(sent_s - flip_s) <= WINDOW_S
    # What came before the first wish belongs to no swap, and to the time outside.
    kinds = {OUTSIDE: ~is_attempt, FLIP: is_flip, ATTEMPT: is_attempt}
    pieces = {
        kind: [took_us[chosen & (cycle == index)] for index in range(len(swaps))]
        for kind, chosen in kinds.items()
    }
    outside = spread_of(took_us[kinds[OUTSIDE]])
    rows = []
    for kind, chosen in kinds.items():
        us = spread_of(took_us[chosen])
        low, high = _range(pieces[kind], pieces[OUTSIDE])
        rows.append(
            Row(
                kind,
                us,
                us.p50 / outside.p50,
                us.p99 / outside.p99,
                low,
                high,
                _own(pieces[kind], pieces[OUTSIDE]),
            )
        )
    return rows


def flips_of(answers: Answers, swaps: Sequence[Swap]) -> list[float]:
    """When the sample was sent that each new bundle answered first; NaN where it never answered."""
    sent_s = np.frombuffer(answers.sent_s)
    bundle = np.frombuffer(answers.bundle, np.int8)
    found = []
    for swap in swaps:
        is_first = (sent_s >= swap.wished_s) & (sent_s <= swap.ended_s) & (bundle == swap.bundle)
        found.append(float(sent_s[is_first][0]) if is_first.any() else float("nan"))
    return found


def print_rows(title: str, rows: Sequence[Row]) -> None:
    """Latencies by kind of time."""
    print_table(
        title,
        [
            "samples sent",
            "count",
            "p50, ms",
            "p99, ms",
            "p50 / outside",
            "p99 / outside",
            "90 % of redraws",
            "of each, median",
        ],
        [
            [
                row.kind,
                str(row.us.count),
                f"{row.us.p50 / 1e3:.2f}",
                f"{row.us.p99 / 1e3:.2f}",
                f"{row.p50_ratio:.2f}",
                f"{row.p99_ratio:.2f}",
                f"{row.p99_low:.2f} to {row.p99_high:.2f}",
                f"{row.p99_own:.2f}",
            ]
            for row in rows
        ],
    )


def print_memory(before_bytes: int, swaps: Sequence[Swap]) -> None:
    """What the process held after so many swaps."""
    shown = [index for index in (1, 2, 10, 50, 100) if index <= len(swaps)]
    print_table(
        "resident memory of the daemon, MiB",
        ["before", *(f"after {index}" for index in shown)],
        [
            [
                f"{before_bytes / 2**20:.1f}",
                *(
                    f"{swaps[index - 1].rss_bytes / 2**20:.1f} ({swaps[index - 1].rss_bytes / before_bytes:.2f})"
                    for index in shown
                ),
            ]
        ],
    )


def _own(pieces: Sequence[NDArray[np.float64]], outside: Sequence[NDArray[np.float64]]) -> float:
    both = [(one, other) for one, other in zip(pieces, outside, strict=True) if len(one) and len(other)]
    if not both:
        return float("nan")
    return float(np.median([np.percentile(one, 99) / np.percentile(other, 99) for one, other in both]))


def _range(
    pieces: Sequence[NDArray[np.float64]], outside: Sequence[NDArray[np.float64]]
) -> tuple[float, float]:
    rng = np.random.default_rng(0)
    redrawn = []
    for _ in range(_REDRAWS):
        drawn = rng.integers(0, len(pieces), len(pieces))
        above, below = (np.concatenate([each[i] for i in drawn]) for each in (pieces, outside))
        if len(above) and len(below):
            redrawn.append(np.percentile(above, 99) / np.percentile(below, 99))
    low, high = np.percentile(redrawn, (5, 95)) if redrawn else (np.nan, np.nan)
    return float(low), float(high)
