"""Any exporter's classifier, in canonical form; and what cannot be taken, in one line."""

import contextlib
import os

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from cloud_hub.builder.graphs import adopt as adopting
from cloud_hub.builder.graphs.adopt import adopt
from cloud_hub.builder.graphs.onnx_graph import run_for
from cloud_hub.errors import BuildError
from edge_cascade.backends.onnx import open_whole_model
from edge_cascade.onnx_file import Limits, inspect_model
from tests.builder.onnx_models import FLOAT, dense_model, image_model, model_of, tensor

IMAGES = np.random.default_rng(5).standard_normal((4, 3, 8, 8)).astype(np.float32)
VECTORS = np.random.default_rng(6).standard_normal((4, 5)).astype(np.float32)


def adopted(model, sample_shape=None):
    return adopt(model.SerializeToString(), sample_shape=sample_shape, role="full model")


def refusal(source, sample_shape=None):
    if isinstance(source, onnx.ModelProto):
        source = source.SerializeToString()
    with pytest.raises(BuildError) as refused:
        adopt(source, sample_shape=sample_shape, role="full model")
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith("full model")
    return str(refused.value)


def op_types(classifier):
    return [node.op_type for node in classifier.model.graph.node]


def logits_of(classifier, x):
    return open_whole_model(classifier.to_bytes())(x)


def softmax(logits):
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


# --- the canonical form


def test_an_image_classifier_keeps_its_answers_and_its_layers_only():
    model = image_model()
    classifier = adopted(model)
    assert (classifier.input_shape, classifier.classes) == ((3, 8, 8), 4)
    assert op_types(classifier) == [
        "Conv",
        "Relu",
        "MaxPool",
        "Conv",
        "Relu",
        "GlobalAveragePool",
        "Reshape",
        "Gemm",
    ]
    np.testing.assert_allclose(
        logits_of(classifier, IMAGES), run_for(model, IMAGES, ["scores"])[0], atol=1e-5
    )


def test_the_result_is_what_the_device_reads():
    summary = inspect_model(adopted(image_model()).to_bytes())
    assert [(value.name, value.shape) for value in summary.inputs] == [("x", ("n", 3, 8, 8))]
    assert [(value.name, value.shape) for value in summary.outputs] == [("logits", ("n", 4))]
    assert summary.external == ()


@pytest.mark.parametrize("batch", [1, 2])
def test_a_model_exported_for_one_batch_size_takes_any(batch):
    classifier = adopted(image_model(batch=batch))
    assert logits_of(classifier, IMAGES).shape == (4, 4)
    np.testing.assert_allclose(
        logits_of(classifier, IMAGES), logits_of(adopted(image_model()), IMAGES), atol=1e-6
    )


def test_a_batch_that_cannot_be_freed_is_named():
    token = helper.make_node("Concat", ["one", "x"], ["joined"], axis=1)
    gemm = helper.make_node("Gemm", ["joined", "w"], ["y"], name="fc")
    weights = [tensor("one", np.ones((1, 1), np.float32)), tensor("w", np.ones((6, 3), np.float32))]
    model = model_of([token, gemm], [("x", [1, 5])], [("y", [1, 3])], weights)
    assert "re-export with a dynamic batch axis" in refusal(model)


def test_answers_that_depend_on_the_batch_are_refused():
    centre = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[0], keepdims=1),
        helper.make_node("Sub", ["x", "mean"], ["c"]),
        helper.make_node("MatMul", ["c", "w"], ["y"]),
    ]
    weight = tensor("w", np.arange(15, dtype=np.float32).reshape(5, 3))
    assert "in a batch than alone" in refusal(
        model_of(centre, [("x", ["n", 5])], [("y", ["n", 3])], [weight])
    )


def test_sizes_that_the_file_leaves_open_come_from_the_data():
    model = image_model()
    for dim in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        dim.Clear()
    assert adopted(model, (3, 8, 8)).input_shape == (3, 8, 8)
    assert "takes samples of 3x?x?: export it" in refusal(model)
    assert "the data has 1x8x8" in refusal(model, (1, 8, 8))


def channels_last_model(dims):
    inner = image_model()
    for node in inner.graph.node:
        node.input[:] = ["moved" if name == "image" else name for name in node.input]
    move = helper.make_node("Transpose", ["image"], ["moved"], perm=[0, 3, 1, 2])
    return model_of([move, *inner.graph.node], [("image", dims)], [("scores", None)], inner.graph.initializer)


def test_open_sizes_of_a_model_with_channels_last_fit_data_with_channels_first():
    assert adopted(channels_last_model(["b", "h", "w", 3]), (3, 8, 8)).input_shape == (3, 8, 8)


def test_a_reserved_name_or_an_exits_name_in_the_file_is_replaced():
    model = dense_model([helper.make_node("Mul", ["scores", "logits"], ["exit0.logits"], name="exit0")], "exit0.logits",
                        initializers=[tensor("logits", np.ones(3, np.float32))])  # fmt: skip
    classifier = adopted(model)
    assert [node.name for node in classifier.model.graph.node] == ["fc", "Mul.1"]
    assert {t.name for t in classifier.model.graph.initializer} == {"w", "b", "value.logits"}
    assert [v.name for v in classifier.model.graph.output] == ["logits"]


def test_comments_and_paths_of_the_exporter_are_left_behind():
    model = image_model()
    model.graph.node[0].doc_string = "/home/somebody/train.py"
    model.graph.node[0].metadata_props.add(key="stack", value="/home/somebody/train.py")
    assert b"somebody" not in adopted(model).to_bytes()


def test_old_opsets_are_raised_and_unused_domains_dropped():
    model = dense_model(opset=9)
    model.opset_import.append(helper.make_opsetid("com.unused", 1))
    model.opset_import.append(helper.make_opsetid("ai.onnx", 9))
    classifier = adopted(model)
    assert [(o.domain, o.version) for o in classifier.model.opset_import] == [("", 13)]


def test_the_same_file_gives_the_same_bytes():
    assert adopted(image_model()).to_bytes() == adopted(image_model()).to_bytes()


def test_a_gemm_takes_the_normalisation_behind_it():
    norm = helper.make_node("BatchNormalization", ["scores", "s", "s", "s", "s"], ["y"], name="norm")
    model = dense_model([norm], "y", initializers=[tensor("s", np.array([0.5, 1.0, 2.0], np.float32))])
    classifier = adopted(model)
    assert op_types(classifier) == ["Gemm"]
    np.testing.assert_allclose(logits_of(classifier, VECTORS), run_for(model, VECTORS, ["y"])[0], atol=1e-5)


def test_a_normalisation_is_left_alone_where_others_read_what_it_takes():
    tail = [
        helper.make_node("BatchNormalization", ["scores", "s", "s", "s", "s"], ["n"], name="norm"),
        helper.make_node("Add", ["scores", "n"], ["y"]),
    ]
    model = dense_model(tail, "y", initializers=[tensor("s", np.array([0.5, 1.0, 2.0], np.float32))])
    assert op_types(adopted(model)) == ["Gemm", "BatchNormalization", "Add"]


def test_zero_initial_states_of_a_recurrent_layer_are_left_out():
    rng = np.random.default_rng(0)
    weights = [
        tensor("w", rng.standard_normal((1, 9, 2)).astype(np.float32)),
        tensor("r", rng.standard_normal((1, 9, 3)).astype(np.float32)),
        tensor("h", np.zeros((1, 1, 3), np.float32)),
        tensor("axis", np.array([0])),
    ]
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0, 2]),
        helper.make_node("GRU", ["t", "w", "r", "", "", "h"], ["", "last"], hidden_size=3, name="gru"),
        helper.make_node("Squeeze", ["last", "axis"], ["y"]),
    ]
    classifier = adopted(model_of(nodes, [("x", [1, 7, 2])], [("y", [1, 3])], weights))
    assert logits_of(classifier, np.ones((3, 7, 2), np.float32)).shape == (3, 3)


def test_an_image_model_that_moves_the_channels_first_is_taken_behind_that():
    model = channels_last_model(["b", 8, 8, 3])
    classifier = adopted(model)
    assert classifier.input_shape == (3, 8, 8)
    np.testing.assert_allclose(
        logits_of(classifier, IMAGES), run_for(model, np.moveaxis(IMAGES, 1, -1), ["scores"])[0], atol=1e-5
    )


# --- outputs


def test_a_softmax_at_the_end_is_taken_off():
    tail = [
        helper.make_node("Softmax", ["scores"], ["p"], axis=1),
        helper.make_node("Identity", ["p"], ["y"]),
    ]
    assert op_types(adopted(dense_model(tail, "y"))) == ["Gemm"]


def test_logarithms_of_probabilities_are_logits():
    tail = [helper.make_node("LogSoftmax", ["scores"], ["y"], axis=1)]
    assert op_types(adopted(dense_model(tail, "y"))) == ["Gemm", "LogSoftmax"]


def test_probabilities_that_no_softmax_made_become_logarithms():
    tail = [
        helper.make_node("Exp", ["scores"], ["e"]),
        helper.make_node("LpNormalization", ["e"], ["y"], axis=-1, p=1),
    ]
    model = dense_model(tail, "y")
    classifier = adopted(model)
    assert op_types(classifier)[-2:] == ["Max", "Log"]
    np.testing.assert_allclose(
        softmax(logits_of(classifier, VECTORS)), run_for(model, VECTORS, ["y"])[0], atol=1e-6
    )


def test_a_single_sigmoid_becomes_two_logits():
    model = dense_model([helper.make_node("Sigmoid", ["scores"], ["y"])], "y", width=1)
    classifier = adopted(model)
    assert classifier.classes == 2
    expected = run_for(model, VECTORS, ["y"])[0][:, 0]
    np.testing.assert_allclose(softmax(logits_of(classifier, VECTORS))[:, 1], expected, atol=1e-6)


def test_sigmoids_of_many_classes_give_way_to_what_they_were_made_from():
    assert op_types(adopted(dense_model([helper.make_node("Sigmoid", ["scores"], ["y"])], "y"))) == ["Gemm"]


def test_classes_on_axes_of_one_are_flattened():
    tail = [helper.make_node("Unsqueeze", ["scores", "axes"], ["y"])]
    model = dense_model(tail, "y", initializers=[tensor("axes", np.array([2, 3]))])
    assert logits_of(adopted(model), VECTORS).shape == (4, 3)


def test_labels_and_other_outputs_beside_the_scores_are_dropped():
    label = helper.make_tensor_value_info("label", TensorProto.INT64, ["n"])
    tail = [helper.make_node("ArgMax", ["scores"], ["label"], axis=1, keepdims=0)]
    assert op_types(
        adopted(dense_model(tail, [label, helper.make_tensor_value_info("scores", FLOAT, None)]))
    ) == ["Gemm"]


def test_of_several_outputs_the_one_called_logits_is_taken():
    logits = helper.make_tensor_value_info("logits", FLOAT, None)
    other = helper.make_tensor_value_info("scores", FLOAT, None)
    tail = [helper.make_node("Relu", ["scores"], ["logits"])]
    assert op_types(adopted(dense_model(tail, [other, logits]))) == ["Gemm", "Relu"]
    tail = [helper.make_node("Relu", ["scores"], ["another"])]
    logits.name = "another"
    assert "several outputs (scores, another)" in refusal(dense_model(tail, [other, logits]))


@pytest.mark.parametrize(
    ("tail", "width", "said"),
    [
        ([], 1, "a regression model?"),
        ([helper.make_node("Transpose", ["scores"], ["y"])], 3, "not (n, classes)"),
        ([helper.make_node("Cast", ["scores"], ["y"], to=TensorProto.DOUBLE)], 3, "y (double)"),
    ],
)
def test_outputs_that_are_no_classes_are_named(tail, width, said):
    model = dense_model(tail, "y" if tail else "scores", width=width)
    if "double" in said:
        model.graph.output[0].type.tensor_type.elem_type = TensorProto.DOUBLE
    assert said in refusal(model)


# --- inputs


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ([("x", ["n", 5]), ("mask", ["n", 5])], "takes 2 inputs (x, mask)"),
        ([helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["n", 5])], "is float16, not float32"),
        ([helper.make_tensor_value_info("x", TensorProto.INT64, ["n", 5])], "is int64, not float32"),
        ([("x", [5])], "has no batch axis"),
        ([helper.make_tensor_sequence_value_info("x", FLOAT, ["n"])], "is no tensor"),
    ],
)
def test_inputs_that_are_not_one_float_tensor_are_named(inputs, said):
    model = dense_model()
    del model.graph.input[:]
    model.graph.input.extend(model_of([], inputs, []).graph.input)
    assert said in refusal(model)


def test_an_input_without_a_shape_takes_that_of_the_data():
    model = dense_model()
    model.graph.input[0].type.tensor_type.ClearField("shape")
    assert adopted(model, (5,)).input_shape == (5,)
    assert "has no shape" in refusal(model)


# --- operators


def test_unsupported_operators_are_all_named_with_what_can_be_done():
    tail = [
        helper.make_node("Bernoulli", ["scores"], ["a"], name="chance"),
        helper.make_node("Fancy", ["a"], ["y"], name="mine", domain="com.me"),
    ]
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.me", 1)]
    said = refusal(dense_model(tail, "y", opset_imports=imports))
    assert "Bernoulli (chance), com.me.Fancy (mine); re-export" in said


def test_a_quantised_model_is_asked_for_in_float():
    tail = [
        helper.make_node("QuantizeLinear", ["scores", "s"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s"], ["y"]),
    ]
    assert "give the float32 model" in refusal(
        dense_model(tail, "y", initializers=[tensor("s", np.float32(0.1))])
    )


def test_control_flow_is_named():
    branch = helper.make_graph(
        [helper.make_node("Relu", ["scores"], ["r"])],
        "branch",
        [],
        [helper.make_tensor_value_info("r", FLOAT, None)],
    )
    tail = [helper.make_node("If", ["yes"], ["y"], name="maybe", then_branch=branch, else_branch=branch)]
    said = refusal(dense_model(tail, "y", initializers=[tensor("yes", np.array(True))]))
    assert "If (maybe); control flow" in said


@pytest.mark.parametrize("op_type", ["Dropout", "BatchNormalization"])
def test_training_mode_is_named(op_type):
    if op_type == "Dropout":
        tail = [helper.make_node("Dropout", ["scores", "half", "yes"], ["y"], name="noise")]
        more = [tensor("half", np.float32(0.5)), tensor("yes", np.array(True))]
    else:
        tail = [
            helper.make_node(
                "BatchNormalization",
                ["scores", "s", "s", "s", "s"],
                ["y", "m", "v"],
                name="noise",
                training_mode=1,
            )
        ]
        more = [tensor("s", np.ones(3, np.float32))]
    assert f"{op_type} (noise) is in training mode: call model.eval()" in refusal(
        dense_model(tail, "y", initializers=more)
    )


def with_function(levels):
    """A model whose function calls one that calls one and so on; the last doubles."""
    functions = [
        helper.make_function(
            "f",
            "f0",
            ["a"],
            ["b"],
            [helper.make_node("Add", ["a", "a"], ["b"])],
            [helper.make_opsetid("", 17)],
        )
    ]
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
    for level in range(1, levels):
        call = helper.make_node(f"f{level - 1}", ["a"], ["b"], domain="f")
        functions.append(helper.make_function("f", f"f{level}", ["a"], ["b"], [call], imports))
    tail = [helper.make_node(f"f{levels - 1}", ["scores"], ["y"], domain="f")]
    return dense_model(tail, "y", opset_imports=imports, functions=functions)


def test_local_functions_are_inlined():
    assert op_types(adopted(with_function(3))) == ["Gemm", "Add"]


def test_functions_that_call_each_other_without_end_are_refused():
    assert "call each other too deeply" in refusal(with_function(3000))


def test_functions_that_grow_when_inlined_are_refused():
    model = with_function(25)
    for function in model.functions[1:]:
        second = function.node.add()
        second.CopyFrom(function.node[0])
        second.input[0], function.node[0].output[0] = "half", "half"
    assert "more than 20000 operators" in refusal(model)


# --- scikit-learn's operators, as its converter writes them


def ml_model(transform, coefficients, intercepts, with_scaler=True):
    nodes = [
        helper.make_node("Scaler", ["x"], ["scaled"], domain="ai.onnx.ml", offset=[0.1] * 5, scale=[2.0] * 5),
        helper.make_node(
            "LinearClassifier", ["scaled"], ["label", "p"], domain="ai.onnx.ml", name="linear",
            classlabels_ints=list(range(max(2, len(intercepts)))), coefficients=np.ravel(coefficients).tolist(),
            intercepts=intercepts, post_transform=transform, multi_class=1,
        ),
        helper.make_node("Normalizer", ["p"], ["normal"], domain="ai.onnx.ml", norm="L1"),
        helper.make_node("ZipMap", ["normal"], ["dict"], domain="ai.onnx.ml", classlabels_int64s=list(range(max(2, len(intercepts))))),
    ]  # fmt: skip
    outputs = [
        helper.make_tensor_value_info("label", TensorProto.INT64, ["n"]),
        helper.make_value_info(
            "dict",
            helper.make_sequence_type_proto(helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(FLOAT, []))),
        ),
    ]  # fmt: skip
    imports = [helper.make_opsetid("", 15), helper.make_opsetid("ai.onnx.ml", 1)]
    return model_of(nodes, [("x", ["n", 5])], outputs, opset_imports=imports)


@pytest.mark.parametrize("transform", ["SOFTMAX", "LOGISTIC"])
def test_a_linear_classifier_in_a_pipeline_keeps_its_probabilities(transform):
    model = ml_model(transform, np.random.default_rng(0).standard_normal((3, 5)), [0.1, 0.2, 0.3])
    expected = run_for(model, VECTORS, ["normal"])[0]
    np.testing.assert_allclose(softmax(logits_of(adopted(model), VECTORS)), expected, atol=1e-6)


def test_a_linear_classifier_of_two_mirrored_rows_is_a_plain_gemm():
    row = np.random.default_rng(0).standard_normal(5)
    model = ml_model("LOGISTIC", [row, -row], [0.5, -0.5])
    classifier = adopted(model)
    assert op_types(classifier) == ["Sub", "Mul", "Gemm"]
    expected = run_for(model, VECTORS, ["normal"])[0]
    np.testing.assert_allclose(softmax(logits_of(classifier, VECTORS)), expected, atol=1e-6)


def test_what_only_the_ml_domain_has_is_refused_with_advice():
    said = refusal(ml_model("NONE", np.ones(5), [0.1]))
    assert "ai.onnx.ml.LinearClassifier (linear)" in said
    assert "neither as the full nor as the edge model" in said


def test_a_linear_regression_of_the_ml_domain_is_called_what_it_is():
    node = helper.make_node(
        "LinearRegressor", ["x"], ["y"], domain="ai.onnx.ml", coefficients=[1.0] * 5, intercepts=[0.0]
    )  # fmt: skip
    model = dense_model([], "y")
    del model.graph.node[:]
    model.graph.node.append(node)
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 1))
    assert "a regression model?" in refusal(model)


# --- files


def save_beside(model, folder, location="model.onnx.data"):
    path = folder / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    if location != "model.onnx.data":
        model = onnx.load(path, load_external_data=False)
        for initializer in model.graph.initializer:
            for entry in initializer.external_data:
                if entry.key == "location":
                    entry.value = location
        path.write_bytes(model.SerializeToString())
    return path


def test_weights_in_a_file_beside_it_are_taken_in(tmp_path):
    path = save_beside(dense_model(), tmp_path)
    classifier = adopt(path, sample_shape=None, role="full model")
    np.testing.assert_array_equal(logits_of(classifier, VECTORS), logits_of(adopted(dense_model()), VECTORS))


@pytest.mark.parametrize("location", ["../model.onnx.data", "/etc/hostname", "sub/model.onnx.data", "..", ""])
def test_weights_elsewhere_are_refused(tmp_path, location):
    assert "only a file in the same folder is read" in refusal(save_beside(dense_model(), tmp_path, location))


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_weights_through_a_link_are_refused(tmp_path, link):
    path = save_beside(dense_model(), tmp_path, "linked")
    link(tmp_path / "model.onnx.data", tmp_path / "linked")
    assert "a link or no regular file" in refusal(path)


def test_weights_that_are_missing_or_cut_off_are_named(tmp_path):
    path = save_beside(dense_model(), tmp_path)
    data = tmp_path / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:8])
    assert "model.onnx.data: does not hold the weight" in refusal(path)
    data.unlink()
    assert "not beside it: copy both files" in refusal(path)
    assert "give the path, not the bytes" in refusal(path.read_bytes())


def test_what_is_no_model_is_said_in_one_line(tmp_path):
    (tmp_path / "text.onnx").write_text("not a model")
    assert "text.onnx: not an ONNX" in refusal(tmp_path / "text.onnx")
    assert "missing.onnx: cannot be read" in refusal(tmp_path / "missing.onnx")
    assert "Is a directory" in refusal(tmp_path)
    assert "not an ONNX" in refusal(b"")


def test_a_file_of_many_gigabytes_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "huge.onnx"
    with path.open("wb") as file:
        file.truncate(1 << 31)
    assert "2,147,483,648 bytes, more than" in refusal(path)
    assert "give a smaller model" in refusal(path)


def test_weights_that_nobody_would_read_are_refused(monkeypatch):
    monkeypatch.setattr(adopting, "FULL_MODEL_LIMITS", Limits(max_inline_bytes=1 << 20))
    model = dense_model(initializers=[tensor("large", np.zeros(1 << 19, np.float32))])
    assert "its weights are 2 MB, more than the 1 MB that are read" in refusal(model)


@settings(max_examples=150)
@given(st.data())
def test_damaged_files_are_never_another_error(data):
    content = bytearray(
        dense_model([helper.make_node("Softmax", ["scores"], ["y"])], "y").SerializeToString()
    )
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(BuildError):
        adopt(bytes(content), sample_shape=(5,), role="full model")
