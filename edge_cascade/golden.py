"""Does this runtime, on this processor, compute what the builder's did? No I/O."""

from __future__ import annotations

import numpy as np

from edge_cascade.bundle import Bundle
from edge_cascade.ladder import OpenStage
from edge_cascade.policy import SAMPLE, Plan, Precision
from edge_cascade.preprocess import normalise
from edge_cascade.scores import LABEL


def golden_errors(bundle: Bundle, plan: Plan, open_stage: OpenStage) -> dict[Precision, float]:
    """The largest deviation of a probability or score from the bundle's golden outputs, by precision.

    A label that differs counts only through its probabilities: two classes that tie may swap. NaN anywhere
    gives infinity.

    Raises:
        BackendError: when a stage does not run.
    """
    x = normalise(bundle.golden_inputs, bundle.graph.preprocess)
    features = {SAMPLE: x}
    worst: dict[Precision, float] = {}
    for index, rung in enumerate(plan.rungs):
        runner = open_stage(
            bundle.stage_models[rung.stage, rung.precision], bundle.graph.stages[rung.stage].feature_shape
        )
        made, head = runner.run_batch(features[rung.feeds_from], rung.temperature)
        if made is not None:
            features[index] = made
        difference = np.abs(head - bundle.golden_outputs[f"{plan.name}/{index}"])[:, LABEL + 1 :]
        error = float(difference.max()) if np.isfinite(difference).all() else float("inf")
        worst[rung.precision] = max(worst.get(rung.precision, 0.0), error)
    return worst
