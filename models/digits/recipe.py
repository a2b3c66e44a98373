"""Handwritten digits of 8x8 pixels: scikit-learn's copy of the UCI set by Alpaydin and Kaynak (1998).

    python models/digits/recipe.py              trains, writes bundle/, full.onnx and samples.npz here
    python models/digits/recipe.py --seeds 3    the same, and a table over three seeds

The set of 1,797 is small: 797 images train, 500 calibrate, 500 test, classes balanced, so one test image is
0.2 points. `samples.npz` holds the test images for the simulator: `x_test` (500, 1, 8, 8) uint8 of 0..16,
`y_test` (500,) int64. scikit-learn's copy does not say who wrote which digit, so a writer may be in two
splits.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cloud_hub.builder.networks.network import (
    AveragePool,
    Conv,
    Dense,
    Flatten,
    Layer,
    MaxPool,
    Network,
    Relu,
    Stage,
)
from cloud_hub.builder.networks.training import Distillation, Schedule
from cloud_hub.builder.recipe import Recipe, Samples, Sets, run
from edge_cascade.manifest import Wire


def conv(channels: int) -> tuple[Layer, ...]:
    """3x3 convolution, batch normalisation, ReLU."""
    return (Conv(channels, 3), Relu())


HEAD = (AveragePool(2), Flatten(), Dense(10))

EDGE = Network(
    input_shape=(1, 8, 8),
    classes=10,
    stages=(
        Stage((*conv(6), MaxPool(2)), HEAD),
        Stage(conv(12), HEAD),
        Stage(conv(20), HEAD),
    ),
)

FULL = Network(
    input_shape=(1, 8, 8),
    classes=10,
    stages=(
        Stage(
            (*conv(32), *conv(64), MaxPool(2), *conv(128), *conv(128)),
            (Flatten(), Dense(96), Relu(), Dense(10)),
        ),
    ),
)


def load() -> Sets:
    """Split with a fixed seed, each class by the same shares."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    x = digits.images.astype(np.float32)[:, np.newaxis]
    y = digits.target.astype(np.int64)
    x_rest, x_test, y_rest, y_test = train_test_split(x, y, test_size=500, stratify=y, random_state=0)
    x_train, x_calibration, y_train, y_calibration = train_test_split(
        x_rest, y_rest, test_size=500, stratify=y_rest, random_state=0
    )
    return Sets(Samples(x_train, y_train), Samples(x_calibration, y_calibration), Samples(x_test, y_test))


def augment(x: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Shift half of the images by up to one pixel; the border's values fill what becomes free."""
    shifted = x.copy()
    for row in np.flatnonzero(rng.random(len(x)) < 0.5):
        down, right = rng.integers(-1, 2, 2)
        padded = np.pad(x[row], ((0, 0), (1, 1), (1, 1)), mode="edge")
        shifted[row] = padded[:, 1 + down : 9 + down, 1 + right : 9 + right]
    return shifted


def write_samples(directory: Path, test: Samples) -> None:
    """Write the test images, in whole grey levels as they are in the source."""
    np.savez_compressed(directory / "samples.npz", x_test=test.x.astype(np.uint8), y_test=test.y)


RECIPE = Recipe(
    model="digits",
    labels=tuple("0123456789"),
    full=FULL,
    edge=EDGE,
    full_schedule=Schedule(epochs=30, seed=0, batch=64, threads=1),
    edge_schedule=Schedule(epochs=60, seed=0, batch=64, threads=1),
    distillation=Distillation(share=0.5, temperature=2.0, exit_weights=(0.3, 0.6, 1.0)),
    wire=Wire("int8", scale=1.0),  # grey levels are 0..16: nothing is lost
    window=None,
    epsilon=0.02,  # half a percent cannot be shown by 350 images
    load=load,
    augment=augment,
)

if __name__ == "__main__":
    write_samples(run(RECIPE, Path(__file__).resolve().parent), load().test)
