import importlib.util
from pathlib import Path

import numpy as np
import pytest
from onnx import helper

from cloud_hub.builder.networks.export import export_staged
from cloud_hub.builder.networks.family import default_family
from cloud_hub.builder.networks.network import (
    AveragePool,
    Conv,
    Dense,
    Flatten,
    GlobalAveragePool,
    MaxPool,
    Relu,
    initial_parameters,
)
from tests.builder.gradients import gradients_of, model_of, relative_error, seed_like, trainer_of

torch = pytest.importorskip("torch")
F = torch.nn.functional

MODELS = Path(__file__).resolve().parents[2] / "models"
EXIT_WEIGHTS = (0.3, 0.6, 1.0)


def convolution(**options):
    return lambda x, w, b: (F.conv2d if x.dim() == 4 else F.conv1d)(x, w, b, **options)


def batch_norm(x, s, b, m, v):
    return F.batch_norm(x, m, v, s, b)


OPERATORS = [
    (
        "Conv",
        {"x": (4, 6, 13, 11), "w": (8, 6, 3, 3), "b": (8,)},
        {"pads": [1, 1, 1, 1]},
        convolution(padding=1),
    ),
    (
        "Conv",
        {"x": (4, 6, 13, 11), "w": (8, 3, 3, 5), "b": (8,)},
        {"pads": [1, 2, 1, 2], "strides": [2, 3], "group": 2},
        convolution(padding=(1, 2), stride=(2, 3), groups=2),
    ),
    (
        "Conv",
        {"x": (4, 6, 13, 12), "w": (12, 1, 3, 3), "b": (12,)},
        {"dilations": [2, 3], "strides": [2, 1], "group": 6},
        convolution(dilation=(2, 3), stride=(2, 1), groups=6),
    ),
    (
        "Conv",
        {"x": (4, 3, 100), "w": (8, 3, 33), "b": (8,)},
        {"pads": [16, 16], "strides": [8]},
        convolution(padding=16, stride=8),
    ),
    (
        "MaxPool",
        {"x": (4, 3, 9, 7)},
        {"kernel_shape": [2, 2], "strides": [2, 2]},
        lambda x: F.max_pool2d(x, 2),
    ),
    (
        "MaxPool",
        {"x": (4, 3, 9, 8)},
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
        lambda x: F.max_pool2d(x, 3, 2, 1),
    ),
    (
        "AveragePool",
        {"x": (4, 3, 9, 8)},
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
        lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    ),
    ("AveragePool", {"x": (4, 3, 9)}, {"kernel_shape": [2], "strides": [2]}, lambda x: F.avg_pool1d(x, 2)),
    ("GlobalAveragePool", {"x": (4, 3, 9, 8)}, {}, lambda x: F.adaptive_avg_pool2d(x, 1)),
    ("GlobalMaxPool", {"x": (4, 3, 9)}, {}, lambda x: F.adaptive_max_pool1d(x, 1)),
    ("Gemm", {"x": (7, 9), "w": (5, 9), "b": (5,)}, {"transB": 1}, F.linear),
    ("MatMul", {"x": (4, 2, 3, 9), "w": (9, 5)}, {}, torch.matmul),
    ("Gelu", {"x": (7, 9)}, {}, F.gelu),
    ("Gelu", {"x": (7, 9)}, {"approximate": "tanh"}, lambda x: F.gelu(x, approximate="tanh")),
    ("HardSwish", {"x": (7, 90)}, {}, F.hardswish),
    ("HardSigmoid", {"x": (7, 90)}, {"alpha": 1 / 6}, F.hardsigmoid),
    ("LeakyRelu", {"x": (7, 9)}, {"alpha": 0.2}, lambda x: F.leaky_relu(x, 0.2)),
    ("Erf", {"x": (7, 9)}, {}, torch.erf),
    ("Softplus", {"x": (7, 9)}, {}, F.softplus),
    ("Softmax", {"x": (7, 4, 9)}, {"axis": 1}, lambda x: F.softmax(x, 1)),
    ("LogSoftmax", {"x": (7, 9)}, {"axis": -1}, lambda x: F.log_softmax(x, -1)),
    (
        "LayerNormalization",
        {"x": (7, 4, 9), "s": (9,), "b": (9,)},
        {"axis": -1},
        lambda x, s, b: F.layer_norm(x, (9,), s, b),
    ),
]


@pytest.mark.parametrize(
    ("operator", "shapes", "attributes", "function"),
    OPERATORS,
    ids=[f"{n}-{o[0]}" for n, o in enumerate(OPERATORS)],
)
def test_an_operators_gradient_is_that_of_torch(operator, shapes, attributes, function):
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    node = helper.make_node(operator, list(shapes), ["y"], **attributes)
    model = model_of([node], arrays, list(shapes), opset=20)
    seed = seed_like(model, arrays, list(shapes))

    found, y = gradients_of(model, arrays, list(shapes), seed)

    leaves = {name: torch.from_numpy(array).requires_grad_() for name, array in arrays.items()}
    expected = function(*leaves.values())
    expected.backward(torch.from_numpy(seed))
    assert relative_error(y, expected.detach().numpy()) < 1e-5
    for name, leaf in leaves.items():
        assert relative_error(found[name], leaf.grad.numpy()) < 1e-4, name


def test_frozen_batch_normalisation_is_that_of_torch():
    rng = np.random.default_rng(0)
    shapes = {"x": (4, 3, 5, 5), "s": (3,), "b": (3,), "m": (3,)}
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    arrays["v"] = (0.5 + rng.random(3)).astype(np.float32)
    model = model_of([helper.make_node("BatchNormalization", list(arrays), ["y"])], arrays, ["x", "s", "b"])
    seed = seed_like(model, arrays, ["x", "s", "b"])

    found, _ = gradients_of(model, arrays, ["x", "s", "b"], seed)

    leaves = {name: torch.from_numpy(array).requires_grad_(name in found) for name, array in arrays.items()}
    batch_norm(**leaves).backward(torch.from_numpy(seed))
    for name, gradient in found.items():
        assert relative_error(gradient, leaves[name].grad.numpy()) < 1e-4, name


def shipped(model):
    spec = importlib.util.spec_from_file_location(f"recipe_of_{model}", MODELS / model / "recipe.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.EDGE


def medium(shape):
    return default_family(shape, 6)[1].network


NETWORKS = {
    "digits": lambda: shipped("digits"),
    "vibration": lambda: shipped("vibration"),
    "image 28x28": lambda: medium((1, 28, 28)),
    "image 3x61x50": lambda: medium((3, 61, 50)),
    "signal 6x128": lambda: medium((6, 128)),
    "vector 20": lambda: medium((20,)),
}


def through(placed, x, parameters):
    """One layer in torch, with its weights from `parameters`."""
    weights = [parameters.get(f"{placed.name}.{short}") for short in ("weight", "bias")]
    two = x.dim() == 4
    match placed.layer:
        case Conv(kernel=kernel, stride=stride, groups=groups):
            function = F.conv2d if two else F.conv1d
            return function(x, *weights, stride=stride, padding=kernel // 2, groups=groups)
        case Dense():
            return F.linear(x, *weights)
        case Relu():
            return F.relu(x)
        case MaxPool(size=size):
            return (F.max_pool2d if two else F.max_pool1d)(x, size)
        case AveragePool(size=size):
            return (F.avg_pool2d if two else F.avg_pool1d)(x, size)
        case GlobalAveragePool():
            return x.flatten(2).mean(2)
        case Flatten():
            return x.flatten(1)


def loss_in_torch(network, parameters, x, targets):
    total = 0.0
    for body, head, weight in zip(network.bodies, network.heads, EXIT_WEIGHTS, strict=True):
        for placed in body:
            x = through(placed, x, parameters)
        logits = x
        for placed in head:
            logits = through(placed, logits, parameters)
        total = total + weight * F.cross_entropy(logits, targets)
    return total


def batches(network, rng, counts):
    """Inputs and one-hot targets."""
    for count in counts:
        x = rng.standard_normal((count, *network.input_shape)).astype(np.float32)
        yield x, np.eye(network.classes, dtype=np.float32)[rng.integers(0, network.classes, count)]


def leaves_of(parameters):
    return {
        name: torch.tensor(array, dtype=torch.float64, requires_grad=True)
        for name, array in parameters.items()
    }


@pytest.mark.parametrize("name", NETWORKS)
def test_a_networks_gradients_are_those_of_torch(name):
    network = NETWORKS[name]()
    rng = np.random.default_rng(0)
    staged = export_staged(network, initial_parameters(network, rng))
    errors = {}

    for x, targets in batches(network, rng, (8, 1, 3, 8, 3)):
        trainer = trainer_of(staged, EXIT_WEIGHTS)
        loss = trainer.step(x, targets)
        leaves = leaves_of(trainer.base)
        expected = loss_in_torch(network, leaves, torch.from_numpy(x).double(), torch.from_numpy(targets))
        expected.backward()
        assert loss == pytest.approx(expected.item(), rel=1e-4)
        for key, leaf in leaves.items():
            errors.setdefault(key, []).append(relative_error(trainer.momentum[key], leaf.grad.numpy()))

    # Rounding may put one of 100,000 activations on the other side of a kink: torch's float32 does so here.
    assert {key: found for key, found in errors.items() if np.median(found) > 5e-4} == {}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_networks_training_is_that_of_torch(name):
    network = NETWORKS[name]()
    rng = np.random.default_rng(1)
    trainer = trainer_of(export_staged(network, initial_parameters(network, rng)), EXIT_WEIGHTS)
    leaves = leaves_of(trainer.base)
    descent = torch.optim.SGD(leaves.values(), lr=0.01, momentum=0.9)

    for x, targets in batches(network, rng, (8, 8, 3, 1)):
        trainer.step(x, targets, rate=0.01, momentum=0.9)
        descent.zero_grad()
        loss_in_torch(network, leaves, torch.from_numpy(x).double(), torch.from_numpy(targets)).backward()
        descent.step()

    for key, leaf in leaves.items():
        assert relative_error(trainer.parameters[key], leaf.detach().numpy()) < 5e-4, key
