"""Takes a user's ONNX file in: any exporter's classifier becomes one of the form that everything here reads.

The result has one float32 input `x` (n, *input_shape), one output `logits` (n, classes), ONNX's own operators
only, constants folded, batch normalisation folded, weights inside. What cannot be taken is refused in one
line that says what was found and what to do. Two proofs end it: three samples at once give what they give
one by one, and the answers are those of the file that came in.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, inliner, version_converter

from cloud_hub.builder.graphs import onnx_fold
from cloud_hub.builder.graphs.onnx_graph import (
    all_names,
    constants,
    describe_node,
    dtype_name,
    has_subgraph,
    prune,
    real_inputs,
    rename_values,
    set_float_input,
)
from cloud_hub.builder.graphs.onnx_ml import DOMAIN as ML_DOMAIN
from cloud_hub.builder.graphs.onnx_ml import strip_ml_operators
from cloud_hub.builder.graphs.onnx_output import Answer, choose_logits
from cloud_hub.builder.graphs.onnx_proof import BATCH_ADVICE, prove_free_batch, prove_same_answers
from cloud_hub.builder.graphs.onnx_read import read_model, size_bytes_of
from cloud_hub.builder.graphs.staged import BATCH, INPUT, LOGITS, Shape, float_value, make_model, opset_of
from cloud_hub.errors import BuildError
from edge_cascade.backends.onnx import FULL_MODEL_LIMITS
from edge_cascade.errors import CascadeError, first_line
from edge_cascade.onnx_schema import DEFAULT_DOMAINS, OPERATORS

Floats = NDArray[np.float32]

MIN_OPSET = 13  # quantisation per channel begins here

_MAX_NODES = 20_000
_MAX_CALL_DEPTH = 30

_QUANTISED = {
    "QuantizeLinear",
    "DequantizeLinear",
    "DynamicQuantizeLinear",
    "QLinearConv",
    "QLinearMatMul",
    "ConvInteger",
    "MatMulInteger",
}
_DROPPED = {"Dropout"}  # refused on a device, taken out here
_RESERVED = {INPUT, LOGITS, "head", "features", "temperature"}
_RESERVED_PREFIXES = ("head.", "exit", "stage")


@dataclass(frozen=True, slots=True)
class Classifier:
    """A whole model: `x` (n, *input_shape) float32 to `logits` (n, classes). Values keep the user's names."""

    model: onnx.ModelProto
    input_shape: Shape
    classes: int

    def to_bytes(self) -> bytes:
        """The file; the same model gives the same bytes."""
        return bytes(self.model.SerializeToString(deterministic=True))


def adopt(source: str | Path | bytes, *, sample_shape: Shape | None, role: str) -> Classifier:
    """A user's model in canonical form.

    `sample_shape` is that of the data's samples and fills in sizes that the file leaves open. A model that
    begins by moving an image's last axis to the front is taken behind that step, channels first.
    `role` begins the message of an error, for example `full model`.

    Raises:
        BuildError: one line: what was wrong, where, and what can be done.
    """
    where = role if isinstance(source, bytes) else f"{role} {source}"
    try:
        return _adopt(source, sample_shape)
    except (BuildError, CascadeError) as error:
        raise BuildError(f"{where}: {error}") from error


def _adopt(source: str | Path | bytes, sample_shape: Shape | None) -> Classifier:
    model = read_model(source)
    _check_size(model)
    _check_functions(model)
    _check_form(model)
    batch, input_shape = _resolve_input(model.graph, sample_shape)
    original = onnx.ModelProto()
    original.CopyFrom(model)

    model = _plain(model)
    set_float_input(model.graph.input[0], [batch or BATCH, *input_shape])
    rng = np.random.default_rng(0)
    # All positive: some models begin with a logarithm or a root.
    batches = [rng.random((size, *input_shape), np.float32) for size in ([batch] if batch else [2, 3])]
    answer = choose_logits(model, batches[0])
    onnx_fold.drop_no_ops(model)
    onnx_fold.drop_zero_states(model, batches)
    onnx_fold.fold_constants(model, batches)
    if batch:
        onnx_fold.free_fixed_batch(model, batch)
    onnx_fold.fold_batch_norms(model)
    given_shape, input_shape = input_shape, onnx_fold.take_channels_first(model, input_shape)
    x = batches[0] if input_shape == given_shape else np.moveaxis(batches[0], -1, 1)
    canonical = _canonical(model, answer, input_shape)
    prove_free_batch(canonical, input_shape)
    prove_same_answers(canonical, x, answer.source, original, batches[0])
    return Classifier(canonical, input_shape, answer.classes)


# --- what goes in


def _check_size(model: onnx.ModelProto) -> None:
    size_bytes, limit = sum(map(size_bytes_of, model.graph.initializer)), FULL_MODEL_LIMITS.max_inline_bytes
    if size_bytes > limit:
        raise BuildError(
            f"its weights are {size_bytes / 1e6:.0f} MB, more than the {limit / 1e6:.0f} MB that are read: "
            "give a smaller model"
        )


def _check_form(model: onnx.ModelProto) -> None:
    """What follows takes every node to have the inputs and attributes that its operator needs."""
    checked = onnx.ModelProto()
    checked.CopyFrom(model)
    for value in (*checked.graph.input, *checked.graph.output):
        if value.type.HasField("tensor_type"):
            # The runtime asks for no shapes, the checker for some shape.
            value.type.tensor_type.shape.SetInParent()
    try:
        onnx.checker.check_model(checked)
    except (onnx.checker.ValidationError, ValueError) as error:
        raise BuildError(f"not a valid ONNX model: {first_line(error)}") from error


def _resolve_input(graph: onnx.GraphProto, sample_shape: Shape | None) -> tuple[int | None, Shape]:
    """The batch that the file is fixed to, None for any, and one sample's shape."""
    inputs = real_inputs(graph)
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs) or "none"
        raise BuildError(
            f"takes {len(inputs)} inputs ({names}), not one: a classifier of one tensor is needed"
        )
    value = inputs[0]
    if not value.type.HasField("tensor_type"):
        raise BuildError(f"its input {value.name} is no tensor: export it with one float32 tensor as input")
    tensor = value.type.tensor_type
    if tensor.elem_type != TensorProto.FLOAT:
        raise BuildError(
            f"its input {value.name} is {dtype_name(tensor.elem_type)}, not float32: export the float32 model"
        )
    if not tensor.HasField("shape"):
        if sample_shape is None:
            raise BuildError(f"its input {value.name} has no shape: export it with one")
        return None, sample_shape
    dims = [dim.dim_value if dim.dim_value > 0 else None for dim in tensor.shape.dim]
    if len(dims) < 2:
        raise BuildError(f"its input {value.name} has no batch axis: {BATCH_ADVICE}")
    return dims[0], _sample_dims(value.name, dims[1:], sample_shape)


def _sample_dims(name: str, dims: Sequence[int | None], sample_shape: Shape | None) -> Shape:
    known = tuple(dim for dim in dims if dim is not None)
    if len(known) == len(dims):
        return known
    text = "x".join("?" if dim is None else str(dim) for dim in dims)
    if sample_shape is None:
        raise BuildError(f"its input {name} takes samples of {text}: export it with fixed sizes")
    # The data may have its channels at the other end, and may lack axes of one.
    for shape in (sample_shape, (*sample_shape[1:], *sample_shape[:1])):
        resolved = (1,) * (len(dims) - len(shape)) + shape
        if len(dims) == len(resolved) and all(map(_fits, dims, resolved)):
            return resolved
    given = "x".join(map(str, sample_shape))
    raise BuildError(f"its input {name} takes samples of {text}, the data has {given}: reshape the data")


def _fits(dim: int | None, size: int) -> bool:
    return dim is None or dim == size


# --- operators


def _plain(model: onnx.ModelProto) -> onnx.ModelProto:
    """Only default-domain operators of opset 13 or later, on the way to float outputs."""
    if model.functions:
        try:
            model = inliner.inline_local_functions(model)
        except Exception as error:  # a C++ library's own
            raise BuildError(f"its local functions cannot be inlined: {first_line(error)}") from error
    del model.training_info[:]
    graph = model.graph
    if graph.sparse_initializer:
        raise BuildError("it has sparse weights: export it with dense ones")
    known = constants(graph)
    for value in [value for value in graph.input if value.name in known]:
        graph.input.remove(value)
    del graph.value_info[:]
    del graph.quantization_annotation[:]
    strip_ml_operators(model)
    _keep_float_outputs(graph)
    _check_operators(graph)
    _import_one_opset(model)
    if opset_of(model) < MIN_OPSET:
        try:
            model = version_converter.convert_version(model, MIN_OPSET)
        except Exception as error:  # a C++ library's own
            raise BuildError(
                f"opset {opset_of(model)} cannot be raised to {MIN_OPSET} ({first_line(error)}): "
                f"re-export with opset_version=17"
            ) from error
        del model.graph.value_info[:]
    return model


def _check_functions(model: onnx.ModelProto) -> None:
    """Inlining doubles a graph with every level of calls that call twice, and recurses with each."""
    bodies = {(function.domain, function.name): list(function.node) for function in model.functions}
    sizes: dict[tuple[str, str], int] = {}

    def expanded(nodes: Iterable[onnx.NodeProto], depth: int) -> int:
        if depth > _MAX_CALL_DEPTH:
            raise BuildError("its local functions call each other too deeply: re-export it without them")
        total = 0
        for node in nodes:
            key = (node.domain, node.op_type)
            if key in bodies and key not in sizes:
                sizes[key] = expanded(bodies[key], depth + 1)
            total += sizes.get(key, 1)
        return total

    if expanded(model.graph.node, 0) > _MAX_NODES:
        raise BuildError(f"it has more than {_MAX_NODES} operators: re-export it without local functions")


def _keep_float_outputs(graph: onnx.GraphProto) -> None:
    kept = [value for value in graph.output if value.type.tensor_type.elem_type == TensorProto.FLOAT]
    if not kept:
        kinds = ", ".join(f"{value.name} ({_kind(value)})" for value in graph.output)
        raise BuildError(
            f"gives no float32 scores, only {kinds}: export its logits or probabilities, (n, classes)"
        )
    del graph.output[:]
    graph.output.extend(kept)
    prune(graph)


def _kind(value: onnx.ValueInfoProto) -> str:
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        return str(kind or "unknown").removesuffix("_type")
    return dtype_name(value.type.tensor_type.elem_type)


def _check_operators(graph: onnx.GraphProto) -> None:
    unknown = [node for node in graph.node if not _is_known(node)]
    if not unknown:
        return
    found = {describe_node(node).split(" (")[0]: describe_node(node) for node in unknown}
    raise BuildError(f"has operators that cannot be used: {', '.join(found.values())}; {_advice(unknown)}")


def _is_known(node: onnx.NodeProto) -> bool:
    if node.domain not in DEFAULT_DOMAINS or node.op_type in _QUANTISED or has_subgraph(node):
        return False
    return node.op_type in OPERATORS or node.op_type in _DROPPED


def _advice(unknown: Sequence[onnx.NodeProto]) -> str:
    if any(node.domain == ML_DOMAIN and node.op_type == "LinearRegressor" for node in unknown):
        return "a regression model? A classifier is needed, which gives (n, classes)"
    if any(node.domain == ML_DOMAIN for node in unknown):
        return (
            "trees, support vectors and neighbours run neither as the full nor as the edge model: "
            "train a network or a linear model on their answers and give that"
        )
    if any(node.op_type in _QUANTISED for node in unknown):
        return "it is quantised already: give the float32 model, the build makes int8 of it"
    if any(has_subgraph(node) for node in unknown):
        return "control flow: re-export with dynamo=True, and write flatten(1) instead of squeeze()"
    return "re-export with ONNX's own operators, or leave this step to the preprocessing of the data"


def _import_one_opset(model: onnx.ModelProto) -> None:
    """Drop imports that nobody uses; two names of the default domain are one."""
    version = max(
        (entry.version for entry in model.opset_import if entry.domain in DEFAULT_DOMAINS), default=0
    )
    if not version:
        raise BuildError("names no version of ONNX's own operators: export it again")
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("", version))
    for node in model.graph.node:
        node.domain = ""


# --- the canonical form


def _canonical(model: onnx.ModelProto, answer: Answer, input_shape: Shape) -> onnx.ModelProto:
    graph = model.graph
    given = graph.input[0].name
    if answer.logits == given:
        raise BuildError("has no layer between its input and its softmax")
    taken = all_names(graph)
    renamed = {given: INPUT, answer.logits: LOGITS}
    for name in sorted(taken - renamed.keys()):
        if name in _RESERVED or name.startswith(_RESERVED_PREFIXES):
            new = f"value.{name}"
            while new in taken:
                new = f"value.{new}"
            renamed[name] = new
            taken.add(new)
    rename_values(graph, renamed)
    _name_nodes(graph)
    return make_model(
        "classifier",
        list(graph.node),
        [float_value(INPUT, input_shape)],
        [float_value(LOGITS, (answer.classes,))],
        list(graph.initializer),
        opset=opset_of(model),
    )


def _name_nodes(graph: onnx.GraphProto) -> None:
    """Every node gets a name of its own, none of them a head's; comments, which hold the user's paths, go."""
    taken: set[str] = set()
    for index, node in enumerate(graph.node):
        if not node.name or node.name in taken or node.name.startswith("exit"):
            node.name = f"{node.op_type}.{index}"
        taken.add(node.name)
        node.ClearField("doc_string")
        del node.metadata_props[:]
        node.ClearField("overload")
    for tensor in graph.initializer:
        tensor.ClearField("doc_string")
        del tensor.metadata_props[:]
