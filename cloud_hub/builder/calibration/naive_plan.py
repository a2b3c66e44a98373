"""The plan that fits the calibration data and promises nothing beyond it. No I/O.

Certified plans are made in `certify`. This one is for data too small for any certificate, and it is what
certified plans are compared with: it is chosen and judged on the same samples (docs/adr/0012 says how often
that goes wrong).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from cloud_hub.builder.calibration import paying
from cloud_hub.builder.calibration.chain import ChoosePoint, optimised_chain
from cloud_hub.builder.calibration.outcomes import Outcomes
from cloud_hub.builder.calibration.track import Track, follow, operating_points, risk_if_answered
from edge_cascade.policy import Plan, Rung

MAX_LOSS: Final = 0.005
"""Risk that a naive plan's chosen point may have on the calibration data, unless said otherwise."""


def make_plan(name: str, rungs: Sequence[Rung], outcomes: Outcomes, epsilon: float = MAX_LOSS) -> Plan:
    """The naive plan of a ladder: it uploads least at a risk of at most `epsilon` on these very samples.

    The risk is the loss where the truth is known, else the disagreement. Nothing is tested.
    """
    choose = cheapest_within(epsilon, outcomes)
    chain = optimised_chain(rungs, outcomes, choose)
    return Plan(
        name=name,
        score=chain.score,
        rungs=chain.rungs,
        points=operating_points(chain, outcomes),
        chosen=choose(follow(chain, outcomes)),
        method="naive",
    )


def cheapest_within(epsilon: float, outcomes: Outcomes) -> ChoosePoint:
    """Chooses the last point whose risk on `outcomes` is at most `epsilon`: later points upload no more."""
    risk = risk_if_answered(outcomes)

    def choose(track: Track) -> int:
        # The first point escalates everything and loses nothing, so one always qualifies.
        return int(np.flatnonzero(track.totals(risk, 0.0) <= epsilon * len(outcomes))[-1])

    return choose


def select_paying(plans: Sequence[Plan]) -> tuple[list[Plan], str]:
    """The naive plans that pay, and the name of the default; the first is the one that others must beat."""
    uploads = [plan.points[plan.chosen].upload_share for plan in plans]
    kept = [plans[index] for index in paying.select_paying([plan.rungs for plan in plans], uploads)]
    return kept, paying.select_default(kept, [None] * len(kept))
