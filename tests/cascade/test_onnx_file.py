"""Hostile ONNX files: every rule by name, then the same bytes read by `onnx` and by us."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_cascade import onnx_schema
from edge_cascade.errors import BundleError, HostileFileError
from edge_cascade.onnx_file import Limits, ModelSummary, TensorSpec, ValueSpec, inspect_model
from edge_cascade.protobuf_wire import Kind, Schema

onnx = pytest.importorskip("onnx")
unknown_fields = pytest.importorskip("google.protobuf.unknown_fields")
helper, numpy_helper, TensorProto = onnx.helper, onnx.numpy_helper, onnx.TensorProto

FLOAT = TensorProto.FLOAT
EXTERNAL = TensorProto.EXTERNAL


# --- models, and what `onnx` says of them


def external_tensor(name: str, shape: tuple[int, ...], data_type: int = FLOAT, **entries: str) -> Any:
    tensor = TensorProto(name=name, data_type=data_type, dims=shape, data_location=EXTERNAL)
    for key, value in {"location": "weights", **entries}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def stage() -> Any:
    """One dense layer: its weight from memory, its bias in the file."""
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["x", "weight", "bias"], ["h"], name="dense", transB=1),
            helper.make_node("LogSoftmax", ["h"], ["y"], name="head", axis=-1),
        ],
        "stage",
        [helper.make_tensor_value_info("x", FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", FLOAT, [None, 3])],
        [external_tensor("weight", (3, 4)), numpy_helper.from_array(np.zeros(3, np.float32), "bias")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def edited(edit: Callable[[Any], object]) -> bytes:
    model = stage()
    edit(model)
    return model.SerializeToString()


def with_node(*args: Any, **kwargs: Any) -> bytes:
    return edited(lambda model: model.graph.node.append(helper.make_node(*args, **kwargs)))


def with_initializer(**fields: Any) -> bytes:
    tensor = TensorProto(**{"name": "extra", "data_type": FLOAT, "dims": (2,), **fields})
    return edited(lambda model: model.graph.initializer.append(tensor))


def value_of(info: Any) -> ValueSpec:
    tensor = info.type.tensor_type
    shape = tuple(
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in tensor.shape.dim
    )
    return ValueSpec(info.name, dtype_of(tensor.elem_type), shape)


def dtype_of(data_type: int) -> str:
    return str(np.dtype(helper.tensor_dtype_to_np_dtype(data_type)))


def summary_by_onnx(model: Any) -> ModelSummary:
    graph = model.graph
    constants = [
        (t.data_location == EXTERNAL, TensorSpec(t.name, dtype_of(t.data_type), tuple(t.dims)))
        for t in graph.initializer
    ]
    return ModelSummary(
        ir_version=model.ir_version,
        opset=model.opset_import[0].version,
        inputs=tuple(value_of(info) for info in graph.input),
        outputs=tuple(value_of(info) for info in graph.output),
        external=tuple(spec for external, spec in constants if external),
        inline=tuple(spec for external, spec in constants if not external),
        op_types=frozenset(node.op_type for node in graph.node),
        node_count=len(graph.node),
    )


def refusal(data: bytes, limits: Limits | None = None) -> str:
    with pytest.raises(HostileFileError) as refused:
        inspect_model(data, limits or Limits())
    return str(refused.value)


def damage(data: bytes) -> str:
    with pytest.raises(BundleError) as refused:
        inspect_model(data)
    assert not isinstance(refused.value, HostileFileError)
    return str(refused.value)


# --- protobuf by hand, for what `onnx` does not write


def varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def chunk(field: int, payload: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(payload)) + payload


def model_of(graph: bytes) -> bytes:
    return number(1, 8) + chunk(8, number(2, 17)) + chunk(7, graph)


def initializer_of(tensor: bytes) -> bytes:
    return model_of(chunk(5, chunk(8, b"w") + tensor))


# --- honest files


def test_stage_is_summarised():
    assert inspect_model(stage().SerializeToString()) == ModelSummary(
        ir_version=8,
        opset=17,
        inputs=(ValueSpec("x", "float32", ("n", 4)),),
        outputs=(ValueSpec("y", "float32", (None, 3)),),
        external=(TensorSpec("weight", "float32", (3, 4)),),
        inline=(TensorSpec("bias", "float32", (3,)),),
        op_types=frozenset({"Gemm", "LogSoftmax"}),
        node_count=2,
    )


def test_memoryview_reads_like_bytes():
    data = stage().SerializeToString()
    assert inspect_model(memoryview(data)) == inspect_model(data)


def test_external_data_may_say_where_it_lies():
    tensor = external_tensor("extra", (2, 2), TensorProto.INT8, offset="4096", length="4")
    summary = inspect_model(edited(lambda model: model.graph.initializer.append(tensor)))
    assert summary.external[-1] == TensorSpec("extra", "int8", (2, 2))


def test_packed_unpacked_and_mixed_dims_are_the_same():
    data = chunk(9, b"\0" * 24)
    spelled = [
        number(1, 2) + number(1, 3),
        chunk(1, b"\x02\x03"),
        number(1, 2) + chunk(1, b"\x03"),
        chunk(1, b"\x02") + chunk(1, b"") + number(1, 3),
    ]
    for dims in spelled:
        summary = inspect_model(initializer_of(dims + number(2, 1) + data))
        assert summary.inline == (TensorSpec("w", "float32", (2, 3)),)


def test_typed_data_is_counted_packed_and_unpacked():
    dims = number(1, 3) + number(2, TensorProto.INT64)
    ten_bytes = varint((1 << 64) - 1)
    for data in (
        chunk(7, b"\x01" + ten_bytes + b"\x02"),
        number(7, 1) + number(7, (1 << 64) - 1) + number(7, 2),
        number(7, 1) + chunk(7, ten_bytes + b"\x02"),
    ):
        assert inspect_model(initializer_of(dims + data)).inline == (TensorSpec("w", "int64", (3,)),)


def test_scalar_and_empty_tensors_are_accepted():
    scalar = numpy_helper.from_array(np.asarray(1.5, np.float64), "scalar")
    empty = numpy_helper.from_array(np.zeros((0, 3), np.bool_), "empty")
    summary = inspect_model(edited(lambda model: model.graph.initializer.extend([scalar, empty])))
    assert summary.inline[1:] == (TensorSpec("scalar", "float64", ()), TensorSpec("empty", "bool", (0, 3)))


def test_overridable_initializers_are_inputs_too():
    info = helper.make_tensor_value_info("bias", FLOAT, [3])
    summary = inspect_model(edited(lambda model: model.graph.input.append(info)))
    assert [value.name for value in summary.inputs] == ["x", "bias"]


def test_metadata_comments_and_intermediate_values_are_accepted():
    def annotate(model: Any) -> None:
        model.doc_string = "für Prüfstand 3"
        model.metadata_props.add(key="source", value="recipe")
        model.graph.node[0].metadata_props.add(key="module", value="dense")
        model.graph.value_info.append(helper.make_tensor_value_info("h", FLOAT, None))

    assert inspect_model(edited(annotate)) == inspect_model(stage().SerializeToString())


def test_2500_kilobytes_are_read_within_100_ms():
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(rng.normal(size=(50, 50)).astype(np.float32), f"w{i}") for i in range(250)
    ]
    nodes = [helper.make_node("MatMul", [f"v{i}", f"w{i}"], [f"v{i + 1}"]) for i in range(250)]

    def grow(model: Any) -> None:
        model.graph.initializer.extend(weights)
        model.graph.node.extend(nodes)

    data = edited(grow)
    assert len(data) > 2_500_000
    taken_s = []
    for _ in range(3):
        start = time.process_time()
        inspect_model(data)
        taken_s.append(time.process_time() - start)
    assert min(taken_s) < 0.1


# --- files that reach for other files


@pytest.mark.parametrize(
    "location",
    [
        "",
        "Weights",
        "weights.bin",
        "weights ",
        "./weights",
        "../weights",
        "/etc/passwd",
        "*/_ORT_MEM_ADDR_/*",
        "file:weights",
    ],
)
def test_external_data_anywhere_else_is_refused(location: str):
    message = refusal(
        edited(lambda m: m.graph.initializer.append(external_tensor("w", (2,), location=location)))
    )
    assert message.startswith("initializer 2 'w': external_data at ")
    assert repr(location) in message


def test_location_is_not_cut_at_a_nul():
    message = refusal(
        edited(lambda m: m.graph.initializer.append(external_tensor("w", (2,), location="weights\0/../x")))
    )
    assert "value holds a NUL" in message


def test_external_data_without_location_is_refused():
    assert "external_data at ''" in refusal(with_initializer(data_location=EXTERNAL))


@pytest.mark.parametrize("key", ["checksum", "basepath", "Location", ""])
def test_external_data_with_another_key_is_refused(key: str):
    tensor = external_tensor("w", (2,), **{key: "1"})
    message = refusal(edited(lambda model: model.graph.initializer.append(tensor)))
    assert f"external_data has the key {key!r}" in message


def test_external_data_with_two_locations_is_refused():
    tensor = external_tensor("w", (2,))
    tensor.external_data.add(key="location", value="/etc/passwd")
    message = refusal(edited(lambda model: model.graph.initializer.append(tensor)))
    assert "external_data has the key 'location' twice" in message


@pytest.mark.parametrize("text", ["-1", "+8", " 8", "8 ", "0x8", "1_0", "08", "", "8.0", "٨", "9" * 20])
@pytest.mark.parametrize("key", ["offset", "length"])
def test_external_data_with_a_strange_number_is_refused(key: str, text: str):
    tensor = external_tensor("w", (2,), **{key: text})
    message = refusal(edited(lambda model: model.graph.initializer.append(tensor)))
    assert f"external_data has the {key} {text!r}, not a plain number" in message


def test_external_data_shorter_than_its_dims_is_damaged():
    tensor = external_tensor("w", (2,), length="4")
    message = damage(edited(lambda model: model.graph.initializer.append(tensor)))
    assert "external_data of 4 bytes, 8 are needed" in message


def test_external_data_far_behind_its_start_is_refused():
    tensor = external_tensor("w", (2,), offset=str(1 << 62))
    message = refusal(edited(lambda model: model.graph.initializer.append(tensor)))
    assert "external data passes 536870912 bytes" in message


def test_external_data_is_limited_in_sum():
    tensors = [external_tensor(f"w{i}", (25,)) for i in range(3)]
    message = refusal(
        edited(lambda m: m.graph.initializer.extend(tensors)), Limits(max_external_bytes=48 + 250)
    )
    assert message.startswith("initializer 4 'w2': external data passes 298 bytes")


def test_external_and_inline_data_together_are_refused():
    tensor = external_tensor("w", (2,))
    tensor.raw_data = bytes(8)
    message = refusal(edited(lambda model: model.graph.initializer.append(tensor)))
    assert "raw_data is given, yet data_location says external" in message


def test_external_data_on_an_inline_tensor_is_refused():
    tensor = external_tensor("w", (2,))
    tensor.data_location = TensorProto.DEFAULT
    tensor.raw_data = bytes(8)
    message = refusal(edited(lambda model: model.graph.initializer.append(tensor)))
    assert "external_data is given, yet data_location says inline" in message


def test_data_location_that_does_not_exist_is_refused():
    data = initializer_of(number(1, 2) + number(2, 1) + chunk(9, bytes(8)) + number(14, 2))
    assert "data_location 2 does not exist" in refusal(data)


def test_external_data_within_an_attribute_is_refused():
    message = refusal(with_node("Constant", [], ["c"], value=external_tensor("w", (2,))))
    assert (
        "node 2 (Constant) attribute 0 tensor 0: a tensor within an attribute may not be external" in message
    )


# --- files that overflow the stack


def test_3000_chained_local_functions_are_refused():
    functions = []
    for i in range(3000):
        call = chunk(1, b"x") + chunk(2, b"y") + chunk(4, b"f%d" % (i + 1)) + chunk(7, b"local")
        functions.append(
            chunk(1, b"f%d" % i) + chunk(4, b"x") + chunk(5, b"y") + chunk(7, call) + chunk(10, b"local")
        )
    data = stage().SerializeToString() + b"".join(chunk(25, function) for function in functions)
    assert len(onnx.load_from_string(data).functions) == 3000
    assert len(data) > 130_000
    assert "model: functions is refused: local functions call each other" in refusal(data)


def test_overload_of_a_local_function_is_refused():
    assert "overload picks a local function" in refusal(with_node("Relu", ["y"], ["z"], overload="mine"))


def test_attribute_of_a_local_function_is_refused():
    def refer(model: Any) -> None:
        model.graph.node[0].attribute[0].ref_attr_name = "transB"

    assert "node 0 (Gemm) attribute 0: ref_attr_name" in refusal(edited(refer))


@pytest.mark.parametrize("field", [6, 11])
def test_graphs_nested_a_thousand_deep_are_refused(field: int):
    graph = b""
    for _ in range(1000):
        graph = chunk(
            1, chunk(4, b"Relu") + chunk(5, chunk(1, b"body") + number(20, 5) + chunk(field, graph))
        )
    message = refusal(model_of(graph))
    assert message.startswith("node 0 (Relu) attribute 0: g")
    assert "a graph within a node is control flow" in message


def test_types_nested_a_thousand_deep_are_refused():
    nested = b""
    for _ in range(1000):
        nested = chunk(4, chunk(1, nested))
    message = refusal(model_of(chunk(11, chunk(1, b"x") + chunk(2, nested))))
    assert "input 0 'x' type: sequence_type is refused" in message


@pytest.mark.parametrize("field", [14, 15])
def test_types_within_attributes_are_refused(field: int):
    data = model_of(chunk(1, chunk(4, b"Relu") + chunk(5, chunk(1, b"a") + chunk(field, b""))))
    assert "is refused: a type may nest without end" in refusal(data)


# --- files that ask for more than they hold


@pytest.mark.parametrize(
    ("dims", "data_type", "size"), [((2,), 1, 7), ((2, 2), 7, 31), ((), 10, 3), ((0,), 1, 4)]
)
def test_raw_data_that_contradicts_its_dims_is_refused(dims: tuple[int, ...], data_type: int, size: int):
    message = refusal(with_initializer(dims=dims, data_type=data_type, raw_data=bytes(size)))
    assert f"initializer 2 'extra': raw_data of {size} bytes" in message


@pytest.mark.parametrize(
    ("data_type", "field", "values"),
    [
        (1, "float_data", [1.0]),
        (11, "double_data", [1.0]),
        (3, "int32_data", [1]),
        (7, "int64_data", [1] * 3),
    ],
)
def test_typed_data_that_contradicts_its_dims_is_refused(data_type: int, field: str, values: list[float]):
    message = refusal(with_initializer(data_type=data_type, **{field: values}))
    assert f"{field} of {len(values)} numbers, 2 are needed" in message


def test_tensor_without_data_is_refused():
    assert "float_data of 0 numbers, 2 are needed for float32[2]" in refusal(with_initializer())


def test_typed_data_of_another_type_is_refused():
    message = refusal(with_initializer(data_type=TensorProto.INT64, int32_data=[1, 2]))
    assert "int32_data is given, int64 belongs into int64_data" in message


def test_raw_and_typed_data_together_are_refused():
    message = refusal(with_initializer(raw_data=bytes(8), float_data=[0.0, 0.0]))
    assert "raw_data and float_data are both given" in message


def test_two_kinds_of_typed_data_are_refused():
    message = refusal(with_initializer(int64_data=[1], float_data=[0.0, 0.0]))
    assert "are both given" in message


def test_negative_dim_is_refused():
    assert "the dim -2 is negative" in refusal(with_initializer(dims=(-2, -1), raw_data=bytes(8)))


@pytest.mark.parametrize("dims", [(1 << 32, 1 << 32), (1 << 62, 4), (0, 1 << 40), (1 << 40, 0)])
def test_dims_that_overflow_are_refused(dims: tuple[int, ...]):
    message = refusal(with_initializer(dims=dims))
    assert f"dims {list(dims)} make more than 67108864 elements" in message


def test_too_many_dims_are_refused():
    assert "17 dims, more than 16" in refusal(with_initializer(dims=[1] * 17, raw_data=bytes(4)))


def test_sparse_initializer_is_refused():
    message = refusal(edited(lambda model: model.graph.sparse_initializer.add()))
    assert "graph: sparse_initializer is refused: sparse tensors" in message


@pytest.mark.parametrize("field", ["sparse_tensor", "sparse_tensors"])
def test_sparse_attribute_is_refused(field: str):
    def hide(model: Any) -> None:
        attribute = model.graph.node[0].attribute[0]
        getattr(attribute, field).add() if field.endswith("s") else getattr(attribute, field).SetInParent()

    assert f"attribute 0: {field} is refused" in refusal(edited(hide))


def test_segmented_tensor_is_refused():
    message = refusal(with_initializer(raw_data=bytes(8), segment=TensorProto.Segment(begin=0, end=8)))
    assert "segment is refused" in message


def test_weights_hidden_in_a_constant_are_refused():
    tensor = numpy_helper.from_array(np.zeros(20_000, np.float32), "hidden")
    message = refusal(with_node("Constant", [], ["c"], value=tensor))
    assert "80000 bytes of numbers, more than 65536; weights belong into initializers" in message


def test_weights_hidden_in_a_list_of_floats_are_refused():
    message = refusal(with_node("Constant", [], ["c"], value_floats=[0.0] * 20_000))
    assert "160000 bytes of numbers" in message


def test_constant_that_contradicts_its_dims_is_refused():
    tensor = TensorProto(data_type=FLOAT, dims=(1000,), raw_data=bytes(4))
    message = refusal(with_node("Constant", [], ["c"], value=tensor))
    assert "tensor 0: raw_data of 4 bytes, 4000 are needed" in message


@pytest.mark.parametrize(
    ("limits", "named"),
    [
        (Limits(max_bytes=100), "bytes, more than 100"),
        (Limits(max_fields=10), "the file has more than 10 fields"),
        (Limits(max_nodes=1), "graph: 2 nodes, more than 1"),
        (Limits(max_initializers=1), "graph: 2 initializers, more than 1"),
        (Limits(max_tensor_elements=11), "dims [3, 4] make more than 11 elements"),
        (Limits(max_inline_bytes=11), "inline data passes 11 bytes"),
        (Limits(max_external_bytes=47), "external data passes 47 bytes"),
        (Limits(max_string_bytes=4), "graph: name has 5 bytes, more than 4"),
    ],
)
def test_limits_are_named_when_passed(limits: Limits, named: str):
    assert named in refusal(stage().SerializeToString(), limits)


@pytest.mark.parametrize(
    "graph",
    [
        chunk(1, b"") * 30_000,
        chunk(1, chunk(4, b"Relu") + chunk(1, b"") * 30_000),
        chunk(5, chunk(1, b"\x01" * 30_000)),
        chunk(1, chunk(4, b"Relu") + chunk(5, number(8, (1 << 64) - 1) * 30_000)),
    ],
    ids=["nodes", "node inputs", "packed dims", "long numbers"],
)
def test_file_of_nothing_but_tiny_fields_is_refused(graph: bytes):
    assert "more than 20000 fields" in refusal(model_of(graph), Limits(max_fields=20_000))


def test_long_metadata_is_refused():
    message = refusal(edited(lambda model: model.metadata_props.add(key="note", value="x" * 70_000)))
    assert "model metadata_props 0: value has 70000 bytes" in message


# --- operators, domains, versions


@pytest.mark.parametrize(
    "op_type",
    [
        "If",
        "Loop",
        "Scan",
        "SequenceMap",
        "SequenceConstruct",
        "Optional",
        "RandomNormal",
        "RandomUniformLike",
        "Bernoulli",
        "Multinomial",
        "Dropout",
        "StringNormalizer",
        "StringConcat",
        "TfIdfVectorizer",
        "ImageDecoder",
        "PythonOp",
        "relu",
        "",
    ],
)
def test_operator_that_is_not_on_the_list_is_refused(op_type: str):
    assert f"node 2: the operator {op_type!r} is not one" in refusal(with_node(op_type, ["y"], ["z"]))


@pytest.mark.parametrize("domain", ["com.microsoft", "ai.onnx.ml", "local", "AI.ONNX", " "])
def test_custom_domain_is_refused_on_nodes_and_imports(domain: str):
    assert f"node 2: the operator domain {domain!r}" in refusal(
        with_node("Relu", ["y"], ["z"], domain=domain)
    )
    imported = edited(lambda model: model.opset_import.add(domain=domain, version=1))
    assert f"opset_import 1: the operator domain {domain!r}" in refusal(imported)


@pytest.mark.parametrize("domain", ["", "ai.onnx"])
def test_domain_imported_twice_is_refused(domain: str):
    message = refusal(edited(lambda model: model.opset_import.add(domain=domain, version=7)))
    assert "opset_import names the default domain 2 times" in message


def test_default_domain_may_be_written_out():
    def write_out(model: Any) -> None:
        model.opset_import[0].domain = model.graph.node[0].domain = "ai.onnx"

    assert inspect_model(edited(write_out)).opset == 17


def test_model_without_opset_is_refused():
    assert "names the default domain 0 times" in refusal(
        edited(lambda model: model.ClearField("opset_import"))
    )


@pytest.mark.parametrize("version", [0, 6, 29, -1, (1 << 32) + 17])
def test_unknown_opset_is_damaged(version: int):
    def change(model: Any) -> None:
        model.opset_import[0].version = version

    assert f"opset {version} is not one of 7..28" in damage(edited(change))


@pytest.mark.parametrize("version", [0, 2, 15, -1, (1 << 32) + 8])
def test_unknown_ir_version_is_damaged(version: int):
    def change(model: Any) -> None:
        model.ir_version = version

    assert f"ir_version {version} is not one of 3..14" in damage(edited(change))


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda model: model.training_info.add(), "model: training_info is refused"),
        (lambda model: model.configuration.add(), "model: configuration is refused"),
        (
            lambda model: model.graph.node[1].device_configurations.add(),
            "node 1: device_configurations is refused",
        ),
        (
            lambda model: model.graph.quantization_annotation.add(),
            "graph: quantization_annotation is refused",
        ),
    ],
)
def test_what_a_stage_does_not_need_is_refused(edit: Callable[[Any], object], named: str):
    assert named in refusal(edited(edit))


# --- types and values


@pytest.mark.parametrize("data_type", [0, 8, 14, 15, 16, 17, 22, 99, -1])
def test_type_without_numpy_name_is_refused(data_type: int):
    tensor = chunk(1, b"x") + number(1, 1) + number(2, data_type % (1 << 64))
    assert f"data_type {data_type} is no type" in refusal(initializer_of(tensor))


def test_string_tensor_is_refused():
    message = refusal(with_initializer(data_type=TensorProto.STRING, string_data=[b"a", b"b"]))
    assert "string_data is refused" in message


@pytest.mark.parametrize("name", ["value_string", "value_strings"])
def test_constant_string_is_refused(name: str):
    value = "a" if name == "value_string" else ["a"]
    assert f"{name} makes a string tensor" in refusal(with_node("Constant", [], ["c"], **{name: value}))


def test_cast_to_strings_is_refused():
    assert "a cast to strings" in refusal(with_node("Cast", ["y"], ["z"], to=TensorProto.STRING))


def test_string_input_is_refused():
    info = helper.make_tensor_value_info("s", TensorProto.STRING, [1])
    message = refusal(edited(lambda model: model.graph.input.append(info)))
    assert "input 1 's' tensor_type: elem_type 8 is no type" in message


@pytest.mark.parametrize(
    "info",
    [
        helper.make_tensor_sequence_value_info("s", FLOAT, [1]),
        helper.make_sparse_tensor_value_info("s", FLOAT, [1]),
        helper.make_value_info(
            "s", helper.make_optional_type_proto(helper.make_tensor_type_proto(FLOAT, [1]))
        ),
    ],
    ids=["sequence", "sparse", "optional"],
)
def test_value_that_is_no_dense_tensor_is_refused(info: Any):
    for values in ("input", "output", "value_info"):
        message = refusal(edited(lambda model, values=values: getattr(model.graph, values).append(info)))
        assert "is refused: values between operators are dense tensors" in message


def test_input_without_shape_or_type_is_damaged():
    for info, named in (
        (helper.make_tensor_value_info("s", FLOAT, None), "the input 's' has no shape"),
        (onnx.ValueInfoProto(name="s"), "input 1 's': there is no type"),
        (onnx.ValueInfoProto(name="s", type=onnx.TypeProto()), "input 1 's': the type is no tensor"),
    ):
        assert named in damage(edited(lambda model, info=info: model.graph.input.append(info)))


def test_value_with_an_absurd_dim_is_refused():
    for dim in (-1, 1 << 40):
        info = helper.make_tensor_value_info("v", FLOAT, [dim])
        message = refusal(edited(lambda model, info=info: model.graph.value_info.append(info)))
        assert f"value_info 0 'v' shape dim 0: {dim} is not in 0..67108864" in message


def test_dim_that_is_number_and_symbol_is_refused():
    dim = number(1, 4) + chunk(2, b"n")
    value = chunk(1, b"x") + chunk(2, chunk(1, number(1, 1) + chunk(2, chunk(1, dim))))
    assert "dim_value and dim_param are both given" in refusal(model_of(chunk(11, value)))


def test_model_without_graph_is_damaged():
    assert "there is no graph" in damage(edited(lambda model: model.ClearField("graph")))
    assert "ir_version 0" in damage(b"")


# --- names


def test_duplicate_initializer_is_refused():
    message = refusal(with_initializer(name="bias", raw_data=bytes(8)))
    assert message.startswith("initializer 2 'bias': the name is taken")


def test_empty_names_are_refused():
    assert "initializer 2 '': the name is empty" in refusal(with_initializer(name="", raw_data=bytes(8)))
    assert "input 1 '': the name is empty" in refusal(edited(lambda model: model.graph.input.add()))


@pytest.mark.parametrize("values", ["input", "output", "value_info"])
def test_duplicate_values_are_refused(values: str):
    info = helper.make_tensor_value_info("twin", FLOAT, [1])
    message = refusal(edited(lambda model: getattr(model.graph, values).extend([info, info])))
    assert values in message
    assert "'twin': the name is taken" in message


def test_duplicate_attribute_is_refused():
    def repeat(model: Any) -> None:
        model.graph.node[0].attribute.append(helper.make_attribute("transB", 0))

    assert "node 0 (Gemm): the attribute 'transB' is given twice" in refusal(edited(repeat))


def test_attribute_without_name_or_type_is_refused():
    def rename(model: Any) -> None:
        model.graph.node[0].attribute[0].name = ""

    def untype(model: Any) -> None:
        model.graph.node[0].attribute[0].ClearField("type")

    assert "node 0 (Gemm) attribute 0: the name is empty" in refusal(edited(rename))
    assert "'transB': type 0 is not a plain value" in refusal(edited(untype))


def test_attribute_that_holds_another_type_is_refused():
    def add(model: Any) -> None:
        model.graph.node[0].attribute[0].floats.append(1.0)

    assert "'transB': its type says i, yet floats is given" in refusal(edited(add))


def test_attribute_without_its_tensor_is_damaged():
    data = model_of(chunk(1, chunk(4, b"Constant") + chunk(5, chunk(1, b"value") + number(20, 4))))
    assert "its type says t, yet there is no tensor" in damage(data)


def test_duplicate_metadata_is_refused():
    def repeat(model: Any) -> None:
        for value in "ab":
            model.metadata_props.add(key="note", value=value)

    assert "model: metadata_props has the key 'note' twice" in refusal(edited(repeat))


@pytest.mark.parametrize("name", [b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"a\xe2\x82"])
def test_name_that_is_no_utf8_is_refused(name: bytes):
    assert "input 0: name is no UTF-8" in refusal(model_of(chunk(11, chunk(1, name))))


def test_strangers_text_is_escaped_and_cut_in_messages():
    message = refusal(with_node("\x1b[31m" + "x" * 5000, ["y"], ["z"]))
    assert "\\x1b[31m" in message
    assert len(message) < 300


# --- the wire


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (number(1, 8) + number(1, 9), "model: ir_version occurs twice"),
        (chunk(2, b"a") + chunk(2, b"a"), "model: producer_name occurs twice"),
        (chunk(7, b"") + chunk(7, b""), "model: graph occurs twice"),
        (initializer_of(number(2, 1) + number(2, 7)), "initializer 0: data_type occurs twice"),
        (initializer_of(chunk(9, b"") + chunk(9, b"")), "initializer 0: raw_data occurs twice"),
        (chunk(999, b""), "model: ModelProto has no field 999 (length-delimited)"),
        (number(15, 1), "model: ModelProto has no field 15 (a varint)"),
        (b"\x00\x00", "model: ModelProto has no field 0"),
        (initializer_of(chunk(15, b"")), "initializer 0: TensorProto has no field 15"),
        (
            chunk(1, b"\x08"),
            "ir_version (field 1 of ModelProto) is written as length-delimited, not as a varint",
        ),
        (number(7, 0), "graph (field 7 of ModelProto) is written as a varint, not as length-delimited"),
        (b"\x0d\0\0\0\0", "ir_version (field 1 of ModelProto) is written as 4 bytes"),
        (b"\x09" + bytes(8), "ir_version (field 1 of ModelProto) is written as 8 bytes"),
        (b"\x0e", "is written as wire type 6, which does not exist"),
        (b"\x3b\x3c", "field 7 of ModelProto is a group; groups are refused"),
        (b"\x3c", "field 7 of ModelProto is the end of a group"),
        (b"\xa3\x06\xa4\x06", "field 100 of ModelProto is a group"),
        (b"\x08" + b"\x80" * 10 + b"\x01", "model: an over-long number at byte 11"),
        (b"\x08" + b"\xff" * 9 + b"\x02", "model: an over-long number ends at byte 11"),
        (b"\x08\x88\x00", "model: an over-long number ends at byte 3"),
        (b"\x88\x00\x08", "model: an over-long number ends at byte 2"),
        (b"\x3a\x80\x00", "model: an over-long number ends at byte 3"),
        (
            initializer_of(number(2, (1 << 32) + 1)),
            "initializer 0: data_type is 4294967297, more than 32 bits",
        ),
        (initializer_of(chunk(7, b"\x80\x00")), "int64_data holds an over-long number"),
        (initializer_of(chunk(7, b"\xff" * 10 + b"\x01")), "int64_data holds an over-long number"),
        (initializer_of(chunk(7, b"\xff" * 9 + b"\x02")), "int64_data holds an over-long number"),
        (
            initializer_of(chunk(7, b"\xff" * 9 + b"\x01" + b"\x80" * 9 + b"\x03")),
            "holds an over-long number",
        ),
    ],
)
def test_what_parsers_would_forgive_is_refused(data: bytes, named: str):
    assert named in refusal(data)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"\x08", "model is cut off within a number at byte 1"),
        (b"\x08\x80", "model is cut off within a number at byte 2"),
        (b"\x3a\x05\x00", "model: graph is cut off: 5 bytes announced, 1 left"),
        (b"\x3a" + varint(1 << 63), "model: graph is cut off: 9223372036854775808 bytes announced"),
        (initializer_of(chunk(7, b"\x80")), "initializer 0: int64_data is cut off within a number"),
        (initializer_of(chunk(1, b"\x80")), "initializer 0 is cut off within a number"),
        (initializer_of(chunk(4, bytes(5))), "float_data packs 5 bytes into numbers of 4 bytes"),
        (initializer_of(b"\x25\0\0\0"), "initializer 0: float_data is cut off"),
    ],
)
def test_bytes_that_are_cut_off_are_damaged(data: bytes, named: str):
    assert named in damage(data)


def test_every_truncation_is_noticed():
    data = stage().SerializeToString()
    accepted = []
    for size in range(len(data)):
        try:
            inspect_model(data[:size])
        except BundleError:
            continue
        accepted.append(data[size:])
    assert accepted == []


@pytest.mark.parametrize("junk", [b"\0", b"\n", b"junk", b"\xff" * 8, b"PK\x03\x04"])
def test_trailing_junk_is_refused(junk: bytes):
    with pytest.raises(BundleError, match=r"^model"):
        inspect_model(stage().SerializeToString() + junk)


# --- the tables


SCHEMAS = {
    "ModelProto": onnx_schema.MODEL,
    "OperatorSetIdProto": onnx_schema.OPSET,
    "GraphProto": onnx_schema.GRAPH,
    "NodeProto": onnx_schema.NODE,
    "AttributeProto": onnx_schema.ATTRIBUTE,
    "TensorProto": onnx_schema.TENSOR,
    "ValueInfoProto": onnx_schema.VALUE_INFO,
    "TypeProto": onnx_schema.TYPE,
    "TensorShapeProto": onnx_schema.SHAPE,
    "StringStringEntryProto": onnx_schema.ENTRY,
}
KINDS = {  # FieldDescriptor.Type
    1: {Kind.FIXED64},
    2: {Kind.FIXED32},
    3: {Kind.INT64, Kind.VARINTS},
    4: {Kind.VARINTS},
    5: {Kind.INT32, Kind.VARINTS},
    9: {Kind.TEXT},
    11: {Kind.MESSAGE},
    12: {Kind.BYTES, Kind.TEXT},
    14: {Kind.INT32},
}


def is_repeated(descriptor: Any) -> bool:
    repeated = getattr(descriptor, "is_repeated", None)
    return bool(descriptor.label == 3 if repeated is None else repeated)


def check_schema(descriptor: Any, schema: Schema) -> None:
    for theirs in descriptor.fields:
        ours = schema.fields[theirs.number]
        assert ours.name == theirs.name
        if not ours.refused:
            assert ours.kind in KINDS[theirs.type], theirs.full_name
            assert ours.repeated == is_repeated(theirs), theirs.full_name


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema_knows_every_field_of_the_installed_onnx(name: str):
    check_schema(getattr(onnx, name).DESCRIPTOR, SCHEMAS[name])


def test_schema_knows_every_field_of_nested_messages():
    check_schema(onnx.TypeProto.Tensor.DESCRIPTOR, onnx_schema.TENSOR_TYPE)
    check_schema(onnx.TensorShapeProto.Dimension.DESCRIPTOR, onnx_schema.DIMENSION)


def test_listed_operators_exist_and_take_no_graphs():
    known = {s.name: s for s in onnx.defs.get_all_schemas_with_history() if s.domain == ""}
    if onnx.defs.onnx_opset_version() >= onnx_schema.OPSETS[-1]:
        assert known.keys() >= onnx_schema.OPERATORS
    for name in onnx_schema.OPERATORS & known.keys():
        kinds = {attribute.type.name for attribute in known[name].attributes.values()}
        assert not kinds & {"GRAPH", "GRAPHS", "TYPE_PROTO", "TYPE_PROTOS"}, name


def test_number_types_agree_with_onnx():
    for data_type, (name, size_bytes, _) in onnx_schema.DTYPES.items():
        assert (dtype_of(data_type), np.dtype(name).itemsize) == (name, size_bytes)


# --- random models


NAMES = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=1, max_size=8)
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
DATA_TYPES = st.sampled_from(sorted(onnx_schema.DTYPES))


@st.composite
def tensors(draw: st.DrawFn, name: str, *, may_be_external: bool) -> Any:
    shape, data_type = draw(SHAPES), draw(DATA_TYPES)
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(data_type))
    values = (
        np.random.default_rng(draw(st.integers(0, 9))).integers(-9, 9, shape).astype(np.int64).astype(dtype)
    )
    match draw(st.sampled_from(["raw", "typed", "external"] if may_be_external else ["raw", "typed"])):
        case "raw":
            return numpy_helper.from_array(np.asarray(values), name)
        case "typed":
            return helper.make_tensor(name, data_type, shape, values.ravel())
        case _:
            entries = {"offset": "64", "length": str(values.nbytes)} if draw(st.booleans()) else {}
            return external_tensor(name, shape, data_type, **entries)


@st.composite
def value_infos(draw: st.DrawFn, name: str) -> Any:
    dims = st.one_of(st.none(), st.integers(0, 64), NAMES)
    return helper.make_tensor_value_info(name, draw(DATA_TYPES), draw(st.lists(dims, max_size=4)))


@st.composite
def nodes(draw: st.DrawFn) -> Any:
    op_type = draw(st.sampled_from(sorted(onnx_schema.OPERATORS)))
    attributes = draw(
        st.dictionaries(
            st.sampled_from(["axis", "mode", "value", "pads", "scales", "parts"]),
            st.one_of(
                st.integers(-(1 << 63), (1 << 63) - 1).filter(
                    lambda value: value != onnx_schema.STRING_DTYPE
                ),
                st.floats(width=32, allow_nan=False),
                NAMES,
                st.lists(st.integers(-(1 << 63), (1 << 63) - 1), min_size=1, max_size=4),
                st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=4),
                st.lists(NAMES, min_size=1, max_size=3),
                tensors("", may_be_external=False),
            ),
            max_size=3,
        )
    )
    names = st.lists(st.one_of(st.just(""), NAMES), max_size=3)
    domain = draw(st.sampled_from([None, "", "ai.onnx"]))
    return helper.make_node(op_type, draw(names), draw(names), domain=domain, doc_string="d", **attributes)


@st.composite
def models(draw: st.DrawFn) -> Any:
    initializers = [draw(tensors(f"w{i}", may_be_external=True)) for i in range(draw(st.integers(0, 3)))]
    graph = helper.make_graph(
        draw(st.lists(nodes(), max_size=4)),
        draw(NAMES),
        [draw(value_infos(name)) for name in draw(st.lists(NAMES, unique=True, max_size=3))],
        [draw(value_infos(name)) for name in draw(st.lists(NAMES, unique=True, max_size=3))],
        initializers,
        value_info=[draw(value_infos(name)) for name in draw(st.lists(NAMES, unique=True, max_size=2))],
    )
    opset = helper.make_opsetid(
        draw(st.sampled_from(["", "ai.onnx"])), draw(st.sampled_from(onnx_schema.OPSETS))
    )
    model = helper.make_model(
        graph, opset_imports=[opset], ir_version=draw(st.sampled_from(onnx_schema.IR_VERSIONS))
    )
    helper.set_model_props(model, draw(st.dictionaries(NAMES, NAMES, max_size=2)))
    return model


FEW = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))


@FEW
@given(models())
def test_summary_is_what_onnx_reads(model: Any):
    assert inspect_model(model.SerializeToString()) == summary_by_onnx(model)


# --- arbitrary and mutated bytes


def accepted(data: bytes) -> ModelSummary | None:
    """The summary, or None if refused; any other exception is a failure."""
    try:
        return inspect_model(data)
    except BundleError:
        return None


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=64))
def test_arbitrary_bytes_are_never_another_error(data: bytes):
    accepted(data)
    accepted(model_of(data))
    accepted(initializer_of(data))
    accepted(model_of(chunk(1, chunk(4, b"Relu") + chunk(5, data))))


@dataclass
class Part:
    """One field on the wire: its tag, and its children if it is a message that `onnx` knows."""

    number: int
    wire: int
    payload: bytes
    children: list[Part] | None = None


def parts_of(data: bytes, descriptor: Any) -> list[Part]:
    parts, pos = [], 0

    def read() -> int:
        nonlocal pos
        value = shift = 0
        while True:
            byte = data[pos]
            pos, value, shift = pos + 1, value | (byte & 0x7F) << shift, shift + 7
            if byte < 0x80:
                return value

    while pos < len(data):
        tag = read()
        number_, wire = tag >> 3, tag & 7
        start = pos
        if wire == 0:
            read()
        elif wire == 2:
            size = read()
            start, pos = pos, pos + size
        else:
            pos += 8 if wire == 1 else 4
        known = descriptor.fields_by_number[number_]
        nested = parts_of(data[start:pos], known.message_type) if known.message_type else None
        parts.append(Part(number_, wire, data[start:pos], nested))
    return parts


def bytes_of(parts: list[Part]) -> bytes:
    encoded = []
    for part in parts:
        payload = part.payload if part.children is None else bytes_of(part.children)
        size = varint(len(payload)) if part.wire == 2 else b""
        encoded.append(varint(part.number << 3 | part.wire) + size + payload)
    return b"".join(encoded)


def messages_of(parts: list[Part]) -> Iterator[list[Part]]:
    yield parts
    for part in parts:
        if part.children is not None:
            yield from messages_of(part.children)


TEXTS = [
    b"",
    b"weights",
    b"../weights",
    b"location",
    b"offset",
    b"If",
    b"ai.onnx",
    b"com.microsoft",
    b"\xff",
    b"8",
]
NUMBERS = [0, 1, 2, 3, 5, 7, 8, 11, 127, 128, 1 << 31, 1 << 32, (1 << 32) + 1, 1 << 63, (1 << 64) - 1]


def mutate_part(rng: random.Random, message: list[Part], donor: list[Part]) -> None:
    at = rng.randrange(len(message))
    part = message[at]
    match rng.randrange(9):
        case 0:
            message.insert(rng.randrange(len(message) + 1), copy.deepcopy(part))
        case 1:
            del message[at]
        case 2:
            message.append(message.pop(at))
        case 3:
            part.number = rng.choice([rng.randrange(1, 30), part.number ^ 1, 1 << 28])
        case 4:
            part.wire = rng.randrange(8)
        case 5 if donor:
            message.insert(at, copy.deepcopy(rng.choice(donor)))
        case 6 if part.wire == 0:
            part.payload = varint(rng.choice(NUMBERS))
        case 7 if part.wire == 0:  # packed, or a number where a message should be
            part.wire, part.payload = 2, part.payload * rng.randrange(3)
        case 8 if part.wire == 2:
            part.children, part.payload = None, rng.choice([*TEXTS, rng.randbytes(rng.randrange(9))])
        case _:
            other = rng.randrange(len(message))
            message[at], message[other] = message[other], part


def mutate_bytes(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data) + 1)
    match rng.randrange(5):
        case 0 if at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        case 1 if at < len(data):
            data[at] = rng.randrange(256)
        case 2:
            del data[at:]
        case 3:
            data[at:at] = rng.randbytes(rng.randrange(1, 4))
        case _:
            start = rng.randrange(len(data) + 1)
            data[at:at] = data[start : start + rng.randrange(40)]


def mutated(model: Any, donor: Any, seed: int) -> bytes:
    rng = random.Random(seed)
    parts = parts_of(model.SerializeToString(), model.DESCRIPTOR)
    donated = parts_of(donor.SerializeToString(), donor.DESCRIPTOR)
    if rng.random() < 0.8:
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            messages = [message for message in messages_of(parts) if message]
            if messages:
                mutate_part(rng, rng.choice(messages), rng.choice(list(messages_of(donated))))
    data = bytearray(bytes_of(parts))
    if rng.random() < 0.4:
        for _ in range(rng.choice([1, 1, 2, 4])):
            mutate_bytes(rng, data)
    return bytes(data)


def check_no_unknown_fields(message: Any) -> None:
    assert len(unknown_fields.UnknownFieldSet(message)) == 0
    for field, value in message.ListFields():
        if field.message_type:
            for nested in value if is_repeated(field) else [value]:
                check_no_unknown_fields(nested)


def check_tensor(tensor: Any) -> None:
    if tensor.data_location == EXTERNAL:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        assert entries.pop("location") == "weights"
        assert entries.keys() <= {"offset", "length"}
        assert len(tensor.external_data) == len(entries) + 1
        assert not tensor.HasField("raw_data")
    else:
        assert not tensor.external_data
        array = numpy_helper.to_array(tensor)
        assert (array.shape, str(array.dtype)) == (tuple(tensor.dims), dtype_of(tensor.data_type))


def check_agreement(data: bytes, summary: ModelSummary) -> None:
    """`onnx` reads the same model, and finds nothing in it that we promise to refuse."""
    model = onnx.load_from_string(data)
    assert summary_by_onnx(model) == summary
    check_no_unknown_fields(model)
    assert not model.functions
    assert not model.training_info
    assert not model.graph.sparse_initializer
    assert {opset.domain for opset in model.opset_import} <= {"", "ai.onnx"}
    names = [tensor.name for tensor in model.graph.initializer]
    assert len(set(names)) == len(names)
    assert all(names)
    for tensor in model.graph.initializer:
        check_tensor(tensor)
    for node in model.graph.node:
        assert node.domain in ("", "ai.onnx")
        assert node.op_type in onnx_schema.OPERATORS
        for attribute in node.attribute:
            assert attribute.type in onnx_schema.ATTRIBUTE_VALUES
            assert not attribute.HasField("g")
            assert not attribute.graphs
            for tensor in [*attribute.tensors, *([attribute.t] if attribute.HasField("t") else [])]:
                assert tensor.data_location != EXTERNAL
                check_tensor(tensor)
    assert inspect_model(model.SerializeToString()) == summary


@settings(FEW, max_examples=100)
@given(models(), models(), st.integers(0, 1 << 32))
def test_mutated_models_are_refused_or_read_alike_by_onnx(model: Any, donor: Any, seed: int):
    for step in range(4):
        data = mutated(model, donor, seed + step)
        summary = accepted(data)
        if summary is not None:
            check_agreement(data, summary)
