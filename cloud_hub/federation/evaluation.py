"""What given weights answer: the label of every exit of a bundle's network, in fp32. No files."""

from __future__ import annotations

import dataclasses
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cloud_hub.errors import ModelError
from edge_cascade.bundle import Bundle
from edge_cascade.preprocess import normalise
from edge_cascade.scores import LABEL
from edge_cascade.weights import FloatArray, Weights

BATCH: Final = 64
# A temperature scales all logits of an exit alike: it changes no label.
_TEMPERATURE: Final = 1.0


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
