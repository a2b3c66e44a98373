"""A network as federation meets it: its train step, as a bundle would hold it, and what given weights answer. No files."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from cloud_hub.builder.graphs.staged import INPUT, StagedGraph, logits_name
from cloud_hub.builder.joined import train_step_of
from cloud_hub.builder.networks.export import export_staged
from cloud_hub.builder.networks.network import Network, fold_batch_norm, initial_parameters
from edge_cascade.backends.onnx import OnnxTrainStep
from edge_cascade.onnx_file import inspect_model
from edge_cascade.train_step import TrainStepModel, read_train_step
from edge_cascade.training import Examples, one_hot
from edge_cascade.weights import FloatArray, Weights

Labels = NDArray[np.int64]

_CHUNK = 256


@dataclass(frozen=True, slots=True, eq=False)
class Labelled:
    """Samples `x` (n, *input_shape) normalised, and their true labels `y` (n,)."""

    x: FloatArray
    y: Labels

    def __len__(self) -> int:
        return len(self.y)

    def rows(self, chosen: NDArray[Any]) -> Labelled:
        """Some of them, by index or mask."""
        return Labelled(self.x[chosen], self.y[chosen])

    def examples(self, classes: int) -> Examples:
        """To learn the true labels from, each of the same weight."""
        return Examples(self.x, one_hot(self.y, classes), np.ones(len(self.y), np.float32))


class Learner:
    """Trains and answers with any weights of one network, on one thread."""

    def __init__(self, network: Network) -> None:
        self.network = network
        staged = export_staged(network, initial_parameters(network, np.random.default_rng(0)))
        lesson = train_step_of(staged)
        self.model = read_step(lesson.model, network)
        self.step = OnnxTrainStep(self.model)
        self.head_parameters = lesson.head_parameters
        self._exits = [logits_name(index) for index in range(staged.stages)]
        self._session = _open(_answering(staged, self.model))

    def fresh(self, rng: np.random.Generator) -> dict[str, FloatArray]:
        """Weights that nothing has trained."""
        return fold_batch_norm(self.network, initial_parameters(self.network, rng))

    def logits(self, weights: Weights, x: FloatArray) -> FloatArray:
        """Of every exit `(exits, n, classes)` for normalised samples `(n, *input_shape)`."""
        parts = [
            np.stack(self._session.run(self._exits, {INPUT: x[start : start + _CHUNK], **weights}))
            for start in range(0, len(x), _CHUNK)
        ]
        return np.concatenate(parts, axis=1)

    def labels(self, weights: Weights, x: FloatArray) -> Labels:
        """Of every exit `(exits, n)`."""
        return np.asarray(self.logits(weights, x).argmax(axis=2), np.int64)

    def accuracy(self, weights: Weights, test: Labelled) -> float:
        """Of the last exit."""
        return float((self.labels(weights, test.x)[-1] == test.y).mean())


@cache
def learner_of(network: Network) -> Learner:
    """The one learner of this process for a network."""
    return Learner(network)


def read_step(model: bytes, network: Network) -> TrainStepModel:
    """The train step of a network, checked as a board checks it."""
    return read_train_step(
        model,
        inspect_model(model),
        input_shape=network.input_shape,
        classes=network.classes,
        where="train step",
    )


def _answering(staged: StagedGraph, step: TrainStepModel) -> bytes:
    """The network with its parameters as inputs: weights change every round, the session stays."""
    model = onnx.ModelProto()
    model.CopyFrom(staged.model)
    for tensor in list(model.graph.initializer):
        if tensor.name in step.shapes:
            model.graph.initializer.remove(tensor)
            shape = list(step.shapes[tensor.name])
            model.graph.input.append(helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, shape))
    serialised: bytes = model.SerializeToString()
    return serialised


def _open(model: bytes) -> Any:
    # Behind the backend, which keeps the runtime from reporting to its vendor.
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
