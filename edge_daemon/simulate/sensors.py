"""Virtual sensors: labelled samples of the shipped models. The labels go to nobody but the final report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge_cascade.shipped import shipped_model_dir
from edge_daemon.errors import SimulationError
from edge_daemon.simulate.vibration import VibrationSource

Labelled = tuple[NDArray[np.float32], int]

_FULL_SCALE: Final = 16.0


def open_source(model: str, *, seed: int, drift: float) -> Iterator[Labelled]:
    """An endless stream of `(sample, label)`; `drift` 0..1 moves it away from what the model was trained on.

    Raises:
        SimulationError: naming the models that have a virtual sensor.
    """
    if model not in _SOURCES:
        raise SimulationError(f"no virtual sensor for {model!r}; there are: {', '.join(sorted(_SOURCES))}")
    return _SOURCES[model](seed, drift)


def _vibration(seed: int, drift: float) -> Iterator[Labelled]:
    for window, label in VibrationSource("test", seed, drift):
        yield window.reshape(1, -1), label


def _digits(seed: int, drift: float) -> Iterator[Labelled]:
    """Held-out handwritten digits in random order; drifting, the scanner loses contrast and gains noise."""
    with np.load(shipped_model_dir("digits") / "samples.npz", allow_pickle=False) as file:
        images, labels = file["x_test"].astype(np.float32), file["y_test"]
    rng = np.random.default_rng(seed)
    while True:
        for index in rng.permutation(len(images)):
            image = images[index]
            if drift:
                noise = rng.normal(0.0, 6.0 * drift, image.shape)
                faded = image * (1.0 - 0.5 * drift) + _FULL_SCALE * 0.15 * drift + noise
                image = np.clip(np.rint(faded), 0.0, _FULL_SCALE).astype(np.float32)
            yield image, int(labels[index])


_SOURCES: Final[dict[str, Callable[[int, float], Iterator[Labelled]]]] = {
    "digits": _digits,
    "vibration": _vibration,
}
