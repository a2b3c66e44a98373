"""Costs and single-tensor cuts of graphs whose arithmetic can be done by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

from cloud_hub.builder.graphs.adopt import adopt
from cloud_hub.builder.graphs.cuts import Cut, cut_table, find_cuts, measure_costs, prepare_cuts
from cloud_hub.errors import BuildError
from tests.builder.onnx_models import image_model, model_of, residual_model, tensor


def adopted(model):
    return adopt(model.SerializeToString(), sample_shape=None, role="edge network")


def costs_by_operator(classifier):
    mult_adds = measure_costs(classifier).mult_adds
    return [
        (node.op_type, cost)
        for node, cost in zip(classifier.model.graph.node, mult_adds, strict=True)
        if cost
    ]


def one_node(op_type, weight_shapes, input_shape, **attributes):
    """A model of one layer and a mean over all but classes."""
    weights = [tensor(f"w{i}", np.ones(shape, np.float32)) for i, shape in enumerate(weight_shapes)]
    nodes = [
        helper.make_node(op_type, ["x", *(t.name for t in weights)], ["y"], name="layer", **attributes),
        helper.make_node("GlobalAveragePool", ["y"], ["p"]),
        helper.make_node("Flatten", ["p"], ["logits"]),
    ]
    return adopted(model_of(nodes, [("x", ["n", *input_shape])], [("logits", None)], weights))


def test_costs_of_convolutions_and_dense_layers():
    assert costs_by_operator(adopted(image_model())) == [
        ("Conv", 6 * 8 * 8 * 3 * 9),
        ("Conv", 8 * 4 * 4 * 6 * 9),
        ("Gemm", 8 * 4),
    ]


def test_groups_and_strides_divide_the_cost():
    classifier = one_node("Conv", [(4, 1, 3)], (4, 10), group=4, strides=[2], pads=[1, 1])
    assert costs_by_operator(classifier) == [("Conv", 4 * 5 * 3)]


def test_a_transposed_convolution_costs_what_its_input_asks():
    classifier = one_node("ConvTranspose", [(4, 3, 2)], (4, 10), strides=[2])
    assert costs_by_operator(classifier) == [("ConvTranspose", 4 * 10 * 3 * 2)]


def test_a_matrix_product_counts_its_tokens():
    weights = [tensor("w", np.ones((6, 5), np.float32)), tensor("axes", np.array([1]))]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"], name="layer"),
        helper.make_node("Transpose", ["y"], ["t"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["y", "t"], ["a"], name="attention"),
        helper.make_node("ReduceSum", ["a", "axes"], ["logits"], keepdims=0),
    ]
    classifier = adopted(model_of(nodes, [("x", ["n", 7, 6])], [("logits", None)], weights))
    assert costs_by_operator(classifier) == [("MatMul", 7 * 6 * 5), ("MatMul", 7 * 5 * 7)]


def test_a_recurrent_layer_costs_its_weights_at_every_step():
    weights = [tensor("w", np.ones((1, 12, 2), np.float32)), tensor("r", np.ones((1, 12, 3), np.float32))]
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0, 2]),
        helper.make_node("LSTM", ["t", "w", "r"], ["", "last"], hidden_size=3, name="lstm"),
        helper.make_node("Squeeze", ["last", "axis"], ["logits"]),
    ]
    model = model_of(
        nodes, [("x", ["n", 7, 2])], [("logits", None)], [*weights, tensor("axis", np.array([0]))]
    )
    assert costs_by_operator(adopted(model)) == [("LSTM", 7 * (12 * 2 + 12 * 3))]


def test_a_bypass_leaves_no_cut_inside():
    plan = find_cuts(adopted(residual_model()))
    cost = 4 * 16 * 4 * 3
    assert plan.mult_adds == 4 * cost
    assert [(cut.name, cut.shape, cut.mult_adds, cut.is_finished) for cut in plan.cuts] == [
        ("a", (4, 16), cost, False),
        ("b", (4, 16), cost, True),
        ("d", (4, 16), 3 * cost, True),
        ("e", (4, 16), 4 * cost, True),
        ("f", (4, 1), 4 * cost, True),
    ]


def test_values_with_the_batch_elsewhere_are_no_cuts():
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0]),
        helper.make_node("Relu", ["t"], ["r"]),
        helper.make_node("Transpose", ["r"], ["u"], perm=[1, 0]),
        helper.make_node("MatMul", ["u", "w"], ["logits"]),
    ]
    weight = tensor("w", np.ones((5, 3), np.float32))
    plan = find_cuts(adopted(model_of(nodes, [("x", ["n", 5])], [("logits", None)], [weight])))
    assert [cut.name for cut in plan.cuts] == ["u"]


def test_the_proposal_prefers_finished_and_then_small_values():
    plan = prepare_cuts(adopted(image_model()))
    # The first convolution is 60 % of the work: both shares would be nearest to it, and a stage needs work.
    assert [(cut.name, cut.shape) for cut in plan.cuts] == [("p0", (6, 4, 4))]
    assert plan.stage_mult_adds == (10368, 6912 + 32)


def test_a_bias_belongs_to_the_product_before_it():
    weights = [tensor(name, np.ones((5, 5), np.float32)) for name in ("w0", "w1")]
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["sum"]),
        helper.make_node("MatMul", ["sum", "w1"], ["logits"]),
    ]
    bias = tensor("bias", np.ones(5, np.float32))
    classifier = adopted(model_of(nodes, [("x", ["n", 5])], [("logits", None)], [*weights, bias]))
    assert [cut.name for cut in prepare_cuts(classifier).cuts] == ["sum"]


def test_shares_may_be_chosen():
    plan = prepare_cuts(adopted(residual_model()), shares=(0.3, 0.7))
    assert [cut.name for cut in plan.cuts] == ["b", "d"]


@pytest.mark.parametrize("names", [["d", "b"], ["b", "d"]])
def test_named_cuts_come_in_the_networks_order(names):
    assert [cut.name for cut in prepare_cuts(adopted(residual_model()), names=names).cuts] == ["b", "d"]


@pytest.mark.parametrize("name", ["left", "x", "logits", "nowhere"])
def test_a_name_that_is_no_cut_is_refused_with_those_that_are(name):
    with pytest.raises(BuildError, match=f"cannot be cut at '{name}', but at b, d"):
        prepare_cuts(adopted(residual_model()), names=[name])


def test_a_cut_behind_all_the_work_is_refused():
    with pytest.raises(BuildError, match="nothing is left to compute"):
        prepare_cuts(adopted(residual_model()), names=["f"])


def test_a_network_that_cannot_be_cut_has_one_stage():
    weight = tensor("w", np.ones((5, 3), np.float32))
    node = helper.make_node("MatMul", ["x", "w"], ["logits"])
    plan = prepare_cuts(adopted(model_of([node], [("x", ["n", 5])], [("logits", None)], [weight])))
    assert (plan.cuts, plan.stage_mult_adds) == ((), (15,))


def test_the_table_says_name_shape_and_share():
    assert cut_table(prepare_cuts(adopted(residual_model())))[0] == ("b", "4x16", "25.0%")


def test_channels_stand_last_behind_a_matrix_product_and_first_behind_a_convolution():
    weights = [tensor("w", np.ones((6, 6), np.float32)), tensor("k", np.ones((4, 3, 1), np.float32))]
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["c"], name="conv"),
        helper.make_node("Transpose", ["c"], ["t"], perm=[0, 2, 1]),
        helper.make_node("Transpose", ["t"], ["u"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["u", "w"], ["m"], name="dense"),
        helper.make_node("Relu", ["m"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["p"]),
        helper.make_node("Flatten", ["p"], ["logits"]),
    ]
    plan = find_cuts(adopted(model_of(nodes, [("x", ["n", 3, 6])], [("logits", None)], weights)))
    assert {cut.name: cut.channels_last for cut in plan.cuts[:5]} == {
        "c": False,
        "t": True,
        "u": False,
        "m": True,
        "r": True,
    }


@st.composite
def chains(draw):
    """A chain of dense layers, some with a bypass: every value is a cut but those beside a bypass."""
    nodes, names, given = [], [], "x"
    for index in range(draw(st.integers(1, 6))):
        if draw(st.booleans()):
            nodes.append(helper.make_node("MatMul", [given, "w"], [f"m{index}"], name=f"dense{index}"))
            nodes.append(helper.make_node("Add", [given, f"m{index}"], [f"v{index}"]))
        else:
            nodes.append(helper.make_node("MatMul", [given, "w"], [f"v{index}"], name=f"dense{index}"))
        given = f"v{index}"
        names.append(given)
    weight = tensor("w", np.eye(3, dtype=np.float32))
    return model_of(nodes, [("x", ["n", 3])], [(given, None)], [weight]), names[:-1]


@given(chains())
def test_every_value_that_all_paths_share_is_found(case):
    model, expected = case
    plan = find_cuts(adopted(model))
    layers = len(expected) + 1
    assert plan.mult_adds == 9 * layers
    assert list(plan.cuts) == [
        Cut(name, (3,), 9 * (index + 1), (index + 1) / layers, channels_last=False, is_finished=True)
        for index, name in enumerate(expected)
    ]
