"""What is written as .tflite computes what the ONNX stage does, in float and in int8."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from cloud_hub.builder.graphs.quantise import quantise
from cloud_hub.builder.graphs.staged import INPUT, StagedGraph, float_value, make_model
from cloud_hub.builder.graphs.stages import cut_stages
from cloud_hub.builder.litert.stage_files import litert_files
from cloud_hub.builder.networks.export import export_staged
from cloud_hub.errors import BuildError
from edge_cascade.backends.onnx import OnnxStage
from edge_cascade.bundle import LitertModel, StageModel
from edge_cascade.onnx_file import inspect_model
from edge_cascade.tflite_file import channels_last, inspect_tflite
from tests.builder.networks import IMAGE, SIGNAL, inputs_of, parameters_of

CLASSES = 3
BODY = "stage0.features"


def litert_stage(stage, feature_shape):
    pytest.importorskip("ai_edge_litert")
    from edge_cascade.backends.litert import LitertStage

    return LitertStage(stage, feature_shape)


class Body:
    """The nodes between the input and the features of a first stage, and their random weights."""

    def __init__(self, *shape, seed=0):
        self.shape = shape
        self.nodes = []
        self.initializers = []
        self.rng = np.random.default_rng(seed)
        self.last = INPUT

    def weights(self, *shape):
        return self.constant(self.rng.normal(0, 0.5, shape).astype(np.float32))

    def constant(self, array):
        name = f"w{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def add(self, op, *inputs, given=None, **attributes):
        output = f"v{len(self.nodes)}"
        node = helper.make_node(
            op, [given or self.last, *inputs], [output], name=f"n{len(self.nodes)}", **attributes
        )
        self.nodes.append(node)
        self.last = output
        return self

    def staged(self):
        """Two stages: the body, and a dense layer; both exits flatten and end in one as well."""
        nodes = [*self.nodes, helper.make_node("Identity", [self.last], [BODY], name="end")]
        probe = make_model("probe", nodes, [float_value(INPUT, self.shape)], [], self.initializers)
        probe.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
        known = onnx.shape_inference.infer_shapes(probe, strict_mode=True, data_prop=True).graph.value_info
        shape = next(
            tuple(d.dim_value for d in value.type.tensor_type.shape.dim)[1:]
            for value in known
            if value.name == BODY
        )
        nodes[-2].output[0] = BODY
        for stage in range(2):
            weight = self.weights(CLASSES, int(np.prod(shape)))
            bias = self.weights(CLASSES)
            nodes[-1 if stage == 0 else len(nodes) :] = [
                helper.make_node("Flatten", [BODY], [f"exit{stage}.flat"], name=f"exit{stage}.flatten"),
                helper.make_node(
                    "Gemm", [f"exit{stage}.flat", weight, bias], [f"exit{stage}.logits"],
                    name=f"exit{stage}.dense", transB=1,
                ),
            ]  # fmt: skip
        outputs = [float_value(BODY, shape), *(float_value(f"exit{i}.logits", (CLASSES,)) for i in range(2))]
        model = make_model("body", nodes, [float_value(INPUT, self.shape)], outputs, self.initializers)
        onnx.checker.check_model(model, full_check=True)
        return StagedGraph(model, self.shape, CLASSES, (shape,), (1, 1))


def both_runtimes(staged, precision, count=12, seed=5):
    """Per stage: features and head of onnxruntime and of LiteRT, each fed with its own features."""
    x = np.random.default_rng(seed).standard_normal((count, *staged.input_shape)).astype(np.float32)
    cuts = cut_stages(staged if precision == "fp32" else quantise(staged, x))
    files = litert_files({precision: cuts}, staged)
    given = ours = x
    for index, cut in enumerate(cuts):
        content = files[index, precision]
        litert = LitertModel(content, inspect_tflite(content))
        stage = StageModel(index, precision, cut.model, inspect_model(cut.model), cut.weights, litert)
        shape = staged.feature_shape_of(index)
        expected, head = OnnxStage(stage, shape).run_batch(given, 1.3)
        features, own_head = litert_stage(stage, shape).run_batch(ours, 1.3)
        if shape is not None:
            expected_last = np.moveaxis(expected, 1, -1) if len(shape) > 1 else expected
            yield expected_last.reshape(features.shape), features, head, own_head
            given, ours = expected, features
        else:
            yield None, None, head, own_head


def assert_same(staged, precision="fp32"):
    for expected, features, head, own_head in both_runtimes(staged, precision):
        if features is not None:
            np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(own_head, head, rtol=1e-3, atol=1e-4)


def assert_within_a_step(staged):
    """In int8 kernels may round a half either way, which is a step of the features' scale."""
    for expected, features, _, _ in both_runtimes(staged, "int8"):
        if features is not None:
            levels = np.unique(expected)
            step = np.diff(levels).min() if len(levels) > 1 else 0.0
            assert np.abs(features - expected).max() <= 1.01 * step
            assert np.mean(np.abs(features - expected) > 0.1 * step) < 0.05


@pytest.mark.parametrize("network", [SIGNAL, IMAGE], ids=["signal", "image"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_our_own_networks_come_out_the_same(network, precision):
    staged = export_staged(network, parameters_of(network))
    if precision == "fp32":
        assert_same(staged)
    else:
        for expected, features, head, own_head in both_runtimes(staged, "int8", count=40):
            if features is not None:
                np.testing.assert_array_equal(features, expected)
            np.testing.assert_allclose(own_head, head, atol=1e-4)


def residual():
    body = Body(4, 9, 9)
    body.add("Conv", body.weights(8, 4, 3, 3), body.weights(8), pads=[1, 1, 1, 1]).add("Relu")
    return body.add("Conv", body.weights(8, 8, 1, 1)).add("Add", "v1").add("Relu")


def mobile():
    body = Body(3, 10, 10)
    body.add("Conv", body.weights(8, 3, 3, 3), body.weights(8), strides=[2, 2], pads=[1, 1, 1, 1])
    body.add("Clip", body.constant(np.float32(0)), body.constant(np.float32(6)))
    body.add("Conv", body.weights(8, 1, 3, 3), body.weights(8), group=8, pads=[1, 1, 1, 1])
    body.add("Clip", body.constant(np.float32(0)), body.constant(np.float32(6)))
    return body.add("Conv", body.weights(4, 8, 1, 1), body.weights(4))


def squeezed():
    """Squeeze and excitation: a gate per channel."""
    body = Body(6, 8, 8)
    body.add("Conv", body.weights(6, 6, 3, 3), body.weights(6), pads=[1, 1, 1, 1]).add("Relu")
    body.add("GlobalAveragePool").add("Conv", body.weights(6, 6, 1, 1)).add("Sigmoid")
    return body.add("Mul", "v1")


def joined():
    body = Body(2, 30)
    body.add("Conv", body.weights(3, 2, 3), body.weights(3), pads=[1, 1])
    body.add("Conv", body.weights(2, 2, 5), body.weights(2), given=INPUT, pads=[2, 2])
    return body.add("Concat", "v0", axis=1).add("MaxPool", kernel_shape=[3], strides=[2])


def dense():
    body = Body(2, 5, 4)
    body.add("Conv", body.weights(3, 2, 3, 3), body.weights(3)).add("Relu").add("Flatten")
    body.add("Gemm", body.weights(7, 18), body.weights(7), transB=1).add("Relu")
    return body.add("MatMul", body.weights(7, 6)).add("Add", body.weights(6))


def mixed():
    """Layouts that meet: a flat input, a shape given as numbers, axes in another order, a constant a channel."""
    body = Body(48)
    body.add("Reshape", body.constant(np.array([-1, 3, 4, 4])))
    body.add("Conv", body.weights(5, 3, 3, 3), pads=[1, 1, 1, 1])
    body.add("Mul", body.weights(5, 1, 1)).add("Sub", body.weights(1, 5, 4, 4))
    body.add("Transpose", perm=[0, 2, 1, 3])
    return body.add("Conv", body.weights(2, 4, 1, 1))


def normalised():
    body = Body(3, 12)
    body.add("Conv", body.weights(4, 3, 3))
    ones = [body.constant(np.linspace(0.5, 2, 4).astype(np.float32)) for _ in range(4)]
    return body.add("BatchNormalization", *ones).add("LeakyRelu", alpha=0.2)


def grouped():
    body = Body(4, 7, 7)
    body.add("Conv", body.weights(6, 2, 3, 3), body.weights(6), pads=[1, 0, 0, 1], group=2).add("Relu")
    return body.add("GlobalMaxPool").add("Flatten")


def averaged():
    body = Body(4, 9, 8).add(
        "AveragePool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], count_include_pad=1
    )
    return body.add("ReduceMean", axes=[2, 3], keepdims=0).add("Tanh")


BODIES = [residual, mobile, squeezed, joined, dense, mixed, normalised, grouped, averaged]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_the_parts_of_small_networks_come_out_the_same_in_float(body):
    assert_same(body().staged())


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_the_parts_of_small_networks_come_out_within_a_step_in_int8(body):
    assert_within_a_step(body().staged())


@settings(max_examples=40)
@given(
    height=st.integers(1, 9),
    width=st.integers(5, 9),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.integers(1, 2),
    pads=st.lists(st.integers(0, 2), min_size=4, max_size=4),
    groups=st.sampled_from([1, 2, 4]),
    pool=st.sampled_from([None, "MaxPool", "AveragePool"]),
    rounds_up=st.booleans(),
)
def test_windows_of_any_kind_slide_alike(
    height, width, kernel, stride, dilation, pads, groups, pool, rounds_up
):
    spans = [(size - 1) * dilation + 1 for size in kernel]
    rooms = [height + pads[0] + pads[2] - spans[0], width + pads[1] + pads[3] - spans[1]]
    if min(rooms) < 0:
        return
    body = Body(4, height, width)
    if pool is None:
        body.add(
            "Conv", body.weights(8, 4 // groups, *kernel), body.weights(8),
            strides=stride, pads=pads, dilations=[dilation] * 2, group=groups,
        )  # fmt: skip
    elif dilation == 1 and max(pads[0], pads[2]) < kernel[0] and max(pads[1], pads[3]) < kernel[1]:
        if rounds_up and any(
            -(-room // step) * step >= size + pad
            for room, step, size, pad in zip(rooms, stride, (height, width), pads[:2], strict=True)
        ):
            return
        counted = {"count_include_pad": 1} if pool == "AveragePool" else {"ceil_mode": int(rounds_up)}
        body.add(pool, kernel_shape=kernel, strides=stride, pads=pads, **counted)
    else:
        return
    assert_same(body.staged())


def test_features_lie_channels_last_between_stages():
    assert [channels_last(shape) for shape in [(5,), (3, 8), (3, 4, 5)]] == [(5,), (1, 8, 3), (4, 5, 3)]


def test_the_same_stage_gives_the_same_bytes():
    staged = export_staged(SIGNAL, parameters_of(SIGNAL))
    cuts = {"fp32": cut_stages(staged)}
    assert litert_files(cuts, staged) == litert_files(cuts, staged)


def test_int8_stages_run_int8_kernels_between_their_pairs():
    staged = export_staged(SIGNAL, parameters_of(SIGNAL))
    cuts = {"int8": cut_stages(quantise(staged, inputs_of(SIGNAL, 20)))}
    operators = inspect_tflite(litert_files(cuts, staged)[1, "int8"]).operators
    start = operators.index("QUANTIZE")
    body = operators[start : operators.index("DEQUANTIZE") + 1]
    assert body == ("QUANTIZE", "DEPTHWISE_CONV_2D", "MAX_POOL_2D", "DEQUANTIZE")


@pytest.mark.parametrize(
    ("op", "attributes", "complaint"),
    [
        ("Erf", {}, r"LiteRT: the operator Erf \('n0'\) cannot be written"),
        ("MaxPool", {"kernel_shape": [2, 2], "strides": [3, 3], "pads": [0, 0, 1, 1], "ceil_mode": 1}, r"MaxPool \('n0'\) with ceil_mode"),
        ("AveragePool", {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1, "count_include_pad": 1}, "with ceil_mode"),
        ("AveragePool", {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [2, 0, 0, 0]}, r"AveragePool with pads"),
        ("Softmax", {"axis": 1}, r"Softmax \('n0'\) with an axis that is not the last"),
    ],
)  # fmt: skip
def test_what_cannot_be_written_is_named(op, attributes, complaint):
    staged = Body(2, 5, 5).add(op, **attributes).staged()
    with pytest.raises(BuildError, match=complaint):
        litert_files({"fp32": cut_stages(staged)}, staged)


def test_a_runtime_is_not_needed_to_write(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ai_edge_litert", None)
    staged = export_staged(IMAGE, parameters_of(IMAGE))
    files = litert_files({"fp32": cut_stages(staged)}, staged)
    assert {key: content[4:8] for key, content in files.items()} == {
        (0, "fp32"): b"TFL3",
        (1, "fp32"): b"TFL3",
    }
