"""A detour costs time and changes no answer."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from cloud_hub.builder.graphs.detour import with_detour
from edge_cascade.onnx_file import inspect_model


@pytest.fixture(scope="module")
def model():
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["r"]), helper.make_node("Add", ["r", "x"], ["y"])],
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2, 40])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2, 40])],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    made.ir_version = 8
    return made.SerializeToString()


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("scale", [1.0, 1e30])
def test_answers_are_the_same_bit_for_bit(model, batch, scale):
    x = (np.random.default_rng(3).standard_normal((batch, 2, 40)) * scale).astype(np.float32)
    plain, slow = (
        onnxruntime.InferenceSession(content).run(None, {"x": x})[0]
        for content in (model, with_detour(model, size=64, rounds=5))
    )
    assert np.array_equal(plain, slow)


def test_detour_is_work_that_every_sample_pays_and_the_strict_walk_takes_it(model):
    slow = with_detour(model, size=64, rounds=5)
    inspect_model(slow)
    nodes = [node.op_type for node in onnx.load_from_string(slow).graph.node]
    assert nodes.count("MatMul") == 6
    assert nodes[-2:] == ["Relu", "Add"]
