"""Ladders, plans, operating points and certificates as values. No I/O; nothing here decides (see `gate`).

A plan is climbed rung by rung. Each rung runs one stage at one precision on the sample itself or on the
features of an earlier rung, so "int8 first, the last stage again in fp32" is one more rung, no special case.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from edge_cascade.errors import BundleError
from edge_cascade.scores import ScoreName

Precision = Literal["fp32", "int8"]

SAMPLE: Final = -1
"""`Rung.feeds_from` of a rung that runs on the sample itself."""

ACCEPT_ALL: Final = 1.0
"""A `max_score` at which a rung accepts whatever it says, agreement or not."""

ACCEPT_NONE: Final = -1.0
"""A `max_score` that no score in 0..1 can meet."""

MAX_RUNGS: Final = 16


class Rung(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One (stage, precision) and the rung whose features feed it.

    `temperature` divides this rung's logits. `must_agree` lets the rung accept only a label that the rung
    climbed before it gave as well. `mult_adds` are those of this rung alone; `cost_us` is what one sample
    took, in microseconds (median), where a profile says so.
    """

    stage: int
    precision: Precision
    feeds_from: int
    temperature: float
    mult_adds: int
    must_agree: bool = False
    cost_us: float | None = None


class OperatingPoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One `max_score` per rung, with what calibration expects of it (shares in 0..1).

    `mult_adds` is the mean over samples. `accuracy` counts an escalated sample as the full model's answer.
    """

    max_score: tuple[float, ...]
    upload_share: float
    accuracy: float
    mult_adds: float


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A ladder with its chain of operating points, from "escalate all" (first) to "escalate nothing" (last).

    `chosen` is the index of the point in use. `method` says how it was found: `naive` fits the calibration
    data and promises nothing; `certified` has a certificate.
    """

    name: str
    score: ScoreName
    rungs: tuple[Rung, ...]
    points: tuple[OperatingPoint, ...]
    chosen: int
    method: Literal["naive", "certified"]


class Certificate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """With confidence 1 - `delta`, the device's own answers at or before `last_point` cost at most `epsilon`.

    `loss`: it answers, is wrong, and the full model is right. `disagreement`: it answers differently from
    the full model. Holds for data like the `samples` calibration samples, in `groups` independent groups,
    whose digest is `data_sha256`. `upload_share` and `mult_adds` (mean a sample) are what `last_point` cost
    on them.
    """

    kind: Literal["loss", "disagreement"]
    plan: str
    epsilon: float
    delta: float
    samples: int
    groups: int
    method: Literal["binomial", "betting"]
    data_sha256: str
    last_point: int
    upload_share: float
    mult_adds: float


def check_plan(plan: Plan, *, stages: int) -> None:
    """Refuse a plan that contradicts itself or the network of `stages` stages.

    Raises:
        BundleError: naming the plan, the rung or point, and what is wrong with it.
    """
    where = f"plan {plan.name!r}"
    if not 1 <= len(plan.rungs) <= MAX_RUNGS:
        raise BundleError(f"{where}: {len(plan.rungs)} rungs, expected 1 to {MAX_RUNGS}")
    for index, rung in enumerate(plan.rungs):
        _check_rung(plan.rungs, index, rung, stages=stages, where=f"{where}, rung {index}")
    if not plan.points:
        raise BundleError(f"{where}: no operating points")
    for index, point in enumerate(plan.points):
        _check_point(point, rungs=len(plan.rungs), where=f"{where}, point {index}")
    if not 0 <= plan.chosen < len(plan.points):
        raise BundleError(f"{where}: chosen point {plan.chosen} is not one of its {len(plan.points)} points")


def _check_rung(rungs: tuple[Rung, ...], index: int, rung: Rung, *, stages: int, where: str) -> None:
    if not 0 <= rung.stage < stages:
        raise BundleError(f"{where}: stage {rung.stage} does not exist, the network has {stages}")
    if not 1e-3 <= rung.temperature <= 1e3:
        raise BundleError(f"{where}: temperature {rung.temperature} outside 0.001..1000")
    if rung.feeds_from == SAMPLE:
        if rung.stage != 0:
            raise BundleError(
                f"{where}: stage {rung.stage} cannot run on the sample itself, only stage 0 can"
            )
        return
    if not 0 <= rung.feeds_from < index:
        raise BundleError(f"{where}: fed by rung {rung.feeds_from}, which is not climbed before it")
    if rungs[rung.feeds_from].stage != rung.stage - 1:
        raise BundleError(
            f"{where}: stage {rung.stage} needs the features of stage {rung.stage - 1}, "
            f"rung {rung.feeds_from} gives those of stage {rungs[rung.feeds_from].stage}"
        )


def _check_point(point: OperatingPoint, *, rungs: int, where: str) -> None:
    if len(point.max_score) != rungs:
        raise BundleError(f"{where}: {len(point.max_score)} thresholds for {rungs} rungs")
    for rung, max_score in enumerate(point.max_score):
        # Written so that NaN fails as well.
        if not ACCEPT_NONE <= max_score <= ACCEPT_ALL:
            raise BundleError(f"{where}: threshold {max_score} of rung {rung} outside -1..1")
