"""Collects the nodes and constants of a gradient under names of its own. No I/O."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

Dims = tuple[int | None, ...]


class Emitter:
    """Nodes in the order of their emission, and the constants they read. All of them are float32 or int64."""

    def __init__(self, taken: Collection[str], prefix: str = "gradient") -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], onnx.TensorProto] = {}
        self._prefix = prefix
        while any(name.startswith(f"{self._prefix}.") for name in taken):
            self._prefix += "_"

    @property
    def initializers(self) -> list[onnx.TensorProto]:
        """The constants, each once."""
        return list(self._constants.values())

    def op(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Emit a node of one output and give that output's name."""
        return self.ops(operator, inputs, 1, **attributes)[0]

    def ops(self, operator: str, inputs: Sequence[str], outputs: int, **attributes: Any) -> list[str]:
        """Emit a node of several outputs and give their names."""
        stem = f"{self._prefix}.{len(self.nodes)}.{operator}"
        names = [stem, *(f"{stem}.{index}" for index in range(1, outputs))]
        self.nodes.append(helper.make_node(operator, list(inputs), names, name=stem, **attributes))
        return names

    def floats(self, array: NDArray[Any] | float) -> str:
        """A float32 constant."""
        return self._constant(np.asarray(array, np.float32))

    def integers(self, numbers: Sequence[int] | NDArray[Any]) -> str:
        """An int64 constant of one axis."""
        return self._constant(np.asarray(numbers, np.int64))

    def _constant(self, array: NDArray[Any]) -> str:
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"{self._prefix}.constant{len(self._constants)}"
            self._constants[key] = numpy_helper.from_array(array, name)
        return str(self._constants[key].name)

    def scaled(self, name: str, factor: float) -> str:
        """`factor` times a value."""
        return name if factor == 1.0 else self.op("Mul", name, self.floats(factor))

    def total(self, names: Sequence[str]) -> str:
        """The sum of values of one shape."""
        return names[0] if len(names) == 1 else self.op("Sum", *names)

    def transposed(self, name: str, order: Sequence[int]) -> str:
        """A value with its axes in another order."""
        return name if list(order) == sorted(order) else self.op("Transpose", name, perm=list(order))

    def reshaped(self, name: str, dims: Sequence[int]) -> str:
        """A value in another shape; one dim may be -1."""
        return self.op("Reshape", name, self.integers(dims))

    def sum_over(self, name: str, axes: Sequence[int], *, keepdims: bool) -> str:
        """The sum over some axes."""
        return self.op("ReduceSum", name, self.integers(axes), keepdims=int(keepdims))

    def in_shape_of(self, name: str, other: str, dims: Dims) -> str:
        """A value's elements in the shape of another, whose dims are known but for the batch."""
        if sum(dim is None for dim in dims) > 1:
            return self.op("Reshape", name, self.op("Shape", other))
        return self.reshaped(name, [-1 if dim is None else dim for dim in dims])

    def spread(self, name: str, other: str, dims: Dims, axes: Sequence[int]) -> str:
        """A value with 1 on `axes` repeated along them, to the shape of another."""
        if any(dims[axis] is None for axis in axes):
            return self.op("Expand", name, self.op("Shape", other))
        target = [dims[axis] if axis in axes else 1 for axis in range(len(dims))]
        return self.op("Expand", name, self.integers(np.array(target, np.int64)))

    def zeros_like(self, name: str) -> str:
        """Zeros in the shape of a value."""
        return self.op("ConstantOfShape", self.op("Shape", name))

    def unbroadcast(self, gradient: str, broadcast: Dims, name: str, dims: Dims) -> str:
        """The gradient of a value of `dims` from that of its broadcast form: summed where it was repeated.

        Broadcasting follows the operators' specification, which is numpy's.
        """
        extra = len(broadcast) - len(dims)
        repeated = [
            axis
            for axis, dim in enumerate(broadcast)
            if axis < extra or (dims[axis - extra] == 1 and dim != 1)
        ]
        if not repeated:
            return gradient
        if repeated == list(range(extra)):
            return self.sum_over(gradient, repeated, keepdims=False)
        summed = self.sum_over(gradient, repeated, keepdims=True)
        return self.in_shape_of(summed, name, dims) if extra else summed
