"""Cuts a whole graph, fp32 or QDQ, into one model per stage, and puts the scores behind each exit. No I/O.

The cut is at the float features. A QDQ graph quantises them there and back; both stages keep that pair, so
that the later one starts in int8, and quantising twice changes nothing. Every weight, scale and zero point
leaves the file: it becomes external data that the runtime is handed from memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import log

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from cloud_hub.builder.graphs.staged import (
    BATCH,
    INPUT,
    LOGITS,
    StagedGraph,
    features_name,
    float_value,
    logits_name,
    make_model,
    opset_of,
)
from edge_cascade.manifest import STAGE_FEATURES, STAGE_HEAD, STAGE_INPUT, STAGE_TEMPERATURE
from edge_cascade.onnx_file import PLACEHOLDER_LOCATION
from edge_cascade.scores import HEAD_WIDTH, SMALLEST_PROBABILITY

_QDQ = ("QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True, slots=True)
class CutStage:
    """One stage of a graph: `model` without weights, `weights` by initializer name."""

    model: bytes
    weights: dict[str, NDArray[np.generic]]


def cut_stages(staged: StagedGraph) -> list[CutStage]:
    """The stages of a graph, fp32 or of `quantise`."""
    return [_cut(staged, index) for index in range(staged.stages)]


def logits_model_of(model: bytes, weights: Mapping[str, NDArray[np.generic]]) -> bytes:
    """The same stage with its weights inside and plain logits at the end, for `open_whole_model`."""
    stage = onnx.load_from_string(model)
    producers = {output: node for node in stage.graph.node for output in node.output}
    nodes = _between(stage, producers, STAGE_INPUT, [LOGITS])
    used = {name for node in nodes for name in node.input}
    whole = make_model(
        f"{stage.graph.name}.logits",
        nodes,
        [value for value in stage.graph.input if value.name == STAGE_INPUT],
        [helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, [BATCH, "classes"])],
        [with_data(tensor, weights) for tensor in stage.graph.initializer if tensor.name in used],
        opset=opset_of(stage),
    )
    serialised: bytes = whole.SerializeToString(deterministic=True)
    return serialised


def with_data(tensor: onnx.TensorProto, weights: Mapping[str, NDArray[np.generic]]) -> onnx.TensorProto:
    """An initializer of a cut stage with its weights inside; one that has none elsewhere as it is."""
    # np.asarray, because ascontiguousarray turns a scalar into a vector.
    array = weights.get(tensor.name)
    return tensor if array is None else numpy_helper.from_array(np.asarray(array), tensor.name)


def _cut(staged: StagedGraph, index: int) -> CutStage:
    whole, opset = staged.model, opset_of(staged.model)
    producers = {output: node for node in whole.graph.node for output in node.output}
    features, logits = features_name(index), logits_name(index)
    start = INPUT if index == 0 else _before_quantisation(producers, features_name(index - 1))
    feature_shape = staged.feature_shape_of(index)
    ends = [logits] if feature_shape is None else [features, logits]
    names = {start: STAGE_INPUT, features: STAGE_FEATURES, logits: LOGITS}

    nodes = [_renamed(node, names) for node in _between(whole, producers, start, ends)]
    used = {name for node in nodes for name in node.input}
    initializers = [tensor for tensor in whole.graph.initializer if tensor.name in used]
    given = float_value(STAGE_INPUT, staged.input_shape_of(index))
    outputs = [float_value(STAGE_HEAD, (HEAD_WIDTH,))]
    if feature_shape is not None:
        outputs.append(float_value(STAGE_FEATURES, feature_shape))

    model = make_model(
        f"stage{index}",
        [*nodes, *_head_nodes(staged.classes)],
        [given, helper.make_tensor_value_info(STAGE_TEMPERATURE, TensorProto.FLOAT, [1])],
        outputs,
        [*map(_without_data, initializers), *_head_constants()],
        opset=opset,
    )
    return CutStage(
        model=model.SerializeToString(deterministic=True),
        weights={
            tensor.name: numpy_helper.to_array(tensor) for tensor in initializers if _is_external(tensor)
        },
    )


def _before_quantisation(producers: dict[str, onnx.NodeProto], name: str) -> str:
    """The value that a QuantizeLinear/DequantizeLinear pair turned into `name`, or `name` itself."""
    for op_type in reversed(_QDQ):
        producer = producers[name]
        if producer.op_type != op_type:
            return name
        name = producer.input[0]
    return name


def _between(
    whole: onnx.ModelProto, producers: dict[str, onnx.NodeProto], start: str, ends: Sequence[str]
) -> list[onnx.NodeProto]:
    """The nodes that lead from `start` to `ends`, in the graph's order."""
    wanted: set[str] = set()
    pending = list(ends)
    while pending:
        name = pending.pop()
        if name == start or name in wanted or name not in producers:
            continue
        wanted.update(producers[name].output)
        pending.extend(producers[name].input)
    return [node for node in whole.graph.node if wanted.intersection(node.output)]


def _renamed(node: onnx.NodeProto, names: dict[str, str]) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    for values in (copy.input, copy.output):
        values[:] = [names.get(name, name) for name in values]
    return copy


def _is_external(tensor: onnx.TensorProto) -> bool:
    # int64 tensors are shapes and axes, which the runtime needs when it builds the session.
    return bool(tensor.data_type != TensorProto.INT64)


def _without_data(tensor: onnx.TensorProto) -> onnx.TensorProto:
    if not _is_external(tensor):
        return tensor
    empty = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    empty.data_location = TensorProto.EXTERNAL
    entry = empty.external_data.add()
    entry.key, entry.value = "location", PLACEHOLDER_LOCATION
    return empty


def _head_constants() -> list[onnx.TensorProto]:
    values = {"head.two": [2], "head.halves": [1, 1], "head.axis": [1]}
    return [numpy_helper.from_array(np.array(value, np.int64), name) for name, value in values.items()]


def _head_nodes(classes: int) -> Iterator[onnx.NodeProto]:
    """`scores.head_of_logits` as nodes, from `logits` and `temperature` to `head` (n, 5)."""
    for name, value in (
        ("smallest", SMALLEST_PROBABILITY),
        ("normaliser", -1.0 / log(classes)),
        ("zero", 0.0),
        ("one", 1.0),
    ):
        yield helper.make_node("Constant", [], [f"head.{name}"], value_float=value)
    for op_type, inputs, outputs, attributes in (
        ("Div", [LOGITS, STAGE_TEMPERATURE], ["head.scaled"], {}),
        ("Softmax", ["head.scaled"], ["head.probabilities"], {"axis": 1}),
        ("TopK", ["head.probabilities", "head.two"], ["head.top", "head.indices"], {"axis": 1}),
        ("Split", ["head.top", "head.halves"], ["head.first", "head.second"], {"axis": 1}),
        ("Split", ["head.indices", "head.halves"], ["head.index", "head.runner_up"], {"axis": 1}),
        ("Cast", ["head.index"], ["head.label"], {"to": TensorProto.FLOAT}),
        ("Max", ["head.probabilities", "head.smallest"], ["head.floored"], {}),
        ("Log", ["head.floored"], ["head.logs"], {}),
        ("Mul", ["head.probabilities", "head.logs"], ["head.terms"], {}),
        ("ReduceSum", ["head.terms", "head.axis"], ["head.sum"], {"keepdims": 1}),
        ("Mul", ["head.sum", "head.normaliser"], ["head.entropy"], {}),
        ("Sub", ["head.one", "head.first"], ["head.max_prob"], {}),
        ("Add", ["head.max_prob", "head.second"], ["head.margin"], {}),
        ("Concat", ["head.entropy", "head.margin", "head.max_prob"], ["head.raw_scores"], {"axis": 1}),
        # Rounding may leave 0..1 by an ulp, and a score above 1 would be refused even by "accept all".
        ("Clip", ["head.raw_scores", "head.zero", "head.one"], ["head.scores"], {}),
        ("Concat", ["head.label", "head.first", "head.scores"], [STAGE_HEAD], {"axis": 1}),
    ):
        yield helper.make_node(op_type, inputs, outputs, **attributes)
