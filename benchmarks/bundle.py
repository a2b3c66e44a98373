"""The bundle that is measured on: 128 floats in, three small stages, seeded random weights.

What it answers means nothing; what it costs is that of a real one of the same shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

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
from edge_cascade.manifest import Preprocess, Wire
from edge_cascade.policy import OperatingPoint, Plan

Array = NDArray[np.float32]

MODEL: Final = "benchmark"
SHAPE: Final = (1, 128)
PREPROCESS: Final = Preprocess(mean=(1.0,), std=(3.0,))
_LABELS: Final = ("a", "b", "c", "d")
_HEAD: Final = (Flatten(), Dense(len(_LABELS)))
_BODIES: Final = (
    (Conv(8, 3), Relu(), MaxPool(2)),
    (Conv(8, 3), Relu(), MaxPool(2)),
    (Conv(16, 3), Relu()),
)
_SEED: Final = 0


@dataclass(frozen=True, slots=True)
class Built:
    """The device's bundle, and the same network up to its last exit as one plain model."""

    bundle: Path
    plain_model: Path


def build(directory: Path) -> Built:
    """Build both; the same bytes every time."""
    network = Network(SHAPE, len(_LABELS), tuple(Stage(body, _HEAD) for body in _BODIES))
    # The layers of all three stages in a row: what somebody without a cascade would run.
    plain = Network(SHAPE, len(_LABELS), (Stage(tuple(layer for body in _BODIES for layer in body), _HEAD),))
    rng = np.random.default_rng(_SEED)
    x = random_samples(200, rng)
    plain_model = export_full(plain, initial_parameters(plain, rng))
    build_naive_bundle(
        export_staged(network, initial_parameters(network, rng)),
        Declaration(MODEL, _LABELS, SHAPE, PREPROCESS, Wire("int8")),
        full=plain_model,
        representative=x[:100],
        calibration=Calibration(x[100:], rng.integers(0, len(_LABELS), 100)),
        out=directory,
    )
    return Built(directory / "bundle", directory / "full.onnx")


def random_samples(count: int, rng: np.random.Generator) -> Array:
    """`(count, *SHAPE)` of many loudnesses and offsets, so that random weights are sure of some only."""
    noise = rng.standard_normal((count, *SHAPE))
    each = (count, 1, 1)
    return (noise * rng.uniform(0, 20, each) + rng.uniform(-20, 20, each)).astype(np.float32)


def with_thresholds(plan: Plan, max_score: tuple[float, ...]) -> Plan:
    """The plan with one operating point of our own."""
    point = OperatingPoint(max_score, upload_share=0.0, accuracy=0.0, mult_adds=0.0)
    return msgspec.structs.replace(plan, points=(point,), chosen=0)
