"""Small networks with random parameters, built without torch."""

import numpy as np

from cloud_hub.builder.assemble import Declaration
from cloud_hub.builder.naive import Calibration, build_naive_bundle
from cloud_hub.builder.networks.export import export_full, export_staged
from cloud_hub.builder.networks.network import (
    AveragePool,
    Conv,
    Dense,
    Flatten,
    GlobalAveragePool,
    MaxPool,
    Network,
    Relu,
    Stage,
    initial_parameters,
)
from edge_cascade.manifest import Preprocess, Wire

SIGNAL = Network(
    input_shape=(1, 64),
    classes=3,
    stages=(
        Stage((Conv(4, 5, 2), Relu()), (GlobalAveragePool(), Dense(3))),
        Stage((Conv(8, 3, groups=4), Relu(), MaxPool(2)), (GlobalAveragePool(), Dense(3))),
        Stage((Conv(8, 3, 2), Relu()), (Flatten(), Dense(3))),
    ),
)
IMAGE = Network(
    input_shape=(2, 8, 8),
    classes=4,
    stages=(
        Stage((Conv(6, 3), Relu(), MaxPool(2)), (AveragePool(2), Flatten(), Dense(4))),
        Stage((Conv(8, 3, batch_norm=False), Relu()), (GlobalAveragePool(), Dense(4))),
    ),
)
FULL = Network(
    input_shape=SIGNAL.input_shape,
    classes=SIGNAL.classes,
    stages=(Stage((Conv(6, 5, 2), Relu()), (Flatten(), Dense(3))),),
)


def parameters_of(network, seed=0):
    """Random parameters with batch normalisation away from rest, so that folding has something to do."""
    rng = np.random.default_rng(seed)
    parameters = initial_parameters(network, rng)
    for name, array in parameters.items():
        short = name.rsplit(".", 1)[1]
        if short in {"gamma", "variance"}:
            parameters[name] = rng.uniform(0.5, 2.0, array.shape).astype(np.float32)
        elif short in {"beta", "mean", "bias"}:
            parameters[name] = rng.normal(0.0, 0.3, array.shape).astype(np.float32)
    return parameters


def inputs_of(network, count, seed=1):
    return np.random.default_rng(seed).standard_normal((count, *network.input_shape)).astype(np.float32)


def build_signal_bundle(out, *, version="1.0.0"):
    x = inputs_of(SIGNAL, 120)
    return build_naive_bundle(
        export_staged(SIGNAL, parameters_of(SIGNAL)),
        Declaration(
            model="signal",
            labels=("a", "b", "c"),
            input_shape=SIGNAL.input_shape,
            preprocess=Preprocess((0.5,), (2.0,)),
            wire=Wire("int8"),
            version=version,
        ),
        full=export_full(FULL, parameters_of(FULL)),
        representative=inputs_of(SIGNAL, 64, seed=2),
        calibration=Calibration(x, np.random.default_rng(3).integers(0, 3, len(x))),
        out=out,
    )
