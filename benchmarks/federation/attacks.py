"""What a device sends that means harm, in place of what it learned. No I/O."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from edge_cascade.weights import FloatArray, Weights

Delta = dict[str, FloatArray]


@dataclass(frozen=True, slots=True, eq=False)
class Honest:
    """What the device learned in this round, what it learned in its first, and its chance."""

    now: Weights
    first: Weights
    rng: np.random.Generator


def _times(delta: Weights, factor: float) -> Delta:
    return {name: (array * np.float32(factor)).astype(np.float32) for name, array in delta.items()}


def _noise(honest: Honest) -> Delta:
    """Gaussian, three times as long as what was learned: shorter than what the norm rule refuses."""
    size = sum(array.size for array in honest.now.values())
    norm = np.sqrt(sum(float(np.square(array, dtype=np.float64).sum()) for array in honest.now.values()))
    deviation = 3.0 * norm / np.sqrt(size)
    return {
        name: honest.rng.normal(0.0, deviation, array.shape).astype(np.float32)
        for name, array in honest.now.items()
    }


def _nan(honest: Honest) -> Delta:
    return {name: np.full_like(array, np.nan) for name, array in honest.now.items()}


ATTACKS: Final[dict[str, Callable[[Honest], Delta]]] = {
    "flipped": lambda honest: _times(honest.now, -1.0),
    "flipped, 3 times": lambda honest: _times(honest.now, -3.0),
    "100 times": lambda honest: _times(honest.now, 100.0),
    "NaN": _nan,
    "random": _noise,
    # The device's first update under the name of each later base.
    "stale": lambda honest: dict(honest.first),
}
