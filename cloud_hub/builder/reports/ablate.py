"""What each part of the cascade contributes: one switched off at a time, all at the same guarantee. No I/O.

Every variant gets its own chain on one half of the data, and its operating point from the certificate's own
test on the other (`certify`): the last point of a fixed sequence that passes at epsilon and delta. So rows
differ in what the same promise costs. Each row is tested alone, at the whole of delta; a bundle of K plans
shares it. Halves are drawn several times, because one draw says little about a difference of a point.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Final, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from cloud_hub.builder.calibration.chain import (
    AGREEMENTS,
    SCORES,
    MakeChain,
    chain_of_one_threshold,
    chain_of_thresholds,
    optimised_chain,
)
from cloud_hub.builder.calibration.naive_plan import cheapest_within
from cloud_hub.builder.calibration.outcomes import Outcomes, disagreements, losses, walk
from cloud_hub.builder.calibration.p_values import last_passed, units_needed
from cloud_hub.builder.calibration.track import Chain, follow, risk_if_answered
from cloud_hub.builder.calibration.units import Units, expected_to_pass, lossless, measure, units_of
from cloud_hub.builder.reports.evaluate import work_share
from cloud_hub.builder.reports.traffic import PlanRun, Sender, cascade_traffic
from cloud_hub.errors import CertificateError
from edge_cascade.policy import ACCEPT_NONE, Rung
from edge_cascade.scores import ScoreName

AS_BUILT: Final = "as built"
SPLITS: Final = 5

Rows = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Variant:
    """A cascade to compare: its rungs, what they said of every sample, and what may be chosen.

    `agreements` are the agreement rules to choose from. With `is_tested` False the point is the last whose
    loss on the first half is within epsilon: the choice without a certificate.
    """

    name: str
    rungs: tuple[Rung, ...]
    outcomes: Outcomes
    make_chain: MakeChain = chain_of_thresholds
    scores: tuple[ScoreName, ...] = SCORES
    agreements: tuple[bool, ...] = AGREEMENTS
    is_tested: bool = True


class AblationRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One variant on the halves that tested it: means over the draws, `upload_range` the least and the most.

    `bytes_up` is per sample, `risk` the share of samples that cost something, `compute_share` of the whole
    network of the bundle. `score` and `must_agree` are the choices of the first draw.
    """

    name: str
    is_tested: bool
    score: ScoreName
    must_agree: bool
    upload_share: float
    upload_range: tuple[float, float]
    accuracy: float
    risk: float
    compute_share: float
    bytes_up: float


class Ablation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All rows, `as built` first. `samples` are those of the half that tests."""

    model: str
    bundle_id: str
    plan: str
    kind: Literal["loss", "disagreement"]
    epsilon: float
    delta: float
    samples: int
    splits: int
    rows: tuple[AblationRow, ...]


@dataclass(frozen=True, slots=True)
class Promise:
    """What every row has to keep, and on how many draws of halves it is compared."""

    epsilon: float
    delta: float
    splits: int = SPLITS
    seed: int = 0


def standard_variants(
    run: PlanRun,
    *,
    other_plans: Mapping[str, tuple[tuple[Rung, ...], Outcomes]],
    uncalibrated: Outcomes,
    variants: Mapping[str, Outcomes],
) -> list[Variant]:
    """One variant per part that can be switched off, for the ladder of `run`.

    `other_plans` are the bundle's other ladders on the same samples, `uncalibrated` this ladder at
    temperature 1, and `variants` what other networks with the same ladder say, such as one trained without
    distillation.
    """
    built = Variant(AS_BUILT, run.plan.rungs, run.outcomes)
    plain = tuple(msgspec.structs.replace(rung, temperature=1.0) for rung in built.rungs)
    found = [built]
    if len(built.rungs) > 1:
        found += [
            replace(built, name="no early exit", make_chain=chain_of_last_rung, agreements=(False,)),
            replace(built, name="one threshold for all rungs", make_chain=chain_of_one_threshold),
            replace(built, name="agreement never asked for", agreements=(False,)),
            replace(built, name="agreement always asked for", agreements=(True,)),
        ]
    found += [replace(built, name=f"score {score}", scores=(score,)) for score in SCORES]
    found.append(replace(built, name="no temperatures", rungs=plain, outcomes=uncalibrated))
    for name, (rungs, outcomes) in other_plans.items():
        found.append(Variant(f"plan {name}", rungs, outcomes))
    found += [replace(built, name=name, outcomes=outcomes) for name, outcomes in variants.items()]
    found.append(replace(built, name="no test: promises nothing", is_tested=False))
    return found


def ablate(run: PlanRun, variants: Sequence[Variant], promise: Promise, sender: Sender) -> Ablation:
    """Compare variants on the samples of `run`.

    Raises:
        CertificateError: when half of the samples is too few for the promise even without a loss.
    """
    draws = list(_halves(run.outcomes, promise))
    for _, tested in draws:
        _require_enough(run.outcomes.rows(tested), promise)
    whole = sum(stage.mult_adds for stage in run.bundle.graph.stages)
    return Ablation(
        model=run.bundle.graph.model,
        bundle_id=run.bundle.bundle_id,
        plan=run.plan.name,
        kind="disagreement" if run.outcomes.labels is None else "loss",
        epsilon=promise.epsilon,
        delta=promise.delta,
        samples=len(draws[0][1]),
        splits=promise.splits,
        rows=tuple(
            _row([_measured(run, variant, halves, promise, sender) for halves in draws], variant, whole)
            for variant in variants
        ),
    )


def chain_of_last_rung(rungs: Sequence[Rung], score: ScoreName, outcomes: Outcomes) -> Chain:
    """As `chain_of_thresholds`, but every rung is climbed and only the last may answer."""
    work = sum(rung.mult_adds for rung in rungs)
    costs = [rung.cost_us for rung in rungs if rung.cost_us is not None]
    cost_us = sum(costs) if len(costs) == len(rungs) else None
    whole = msgspec.structs.replace(rungs[-1], mult_adds=work, cost_us=cost_us, must_agree=False)
    alone = chain_of_thresholds([whole], score, replace(outcomes, heads=outcomes.heads[-1:]))
    limits = np.full((len(alone), len(rungs)), ACCEPT_NONE)
    limits[:, -1] = alone.max_scores[:, 0]
    return Chain(tuple(rungs), score, limits)


@dataclass(frozen=True, slots=True)
class _Measured:
    chain: Chain
    upload_share: float
    accuracy: float
    risk: float
    mult_adds: float
    bytes_up: float


def _measured(
    run: PlanRun, variant: Variant, halves: tuple[Rows, Rows], promise: Promise, sender: Sender
) -> _Measured:
    first, second = variant.outcomes.rows(halves[0]), variant.outcomes.rows(halves[1])
    chain = _chosen_chain(variant, first, units_of(second), promise)
    if variant.is_tested:
        lost = measure(follow(chain, second), risk_if_answered(second), units_of(second))
        point = last_passed(lost.p_values(promise.epsilon), promise.delta)
    else:
        point = cheapest_within(promise.epsilon, first)(follow(chain, first))
    walked = walk(second, chain.rungs, chain.score, chain.max_scores[point].tolist())
    cost = disagreements if second.labels is None else losses
    plan = msgspec.structs.replace(run.plan, score=chain.score, rungs=chain.rungs)
    traffic = cascade_traffic(PlanRun(run.bundle, plan, run.x[halves[1]], second), walked, sender)
    return _Measured(
        chain=chain,
        upload_share=float(walked.escalated.mean()),
        accuracy=float(np.mean(walked.label == second.reference)),
        risk=float(cost(second, walked).mean()),
        mult_adds=float(walked.mult_adds.mean()),
        bytes_up=traffic.up / len(second),
    )


def _chosen_chain(variant: Variant, first: Outcomes, tested: Units, promise: Promise) -> Chain:
    """Of the chains that the variant may choose from, the one expected to cost least where it is certified.

    Only `first` is looked at; of the half that tests no more than how many units it has.
    """
    choose = (
        expected_to_pass(first, tested, promise.epsilon, promise.delta)
        if variant.is_tested
        else cheapest_within(promise.epsilon, first)
    )
    return optimised_chain(
        variant.rungs,
        first,
        choose,
        make=variant.make_chain,
        scores=variant.scores,
        agreements=variant.agreements,
    )


def _halves(outcomes: Outcomes, promise: Promise) -> Iterator[tuple[Rows, Rows]]:
    """Draws of two halves that share no group: the one chooses, the other tests."""
    units = units_of(outcomes)
    rng = np.random.default_rng(promise.seed)
    for _ in range(promise.splits):
        chooses = np.zeros(len(units), bool)
        chooses[rng.permutation(len(units))[: len(units) // 2]] = True
        yield np.flatnonzero(chooses[units.index]), np.flatnonzero(~chooses[units.index])


def _require_enough(tested: Outcomes, promise: Promise) -> None:
    units = units_of(tested)
    if lossless(units).p_values(promise.epsilon)[0] <= promise.delta:
        return
    needed = units_needed(promise.epsilon, promise.delta, units.method)
    what = "samples" if units.method == "binomial" else "groups of one size"
    raise CertificateError(
        f"too little data to compare at epsilon {promise.epsilon:g} and delta {promise.delta:g}: the half "
        f"that tests needs at least {needed} {what}, it has {int(units.full_size)}; give more than twice "
        "that, or a larger --epsilon"
    )


def _row(measured: Sequence[_Measured], variant: Variant, whole: int) -> AblationRow:
    uploads = [each.upload_share for each in measured]
    first = measured[0].chain
    return AblationRow(
        name=variant.name,
        is_tested=variant.is_tested,
        score=first.score,
        must_agree=any(rung.must_agree for rung in first.rungs),
        upload_share=fmean(uploads),
        upload_range=(min(uploads), max(uploads)),
        accuracy=fmean(each.accuracy for each in measured),
        risk=fmean(each.risk for each in measured),
        compute_share=work_share(fmean(each.mult_adds for each in measured), whole),
        bytes_up=fmean(each.bytes_up for each in measured),
    )
