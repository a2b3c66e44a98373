"""What `benchmarks.mqtt` measured, and the tables that it prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np

from benchmarks.harness import Spread, print_table, spread_of

Kind = Literal["raw", "json"]

LATENCY_RATE_HZ: Final = 200.0


@dataclass(frozen=True, slots=True)
class Held:
    """One step of the climb to the highest rate."""

    subject: str
    kind: Kind
    rate_hz: int
    offered_hz: float
    sent: int
    answered: int
    answered_hz: float
    shed: int
    unpublished: int
    repeated: int
    late: int
    cpu_us: float
    latency_us: Spread

    @property
    def unaccounted(self) -> int:
        """Neither answered nor counted by the device."""
        return self.sent - self.answered - self.shed - self.unpublished

    @property
    def is_held(self) -> bool:
        """Whether every sample was answered, and none much later than it came."""
        return self.answered == self.sent and self.late == 0


@dataclass(slots=True)
class Latency:
    """All answers of one subject at the even pace."""

    subject: str
    kind: Kind
    us: list[float] = field(default_factory=list)
    lost: int = 0
    cpu_s: float = 0.0


def print_latencies(latencies: Sequence[Latency]) -> None:
    base = {each.kind: spread_of(each.us) for each in latencies if each.subject == "minimal"}
    rows = []
    for each in latencies:
        spread = spread_of(each.us)
        rows.append(
            [
                f"{each.subject}, {each.kind}",
                str(spread.count),
                str(each.lost),
                f"{spread.p50 / 1e3:.2f}",
                f"{spread.p99 / 1e3:.2f}",
                f"{spread.p50 / base[each.kind].p50:.2f}",
                f"{spread.p99 / base[each.kind].p99:.2f}",
                f"{each.cpu_s / len(each.us) * 1e6:.0f}",
            ]
        )
    print_table(
        f"At {LATENCY_RATE_HZ:g} samples/s, milliseconds from message in to result out",
        ["", "samples", "lost", "p50", "p99", "p50 / minimal", "p99 / minimal", "CPU us/sample"],
        rows,
    )


def print_steps(steps: Sequence[Held]) -> None:
    groups: dict[tuple[str, Kind, int], list[Held]] = {}
    for step in steps:
        groups.setdefault((step.kind, step.subject, step.rate_hz), []).append(step)  # type: ignore[index]
    rows = []
    for (kind, subject, rate_hz), group in sorted(groups.items()):
        rows.append(
            [
                f"{subject}, {kind}, {rate_hz}/s",
                f"{np.median([step.offered_hz for step in group]):.0f}",
                f"{sum(step.is_held for step in group)} of {len(group)}",
                f"{np.median([step.answered_hz for step in group]):.0f}",
                str(sum(step.sent for step in group)),
                str(sum(step.answered for step in group)),
                str(sum(step.late for step in group)),
                str(sum(step.shed for step in group)),
                str(sum(step.unpublished for step in group)),
                str(sum(step.unaccounted for step in group)),
                f"{np.median([step.latency_us.p50 for step in group]) / 1e3:.1f}",
                f"{np.median([step.cpu_us for step in group]):.0f}",
            ]
        )
    print_table(
        "The highest rate that loses nothing",
        [
            *("", "offered/s", "held", "answered/s", "sent", "answered", "late", "shed", "unpublished"),
            *("unaccounted", "p50 ms", "CPU us"),
        ],
        rows,
    )
