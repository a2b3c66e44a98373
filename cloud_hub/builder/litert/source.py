"""What is known of an ONNX stage before it is written: shapes, constants, and who reads what. No I/O."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from cloud_hub.builder.litert.constants import Constant, Constants
from cloud_hub.builder.litert.layout import Shape
from cloud_hub.builder.litert.writer import Quantised
from cloud_hub.errors import BuildError
from edge_cascade.tflite_schema import ACTIVATION_NONE, ACTIVATION_RELU, ACTIVATION_RELU6


class Source:
    """One stage's graph for a single sample, with every shape inferred."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.nodes = list(graph.node)
        self.constants = Constants(graph)
        self._kept = frozenset(value.name for value in graph.output)
        self._shapes = _shapes_of(graph)
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)

    def shape(self, name: str) -> Shape:
        """The ONNX shape of a value, its batch axis one.

        Raises:
            BuildError: when it cannot be told beforehand.
        """
        if name not in self._shapes:
            raise BuildError(f"LiteRT: the shape of {name!r} depends on more than the input's shape")
        return self._shapes[name]

    def target(self, name: str) -> Quantised | None:
        """How the one QuantizeLinear that reads a value stores it; None where anything else reads it."""
        reader = self._only_reader(name)
        if reader is None or reader.op_type != "QuantizeLinear":
            return None
        return self.constants.quantised_of(reader)

    def fused(self, node: onnx.NodeProto) -> tuple[int, str]:
        """The activation that alone reads a node and can become part of it, and the value that results."""
        reader = self._only_reader(node.output[0])
        activation = None if reader is None else self.activation_of(reader)
        if reader is None or activation is None:
            return ACTIVATION_NONE, node.output[0]
        return activation, reader.output[0]

    def activation_of(self, node: onnx.NodeProto) -> int | None:
        """The schema's number of a Relu, or of a Clip that is one."""
        if node.op_type == "Relu":
            return ACTIVATION_RELU
        if node.op_type != "Clip":
            return None
        low, high = self._limit(node, 1, "min", -np.inf), self._limit(node, 2, "max", np.inf)
        if low != 0.0 or high not in {6.0, np.inf}:
            return None
        return ACTIVATION_RELU6 if high == 6.0 else ACTIVATION_RELU

    def parameters(self, node: onnx.NodeProto) -> tuple[Constant, Constant | None]:
        """A node's weights and, where it has them, biases.

        Raises:
            BuildError: when they are computed.
        """
        has_bias = len(node.input) > 2 and node.input[2]
        return self.constants[node.input[1]], self.constants[node.input[2]] if has_bias else None

    def _only_reader(self, name: str) -> onnx.NodeProto | None:
        readers = self._readers.get(name, [])
        return None if name in self._kept or len(readers) != 1 else readers[0]

    def _limit(self, node: onnx.NodeProto, position: int, attribute: str, default: float) -> float:
        if len(node.input) > position and node.input[position]:
            name = node.input[position]
            return float(self.constants[name].real) if name in self.constants else np.nan
        return float(attributes_of(node).get(attribute, default))


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes by name."""
    return {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}


def refusal(node: onnx.NodeProto, what: str) -> BuildError:
    """Why a node cannot be written."""
    return BuildError(f"LiteRT: {node.op_type} ({node.name!r}) with {what} cannot be written")


def _shapes_of(graph: onnx.GraphProto) -> dict[str, Shape]:
    shapes = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        dims = value.type.tensor_type.shape.dim
        if all(dim.HasField("dim_value") for dim in dims):
            shapes[value.name] = tuple(int(dim.dim_value) for dim in dims)
    return shapes
