"""Decide whether an ONNX file is harmless enough to hand to a runtime. No I/O, no `onnx`, no `protobuf`.

The threat: a model file comes from outside, and what loads it trusts it more than it should. External data
has named files beyond the model's folder, to read them (CVE-2024-27318, by `..`; CVE-2026-27489, by links)
and to overwrite them (CVE-2025-51480); onnxruntime's own tag `*/_ORT_MEM_ADDR_/*` names memory. Local
functions that call each other and graphs within nodes overflow the stack; dims ask for memory that no bytes
back. So what an honest stage does not need is refused here, by name. Two parsers must also see the same
model: whatever protobuf would merge, overwrite or skip in silence is refused as well (`protobuf_wire`).

`inspect_model` is total: for any bytes it returns, or raises `BundleError` or its `HostileFileError`, within
the time and memory that `Limits` allow. Once subgraphs, functions and composite types are refused no message
nests into itself, so there is no depth to limit.

Not seen from here: what the graph computes. An Expand to an absurd shape passes; the trial run in a child
process of limited memory is for that. Nor are the names of values matched with each other: the runtime does.

Sources: https://protobuf.dev/programming-guides/encoding/; onnx.proto and docs/ExternalData.md of onnx 1.23;
CVE-2024-27318, CVE-2025-51480, CVE-2026-27489.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Final, TypeAlias

from edge_cascade import onnx_schema as schema
from edge_cascade.errors import BundleError, HostileFileError
from edge_cascade.pauses import Pause, no_pause
from edge_cascade.protobuf_wire import Message, Span, WireReader, quote

PLACEHOLDER_LOCATION = "weights"
"""The one external-data location that our stages use: never a file, always satisfied from memory."""

_DECIMAL = re.compile(r"0|[1-9][0-9]{0,18}")

_Shape: TypeAlias = tuple[int | str | None, ...]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A constant tensor of the file; `dtype` in numpy's words."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ValueSpec:
    """An input or output of the graph; a dimension is a number, a symbol or unknown."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """What a caller needs to know of a model before it creates a session.

    `inputs` holds initializers too where the file lists them as inputs, which makes them overridable.
    `external` are the initializers that must be supplied from memory, `inline` those with data in the file.
    """

    ir_version: int
    opset: int
    inputs: tuple[ValueSpec, ...]
    outputs: tuple[ValueSpec, ...]
    external: tuple[TensorSpec, ...]
    inline: tuple[TensorSpec, ...]
    op_types: frozenset[str]
    node_count: int


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest file that is read; the defaults are far above what a stage of a small board needs."""

    max_bytes: int = 64 << 20
    max_fields: int = 500_000  # protobuf fields in all, packed dims counted singly: bounds time and memory
    max_nodes: int = 20_000
    max_initializers: int = 10_000
    max_dims: int = 16
    max_tensor_elements: int = 1 << 26
    max_inline_bytes: int = 32 << 20  # of all inline initializers
    max_external_bytes: int = 512 << 20  # of all external initializers, and the end of the furthest
    max_attribute_bytes: int = 64 << 10  # of one attribute: a shape or an axis list, no weights
    max_string_bytes: int = 64 << 10  # of one name, comment or metadata value


DEFAULT_LIMITS = Limits()
NODES_AT_ONCE: Final = 48
"""Between two pauses: about half a millisecond."""


def inspect_model(
    data: bytes | memoryview, limits: Limits = DEFAULT_LIMITS, *, pause: Pause = no_pause
) -> ModelSummary:
    """Check a serialised ModelProto and say what it holds. There is a pause after so many nodes each.

    Raises `BundleError` for a file that is damaged or that this version cannot read, `HostileFileError` for
    one that asks for something no honest file needs.
    """
    size_bytes = memoryview(data).nbytes
    if size_bytes > limits.max_bytes:
        raise HostileFileError(f"model: {size_bytes} bytes, more than {limits.max_bytes}")
    return _Inspector(bytes(data), limits, pause).model()


class _Inspector:
    """One pass over one file, with what is left of its limits."""

    def __init__(self, data: bytes, limits: Limits, pause: Pause) -> None:
        self._limits = limits
        self._pause = pause
        self._size_bytes = len(data)
        self._reader = WireReader(
            data, max_fields=limits.max_fields, max_string_bytes=limits.max_string_bytes
        )
        self._inline_bytes = 0
        self._external_bytes = 0

    def model(self) -> ModelSummary:
        model = self._reader.read((0, self._size_bytes), schema.MODEL, "model")
        ir_version = model.number("ir_version")
        if ir_version not in schema.IR_VERSIONS:
            raise BundleError(f"model: ir_version {ir_version} is not one of {_span_of(schema.IR_VERSIONS)}")
        opset = self._opset(model)
        self._entries(model, "metadata_props")
        span = model.span("graph")
        if span is None:
            raise BundleError("model: there is no graph")
        graph = self._reader.read(span, schema.GRAPH, "graph")
        self._entries(graph, "metadata_props")
        op_types = self._nodes(graph)
        external, inline = self._initializers(graph)
        self._values(graph, "value_info")
        return ModelSummary(
            ir_version=ir_version,
            opset=opset,
            inputs=self._shaped_values(graph, "input"),
            outputs=self._shaped_values(graph, "output"),
            external=external,
            inline=inline,
            op_types=op_types,
            node_count=len(graph.spans.get("node", ())),
        )

    def _opset(self, model: Message) -> int:
        versions = []
        for index, span in enumerate(model.spans.get("opset_import", ())):
            opset = self._reader.read(span, schema.OPSET, f"opset_import {index}")
            _check_domain(opset)
            versions.append(opset.number("version"))
        if len(versions) != 1:
            raise HostileFileError(
                f"model: opset_import names the default domain {len(versions)} times, not once; "
                "runtimes differ in which version they take"
            )
        if versions[0] not in schema.OPSETS:
            raise BundleError(f"model: opset {versions[0]} is not one of {_span_of(schema.OPSETS)}")
        return versions[0]

    def _entries(self, message: Message, name: str) -> dict[str, str]:
        entries: dict[str, str] = {}
        for index, span in enumerate(message.spans.get(name, ())):
            entry = self._reader.read(span, schema.ENTRY, f"{message.where} {name} {index}")
            key = entry.text("key")
            if key in entries:
                raise HostileFileError(f"{message.where}: {name} has the key {quote(key)} twice")
            entries[key] = entry.text("value")
        return entries

    # --- nodes

    def _nodes(self, graph: Message) -> frozenset[str]:
        spans = graph.spans.get("node", ())
        if len(spans) > self._limits.max_nodes:
            raise HostileFileError(f"graph: {len(spans)} nodes, more than {self._limits.max_nodes}")
        op_types = set()
        for index, span in enumerate(spans, start=1):
            op_types.add(self._node(span, f"node {index - 1}"))
            if index % NODES_AT_ONCE == 0:
                self._pause()
        return frozenset(op_types)

    def _node(self, span: Span, where: str) -> str:
        node = self._reader.read(span, schema.NODE, where)
        _check_domain(node)
        op_type = node.text("op_type")
        if op_type not in schema.OPERATORS:
            raise HostileFileError(f"{where}: the operator {quote(op_type)} is not one that a stage may use")
        if node.text("overload"):
            raise HostileFileError(f"{where}: overload picks a local function, and those are refused")
        self._entries(node, "metadata_props")
        names: set[str] = set()
        for index, attribute in enumerate(node.spans.get("attribute", ())):
            name = self._attribute(attribute, op_type, f"{where} ({op_type}) attribute {index}")
            if name in names:
                raise HostileFileError(f"{where} ({op_type}): the attribute {quote(name)} is given twice")
            names.add(name)
        return op_type

    def _attribute(self, span: Span, op_type: str, where: str) -> str:
        attribute = self._reader.read(span, schema.ATTRIBUTE, where)
        name = attribute.text("name")
        if not name:
            raise HostileFileError(f"{where}: the name is empty")
        if attribute.text("ref_attr_name"):
            raise HostileFileError(f"{where}: ref_attr_name refers to a local function's attribute")
        value = schema.ATTRIBUTE_VALUES.get(attribute.number("type"))
        if value is None:
            raise HostileFileError(
                f"{where} {quote(name)}: type {attribute.number('type')} is not a plain value"
            )
        for other in schema.ATTRIBUTE_VALUES.values():
            if other != value and other in attribute.seen:
                raise HostileFileError(f"{where} {quote(name)}: its type says {value}, yet {other} is given")
        _check_no_strings(attribute, op_type, name)
        self._attribute_value(attribute, value)
        return name

    def _attribute_value(self, attribute: Message, value: str) -> None:
        if value == "t" and attribute.span("t") is None:
            raise BundleError(f"{attribute.where}: its type says t, yet there is no tensor")
        size_bytes = attribute.counts.get(value, 0) * 8
        for index, span in enumerate(attribute.spans.get(value, ())):
            tensor = self._reader.read(span, schema.TENSOR, f"{attribute.where} tensor {index}")
            if tensor.number("data_location") or "external_data" in tensor.seen:
                raise HostileFileError(f"{tensor.where}: a tensor within an attribute may not be external")
            self._entries(tensor, "metadata_props")
            spec, itemsize = self._tensor_spec(tensor)
            _check_inline_size(tensor, spec, itemsize)
            size_bytes += math.prod(spec.shape) * itemsize
        if size_bytes > self._limits.max_attribute_bytes:
            raise HostileFileError(
                f"{attribute.where}: {size_bytes} bytes of numbers, more than "
                f"{self._limits.max_attribute_bytes}; weights belong into initializers"
            )

    # --- tensors

    def _initializers(self, graph: Message) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        spans = graph.spans.get("initializer", ())
        if len(spans) > self._limits.max_initializers:
            raise HostileFileError(
                f"graph: {len(spans)} initializers, more than {self._limits.max_initializers}"
            )
        names: set[str] = set()
        external: list[TensorSpec] = []
        inline: list[TensorSpec] = []
        for index, span in enumerate(spans):
            tensor = self._reader.read(span, schema.TENSOR, f"initializer {index}")
            name = tensor.text("name")
            tensor.where = f"initializer {index} {quote(name)}"
            if not name:
                raise HostileFileError(f"{tensor.where}: the name is empty")
            if name in names:
                raise HostileFileError(
                    f"{tensor.where}: the name is taken; runtimes differ in which one they keep"
                )
            names.add(name)
            self._entries(tensor, "metadata_props")
            spec, itemsize = self._tensor_spec(tensor)
            if tensor.number("data_location") == 0:
                self._inline(tensor, spec, itemsize)
                inline.append(spec)
            else:
                self._external(tensor, spec, itemsize)
                external.append(spec)
        return tuple(external), tuple(inline)

    def _tensor_spec(self, tensor: Message) -> tuple[TensorSpec, int]:
        dtype, itemsize, _ = _dtype(tensor, "data_type")
        shape = tuple(tensor.numbers.get("dims", ()))
        if len(shape) > self._limits.max_dims:
            raise HostileFileError(f"{tensor.where}: {len(shape)} dims, more than {self._limits.max_dims}")
        elements = 1
        for dim in shape:
            if dim < 0:
                raise HostileFileError(f"{tensor.where}: the dim {dim} is negative")
            # Zeros count as one here: a runtime may multiply the others before it meets them.
            elements *= dim or 1
            if elements > self._limits.max_tensor_elements:
                raise HostileFileError(
                    f"{tensor.where}: dims {list(shape)} make more than "
                    f"{self._limits.max_tensor_elements} elements"
                )
        return TensorSpec(tensor.text("name"), dtype, shape), itemsize

    def _inline(self, tensor: Message, spec: TensorSpec, itemsize: int) -> None:
        if "external_data" in tensor.seen:
            raise HostileFileError(f"{tensor.where}: external_data is given, yet data_location says inline")
        _check_inline_size(tensor, spec, itemsize)
        self._inline_bytes += math.prod(spec.shape) * itemsize
        if self._inline_bytes > self._limits.max_inline_bytes:
            raise HostileFileError(
                f"{tensor.where}: inline data passes {self._limits.max_inline_bytes} bytes here"
            )

    def _external(self, tensor: Message, spec: TensorSpec, itemsize: int) -> None:
        where = tensor.where
        if tensor.number("data_location") != 1:
            raise HostileFileError(f"{where}: data_location {tensor.number('data_location')} does not exist")
        held = _data_fields(tensor)
        if held:
            raise HostileFileError(f"{where}: {held[0]} is given, yet data_location says external")
        entries = self._entries(tensor, "external_data")
        strange = entries.keys() - {"location", "offset", "length"}
        if strange:
            raise HostileFileError(f"{where}: external_data has the key {quote(min(strange))}")
        location = entries.get("location", "")
        if location != PLACEHOLDER_LOCATION:
            raise HostileFileError(
                f"{where}: external_data at {quote(location)}, not at {PLACEHOLDER_LOCATION!r}: "
                "a file may not name other files"
            )
        size_bytes = math.prod(spec.shape) * itemsize
        length = _decimal(entries, "length", where, default=size_bytes)
        if length != size_bytes:
            raise BundleError(
                f"{where}: external_data of {length} bytes, {size_bytes} are needed for its dims"
            )
        self._external_bytes += size_bytes
        furthest = max(self._external_bytes, _decimal(entries, "offset", where, default=0) + size_bytes)
        if furthest > self._limits.max_external_bytes:
            raise HostileFileError(
                f"{where}: external data passes {self._limits.max_external_bytes} bytes here"
            )

    # --- inputs, outputs and values between

    def _shaped_values(self, graph: Message, name: str) -> tuple[ValueSpec, ...]:
        values = []
        for value, (dtype, shape) in self._values(graph, name).items():
            if shape is None:
                raise BundleError(
                    f"graph: the {name} {quote(value)} has no shape, not even one of unknown dims"
                )
            values.append(ValueSpec(value, dtype, shape))
        return tuple(values)

    def _values(self, graph: Message, name: str) -> dict[str, tuple[str, _Shape | None]]:
        values: dict[str, tuple[str, _Shape | None]] = {}
        for index, span in enumerate(graph.spans.get(name, ())):
            value = self._reader.read(span, schema.VALUE_INFO, f"{name} {index}")
            value_name = value.text("name")
            value.where = f"{name} {index} {quote(value_name)}"
            if not value_name:
                raise HostileFileError(f"{value.where}: the name is empty")
            if value_name in values:
                raise HostileFileError(f"{value.where}: the name is taken")
            self._entries(value, "metadata_props")
            values[value_name] = self._type(value)
        return values

    def _type(self, value: Message) -> tuple[str, _Shape | None]:
        span = value.span("type")
        if span is None:
            raise BundleError(f"{value.where}: there is no type")
        span = self._reader.read(span, schema.TYPE, f"{value.where} type").span("tensor_type")
        if span is None:
            raise BundleError(f"{value.where}: the type is no tensor")
        tensor = self._reader.read(span, schema.TENSOR_TYPE, f"{value.where} tensor_type")
        dtype, _, _ = _dtype(tensor, "elem_type")
        span = tensor.span("shape")
        return dtype, None if span is None else self._shape(span, f"{value.where} shape")

    def _shape(self, span: Span, where: str) -> _Shape:
        dims = self._reader.read(span, schema.SHAPE, where).spans.get("dim", ())
        if len(dims) > self._limits.max_dims:
            raise HostileFileError(f"{where}: {len(dims)} dims, more than {self._limits.max_dims}")
        return tuple(self._dim(dim, f"{where} dim {index}") for index, dim in enumerate(dims))

    def _dim(self, span: Span, where: str) -> int | str | None:
        dim = self._reader.read(span, schema.DIMENSION, where)
        if "dim_value" not in dim.seen:
            return dim.text("dim_param") or None
        if "dim_param" in dim.seen:
            raise HostileFileError(
                f"{where}: dim_value and dim_param are both given; parsers keep the later one"
            )
        if not 0 <= dim.number("dim_value") <= self._limits.max_tensor_elements:
            raise HostileFileError(
                f"{where}: {dim.number('dim_value')} is not in 0..{self._limits.max_tensor_elements}"
            )
        return dim.number("dim_value")


def _check_domain(message: Message) -> None:
    domain = message.text("domain")
    if domain not in schema.DEFAULT_DOMAINS:
        raise HostileFileError(f"{message.where}: the operator domain {quote(domain)} is not ONNX's own")


def _check_no_strings(attribute: Message, op_type: str, name: str) -> None:
    """Refuse the two attributes that make string tensors out of operators that are allowed otherwise."""
    if op_type == "Constant" and name in ("value_string", "value_strings"):
        raise HostileFileError(f"{attribute.where}: {name} makes a string tensor")
    if op_type == "Cast" and name == "to" and attribute.number("i") == schema.STRING_DTYPE:
        raise HostileFileError(f"{attribute.where}: a cast to strings")


def _dtype(message: Message, field: str) -> tuple[str, int, str]:
    found = schema.DTYPES.get(message.number(field))
    if found is None:
        raise HostileFileError(
            f"{message.where}: {field} {message.number(field)} is no type that a stage may use"
        )
    return found


def _data_fields(tensor: Message) -> list[str]:
    """The fields of a tensor that hold data, typed ones only if they hold any."""
    typed = [name for name, count in tensor.counts.items() if count]
    return ["raw_data", *typed] if "raw_data" in tensor.seen else typed


def _check_inline_size(tensor: Message, spec: TensorSpec, itemsize: int) -> None:
    elements = math.prod(spec.shape)
    held = _data_fields(tensor)
    if len(held) > 1:
        raise HostileFileError(
            f"{tensor.where}: {' and '.join(held)} are both given; runtimes differ in which they read"
        )
    raw = tensor.span("raw_data")
    if raw is not None:
        if raw[1] - raw[0] != elements * itemsize:
            raise HostileFileError(
                f"{tensor.where}: raw_data of {raw[1] - raw[0]} bytes, {elements * itemsize} are needed for "
                f"{spec.dtype}{list(spec.shape)}"
            )
        return
    expected = _dtype(tensor, "data_type")[2]
    if held and held[0] != expected:
        raise HostileFileError(f"{tensor.where}: {held[0]} is given, {spec.dtype} belongs into {expected}")
    count = tensor.counts.get(expected, 0)
    if count != elements:
        raise HostileFileError(
            f"{tensor.where}: {expected} of {count} numbers, {elements} are needed for "
            f"{spec.dtype}{list(spec.shape)}"
        )


def _decimal(entries: dict[str, str], key: str, where: str, *, default: int) -> int:
    text = entries.get(key)
    if text is None:
        return default
    # int() and stoll() accept signs, blanks and underscores, each in its own way; leading zeros may be octal.
    if not _DECIMAL.fullmatch(text):
        raise HostileFileError(f"{where}: external_data has the {key} {quote(text)}, not a plain number")
    return int(text)


def _span_of(versions: range) -> str:
    return f"{versions.start}..{versions.stop - 1}"
