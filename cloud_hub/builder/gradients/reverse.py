"""Reverse-mode differentiation of an ONNX graph: nodes that compute gradients from its values. No I/O.

The graph is walked once forwards, to find what parameters influence, and once backwards, where each node's
rule emits its part (Griewank and Walther 2008, chapter 3). Shapes are inferred for two batch sizes: what
differs depends on the batch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import onnx
from numpy.typing import NDArray
from onnx import numpy_helper, shape_inference

from cloud_hub.builder.gradients import (
    activations,
    affine,
    arithmetic,
    convolution,
    layout,
    normalisation,
    pooling,
    reductions,
)
from cloud_hub.builder.gradients.emitter import Dims, Emitter
from cloud_hub.builder.gradients.site import NoGradientError, Rule, Site, UnsupportedNodeError, Value
from cloud_hub.builder.graphs.onnx_graph import all_names, attribute_of, describe_node, real_inputs
from cloud_hub.builder.graphs.staged import opset_of
from cloud_hub.errors import BuildError

RULES: Final[Mapping[str, Rule]] = {
    **activations.RULES,
    **affine.RULES,
    **arithmetic.RULES,
    **convolution.RULES,
    **layout.RULES,
    **normalisation.RULES,
    **pooling.RULES,
    **reductions.RULES,
}
"""The rule of every operator that has one."""

LEAST_OPSET: Final = 13  # axes of ReduceSum, Split and Unsqueeze became inputs

_FLAT: Final = frozenset(
    {
        "And",
        "ArgMax",
        "ArgMin",
        "Ceil",
        "Equal",
        "Floor",
        "Greater",
        "GreaterOrEqual",
        "Less",
        "LessOrEqual",
        "Not",
        "Or",
        "Round",
        "Shape",
        "Sign",
        "Size",
    }
)
"""Operators whose derivative is zero wherever there is one."""

_BATCHES = (5, 7)  # no batch of a user's graph is likely to be fixed to either


@dataclass(frozen=True, slots=True)
class Gradients:
    """Nodes to put behind the graph's own, the constants they read, and each parameter's gradient's name."""

    nodes: tuple[onnx.NodeProto, ...]
    initializers: tuple[onnx.TensorProto, ...]
    of: Mapping[str, str]


def differentiate(model: onnx.ModelProto, seeds: Mapping[str, str], parameters: Collection[str]) -> Gradients:
    """Gradients of a loss with respect to float32 parameters, from its gradients with respect to outputs.

    `model` has operators of ONNX's own set, of opset 13 or later; the first axis of its inputs may be free.
    `parameters` are initializers or inputs of it. `seeds` maps values of the graph to the names of values,
    of the same shapes, that hold the loss's gradient with respect to them and are known before these nodes.

    Raises:
        NoGradientError: naming every node on the way that has no rule, or none for its form.
        BuildError: for an older opset, shapes that cannot be inferred, a name that the graph does not have,
            or a parameter that does not influence the loss.
    """
    opset = opset_of(model)
    if opset < LEAST_OPSET:
        raise BuildError(
            f"the model is of opset {opset}; gradients need {LEAST_OPSET} or later: export it anew"
        )
    if unknown := {*seeds, *parameters} - all_names(model.graph):
        raise BuildError(f"the graph has no value {min(unknown)!r} to differentiate")
    wanted = _influenced(model.graph, parameters)
    path = _path(model.graph, wanted, seeds)
    dims = _dims(model)
    known = _constants(model.graph)
    emit = Emitter({*all_names(model.graph), *seeds.values()})

    def value(name: str) -> Value:
        return Value(name, dims.get(name, ()), known.get(name), name in wanted)

    parts: dict[str, list[str]] = {name: [seed] for name, seed in seeds.items()}
    refused: list[str] = []
    for node in reversed(path):
        site = Site(
            node,
            tuple(value(name) if name else None for name in node.input),
            tuple(value(name) for name in node.output if name),
            tuple(emit.total(parts.pop(name)) if name in parts else None for name in node.output if name),
            opset,
        )
        if all(gradient is None for gradient in site.gradients):
            continue
        try:
            if missing := [name for name in (*node.input, *node.output) if name and name not in dims]:
                raise UnsupportedNodeError(f"the shape of {missing[0]} is unknown")
            found = RULES[node.op_type](site, emit)
        except UnsupportedNodeError as error:
            refused.append(f"{site.describe()}: {error}")
            continue
        for index, gradient in found.items():
            if site.wants(index):
                parts.setdefault(node.input[index], []).append(gradient)
    if refused:
        raise NoGradientError(refused[::-1])
    if idle := [name for name in parameters if name not in parts]:
        raise BuildError(f"parameter {idle[0]!r} does not influence the loss: leave it out")
    of = {name: emit.total(parts[name]) for name in parameters}
    return Gradients(tuple(emit.nodes), tuple(emit.initializers), of)


def _influenced(graph: onnx.GraphProto, parameters: Iterable[str]) -> set[str]:
    """The values that change smoothly with a parameter."""
    wanted = set(parameters)
    for node in graph.node:
        if node.op_type not in _FLAT and wanted.intersection(node.input):
            wanted.update(name for name in node.output if name)
    return wanted


def _path(graph: onnx.GraphProto, wanted: set[str], seeds: Iterable[str]) -> list[onnx.NodeProto]:
    """The nodes between the parameters and the seeded values, in their order.

    Raises:
        NoGradientError: naming those among them whose operator has no rule.
    """
    needed = set(seeds)
    path: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if needed.intersection(node.output) and wanted.intersection(node.output):
            needed.update(name for name in node.input if name in wanted)
            path.append(node)
    path.reverse()
    if unruled := [
        describe_node(node)
        for node in path
        if node.op_type not in RULES or node.domain not in {"", "ai.onnx"}
    ]:
        raise NoGradientError(unruled)
    return path


def _constants(graph: onnx.GraphProto) -> dict[str, NDArray[Any]]:
    known = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and (tensor := attribute_of(node, "value")) is not None:
            known[node.output[0]] = numpy_helper.to_array(tensor)
    return known


def _dims(model: onnx.ModelProto) -> dict[str, Dims]:
    """The dims of every value, None where they differ between two batch sizes."""
    first, second = (_shapes(model, batch) for batch in _BATCHES)
    return {
        name: tuple(a if a == b else None for a, b in zip(dims, second[name], strict=True))
        for name, dims in first.items()
        if name in second and len(second[name]) == len(dims)
    }


def _shapes(model: onnx.ModelProto, batch: int) -> dict[str, tuple[int, ...]]:
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.value_info[:]
    for value in real_inputs(probe.graph):
        dims = value.type.tensor_type.shape.dim
        if dims and not dims[0].HasField("dim_value"):
            dims[0].dim_value = batch
    for value in probe.graph.output:
        value.type.tensor_type.ClearField("shape")
    try:
        inferred = shape_inference.infer_shapes(probe, data_prop=True, strict_mode=True)
    except (shape_inference.InferenceError, ValueError) as error:
        line = (str(error).strip().splitlines() or ["unknown"])[-1]
        raise BuildError(f"shapes of the graph cannot be inferred: {line[:300]}") from error
    graph = inferred.graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in dims):
            shapes.setdefault(value.name, tuple(int(dim.dim_value) for dim in dims))
    return shapes
