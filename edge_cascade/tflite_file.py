"""Decide whether a .tflite file is harmless enough to hand to a runtime. No I/O, no `flatbuffers`.

The threat: the Python interpreter of TensorFlow Lite takes a file from memory without verifying it, and then
follows its offsets and indices. So the whole file is read here first (`flatbuffer_wire`) and held against
`tflite_schema`: only listed operators, which excludes custom and Flex ones; no data outside of the file;
every index within its list; constants of exactly the bytes that their shape needs; no value read before it
is made; no stride or scale to divide by that is zero.

`inspect_tflite` is total: for any bytes it returns, or raises `BundleError` or its `HostileFileError`, within
the time and memory that `Limits` allow.

Not seen from here: what kernels do with shapes that do not fit each other, and how large the values between
operators become (a constant may pad a value to any size). The trial run in a child process of limited memory
is for that.

Source: tensorflow/lite/schema/schema.fbs, version 3.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge_cascade import tflite_schema as schema
from edge_cascade.errors import BundleError, HostileFileError
from edge_cascade.flatbuffer_wire import FlatReader, FlatTable
from edge_cascade.manifest import STAGE_FEATURES, STAGE_HEAD, STAGE_INPUT, STAGE_TEMPERATURE
from edge_cascade.scores import HEAD_WIDTH

_DTYPE_OF: Final = {code: name for name, code in schema.DTYPES.items()}
_OPERATOR_OF: Final = {operator.code: name for name, operator in schema.OPERATORS.items()}
_ITEMSIZE: Final = {"float32": 4, "int32": 4, "int8": 1}
_MAX_LINKS: Final = 1024
_ZERO_POINTS: Final = {"float32": (0, 0), "int32": (0, 0), "int8": (-128, 127)}


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest file that is read."""

    max_bytes: int = 64 << 20
    max_reads: int = 2_000_000
    max_parts: int = 20_000  # tensors, buffers or operators
    max_dims: int = 6
    max_tensor_elements: int = 1 << 26
    max_scales: int = 1 << 14  # of one tensor: its channels


DEFAULT_LIMITS: Final = Limits()


@dataclass(frozen=True, slots=True)
class TensorSummary:
    """An input or output of a stage."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TfliteSummary:
    """What a caller needs to know of a file before it hands it to a runtime.

    `weights_sha256` is the file's description: see `digest_of_weights`.
    """

    inputs: tuple[TensorSummary, ...]
    outputs: tuple[TensorSummary, ...]
    operators: tuple[str, ...]
    weights_sha256: str


@dataclass(frozen=True, slots=True)
class _Tensor:
    summary: TensorSummary
    is_constant: bool
    is_per_channel: bool


def channels_last(shape: tuple[int, ...]) -> tuple[int, ...]:
    """How a LiteRT stage hands on features of that shape (channels first, without the batch axis).

    (channels, height, width) become (height, width, channels), a signal has a height of one; a plain vector
    stays as it is.
    """
    if len(shape) not in {2, 3}:
        return shape
    height = shape[1] if len(shape) == 3 else 1
    return (height, shape[-1], shape[0])


def digest_of_weights(weights: Mapping[str, NDArray[np.generic]]) -> str:
    """SHA-256 over the weights that a stage's ONNX form is given: what a LiteRT file was made of.

    A release may replace weights and leave the graph part alone, and with it the LiteRT files.
    """
    digest = hashlib.sha256()
    for name, array in sorted(weights.items()):
        digest.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def check_stage_tensors(
    summary: TfliteSummary,
    input_shape: tuple[int, ...],
    feature_shape: tuple[int, ...] | None,
    *,
    index: int,
    where: str,
) -> None:
    """Refuse a file whose inputs and outputs are not those of stage `index`, for one sample.

    Shapes are the manifest's: channels first, without the batch axis.

    Raises:
        BundleError: with what it has and what is expected.
    """
    taken = input_shape if index == 0 else channels_last(input_shape)
    inputs = {STAGE_INPUT: (1, *taken), STAGE_TEMPERATURE: (1,)}
    outputs: dict[str, tuple[int, ...]] = {STAGE_HEAD: (1, HEAD_WIDTH)}
    if feature_shape is not None:
        outputs[STAGE_FEATURES] = (1, *channels_last(feature_shape))
    for what, found, wanted in (("takes", summary.inputs, inputs), ("gives", summary.outputs, outputs)):
        shapes = {value.name: value.shape for value in found}
        if shapes != wanted or len(found) != len(wanted):
            raise BundleError(f"{where}: {what} {shapes}, expected {wanted}")
        if any(value.dtype != "float32" for value in found):
            raise BundleError(f"{where}: {what} something else than float32")


def inspect_tflite(data: bytes, limits: Limits = DEFAULT_LIMITS) -> TfliteSummary:
    """Check a .tflite file and say what it takes and gives.

    Raises:
        BundleError: for a file of another format or version.
        HostileFileError: for one that asks for something no honest file needs, or leads outside of itself.
    """
    if len(data) > limits.max_bytes:
        raise HostileFileError(f"LiteRT file: {len(data)} bytes, more than {limits.max_bytes}")
    if data[4:8] != schema.IDENTIFIER:
        raise BundleError("LiteRT file: the identifier TFL3 is missing; it is no .tflite file")
    model = FlatReader(data, max_reads=limits.max_reads).root(schema.MODEL, "LiteRT file")
    if model.integer("version") != schema.VERSION:
        raise BundleError(
            f"LiteRT file: schema version {model.integer('version')}, this reads {schema.VERSION}"
        )
    subgraphs = model.tables("subgraphs", schema.SUBGRAPH, most=1)
    if len(subgraphs) != 1:
        raise BundleError("LiteRT file: there is no graph in it")
    buffers = _buffer_sizes(model, limits)
    operators = [
        _operator_name(code)
        for code in model.tables("operator_codes", schema.OPERATOR_CODE, most=len(schema.OPERATORS) * 16)
    ]
    inputs, outputs, used = _subgraph(subgraphs[0], buffers, operators, limits)
    return TfliteSummary(inputs, outputs, used, model.text("description"))


def _buffer_sizes(model: FlatTable, limits: Limits) -> list[int]:
    buffers = model.tables("buffers", schema.BUFFER, most=limits.max_parts)
    sizes = [int(buffer.numbers("data").size) for buffer in buffers]
    if not sizes or sizes[0]:
        raise HostileFileError("LiteRT file buffers 0: it must be there and empty")
    return sizes


def _operator_name(code: FlatTable) -> str:
    number, old = code.integer("builtin_code"), code.integer("deprecated_builtin_code")
    # Runtimes take the larger of both, older ones only the first.
    if min(number, 127) != old:
        raise HostileFileError(f"{code.where}: says {number} and {old}; runtimes differ in which they read")
    name = _OPERATOR_OF.get(number)
    if name is None:
        raise HostileFileError(f"{code.where}: the operator {number} is not one that a stage may use")
    if code.integer("version") < 1:
        raise HostileFileError(f"{code.where}: version {code.integer('version')} of {name}")
    return name


def _subgraph(
    subgraph: FlatTable, buffers: Sequence[int], operators: Sequence[str], limits: Limits
) -> tuple[tuple[TensorSummary, ...], tuple[TensorSummary, ...], tuple[str, ...]]:
    subgraph.text("name")
    tensors = [
        _tensor(tensor, buffers, limits)
        for tensor in subgraph.tables("tensors", schema.TENSOR, most=limits.max_parts)
    ]
    inputs = _indices(subgraph, "inputs", len(tensors))
    outputs = _indices(subgraph, "outputs", len(tensors))
    filled = [tensor.is_constant for tensor in tensors]
    for index in inputs:
        _fill(filled, index, f"{subgraph.where} inputs")
    used = tuple(
        _node(node, operators, tensors, filled)
        for node in subgraph.tables("operators", schema.OPERATOR, most=limits.max_parts)
    )
    if not all(filled[index] for index in outputs):
        raise HostileFileError(f"{subgraph.where}: an output that no operator makes")
    return (
        tuple(tensors[index].summary for index in inputs),
        tuple(tensors[index].summary for index in outputs),
        used,
    )


def _node(node: FlatTable, operators: Sequence[str], tensors: Sequence[_Tensor], filled: list[bool]) -> str:
    opcode = node.integer("opcode_index")
    if opcode >= len(operators):
        raise HostileFileError(f"{node.where}: operator code {opcode} of {len(operators)}")
    operator = operators[opcode]
    where = f"{node.where} ({operator})"
    given = _indices(node, "inputs", len(tensors))
    made = _indices(node, "outputs", len(tensors))
    _check_options(node, operator, inputs=len(given), outputs=len(made))
    weights = schema.OPERATORS[operator].constants
    for position, index in enumerate(given):
        tensor = tensors[index]
        if not filled[index]:
            raise HostileFileError(f"{where}: reads {tensor.summary.name!r} before it is made")
        if position in weights and not tensor.is_constant:
            raise HostileFileError(f"{where}: {tensor.summary.name!r} has to be a constant")
        if position not in weights and tensor.is_per_channel:
            raise HostileFileError(f"{where}: {tensor.summary.name!r} has a scale per channel")
    for index in made:
        _fill(filled, index, where)
        if tensors[index].is_per_channel:
            raise HostileFileError(f"{where}: {tensors[index].summary.name!r} has a scale per channel")
    return operator


def _fill(filled: list[bool], index: int, where: str) -> None:
    if filled[index]:
        raise HostileFileError(f"{where}: tensor {index} is a constant or made already")
    filled[index] = True


def _indices(table: FlatTable, name: str, count: int) -> list[int]:
    numbers = table.numbers(name)
    # Tables may share a vector: what each of them costs is bounded apart.
    if numbers.size > _MAX_LINKS:
        raise HostileFileError(f"{table.where} {name}: {numbers.size} tensors")
    indices: list[int] = numbers.tolist()
    if any(not 0 <= index < count for index in indices):
        raise HostileFileError(f"{table.where} {name}: {indices[:8]} of {count} tensors")
    return indices


def _tensor(table: FlatTable, buffers: Sequence[int], limits: Limits) -> _Tensor:
    name = table.text("name")
    dtype = _DTYPE_OF.get(table.integer("type"))
    if dtype is None:
        raise HostileFileError(f"{table.where}: type {table.integer('type')} is not one that a stage may use")
    shape = tuple(table.numbers("shape")[: limits.max_dims + 1].tolist())
    if len(shape) > limits.max_dims or any(size < 1 for size in shape):
        raise HostileFileError(f"{table.where}: shape {list(shape)}")
    if math.prod(shape) > limits.max_tensor_elements:
        raise HostileFileError(
            f"{table.where}: shape {list(shape)} has more than {limits.max_tensor_elements}"
        )
    buffer = table.integer("buffer")
    if buffer >= len(buffers):
        raise HostileFileError(f"{table.where}: buffer {buffer} of {len(buffers)}")
    size_bytes = math.prod(shape) * _ITEMSIZE[dtype]
    if buffers[buffer] not in {0, size_bytes}:
        raise HostileFileError(
            f"{table.where}: {buffers[buffer]} bytes of data, its shape needs {size_bytes}"
        )
    scales = _scales(table, shape, dtype, limits)
    summary = TensorSummary(name, dtype, shape)
    return _Tensor(summary, is_constant=buffers[buffer] != 0, is_per_channel=scales > 1)


def _scales(tensor: FlatTable, shape: tuple[int, ...], dtype: str, limits: Limits) -> int:
    """How many scales a tensor has."""
    table = tensor.table("quantization", schema.QUANTIZATION)
    if table is None:
        return 0
    scale, zero_point = table.numbers("scale"), table.numbers("zero_point")
    axis = table.integer("quantized_dimension")
    along = shape[axis] if 0 <= axis < len(shape) else 0
    if scale.size != zero_point.size or scale.size not in {1, along} or scale.size > limits.max_scales:
        raise HostileFileError(f"{table.where}: {scale.size} scales and {zero_point.size} zero points")
    if not (np.isfinite(scale) & (scale > 0)).all():
        raise HostileFileError(f"{table.where}: a scale that is not positive")
    lowest, highest = _ZERO_POINTS[dtype]
    if not ((zero_point >= lowest) & (zero_point <= highest)).all():
        raise HostileFileError(f"{table.where}: a zero point outside of {lowest}..{highest}")
    return int(scale.size)


def _check_options(node: FlatTable, name: str, *, inputs: int, outputs: int) -> None:
    operator, where = schema.OPERATORS[name], f"{node.where} ({name})"
    if inputs != operator.inputs and (operator.inputs != schema.VARIADIC or not inputs):
        raise HostileFileError(f"{where}: takes {inputs} tensors")
    if node.integer("builtin_options_type") != operator.options_type:
        raise HostileFileError(f"{where}: carries the options of another operator")
    options = node.table("builtin_options", operator.options)
    if options is None:
        # The runtime takes the defaults, and those are zero.
        if operator.positive:
            raise HostileFileError(f"{where}: has no options")
    else:
        for option in operator.options:
            value = options.number(option)
            if not np.isfinite(value) or (option in operator.positive and not 1 <= value < 2**15):
                raise HostileFileError(f"{where}: {option} is {value}")
    expected = operator.outputs
    if expected == schema.VARIADIC and options is not None:
        expected = options.integer("num_splits")
    if outputs != expected:
        raise HostileFileError(f"{where}: makes {outputs} tensors")
