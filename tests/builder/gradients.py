"""Gradients on the runtime, and finite differences in float64 of the specification's own evaluator."""

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from cloud_hub.builder.gradients.reverse import differentiate
from cloud_hub.builder.gradients.train_step import (
    base_name,
    momentum_name,
    staged_train_step,
    trainable_parameters,
    updated_name,
)
from cloud_hub.builder.graphs.onnx_graph import constants

SEED = "seed"
COORDINATES = 24


def model_of(nodes, arrays, wanted, *, opset=17, free_batch=True):
    """Nodes that make `y`; wanted arrays are inputs, `x` with a free batch, the others initializers."""
    inputs = []
    for name in wanted:
        shape = list(arrays[name].shape)
        if name == "x" and free_batch:
            shape[0] = "n"
        inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    rest = [numpy_helper.from_array(array, name) for name, array in arrays.items() if name not in wanted]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "operator", inputs, [output], rest)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def open_model(model, outputs):
    """What runs the model for some of its values."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        probe.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda feeds: session.run(list(outputs), feeds)


def gradients_of(model, arrays, wanted, seed):
    """Gradients of sum(seed * y) by the emitted nodes, float32, and `y`."""
    gradients = differentiate(model, {"y": SEED}, list(wanted))
    joined = onnx.ModelProto()
    joined.CopyFrom(model)
    joined.graph.node.extend(gradients.nodes)
    joined.graph.initializer.extend(gradients.initializers)
    joined.graph.input.append(onnx.ValueInfoProto(name=SEED))
    joined.graph.input[-1].CopyFrom(
        helper.make_tensor_value_info(SEED, TensorProto.FLOAT, [None] * seed.ndim)
    )
    run = open_model(joined, [*(gradients.of[name] for name in wanted), "y"])
    *found, y = run({**{name: arrays[name] for name in wanted}, SEED: seed})
    return dict(zip(wanted, found, strict=True)), y


def seed_like(model, arrays, wanted):
    """A random gradient in the shape of `y`."""
    (y,) = open_model(model, ["y"])({name: arrays[name] for name in wanted})
    return np.asarray(np.random.default_rng(9).standard_normal(y.shape), np.float32)


def finite_differences(model, arrays, wanted, seed, *, step=1e-5):
    """For each wanted array some flat coordinates and the derivatives of sum(seed * y) there."""
    evaluator = ReferenceEvaluator(_in_float64(model))
    doubles = {name: arrays[name].astype(np.float64) for name in wanted}
    rng = np.random.default_rng(3)

    def loss(name, coordinate, by):
        moved = doubles[name].copy()
        moved.reshape(-1)[coordinate] += by
        return float((evaluator.run(["y"], {**doubles, name: moved})[0] * seed).sum())

    found = {}
    for name, array in doubles.items():
        chosen = rng.permutation(array.size)[:COORDINATES]
        slopes = [(loss(name, place, step) - loss(name, place, -step)) / (2 * step) for place in chosen]
        found[name] = chosen, np.array(slopes)
    return found


def relative_error(found, expected):
    """Norm of the difference over the norm."""
    return np.linalg.norm(np.subtract(found, expected)) / max(np.linalg.norm(expected), 1e-6)


def _in_float64(model):
    double = onnx.ModelProto()
    double.CopyFrom(model)
    for tensor in double.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(
                numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name)
            )
    for value in (*double.graph.input, *double.graph.output):
        value.type.tensor_type.elem_type = TensorProto.DOUBLE
    return double


class Trainer:
    """Runs a train step and keeps what it gives."""

    def __init__(self, model, parameters):
        self.names = list(parameters)
        self.parameters = {name: np.asarray(array) for name, array in parameters.items()}
        self.base = dict(self.parameters)
        self.momentum = {name: np.zeros_like(array) for name, array in self.parameters.items()}
        outputs = [updated_name(name) for name in self.names]
        buffers = [updated_name(momentum_name(name)) for name in self.names]
        self._run = open_model(model, ["loss", *outputs, *buffers])

    def step(self, x, targets, weight=None, *, rate=0.1, momentum=0.9, proximal=0.0):
        scalars = {"learning_rate": rate, "momentum": momentum, "proximal": proximal}
        feeds = {"x": x, "targets": targets, "sample_weight": np.ones(len(x)) if weight is None else weight}
        for name in self.names:
            feeds[name] = self.parameters[name]
            feeds[momentum_name(name)] = self.momentum[name]
            feeds[base_name(name)] = self.base[name]
        loss, *found = self._run(
            {key: np.asarray(value, np.float32) for key, value in (feeds | scalars).items()}
        )
        count = len(self.names)
        self.parameters = dict(zip(self.names, found[:count], strict=True))
        self.momentum = dict(zip(self.names, found[count:], strict=True))
        return float(loss)


def trainer_of(staged, weights):
    """A trainer of all parameters of a multi-exit graph, from where they are."""
    known = constants(staged.model.graph)
    parameters = {name: numpy_helper.to_array(known[name]) for name in trainable_parameters(staged.model)}
    return Trainer(staged_train_step(staged, weights), parameters)
