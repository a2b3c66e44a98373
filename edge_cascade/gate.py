"""When to leave the network early. No I/O; the thresholds come from the operating point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from edge_cascade.policy import ACCEPT_ALL


@dataclass(frozen=True, slots=True)
class Accept:
    """This exit's answer is good enough."""


@dataclass(frozen=True, slots=True)
class Continue:
    """Climb the next rung."""


@dataclass(frozen=True, slots=True)
class Escalate:
    """The last rung is still unsure: the hub decides."""


Decision = Accept | Continue | Escalate

ACCEPT = Accept()
CONTINUE = Continue()
ESCALATE = Escalate()


class Exit(msgspec.Struct, frozen=True):
    """What one rung said: the label's index, its probability, and the plan's score (0 certain, 1 lost)."""

    rung: int
    label: int
    probability: float
    score: float


def decide_exit(
    score: float, label: int, *, max_score: float, earlier_label: int | None, is_last: bool
) -> Decision:
    """Accept, continue or escalate after one rung.

    `earlier_label` is the label that this one must agree with, None where agreement is not asked for. A
    score that is NaN is never accepted, not even at `ACCEPT_ALL`.
    """
    if score <= max_score and (earlier_label is None or earlier_label == label or max_score >= ACCEPT_ALL):
        return ACCEPT
    return ESCALATE if is_last else CONTINUE


def select_most_reliable(exits: Sequence[Exit]) -> Exit:
    """The exit to answer with when none was accepted: the highest calibrated probability, the later on a tie.

    Probabilities of different rungs compare because each rung has its own calibrated temperature; recalling
    the best exit seen is optimal among stopping rules (arXiv 2509.22992). An exit with a NaN comes last.
    """
    return max(
        exits,
        key=lambda exit_: (exit_.probability if exit_.probability == exit_.probability else -1.0, exit_.rung),
    )
