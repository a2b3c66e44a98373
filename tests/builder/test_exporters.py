"""Models that real exporters write, where these are installed: torch's two, and scikit-learn's."""

import warnings

import numpy as np
import pytest

from cloud_hub.builder.graphs.adopt import adopt
from cloud_hub.builder.graphs.cuts import find_cuts, prepare_cuts
from cloud_hub.errors import BuildError
from edge_cascade.backends.onnx import open_whole_model

FIXED, FREE = "batch of one", "free batch"


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def mixed(torch, model):
    """The model with its normalisation away from rest, ready for inference."""
    torch.manual_seed(0)
    for name, tensor in model.state_dict().items():
        if "running_var" in name:
            torch.nn.init.uniform_(tensor, 0.5, 1.5)
        elif "running_mean" in name:
            torch.nn.init.normal_(tensor, 0.0, 0.3)
    return model.eval()


def export(torch, model, input_shape, path, *, dynamo, batch):
    if dynamo:
        pytest.importorskip("onnxscript")
    free = {0: torch.export.Dim("batch")} if dynamo else {0: "batch"}
    more = {"dynamic_shapes": (free,)} if dynamo else {"input_names": ["in"], "dynamic_axes": {"in": free}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (torch.zeros(1 if batch == FIXED else 2, *input_shape),),
            path,
            dynamo=dynamo,
            **(more if batch == FREE else {}),
        )
    return path


def check_same(torch, model, classifier, expected_of=lambda logits: logits):
    x = np.random.default_rng(0).standard_normal((5, *classifier.input_shape)).astype(np.float32)
    with torch.no_grad():
        expected = expected_of(model(torch.from_numpy(x))).numpy()
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(open_whole_model(classifier.to_bytes())(x), expected, atol=1e-5 * scale)


def convolutions(nn):
    layers, given = [], 3
    for channels in (8, 16):
        layers += [
            nn.Conv1d(given, channels, 5, padding=2),
            nn.BatchNorm1d(channels),
            nn.ReLU(),
            nn.MaxPool1d(2),
        ]
        given = channels
    tail = [
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(16 * 8, 12),
        nn.BatchNorm1d(12),
        nn.ReLU(),
        nn.Linear(12, 4),
    ]
    return nn.Sequential(*layers, *tail), (3, 32)


@pytest.mark.parametrize("batch", [FIXED, FREE])
@pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])
def test_a_convolutional_network_of_torch(torch, tmp_path, dynamo, batch):
    model, shape = convolutions(torch.nn)
    path = export(torch, mixed(torch, model), shape, tmp_path / "m.onnx", dynamo=dynamo, batch=batch)
    classifier = adopt(path, sample_shape=None, role="full model")
    assert "BatchNormalization" not in {node.op_type for node in classifier.model.graph.node}
    check_same(torch, model, classifier)
    assert [cut.shape for cut in prepare_cuts(classifier).cuts] == [(8, 16), (16, 8)]


def transformer(torch):
    nn = torch.nn

    class Transformer(nn.Module):
        """Patches, a class token, two encoder layers."""

        def __init__(self):
            super().__init__()
            self.patches = nn.Conv2d(3, 16, 4, 4)
            self.token = nn.Parameter(torch.zeros(1, 1, 16))
            layers = [
                nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True) for _ in range(2)
            ]
            self.encoder = nn.Sequential(*layers)
            self.head = nn.Linear(16, 4)

        def forward(self, x):
            x = self.patches(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
            return self.head(self.encoder(x)[:, 0])

    return Transformer()


def test_a_transformer_of_torch_is_cut_between_its_layers(torch, tmp_path):
    model = mixed(torch, transformer(torch))
    path = export(torch, model, (3, 16, 16), tmp_path / "m.onnx", dynamo=False, batch=FREE)
    classifier = adopt(path, sample_shape=None, role="full model")
    check_same(torch, model, classifier)
    layers = [cut for cut in find_cuts(classifier).cuts if cut.shape == (17, 16) and 0.4 < cut.share < 0.6]
    assert layers
    assert all(cut.channels_last for cut in layers)


def test_a_class_token_in_a_fixed_batch_is_refused(torch, tmp_path):
    model = mixed(torch, transformer(torch))
    path = export(torch, model, (3, 16, 16), tmp_path / "m.onnx", dynamo=False, batch=FIXED)
    with pytest.raises(BuildError, match="re-export with a dynamic batch axis"):
        adopt(path, sample_shape=None, role="full model")


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("batch", [FIXED, FREE])
def test_a_recurrent_network_of_torch(torch, tmp_path, kind, batch):
    class Recurrent(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = getattr(torch.nn, kind)(5, 8, num_layers=2, batch_first=True)
            self.head = torch.nn.Linear(8, 4)

        def forward(self, x):
            return self.head(self.layers(x)[0][:, -1])

    model = mixed(torch, Recurrent())
    path = export(torch, model, (9, 5), tmp_path / "m.onnx", dynamo=False, batch=batch)
    check_same(torch, model, adopt(path, sample_shape=None, role="full model"))


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
def test_architectures_of_a_model_zoo(torch, tmp_path, module, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zoo = pytest.importorskip(f"pytorchcv.models.{module}")
        model = getattr(zoo, name)(**({} if "cifar" in name else {"num_classes": 10}))
    for part in (model.features, model.output):
        if hasattr(part, "final_pool"):  # made for images of 224 by 224
            part.final_pool = torch.nn.AdaptiveAvgPool2d(1)
    path = export(torch, mixed(torch, model), (3, 32, 32), tmp_path / "m.onnx", dynamo=False, batch=FIXED)
    classifier = adopt(path, sample_shape=None, role="full model")
    check_same(torch, model, classifier)
    assert len(prepare_cuts(classifier).cuts) == 2


# --- scikit-learn


@pytest.fixture
def sklearn_data():
    pytest.importorskip("sklearn")
    pytest.importorskip("skl2onnx")
    x = np.random.default_rng(0).normal(3.0, 2.0, (200, 6)).astype(np.float32)
    return x, x[:, :3].argmax(axis=1)


def converted(estimator, x, y):
    from skl2onnx import to_onnx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        estimator.fit(x, y)
        return estimator, to_onnx(estimator, x[:1]).SerializeToString()


def estimators():
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.linear_model import LogisticRegression
    from sklearn.naive_bayes import GaussianNB
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import Normalizer, StandardScaler

    return {
        "logistic regression": make_pipeline(StandardScaler(), LogisticRegression()),
        "on unit vectors": make_pipeline(Normalizer(), LogisticRegression()),
        "network": make_pipeline(StandardScaler(), MLPClassifier((8,), max_iter=50)),
        "discriminant": LinearDiscriminantAnalysis(),
        "naive Bayes": GaussianNB(),
    }


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
def test_probabilities_of_scikit_learn_are_kept(sklearn_data, name, classes):
    x, y = sklearn_data
    estimator, data = converted(estimators()[name], x, y % classes)
    logits = open_whole_model(adopt(data, sample_shape=None, role="full model").to_bytes())(x)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    np.testing.assert_allclose(
        powers / powers.sum(axis=1, keepdims=True), estimator.predict_proba(x), atol=1e-4
    )


def test_a_forest_is_named_as_unsupported(sklearn_data):
    from sklearn.ensemble import RandomForestClassifier

    _, data = converted(RandomForestClassifier(3), *sklearn_data)
    with pytest.raises(BuildError, match=r"TreeEnsembleClassifier .* neither as the full nor as the edge"):
        adopt(data, sample_shape=None, role="full model")
