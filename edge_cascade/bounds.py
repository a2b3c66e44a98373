"""Whether a weights part keeps to the bounds that its graph part sets. No I/O.

A graph part is signed offline, a weights part may be signed by a key that lives on the hub. Whoever steals
that key can make boards answer worse, but not make them sure of everything: thresholds, temperatures, what
is promised and the norm of the weights are held against what the offline keys have signed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from edge_cascade.manifest import Bounds, GraphManifest, WeightsManifest
from edge_cascade.policy import Plan

_FLOAT_PREFIX = "fp32/"


def bounds_problems(
    graph: GraphManifest, weights: WeightsManifest, tensors: Mapping[str, NDArray[np.generic]]
) -> list[str]:
    """What of a weights part leaves its graph's bounds, a line each; `tensors` are those of its blob."""
    bounds = graph.bounds
    problems = [problem for plan in weights.plans for problem in _plan_problems(plan, bounds)]
    problems += [
        f"the certificate of plan {each.plan!r} allows {each.epsilon:g}, the bound is {bounds.max_epsilon:g}"
        for each in weights.certificates
        # Written so that NaN fails as well.
        if not 0.0 < each.epsilon <= bounds.max_epsilon
    ]
    if bounds.max_weight_norm is not None:
        norm = weight_norm(tensors)
        if not norm <= bounds.max_weight_norm:
            problems.append(f"the weights' norm is {norm:g}, the bound is {bounds.max_weight_norm:g}")
    return problems


def weight_norm(tensors: Mapping[str, NDArray[np.generic]]) -> float:
    """The L2 norm over all float32 weights of a blob together."""
    return math.sqrt(
        sum(
            float(np.square(array.astype(np.float64)).sum())
            for name, array in tensors.items()
            if name.startswith(_FLOAT_PREFIX) and array.dtype.kind == "f"
        )
    )


def _plan_problems(plan: Plan, bounds: Bounds) -> list[str]:
    problems = []
    highest = max(plan.points[plan.chosen].max_score)
    if not highest <= bounds.max_accept_score:
        problems.append(
            f"plan {plan.name!r} accepts scores up to {highest:g}, the bound is {bounds.max_accept_score:g}"
        )
    for index, rung in enumerate(plan.rungs):
        if not bounds.min_temperature <= rung.temperature <= bounds.max_temperature:
            problems.append(
                f"rung {index} of plan {plan.name!r} has the temperature {rung.temperature:g}, "
                f"the bounds are {bounds.min_temperature:g} to {bounds.max_temperature:g}"
            )
    return problems
