"""Writes a network and its parameters as ONNX: the whole multi-exit graph, and a plain full model. No I/O.

Batch normalisation is folded into the convolution before it: the runtime's optimiser would do the same, and
then rewrite weights that a swap replaces.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import assert_never

import onnx
from onnx import helper, numpy_helper

from cloud_hub.builder.graphs.staged import (
    INPUT,
    LOGITS,
    StagedGraph,
    features_name,
    float_value,
    logits_name,
    make_model,
)
from cloud_hub.builder.networks.network import (
    AveragePool,
    Conv,
    Dense,
    Flatten,
    GlobalAveragePool,
    MaxPool,
    Network,
    Parameters,
    PlacedLayer,
    Relu,
    fold_batch_norm,
)


def export_staged(network: Network, parameters: Parameters) -> StagedGraph:
    """The multi-exit network as one fp32 graph."""
    nodes: list[onnx.NodeProto] = []
    outputs: list[onnx.ValueInfoProto] = []
    given = INPUT
    last = len(network.stages) - 1
    for index, (body, head) in enumerate(zip(network.bodies, network.heads, strict=True)):
        nodes.extend(_chain(body, given, features_name(index)))
        nodes.extend(_chain(head, features_name(index), logits_name(index)))
        if index < last:
            outputs.append(float_value(features_name(index), network.feature_shapes[index]))
        outputs.append(float_value(logits_name(index), (network.classes,)))
        given = features_name(index)
    return StagedGraph(
        model=_model("multi-exit", network, parameters, nodes, outputs),
        input_shape=network.input_shape,
        classes=network.classes,
        feature_shapes=network.feature_shapes[:-1],
        mult_adds=network.mult_adds,
    )


def export_full(network: Network, parameters: Parameters) -> bytes:
    """A network of one stage as a self-contained classifier: normalised `x` (n, *input_shape) to `logits`."""
    if len(network.stages) != 1:
        raise ValueError(f"a full model has one stage, this network has {len(network.stages)}")
    nodes = list(_chain([*network.bodies[0], *network.heads[0]], INPUT, LOGITS))
    model = _model("full", network, parameters, nodes, [float_value(LOGITS, (network.classes,))])
    serialised: bytes = model.SerializeToString(deterministic=True)
    return serialised


def _model(
    name: str,
    network: Network,
    parameters: Parameters,
    nodes: Sequence[onnx.NodeProto],
    outputs: Sequence[onnx.ValueInfoProto],
) -> onnx.ModelProto:
    folded = fold_batch_norm(network, parameters)
    initializers = [numpy_helper.from_array(array, key) for key, array in folded.items()]
    model = make_model(name, nodes, [float_value(INPUT, network.input_shape)], outputs, initializers)
    onnx.checker.check_model(model, full_check=True)
    return model


def _chain(layers: Sequence[PlacedLayer], given: str, result: str) -> Iterator[onnx.NodeProto]:
    """Nodes of consecutive layers; only the last one's output has a name that others may rely on."""
    for placed in layers:
        target = result if placed is layers[-1] else f"{placed.name}.out"
        yield from _nodes(placed, given, target)
        given = target


def _nodes(placed: PlacedLayer, given: str, target: str) -> Iterator[onnx.NodeProto]:
    name, layer = placed.name, placed.layer
    axes = len(placed.input_shape) - 1
    parameters = [f"{name}.weight", f"{name}.bias"]
    match layer:
        case Conv(kernel=kernel, stride=stride, groups=groups):
            yield helper.make_node(
                "Conv",
                [given, *parameters],
                [target],
                name=name,
                kernel_shape=[kernel] * axes,
                strides=[stride] * axes,
                pads=[kernel // 2] * (2 * axes),
                group=groups,
            )
        case Dense():
            yield helper.make_node("Gemm", [given, *parameters], [target], name=name, transB=1)
        case Relu():
            yield helper.make_node("Relu", [given], [target], name=name)
        case MaxPool(size=size):
            yield helper.make_node(
                "MaxPool", [given], [target], name=name, kernel_shape=[size] * axes, strides=[size] * axes
            )
        case AveragePool(size=size):
            yield helper.make_node(
                "AveragePool", [given], [target], name=name, kernel_shape=[size] * axes, strides=[size] * axes
            )
        case GlobalAveragePool():
            yield helper.make_node("GlobalAveragePool", [given], [f"{name}.pooled"], name=name)
            yield helper.make_node("Flatten", [f"{name}.pooled"], [target], name=f"{name}.flat")
        case Flatten():
            yield helper.make_node("Flatten", [given], [target], name=name)
        case _:
            assert_never(layer)
