"""What a plan costs by the measured time to its exits, and which plan this board should run. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from edge_cascade.ladder import Climb
from edge_cascade.policy import ACCEPT_ALL, ACCEPT_NONE, OperatingPoint, Plan

MIN_SAVING: Final = 0.05
"""A plan that saves less than this share of the time is not worth a change: it is within the noise."""

UPLOAD_SLACK: Final = 0.01
"""A recommended plan may upload at most this share of the samples more, by its own calibration."""


class PlanCost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A plan at one of its points: mean microseconds a sample, by the exit that each sample left at.

    `is_certified` says whether a promise holds at that point. `upload_share` is what the calibration expects,
    `escalated_share` what happened on the samples here.
    """

    plan: str
    point: int
    is_certified: bool
    tight_us: float
    paced_us: float
    mean_rungs: float
    upload_share: float
    escalated_share: float


class Recommendation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The plan to run on this board, by its paced cost, and why in one line."""

    plan: str
    reason: str


def with_exit_points(plan: Plan) -> Plan:
    """The plan with one point per rung, which climbs to that rung and accepts whatever it says."""
    last = len(plan.rungs) - 1
    points = tuple(
        OperatingPoint((ACCEPT_NONE,) * index + (ACCEPT_ALL,) * (last + 1 - index), 0.0, 0.0, 0.0)
        for index in range(last + 1)
    )
    return msgspec.structs.replace(plan, points=points, chosen=last)


def price_plan(
    plan: Plan,
    point: int,
    climbs: Sequence[Climb],
    *,
    tight_us: Sequence[float],
    paced_us: Sequence[float],
    certified_point: int,
) -> PlanCost:
    """What these samples cost in the mean; one that climbed to rung r took `tight_us[r]` or `paced_us[r]`.

    `certified_point` is the last point that the plan's certificate covers, -1 without one.
    """
    last = [len(climb.exits) - 1 for climb in climbs]
    return PlanCost(
        plan=plan.name,
        point=point,
        is_certified=point <= certified_point,
        tight_us=sum(tight_us[rung] for rung in last) / len(climbs),
        paced_us=sum(paced_us[rung] for rung in last) / len(climbs),
        mean_rungs=sum(last) / len(climbs) + 1.0,
        upload_share=plan.points[point].upload_share,
        escalated_share=sum(not climb.accepted for climb in climbs) / len(climbs),
    )


def recommend_plan(current: PlanCost, others: Sequence[PlanCost]) -> Recommendation:
    """The cheapest plan that uploads no more and promises no less than the current one.

    Speed alone would always prefer the shorter ladder, which saves microseconds here and costs uploads.
    """
    eligible = [
        cost
        for cost in others
        if cost.upload_share <= current.upload_share + UPLOAD_SLACK
        and (cost.is_certified or not current.is_certified)
    ]
    if not eligible:
        return Recommendation(current.plan, "no other plan uploads as little and promises as much")
    best = min(eligible, key=lambda cost: cost.paced_us)
    if best.paced_us > current.paced_us * (1.0 - MIN_SAVING):
        return Recommendation(
            current.plan,
            f"no plan that uploads as little saves {MIN_SAVING:.0%} "
            f"({best.plan}: {best.paced_us:.0f} us a sample, {current.plan}: {current.paced_us:.0f} us)",
        )
    return Recommendation(
        best.plan,
        f"{best.paced_us:.0f} us a sample instead of {current.paced_us:.0f} us ({current.plan}), "
        f"uploads {best.upload_share:.1%} instead of {current.upload_share:.1%}",
    )
