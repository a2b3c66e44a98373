"""Runs a bundle's stages on the pool that calibration sets are drawn from: logits, before any temperature."""

from __future__ import annotations

import numpy as np

from benchmarks.cascade.draws import Pool, PoolLadder
from cloud_hub.builder.assemble import ladder_steps
from cloud_hub.builder.calibration.outcomes import Floats, Labels
from cloud_hub.builder.collect import Step, chunks, full_labels, in_chunks, received
from cloud_hub.builder.graphs.stages import logits_model_of
from edge_cascade.backends.onnx import OnnxStage, open_whole_model
from edge_cascade.bundle import Bundle
from edge_cascade.policy import SAMPLE, Precision, Rung
from edge_cascade.preprocess import normalise


def pool_of(bundle: Bundle, full: bytes, x: Floats, y: Labels) -> Pool:
    """All the ladders that a build tries, on samples `(n, *input_shape)` in the sensor's unit."""
    graph = bundle.graph
    board = normalise(x, graph.preprocess)
    ladders = tuple(
        PoolLadder(
            name,
            tuple(Rung(*step, 1.0, graph.stages[step[0]].mult_adds) for step in steps),
            _climbed(bundle, board, steps),
        )
        for name, steps in ladder_steps(len(graph.stages)).items()
    )
    return Pool(ladders, full_labels(full, received(x, graph.preprocess, graph.wire)), y)


def _climbed(bundle: Bundle, board: Floats, steps: tuple[Step, ...]) -> Floats:
    """Every rung's logits `(rungs, n, classes)`."""
    features: list[Floats | None] = []
    logits = []
    for stage, precision, feeds_from in steps:
        given = board if feeds_from == SAMPLE else features[feeds_from]
        assert given is not None  # only the last stage has no features, and it feeds nothing
        model = bundle.stage_models[stage, precision]
        logits.append(in_chunks(open_whole_model(logits_model_of(model.model, model.weights)), given))
        features.append(_features(bundle, stage, precision, given))
    return np.stack(logits)


def _features(bundle: Bundle, stage: int, precision: Precision, given: Floats) -> Floats | None:
    shape = bundle.graph.stages[stage].feature_shape
    if shape is None:
        return None
    runner = OnnxStage(bundle.stage_models[stage, precision], shape)
    parts = (runner.run_batch(chunk, 1.0)[0] for chunk in chunks(given))
    return np.concatenate([part for part in parts if part is not None])
