"""The board's whole network as one plain model: what somebody without early exits would run."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper, numpy_helper

from edge_cascade.bundle import Bundle
from edge_cascade.manifest import STAGE_FEATURES, STAGE_INPUT
from edge_cascade.policy import Precision

_LOGITS = "logits"


def plain_network(bundle: Bundle, precision: Precision) -> bytes:
    """All stages of a bundle joined, weights inside, without any exit but the last: `x` to `logits`."""
    nodes: list[onnx.NodeProto] = []
    initializers: list[onnx.TensorProto] = []
    given = STAGE_INPUT
    opset = 0
    for index in range(len(bundle.graph.stages)):
        stage = bundle.stage_models[index, precision]
        model = onnx.load_from_string(stage.model)
        opset = next(entry.version for entry in model.opset_import if not entry.domain)
        is_last = index == len(bundle.graph.stages) - 1
        end = _LOGITS if is_last else STAGE_FEATURES
        kept = _leading_to(model.graph, end)
        names = {STAGE_INPUT: given} if is_last else {STAGE_INPUT: given, end: f"s{index}.{end}"}
        used = {name for node in kept for name in node.input}
        for tensor in model.graph.initializer:
            if tensor.name in used:
                array = stage.weights.get(tensor.name)
                copy = tensor if array is None else numpy_helper.from_array(array, tensor.name)
                initializers.append(_named(copy, f"s{index}.{tensor.name}"))
                names[tensor.name] = f"s{index}.{tensor.name}"
        nodes += [_renamed(node, names, f"s{index}.", keep={_LOGITS} if is_last else set()) for node in kept]
        given = f"s{index}.{end}"
    shape = bundle.graph.preprocess.network_shape(bundle.graph.input_shape)
    graph = helper.make_graph(
        nodes,
        "plain",
        [helper.make_tensor_value_info(STAGE_INPUT, TensorProto.FLOAT, ["n", *shape])],
        [helper.make_tensor_value_info(_LOGITS, TensorProto.FLOAT, ["n", len(bundle.graph.labels)])],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    serialised: bytes = model.SerializeToString()
    return serialised


def _leading_to(graph: onnx.GraphProto, end: str) -> list[onnx.NodeProto]:
    producers = {name: node for node in graph.node for name in node.output}
    wanted: set[str] = set()
    pending = [end]
    while pending:
        name = pending.pop()
        if name in wanted or name not in producers:
            continue
        wanted.update(producers[name].output)
        pending.extend(producers[name].input)
    return [node for node in graph.node if wanted.intersection(node.output)]


def _renamed(node: onnx.NodeProto, names: dict[str, str], prefix: str, *, keep: set[str]) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.name = prefix + node.name
    for values in (copy.input, copy.output):
        values[:] = [name if not name or name in keep else names.get(name, prefix + name) for name in values]
    return copy


def _named(tensor: onnx.TensorProto, name: str) -> onnx.TensorProto:
    copy = onnx.TensorProto()
    copy.CopyFrom(tensor)
    copy.name = name
    return copy
