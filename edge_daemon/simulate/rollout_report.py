"""What a rollout through a virtual fleet came to: caught or not, where, after how much, and why. No I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import msgspec

from edge_daemon.core.swap_events import Failure
from edge_daemon.simulate.ledger import Ledger
from edge_daemon.simulate.rollout_kinds import Kind

Catcher = Literal["", "trial", "probation", "quality", "health"]
"""Who stopped a release: a board in its trial or on probation, or the hub by quality or health."""

EXPECTED: Final[Mapping[Kind, Catcher]] = {
    "good": "",
    "bad": "quality",
    "crash": "probation",
    "slow": "trial",
    "drifted": "",
}
_REVERTED: Final = " reverted: "
_IN_TRIAL: Final = {Failure.GOLDEN, Failure.LATENCY, Failure.MEMORY}


class BoardView(msgspec.Struct, frozen=True):
    """What became of one board. `wave` is the index of the one that it belongs to."""

    name: str
    wave: int
    outcome: str
    reason: str
    starts: int
    shadow_pairs: int


class AnsweredBy(msgspec.Struct, frozen=True):
    """Samples that one bundle answered, and the share of right labels among them as the gate gave them."""

    samples: int
    accuracy: float


class RolloutReport(msgspec.Struct, frozen=True):
    """What `--json` writes.

    `drop` is by how much the release is worse than the shipped bundle, measured on `made_release.JUDGED`
    samples when it was made, 0..1. `stopped_in` is the wave that was open, `caught_by` who stopped it and
    `why` in the words of whoever did. `lost`: samples that nobody answered, and cases that the hub has not
    got, but for those that a counter has.
    """

    kind: Kind
    model: str
    devices: int
    broker: str
    seconds: float
    release: str
    drop: float
    phase: str
    stopped_in: str
    caught_by: Catcher
    why: str
    is_as_expected: bool
    quality: str
    health: list[str]
    samples: int
    answered: int
    lost: int
    by_release: AnsweredBy
    by_shipped: AnsweredBy
    boards: list[BoardView]
    history: list[str]


@dataclass(frozen=True, slots=True)
class Facts:
    """What a run leaves behind. `shown` is the rollout, `cases` all cases, as the hub's REST has them."""

    kind: Kind
    model: str
    broker: str
    seconds: float
    shipped: str
    release: str
    drop: float
    shown: Mapping[str, Any]
    boards: Sequence[BoardView]
    cases: Sequence[Mapping[str, Any]]
    shed: int
    dropped: int


def make_report(ledger: Ledger, facts: Facts) -> RolloutReport:
    """The report of a finished run."""
    about = facts.shown["rollout"]
    caught_by, why = _caught(facts)
    return RolloutReport(
        kind=facts.kind,
        model=facts.model,
        devices=len(facts.boards),
        broker=facts.broker,
        seconds=round(facts.seconds, 1),
        release=facts.release,
        drop=round(facts.drop, 4),
        phase=about["phase"],
        stopped_in=about["wave_name"] if about["phase"] == "halted" else "",
        caught_by=caught_by,
        why=why,
        is_as_expected=about["phase"] == ("halted" if EXPECTED[facts.kind] else "done")
        and caught_by == EXPECTED[facts.kind],
        quality=_quality(facts.shown),
        health=list(facts.shown["health"]),
        samples=len(ledger.entries),
        answered=ledger.answered,
        lost=_count_lost(ledger, facts),
        by_release=_answered_by(ledger, facts.release),
        by_shipped=_answered_by(ledger, facts.shipped),
        boards=list(facts.boards),
        history=[line["what"] for line in facts.shown["history"]],
    )


def _quality(shown: Mapping[str, Any]) -> str:
    """What the judge said last; of a release that went through, what the last wave that asked was told."""
    passed = [line["what"] for line in shown["history"] if line["what"].startswith("not worse")]
    return passed[-1] if passed and shown["rollout"]["phase"] == "done" else str(shown["quality"])


def _caught(facts: Facts) -> tuple[Catcher, str]:
    if facts.shown["rollout"]["phase"] != "halted":
        return "", ""
    halted = next(
        line["what"] for line in reversed(facts.shown["history"]) if line["what"].startswith("halted")
    )
    said = halted.removeprefix("halted: ")
    # The boards' own words: what became of them afterwards says nothing of it any more.
    failed = [line["what"] for line in facts.shown["history"] if _REVERTED in line["what"]]
    if failed and "devices failed" in said:
        failure = failed[0].partition(_REVERTED)[2].partition(":")[0]
        return ("trial" if failure in _IN_TRIAL else "probation"), f"{said}; {'; '.join(failed)}"
    return ("quality" if "pairs tell" in said else "health"), said


def _count_lost(ledger: Ledger, facts: Facts) -> int:
    """By sample, not by answer: a board that is killed answers what it had in hand a second time.

    The last answer counts. Of one that was out before its case was on disk nothing was promised: its message
    comes again, and the audit coin falls anew.
    """
    kept = {(case["device"], case["sensor"]) for case in facts.cases}
    unanswered = len(ledger.entries) - ledger.answered - facts.shed
    missing = sum(
        (last := entry.last_answer) is not None and (last.escalated or last.audited) and key not in kept
        for key, entry in ledger.entries.items()
    )
    return max(unanswered, 0) + max(missing - facts.dropped, 0)


def _answered_by(ledger: Ledger, bundle: str) -> AnsweredBy:
    rights = [
        entry.answer.label == entry.true_label
        for entry in ledger.entries.values()
        if entry.answer is not None and entry.answer.bundle == bundle
    ]
    return AnsweredBy(len(rights), round(sum(rights) / max(len(rights), 1), 4))
