"""sample -> ladder -> decision -> an answer at once, and a case where the hub is to see it. No I/O.

One thread owns a pipeline, as it owns the ladder's buffers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_cascade.bundle import Bundle
from edge_cascade.burst import Burst
from edge_cascade.errors import BackendError
from edge_cascade.gate import Exit
from edge_cascade.ladder import Climb, Ladder
from edge_cascade.messages import Case, Reason
from edge_cascade.packing import pack_exits
from edge_cascade.tensors import encode_tensor
from edge_daemon.audit import AuditCoin

log = logging.getLogger(__name__)

Array = NDArray[np.float32]


# What is made per sample is a Struct: a frozen dataclass takes four times as long to make.
class Sample(msgspec.Struct, frozen=True):
    """One model input `(*input_shape) float32` from one sensor.

    `received_s` is monotonic; `taken_at_ms` is the wall clock, for people to read.
    """

    sensor: str
    x: Array
    received_s: float
    taken_at_ms: int


class Answer(msgspec.Struct, frozen=True):
    """What leaves on `results/<sensor>`, as JSON. `id` is the key by which a verdict corrects it later.

    `deferred`: the gate was not satisfied and this is the most reliable exit seen. `uncertified`: no
    certificate covers the operating point. `exit` is the rung's index in the plan.
    """

    id: str
    sensor: str
    model: str
    label: str
    probability: float
    score: float
    exit: int
    stage: int
    precision: str
    bundle: str
    plan: str
    point: int
    latency_us: int
    escalated: bool
    audited: bool
    deferred: bool
    uncertified: bool
    taken_at_ms: int


class Outcome(msgspec.Struct, frozen=True):
    """Everything that becomes of one sample. Without a first rung there is no answer, only the case."""

    answer: Answer | None
    climb: Climb | None
    case: Case | None


class Pipeline:
    """One model at work: its bundle, its ladder, its audit coin."""

    def __init__(
        self,
        bundle: Bundle,
        ladder: Ladder,
        coin: AuditCoin,
        *,
        boot: bytes,
        next_seq: Callable[[], int],
        now_s: Callable[[], float],
        is_personal: bool = False,
    ) -> None:
        """`is_personal`: it answers with heads of this board's own."""
        self.is_personal = is_personal
        self.bundle = bundle
        self.ladder = ladder
        self.coin = coin
        self._boot = boot.hex()
        self._next_seq = next_seq
        self._now_s = now_s
        self._burst = Burst()
        self._labels = bundle.graph.labels
        self._model = bundle.graph.model
        self._wire = bundle.graph.wire
        self._certified_point = bundle.certified_point(ladder.plan)

    def process(self, sample: Sample) -> Outcome:
        """Answer one sample. Where not even the first rung runs, the hub is asked alone."""
        # Before the gate sees anything: the draw must not depend on the outcome.
        audit_probability = self.coin.throw(now_s=sample.received_s)
        try:
            climb = self.ladder.climb(sample.x)
        except BackendError as error:
            return self._give_up(sample, audit_probability, error)
        return self._conclude(sample, climb, audit_probability)

    def process_batch(self, samples: list[Sample]) -> list[Outcome]:
        """Answer several samples at once: fewer runtime calls where samples have queued up."""
        audits = [self.coin.throw(now_s=sample.received_s) for sample in samples]
        try:
            climbs = self.ladder.climb_batch(np.stack([sample.x for sample in samples]))
        except BackendError as error:
            return [
                self._give_up(sample, audit, error) for sample, audit in zip(samples, audits, strict=True)
            ]
        return [self._conclude(*each) for each in zip(samples, climbs, audits, strict=True)]

    def _conclude(self, sample: Sample, climb: Climb, audit_probability: float) -> Outcome:
        seq = self._next_seq()
        escalated = not climb.accepted
        audited = audit_probability > 0.0
        case = None
        if escalated or audited:
            reason = _reason(climb, audited=audited)
            case = self._case(sample, seq, climb.exits, audit_probability, reason, escalated=escalated)
        answer = self._answer(sample, seq, climb.answer, escalated=escalated, audited=audited)
        return Outcome(answer, climb, case)

    def _give_up(self, sample: Sample, audit_probability: float, error: BackendError) -> Outcome:
        kept_back = self._burst.note(now_s=self._now_s())
        if kept_back is not None:
            log.warning(
                "no answer sensor=%s model=%s kept_back=%d error=%s",
                sample.sensor, self._model, kept_back, error,
            )  # fmt: skip
        case = self._case(sample, self._next_seq(), (), audit_probability, Reason.FAILED, escalated=True)
        return Outcome(None, None, case)

    @property
    def _uncertified(self) -> bool:
        return self.ladder.point > self._certified_point

    def _case(
        self,
        sample: Sample,
        seq: int,
        exits: tuple[Exit, ...],
        audit_probability: float,
        reason: Reason,
        *,
        escalated: bool,
    ) -> Case:
        return Case(
            seq=seq,
            sensor=sample.sensor,
            taken_at_ms=sample.taken_at_ms,
            point=self.ladder.point,
            exits=pack_exits(exits),
            escalated=escalated,
            audit_ppm=max(round(audit_probability * 1e6), 1) if audit_probability > 0.0 else 0,
            reason=reason,
            deferred=escalated,
            uncertified=self._uncertified,
            tensor=encode_tensor(sample.x, self._wire),
        )

    def _answer(self, sample: Sample, seq: int, exit_: Exit, *, escalated: bool, audited: bool) -> Answer:
        plan, point = self.ladder.plan, self.ladder.point
        rung = plan.rungs[exit_.rung]
        # By position, in the order of the fields: eighteen names take as long as the rest of this.
        return Answer(
            f"{self._boot}-{seq}",
            sample.sensor,
            self._model,
            self._labels[exit_.label],
            # A NaN means that nothing is known.
            _rounded(exit_.probability) if exit_.probability >= 0.0 else 0.0,
            _rounded(exit_.score) if exit_.score >= 0.0 else 1.0,
            exit_.rung,
            rung.stage,
            rung.precision,
            self.bundle.bundle_id,
            plan.name,
            point,
            round((self._now_s() - sample.received_s) * 1e6),
            escalated,
            audited,
            escalated,  # deferred
            point > self._certified_point,
            sample.taken_at_ms,
        )


def _rounded(share: float) -> float:
    # `round(share, 6)` goes through text and takes five times as long.
    return round(min(share, 1.0) * 1e6) / 1e6


def _reason(climb: Climb, *, audited: bool) -> Reason:
    if climb.failed:
        return Reason.FAILED
    if climb.accepted:
        return Reason.AUDIT
    return Reason.UNSURE_AND_AUDIT if audited else Reason.UNSURE
