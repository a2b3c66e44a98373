"""Reading and rewiring an ONNX graph by the names of its values, and running it for any of them.

Functions that change a graph say so in their name and change it in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import AttributeProto, TensorProto, helper, numpy_helper

# Imported for its effect: it sets what must be set before the first import of onnxruntime.
import edge_cascade.backends.onnx  # noqa: F401
from cloud_hub.errors import BuildError

Array = NDArray[Any]

NOTHING = ""
"""The name of an optional input that is left out."""


def attribute_of(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """An attribute's value, strings as `bytes`."""
    for attribute in node.attribute:
        if attribute.name == name:
            return helper.get_attribute_value(attribute)
    return default


def remove_attribute(node: onnx.NodeProto, name: str) -> None:
    """Leave the attribute at its default."""
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)


def has_subgraph(node: onnx.NodeProto) -> bool:
    """Whether the node is control flow."""
    return any(
        attribute.type in {AttributeProto.GRAPH, AttributeProto.GRAPHS} for attribute in node.attribute
    )


def describe_node(node: onnx.NodeProto) -> str:
    """Operator and name, for a message."""
    domain = f"{node.domain}." if node.domain not in {"", "ai.onnx"} else ""
    name = node.name or next((f"the one that gives {output}" for output in node.output if output), "unnamed")
    return f"{domain}{node.op_type} ({name})"


def dtype_name(elem_type: int) -> str:
    """A tensor's type for a message."""
    if elem_type not in TensorProto.DataType.values():
        return f"of the unknown type {elem_type}"
    return str(TensorProto.DataType.Name(elem_type)).lower()


def producers(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    """Which node gives a value."""
    return {output: node for node in graph.node for output in node.output if output}


def consumers(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    """Which nodes take a value."""
    found: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in dict.fromkeys(node.input):
            if name:
                found.setdefault(name, []).append(node)
    return found


def constants(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """The initializers by name."""
    return {tensor.name: tensor for tensor in graph.initializer}


def real_inputs(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    """The inputs that are no initializers: old files list those as inputs too."""
    known = constants(graph)
    return [value for value in graph.input if value.name not in known]


def all_names(graph: onnx.GraphProto) -> set[str]:
    """The names of all values."""
    given = {value.name for value in (*graph.input, *graph.initializer)}
    return given | {output for node in graph.node for output in node.output}


def free_name(graph: onnx.GraphProto, wanted: str) -> str:
    """`wanted`, or with the first number behind it that makes it new."""
    taken = all_names(graph)
    return next(name for name in _numbered(wanted) if name not in taken)


def _numbered(wanted: str) -> Iterator[str]:
    yield wanted
    number = 1
    while True:
        yield f"{wanted}.{number}"
        number += 1


def add_constant(graph: onnx.GraphProto, wanted: str, array: Array) -> str:
    """Add an initializer under a free name and return the name."""
    name = free_name(graph, wanted)
    graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return name


def replace_uses(graph: onnx.GraphProto, new_names: Mapping[str, str]) -> None:
    """Let every node take another value; what the graph gives keeps its name."""
    for node in graph.node:
        node.input[:] = [new_names.get(name, name) for name in node.input]


def rename_values(graph: onnx.GraphProto, new_names: Mapping[str, str]) -> None:
    """Rename values wherever they stand."""
    replace_uses(graph, new_names)
    for node in graph.node:
        node.output[:] = [new_names.get(name, name) for name in node.output]
    for value in (*graph.input, *graph.output, *graph.initializer, *graph.value_info):
        value.name = new_names.get(value.name, value.name)


def prune(graph: onnx.GraphProto) -> None:
    """Drop nodes and initializers that no output of the graph depends on."""
    needed = {value.name for value in graph.output}
    kept: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(name for name in node.input if name)
            kept.append(node)
    tensors = [tensor for tensor in graph.initializer if tensor.name in needed]
    kept.reverse()
    del graph.node[:]
    graph.node.extend(kept)
    del graph.initializer[:]
    graph.initializer.extend(tensors)


def set_outputs(graph: onnx.GraphProto, names: Sequence[str]) -> None:
    """Let the graph give these values, their types left to the runtime."""
    del graph.output[:]
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)


def run_for(model: onnx.ModelProto, x: Array, names: Sequence[str]) -> list[Array]:
    """The values `names` that a model of one input computes from `x`, without any optimisation.

    Raises:
        BuildError: in the runtime's own words, when it refuses the model or fails.
    """
    return _open(model, names, "ORT_DISABLE_ALL")(x)


def open_for(model: onnx.ModelProto, names: Sequence[str]) -> Callable[[Array], list[Array]]:
    """`run_for` for many batches: opened once, and optimised.

    Raises:
        BuildError: as `run_for` does, here and at every call.
    """
    return _open(model, names, "ORT_ENABLE_ALL")


def _open(model: onnx.ModelProto, names: Sequence[str], level: str) -> Callable[[Array], list[Array]]:
    import onnxruntime

    given = real_inputs(model.graph)[0].name
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    set_outputs(probe.graph, list(dict.fromkeys(names)))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.intra_op_num_threads = 2
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4
    with _as_build_error():
        session = onnxruntime.InferenceSession(
            probe.SerializeToString(), options, providers=["CPUExecutionProvider"], enable_fallback=False
        )

    def run(x: Array) -> list[Array]:
        with _as_build_error():
            return list(session.run(list(names), {given: x}))

    return run


@contextmanager
def _as_build_error() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the runtime raises a dozen unrelated types here
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BuildError(f"onnxruntime refused it: {line[:300]}") from error


def set_float_input(value: onnx.ValueInfoProto, dims: Sequence[int | str]) -> None:
    """Declare a graph's input as float32 of these dims."""
    value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.FLOAT, list(dims)))
