import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cloud_hub.builder.gradients.site import NoGradientError
from cloud_hub.builder.gradients.train_step import (
    base_name,
    head_parameters,
    momentum_name,
    staged_train_step,
    train_step,
    trainable_parameters,
    updated_name,
)
from cloud_hub.builder.graphs.onnx_graph import constants
from cloud_hub.builder.graphs.staged import float_value, logits_name, make_model
from cloud_hub.builder.networks.export import export_staged
from cloud_hub.errors import BuildError
from edge_cascade.onnx_file import inspect_model
from edge_cascade.onnx_schema import OPERATORS
from tests.builder.gradients import Trainer, trainer_of
from tests.builder.networks import IMAGE, SIGNAL, inputs_of, parameters_of


def linear_model(classes=3, width=4):
    rng = np.random.default_rng(0)
    arrays = {
        "w": rng.standard_normal((classes, width)).astype(np.float32),
        "b": rng.standard_normal(classes).astype(np.float32),
    }
    node = helper.make_node("Gemm", ["x", "w", "b"], ["logits"], transB=1)
    model = make_model(
        "linear",
        [node],
        [float_value("x", (width,))],
        [float_value("logits", (classes,))],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return model, arrays


def small_trainer(network, weights):
    return trainer_of(export_staged(network, parameters_of(network)), weights)


def soft_targets(count, classes, seed=4):
    raw = np.random.default_rng(seed).random((count, classes)) + 0.01
    return (raw / raw.sum(axis=1, keepdims=True)).astype(np.float32)


def test_steps_are_those_of_descent_with_momentum_and_a_proximal_term():
    model, arrays = linear_model()
    trainer = Trainer(train_step(model, {"logits": 0.7}, ["w", "b"]), arrays)
    base = {name: array.astype(float) for name, array in arrays.items()}
    now = dict(base)
    velocity = {name: np.zeros_like(array) for name, array in base.items()}
    rng = np.random.default_rng(1)

    for _ in range(5):
        x, targets, weight = rng.standard_normal((6, 4)), soft_targets(6, 3), rng.random(6)
        loss = trainer.step(x, targets, weight, rate=0.3, momentum=0.8, proximal=0.2)

        logits = x @ now["w"].T + now["b"]
        likelihood = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        share = (weight / weight.sum())[:, np.newaxis]
        assert loss == pytest.approx(-0.7 * (share * targets * likelihood).sum(), rel=1e-5)
        distance = 0.7 * share * (np.exp(likelihood) - targets)
        for name, gradient in {"w": distance.T @ x, "b": distance.sum(axis=0)}.items():
            velocity[name] = 0.8 * velocity[name] + gradient + 0.2 * (now[name] - base[name])
            now[name] = now[name] - 0.3 * velocity[name]
            assert np.allclose(trainer.parameters[name], now[name], atol=1e-5)
            assert np.allclose(trainer.momentum[name], velocity[name], atol=1e-5)


@pytest.mark.parametrize("network", [SIGNAL, IMAGE], ids=["signal", "image"])
def test_a_networks_loss_falls_on_blobs(network):
    weights = (0.3, 0.6, 1.0)[-len(network.stages) :]
    trainer = small_trainer(network, weights)
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((network.classes, *network.input_shape))

    losses = []
    for _ in range(60):
        labels = rng.integers(0, network.classes, 16)
        x = centres[labels] + 0.5 * rng.standard_normal((16, *network.input_shape))
        losses.append(trainer.step(x, np.eye(network.classes)[labels], rate=0.01))

    assert np.mean(losses[-5:]) < 0.3 * np.mean(losses[:5])


def test_a_sample_of_weight_zero_is_as_if_it_were_absent():
    x, targets = inputs_of(IMAGE, 8), soft_targets(8, IMAGE.classes)
    whole, part = (small_trainer(IMAGE, (0.5, 1.0)) for _ in range(2))

    loss = whole.step(x, targets, [1, 1, 1, 0, 0, 0, 0, 0])

    assert loss == pytest.approx(part.step(x[:3], targets[:3]), rel=1e-5)
    for name, array in part.parameters.items():
        assert np.allclose(whole.parameters[name], array, atol=1e-5)


def test_a_batch_of_weight_zero_changes_nothing():
    trainer = small_trainer(IMAGE, (0.5, 1.0))

    loss = trainer.step(inputs_of(IMAGE, 3), soft_targets(3, IMAGE.classes), np.zeros(3))

    assert loss == 0.0
    for name, array in trainer.base.items():
        assert np.array_equal(trainer.parameters[name], array)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_one_step_graph_serves_every_batch_size(count):
    x, targets = inputs_of(SIGNAL, count), soft_targets(count, SIGNAL.classes)
    singly = np.zeros_like(small_trainer(SIGNAL, (0.3, 0.6, 1.0)).momentum["exit2.dense0.weight"])
    for index in range(count):
        trainer = small_trainer(SIGNAL, (0.3, 0.6, 1.0))
        trainer.step(x[index : index + 1], targets[index : index + 1])
        singly += trainer.momentum["exit2.dense0.weight"] / count

    trainer = small_trainer(SIGNAL, (0.3, 0.6, 1.0))
    trainer.step(x, targets)

    assert np.allclose(trainer.momentum["exit2.dense0.weight"], singly, rtol=1e-4, atol=1e-5)


def test_a_step_graph_passes_the_devices_own_inspection():
    staged = export_staged(SIGNAL, parameters_of(SIGNAL))
    model = staged_train_step(staged, (0.3, 0.6, 1.0))

    summary = inspect_model(model.SerializeToString())

    names = trainable_parameters(staged.model)
    given = {"x", "targets", "sample_weight", "learning_rate", "momentum", "proximal"}
    kinds = {kind for name in names for kind in (name, momentum_name(name), base_name(name))}
    results = {updated_name(kind) for name in names for kind in (name, momentum_name(name))}
    assert {value.name for value in summary.inputs} == given | kinds
    assert {value.name for value in summary.outputs} == results | {"loss"}
    assert {node.op_type for node in model.graph.node} <= OPERATORS


def test_a_step_graph_holds_no_weights():
    staged = export_staged(IMAGE, parameters_of(IMAGE))

    left = constants(staged_train_step(staged, (1.0, 1.0)).graph)

    assert not left.keys() & set(trainable_parameters(staged.model))


def test_the_same_network_gives_the_same_step_graph():
    graphs = {
        staged_train_step(export_staged(IMAGE, parameters_of(IMAGE)), (1.0, 1.0)).SerializeToString(
            deterministic=True
        )
        for _ in range(2)
    }

    assert len(graphs) == 1


def test_heads_alone_are_trained_where_the_network_has_no_gradient():
    staged = export_staged(IMAGE, parameters_of(IMAGE))
    relu = next(node for node in staged.model.graph.node if node.op_type == "Relu")
    relu.op_type = "Cos"
    with pytest.raises(NoGradientError, match="Cos"):
        staged_train_step(staged, (1.0, 1.0))

    heads = head_parameters(staged)
    model = staged_train_step(staged, (1.0, 1.0), heads)

    assert heads == tuple(f"exit{index}.dense0.{kind}" for index in (0, 1) for kind in ("weight", "bias"))
    assert not {node.op_type for node in model.graph.node} & {"ConvTranspose", "ScatterElements"}
    assert "stage0.conv0.weight" in constants(model.graph)


def test_layers_weights_are_trainable_and_constants_are_not():
    staged = export_staged(IMAGE, parameters_of(IMAGE))
    graph = staged.model.graph
    graph.node.append(helper.make_node("Mul", [logits_name(1), "half"], ["halved"]))
    graph.initializer.append(numpy_helper.from_array(np.array(0.5, np.float32), "half"))

    found = trainable_parameters(staged.model)

    assert found == tuple(tensor.name for tensor in graph.initializer if tensor.name != "half")


def test_an_operator_without_a_gradient_is_named():
    model, _ = linear_model()
    model.graph.node[0].output[0] = "before"
    model.graph.node.append(helper.make_node("Cos", ["before"], ["logits"], name="odd"))

    with pytest.raises(NoGradientError, match=r"Cos \(odd\)"):
        train_step(model, {"logits": 1.0}, ["w"])


@pytest.mark.parametrize(
    ("exits", "parameters", "said"),
    [
        ({}, ["w"], "one exit or more"),
        ({"logits": 0.0}, ["w"], "above zero"),
        ({"logits": float("nan")}, ["w"], "above zero"),
        ({"absent": 1.0}, ["w"], "'absent'"),
        ({"logits": 1.0}, [], "no parameter"),
        ({"logits": 1.0}, ["absent"], "'absent'"),
    ],
)
def test_what_cannot_be_trained_is_refused(exits, parameters, said):
    model, _ = linear_model()

    with pytest.raises(BuildError, match=said):
        train_step(model, exits, parameters)


def test_a_count_of_weights_that_is_not_that_of_exits_is_refused():
    staged = export_staged(IMAGE, parameters_of(IMAGE))

    with pytest.raises(BuildError, match="1 exit weights for 2 exits"):
        staged_train_step(staged, (1.0,))


def test_a_name_that_the_step_needs_is_refused():
    model, _ = linear_model()
    model.graph.input[0].name = model.graph.node[0].input[0] = "targets"

    with pytest.raises(BuildError, match="'targets'"):
        train_step(model, {"logits": 1.0}, ["w"])


def test_exits_of_different_classes_are_refused():
    model, _ = linear_model()
    model.graph.node.append(helper.make_node("Concat", ["logits", "logits"], ["twice"], axis=1))
    model.graph.output.append(float_value("twice", (6,)))

    with pytest.raises(BuildError, match="differ in their number of classes"):
        train_step(model, {"logits": 1.0, "twice": 1.0}, ["w"])


def test_an_output_without_a_shape_is_refused():
    model, _ = linear_model()
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("logits", TensorProto.FLOAT, None))

    with pytest.raises(BuildError, match=r"\(n, classes\)"):
        train_step(model, {"logits": 1.0}, ["w"])


def test_the_model_itself_is_left_alone():
    model, _ = linear_model()
    before = onnx.ModelProto()
    before.CopyFrom(model)

    train_step(model, {"logits": 1.0}, ["w", "b"])

    assert model == before
