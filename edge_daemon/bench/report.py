"""What `edge-daemon bench` found, as one document."""

from __future__ import annotations

from typing import Final

import msgspec

from edge_cascade.policy import Precision
from edge_cascade.profile import Machine, StageCost
from edge_cascade.timing import Timing
from edge_daemon.bench.plans import PlanCost, Recommendation
from edge_daemon.bench.vitals import Rail, Temperature

VERSION: Final = 1


class GoldenCheck(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The largest deviation of a plan's golden outputs here; None: a NaN came out, or another shape."""

    plan: str
    precision: Precision
    deviation: float | None
    tolerance: float
    passes: bool


class Start(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Milliseconds: reading and checking the bundle, loading the runtime and opening the plan's sessions, the
    first answer.
    """

    read_ms: float
    open_ms: float
    first_answer_ms: float


class Memory(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Resident bytes of this process before the bundle was read, with the plan's sessions open, and at most;
    None: the kernel does not say.

    The peak is this command's, which opens more sessions than the daemon does.
    """

    before_bytes: int | None
    loaded_bytes: int | None
    peak_bytes: int | None


class RungCost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A rung's stage alone, and a sample's whole way to its answer (normalising and gates included).

    `answered_share` is the share of the samples that this rung accepted at the point in use.
    """

    rung: int
    stage: int
    precision: Precision
    alone_tight: Timing
    alone_paced: Timing
    to_exit_tight: Timing
    to_exit_paced: Timing
    answered_share: float


class PrecisionGain(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A stage's time in int8 divided by that in fp32: below 1, int8 pays."""

    stage: int
    tight: float
    paced: float


class PacedLadder(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The ladder at its operating point on samples that come at a rate."""

    rate_hz: float
    latency: Timing


class BenchReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything measured of one bundle on one board; empty `rails` or `temperatures`: not available."""

    version: int
    measured_at: str
    machine: Machine
    runtime: str
    model: str
    bundle_id: str
    plan: str
    point: int
    samples: int
    samples_source: str
    golden: tuple[GoldenCheck, ...]
    start: Start
    memory: Memory
    rungs: tuple[RungCost, ...]
    escalated_share: float
    samples_per_s: float
    paced: PacedLadder
    stages: tuple[StageCost, ...]
    gains: tuple[PrecisionGain, ...]
    plans: tuple[PlanCost, ...]
    recommended: Recommendation
    temperatures: tuple[Temperature, ...]
    rails: tuple[Rail, ...]

    @property
    def golden_passes(self) -> bool:
        """Whether this board computes what the builder did."""
        return all(check.passes for check in self.golden)


def encode_report(report: BenchReport) -> bytes:
    """The document as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n"
