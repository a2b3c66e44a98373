"""One step of training as a plain ONNX graph that any onnxruntime runs. No I/O.

Stochastic gradient descent with momentum as torch has it (Sutskever et al. 2013 with the rate outside of the
buffer): v <- momentum v + g, w <- w - rate v. FedProx (Li et al. 2020, arXiv 1812.06127) adds
proximal (w - base) to g.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from typing import Final

import onnx
from onnx import TensorProto, helper

from cloud_hub.builder.gradients.emitter import Emitter
from cloud_hub.builder.gradients.reverse import differentiate
from cloud_hub.builder.graphs.onnx_graph import all_names, prune, real_inputs
from cloud_hub.builder.graphs.staged import (
    BATCH,
    StagedGraph,
    float_value,
    is_head_node,
    logits_name,
    make_model,
    opset_of,
)
from cloud_hub.errors import BuildError
from edge_cascade.train_step import (
    LEARNING_RATE,
    LOSS,
    MOMENTUM,
    PROXIMAL,
    SAMPLE_WEIGHT,
    TARGETS,
    base_name,
    momentum_name,
    updated_name,
)

_LEAST_WEIGHT = 1e-12  # of a whole batch: below it nothing is learned
_PARAMETER_INPUTS: Final = {
    "Conv": (1, 2),
    "Gemm": (1, 2),
    "MatMul": (0, 1),
    "BatchNormalization": (1, 2),
    "LayerNormalization": (1, 2),
    "Add": (0, 1),
    "Mul": (0, 1),
}


def trainable_parameters(model: onnx.ModelProto) -> tuple[str, ...]:
    """Float initializers that stand where layers have weights, biases, scales and shifts, in file order.

    Scalars are left out: they are constants of a decomposed activation rather than parameters.
    """
    return _parameters_of(model, model.graph.node)


def head_parameters(staged: StagedGraph) -> tuple[str, ...]:
    """The trainable parameters of the exits' heads: what is left where the network has no gradient."""
    heads = [node for node in staged.model.graph.node if is_head_node(node)]
    return _parameters_of(staged.model, heads)


def _parameters_of(model: onnx.ModelProto, nodes: Iterable[onnx.NodeProto]) -> tuple[str, ...]:
    used = {
        node.input[index]
        for node in nodes
        for index in _PARAMETER_INPUTS.get(node.op_type, ())
        if index < len(node.input)
    }
    return tuple(
        tensor.name
        for tensor in model.graph.initializer
        if tensor.name in used
        and tensor.data_type == TensorProto.FLOAT
        and list(tensor.dims) not in ([], [1])
    )


def staged_train_step(
    staged: StagedGraph, exit_weights: Sequence[float], parameters: Sequence[str] | None = None
) -> onnx.ModelProto:
    """The train step of a multi-exit network, one weight an exit; of all its parameters if none are named.

    Raises:
        BuildError: as `train_step` does.
    """
    if len(exit_weights) != staged.stages:
        raise BuildError(f"{len(exit_weights)} exit weights for {staged.stages} exits: give one each")
    exits = {logits_name(index): weight for index, weight in enumerate(exit_weights)}
    chosen = trainable_parameters(staged.model) if parameters is None else parameters
    return train_step(staged.model, exits, chosen)


def train_step(
    model: onnx.ModelProto, exits: Mapping[str, float], parameters: Sequence[str]
) -> onnx.ModelProto:
    """A graph that takes parameters and a batch, and gives parameters after one step of descent.

    `exits` weighs the outputs that hold logits, (n, classes). All values are float32.

    Inputs: the model's own (`x`); for each parameter its name, `momentum.<name>` and `base.<name>` of the
    same shape; `targets` (n, classes), rows that sum to one; `sample_weight` (n,), not negative; scalars
    `learning_rate`, `momentum` and `proximal`. Outputs: `updated.<name>` and `updated.momentum.<name>`;
    `loss`, a scalar: per exit the cross-entropy, averaged by sample weight, summed by exit weight, without
    the proximal term. Cross-entropy is linear in the targets: to distil, mix a share of the teacher's
    probabilities into them. A batch whose weights are all zero gives a loss and a gradient of zero.

    Raises:
        NoGradientError: if a node between a parameter and an exit has no gradient.
        BuildError: if an exit or a parameter cannot be used, or a name is already taken.
    """
    initial = {tensor.name: tensor for tensor in model.graph.initializer}
    _check(model, exits, parameters)
    graph = onnx.GraphProto()
    graph.CopyFrom(model.graph)
    emit = Emitter(all_names(graph), "step")
    loss, seeds = _loss(emit, exits)
    gradients = differentiate(model, seeds, parameters)
    before = list(emit.nodes)
    updates = Emitter(all_names(graph), "update")
    outputs = []
    for name in parameters:
        shape = tuple(initial[name].dims)
        _descend(updates, name, gradients.of[name])
        outputs += [_fixed(updated_name(name), shape), _fixed(updated_name(momentum_name(name)), shape)]
    before.append(helper.make_node("Identity", [loss], [LOSS], name=LOSS))
    step = make_model(
        "train-step",
        [*graph.node, *before, *gradients.nodes, *updates.nodes],
        [*real_inputs(graph), *_inputs(model, exits, parameters)],
        [*outputs, _fixed(LOSS, ())],
        [
            *(tensor for tensor in graph.initializer if tensor.name not in set(parameters)),
            *emit.initializers,
            *gradients.initializers,
            *updates.initializers,
        ],
        opset=opset_of(model),
    )
    prune(step.graph)
    onnx.checker.check_model(step)
    return step


def _loss(emit: Emitter, exits: Mapping[str, float]) -> tuple[str, dict[str, str]]:
    """The loss, and its gradient with respect to each exit's logits: share (softmax - targets)."""
    whole = emit.op("Max", emit.sum_over(SAMPLE_WEIGHT, [0], keepdims=False), emit.floats(_LEAST_WEIGHT))
    share = emit.op("Unsqueeze", emit.op("Div", SAMPLE_WEIGHT, whole), emit.integers([1]))
    parts = []
    seeds: dict[str, str] = {}
    for logits, weight in exits.items():
        likelihood = emit.op("LogSoftmax", logits, axis=1)
        weighted = emit.op("Mul", emit.op("Mul", TARGETS, likelihood), share)
        parts.append(emit.scaled(emit.sum_over(weighted, [0, 1], keepdims=False), -weight))
        distance = emit.op("Sub", emit.op("Exp", likelihood), TARGETS)
        seeds[logits] = emit.op("Mul", distance, emit.scaled(share, weight))
    return emit.total(parts), seeds


def _descend(emit: Emitter, name: str, gradient: str) -> None:
    """v <- momentum v + g + proximal (w - base), w <- w - rate v."""
    pull = emit.op("Mul", emit.op("Sub", name, base_name(name)), PROXIMAL)
    kept = emit.op("Mul", momentum_name(name), MOMENTUM)
    velocity, value = updated_name(momentum_name(name)), updated_name(name)
    emit.nodes.append(helper.make_node("Sum", [kept, gradient, pull], [velocity], name=velocity))
    way = emit.op("Mul", velocity, LEARNING_RATE)
    emit.nodes.append(helper.make_node("Sub", [name, way], [value], name=value))


def _inputs(
    model: onnx.ModelProto, exits: Mapping[str, float], parameters: Sequence[str]
) -> list[onnx.ValueInfoProto]:
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    classes = _classes(model, next(iter(exits)))
    return [
        float_value(TARGETS, (classes,)),
        helper.make_tensor_value_info(SAMPLE_WEIGHT, TensorProto.FLOAT, [BATCH]),
        *(_fixed(name, ()) for name in (LEARNING_RATE, MOMENTUM, PROXIMAL)),
        *(
            _fixed(kind, shapes[name])
            for name in parameters
            for kind in (name, momentum_name(name), base_name(name))
        ),
    ]


def _classes(model: onnx.ModelProto, logits: str) -> int:
    value = next(value for value in model.graph.output if value.name == logits)
    dims = value.type.tensor_type.shape.dim
    if len(dims) != 2 or not dims[1].dim_value:
        raise BuildError(f"output {logits!r} does not declare a shape (n, classes)")
    return int(dims[1].dim_value)


def _fixed(name: str, shape: tuple[int, ...]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))


def _check(model: onnx.ModelProto, exits: Mapping[str, float], parameters: Sequence[str]) -> None:
    outputs = {value.name for value in model.graph.output}
    if not exits or any(not isfinite(weight) or weight <= 0.0 for weight in exits.values()):
        raise BuildError("a train step needs one exit or more, each with a weight above zero")
    if missing := exits.keys() - outputs:
        raise BuildError(f"the model has no output {min(missing)!r} to train")
    if len({_classes(model, logits) for logits in exits}) > 1:
        raise BuildError("the exits differ in their number of classes")
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    if not parameters:
        raise BuildError("the model has no parameter to train: its weights are not initializers of layers")
    for name in parameters:
        if kinds.get(name) != TensorProto.FLOAT:
            raise BuildError(f"parameter {name!r} is no float32 initializer of the model")
    added = {TARGETS, SAMPLE_WEIGHT, LEARNING_RATE, MOMENTUM, PROXIMAL, LOSS}
    for name in parameters:
        buffer = momentum_name(name)
        added |= {buffer, base_name(name), updated_name(name), updated_name(buffer)}
    if clash := added & all_names(model.graph):
        raise BuildError(f"the model already has a value {min(clash)!r}: rename it")
