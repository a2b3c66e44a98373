"""A network put together again from the stages of its bundle."""

from __future__ import annotations

import numpy as np
import pytest

from cloud_hub.builder.assemble import cut_network
from cloud_hub.builder.collect import stages_of_bundle
from cloud_hub.builder.graphs.staged import logits_name
from cloud_hub.builder.graphs.stages import cut_stages
from cloud_hub.builder.joined import staged_of_stages, train_step_of, what_learns
from cloud_hub.errors import BuildError
from edge_cascade.bundle import load_bundle
from edge_cascade.shipped import find_bundle


@pytest.mark.parametrize("name", ["digits", "vibration"])
def test_cutting_a_joined_network_gives_the_very_stages_it_was_joined_from(name):
    bundle = load_bundle(find_bundle(name))
    staged = staged_of_stages(stages_of_bundle(bundle), len(bundle.graph.labels))
    for index, cut in enumerate(cut_stages(staged)):
        stage = bundle.stage_models[index, "fp32"]
        assert cut.model == stage.model
        assert cut.weights.keys() == stage.weights.keys()
        assert all(np.array_equal(cut.weights[key], stage.weights[key]) for key in cut.weights)


def test_a_shipped_train_step_is_the_one_of_its_own_network():
    bundle = load_bundle(find_bundle("digits"))
    lesson = train_step_of(staged_of_stages(stages_of_bundle(bundle), len(bundle.graph.labels)))
    assert (lesson.model, lesson.head_parameters) == (bundle.train_step.model, bundle.graph.head_parameters)
    assert lesson.frozen_because == ""


def test_new_weights_are_in_the_network_and_quantise_to_the_same_graphs(tiny_bundle):
    stages = stages_of_bundle(tiny_bundle)
    weights = {name: array * np.float32(1.1) for name, array in tiny_bundle.parameters().items()}
    staged = staged_of_stages(stages, 4, weights)
    held = {tensor.name: tensor for tensor in staged.model.graph.initializer}
    import onnx

    for name, array in weights.items():
        assert np.array_equal(onnx.numpy_helper.to_array(held[name]), array)
    x = np.random.default_rng(0).standard_normal((64, *tiny_bundle.graph.input_shape)).astype(np.float32)
    declaration = type("D", (), {"preprocess": tiny_bundle.graph.preprocess})
    cuts = cut_network(staged, x, declaration)
    for precision, stage in ((p, s) for p, cut in cuts.by_precision.items() for s in enumerate(cut)):
        assert stage[1].model == tiny_bundle.stage_models[stage[0], precision].model


def test_a_weight_without_a_place_and_a_stage_in_int8_alone_are_named(tiny_bundle):
    stages = stages_of_bundle(tiny_bundle)
    with pytest.raises(BuildError, match="no weight 'nobody'"):
        staged_of_stages(stages, 4, {"nobody": np.zeros(1, np.float32)})
    from dataclasses import replace

    int8 = replace(stages, models={key: m for key, m in stages.models.items() if key != (1, "fp32")})
    with pytest.raises(BuildError, match="stage 1 is there in int8 alone"):
        staged_of_stages(int8, 4)


def test_where_the_trunk_has_no_gradient_the_heads_learn_alone(tiny_bundle):
    staged = staged_of_stages(stages_of_bundle(tiny_bundle), 4)
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(staged.model)
    relu = next(node for node in model.graph.node if node.op_type == "Relu")
    relu.op_type = "Sin"  # no rule
    from dataclasses import replace

    lesson = train_step_of(replace(staged, model=model))
    assert "Sin" in lesson.frozen_because
    assert what_learns(replace(staged, model=model)).startswith(
        "boards train the exits' heads alone: no gradient"
    )
    assert what_learns(staged) == ""
    assert lesson.head_parameters
    inputs = {value.name for value in onnx.load_from_string(lesson.model).graph.input}
    trained = {name for name in inputs if f"momentum.{name}" in inputs}
    assert trained == set(lesson.head_parameters)
    assert logits_name(0) not in inputs


def test_a_network_that_cannot_learn_at_all_says_why(tiny_bundle):
    staged = staged_of_stages(stages_of_bundle(tiny_bundle), 4)
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(staged.model)
    for node in model.graph.node:
        if node.op_type == "Gemm":
            node.name = "no head"
    del model.graph.initializer[:]
    from dataclasses import replace

    assert what_learns(replace(staged, model=model)).startswith(
        "boards serve this network and cannot train it: "
    )
