"""The full models: what a hub would run, trained here on the training part alone and kept in a cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.cascade.sets import Arrays, MeasuredSet
from cloud_hub.builder.networks.export import export_full
from cloud_hub.builder.networks.network import (
    Conv,
    Dense,
    Flatten,
    GlobalAveragePool,
    Layer,
    MaxPool,
    Network,
    Relu,
    Stage,
)
from cloud_hub.builder.networks.training import Augment, Schedule, train_full
from cloud_hub.builder.steps import Steps

Floats = NDArray[np.float32]

THREADS = 1


def _conv(channels: int, kernel: int = 3, stride: int = 1) -> tuple[Layer, ...]:
    return (Conv(channels, kernel, stride), Relu())


IMAGES = Network(
    input_shape=(1, 28, 28),
    classes=10,
    stages=(
        Stage(
            (
                *_conv(32),
                MaxPool(2),
                *_conv(64),
                *_conv(64),
                MaxPool(2),
                *_conv(128),
                *_conv(128),
                MaxPool(2),
            ),
            (Flatten(), Dense(256), Relu(), Dense(10)),
        ),
    ),
)
SIGNALS = Network(
    input_shape=(1, 1024),
    classes=16,
    stages=(
        Stage(
            (
                *_conv(32, 33, 4),
                *_conv(64, 9, 2),
                *_conv(96, 7, 2),
                *_conv(160, 5, 2),
                *_conv(224, 5, 2),
                *_conv(256, 3, 2),
                *_conv(256, 3, 1),
            ),
            (GlobalAveragePool(), Dense(16)),
        ),
    ),
)


def full_model(measured: MeasuredSet, arrays: Arrays, cache: Path, *, epochs: int) -> bytes:
    """The trained full model as ONNX: takes normalised, channels-first samples."""
    network = IMAGES if arrays["x_train"].ndim == 3 else SIGNALS
    x = (arrays["x_train"].astype(np.float32)[:, np.newaxis] - measured.mean) / measured.std
    y = arrays["y_train"].astype(np.int64)
    augment: Augment = _shift_images if network is IMAGES else _turn_signals
    parameters = Steps(cache).arrays(
        "full",
        [measured.name, str(network), epochs, len(x)],
        lambda checkpoint: dict(
            train_full(
                network,
                x.astype(np.float32),
                y,
                schedule=Schedule(epochs=epochs, seed=0, batch=128, label_smoothing=0.05, threads=THREADS),
                augment=augment,
                checkpoint=checkpoint,
            )
        ),
    )
    return export_full(network, {name: array.astype(np.float32) for name, array in parameters.items()})


def _shift_images(x: Floats, rng: np.random.Generator) -> Floats:
    """Mirror half of them; move all by up to two pixels."""
    flipped = np.where(rng.random((len(x), 1, 1, 1)) < 0.5, x[..., ::-1], x)
    padded = np.pad(flipped, ((0, 0), (0, 0), (2, 2), (2, 2)), mode="edge")
    moved = np.empty_like(x)
    for row, (down, right) in enumerate(rng.integers(0, 5, (len(x), 2))):
        moved[row] = padded[row, :, down : down + x.shape[2], right : right + x.shape[3]]
    return moved


def _turn_signals(x: Floats, rng: np.random.Generator) -> Floats:
    """Another gain, a later start, and the sensor mounted the other way round."""
    gain = np.exp(0.15 * rng.standard_normal((len(x), 1, 1))) * rng.choice([-1.0, 1.0], (len(x), 1, 1))
    rolled = np.stack(
        [
            np.roll(one, shift, axis=-1)
            for one, shift in zip(x, rng.integers(0, x.shape[-1], len(x)), strict=True)
        ]
    )
    return np.asarray(rolled * gain, np.float32)
