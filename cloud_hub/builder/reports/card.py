"""A bundle's card: what it does, what it promises, what it costs. `Card` is also what `report.json` holds.

Figures are made here; words, pages, plots and files in the modules beside it, `card_text` and so on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec
import numpy as np

from cloud_hub.builder.calibration.outcomes import Outcomes, walk
from cloud_hub.builder.reports.evaluate import Evaluation, Reference, evaluate
from cloud_hub.builder.reports.traffic import PlanRun, Sender, cascade_traffic
from edge_cascade.policy import Certificate, OperatingPoint, Precision
from edge_cascade.scores import LABEL, PROBABILITY

FORMAT: Final = 1

BINS: Final = 10
CURVE_POINTS: Final = 24
"""Of a long chain so many points are measured, evenly chosen: each costs a pass over what is sent."""


class CurvePoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one choice of thresholds does; `bytes_up` and `mult_adds` are means a sample."""

    upload_share: float
    accuracy: float
    bytes_up: float
    mult_adds: float
    point: int | None = None


class Bin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Answers whose probability lies in one tenth of 0..1: their mean probability and how many are right."""

    confidence: float
    accuracy: float
    samples: int


class Reliability(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whether a rung's probabilities mean what they say; `ece` is the expected calibration error in 0..1."""

    rung: int
    ece: float
    bins: tuple[Bin, ...]


class DataPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of the data and what it was used for."""

    name: str
    samples: int
    groups: int | None = None
    sha256: str | None = None


class StageTime(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Median microseconds of one sample in one stage, on the machine that built the bundle."""

    stage: int
    precision: Precision
    us: float


class TradeRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a promise of `epsilon` would cost; `upload_share` None where the data are too few for it."""

    epsilon: float
    upload_share: float | None
    mult_adds: float | None = None


class Card(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that the card shows. `made_by` names how the network was made, for people to read.

    `evaluation`, `curve`, `reliability` and the single points were measured on `measured_on`.
    """

    format: int
    version: str
    labels: tuple[str, ...]
    input_shape: tuple[int, ...]
    encoding: str
    full_model_sha256: str
    reference: Reference
    measured_on: str
    evaluation: Evaluation
    certificates: tuple[Certificate, ...]
    curve: tuple[CurvePoint, ...]
    cloud_only: CurvePoint
    edge_only: CurvePoint
    naive: CurvePoint | None
    reliability: tuple[Reliability, ...]
    trade: tuple[TradeRow, ...]
    data: tuple[DataPart, ...]
    made_by: dict[str, str]
    stage_times: tuple[StageTime, ...] = ()


@dataclass(frozen=True, slots=True)
class Provenance:
    """What only the build knows. `naive` holds the thresholds that an untested choice would have taken.

    With `held_out` the samples measured had no part in the build; only such can be held against certificates.
    """

    measured_on: str
    held_out: bool = False
    data: Sequence[DataPart] = ()
    naive: Sequence[float] | None = None
    trade: Sequence[TradeRow] = ()
    made_by: Mapping[str, str] = field(default_factory=dict)
    stage_times: Sequence[StageTime] = ()


def make_card(run: PlanRun, provenance: Provenance, sender: Sender | None = None) -> Card:
    """The card of a bundle's plan at its chosen point, measured on the samples of `run`.

    Raises:
        BuildError: when there are no samples.
    """
    sender = Sender() if sender is None else sender
    graph, plan, outcomes = run.bundle.graph, run.plan, run.outcomes
    evaluation = evaluate(run, plan.chosen, sender)
    if not provenance.held_out:
        evaluation = msgspec.structs.replace(evaluation, checks=())
    whole = float(sum(rung.mult_adds for rung in plan.rungs))
    return Card(
        format=FORMAT,
        version=graph.version,
        labels=graph.labels,
        input_shape=graph.input_shape,
        encoding=graph.wire.encoding,
        full_model_sha256=graph.full_model_sha256,
        reference=evaluation.reference,
        measured_on=provenance.measured_on,
        evaluation=evaluation,
        certificates=run.bundle.weights.certificates,
        curve=tuple(
            measure_thresholds(run, plan.points[point].max_score, sender, point=point)
            for point in select_curve_points(plan.points, plan.chosen)
        ),
        # All that a board without a network does is send.
        cloud_only=CurvePoint(
            upload_share=1.0,
            accuracy=evaluation.full_accuracy,
            bytes_up=evaluation.uplink.bytes_up["all_deflated"],
            mult_adds=0.0,
        ),
        edge_only=CurvePoint(
            upload_share=0.0, accuracy=evaluation.edge_accuracy, bytes_up=0.0, mult_adds=whole
        ),
        naive=None if provenance.naive is None else measure_thresholds(run, provenance.naive, sender),
        reliability=tuple(reliability_of(outcomes, rung) for rung in range(len(plan.rungs))),
        trade=tuple(provenance.trade),
        data=tuple(provenance.data),
        made_by=dict(provenance.made_by),
        stage_times=tuple(provenance.stage_times),
    )


def measure_thresholds(
    run: PlanRun, max_score: Sequence[float], sender: Sender, *, point: int | None = None
) -> CurvePoint:
    """What thresholds, those of a point or any others, do on the samples of `run`."""
    walked = walk(run.outcomes, run.plan.rungs, run.plan.score, max_score)
    return CurvePoint(
        upload_share=float(walked.escalated.mean()),
        accuracy=float(np.mean(walked.label == run.outcomes.reference)),
        bytes_up=cascade_traffic(run, walked, sender, point=point).up / len(run.outcomes),
        mult_adds=float(walked.mult_adds.mean()),
        point=point,
    )


def select_curve_points(points: Sequence[OperatingPoint], chosen: int) -> list[int]:
    """At most `CURVE_POINTS` indices of a chain, evenly spread, first, last and chosen among them."""
    spread = np.linspace(0, len(points) - 1, min(CURVE_POINTS - 1, len(points)))
    return sorted({*np.rint(spread).astype(int).tolist(), chosen})


def reliability_of(outcomes: Outcomes, rung: int) -> Reliability:
    """A rung's probabilities held against the reference (Guo et al. 2017, arXiv 1706.04599, section 2)."""
    head = outcomes.heads[rung]
    confidence = np.nan_to_num(head[:, PROBABILITY].astype(np.float64))
    right = head[:, LABEL] == outcomes.reference
    places = np.minimum((confidence * BINS).astype(int), BINS - 1)
    bins = []
    for place in range(BINS):
        inside = places == place
        if inside.any():
            bins.append(Bin(float(confidence[inside].mean()), float(right[inside].mean()), int(inside.sum())))
    ece = sum(each.samples * abs(each.confidence - each.accuracy) for each in bins) / len(outcomes)
    return Reliability(rung, ece, tuple(bins))
