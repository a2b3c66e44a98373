"""What became of every virtual sample, and the report made of it. No I/O; times are arguments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from edge_daemon.simulate.learning import LearningReport


class AnswerView(msgspec.Struct, frozen=True):
    """The fields of an answer's JSON that a consumer on the site would use."""

    id: str
    label: str
    exit: int
    precision: str
    latency_us: int
    escalated: bool
    audited: bool
    bundle: str = ""


class VerdictView(msgspec.Struct, frozen=True):
    """The fields of a verdict's JSON."""

    id: str
    label: str | None


@dataclass(slots=True)
class Entry:
    """One sample: its true label, and what came back."""

    true_label: str
    answer: AnswerView | None = None
    last_answer: AnswerView | None = None
    """Another one only after a board was killed over the sample."""
    answered_s: float = 0.0
    repeated_answers: int = 0
    verdict: VerdictView | None = None
    verdict_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Counted:
    """Samples sent, answered, to be judged by the hub, and judged."""

    sent: int
    answered: int
    awaited_verdicts: int
    verdicts: int


@dataclass(slots=True)
class Ledger:
    """Entries by (device, sensor); a sensor of the simulation sends one sample and has a name of its own."""

    entries: dict[tuple[str, str], Entry] = field(default_factory=dict)
    answered: int = 0
    awaited_verdicts: int = 0
    verdicts: int = 0
    by_bundle: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Answers by device and bundle."""

    def sent(self, device: str, sensor: str, true_label: str) -> None:
        """A sample is about to be published."""
        self.entries[device, sensor] = Entry(true_label)

    def note_answer(self, device: str, sensor: str, answer: AnswerView, *, now_s: float) -> None:
        """An answer came; the first one counts."""
        entry = self.entries[device, sensor]
        entry.last_answer = answer
        if entry.answer is not None:
            entry.repeated_answers += 1
            return
        entry.answer, entry.answered_s = answer, now_s
        self.answered += 1
        self.by_bundle[device, answer.bundle] += 1
        self.awaited_verdicts += answer.escalated or answer.audited

    def note_verdict(self, device: str, sensor: str, verdict: VerdictView, *, now_s: float) -> None:
        """A verdict came; a repetition changes nothing."""
        entry = self.entries[device, sensor]
        if entry.verdict is None:
            entry.verdict_s = now_s
            self.verdicts += 1
        entry.verdict = verdict

    def counted(self) -> Counted:
        """How far it is."""
        return Counted(len(self.entries), self.answered, self.awaited_verdicts, self.verdicts)


class Accuracy(msgspec.Struct, frozen=True):
    """Shares of right labels over all answered samples.

    `edge`: the answer given at once. `cascade`: after verdicts replaced what they corrected. `cloud`: the
    full model on every sample, as it would have come off the wire.
    """

    edge: float
    cascade: float
    cloud: float


class Percentiles(msgspec.Struct, frozen=True):
    """Median and 99th percentile."""

    p50: float
    p99: float


class SimulationReport(msgspec.Struct, frozen=True):
    """What `--json` writes.

    `lost`: samples sent that were neither answered nor counted as shed, and cases that are neither in the hub
    nor in a drop counter. `duplicates`: cases that the hub holds more than once. `bytes_up` and `bytes_down`
    count payloads and topics at the MQTT level; `bytes_cloud_only` is the same count for sending every sample
    in the same batches and encoding. `learning` is what came of `--rounds`, null without.
    """

    model: str
    devices: int
    seconds: float
    samples: int
    answered_by_exit: dict[str, int]
    answered_by_precision: dict[str, int]
    escalated: int
    audited: int
    verdicts: int
    lost: int
    duplicates: int
    shed: int
    dropped: int
    redelivered: int
    bytes_up: int
    bytes_down: int
    bytes_cloud_only: int
    accuracy: Accuracy
    latency_us: Percentiles
    verdict_latency_ms: Percentiles
    broker: str
    learning: LearningReport | None = None


@dataclass(frozen=True, slots=True)
class Traffic:
    """Byte counts at the MQTT level."""

    bytes_up: int
    bytes_down: int
    bytes_cloud_only: int


@dataclass(frozen=True, slots=True)
class Keeping:
    """What devices and hub say they kept and gave up; the hub holds an id as often as it is listed."""

    hub_case_ids: Sequence[str]
    shed: int
    dropped: int
    redelivered: int


@dataclass(frozen=True, slots=True)
class Setting:
    """What was simulated."""

    model: str
    devices: int
    broker: str
    seconds: float


def make_report(
    ledger: Ledger,
    setting: Setting,
    traffic: Traffic,
    keeping: Keeping,
    cloud_labels: Mapping[tuple[str, str], str],
) -> SimulationReport:
    """The report of a finished run; `cloud_labels` is what the full model says of each sample."""
    answered = {key: entry for key, entry in ledger.entries.items() if entry.answer is not None}
    answers = [entry.answer for entry in answered.values() if entry.answer is not None]
    waits_ms = [
        (entry.verdict_s - entry.answered_s) * 1e3 for entry in answered.values() if entry.verdict is not None
    ]
    return SimulationReport(
        model=setting.model,
        devices=setting.devices,
        seconds=round(setting.seconds, 2),
        samples=len(ledger.entries),
        answered_by_exit=_counted(str(answer.exit) for answer in answers),
        answered_by_precision=_counted(answer.precision for answer in answers),
        escalated=sum(answer.escalated for answer in answers),
        audited=sum(answer.audited for answer in answers),
        verdicts=ledger.verdicts,
        lost=_count_lost(ledger, answers, keeping),
        duplicates=len(keeping.hub_case_ids) - len(set(keeping.hub_case_ids)),
        shed=keeping.shed,
        dropped=keeping.dropped,
        redelivered=keeping.redelivered,
        bytes_up=traffic.bytes_up,
        bytes_down=traffic.bytes_down,
        bytes_cloud_only=traffic.bytes_cloud_only,
        accuracy=_accuracy(answered, cloud_labels),
        latency_us=_percentiles([answer.latency_us for answer in answers]),
        verdict_latency_ms=_percentiles(waits_ms),
        broker=setting.broker,
    )


def _count_lost(ledger: Ledger, answers: Sequence[AnswerView], keeping: Keeping) -> int:
    unanswered = len(ledger.entries) - len(answers) - keeping.shed
    kept = set(keeping.hub_case_ids)
    missing = sum((answer.escalated or answer.audited) and answer.id not in kept for answer in answers)
    return max(unanswered, 0) + max(missing - keeping.dropped, 0)


def _accuracy(
    answered: Mapping[tuple[str, str], Entry], cloud_labels: Mapping[tuple[str, str], str]
) -> Accuracy:
    edge = cascade = cloud = 0
    for key, entry in answered.items():
        assert entry.answer is not None
        corrected = entry.verdict.label if entry.verdict is not None else entry.answer.label
        edge += entry.answer.label == entry.true_label
        cascade += corrected == entry.true_label
        cloud += cloud_labels[key] == entry.true_label
    total = max(len(answered), 1)
    return Accuracy(round(edge / total, 5), round(cascade / total, 5), round(cloud / total, 5))


def _counted(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


def _percentiles(values: Sequence[float]) -> Percentiles:
    if not values:
        return Percentiles(0.0, 0.0)
    p50, p99 = np.percentile(np.asarray(values, dtype=np.float64), [50, 99])
    return Percentiles(round(float(p50), 1), round(float(p99), 1))
