"""Finds what a classifier answers with, and the logits behind it. Graphs change in place."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from cloud_hub.builder.graphs.onnx_graph import (
    Array,
    add_constant,
    attribute_of,
    free_name,
    producers,
    prune,
    run_for,
    set_outputs,
)
from cloud_hub.errors import BuildError

_SMALLEST_PROBABILITY = 1e-12
_PREFERRED = ("logits", "output_probability", "probabilities")
_PASSED_OVER = {"Identity", "Dropout"}


@dataclass(frozen=True, slots=True)
class Answer:
    """`source` is the output as the file gives it, `logits` the value (n, classes) that stands for it."""

    source: str
    logits: str
    classes: int


def choose_logits(model: onnx.ModelProto, x: NDArray[np.float32]) -> Answer:
    """Choose the output, take a softmax off its end, and leave the graph with that one output.

    Raises:
        BuildError: when no output has (n, classes) with two classes or more, or several have.
    """
    graph = model.graph
    names = [value.name for value in graph.output]
    values = dict(zip(names, run_for(model, x, names), strict=True))
    source = _choose(graph, {name: _flat_shape(value, len(x)) for name, value in values.items()})
    value = values[source]
    flat = source
    if value.ndim > 2:
        flat = free_name(graph, f"{source}.flat")
        graph.node.append(helper.make_node("Flatten", [source], [flat], name=flat, axis=1))
    rows = value.reshape(len(x), -1)
    logits = _two_logits(graph, flat) if rows.shape[1] == 1 else _before_softmax(graph, flat, rows)
    set_outputs(graph, [logits])
    prune(graph)
    return Answer(source, logits, max(2, rows.shape[1]))


def _flat_shape(value: Array, batch: int) -> tuple[int, ...]:
    """The shape without trailing ones behind the classes; () when the first axis is not the batch."""
    shape = value.shape
    if len(shape) < 2 or shape[0] != batch:
        return ()
    return shape[:2] if all(size == 1 for size in shape[2:]) else shape


def _choose(graph: onnx.GraphProto, shapes: dict[str, tuple[int, ...]]) -> str:
    wide = [name for name, shape in shapes.items() if len(shape) == 2 and shape[1] >= 2]
    if len(wide) == 1:
        return wide[0]
    if wide:
        for name in _PREFERRED:
            if name in wide:
                return name
        raise BuildError(f"gives several outputs ({', '.join(wide)}): export the logits alone")
    narrow = [name for name, shape in shapes.items() if len(shape) == 2]
    if len(narrow) == 1 and _tail(graph, narrow[0]).op_type == "Sigmoid":
        return narrow[0]
    if narrow:
        raise BuildError(
            f"gives one number a sample ({narrow[0]}): a regression model? A classifier gives (n, classes)"
        )
    found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    raise BuildError(f"gives {found}, not (n, classes): export one row of logits a sample")


def _tail(graph: onnx.GraphProto, name: str) -> onnx.NodeProto:
    """The node that really gives a value; an empty one if it is the input."""
    made = producers(graph)
    node = made.get(name, onnx.NodeProto())
    while node.op_type in _PASSED_OVER:
        node = made.get(node.input[0], onnx.NodeProto())
    return node


def _two_logits(graph: onnx.GraphProto, name: str) -> str:
    """A single sigmoid's s as the pair -s/2, s/2, whose softmax is the same probability."""
    halves = add_constant(graph, "sigmoid.halves", np.array([-0.5, 0.5], np.float32))
    logits = free_name(graph, "sigmoid.pair")
    graph.node.append(
        helper.make_node("Mul", [_tail(graph, name).input[0], halves], [logits], name="sigmoid.pair")
    )
    return logits


def _before_softmax(graph: onnx.GraphProto, name: str, rows: NDArray[np.float32]) -> str:
    tail = _tail(graph, name)
    is_distribution = bool(
        (rows >= 0).all() and (rows <= 1.001).all() and np.allclose(rows.sum(axis=1), 1.0, atol=1e-3)
    )
    if tail.op_type == "Softmax" and _is_over_classes(tail):
        return str(tail.input[0])
    if is_distribution:
        return _logarithm(graph, name)
    if tail.op_type == "Sigmoid":
        return str(tail.input[0])
    return name


def _is_over_classes(softmax: onnx.NodeProto) -> bool:
    return attribute_of(softmax, "axis", -1) in {-1, 1}


def _logarithm(graph: onnx.GraphProto, name: str) -> str:
    """Probabilities that something else than a softmax made; their logarithms are logits."""
    smallest = add_constant(graph, "probability.smallest", np.array(_SMALLEST_PROBABILITY, np.float32))
    floored, logits = free_name(graph, "probability.floored"), free_name(graph, "probability.log")
    graph.node.append(helper.make_node("Max", [name, smallest], [floored], name="probability.floored"))
    graph.node.append(helper.make_node("Log", [floored], [logits], name="probability.log"))
    return logits
