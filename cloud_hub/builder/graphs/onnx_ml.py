"""Takes `ai.onnx.ml` operators out of a graph: what scikit-learn's converter puts around a classifier.

ZipMap and the label's way are dropped; Scaler, Normalizer and LinearClassifier become ONNX's own operators.
Trees, support vectors and neighbours stay, for `adopt` to refuse by name. No I/O.

Source: https://github.com/onnx/onnx/blob/main/docs/Operators-ml.md
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx
from onnx import helper

from cloud_hub.builder.graphs.onnx_graph import add_constant, attribute_of, prune, set_outputs
from cloud_hub.errors import BuildError

DOMAIN = "ai.onnx.ml"

_NORMS = {b"L1": 1, b"L2": 2}


def strip_ml_operators(model: onnx.ModelProto) -> None:
    """Change the model in place: no ZipMap, and default-domain operators where there are such.

    Raises:
        BuildError: for a LinearClassifier or Scaler whose attributes contradict each other.
    """
    graph = model.graph
    _drop_zip_maps(graph)
    made: dict[str, onnx.NodeProto] = {}
    nodes: list[onnx.NodeProto] = []
    for node in list(graph.node):
        for new in _translated(graph, node, made):
            nodes.append(new)
            made.update(dict.fromkeys(new.output, new))
    del graph.node[:]
    graph.node.extend(nodes)


def _drop_zip_maps(graph: onnx.GraphProto) -> None:
    """A ZipMap's dictionaries give way to the tensor that they were made from."""
    made_from = {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.domain == DOMAIN and node.op_type == "ZipMap"
    }
    if not made_from:
        return
    kept = [value for value in graph.output if value.name not in made_from]
    added = [made_from[value.name] for value in graph.output if value.name in made_from]
    set_outputs(graph, [])
    graph.output.extend(kept)
    graph.output.extend(
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in added
        if name not in {value.name for value in kept}
    )
    prune(graph)


def _translated(
    graph: onnx.GraphProto, node: onnx.NodeProto, made: Mapping[str, onnx.NodeProto]
) -> Iterator[onnx.NodeProto]:
    if node.domain != DOMAIN:
        yield node
    elif node.op_type == "Scaler":
        yield from _scaler(graph, node)
    elif node.op_type == "Normalizer" and attribute_of(node, "norm", b"MAX") in _NORMS:
        yield _normalizer(node, made.get(node.input[0]))
    elif node.op_type == "LinearClassifier" and not _is_single_score(node):
        yield from _linear_classifier(graph, node)
    else:
        yield node


def _scaler(graph: onnx.GraphProto, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    """(x - offset) * scale."""
    given, shifted, result = node.input[0], f"{node.output[0]}.shifted", node.output[0]
    offset = np.array(attribute_of(node, "offset", [0.0]), np.float32)
    scale = np.array(attribute_of(node, "scale", [1.0]), np.float32)
    offset_name = add_constant(graph, f"{result}.offset", offset)
    scale_name = add_constant(graph, f"{result}.scale", scale)
    yield helper.make_node("Sub", [given, offset_name], [shifted], name=f"{result}.shift")
    yield helper.make_node("Mul", [shifted, scale_name], [result], name=f"{result}.scaling")


def _normalizer(node: onnx.NodeProto, before: onnx.NodeProto | None) -> onnx.NodeProto:
    given, result = node.input[0], node.output[0]
    norm = _NORMS[attribute_of(node, "norm")]
    if norm == 1 and before is not None and before.op_type == "Softmax":
        return helper.make_node("Identity", [given], [result], name=f"{result}.same")
    return helper.make_node("LpNormalization", [given], [result], name=f"{result}.norm", axis=-1, p=norm)


def _is_single_score(node: onnx.NodeProto) -> bool:
    """Two classes from one row of coefficients: the runtime makes up the other column."""
    return len(attribute_of(node, "intercepts", [])) < 2


def _linear_classifier(graph: onnx.GraphProto, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    """Gemm and what the operator calls post_transform; the label's output is gone."""
    given, result = node.input[0], node.output[1]
    bias = np.array(attribute_of(node, "intercepts"), np.float32)
    weight = np.array(attribute_of(node, "coefficients"), np.float32)
    if weight.size % bias.size:
        raise BuildError(
            f"LinearClassifier ({node.name}): {weight.size} coefficients do not fit {bias.size} intercepts"
        )
    weight = weight.reshape(bias.size, -1)
    transform = attribute_of(node, "post_transform", b"NONE")
    last = {b"NONE": None, b"SOFTMAX": "Softmax", b"LOGISTIC": "Sigmoid"}
    if transform not in last:
        yield node
        return
    op_type = last[transform]
    if op_type == "Sigmoid" and _is_mirrored(weight, bias):
        # Two sigmoids of s and -s are the softmax of half of them.
        weight, bias, op_type = weight * np.float32(0.5), bias * np.float32(0.5), "Softmax"
    scores = result if op_type is None else f"{result}.scores"
    names = [add_constant(graph, f"{result}.weight", weight), add_constant(graph, f"{result}.bias", bias)]
    yield helper.make_node("Gemm", [given, *names], [scores], name=f"{result}.linear", transB=1)
    if op_type == "Softmax":
        yield helper.make_node("Softmax", [scores], [result], name=f"{result}.softmax", axis=1)
    elif op_type == "Sigmoid":
        yield helper.make_node("Sigmoid", [scores], [result], name=f"{result}.sigmoid")


def _is_mirrored(weight: np.ndarray, bias: np.ndarray) -> bool:
    return len(bias) == 2 and np.array_equal(weight[0], -weight[1]) and bool(bias[0] == -bias[1])
