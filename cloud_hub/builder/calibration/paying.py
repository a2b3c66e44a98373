"""Which plans are worth having, and which of them is the default. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from edge_cascade.policy import Plan, Rung

CLOSE_RELATIVE: Final = 0.1
CLOSE_ABSOLUTE: Final = 0.002
"""Uploads that differ by less than a tenth, or by 0.2 points, are not worth another plan."""


def select_paying(ladders: Sequence[Sequence[Rung]], upload_shares: Sequence[float]) -> list[int]:
    """The places of the ladders that pay; the first is the one that others must beat.

    A ladder that mixes the first one's precision with another climbs higher than the first, and is kept if
    that saves uploads. One that never uses the first's precision is kept always: which precision is faster
    is for each board to measure.
    """
    own = ladders[0][0].precision
    return [
        index
        for index, (ladder, upload) in enumerate(zip(ladders, upload_shares, strict=True))
        if index == 0 or own not in {rung.precision for rung in ladder} or is_less(upload, upload_shares[0])
    ]


def select_default(plans: Sequence[Plan], costs_us: Sequence[float | None]) -> str:
    """The name of the plan that a device uses if nobody chooses.

    Of the plans that upload about as little as the least at their chosen points: the cheapest, where every
    one's mean cost of a sample is known (`costs_us`), else the first.
    """
    least = min(_upload(plan) for plan in plans)
    close = [index for index, plan in enumerate(plans) if not is_less(least, _upload(plan))]
    known = [(cost, index) for index in close if (cost := costs_us[index]) is not None]
    return plans[min(known)[1] if len(known) == len(close) else close[0]].name


def is_less(upload_share: float, other: float) -> bool:
    """Whether one upload share is less than another by enough to matter."""
    return other - upload_share > max(CLOSE_RELATIVE * upload_share, CLOSE_ABSOLUTE)


def _upload(plan: Plan) -> float:
    return plan.points[plan.chosen].upload_share
