"""Seven conditions of a rotating machine from 0.1 s of acceleration, for machines that training never saw.

    python models/vibration/recipe.py              trains, writes bundle/ and full.onnx beside this file
    python models/vibration/recipe.py --seeds 3    the same, and a table over three seeds

Data is simulated (`edge_daemon.simulate.vibration`): 600 machines train, 9,000 others calibrate with one
window each, so that calibration samples are independent, 300 others test. Severities run from incipient,
where a fault hides in the rolling noise, to clear. The device's network is what fits a small board's cache;
it gets as many passes over the same data as the full model, and that as its teacher.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cloud_hub.builder.networks.network import Conv, Dense, GlobalAveragePool, Layer, Network, Relu, Stage
from cloud_hub.builder.networks.training import Distillation, Schedule
from cloud_hub.builder.recipe import Recipe, Samples, Sets, run
from edge_cascade.manifest import Window, Wire
from edge_daemon.simulate.vibration import LABELS, LENGTH, Split, draw_windows

COUNTS: dict[Split, int] = {"train": 30_000, "calibration": 9_000, "test": 9_000}


def conv(channels: int, kernel: int, stride: int) -> tuple[Layer, ...]:
    """Convolution, batch normalisation, ReLU."""
    return (Conv(channels, kernel, stride), Relu())


HEAD = (GlobalAveragePool(), Dense(len(LABELS)))

EDGE = Network(
    input_shape=(1, LENGTH),
    classes=len(LABELS),
    stages=(
        Stage((*conv(12, 33, 8), *conv(16, 9, 2)), HEAD),
        Stage((*conv(24, 7, 2), *conv(32, 5, 1)), HEAD),
        Stage((*conv(40, 5, 2), *conv(48, 5, 1)), HEAD),
    ),
)

FULL = Network(
    input_shape=(1, LENGTH),
    classes=len(LABELS),
    stages=(
        Stage(
            (
                *conv(16, 33, 4),
                *conv(48, 9, 2),
                *conv(80, 7, 2),
                *conv(128, 3, 2),
                *conv(192, 3, 2),
                *conv(256, 3, 2),
            ),
            HEAD,
        ),
    ),
)


def load() -> Sets:
    """Draw all three splits, each with its own generator and its own machines."""
    parts = []
    for number, (split, count) in enumerate(COUNTS.items()):
        x, y, _ = draw_windows(split, count, np.random.default_rng([7, number]))
        parts.append(Samples(x[:, np.newaxis], y))
    return Sets(*parts)


def augment(x: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Another gain, and the sensor mounted the other way round."""
    gain = np.exp(0.2 * rng.standard_normal((len(x), 1, 1))) * rng.choice([-1.0, 1.0], (len(x), 1, 1))
    return np.asarray(x * gain, np.float32)


RECIPE = Recipe(
    model="vibration",
    labels=LABELS,
    full=FULL,
    edge=EDGE,
    full_schedule=Schedule(epochs=12, seed=0, batch=128),
    edge_schedule=Schedule(epochs=12, seed=0, batch=128),
    distillation=Distillation(share=0.5, temperature=2.0, exit_weights=(0.3, 0.6, 1.0)),
    wire=Wire("int8"),
    window=Window(length=LENGTH, hop=LENGTH),
    epsilon=0.005,
    load=load,
    augment=augment,
)

if __name__ == "__main__":
    run(RECIPE, Path(__file__).resolve().parent)
