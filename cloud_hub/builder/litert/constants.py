"""The constants of an ONNX stage: initializers, and those that a DequantizeLinear makes real. No I/O."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from cloud_hub.builder.litert.writer import Quantised, TfliteGraph
from cloud_hub.errors import BuildError

Numbers = NDArray[Any]

_UINT8_TO_INT8 = 128


@dataclass(frozen=True, slots=True)
class Constant:
    """Real numbers and, where ONNX stores them quantised, the int8 or int32 behind them."""

    name: str
    real: Numbers
    stored: Numbers | None = None
    quantised: Quantised | None = None

    @property
    def is_per_channel(self) -> bool:
        """Whether there is a scale for each entry of an axis."""
        return self.quantised is not None and self.quantised.scale.size > 1

    @property
    def is_kernel_int8(self) -> bool:
        """Whether kernels take it as weights: symmetric int8, scales along outputs or a single one."""
        if self.stored is None or self.quantised is None or self.stored.dtype != np.int8:
            return False
        on_outputs = not self.is_per_channel or self.quantised.axis == 0
        return on_outputs and not self.quantised.zero_point.any()

    def mapped(self, move: Callable[[Numbers], Numbers], *, axis: int = 0) -> Constant:
        """The same numbers in other places; `axis` is where per-channel scales lie then."""
        stored = None if self.stored is None else np.ascontiguousarray(move(self.stored))
        quantised = self.quantised
        if quantised is not None:
            quantised = Quantised(quantised.scale, quantised.zero_point, axis)
        return Constant(self.name, np.ascontiguousarray(move(self.real)), stored, quantised)

    def transposed(self) -> Constant:
        """A matrix the other way round."""
        axis = 0 if self.quantised is None else 1 - self.quantised.axis
        return self.mapped(np.transpose, axis=axis)

    def taken(self, columns: Numbers) -> Constant:
        """A matrix with its columns in another order."""
        axis = 0 if self.quantised is None else self.quantised.axis
        return self.mapped(lambda array: array[:, columns], axis=axis)

    def reshaped(self, shape: tuple[int, ...]) -> Constant:
        """The same numbers under another shape, a single one repeated."""
        return self.mapped(lambda array: np.broadcast_to(array.reshape(-1), shape))

    def add_to(self, graph: TfliteGraph, *, quantised: bool) -> int:
        """Write it as float32 or as stored; returns the tensor."""
        if quantised and self.stored is not None:
            return graph.constant(self.name, self.stored, self.quantised)
        return graph.constant(self.name, self.real.astype(np.float32))

    def add_bias_to(self, graph: TfliteGraph, given: Quantised | None, weight: Constant) -> int:
        """Write it as a kernel's bias: float32, or int32 in steps of the input's times the weight's scale."""
        if given is None or weight.quantised is None:
            return self.add_to(graph, quantised=False)
        scale = (given.scale * weight.quantised.scale).astype(np.float32)
        steps = np.rint(self.real.astype(np.float64) / scale.astype(np.float64))
        stored = np.clip(steps, -(2**31), 2**31 - 1).astype(np.int32)
        return graph.constant(self.name, stored, Quantised(scale, np.zeros(scale.size, np.int64)))


class Constants:
    """What of a graph does not depend on its input, by value name."""

    def __init__(self, source: onnx.GraphProto) -> None:
        self._known = {
            tensor.name: Constant(tensor.name, numpy_helper.to_array(tensor)) for tensor in source.initializer
        }
        self._taken: set[str] = set()
        for node in source.node:
            self._take(node)

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def __getitem__(self, name: str) -> Constant:
        """Raises BuildError for a value that is computed."""
        if name not in self._known:
            raise BuildError(f"LiteRT: the value {name!r} would have to be a constant")
        return self._known[name]

    def takes(self, node: onnx.NodeProto) -> bool:
        """Whether a node only makes a constant."""
        return node.output[0] in self._taken

    def quantised_of(self, node: onnx.NodeProto) -> Quantised:
        """Scale and zero point of a QuantizeLinear or DequantizeLinear of activations, for int8.

        Raises:
            BuildError: for another type than 8 bits, or a scale per channel.
        """
        scale, zero_point = self._scales(node)
        if scale.size != 1:
            raise BuildError(f"LiteRT: {node.op_type} ({node.name!r}) of activations has a scale per channel")
        return _in_int8(scale, zero_point, 0, node)

    def _take(self, node: onnx.NodeProto) -> None:
        name = node.output[0]
        if node.op_type == "Constant":
            self._known[name] = Constant(name, _constant_of(node))
        elif node.op_type == "DequantizeLinear" and node.input[0] in self._known:
            self._known[name] = self._dequantised(node)
        elif node.op_type == "QuantizeLinear" and node.input[0] in self._known:
            self._known[name] = self._stored(node)
        elif node.op_type == "Identity" and node.input[0] in self._known:
            self._known[name] = self._known[node.input[0]]
        else:
            return
        self._taken.add(name)

    def _scales(self, node: onnx.NodeProto) -> tuple[Numbers, Numbers]:
        scale = self[node.input[1]].real
        zero_point = self[node.input[2]].real if len(node.input) > 2 else np.zeros(scale.shape, np.uint8)
        return scale.reshape(-1), zero_point.reshape(-1)

    def _stored(self, node: onnx.NodeProto) -> Constant:
        """What a QuantizeLinear makes of a constant: the integers, half to even (ONNX, QuantizeLinear)."""
        scale, zero_point = self._scales(node)
        if scale.size != 1:
            raise BuildError(f"LiteRT: {node.op_type} ({node.name!r}) of a constant has a scale per channel")
        steps = np.rint(self._known[node.input[0]].real / scale) + zero_point.astype(np.float64)
        limits = np.iinfo(zero_point.dtype)
        return Constant(node.output[0], np.clip(steps, limits.min, limits.max).astype(zero_point.dtype))

    def _dequantised(self, node: onnx.NodeProto) -> Constant:
        stored = self._known[node.input[0]].real
        scale, zero_point = self._scales(node)
        axis = next((entry.i for entry in node.attribute if entry.name == "axis"), 1) % max(stored.ndim, 1)
        shape = [1] * stored.ndim
        if scale.size > 1:
            shape[axis] = scale.size
        steps = stored.astype(np.float64) - zero_point.astype(np.float64).reshape(shape)
        real = (steps * scale.astype(np.float64).reshape(shape)).astype(np.float32)
        if stored.dtype == np.int32:
            return Constant(node.output[0], real)
        in_int8 = stored
        if stored.dtype == np.uint8:
            in_int8 = (stored.astype(np.int16) - _UINT8_TO_INT8).astype(np.int8)
        return Constant(node.output[0], real, in_int8, _in_int8(scale, zero_point, axis, node))


def _in_int8(scale: Numbers, zero_point: Numbers, axis: int, node: onnx.NodeProto) -> Quantised:
    if zero_point.dtype not in (np.uint8, np.int8):
        raise BuildError(f"LiteRT: {node.op_type} ({node.name!r}) of {zero_point.dtype.name} is no 8 bit one")
    offset = _UINT8_TO_INT8 if zero_point.dtype == np.uint8 else 0
    return Quantised(scale.astype(np.float32), zero_point.astype(np.int64) - offset, axis)


def _constant_of(node: onnx.NodeProto) -> Numbers:
    entry = node.attribute[0]
    value = onnx.helper.get_attribute_value(entry)
    if entry.name == "value":
        return np.asarray(numpy_helper.to_array(value))
    if entry.name in {"value_float", "value_floats"}:
        return np.array(value, np.float32)
    if entry.name in {"value_int", "value_ints"}:
        return np.array(value, np.int64)
    raise BuildError(f"LiteRT: the constant {node.name!r} holds no numbers")
