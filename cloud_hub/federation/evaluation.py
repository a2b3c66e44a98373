"""What given weights answer, in fp32: labels of every exit of a bundle's network, and the loss. No files."""

from __future__ import annotations

import dataclasses
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cloud_hub.errors import ModelError
from edge_cascade.bundle import Bundle
from edge_cascade.preprocess import normalise
from edge_cascade.scores import LABEL
from edge_cascade.training import Examples, TrainStep, mean_loss, one_hot
from edge_cascade.weights import FloatArray, Weights

BATCH: Final = 64
# A temperature scales all logits of an exit alike: it changes no label.
_TEMPERATURE: Final = 1.0

LOSS_GROUPS: Final = 512
"""A train step costs more than an answer: beyond so many samples neighbours share one."""


def labels_of_exits(bundle: Bundle, weights: Weights, x: FloatArray) -> NDArray[np.int64]:
    """Labels `(exits, n) int64` that the network with these weights gives to `x` (n, *input_shape).

    `x` is in the sensor's unit. Weights that the mapping lacks are the bundle's.

    Raises:
        ModelError: when a stage is there in int8 alone.
        BackendError: with the runtime's own words.
    """
    # Only a hub that judges pays for the runtime's memory.
    from edge_cascade.backends.onnx import OnnxStage

    stages: list[OnnxStage] = []
    for index, stage in enumerate(bundle.graph.stages):
        model = bundle.stage_models.get((index, "fp32"))
        if model is None:
            raise ModelError(f"model {bundle.graph.model!r}: stage {index} is there in int8 alone")
        given = {name: weights.get(name, array) for name, array in model.weights.items()}
        stages.append(OnnxStage(dataclasses.replace(model, weights=given), stage.feature_shape))
    labels = np.zeros((len(stages), len(x)), np.int64)
    for start in range(0, len(x), BATCH):
        features: FloatArray | None = normalise(x[start : start + BATCH], bundle.graph.preprocess)
        for index, stage_session in enumerate(stages):
            assert features is not None, "only the last stage has no features"
            features, head = stage_session.run_batch(features, _TEMPERATURE)
            labels[index, start : start + BATCH] = head[:, LABEL].astype(np.int64)
    return labels


def losses_of(bundle: Bundle, weights: Weights, x: FloatArray, labels: NDArray[np.int64]) -> FloatArray:
    """Losses `(groups,)` over all exits of `x` (n, *input_shape), in the sensor's unit, for true `labels`.

    Raises:
        BackendError: with the runtime's own words.
    """
    from edge_cascade.backends.onnx import OnnxTrainStep

    assert bundle.train_step is not None, "without one no series is started"
    examples = Examples(
        normalise(x, bundle.graph.preprocess),
        one_hot(labels, len(bundle.graph.labels)),
        np.ones(len(x), np.float32),
    )
    return group_losses(OnnxTrainStep(bundle.train_step), weights, examples)


def group_losses(step: TrainStep, weights: Weights, examples: Examples) -> FloatArray:
    """The mean loss of each group of neighbours, of one sample where there are few: `(groups,)`.

    Raises:
        BackendError: with the runtime's own words.
    """
    size = -(-len(examples) // LOSS_GROUPS)
    groups = [np.arange(start, min(start + size, len(examples))) for start in range(0, len(examples), size)]
    # A reading each, that begins anew: weights that are not finite would stay so in what the step keeps.
    losses = [mean_loss(step, weights, examples.take(group), batch_size=size) for group in groups]
    return np.asarray(losses, np.float32)
