"""Where a value's numbers lie: ONNX has channels first, TensorFlow Lite's windows want them last. No I/O.

A value keeps the shape that ONNX gives it; only its tensor may be laid out otherwise. It is transposed when
an operator needs it, once, and not at all where only one channel or one place exists. Flattening is delayed:
the dense layer behind it permutes its weights instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum, auto

import numpy as np

from cloud_hub.builder.litert.writer import Array, Quantised, TfliteGraph
from cloud_hub.errors import BuildError
from edge_cascade.tflite_file import channels_last

Shape = tuple[int, ...]


class Layout(Enum):
    """How a tensor holds its value."""

    FIRST = auto()
    """Element by element as ONNX does."""
    LAST = auto()
    """(1, height, width, channels), a signal with a height of one."""
    FLAT_LAST = auto()
    """(1, elements) of a value that was `LAST` before it was flattened."""


@dataclass(frozen=True, slots=True)
class Value:
    """A real-valued ONNX value and the tensor that holds it, in int8 if `quantised`.

    `shape` is ONNX's, with a batch axis of one; `flattened` is the shape from before, of a `FLAT_LAST`.
    """

    tensor: int
    shape: Shape
    layout: Layout = Layout.FIRST
    quantised: Quantised | None = None
    flattened: Shape = ()

    @property
    def dtype(self) -> str:
        """The tensor's number type."""
        return "float32" if self.quantised is None else "int8"


def version_of(value: Value) -> int:
    """The version that brought int8 to most operators, or the first."""
    return 1 if value.quantised is None else 2


class Placement:
    """Brings values of one graph into the layout or number type that is asked for."""

    def __init__(self, graph: TfliteGraph) -> None:
        self._graph = graph
        self._done: dict[tuple[int, Shape, str], Value] = {}

    def make(
        self, name: str, shape: Shape, layout: Layout = Layout.FIRST, quantised: Quantised | None = None
    ) -> Value:
        """A new value that the next operator fills."""
        stored = (1, *channels_last(shape[1:])) if layout is Layout.LAST else shape
        dtype = "float32" if quantised is None else "int8"
        return Value(self._graph.value(name, stored, dtype, quantised), shape, layout, quantised)

    def as_float(self, value: Value) -> Value:
        """The value in float32."""
        if value.quantised is None:
            return value
        return self._once(value, "float", self._dequantise)

    def as_quantised(self, value: Value, quantised: Quantised) -> Value:
        """The value in int8 of this scale and zero point, stored anew unless it is so already."""
        if value.quantised is not None and value.quantised.same_as(quantised):
            return value
        made = self.like(value, self._name(value, "int8"), quantised)
        self._graph.add("QUANTIZE", [value.tensor], [made.tensor])
        return made

    def as_last(self, value: Value) -> Value:
        """The value with channels last; it must have one or two axes beside channels."""
        if value.layout is Layout.LAST:
            return value
        if len(value.shape) not in {3, 4}:
            raise BuildError(f"LiteRT: a window over a value of shape {value.shape} cannot be written")
        return self._once(value, "last", self._to_last)

    def as_first(self, value: Value) -> Value:
        """The value with its elements in ONNX's order."""
        if value.layout is Layout.FIRST:
            return value
        return self._once(value, "first", self._to_first)

    def reshaped(self, value: Value, shape: Shape) -> Value:
        """The value under another shape, `(1, ...)`."""
        if shape == value.shape:
            return value
        if value.layout is Layout.LAST and _is_same_in_both(value.shape):
            return replace(self._reshape(value, shape, shape), layout=Layout.FIRST)
        if value.layout is Layout.LAST and len(shape) == 2:
            made = self._reshape(value, shape, shape)
            return replace(made, layout=Layout.FLAT_LAST, flattened=value.shape)
        if value.layout is Layout.FLAT_LAST and shape == value.flattened:
            stored = (1, *channels_last(shape[1:]))
            return replace(self._reshape(value, shape, stored), layout=Layout.LAST, flattened=())
        return self._reshape(self.as_first(value), shape, shape)

    def _once(self, value: Value, what: str, convert: Callable[[Value], Value]) -> Value:
        key = (value.tensor, value.shape, what)
        if key not in self._done:
            self._done[key] = convert(value)
        return self._done[key]

    def _dequantise(self, value: Value) -> Value:
        made = self.like(value, self._name(value, "float"), None)
        self._graph.add("DEQUANTIZE", [value.tensor], [made.tensor], version=2)
        return made

    def _to_last(self, value: Value) -> Value:
        stored = (1, *channels_last(value.shape[1:]))
        axes = tuple(range(len(value.shape)))
        moved = value
        if not _is_same_in_both(value.shape):
            moved = self.transposed(value, (0, *axes[2:], 1))
        return replace(self._reshape(moved, value.shape, stored), layout=Layout.LAST)

    def _to_first(self, value: Value) -> Value:
        shape = value.flattened or value.shape
        channels, *places = shape[1:]
        if _is_same_in_both(shape):
            moved = value
        else:
            rows = self._reshape(value, (1, *places, channels), (1, *places, channels))
            last = len(shape) - 1
            moved = self.transposed(replace(rows, layout=Layout.FIRST), (0, last, *range(1, last)))
        return replace(self._reshape(moved, value.shape, value.shape), layout=Layout.FIRST, flattened=())

    def transposed(self, value: Value, order: tuple[int, ...]) -> Value:
        """A value in ONNX's order with its axes in another."""
        shape = tuple(value.shape[axis] for axis in order)
        made = self.make(self._name(value, "transposed"), shape, Layout.FIRST, value.quantised)
        permutation = self._graph.constant("permutation", np.array(order, np.int32))
        self._graph.add("TRANSPOSE", [value.tensor, permutation], [made.tensor], version=version_of(value))
        return made

    def _reshape(self, value: Value, shape: Shape, stored: Shape) -> Value:
        if self._graph.tensors[value.tensor].shape == stored:
            return replace(value, shape=shape)
        tensor = self._graph.value(self._name(value, "reshaped"), stored, value.dtype, value.quantised)
        target = self._graph.constant("shape", np.array(stored, np.int32))
        self._graph.add("RESHAPE", [value.tensor, target], [tensor])
        return replace(value, tensor=tensor, shape=shape)

    def like(self, value: Value, name: str, quantised: Quantised | None) -> Value:
        """A new value laid out like another one, for an operator that goes number by number."""
        stored = self._graph.tensors[value.tensor].shape
        dtype = "float32" if quantised is None else "int8"
        return replace(value, tensor=self._graph.value(name, stored, dtype, quantised), quantised=quantised)

    def _name(self, value: Value, what: str) -> str:
        return f"{self._graph.tensors[value.tensor].name}.{what}"


def as_last_constant(array: Array, rank: int) -> Array:
    """A constant for elementwise work with a `LAST` value of that many ONNX axes, aligned as ONNX would."""
    full = array.reshape((1,) * (rank - array.ndim) + array.shape)
    moved = np.moveaxis(full, 1, -1)
    return np.ascontiguousarray(moved.reshape(1, 1, *moved.shape[1:]) if rank == 3 else moved)


def flat_order(shape: Shape) -> Array:
    """For each element of a flattened `LAST` value, its place in ONNX's order; `shape` is from before."""
    numbers = np.arange(math.prod(shape)).reshape(shape)
    return np.moveaxis(numbers, 1, -1).reshape(-1)


def _is_same_in_both(shape: Shape) -> bool:
    """Whether one channel or one place makes both orders the same."""
    return len(shape) < 3 or shape[1] == 1 or math.prod(shape[2:]) == 1
