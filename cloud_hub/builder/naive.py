"""A bundle whose plans are fitted to the calibration data and promise nothing beyond it.

For tests and benchmarks, whose networks need not be good, and for data too small for a certificate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cloud_hub.builder.assemble import (
    BUNDLE,
    Content,
    Declaration,
    Policy,
    cut_network,
    ladder_steps,
    write_model,
)
from cloud_hub.builder.calibration.certify import MeasuredLadder
from cloud_hub.builder.calibration.naive_plan import cheapest_within, make_plan, select_paying
from cloud_hub.builder.calibration.outcomes import Floats, Labels, Outcomes, joined
from cloud_hub.builder.calibration.track import Chain, follow
from cloud_hub.builder.collect import StageRuns, full_labels, received
from cloud_hub.builder.graphs.staged import StagedGraph
from edge_cascade.policy import Plan
from edge_cascade.preprocess import normalise


@dataclass(frozen=True, slots=True)
class Calibration:
    """Samples that trained nothing, in the sensor's unit: `x` (n, *input_shape) float32, `y` (n,) int64."""

    x: Floats
    y: Labels


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What was built. Accuracies are on the calibration data; `rung_accuracy` by plan name, rung by rung."""

    bundle_id: str
    directory: Path
    plans: tuple[Plan, ...]
    default_plan: str
    full_accuracy: float
    rung_accuracy: Mapping[str, tuple[float, ...]]


def naive_policy(ladders: Sequence[MeasuredLadder], epsilon: float) -> Policy:
    """The plans of measured ladders, fitted to all of the calibration data."""
    plans, default_plan = select_paying(
        [make_plan(each.name, each.rungs, joined(each.optimise, each.test), epsilon) for each in ladders]
    )
    return Policy(tuple(plans), default_plan)


def choose_naive(plan: Plan, ladder: MeasuredLadder, epsilon: float) -> tuple[float, ...]:
    """The thresholds of the plan's own chain that cost at most epsilon on the calibration data, untested."""
    outcomes = joined(ladder.optimise, ladder.test)
    chain = Chain(plan.rungs, plan.score, np.array([point.max_score for point in plan.points]))
    return plan.points[cheapest_within(epsilon, outcomes)(follow(chain, outcomes))].max_score


def build_naive_bundle(
    staged: StagedGraph,
    declaration: Declaration,
    *,
    full: bytes,
    representative: Floats,
    calibration: Calibration,
    out: Path,
) -> BuildReport:
    """Quantise, cut, fit thresholds and write `out/bundle` and `out/full.onnx`."""
    stages = cut_network(staged, representative, declaration).stages
    x = calibration.x
    runs = StageRuns(stages, normalise(x, declaration.preprocess))
    answers = full_labels(full, received(x, declaration.preprocess, declaration.wire))
    made = {}
    for name, steps in ladder_steps(staged.stages).items():
        rungs, heads = runs.calibrate(steps, calibration.y, np.arange(len(x)))
        outcomes = Outcomes(heads, answers, calibration.y)
        made[name] = (make_plan(name, rungs, outcomes), outcomes)
    plans, default_plan = select_paying([plan for plan, _ in made.values()])
    policy = Policy(tuple(plans), default_plan)
    bundle_id = write_model(out, Content(declaration, stages, policy, full, calibration.x))
    return BuildReport(
        bundle_id=bundle_id,
        directory=out / BUNDLE,
        plans=policy.plans,
        default_plan=default_plan,
        full_accuracy=float(np.mean(answers == calibration.y)),
        rung_accuracy={name: outcomes.rung_accuracy for name, (_, outcomes) in made.items()},
    )
