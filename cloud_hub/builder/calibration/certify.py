"""Chains fixed on D_opt, tested on D_cal: the certificates of a bundle and its plans. No I/O.

The promise, for data like D_cal: with confidence 1 - delta, the device's own answers cost at most epsilon, at
the certified point of every plan at once. Each of K plans is tested at delta / K, each along its own chain.
The loss certificate and the disagreement certificate are two promises, each with its own delta.

Whatever is chosen (chains, scores, which plans are worth a share of delta, the epsilon of the disagreement)
is chosen on D_opt before D_cal is tested; of D_cal only its size, its groups, copies and which classes it
has are known by then. D_cal decides how far along its chain each plan may go, and so which plan is the
default: all of them hold at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from cloud_hub.builder.calibration.chain import optimised_chain
from cloud_hub.builder.calibration.outcomes import Outcomes
from cloud_hub.builder.calibration.outlook import Outlook
from cloud_hub.builder.calibration.p_values import last_passed, units_needed, upper_bounds
from cloud_hub.builder.calibration.paying import select_default, select_paying
from cloud_hub.builder.calibration.track import (
    Chain,
    disagreements_if_answered,
    follow,
    losses_if_answered,
    mean_costs,
    operating_points,
    risk_if_answered,
    upload_shares,
)
from cloud_hub.builder.calibration.units import Units, expected_to_pass, foresee, lossless, measure, units_of
from cloud_hub.errors import BuildError, CertificateError
from edge_cascade.policy import Certificate, Plan, Rung

Kind = Literal["loss", "disagreement"]

DISAGREEMENT_MARGIN: Final = 1.5
"""How much more disagreement than on D_opt the epsilon that is found there allows for."""

DISAGREEMENT_STEP: Final = 0.005


@dataclass(frozen=True, slots=True)
class MeasuredLadder:
    """A ladder with what its rungs said of D_opt (`optimise`) and of D_cal (`test`).

    All ladders of a build are measured on the same samples, in the same order.
    """

    name: str
    rungs: tuple[Rung, ...]
    optimise: Outcomes
    test: Outcomes


@dataclass(frozen=True, slots=True)
class Targets:
    """What is to be promised. `disagreement_epsilon` None: found on D_opt, see `certify`."""

    epsilon: float
    delta: float
    disagreement_epsilon: float | None = None


@dataclass(frozen=True, slots=True)
class Certified:
    """Plans in the order of their ladders, with their certificates, and what other promises would cost.

    `kind` is the promise that `chosen` rests on. `outlooks` has one entry per plan.
    """

    plans: tuple[Plan, ...]
    default_plan: str
    certificates: tuple[Certificate, ...]
    kind: Kind
    outlooks: tuple[Outlook, ...]

    @property
    def plan(self) -> Plan:
        """The default plan."""
        return next(plan for plan in self.plans if plan.name == self.default_plan)

    @property
    def outlook(self) -> Outlook:
        """The default plan's outlook."""
        return next(outlook for outlook in self.outlooks if outlook.plan == self.default_plan)

    @property
    def saves(self) -> bool:
        """Whether the default plan answers anything by itself. Certifying "escalate all" promises nothing."""
        return self.plan.points[self.plan.chosen].upload_share < 1.0


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A ladder with all that D_opt decides about it; `expected` is the point that will probably pass."""

    ladder: MeasuredLadder
    chain: Chain
    outlook: Outlook
    expected: int

    @property
    def expected_upload(self) -> float:
        return self.outlook.upload_shares[self.expected]


def certify(ladders: Sequence[MeasuredLadder], targets: Targets, *, data_sha256: str) -> Certified:
    """Certify the ladders that pay; the first is the one that others must beat.

    Where the truth is known the loss is certified at `targets.epsilon`, and the disagreement at
    `targets.disagreement_epsilon`; None stands for the smallest multiple of `DISAGREEMENT_STEP`, at least
    epsilon, at which `DISAGREEMENT_MARGIN` times the disagreement on D_opt is expected to pass as far as the
    loss is. Where the truth is not known the disagreement is certified at epsilon itself.

    `data_sha256` is the digest of D_cal. That only "escalate all" passes is no error: see `Certified.saves`.

    Raises:
        BuildError: targets out of range, or groups that are in both D_opt and D_cal.
        CertificateError: D_cal is too small for epsilon and delta even if nothing is lost.
    """
    _check(ladders, targets)
    units = units_of(ladders[0].test)
    candidates = _paying(ladders, targets, units)
    level = targets.delta / len(candidates)
    kind: Kind = "disagreement" if ladders[0].test.labels is None else "loss"
    promised = [targets.epsilon]
    if kind == "loss" and targets.disagreement_epsilon is not None:
        promised.append(targets.disagreement_epsilon)
    _require_enough(units, min(promised), targets.delta, len(candidates))

    plans, certificates, costs = [], [], []
    for candidate in candidates:
        epsilons = _epsilons(candidate, targets, level, units)
        issued = _test(candidate, epsilons, targets.delta, level, data_sha256)
        certificates += issued
        chosen = issued[0].last_point
        plans.append(_plan(candidate, chosen))
        costs.append(_cost_us(candidate, chosen))
    return Certified(
        plans=tuple(plans),
        default_plan=select_default(plans, costs),
        certificates=tuple(certificates),
        kind=kind,
        outlooks=tuple(candidate.outlook for candidate in candidates),
    )


def expected_uploads(
    ladders: Sequence[MeasuredLadder], targets: Targets, *, samples: int
) -> tuple[float, ...]:
    """What the ladders that pay are expected to upload if so many samples test them, from D_opt alone."""
    tested = Units(np.arange(samples), np.ones(samples))
    return tuple(candidate.expected_upload for candidate in _paying(ladders, targets, tested))


def _check(ladders: Sequence[MeasuredLadder], targets: Targets) -> None:
    if not ladders:
        raise ValueError("no ladders to certify")
    for name, value in (
        ("epsilon", targets.epsilon),
        ("delta", targets.delta),
        ("disagreement epsilon", targets.disagreement_epsilon),
    ):
        if value is not None and not 0.0 < value < 1.0:
            raise BuildError(f"{name} {value} is not between 0 and 1: give a share such as 0.005 for 0.5 %")
    optimise, test = ladders[0].optimise, ladders[0].test
    for ladder in ladders:
        if len(ladder.optimise) != len(optimise) or len(ladder.test) != len(test):
            raise ValueError(f"ladder {ladder.name!r} was measured on other samples than {ladders[0].name!r}")
    if not len(optimise) or not len(test):
        raise CertificateError("no samples to choose or to test thresholds on: give calibration data")
    if (optimise.labels is None) != (test.labels is None):
        raise BuildError(
            "one part of the calibration data has labels and the other has none: give both or none"
        )
    if optimise.groups is not None and test.groups is not None:
        shared = np.intersect1d(optimise.groups, test.groups)
        if len(shared):
            raise BuildError(
                f"{len(shared)} groups (the first: {shared[0]}) are in both parts of the calibration data: "
                "thresholds chosen on a group cannot be tested on it, split the data by groups"
            )


def _paying(ladders: Sequence[MeasuredLadder], targets: Targets, tested: Units) -> list[_Candidate]:
    """The ladders that are worth a share of delta, prepared for the share that they get."""
    level = targets.delta / len(ladders)
    candidates = [_prepare(ladder, targets.epsilon, level, tested) for ladder in ladders]
    uploads = [candidate.expected_upload for candidate in candidates]
    paying = select_paying([ladder.rungs for ladder in ladders], uploads)
    if len(paying) == len(ladders):
        return candidates
    level = targets.delta / len(paying)
    return [_prepare(ladders[index], targets.epsilon, level, tested) for index in paying]


def _prepare(ladder: MeasuredLadder, epsilon: float, level: float, tested: Units) -> _Candidate:
    outcomes = ladder.optimise
    choose = expected_to_pass(outcomes, tested, epsilon, level)
    chain = optimised_chain(ladder.rungs, outcomes, choose)
    track = follow(chain, outcomes)
    foreseen = foresee(track, risk_if_answered(outcomes), units_of(outcomes), tested)
    # A fixed sequence reaches a point only if it passed all the points before it.
    needed = np.maximum.accumulate(upper_bounds(foreseen, level))
    outlook = Outlook(
        plan=ladder.name,
        epsilons=tuple(needed.tolist()),
        upload_shares=tuple(upload_shares(track).tolist()),
        mult_adds=tuple(mean_costs(track, [rung.mult_adds for rung in chain.rungs]).tolist()),
    )
    return _Candidate(ladder, chain, outlook, choose(track))


def _require_enough(units: Units, epsilon: float, delta: float, plans: int) -> None:
    level = delta / plans
    best = lossless(units)
    if best.p_values(epsilon)[0] <= level:
        return
    needed = units_needed(epsilon, level, units.method)
    if units.method == "binomial":
        what, found = "samples", str(len(units))
    else:
        what = "groups of one size"
        found = f"{len(units)} groups, as good as {math.floor(units.full_size)} of the largest one's size"
    possible = math.ceil(float(upper_bounds(best, level)[0]) * 1e4) / 1e4
    count, fewer = (f"{plans} plans", ", fewer plans") if plans > 1 else ("1 plan", "")
    raise CertificateError(
        f"too little calibration data: epsilon {epsilon:g} at delta {delta:g} for {count} needs at "
        f"least {needed} {what} without a loss, there are {found}: give more data{fewer}, a larger delta, "
        f"or an epsilon above {possible:g}"
    )


def _epsilons(candidate: _Candidate, targets: Targets, level: float, tested: Units) -> dict[Kind, float]:
    """What is promised of a plan, the promise that its chosen point rests on first."""
    if candidate.ladder.optimise.labels is None:
        return {"disagreement": targets.epsilon}
    if targets.disagreement_epsilon is not None:
        return {"loss": targets.epsilon, "disagreement": targets.disagreement_epsilon}
    outcomes = candidate.ladder.optimise
    track = follow(candidate.chain, outcomes)
    disagreements = DISAGREEMENT_MARGIN * disagreements_if_answered(outcomes).astype(np.float64)
    foreseen = foresee(track, disagreements, units_of(outcomes), tested)
    needed = float(upper_bounds(foreseen, level)[: candidate.expected + 1].max())
    steps = math.ceil(max(needed, targets.epsilon) / DISAGREEMENT_STEP - 1e-9)
    return {
        "loss": targets.epsilon,
        "disagreement": max(round(steps * DISAGREEMENT_STEP, 4), targets.epsilon),
    }


def _test(
    candidate: _Candidate, epsilons: dict[Kind, float], delta: float, level: float, data_sha256: str
) -> list[Certificate]:
    """The only place where D_cal meets a chain."""
    outcomes = candidate.ladder.test
    units, track = units_of(outcomes), follow(candidate.chain, outcomes)
    points = operating_points(candidate.chain, outcomes)
    issued = []
    for kind, epsilon in epsilons.items():
        lost = losses_if_answered if kind == "loss" else disagreements_if_answered
        last = last_passed(measure(track, lost(outcomes), units).p_values(epsilon), level)
        issued.append(
            Certificate(
                kind=kind,
                plan=candidate.ladder.name,
                epsilon=epsilon,
                delta=delta,
                samples=len(outcomes),
                groups=len(units),
                method=units.method,
                data_sha256=data_sha256,
                last_point=last,
                upload_share=points[last].upload_share,
                mult_adds=points[last].mult_adds,
            )
        )
    return issued


def _plan(candidate: _Candidate, chosen: int) -> Plan:
    return Plan(
        name=candidate.ladder.name,
        score=candidate.chain.score,
        rungs=candidate.chain.rungs,
        points=operating_points(candidate.chain, candidate.ladder.test),
        chosen=chosen,
        method="certified",
    )


def _cost_us(candidate: _Candidate, point: int) -> float | None:
    """Microseconds that a sample of D_cal takes at a point, on average; None where no profile says so."""
    costs = [rung.cost_us for rung in candidate.chain.rungs if rung.cost_us is not None]
    if len(costs) < len(candidate.chain.rungs):
        return None
    return float(mean_costs(follow(candidate.chain, candidate.ladder.test), costs)[point])
