"""Thresholds and a certificate for new weights, from cases that the fleet has sent. No I/O.

A candidate promises what its base promises: kind, epsilon and delta are those of the base's default plan. The
truth is known of a case only where a person has labelled it, so a loss is certified only where people have
labelled every case of both parts; else what is certified is agreement with the full model, at the base's
epsilon of disagreement. A base that promises nothing is followed by a candidate that promises nothing.

No groups are named. Which samples were audited was decided by coins, thrown before anything saw them, so
among all samples that the fleet saw in that time the audited ones are drawn independently, whatever the
stream was like, and the promise is about that stream (drawn without replacement they are, if anything, closer
to it: Hoeffding 1963, section 6). Where boards audit at different rates, it counts in that proportion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from cloud_hub.builder.assemble import Policy
from cloud_hub.builder.calibration.certify import (
    Certified,
    MeasuredLadder,
    Targets,
    certify,
    expected_uploads,
)
from cloud_hub.builder.calibration.naive_plan import MAX_LOSS
from cloud_hub.builder.calibration.p_values import units_needed
from cloud_hub.builder.calibration.saving import check_saving
from cloud_hub.builder.collect import Stages, Step
from cloud_hub.builder.measure import Judged, measure_ladders
from cloud_hub.builder.naive import naive_policy
from cloud_hub.builder.samples.data import Dataset, data_sha256
from cloud_hub.candidates.outcome import Base
from cloud_hub.examples import UNKNOWN, LabelledCases
from edge_cascade.bundle import Bundle
from edge_cascade.policy import Precision
from edge_cascade.preprocess import normalise

_MOST_FORESEEN: Final = 2**20
_BATCH: Final = 64


@dataclass(frozen=True, slots=True)
class Promise:
    """What the base promises. `loss` is None where it was certified without knowing the truth."""

    disagreement: float
    loss: float | None
    delta: float


def promise_of(bundle: Bundle) -> Promise | None:
    """The certificates of a bundle's default plan as one promise, None where it has none."""
    found = {
        each.kind: each for each in bundle.weights.certificates if each.plan == bundle.weights.default_plan
    }
    if not found:
        return None
    loss = found.get("loss")
    disagreement = found.get("disagreement", loss)
    assert disagreement is not None
    return Promise(disagreement.epsilon, None if loss is None else loss.epsilon, disagreement.delta)


def targets_of(promise: Promise, *, truth_is_known: bool) -> Targets:
    """The promise as the tests take it."""
    if truth_is_known and promise.loss is not None:
        return Targets(promise.loss, promise.delta, promise.disagreement)
    return Targets(promise.disagreement, promise.delta)


def ladders_of(bundle: Bundle) -> dict[str, Sequence[Step]]:
    """The ladders of a bundle's plans, in their order."""
    return {
        plan.name: tuple((rung.stage, rung.precision, rung.feeds_from) for rung in plan.rungs)
        for plan in bundle.weights.plans
    }


def measured(
    base: Base, stages: Stages, optimise: LabelledCases, test: LabelledCases, *, truth_is_known: bool
) -> list[MeasuredLadder]:
    """The base's ladders with new stages on both parts.

    Raises:
        BackendError: when a stage or the full model does not run.
    """
    return measure_ladders(
        stages,
        ladders_of(base.bundle),
        _judged(base, optimise, truth_is_known=truth_is_known),
        _judged(base, test, truth_is_known=truth_is_known),
        costs=_costs_of(base.bundle),
    )


def samples_needed(targets: Targets, plans: int) -> int:
    """How many cases can certify anything: without a single loss that many would do."""
    smallest = min(targets.epsilon, targets.disagreement_epsilon or targets.epsilon)
    return units_needed(smallest, targets.delta / plans, "binomial")


def samples_worth_spending(ladders: Sequence[MeasuredLadder], targets: Targets, has: int) -> int:
    """How many cases it takes until the ladders are expected to answer anything, as they do on D_opt.

    At most `has` where `has` will do, else doubled from there: an estimate, from D_opt alone.
    """
    count = max(has, 1)
    while count < _MOST_FORESEEN:
        if min(expected_uploads(ladders, targets, samples=count)) < 1.0:
            break
        count *= 2
    return count


def certified(ladders: Sequence[MeasuredLadder], targets: Targets, test: LabelledCases) -> Certified:
    """Test what D_opt has chosen. This spends the cases of `test`: they certify nothing else.

    Raises:
        CertificateError: too few cases, or a promise that holds only if everything is sent.
    """
    data = Dataset(test.x, test.labels)
    made = certify(ladders, targets, data_sha256=data_sha256(data))
    check_saving(made, epsilon=targets.epsilon, max_upload=None)
    return made


def uncertified(ladders: Sequence[MeasuredLadder]) -> Policy:
    """Thresholds fitted to all that was measured, for a base that promises nothing."""
    return naive_policy(ladders, MAX_LOSS)


def _judged(base: Base, cases: LabelledCases, *, truth_is_known: bool) -> Judged:
    x = normalise(cases.x, base.bundle.graph.preprocess)
    said = cases.model_labels.copy()
    # A person who spoke first kept the full model from being asked.
    silent = np.flatnonzero(said == UNKNOWN)
    for start in range(0, len(silent), _BATCH):
        rows = silent[start : start + _BATCH]
        said[rows] = np.asarray(base.model.run(x[rows])).argmax(axis=1)
    return Judged(x, said, cases.labels if truth_is_known else None)


def _costs_of(bundle: Bundle) -> Mapping[tuple[int, Precision], float]:
    """What the base's plans say that stages take on the board: other weights take as long."""
    return {
        (rung.stage, rung.precision): rung.cost_us
        for plan in bundle.weights.plans
        for rung in plan.rungs
        if rung.cost_us is not None
    }
