"""What a plan does on a set of samples: accuracy, who answers, bytes, work, its certificates. No I/O."""

from __future__ import annotations

from typing import Literal

import msgspec
import numpy as np

from cloud_hub.builder.calibration.outcomes import Walk, walk
from cloud_hub.builder.reports.recheck import Check, check_certificate
from cloud_hub.builder.reports.traffic import (
    PlanRun,
    Sender,
    Traffic,
    all_deflated_traffic,
    all_raw_traffic,
    cascade_traffic,
    natural_dtype,
    one_by_one_traffic,
)
from cloud_hub.errors import BuildError
from edge_cascade.policy import Precision
from edge_cascade.scores import LABEL

Reference = Literal["true labels", "full model"]
Way = Literal["cascade", "all_deflated", "one_by_one", "all_raw"]


class RungFigures(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One rung. `accuracy` if it answered every sample; `answers` the share of samples that it does answer.

    `answered_accuracy` is that of these, None where there are none. `mult_adds` and `cost_us` are of this
    rung alone, `mult_adds_so_far` of the rungs up to it.
    """

    rung: int
    stage: int
    precision: Precision
    mult_adds: int
    mult_adds_so_far: int
    cost_us: float | None
    accuracy: float
    answers: float
    answered_accuracy: float | None


class UplinkFigures(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the cascade sends, beside three ways of sending everything; `raw_dtype` is the last one's.

    `bytes_up` is each way's mean a sample (MQTT 5), `saved` the share of it that the cascade does not send;
    both go by the names of the four fields above them.
    """

    cascade: Traffic
    all_deflated: Traffic
    one_by_one: Traffic
    all_raw: Traffic
    raw_dtype: str
    bytes_up: dict[Way, float]
    saved: dict[Way, float]


class Evaluation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One operating point on one data set. Shares are in 0..1, `mult_adds` a mean over samples.

    Accuracies are against `reference`: without true labels they are agreement with the full model, and
    `full_accuracy` is 1 by definition. `network_mult_adds` is every stage of the board's network, once, and
    `compute_share` the one over the other.
    """

    model: str
    bundle_id: str
    plan: str
    point: int
    certified_point: int
    samples: int
    reference: Reference
    full_accuracy: float
    edge_accuracy: float
    cascade_accuracy: float
    agreement: float
    upload_share: float
    mult_adds: float
    network_mult_adds: int
    compute_share: float
    rungs: tuple[RungFigures, ...]
    uplink: UplinkFigures
    checks: tuple[Check, ...]


def work_share(mult_adds: float, whole: int) -> float:
    """The one over the other; all of it for a network without multiply-adds, such as naive Bayes."""
    return mult_adds / whole if whole else 1.0


def evaluate(run: PlanRun, point: int, sender: Sender) -> Evaluation:
    """Measure a plan at one of its points.

    Raises:
        BuildError: when the plan has no such point, or there are no samples.
    """
    plan, outcomes = run.plan, run.outcomes
    if not 0 <= point < len(plan.points):
        raise BuildError(f"plan {plan.name!r} has points 0 to {len(plan.points) - 1}, not {point}")
    if not len(outcomes):
        raise BuildError("no samples to evaluate: the data set is empty")
    walked = walk(outcomes, plan.rungs, plan.score, plan.points[point].max_score)
    checks = (
        check_certificate(certificate, outcomes, walked)
        for certificate in run.bundle.weights.certificates
        if certificate.plan == plan.name and point <= certificate.last_point
    )
    network_mult_adds = sum(stage.mult_adds for stage in run.bundle.graph.stages)
    mult_adds = float(walked.mult_adds.mean())
    return Evaluation(
        model=run.bundle.graph.model,
        bundle_id=run.bundle.bundle_id,
        plan=plan.name,
        point=point,
        certified_point=run.bundle.certified_point(plan),
        samples=len(outcomes),
        reference="full model" if outcomes.labels is None else "true labels",
        full_accuracy=outcomes.full_accuracy,
        edge_accuracy=outcomes.rung_accuracy[-1],
        cascade_accuracy=float(np.mean(walked.label == outcomes.reference)),
        agreement=float(np.mean(walked.label == outcomes.full_labels)),
        upload_share=float(walked.escalated.mean()),
        mult_adds=mult_adds,
        network_mult_adds=network_mult_adds,
        compute_share=work_share(mult_adds, network_mult_adds),
        rungs=rung_figures(run, walked),
        uplink=uplink_figures(run, walked, sender, point=point),
        checks=tuple(check for check in checks if check is not None),
    )


def uplink_figures(run: PlanRun, walked: Walk, sender: Sender, *, point: int) -> UplinkFigures:
    """What is sent of the samples of `run`, by the cascade and by those who send everything."""
    raw = natural_dtype(run.x)
    ways: dict[Way, Traffic] = {
        "cascade": cascade_traffic(run, walked, sender, point=point),
        "all_deflated": all_deflated_traffic(run, sender),
        "one_by_one": one_by_one_traffic(run.x, run.bundle.graph.wire, sender),
        "all_raw": all_raw_traffic(raw, sender),
    }
    return UplinkFigures(
        **ways,
        raw_dtype=raw.dtype.name,
        bytes_up={way: traffic.up / len(run.x) for way, traffic in ways.items()},
        saved={
            way: 1.0 - ways["cascade"].up / traffic.up for way, traffic in ways.items() if way != "cascade"
        },
    )


def rung_figures(run: PlanRun, walked: Walk) -> tuple[RungFigures, ...]:
    """Every rung's cost, accuracy and share of the answers."""
    plan, outcomes = run.plan, run.outcomes
    figures = []
    so_far = 0
    for index, rung in enumerate(plan.rungs):
        so_far += rung.mult_adds
        right = outcomes.heads[index, :, LABEL] == outcomes.reference
        answered = walked.rung == index
        figures.append(
            RungFigures(
                rung=index,
                stage=rung.stage,
                precision=rung.precision,
                mult_adds=rung.mult_adds,
                mult_adds_so_far=so_far,
                cost_us=rung.cost_us,
                accuracy=float(right.mean()),
                answers=float(answered.mean()),
                answered_accuracy=float(right[answered].mean()) if answered.any() else None,
            )
        )
    return tuple(figures)
