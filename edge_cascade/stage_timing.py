"""A bundle's stages as things to time, each on real features of the stage before it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_cascade.bundle import Bundle, StageModel
from edge_cascade.ladder import OpenStage
from edge_cascade.policy import Plan, Precision
from edge_cascade.preprocess import normalise
from edge_cascade.profile import Pace, StageCost
from edge_cascade.timing import Case, Timing


class StageKey(NamedTuple):
    """Which stage at which precision."""

    stage: int
    precision: Precision


def runnable_stages(bundle: Bundle, runtime: str) -> list[StageKey]:
    """What the runtime has files for; LiteRT's are there only if the bundle was built with them."""
    return [
        StageKey(stage, precision)
        for (stage, precision), model in sorted(bundle.stage_models.items())
        if runtime == "onnxruntime" or model.litert is not None
    ]


def runnable_plans(bundle: Bundle, runtime: str) -> list[Plan]:
    """The plans whose every rung the runtime has a file for."""
    there = set(runnable_stages(bundle, runtime))
    return [
        plan
        for plan in bundle.weights.plans
        if all(StageKey(rung.stage, rung.precision) in there for rung in plan.rungs)
    ]


def runnable_cases(bundle: Bundle, runtime: str, open_stage: OpenStage) -> list[Case[StageKey]]:
    """A case per stage and precision of a bundle that the runtime has files for, on a golden input.

    Raises:
        BackendError: when the runtime refuses a stage or fails in it.
    """
    models = {key: bundle.stage_models[key] for key in runnable_stages(bundle, runtime)}
    shapes = [stage.feature_shape for stage in bundle.graph.stages]
    x = normalise(bundle.golden_inputs[:1], bundle.graph.preprocess)
    return open_stage_cases(models, shapes, x, open_stage)


def open_stage_cases(
    models: Mapping[StageKey, StageModel],
    feature_shapes: Sequence[tuple[int, ...] | None],
    x: NDArray[np.float32],
    open_stage: OpenStage,
) -> list[Case[StageKey]]:
    """A case per stage and precision, bound to buffers that hold real features of `x` (1, *input_shape).

    A stage that no precision leads to is left out.

    Raises:
        BackendError: when the runtime refuses a stage or fails in it.
    """
    cases: list[Case[StageKey]] = []
    # By precision, what the stage in hand is given; a precision that a stage lacks takes another's features.
    given = {key.precision: x for key in models}
    for index, feature_shape in enumerate(feature_shapes):
        made: dict[Precision, NDArray[np.float32]] = {}
        for key in [key for key in models if key.stage == index]:
            runner = open_stage(models[key], feature_shape)
            source = np.array(given[key.precision], dtype=np.float32, order="C")
            cases.append(Case(key, runner.bind(source, 1.0).run))
            features, _ = runner.run_batch(source, 1.0)
            if features is not None:
                made[key.precision] = features
        if not made:
            break
        given = {precision: made.get(precision, next(iter(made.values()))) for precision in given}
    return cases


def stage_costs(
    bundle: Bundle, runtime: str, pace: Pace, timings: Iterable[tuple[StageKey, Timing]]
) -> list[StageCost]:
    """The timings as a profile holds them."""
    return [
        StageCost(
            model=bundle.graph.model,
            bundle_id=bundle.bundle_id,
            stage=key.stage,
            precision=key.precision,
            runtime=runtime,
            pace=pace,
            mult_adds=bundle.graph.stages[key.stage].mult_adds,
            p50_us=round(timing.p50_us, 3),
            p99_us=round(timing.p99_us, 3),
            samples=timing.samples,
        )
        for key, timing in timings
    ]
