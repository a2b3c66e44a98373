from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from cloud_hub.builder.gradients.reverse import RULES, differentiate
from cloud_hub.builder.gradients.site import NoGradientError
from cloud_hub.errors import BuildError
from edge_cascade.onnx_schema import OPERATORS
from tests.builder.gradients import (
    finite_differences,
    gradients_of,
    model_of,
    relative_error,
    seed_like,
)


@dataclass(frozen=True)
class Case:
    """A node: shapes of its float inputs that are differentiated, and inputs that are constant, in order."""

    operator: str
    shapes: dict = field(default_factory=lambda: {"x": (3, 4)})
    constants: dict = field(default_factory=dict)
    attributes: dict = field(default_factory=dict)
    opset: int = 17
    order: tuple = ()
    outputs: tuple = ("y",)
    positive: bool = False
    free_batch: bool = True
    step: float = 1e-5

    def __str__(self):
        attributes = ",".join(f"{key}={value}" for key, value in self.attributes.items())
        return f"{self.operator}-{'-'.join(map(str, self.shapes.values()))}-{attributes}".replace(" ", "")

    def nodes(self):
        names = self.order or (*self.shapes, *self.constants)
        return [helper.make_node(self.operator, names, self.outputs, name="it", **self.attributes)]

    def arrays(self):
        rng = np.random.default_rng(1)
        drawn = {name: rng.standard_normal(shape) for name, shape in self.shapes.items()}
        if self.positive:
            drawn = {name: 0.5 + np.abs(array) for name, array in drawn.items()}
        return {name: np.asarray(array, np.float32) for name, array in drawn.items()} | self.constants

    def model(self):
        return model_of(
            self.nodes(), self.arrays(), list(self.shapes), opset=self.opset, free_batch=self.free_batch
        )


def ints(*numbers):
    return np.array(numbers, np.int64)


def conv(x, w, *, bias=True, **attributes):
    shapes = {"x": x, "w": w} | ({"b": w[:1]} if bias else {})
    return Case("Conv", shapes, attributes=attributes)


def pool(operator, x, kernel, opset=17, **attributes):
    attributes = {"kernel_shape": kernel} | attributes
    return Case(operator, {"x": x}, attributes=attributes, opset=opset)


CONVOLUTIONS = [
    conv((2, 3, 7, 6), (4, 3, 3, 3), pads=[1, 1, 1, 1]),
    conv((2, 3, 7, 6), (4, 3, 3, 2), pads=[0, 1, 2, 0]),
    conv((2, 2, 9, 8), (4, 2, 3, 3), strides=[2, 3], pads=[1, 0, 1, 2]),
    conv((3, 2, 9, 9), (3, 2, 3, 2), dilations=[2, 3], bias=False),
    conv((2, 2, 11, 10), (2, 2, 2, 3), dilations=[3, 2], strides=[2, 2], pads=[2, 1, 1, 2]),
    conv((2, 4, 7, 7), (6, 2, 3, 3), group=2, strides=[2, 2], pads=[1, 1, 1, 1]),
    conv((2, 4, 6, 5), (4, 1, 3, 3), group=4, pads=[1, 1, 1, 1]),
    conv((2, 3, 6, 7), (6, 1, 3, 3), group=3, dilations=[2, 2], bias=False),
    conv((2, 5, 4, 4), (3, 5, 1, 1)),
    conv((2, 1, 64), (3, 1, 9), strides=[4], pads=[4, 4]),
    conv((2, 2, 61), (3, 2, 33), pads=[16, 16]),
    conv((2, 3, 10), (4, 3, 4), strides=[3], bias=False),
    conv((2, 4, 11), (4, 1, 3), group=4, strides=[2], dilations=[2], pads=[1, 2]),
    conv((2, 2, 7, 6), (3, 2, 3, 4), strides=[2, 2], auto_pad="SAME_UPPER"),
    conv((2, 2, 7, 6), (3, 2, 4, 3), auto_pad="SAME_LOWER"),
    conv((2, 2, 7, 6), (3, 2, 4, 3), strides=[2, 2], auto_pad="VALID"),
]
POOLS = [
    pool("MaxPool", (2, 3, 7, 6), [2, 2], strides=[2, 2]),
    pool("MaxPool", (2, 3, 7, 6), [3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    pool("MaxPool", (2, 2, 9, 7), [3, 2], strides=[2, 2], ceil_mode=1),
    pool("MaxPool", (2, 2, 9), [2], dilations=[2]),
    pool("MaxPool", (2, 2, 9), [3], strides=[3], opset=13),
    pool("AveragePool", (2, 3, 7, 6), [2, 2], strides=[2, 2]),
    pool("AveragePool", (2, 3, 7, 6), [3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    pool("AveragePool", (2, 3, 7, 6), [3, 3], pads=[1, 0, 1, 2], count_include_pad=1),
    pool("AveragePool", (2, 2, 8), [3], strides=[2], ceil_mode=1, opset=19),
    pool("AveragePool", (2, 2, 9), [3], dilations=[2], opset=19),
    pool("AveragePool", (2, 2, 7, 6), [3, 2], strides=[2, 2], auto_pad="SAME_UPPER"),
    Case("GlobalAveragePool", {"x": (2, 3, 5, 4)}),
    Case("GlobalAveragePool", {"x": (2, 3, 7)}),
    Case("GlobalMaxPool", {"x": (2, 3, 5, 4)}),
]
AFFINE = [
    *(
        Case(
            "Gemm",
            {"x": (4, 3) if a else (3, 4), "b": (5, 4) if b else (4, 5), "c": c},
            attributes={"transA": a, "transB": b, "alpha": 0.5, "beta": 2.0},
            free_batch=False,
        )
        for a, b, c in [(0, 0, (5,)), (0, 1, (1, 5)), (1, 0, (3, 1)), (1, 1, (3, 5))]
    ),
    Case("Gemm", {"x": (3, 4), "b": (4, 2)}),
    Case("MatMul", {"x": (3, 4), "b": (4, 2)}),
    Case("MatMul", {"x": (2, 3, 4), "b": (4, 2)}),
    Case("MatMul", {"x": (2, 5, 3, 4), "b": (5, 4, 2)}),
    Case("MatMul", {"x": (2, 1, 3, 4), "b": (1, 5, 4, 2)}),
    Case("MatMul", {"b": (3, 4), "x": (2, 4, 5)}),
]
ARITHMETIC = [
    *(
        Case(operator, {"x": (3, 2, 4), "b": shape}, positive=operator == "Div", free_batch=False)
        for operator in ("Add", "Sub", "Mul", "Div")
        for shape in [(3, 2, 4), (4,), (2, 1), (1, 2, 4), ()]
    ),
    Case("Sum", {"x": (3, 4), "b": (4,), "c": (1, 1)}),
    Case("Pow", constants={"p": np.float32(3.0)}),
    Case("Pow", constants={"p": np.array([2.0, 0.5, -1.0, 3.0], np.float32)}, positive=True),
    *(Case(operator, positive=True) for operator in ("Sqrt", "Log", "Reciprocal")),
    *(Case(operator) for operator in ("Exp", "Neg", "Abs", "Identity")),
]
ACTIVATIONS = [
    *(Case(operator) for operator in ("Relu", "Sigmoid", "Tanh", "Softplus", "HardSigmoid")),
    Case("LeakyRelu", attributes={"alpha": 0.1}),
    Case("HardSwish", {"x": (5, 60)}),
    # The evaluator's Erf is of float32, whatever it is given.
    Case("Erf", step=3e-3),
    Case("Gelu", opset=20, step=3e-3),
    Case("Gelu", attributes={"approximate": "tanh"}, opset=20),
    Case("Clip", constants={"low": np.float32(-0.5), "high": np.float32(0.7)}),
    Case("Clip", constants={"high": np.float32(0.3)}, order=("x", "", "high")),
    *(
        Case(operator, {"x": (2, 3, 4)}, attributes={"axis": axis})
        for operator in ("Softmax", "LogSoftmax")
        for axis in (1, -1)
    ),
]
NORMALISATIONS = [
    *(
        Case(
            "BatchNormalization",
            {"x": shape, "s": shape[1:2], "b": shape[1:2]},
            {"m": np.float32([0.1, -0.2, 0.3]), "v": np.float32([0.5, 1.0, 2.0])},
        )
        for shape in [(4, 3), (2, 3, 5), (2, 3, 4, 4)]
    ),
    Case("LayerNormalization", {"x": (2, 3, 6), "s": (6,), "b": (6,)}),
    Case("LayerNormalization", {"x": (2, 3, 6), "s": (3, 6)}, attributes={"axis": 1, "epsilon": 0.1}),
]
REDUCTIONS = [
    Case("ReduceMean", {"x": (2, 3, 4)}, attributes={"axes": [-1], "keepdims": 0}),
    Case("ReduceMean", {"x": (2, 3, 4, 5)}, attributes={"axes": [2, 3]}),
    Case("ReduceMean", {"x": (2, 3, 4)}, {"axes": ints(1)}, {"keepdims": 0}, opset=18),
    Case("ReduceSum", {"x": (2, 3, 4)}, {"axes": ints(1, 2)}),
    Case("ReduceSum", {"x": (2, 3, 4)}, {"axes": ints(0)}, {"keepdims": 0}),
    Case("ReduceSum", {"x": (2, 3)}, attributes={"keepdims": 0}),
    Case("ReduceSum", {"x": (2, 3)}, attributes={"noop_with_empty_axes": 1}),
]
LAYOUT = [
    Case("Reshape", {"x": (2, 3, 4)}, {"shape": ints(0, -1)}),
    Case("Reshape", {"x": (2, 3, 4)}, {"shape": ints(-1, 6, 2)}),
    Case("Flatten", {"x": (2, 3, 4)}),
    Case("Flatten", {"x": (2, 3, 4)}, attributes={"axis": 2}),
    Case("Transpose", {"x": (2, 3, 4)}),
    Case("Transpose", {"x": (2, 3, 4)}, attributes={"perm": [1, 2, 0]}),
    Case("Squeeze", {"x": (2, 1, 4, 1)}, {"axes": ints(1, 3)}),
    Case("Unsqueeze", {"x": (2, 4)}, {"axes": ints(1, 3)}),
    Case("Expand", {"x": (2, 1, 4)}, {"shape": ints(1, 3, 1)}),
    Case("Concat", {"x": (2, 3), "b": (2, 1), "c": (2, 4)}, attributes={"axis": -1}, free_batch=False),
    Case("Concat", {"x": (2, 3)}, attributes={"axis": 1}),
    Case("Split", {"x": (2, 7)}, {"sizes": ints(2, 3, 2)}, {"axis": 1}, outputs=("a", "y", "c")),
    Case("Slice", {"x": (2, 7, 5)}, {"s": ints(1, -3), "e": ints(6, 99), "a": ints(1, 2)}),
    Case("Slice", {"x": (2, 9)}, {"s": ints(1), "e": ints(8), "a": ints(1), "t": ints(3)}),
    Case("Slice", {"x": (2, 5)}, {"s": ints(-1), "e": ints(-99), "a": ints(-1), "t": ints(-1)}),
    Case("Slice", {"x": (2, 5)}, {"s": ints(0, 2), "e": ints(2**62, 4)}),
    Case("Pad", {"x": (2, 3, 4)}, {"p": ints(0, 1, 0, 0, 0, 2)}),
    Case("Pad", {"x": (2, 3, 4)}, {"p": ints(2, 1), "v": np.float32(1.0), "a": ints(-1)}, opset=18),
    Case("Gather", {"x": (2, 5, 3)}, {"i": ints(3, 0, 2)}, {"axis": 1}),
    Case("Gather", {"x": (2, 5, 3)}, {"i": ints(4, 1, 1, -1)}, {"axis": 1}),
    Case("Gather", {"x": (2, 5, 3)}, {"i": np.array(2, np.int64)}, {"axis": 2}),
    Case("Gather", {"x": (2, 5)}, {"i": ints(1, 2, 4, 0).reshape(2, 2)}, {"axis": 1}),
]
CASES = [
    *CONVOLUTIONS,
    *POOLS,
    *AFFINE,
    *ARITHMETIC,
    *ACTIVATIONS,
    *NORMALISATIONS,
    *REDUCTIONS,
    *LAYOUT,
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_gradient_is_that_of_finite_differences(case):
    arrays, wanted = case.arrays(), list(case.shapes)
    model = case.model()
    seed = seed_like(model, arrays, wanted)

    found, _ = gradients_of(model, arrays, wanted, seed)

    for name, (chosen, slopes) in finite_differences(model, arrays, wanted, seed, step=case.step).items():
        assert found[name].shape == arrays[name].shape
        assert relative_error(found[name].reshape(-1)[chosen], slopes) < 1e-4, name


def test_every_rule_has_a_case():
    assert {case.operator for case in CASES} == set(RULES)


def test_no_rule_is_for_an_operator_that_a_device_refuses():
    assert set(RULES) <= OPERATORS


@pytest.mark.parametrize(
    "case",
    [CONVOLUTIONS[0], CONVOLUTIONS[5], POOLS[1], POOLS[6], POOLS[13], AFFINE[6], REDUCTIONS[4]],
    ids=str,
)
def test_one_graph_serves_every_batch_size(case):
    arrays, wanted = case.arrays(), list(case.shapes)
    model = case.model()
    rng = np.random.default_rng(5)
    batch = {**arrays, "x": rng.standard_normal((8, *arrays["x"].shape[1:])).astype(np.float32)}
    seed = seed_like(model, batch, wanted)
    whole, _ = gradients_of(model, batch, wanted, seed)

    for count in (1, 3):
        part = {**batch, "x": batch["x"][:count]}
        some = seed if case.operator == "ReduceSum" else seed[:count]
        found, _ = gradients_of(model, part, wanted, some)
        assert np.allclose(found["x"], whole["x"][:count], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kernel", "stride"), [(2, 2), (3, 1)])
def test_the_first_of_equal_maxima_gets_the_gradient(kernel, stride):
    attributes = {"kernel_shape": [kernel], "strides": [stride]}
    arrays = {"x": np.zeros((2, 1, 4), np.float32)}
    model = model_of([helper.make_node("MaxPool", ["x"], ["y"], **attributes)], arrays, ["x"])

    found, _ = gradients_of(model, arrays, ["x"], np.ones((2, 1, 2), np.float32))

    assert found["x"].tolist() == [[[1, 0, 1, 0] if stride == 2 else [1, 1, 0, 0]]] * 2


def test_the_first_of_equal_maxima_of_a_channel_gets_the_gradient():
    arrays = {"x": np.zeros((2, 3, 2, 2), np.float32)}
    model = model_of([helper.make_node("GlobalMaxPool", ["x"], ["y"])], arrays, ["x"])

    found, _ = gradients_of(model, arrays, ["x"], np.ones((2, 3, 1, 1), np.float32))

    assert found["x"].tolist() == [[[[1, 0], [0, 0]]] * 3] * 2


@st.composite
def broadcast_shapes(draw):
    """Two shapes that broadcast to each other."""
    whole = draw(st.lists(st.integers(1, 4), min_size=0, max_size=4))

    def narrowed():
        kept = whole[draw(st.integers(0, len(whole))) :]
        return tuple(1 if draw(st.booleans()) else size for size in kept)

    return narrowed(), narrowed()


@settings(max_examples=60, deadline=None)
@given(broadcast_shapes(), st.sampled_from(["Add", "Sub", "Mul", "Div"]))
def test_a_broadcast_operand_gets_the_sum_over_its_copies(shapes, operator):
    rng = np.random.default_rng(0)
    a, b = (np.asarray(0.5 + rng.random(shape), np.float32) for shape in shapes)
    arrays = {"a": a, "b": b}
    model = model_of([helper.make_node(operator, ["a", "b"], ["y"])], arrays, ["a", "b"])
    seed = np.asarray(rng.standard_normal(np.broadcast_shapes(*shapes)), np.float32)

    found, _ = gradients_of(model, arrays, ["a", "b"], seed)

    slopes = {"Add": (1, 1), "Sub": (1, -1), "Mul": (b, a), "Div": (1 / b, -a / b**2)}[operator]
    for name, slope in zip("ab", slopes, strict=True):
        whole = seed * slope
        shape = arrays[name].shape
        extra = tuple(range(whole.ndim - len(shape)))
        summed = whole.sum(axis=extra)
        ones = tuple(axis for axis, size in enumerate(shape) if size == 1)
        expected = summed.sum(axis=ones, keepdims=True)
        assert found[name].shape == shape
        assert np.allclose(found[name], expected, rtol=1e-4, atol=1e-5)


def squeeze_and_excitation():
    """A residual block with frozen normalisation and channel weights, as in MobileNetV3."""
    make = helper.make_node
    nodes = [
        make("Conv", ["x", "w"], ["conv"], pads=[1, 1, 1, 1], group=2),
        make("BatchNormalization", ["conv", "s", "b", "m", "v"], ["normal"]),
        make("HardSwish", ["normal"], ["bent"]),
        make("ReduceMean", ["bent"], ["squeezed"], axes=[2, 3]),
        make("Conv", ["squeezed", "u"], ["mixed"]),
        make("HardSigmoid", ["mixed"], ["excited"]),
        make("Mul", ["bent", "excited"], ["weighted"]),
        make("Add", ["weighted", "x"], ["y"]),
    ]
    shapes = {"x": (2, 4, 5, 5), "w": (4, 2, 3, 3), "s": (4,), "b": (4,), "u": (4, 4, 1, 1)}
    return nodes, shapes, {"m": np.zeros(4, np.float32), "v": np.ones(4, np.float32)}


def attention():
    """One head of attention over five tokens, its parts written out, behind layer normalisation."""
    make = helper.make_node
    nodes = [
        make("LayerNormalization", ["x", "s", "b"], ["normal"]),
        make("MatMul", ["normal", "w"], ["all"]),
        make("Split", ["all", "thirds"], ["q", "k", "v"], axis=2),
        make("Transpose", ["k"], ["turned"], perm=[0, 2, 1]),
        make("MatMul", ["q", "turned"], ["scores"]),
        make("Div", ["scores", "scale"], ["scaled"]),
        make("Softmax", ["scaled"], ["share"], axis=-1),
        make("MatMul", ["share", "v"], ["mixed"]),
        make("Add", ["mixed", "x"], ["summed"]),
        make("Gather", ["summed", "first"], ["y"], axis=1),
    ]
    shapes = {"x": (2, 5, 4), "s": (4,), "b": (4,), "w": (4, 12)}
    constants = {"thirds": ints(4, 4, 4), "scale": np.array(2.0, np.float32), "first": np.array(0, np.int64)}
    return nodes, shapes, constants


@pytest.mark.parametrize("block", [squeeze_and_excitation, attention])
def test_a_blocks_gradient_is_that_of_finite_differences(block):
    nodes, shapes, constants = block()
    rng = np.random.default_rng(6)
    drawn = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    model = model_of(nodes, drawn | constants, list(shapes))
    seed = seed_like(model, drawn, list(shapes))

    found, _ = gradients_of(model, drawn, list(shapes), seed)

    for name, (chosen, slopes) in finite_differences(model, drawn, list(shapes), seed).items():
        assert relative_error(found[name].reshape(-1)[chosen], slopes) < 1e-4, name


def test_a_value_used_twice_gets_the_sum_of_both_gradients():
    nodes = [
        helper.make_node("Mul", ["x", "x"], ["square"]),
        helper.make_node("Tanh", ["square"], ["bent"]),
        helper.make_node("Add", ["bent", "x"], ["some"]),
        helper.make_node("Mul", ["some", "square"], ["y"]),
    ]
    arrays = {"x": np.random.default_rng(2).standard_normal((3, 4)).astype(np.float32)}
    model = model_of(nodes, arrays, ["x"])
    seed = seed_like(model, arrays, ["x"])

    found, _ = gradients_of(model, arrays, ["x"], seed)

    chosen, slopes = finite_differences(model, arrays, ["x"], seed)["x"]
    assert relative_error(found["x"].reshape(-1)[chosen], slopes) < 1e-4


def test_pieces_of_a_split_that_nobody_uses_have_no_gradient():
    nodes = [helper.make_node("Split", ["x"], ["a", "y"], axis=1)]
    arrays = {"x": np.ones((2, 4), np.float32)}
    model = model_of(nodes, arrays, ["x"])

    found, _ = gradients_of(model, arrays, ["x"], np.full((2, 2), 3.0, np.float32))

    assert found["x"].tolist() == [[0, 0, 3, 3]] * 2


def test_a_shape_read_from_the_batch_is_followed():
    nodes = [
        helper.make_node("Shape", ["x"], ["dims"]),
        helper.make_node("Gather", ["dims", "zero"], ["batch"], axis=0),
        helper.make_node("Unsqueeze", ["batch", "axis"], ["first"]),
        helper.make_node("Concat", ["first", "rest"], ["target"], axis=0),
        helper.make_node("Reshape", ["x", "target"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["y"]),
    ]
    rng = np.random.default_rng(0)
    constants = {"zero": np.array(0, np.int64), "axis": ints(0), "rest": ints(-1)}
    arrays = {
        "x": rng.standard_normal((3, 2, 2)).astype(np.float32),
        "w": rng.standard_normal((4, 2)).astype(np.float32),
    }
    model = model_of(nodes, arrays | constants, ["x", "w"])
    seed = seed_like(model, arrays, ["x", "w"])

    found, _ = gradients_of(model, arrays, ["x", "w"], seed)

    assert np.allclose(found["x"], (seed @ arrays["w"].T).reshape(3, 2, 2), atol=1e-5)
    assert np.allclose(found["w"], arrays["x"].reshape(3, 4).T @ seed, atol=1e-5)


def test_only_parameters_that_were_asked_for_are_computed():
    case = CONVOLUTIONS[0]
    model = model_of(case.nodes(), case.arrays(), ["x"])

    gradients = differentiate(model, {"y": "seed"}, ["b"])

    assert [node.op_type for node in gradients.nodes] == ["ReduceSum"]


def test_every_operator_without_a_gradient_is_named():
    nodes = [
        helper.make_node("Cos", ["x"], ["a"], name="first"),
        helper.make_node("Mul", ["a", "w"], ["b"]),
        helper.make_node("Sin", ["b"], ["c"], name="second"),
        helper.make_node("Ceil", ["c"], ["aside"]),
        helper.make_node("Cosh", ["c"], ["y"], name="third"),
    ]
    arrays = {"x": np.ones((2, 3), np.float32), "w": np.ones(3, np.float32)}
    model = model_of(nodes, arrays, ["x"])

    with pytest.raises(NoGradientError, match="Sin") as caught:
        differentiate(model, {"y": "seed"}, ["w"])

    assert caught.value.nodes == ("Sin (second)", "Cosh (third)")
    assert caught.value.exit_code == BuildError.exit_code


@pytest.mark.parametrize(
    ("node", "opset", "said"),
    [
        (helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[2], name="it"), 15, "opset 16"),
        (helper.make_node("Pad", ["x", "pads"], ["y"], mode="edge", name="it"), 17, "repeats"),
        (helper.make_node("Gather", ["x", "where"], ["y"], name="it"), 17, "not constant"),
        (helper.make_node("Pow", ["x", "x"], ["y"], name="it"), 17, "not constant"),
    ],
)
def test_a_form_without_a_gradient_is_named_with_its_reason(node, opset, said):
    arrays = {"x": np.ones((4, 2, 6), np.float32), "pads": ints(0, 0, 1, 0, 0, 1)}
    model = model_of([node], arrays, ["x"], opset=opset)
    model.graph.input.append(helper.make_tensor_value_info("where", TensorProto.INT64, [1]))

    with pytest.raises(NoGradientError, match=rf"{node.op_type} \(it\): .*{said}"):
        differentiate(model, {"y": "seed"}, ["x"])


def test_an_operator_of_another_domain_has_no_gradient():
    model = model_of(
        [helper.make_node("Relu", ["x"], ["y"], domain="own")], {"x": np.ones((1, 2), np.float32)}, ["x"]
    )

    with pytest.raises(NoGradientError, match=r"own\.Relu"):
        differentiate(model, {"y": "seed"}, ["x"])


def test_an_old_opset_is_refused():
    model = model_of(
        [helper.make_node("Relu", ["x"], ["y"])], {"x": np.ones((1, 2), np.float32)}, ["x"], opset=12
    )

    with pytest.raises(BuildError, match="opset 12"):
        differentiate(model, {"y": "seed"}, ["x"])


def test_an_unknown_name_is_refused():
    model = model_of([helper.make_node("Relu", ["x"], ["y"])], {"x": np.ones((1, 2), np.float32)}, ["x"])

    with pytest.raises(BuildError, match="'w'"):
        differentiate(model, {"y": "seed"}, ["w"])


def test_a_parameter_without_influence_is_refused():
    arrays = {"x": np.ones((1, 2), np.float32), "w": np.ones(2, np.float32)}
    model = model_of([helper.make_node("Relu", ["x"], ["y"])], arrays, ["x"])

    with pytest.raises(BuildError, match="'w' does not influence"):
        differentiate(model, {"y": "seed"}, ["w"])


def test_shapes_that_contradict_each_other_are_refused():
    arrays = {"x": np.ones((1, 2), np.float32), "w": np.ones((3, 2), np.float32)}
    model = model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], arrays, ["x"])

    with pytest.raises(BuildError, match="cannot be inferred"):
        differentiate(model, {"y": "seed"}, ["w"])


def test_emitted_names_never_meet_those_of_the_graph():
    nodes = [
        helper.make_node("Mul", ["x", "gradient.constant0"], ["gradient.0.Mul"]),
        helper.make_node("Relu", ["gradient.0.Mul"], ["y"]),
    ]
    arrays = {"x": np.ones((2, 3), np.float32), "gradient.constant0": np.float32([1.0, 2.0, -3.0])}
    model = model_of(nodes, arrays, ["x"])

    found, y = gradients_of(model, arrays, ["x"], np.ones((2, 3), np.float32))

    assert y.tolist() == [[1, 2, 0]] * 2
    assert found["x"].tolist() == [[1, 2, 0]] * 2


def test_the_model_itself_is_left_alone():
    case = CONVOLUTIONS[0]
    model = model_of(case.nodes(), case.arrays(), ["x"])
    before = model.SerializeToString(deterministic=True)

    differentiate(model, {"y": "seed"}, ["w", "b"])

    assert model.SerializeToString(deterministic=True) == before


def test_a_constant_node_counts_as_a_constant():
    exponent = numpy_helper.from_array(np.array(2.0, np.float32))
    nodes = [
        helper.make_node("Constant", [], ["two"], value=exponent),
        helper.make_node("Pow", ["x", "two"], ["y"]),
    ]
    arrays = {"x": np.float32([[1.0, -2.0]])}
    model = model_of(nodes, arrays, ["x"])

    found, _ = gradients_of(model, arrays, ["x"], np.ones((1, 2), np.float32))

    assert found["x"].tolist() == [[2, -4]]
