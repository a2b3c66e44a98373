"""Classifiers as users bring them, written with onnx.helper."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT = TensorProto.FLOAT


def tensor(name, array):
    return numpy_helper.from_array(np.asarray(array), name)


def model_of(nodes, inputs, outputs, initializers=(), opset=17, **fields):
    """Inputs and outputs as (name, dims) for float32, or as ready ValueInfos."""
    values = [
        [
            value
            if isinstance(value, onnx.ValueInfoProto)
            else helper.make_tensor_value_info(value[0], FLOAT, value[1])
            for value in group
        ]
        for group in (inputs, outputs)
    ]
    graph = helper.make_graph(nodes, "g", *values, [*initializers])
    imports = fields.pop("opset_imports", [helper.make_opsetid("", opset)])
    return helper.make_model(graph, opset_imports=imports, ir_version=9, **fields)


def image_model(batch="b", seed=0, tail=(), head=("Gemm",), classes=4):
    """Conv, BatchNormalization, Relu, MaxPool, Conv, Relu, pool, reshape, Gemm: what torch exports."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return (0.4 * rng.standard_normal(shape)).astype(np.float32)

    initializers = [
        tensor("w0", normal(6, 3, 3, 3)),
        tensor("gamma", 1 + normal(6)),
        tensor("beta", normal(6)),
        tensor("mean", normal(6)),
        tensor("var", np.abs(normal(6)) + 0.5),
        tensor("w1", normal(8, 6, 3, 3)),
        tensor("b1", normal(8)),
        tensor("w2", normal(classes, 8)),
        tensor("b2", normal(classes)),
    ]
    nodes = [
        helper.make_node("Conv", ["image", "w0"], ["c0"], name="conv0", pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["c0", "gamma", "beta", "mean", "var"], ["n0"], name="norm0"),
        helper.make_node("Relu", ["n0"], ["r0"], name="relu0"),
        helper.make_node("MaxPool", ["r0"], ["p0"], name="pool0", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["p0", "w1", "b1"], ["c1"], name="conv1", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], name="relu1"),
        helper.make_node("GlobalAveragePool", ["r1"], ["g"], name="gap"),
    ]
    if batch == "b":
        nodes += [
            helper.make_node("Shape", ["image"], ["shape"]),
            helper.make_node("Constant", [], ["zero"], value_int=0),
            helper.make_node("Gather", ["shape", "zero"], ["count"]),
            helper.make_node("Constant", [], ["axes"], value=tensor("", np.array([0]))),
            helper.make_node("Unsqueeze", ["count", "axes"], ["counts"]),
            helper.make_node("Constant", [], ["rest"], value=tensor("", np.array([-1]))),
            helper.make_node("Concat", ["counts", "rest"], ["target"], axis=0),
        ]
    else:
        initializers.append(tensor("target", np.array([batch, 8])))
    nodes += [
        helper.make_node("Reshape", ["g", "target"], ["flat"], name="view"),
        helper.make_node("Dropout", ["flat"], ["kept"], name="dropout"),
        helper.make_node("Gemm", ["kept", "w2", "b2"], ["scores"], name="fc", transB=1),
        *tail,
    ]
    output = tail[-1].output[0] if tail else "scores"
    return model_of(nodes, [("image", [batch, 3, 8, 8])], [(output, [batch, classes])], initializers)


def dense_model(tail=(), output="scores", width=3, opset=17, initializers=(), **fields):
    """One Gemm on a vector of 5."""
    rng = np.random.default_rng(0)
    return model_of(
        [helper.make_node("Gemm", ["x", "w", "b"], ["scores"], name="fc"), *tail],
        [("x", ["n", 5])],
        [(output, None)] if isinstance(output, str) else output,
        [
            tensor("w", rng.standard_normal((5, width)).astype(np.float32)),
            tensor("b", rng.standard_normal(width).astype(np.float32)),
            *initializers,
        ],
        opset=opset,
        **fields,
    )


def residual_model():
    """Two blocks with a bypass, the second one between `b` and `d`; all four convolutions cost the same."""
    rng = np.random.default_rng(0)
    weights = [tensor(f"w{i}", rng.standard_normal((4, 4, 3)).astype(np.float32)) for i in range(4)]

    def conv(index, given, result):
        return helper.make_node("Conv", [given, f"w{index}"], [result], name=f"conv{index}", pads=[1, 1])

    nodes = [
        conv(0, "x", "a"),
        helper.make_node("Relu", ["a"], ["b"]),
        conv(1, "b", "left"),
        helper.make_node("Relu", ["left"], ["right"]),
        conv(2, "right", "c"),
        helper.make_node("Add", ["b", "c"], ["d"]),
        conv(3, "d", "e"),
        helper.make_node("GlobalAveragePool", ["e"], ["f"]),
        helper.make_node("Flatten", ["f"], ["logits"]),
    ]
    return model_of(nodes, [("x", ["n", 4, 16])], [("logits", ["n", 4])], weights)
