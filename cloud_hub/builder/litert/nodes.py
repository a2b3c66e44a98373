"""ONNX nodes to TensorFlow Lite operators, float and quantised. No I/O.

A node becomes an int8 operator where ONNX says so: its inputs come from DequantizeLinear and its output goes
to one QuantizeLinear and nowhere else. Everything else is float, between a dequantisation and a quantisation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx

from cloud_hub.builder.litert.constants import Constant
from cloud_hub.builder.litert.layout import (
    Layout,
    Placement,
    Value,
    as_last_constant,
    flat_order,
    version_of,
)
from cloud_hub.builder.litert.source import Source, attributes_of, refusal
from cloud_hub.builder.litert.windows import Kernel, Window, add_average_pool, add_conv, add_max_pool
from cloud_hub.builder.litert.writer import Quantised, TfliteGraph
from cloud_hub.errors import BuildError
from edge_cascade.tflite_schema import ACTIVATION_RELU, ACTIVATION_RELU6

_UNARY = {"Sigmoid": "LOGISTIC", "Tanh": "TANH", "HardSwish": "HARD_SWISH"}
_BINARY = {"Add": "ADD", "Sub": "SUB", "Mul": "MUL", "Div": "DIV"}
_QUANTISED_BINARY = {"ADD", "MUL"}
_RELUS = {ACTIVATION_RELU: "RELU", ACTIVATION_RELU6: "RELU6"}
_USUAL_GEMM = {"transA": 0, "alpha": 1.0, "beta": 1.0}
_PER_CHANNEL_DENSE = 12
"""The version of FULLY_CONNECTED that reads a scale per output; older runtimes refuse it."""


class NodeWriter:
    """Writes the nodes of one stage, one method an operator."""

    def __init__(self, graph: TfliteGraph, placement: Placement, source: Source) -> None:
        self._graph = graph
        self._placement = placement
        self._source = source
        self._values: dict[str, Value] = {}
        self._fused: set[str] = set()
        self._writers: dict[str, Callable[[onnx.NodeProto], None]] = {
            "Conv": self._conv,
            "Gemm": self._gemm,
            "MatMul": self._matmul,
            "Relu": self._relu,
            "Clip": self._relu,
            "LeakyRelu": self._leaky_relu,
            "MaxPool": self._max_pool,
            "AveragePool": self._average_pool,
            "GlobalMaxPool": self._global_max_pool,
            "GlobalAveragePool": self._mean,
            "ReduceMean": self._mean,
            "BatchNormalization": self._batch_norm,
            "Softmax": self._softmax,
            "Concat": self._concat,
            "Transpose": self._transpose,
            "QuantizeLinear": self._quantise,
            "DequantizeLinear": self._pass_on,
            "Identity": self._pass_on,
            "Dropout": self._pass_on,
            **dict.fromkeys(("Flatten", "Reshape", "Squeeze", "Unsqueeze"), self._reshape),
            **dict.fromkeys(_UNARY, self._unary),
            **dict.fromkeys(_BINARY, self._binary),
        }

    def write(self, given: Mapping[str, Value]) -> dict[str, Value]:
        """Append every node; returns all values by their ONNX names.

        Raises:
            BuildError: naming the first node that cannot be written.
        """
        self._values = dict(given)
        for node in self._source.nodes:
            if self._source.constants.takes(node) or node.output[0] in self._fused:
                continue
            writer = self._writers.get(node.op_type)
            if writer is None:
                raise BuildError(f"LiteRT: the operator {node.op_type} ({node.name!r}) cannot be written")
            writer(node)
        return self._values

    # --- dense layers and windows

    def _conv(self, node: onnx.NodeProto) -> None:
        activation, name = self._fuse(node)
        value = self._placement.as_last(self._value(node.input[0]))
        weight, bias = self._source.parameters(node)
        value, target = self._for_kernel(value, name, weight)
        made = self._placement.make(name, self._source.shape(name), Layout.LAST, target)
        window = Window.of(node, value.shape, made.shape, weight.real.shape[2:])
        groups = int(attributes_of(node).get("group", 1))
        kernel = Kernel(weight, bias, groups)
        add_conv(self._graph, value, kernel, window, made, activation=activation)
        self._values[name] = made

    def _gemm(self, node: onnx.NodeProto) -> None:
        attributes = attributes_of(node)
        if any(attributes.get(name, usual) != usual for name, usual in _USUAL_GEMM.items()):
            raise refusal(node, "transA, alpha or beta other than their defaults")
        weight, bias = self._source.parameters(node)
        self._dense(node, weight if attributes.get("transB", 0) else weight.transposed(), bias)

    def _matmul(self, node: onnx.NodeProto) -> None:
        weight, _ = self._source.parameters(node)
        if weight.real.ndim != 2:
            raise refusal(node, "weights that are no matrix")
        self._dense(node, weight.transposed(), None)

    def _dense(self, node: onnx.NodeProto, weight: Constant, bias: Constant | None) -> None:
        activation, name = self._fuse(node)
        value = self._value(node.input[0])
        if len(value.shape) != 2:
            raise refusal(node, f"an input of shape {value.shape}")
        if value.layout is Layout.FLAT_LAST:
            weight = weight.taken(flat_order(value.flattened))
        value, target = self._for_kernel(value, name, weight)
        made = self._placement.make(name, self._source.shape(name), quantised=target)
        outputs = weight.real.shape[0]
        biases = (bias or Constant("no_bias", np.zeros(1, np.float32))).reshaped((outputs,))
        inputs = [
            value.tensor,
            weight.add_to(self._graph, quantised=target is not None),
            biases.add_bias_to(self._graph, value.quantised, weight),
        ]
        version = 1
        if target is not None:
            version = _PER_CHANNEL_DENSE if weight.is_per_channel else 4
        self._graph.add("FULLY_CONNECTED", inputs, [made.tensor], {"activation": activation}, version=version)
        self._values[name] = made

    def _max_pool(self, node: onnx.NodeProto) -> None:
        value = self._placement.as_last(self._value(node.input[0]))
        if len([name for name in node.output if name]) > 1:
            raise refusal(node, "a second output")
        made = self._pooled(node, value)
        add_max_pool(self._graph, value, Window.of(node, value.shape, made.shape), made)
        self._values[node.output[0]] = made

    def _global_max_pool(self, node: onnx.NodeProto) -> None:
        value = self._placement.as_last(self._value(node.input[0]))
        made = self._pooled(node, value)
        add_max_pool(self._graph, value, Window.whole(value.shape), made)
        self._values[node.output[0]] = made

    def _average_pool(self, node: onnx.NodeProto) -> None:
        # In int8 the kernel keeps its input's scale; the QuantizeLinear that follows stores it anew.
        value = self._placement.as_last(self._value(node.input[0]))
        if self._source.target(node.output[0]) is None:
            value = self._placement.as_float(value)
        made = self._pooled(node, value)
        counts_padding = bool(attributes_of(node).get("count_include_pad", 0))
        add_average_pool(
            self._graph, value, Window.of(node, value.shape, made.shape), made, counts_padding=counts_padding
        )
        self._values[node.output[0]] = made

    def _pooled(self, node: onnx.NodeProto, value: Value) -> Value:
        """What a pool fills: stored as its input is."""
        name = node.output[0]
        return self._placement.make(name, self._source.shape(name), Layout.LAST, value.quantised)

    def _mean(self, node: onnx.NodeProto) -> None:
        name, value = node.output[0], self._value(node.input[0])
        self._check_mean(node, value)
        value, target = self._for_kernel(self._placement.as_last(value), name)
        pooled_shape = (*value.shape[:2], *([1] * (len(value.shape) - 2)))
        pooled = self._placement.make(name, pooled_shape, Layout.LAST, target)
        axes = self._graph.constant("places", np.array([1, 2], np.int32))
        self._graph.add(
            "MEAN", [value.tensor, axes], [pooled.tensor], {"keep_dims": True}, version=version_of(pooled)
        )
        self._values[name] = self._placement.reshaped(pooled, self._source.shape(name))

    def _check_mean(self, node: onnx.NodeProto, value: Value) -> None:
        if node.op_type != "ReduceMean":
            return
        axes = attributes_of(node).get("axes")
        if axes is None and len(node.input) > 1:
            axes = self._source.constants[node.input[1]].real.tolist()
        rank = len(value.shape)
        if axes is None or sorted(int(axis) % rank for axis in axes) != list(range(2, rank)) or rank < 3:
            raise refusal(node, "axes that are not the places behind the channels")

    # --- elementwise

    def _relu(self, node: onnx.NodeProto) -> None:
        activation = self._source.activation_of(node)
        if activation is None:
            raise refusal(node, "limits other than 0 and 6")
        name = node.output[0]
        value, target = self._for_kernel(self._value(node.input[0]), name)
        self._elementwise(_RELUS[activation], value, name, target)

    def _unary(self, node: onnx.NodeProto) -> None:
        value = self._placement.as_float(self._value(node.input[0]))
        self._elementwise(_UNARY[node.op_type], value, node.output[0], None)

    def _leaky_relu(self, node: onnx.NodeProto) -> None:
        value = self._placement.as_float(self._value(node.input[0]))
        alpha = float(attributes_of(node).get("alpha", 0.01))
        self._elementwise("LEAKY_RELU", value, node.output[0], None, {"alpha": alpha})

    def _elementwise(
        self,
        op: str,
        value: Value,
        name: str,
        target: Quantised | None,
        options: Mapping[str, float] | None = None,
    ) -> None:
        made = self._placement.like(value, name, target)
        self._graph.add(op, [value.tensor], [made.tensor], options, version=version_of(made))
        self._values[name] = made

    def _binary(self, node: onnx.NodeProto) -> None:
        op = _BINARY[node.op_type]
        activation, name = self._fuse(node)
        target = self._source.target(name) if op in _QUANTISED_BINARY else None
        rank = len(self._source.shape(name))
        known = [self._values[each] for each in node.input if each in self._values]
        is_last = all(len(value.shape) == rank for value in known) and any(
            value.layout is Layout.LAST for value in known
        )
        if target is not None and any(self._quantised_of(each) is None for each in node.input):
            target = None
        tensors = [
            self._operand(each, rank, is_last=is_last, in_int8=target is not None) for each in node.input
        ]
        layout = Layout.LAST if is_last else Layout.FIRST
        made = self._placement.make(name, self._source.shape(name), layout, target)
        self._graph.add(op, tensors, [made.tensor], {"activation": activation}, version=version_of(made))
        self._values[name] = made

    def _operand(self, name: str, rank: int, *, is_last: bool, in_int8: bool) -> int:
        if name in self._values:
            value = self._values[name] if in_int8 else self._placement.as_float(self._values[name])
            placed = self._placement.as_last(value) if is_last else self._placement.as_first(value)
            return placed.tensor
        constant = self._source.constants[name]
        if is_last:
            constant = constant.mapped(lambda array: as_last_constant(array, rank))
        return constant.add_to(self._graph, quantised=in_int8)

    def _batch_norm(self, node: onnx.NodeProto) -> None:
        value = self._placement.as_float(self._value(node.input[0]))
        gamma, beta, mean, variance = (self._source.constants[name].real for name in node.input[1:5])
        factor = gamma / np.sqrt(variance + float(attributes_of(node).get("epsilon", 1e-5)))
        rank = len(value.shape)
        value = self._placement.as_last(value) if rank > 2 else self._placement.as_first(value)
        for op, numbers in (("MUL", factor), ("ADD", beta - mean * factor)):
            made = self._placement.like(value, node.output[0], None)
            constant = self._graph.constant(node.output[0], numbers.astype(np.float32))
            self._graph.add(op, [value.tensor, constant], [made.tensor])
            value = made
        self._values[node.output[0]] = value

    def _softmax(self, node: onnx.NodeProto) -> None:
        value = self._placement.as_first(self._placement.as_float(self._value(node.input[0])))
        rank = len(value.shape)
        if int(attributes_of(node).get("axis", -1)) % rank != rank - 1:
            raise refusal(node, "an axis that is not the last")
        self._elementwise("SOFTMAX", value, node.output[0], None, {"beta": 1.0})

    # --- shapes

    def _reshape(self, node: onnx.NodeProto) -> None:
        name = node.output[0]
        self._values[name] = self._placement.reshaped(self._value(node.input[0]), self._source.shape(name))

    def _transpose(self, node: onnx.NodeProto) -> None:
        value = self._placement.as_first(self._value(node.input[0]))
        order = attributes_of(node).get("perm", range(len(value.shape))[::-1])
        self._values[node.output[0]] = self._placement.transposed(value, tuple(int(axis) for axis in order))

    def _concat(self, node: onnx.NodeProto) -> None:
        name = node.output[0]
        shape = self._source.shape(name)
        axis = int(attributes_of(node)["axis"]) % len(shape)
        target = self._source.target(name)
        values = [self._value(each) for each in node.input]
        if target is None or any(value.quantised is None for value in values):
            target = None
            values = [self._placement.as_float(value) for value in values]
        else:
            # The kernel joins only what is stored alike.
            values = [self._placement.as_quantised(value, target) for value in values]
        layout = Layout.FIRST
        if len(shape) in {3, 4}:
            values, layout = [self._placement.as_last(value) for value in values], Layout.LAST
            axis = 3 if axis == 1 else axis - 1 + (len(shape) == 3)
        else:
            values = [self._placement.as_first(value) for value in values]
        made = self._placement.make(name, shape, layout, target)
        tensors = [value.tensor for value in values]
        self._graph.add("CONCATENATION", tensors, [made.tensor], {"axis": axis}, version=version_of(made))
        self._values[name] = made

    # --- quantisation

    def _quantise(self, node: onnx.NodeProto) -> None:
        value = self._value(node.input[0])
        self._values[node.output[0]] = self._placement.as_quantised(
            value, self._source.constants.quantised_of(node)
        )

    def _pass_on(self, node: onnx.NodeProto) -> None:
        # A value holds a real number whichever way it is stored: to dequantise it is to do nothing yet.
        self._values[node.output[0]] = self._value(node.input[0])

    def _for_kernel(
        self, value: Value, name: str, weight: Constant | None = None
    ) -> tuple[Value, Quantised | None]:
        """The input as the kernel takes it, and how it stores its output: both int8 or both float."""
        target = self._source.target(name)
        if target is None or value.quantised is None or (weight is not None and not weight.is_kernel_int8):
            return self._placement.as_float(value), None
        return value, target

    def _quantised_of(self, name: str) -> Quantised | None:
        return (
            self._values[name].quantised if name in self._values else self._source.constants[name].quantised
        )

    def _value(self, name: str) -> Value:
        if name not in self._values:
            raise BuildError(f"LiteRT: the value {name!r} is a constant where only data can be written")
        return self._values[name]

    def _fuse(self, node: onnx.NodeProto) -> tuple[int, str]:
        activation, name = self._source.fused(node)
        if name != node.output[0]:
            self._fused.add(name)
        return activation, name
