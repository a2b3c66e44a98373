"""A TensorFlow Lite model under construction, and its flatbuffer. Knows tables, not networks. No I/O.

Only `flatbuffers` is needed, not the runtime: what is written is what `edge_cascade.tflite_schema` lists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_cascade import tflite_schema as schema

Array = NDArray[np.generic]

_SCALARS = {
    "int8": "Int8",
    "uint8": "Uint8",
    "int32": "Int32",
    "uint32": "Uint32",
    "float32": "Float32",
    "bool": "Bool",
}
_VECTORS = {"bytes": np.uint8, "int32s": np.int32, "int64s": np.int64, "float32s": np.float32}
# Kernels read weights where they lie in the file, with instructions that want them aligned.
_DATA_ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class Quantised:
    """`real = scale * (stored - zero_point)`: one scale, or one per entry of `axis` (weights only)."""

    scale: NDArray[np.float32]
    zero_point: NDArray[np.int64]
    axis: int = 0

    def same_as(self, other: Quantised) -> bool:
        """Whether both store a real number alike."""
        return np.array_equal(self.scale, other.scale) and np.array_equal(self.zero_point, other.zero_point)


@dataclass(frozen=True, slots=True)
class Tensor:
    """A value or constant: shape with the batch axis, number type, and its bytes if it is constant."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    quantised: Quantised | None = None
    data: bytes | None = None


@dataclass(frozen=True, slots=True)
class _Node:
    op: str
    version: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: Mapping[str, float]


class TfliteGraph:
    """Tensors, known by number, and operators in the order in which they run."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._nodes: list[_Node] = []
        self._constants: dict[tuple[bytes, str, tuple[int, ...]], int] = {}

    def value(
        self, name: str, shape: Sequence[int], dtype: str = "float32", quantised: Quantised | None = None
    ) -> int:
        """Declare a tensor that an operator or the caller fills."""
        self.tensors.append(Tensor(name, tuple(shape), dtype, quantised))
        return len(self.tensors) - 1

    def constant(self, name: str, array: Array, quantised: Quantised | None = None) -> int:
        """Declare a tensor whose content is in the file; an unquantised one is stored only once."""
        key = (array.tobytes(), array.dtype.name, array.shape)
        if quantised is None and key in self._constants:
            return self._constants[key]
        self.tensors.append(Tensor(name, array.shape, array.dtype.name, quantised, key[0]))
        if quantised is None:
            self._constants[key] = len(self.tensors) - 1
        return len(self.tensors) - 1

    def rename(self, tensor: int, name: str) -> None:
        """Give a tensor the name by which a caller asks for it."""
        self.tensors[tensor] = replace(self.tensors[tensor], name=name)

    def add(
        self,
        op: str,
        inputs: Sequence[int],
        outputs: Sequence[int],
        options: Mapping[str, float] | None = None,
        *,
        version: int = 1,
    ) -> None:
        """Append an operator; options are those of the schema, left out ones have their default."""
        self._nodes.append(_Node(op, version, tuple(inputs), tuple(outputs), options or {}))

    def to_bytes(self, inputs: Sequence[int], outputs: Sequence[int], description: str = "") -> bytes:
        """The file. The same graph gives the same bytes."""
        import flatbuffers

        flat = _Flat(flatbuffers.Builder(1024))
        # Buffer 0 is empty by convention: tensors without content refer to it.
        filled = [tensor for tensor in self.tensors if tensor.data is not None]
        numbers = {id(tensor): index + 1 for index, tensor in enumerate(filled)}
        codes = sorted({(node.op, node.version) for node in self._nodes})
        subgraph = flat.table(
            schema.SUBGRAPH,
            tensors=[flat.tensor(tensor, numbers.get(id(tensor), 0)) for tensor in self.tensors],
            inputs=inputs,
            outputs=outputs,
            operators=[flat.operator(node, codes.index((node.op, node.version))) for node in self._nodes],
        )
        model = flat.table(
            schema.MODEL,
            version=schema.VERSION,
            operator_codes=[flat.operator_code(op, version) for op, version in codes],
            subgraphs=[subgraph],
            description=description,
            buffers=[flat.table(schema.BUFFER), *(flat.buffer(tensor.data or b"") for tensor in filled)],
        )
        return flat.finish(model)


class _Flat:
    """A flatbuffer, written back to front: what a table refers to comes before it."""

    def __init__(self, builder: Any) -> None:
        self._builder = builder

    def finish(self, root: int) -> bytes:
        self._builder.Finish(root, schema.IDENTIFIER)
        return bytes(self._builder.Output())

    def table(self, table: schema.Table, **values: Any) -> int:
        builder = self._builder
        offsets = {
            name: self._offset(table[name].kind, value)
            for name, value in values.items()
            if table[name].kind not in _SCALARS
        }
        builder.StartObject(1 + max((entry.slot for entry in table.values()), default=-1))
        for name, value in values.items():
            entry = table[name]
            if name in offsets:
                builder.PrependUOffsetTRelativeSlot(entry.slot, offsets[name], 0)
            else:
                prepend = getattr(builder, f"Prepend{_SCALARS[entry.kind]}Slot")
                prepend(entry.slot, value, entry.default)
        return int(builder.EndObject())

    def tensor(self, tensor: Tensor, buffer: int) -> int:
        values: dict[str, Any] = {}
        if tensor.quantised is not None:
            values["quantization"] = self.table(
                schema.QUANTIZATION,
                scale=tensor.quantised.scale,
                zero_point=tensor.quantised.zero_point,
                quantized_dimension=tensor.quantised.axis,
            )
        return self.table(
            schema.TENSOR,
            shape=tensor.shape,
            type=schema.DTYPES[tensor.dtype],
            buffer=buffer,
            name=tensor.name,
            **values,
        )

    def operator_code(self, op: str, version: int) -> int:
        code = schema.OPERATORS[op].code
        # Readers of before 2020 know the first field only, which holds no more than 127.
        return self.table(
            schema.OPERATOR_CODE, deprecated_builtin_code=min(code, 127), version=version, builtin_code=code
        )

    def operator(self, node: _Node, opcode_index: int) -> int:
        operator = schema.OPERATORS[node.op]
        values: dict[str, Any] = {}
        if operator.options_type:
            values["builtin_options_type"] = operator.options_type
            values["builtin_options"] = self.table(operator.options, **node.options)
        return self.table(
            schema.OPERATOR, opcode_index=opcode_index, inputs=node.inputs, outputs=node.outputs, **values
        )

    def buffer(self, data: bytes) -> int:
        builder = self._builder
        builder.StartVector(1, len(data), _DATA_ALIGNMENT)
        builder.head = builder.Head() - len(data)
        builder.Bytes[builder.Head() : builder.Head() + len(data)] = data
        vector = builder.EndVector()
        builder.StartObject(1)
        builder.PrependUOffsetTRelativeSlot(schema.BUFFER["data"].slot, vector, 0)
        return int(builder.EndObject())

    def _offset(self, kind: str, value: Any) -> int:
        builder = self._builder
        if kind == "text":
            return int(builder.CreateString(value))
        if kind == "table":
            return int(value)
        if kind == "tables":
            builder.StartVector(4, len(value), 4)
            for offset in reversed(value):
                builder.PrependUOffsetTRelative(offset)
            return int(builder.EndVector())
        return int(builder.CreateNumpyVector(np.asarray(value, _VECTORS[kind])))
