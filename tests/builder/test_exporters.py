"""Models that real exporters write, where these are installed: torch's two, and scikit-learn's."""

import numpy as np
import pytest
from rich.console import Console

from benchmarks.exporters.architectures import (
    CONVOLUTIONS,
    RECURRENT,
    TRANSFORMER,
    made,
    zoo_architecture,
)
from benchmarks.exporters.exports import (
    TORCH_EXPORTERS,
    Batch,
    Exporter,
    answers_of,
    estimators,
    export_estimator,
    export_torch,
    noise_for_estimators,
    softmax,
)
from benchmarks.exporters.tried import Original, build_edge, deviation, try_file
from cloud_hub.builder.graphs.adopt import adopt
from cloud_hub.builder.graphs.cuts import find_cuts, prepare_cuts
from cloud_hub.errors import BuildError
from edge_cascade.backends.onnx import open_whole_model


@pytest.fixture
def write(tmp_path):
    """Exports an architecture; gives the module and the file."""
    pytest.importorskip("torch")

    def written(architecture, exporter=Exporter.TORCHSCRIPT, batch=Batch.FREE):
        if exporter is Exporter.DYNAMO:
            pytest.importorskip("onnxscript")
        model = made(architecture)
        return model, export_torch(model, architecture.shape, tmp_path / "m.onnx", exporter, batch)

    return written


def check_same(model, classifier):
    x = np.random.default_rng(0).standard_normal((5, *classifier.input_shape)).astype(np.float32)
    said = open_whole_model(classifier.to_bytes())(x)
    # Folding the normalisation into the weights rounds anew in every layer.
    assert deviation(said, answers_of(model, x)) <= 1e-4


@pytest.mark.parametrize("batch", Batch)
@pytest.mark.parametrize("exporter", TORCH_EXPORTERS)
def test_a_convolutional_network_of_torch(write, exporter, batch):
    model, path = write(CONVOLUTIONS, exporter, batch)
    classifier = adopt(path, sample_shape=None, role="full model")
    assert "BatchNormalization" not in {node.op_type for node in classifier.model.graph.node}
    check_same(model, classifier)
    assert [cut.shape for cut in prepare_cuts(classifier).cuts] == [(8, 16), (16, 8)]


def test_a_transformer_of_torch_is_cut_between_its_layers(write):
    model, path = write(TRANSFORMER)
    classifier = adopt(path, sample_shape=None, role="full model")
    check_same(model, classifier)
    layers = [cut for cut in find_cuts(classifier).cuts if cut.shape == (17, 16) and 0.4 < cut.share < 0.6]
    assert layers
    assert all(cut.channels_last for cut in layers)


def test_a_class_token_in_a_fixed_batch_is_refused(write):
    _, path = write(TRANSFORMER, batch=Batch.FIXED)
    with pytest.raises(BuildError, match="re-export with a dynamic batch axis"):
        adopt(path, sample_shape=None, role="full model")


@pytest.mark.parametrize("architecture", RECURRENT, ids=lambda architecture: architecture.name)
@pytest.mark.parametrize("batch", Batch)
def test_a_recurrent_network_of_torch(write, architecture, batch):
    model, path = write(architecture, batch=batch)
    check_same(model, adopt(path, sample_shape=None, role="full model"))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("resnet_cifar", "resnet20_cifar10"),
        ("preresnet_cifar", "preresnet20_cifar10"),
        ("mobilenetv2", "mobilenetv2_wd4"),
        ("shufflenet", "shufflenet_g3_wd4"),
        ("squeezenet", "squeezenet_v1_1"),
    ],
)
def test_architectures_of_a_model_zoo(write, module, name):
    architecture = zoo_architecture(module, name)
    pytest.importorskip("pytorchcv")
    model, path = write(architecture, batch=Batch.FIXED)
    classifier = adopt(path, sample_shape=None, role="full model")
    check_same(model, classifier)
    assert len(prepare_cuts(classifier).cuts) == 2


def test_a_network_of_torch_gets_exits_and_a_certificate(write, tmp_path):
    _, path = write(CONVOLUTIONS)
    built = build_edge(path, CONVOLUTIONS.shape, tmp_path, Console(quiet=True))
    assert not built.refused
    assert 0.0 < built.mult_adds <= 1.0


# --- scikit-learn


def fitted(name, classes, path):
    pytest.importorskip("sklearn")
    pytest.importorskip("skl2onnx")
    estimator = next(each for each in estimators() if (each.name, each.classes) == (name, classes))
    return estimator, export_estimator(estimator, path)


# Not the discriminant of two classes: its converter writes other probabilities than the original gives.
@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("logistic regression", 2),
        ("logistic regression", 3),
        ("on unit vectors", 2),
        ("on unit vectors", 3),
        ("network", 2),
        ("network", 3),
        ("naive Bayes", 2),
        ("naive Bayes", 3),
        ("discriminant", 3),
    ],
)
def test_probabilities_of_scikit_learn_are_kept(tmp_path, name, classes):
    estimator, path = fitted(name, classes, tmp_path / "m.onnx")
    x, _ = noise_for_estimators(classes)
    logits = open_whole_model(adopt(path, sample_shape=None, role="full model").to_bytes())(x)
    np.testing.assert_allclose(softmax(logits), estimator.model.predict_proba(x), atol=1e-4)


@pytest.mark.parametrize(("name", "classes"), [("network", 2), ("naive Bayes", 3)])
def test_what_ends_in_probabilities_without_a_gradient_gets_a_bundle(tmp_path, name, classes):
    estimator, path = fitted(name, classes, tmp_path / "m.onnx")
    shape = noise_for_estimators(estimator.classes)[0].shape[1:]
    assert build_edge(path, shape, tmp_path, Console(quiet=True)).refused == ""


def test_a_forest_is_named_as_unsupported(tmp_path):
    _, path = fitted("forest", 3, tmp_path / "m.onnx")
    with pytest.raises(BuildError, match=r"TreeEnsembleClassifier .* neither as the full nor as the edge"):
        adopt(path, sample_shape=None, role="full model")


@pytest.mark.parametrize("name", ["forest", "support vectors", "nearest neighbours"])
def test_what_is_refused_is_tried_all_the_same_and_says_why(tmp_path, name):
    _, path = fitted(name, 3, tmp_path / "m.onnx")
    x, _ = noise_for_estimators(3)
    tried = try_file(name, Exporter.SKL2ONNX, Batch.FREE, path, Original(x, x))
    assert "\n" not in tried.refused
    assert str(tmp_path) not in tried.refused
    assert tried.places == 0
