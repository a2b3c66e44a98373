"""What a .tflite file may hold: tables, operators, number types. Tables only, no code, no I/O.

The builder writes with these tables and the device reads with them. Slots and codes follow schema.fbs of
TensorFlow Lite, version 3; what is not listed here is refused until somebody has read what it does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

IDENTIFIER: Final = b"TFL3"
VERSION: Final = 3

DTYPES: Final[Mapping[str, int]] = {"float32": 0, "int32": 2, "int8": 9}

ACTIVATION_NONE: Final = 0
ACTIVATION_RELU: Final = 1
ACTIVATION_RELU6: Final = 3
PADDING_SAME: Final = 0
PADDING_VALID: Final = 1


@dataclass(frozen=True, slots=True)
class Field:
    """One slot of a flatbuffer table.

    `kind` is a number (`int8`, `uint8`, `int32`, `uint32`, `float32`, `bool`), a vector of numbers (`bytes`,
    `int32s`, `int64s`, `float32s`), `text`, `table` or `tables`. A number that is left out is `default`.
    """

    slot: int
    kind: str
    default: float = 0


Table = Mapping[str, Field]

MODEL: Final[Table] = {
    "version": Field(0, "uint32"),
    "operator_codes": Field(1, "tables"),
    "subgraphs": Field(2, "tables"),
    "description": Field(3, "text"),
    "buffers": Field(4, "tables"),
}
OPERATOR_CODE: Final[Table] = {
    "deprecated_builtin_code": Field(0, "int8"),
    "version": Field(2, "int32", 1),
    "builtin_code": Field(3, "int32"),
}
SUBGRAPH: Final[Table] = {
    "tensors": Field(0, "tables"),
    "inputs": Field(1, "int32s"),
    "outputs": Field(2, "int32s"),
    "operators": Field(3, "tables"),
    "name": Field(4, "text"),
}
TENSOR: Final[Table] = {
    "shape": Field(0, "int32s"),
    "type": Field(1, "int8"),
    "buffer": Field(2, "uint32"),
    "name": Field(3, "text"),
    "quantization": Field(4, "table"),
}
QUANTIZATION: Final[Table] = {
    "scale": Field(2, "float32s"),
    "zero_point": Field(3, "int64s"),
    "quantized_dimension": Field(6, "int32"),
}
OPERATOR: Final[Table] = {
    "opcode_index": Field(0, "uint32"),
    "inputs": Field(1, "int32s"),
    "outputs": Field(2, "int32s"),
    "builtin_options_type": Field(3, "uint8"),
    "builtin_options": Field(4, "table"),
}
BUFFER: Final[Table] = {"data": Field(0, "bytes")}


@dataclass(frozen=True, slots=True)
class Operator:
    """An operator's code, how many tensors it takes, and the table of its options.

    `constants` are the inputs that must be in the file, so that every shape is known beforehand; `positive`
    names options that divide something.
    """

    code: int
    inputs: int = 1
    options_type: int = 0
    options: Table = field(default_factory=dict)
    positive: frozenset[str] = frozenset()
    constants: tuple[int, ...] = ()
    outputs: int = 1


VARIADIC: Final = 0
"""As the number of inputs: any but none. As that of outputs: what the option `num_splits` says."""

_CONV: Final[Table] = {
    "padding": Field(0, "int8"),
    "stride_w": Field(1, "int32"),
    "stride_h": Field(2, "int32"),
    "activation": Field(3, "int8"),
    "dilation_w": Field(4, "int32", 1),
    "dilation_h": Field(5, "int32", 1),
}
_DEPTHWISE: Final[Table] = {
    "padding": Field(0, "int8"),
    "stride_w": Field(1, "int32"),
    "stride_h": Field(2, "int32"),
    "depth_multiplier": Field(3, "int32"),
    "activation": Field(4, "int8"),
    "dilation_w": Field(5, "int32", 1),
    "dilation_h": Field(6, "int32", 1),
}
_POOL: Final[Table] = {
    "padding": Field(0, "int8"),
    "stride_w": Field(1, "int32"),
    "stride_h": Field(2, "int32"),
    "filter_w": Field(3, "int32"),
    "filter_h": Field(4, "int32"),
    "activation": Field(5, "int8"),
}
_ACTIVATION: Final[Table] = {"activation": Field(0, "int8")}
_KEEP_DIMS: Final[Table] = {"keep_dims": Field(0, "bool")}
_STRIDES: Final = frozenset({"stride_w", "stride_h"})
_DILATED: Final = _STRIDES | {"dilation_w", "dilation_h"}
_FILTER: Final = _STRIDES | {"filter_w", "filter_h"}

OPERATORS: Final[Mapping[str, Operator]] = {
    "ADD": Operator(0, 2, 11, _ACTIVATION),
    "AVERAGE_POOL_2D": Operator(1, 1, 5, _POOL, _FILTER),
    "CONCATENATION": Operator(2, VARIADIC, 10, {"axis": Field(0, "int32")}),
    "CONV_2D": Operator(3, 3, 1, _CONV, _DILATED, (1, 2)),
    "DEPTHWISE_CONV_2D": Operator(4, 3, 2, _DEPTHWISE, _DILATED | {"depth_multiplier"}, (1, 2)),
    "DEQUANTIZE": Operator(6, 1, 38),
    "FULLY_CONNECTED": Operator(9, 3, 8, _ACTIVATION, constants=(1, 2)),
    "LOGISTIC": Operator(14),
    "MAX_POOL_2D": Operator(17, 1, 5, _POOL, _FILTER),
    "MUL": Operator(18, 2, 21, _ACTIVATION),
    "RELU": Operator(19),
    "RELU6": Operator(21),
    "RESHAPE": Operator(22, 2, 17, constants=(1,)),
    "SOFTMAX": Operator(25, 1, 9, {"beta": Field(0, "float32")}),
    "TANH": Operator(28),
    "PAD": Operator(34, 2, 22, constants=(1,)),
    "TRANSPOSE": Operator(39, 2, 26, constants=(1,)),
    "MEAN": Operator(40, 2, 27, _KEEP_DIMS, constants=(1,)),
    "SUB": Operator(41, 2, 28, _ACTIVATION),
    "DIV": Operator(42, 2, 29, _ACTIVATION),
    "TOPK_V2": Operator(48, 2, 34, constants=(1,), outputs=2),
    "SPLIT": Operator(
        49, 2, 35, {"num_splits": Field(0, "int32")}, frozenset({"num_splits"}), (0,), VARIADIC
    ),
    "CAST": Operator(53, 1, 37, {"in_type": Field(0, "int8"), "out_type": Field(1, "int8")}),
    "MAXIMUM": Operator(55, 2, 39),
    "MINIMUM": Operator(57, 2, 39),
    "PADV2": Operator(60, 3, 43, constants=(1, 2)),
    "LOG": Operator(73),
    "SUM": Operator(74, 2, 27, _KEEP_DIMS, constants=(1,)),
    "LEAKY_RELU": Operator(98, 1, 75, {"alpha": Field(0, "float32")}),
    "QUANTIZE": Operator(114, 1, 89),
    "HARD_SWISH": Operator(117, 1, 91),
}
