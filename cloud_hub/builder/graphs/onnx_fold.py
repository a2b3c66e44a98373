"""Makes a graph independent of the batch it was exported with, and folds what does not depend on samples.

Exporters write shape computations, or the shapes of the one batch that they saw. Whatever follows from
shapes and constants alone is computed here, at two batch sizes where the batch axis is free: what is the same
twice becomes a constant, what follows the batch becomes -1 or 0 in the Reshape that takes it. Whether the
guess was right is for the caller to prove, by running batches of several sizes. Graphs change in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from cloud_hub.builder.graphs.onnx_graph import (
    NOTHING,
    Array,
    add_constant,
    attribute_of,
    constants,
    consumers,
    producers,
    prune,
    remove_attribute,
    replace_uses,
    run_for,
)
from cloud_hub.builder.graphs.staged import Shape
from cloud_hub.errors import BuildError

_MAX_FOLDED_ELEMENTS = 1 << 24
_SAME_AT_INFERENCE = {"Identity", "Dropout"}
_RECURRENT = {"LSTM", "GRU", "RNN"}


def drop_no_ops(model: onnx.ModelProto) -> None:
    """Take out Identity, Dropout and a cast of the input to the type that it has.

    Raises:
        BuildError: for a model that was exported in training mode.
    """
    graph = model.graph
    known = constants(graph)
    given = {value.name for value in graph.input}
    results = {value.name for value in graph.output}
    same: dict[str, str] = {}
    kept = []
    for node in graph.node:
        _check_inference_mode(node, known)
        is_vain_cast = (
            node.op_type == "Cast"
            and node.input[0] in given
            and attribute_of(node, "to") == onnx.TensorProto.FLOAT
        )
        if (node.op_type in _SAME_AT_INFERENCE or is_vain_cast) and node.output[0] not in results:
            same[node.output[0]] = same.get(node.input[0], node.input[0])
        else:
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)
    replace_uses(graph, same)
    prune(graph)


def _check_inference_mode(node: onnx.NodeProto, known: dict[str, onnx.TensorProto]) -> None:
    switched_on = node.op_type == "BatchNormalization" and attribute_of(node, "training_mode", 0)
    if node.op_type == "Dropout" and len(node.input) > 2 and node.input[2] in known:
        switched_on = bool(numpy_helper.to_array(known[node.input[2]]))
    if switched_on:
        raise BuildError(
            f"{node.op_type} ({node.name}) is in training mode: call model.eval() before the export"
        )


def fold_constants(model: onnx.ModelProto, batches: Sequence[Array]) -> None:
    """Turn what follows from shapes and constants into initializers.

    `batches`: one input of the only size that the model takes, or two of different sizes.

    Raises:
        BuildError: when the runtime refuses the model at one of these sizes.
    """
    graph = model.graph
    _turn_into_initializers(graph)
    steady = _independent_of_samples(graph)
    known = constants(graph)
    taken = [name for node in graph.node if not steady.intersection(node.output) for name in node.input]
    wanted = [
        name for name in dict.fromkeys(taken) if name in steady and name not in known and name != NOTHING
    ]
    values = [run_for(model, x, wanted) if wanted else [] for x in batches]
    sizes = [len(x) for x in batches]
    for name, *found in zip(wanted, *values, strict=True):
        if all(_is_same(found[0], other) for other in found) and found[0].size <= _MAX_FOLDED_ELEMENTS:
            new = add_constant(graph, f"{name}.folded", found[0])
            replace_uses(graph, {name: new})
        else:
            _fold_shapes(graph, name, found, sizes)
    prune(graph)


def _turn_into_initializers(graph: onnx.GraphProto) -> None:
    """Constant nodes first: a runtime may need a constant where the rest of a computation stays."""
    for node in [node for node in graph.node if node.op_type == "Constant"]:
        tensor = attribute_of(node, "value")
        if tensor is not None:
            tensor.name = node.output[0]
            graph.initializer.append(tensor)
            graph.node.remove(node)


def _independent_of_samples(graph: onnx.GraphProto) -> set[str]:
    steady = {tensor.name for tensor in graph.initializer} | {NOTHING}
    for node in graph.node:
        if node.op_type in {"Shape", "Size"} or steady.issuperset(node.input):
            steady.update(node.output)
    return steady


def _is_same(one: Array, other: Array) -> bool:
    return one.dtype == other.dtype and np.array_equal(one, other)


def _fold_shapes(graph: onnx.GraphProto, name: str, found: Sequence[Array], sizes: Sequence[int]) -> None:
    """Replace a shape that follows the batch where a Reshape takes it."""
    first, second = found
    if first.ndim != 1 or first.shape != second.shape:
        return
    moving = np.flatnonzero(first != second)
    if len(moving) != 1 or first[moving[0]] * sizes[1] != second[moving[0]] * sizes[0]:
        return
    shape = _with_free_axis(first, int(moving[0]))
    if shape is None:
        return
    for node in consumers(graph).get(name, []):
        if node.op_type == "Reshape" and node.input[1] == name:
            node.input[1] = add_constant(graph, f"{name}.folded", shape)
            remove_attribute(node, "allowzero")


def _with_free_axis(shape: Array, axis: int) -> NDArray[np.int64] | None:
    """A Reshape's target whose `axis` follows the batch: inferred, or else copied from the input."""
    free = np.array(shape, np.int64)
    if -1 not in free:
        free[axis] = -1
    elif axis == 0 and free[0] != -1:
        free[0] = 0
    return free if free[axis] in {-1, 0} else None


def free_fixed_batch(model: onnx.ModelProto, batch: int) -> None:
    """Let the Reshapes of a model that was exported for `batch` samples take any number of them."""
    graph = model.graph
    known = constants(graph)
    for node in graph.node:
        if node.op_type != "Reshape" or node.input[1] not in known:
            continue
        shape = numpy_helper.to_array(known[node.input[1]])
        if shape.size == 0 or shape[0] == 0 or shape[0] % batch or shape[0] < 0:
            continue
        freed = _with_free_axis(shape, 0)
        if freed is not None and (freed[0] == -1 or shape[0] == batch):
            node.input[1] = add_constant(graph, f"{node.input[1]}.free", freed)
            remove_attribute(node, "allowzero")
    prune(graph)


def drop_zero_states(model: onnx.ModelProto, batches: Sequence[Array]) -> None:
    """Leave out initial states of recurrent layers where they are zeros, which is the default.

    Exporters write them out with the batch of the export in their shape.
    """
    graph = model.graph
    steady = _independent_of_samples(graph)
    places = [
        (node, index)
        for node in graph.node
        if node.op_type in _RECURRENT
        for index in (5, 6)
        if len(node.input) > index and node.input[index] and node.input[index] in steady
    ]
    known = constants(graph)
    computed = [node.input[index] for node, index in places if node.input[index] not in known]
    values = dict(zip(computed, run_for(model, batches[-1], computed), strict=True)) if computed else {}
    for node, index in places:
        name = node.input[index]
        state = numpy_helper.to_array(known[name]) if name in known else values[name]
        if not np.any(state):
            node.input[index] = NOTHING
    prune(graph)


def fold_batch_norms(model: onnx.ModelProto) -> None:
    """Make batch normalisation part of the Conv or Gemm before it, where there is one that nobody else reads.

    Quantising needs it, and the runtime would otherwise do it to weights that a swap replaces.
    """
    graph = model.graph
    for node in [node for node in graph.node if node.op_type == "BatchNormalization"]:
        before = producers(graph).get(node.input[0])
        readers = consumers(graph).get(node.input[0], [])
        if before is not None and len(readers) == 1 and _can_take(graph, before, node):
            # Weights that are no numbers make answers that are none, and those are refused later.
            with np.errstate(all="ignore"):
                _fold_into(graph, before, node)
            before.output[0] = node.output[0]
            graph.node.remove(node)
    prune(graph)


def take_channels_first(model: onnx.ModelProto, input_shape: Shape) -> Shape:
    """Drop the Transpose with which models begin that are fed images channels last; the new input shape.

    Which way round a sample has its channels is for the bundle's preprocessing to say.
    """
    graph = model.graph
    given = graph.input[0].name
    readers = consumers(graph).get(given, [])
    if [node.op_type for node in readers] != ["Transpose"] or attribute_of(readers[0], "perm") != [
        0,
        3,
        1,
        2,
    ]:
        return input_shape
    replace_uses(graph, {readers[0].output[0]: given})
    graph.node.remove(readers[0])
    return (input_shape[-1], *input_shape[:-1])


def _can_take(graph: onnx.GraphProto, before: onnx.NodeProto, norm: onnx.NodeProto) -> bool:
    known = constants(graph)
    if before.op_type not in {"Conv", "Gemm"} or not known.keys() >= set(norm.input[1:]):
        return False
    if not known.keys() >= {name for name in before.input[1:] if name}:
        return False
    if before.output[0] in {value.name for value in graph.output}:
        return False
    plain = before.op_type == "Conv" or attribute_of(before, "alpha", 1.0) == 1.0
    return plain and _bias_fits(graph, before)


def _bias_fits(graph: onnx.GraphProto, before: onnx.NodeProto) -> bool:
    if before.op_type == "Conv" or not _has_bias(before):
        return True
    bias = constants(graph)[before.input[2]]
    return attribute_of(before, "beta", 1.0) == 1.0 and len(bias.dims) == 1


def _has_bias(node: onnx.NodeProto) -> bool:
    return len(node.input) > 2 and bool(node.input[2])


def _fold_into(graph: onnx.GraphProto, before: onnx.NodeProto, norm: onnx.NodeProto) -> None:
    known = constants(graph)
    scale, shift, mean, variance = (
        numpy_helper.to_array(known[name]).astype(np.float64) for name in norm.input[1:]
    )
    factor = scale / np.sqrt(variance + attribute_of(norm, "epsilon", 1e-5))
    weight = numpy_helper.to_array(known[before.input[1]]).astype(np.float64)
    bias = numpy_helper.to_array(known[before.input[2]]).astype(np.float64) if _has_bias(before) else 0.0
    across = before.op_type == "Gemm" and not attribute_of(before, "transB", 0)
    shape = (1, -1) if across else (-1, *[1] * (weight.ndim - 1))
    names = [
        add_constant(graph, f"{before.input[1]}.normalised", array.astype(np.float32))
        for array in (weight * factor.reshape(shape), (bias - mean) * factor + shift)
    ]
    before.input[:] = [before.input[0], *names]
