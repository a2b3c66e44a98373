"""Small bundles with seeded random weights, built by the real builder in a second or two."""

from pathlib import Path

import numpy as np
import pytest

from edge_cascade.manifest import Preprocess, Window, Wire

LABELS = ("a", "b", "c", "d")
SHAPE_1D = (1, 128)
SHAPE_2D = (2, 8, 8)


def build(out: Path, *, dimensions: int = 1, seed: int = 0, model: str = "tiny") -> Path:
    """A bundle of three stages with Conv+BatchNorm, int8 and fp32; the directory that holds it and full.onnx."""
    pytest.importorskip("onnx", reason="building a bundle needs onnx (the dev extra)")
    from cloud_hub.builder.assemble import Declaration
    from cloud_hub.builder.naive import Calibration, build_naive_bundle
    from cloud_hub.builder.networks.export import export_full, export_staged
    from cloud_hub.builder.networks.network import (
        Conv,
        Dense,
        Flatten,
        MaxPool,
        Network,
        Relu,
        Stage,
        initial_parameters,
    )

    shape = SHAPE_1D if dimensions == 1 else SHAPE_2D
    head = (Flatten(), Dense(len(LABELS)))
    network = Network(
        shape,
        len(LABELS),
        (
            Stage((Conv(8, 3), Relu(), MaxPool(2)), head),
            Stage((Conv(8, 3), Relu(), MaxPool(2)), head),
            Stage((Conv(16, 3), Relu()), head),
        ),
    )
    full = Network(shape, len(LABELS), (Stage((Conv(16, 5), Relu()), head),))
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((200, *shape)).astype(np.float32) * 3 + 1
    build_naive_bundle(
        export_staged(network, initial_parameters(network, rng)),
        Declaration(
            model=model,
            labels=LABELS,
            input_shape=shape,
            preprocess=Preprocess(mean=(1.0,), std=(3.0,)),
            wire=Wire("int8"),
            window=Window(128, 64) if dimensions == 1 else None,
        ),
        full=export_full(full, initial_parameters(full, rng)),
        representative=x[:100],
        calibration=Calibration(x[100:], rng.integers(0, len(LABELS), 100)),
        out=out,
    )
    return out
