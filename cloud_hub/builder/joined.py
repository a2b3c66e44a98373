"""The stages of a bundle put together again, and the train step of the network that they make. No I/O.

A bundle holds all that its network is, so training and quantising it anew need no other file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from cloud_hub.builder.collect import Stages
from cloud_hub.builder.gradients.site import NoGradientError
from cloud_hub.builder.gradients.train_step import head_parameters, staged_train_step, trainable_parameters
from cloud_hub.builder.graphs.staged import (
    INPUT,
    LOGITS,
    Shape,
    StagedGraph,
    features_name,
    float_value,
    logits_name,
    make_model,
    opset_of,
)
from cloud_hub.builder.graphs.stages import with_data
from cloud_hub.errors import BuildError
from edge_cascade.manifest import STAGE_FEATURES, STAGE_INPUT


@dataclass(frozen=True, slots=True)
class Lesson:
    """How a network is trained: the step's file, which of its parameters are heads', and what it leaves out.

    `frozen_because` is empty where the whole network learns, else it names what has no gradient.
    """

    model: bytes
    head_parameters: tuple[str, ...]
    frozen_because: str = ""


def train_step_of(staged: StagedGraph) -> Lesson:
    """The train step of a network: of all its parameters, or of its heads' where the trunk has no gradient.

    The exits count by their depth: the last one answers alone when it must.

    Raises:
        BuildError: when not even the heads can be trained.
    """
    weights = [(index + 1) / staged.stages for index in range(staged.stages)]
    heads = head_parameters(staged)
    why = ""
    try:
        chosen = trainable_parameters(staged.model)
        step = staged_train_step(staged, weights, chosen)
    except NoGradientError as error:
        why, chosen = str(error), heads
        step = staged_train_step(staged, weights, heads)
    return Lesson(step.SerializeToString(deterministic=True), tuple(n for n in heads if n in chosen), why)


def what_learns(staged: StagedGraph) -> str:
    """What boards in rounds cannot train of a network, and why, in one line; empty where all of it learns."""
    try:
        lesson = train_step_of(staged)
    except BuildError as error:
        return f"boards serve this network and cannot train it: {error}"
    if lesson.frozen_because:
        return f"boards train the exits' heads alone: {lesson.frozen_because}"
    return ""


def staged_of_stages(
    stages: Stages, classes: int, weights: Mapping[str, NDArray[np.float32]] | None = None
) -> StagedGraph:
    """The network of fp32 stages, with `weights` in place of those of the same name where given.

    Raises:
        BuildError: when a stage is there in int8 alone, or a weight has no place in the network.
    """
    given = dict(weights or {})
    nodes: list[onnx.NodeProto] = []
    initializers: dict[str, onnx.TensorProto] = {}
    outputs: list[onnx.ValueInfoProto] = []
    input_shape: Shape = ()
    opset = 0
    for index, feature_shape in enumerate(stages.feature_shapes):
        stage = stages.models.get((index, "fp32"))
        if stage is None:
            raise BuildError(f"stage {index} is there in int8 alone: a network is trained in fp32")
        model = onnx.load_from_string(stage.model)
        opset = opset_of(model)
        if index == 0:
            input_shape = _shape_of(next(value for value in model.graph.input if value.name == STAGE_INPUT))
        own = _Stage(model, index)
        nodes += own.nodes()
        for tensor in own.initializers():
            initializers[tensor.name] = with_data(tensor, {**stage.weights, **given})
        outputs.append(float_value(logits_name(index), (classes,)))
        if feature_shape is not None:
            outputs.append(float_value(features_name(index), feature_shape))
    if odd := given.keys() - initializers.keys():
        raise BuildError(f"the network has no weight {min(odd)!r}")
    whole = make_model(
        "network", nodes, [float_value(INPUT, input_shape)], outputs, list(initializers.values()), opset=opset
    )
    features = tuple(shape for shape in stages.feature_shapes if shape is not None)
    return StagedGraph(whole, input_shape, classes, features, stages.mult_adds)


class _Stage:
    """The part of one stage's file that leads to its logits and features, with the network's names."""

    def __init__(self, model: onnx.ModelProto, index: int) -> None:
        self._model = model
        self._names = {
            STAGE_INPUT: INPUT if index == 0 else features_name(index - 1),
            STAGE_FEATURES: features_name(index),
            LOGITS: logits_name(index),
        }

    def nodes(self) -> list[onnx.NodeProto]:
        """Without the scores behind the logits, in the file's order."""
        copies = []
        for node in self._wanted():
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            for values in (copy.input, copy.output):
                values[:] = [self._names.get(name, name) for name in values]
            copies.append(copy)
        return copies

    def initializers(self) -> list[onnx.TensorProto]:
        """Those that the nodes read."""
        used = {name for node in self._wanted() for name in node.input}
        return [tensor for tensor in self._model.graph.initializer if tensor.name in used]

    def _wanted(self) -> list[onnx.NodeProto]:
        producers = {output: node for node in self._model.graph.node for output in node.output}
        wanted: set[str] = set()
        pending = [LOGITS, STAGE_FEATURES]
        while pending:
            name = pending.pop()
            if name not in wanted and name in producers:
                wanted.update(producers[name].output)
                pending.extend(producers[name].input)
        return [node for node in self._model.graph.node if wanted.intersection(node.output)]


def _shape_of(value: onnx.ValueInfoProto) -> Shape:
    return tuple(int(dim.dim_value) for dim in value.type.tensor_type.shape.dim[1:])
