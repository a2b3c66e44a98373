"""`(x - mean) / std` as the manifest declares it: the one place where device and hub do it. No I/O."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_cascade.manifest import Preprocess

Array = NDArray[np.float32]


class Normaliser:
    """Normalises samples of one shape; a mean or std per channel applies along that axis."""

    def __init__(self, preprocess: Preprocess, input_shape: tuple[int, ...]) -> None:
        self._axes = len(input_shape)
        self._channels_last = preprocess.layout == "channels_last"
        per_channel: tuple[int, ...] = (-1,) + (1,) * (self._axes - 1)
        if len(preprocess.mean) == len(preprocess.std) == 1:
            # numpy is quicker with a scalar than with an axis of one.
            per_channel = ()
        self._mean = np.asarray(preprocess.mean, dtype=np.float32).reshape(per_channel)
        # One division here, a multiplication per sample: the same float32 operations on both sides.
        self._inverse_std = (1.0 / np.asarray(preprocess.std, dtype=np.float64)).astype(np.float32)
        self._inverse_std = self._inverse_std.reshape(per_channel)

    def into(self, x: Array, target: Array) -> None:
        """Write normalised `x`, one sample or a batch, into `target`, which has the network's shape."""
        if self._channels_last:
            x = np.moveaxis(x, -1, x.ndim - self._axes)
        np.subtract(x, self._mean, out=target)
        np.multiply(target, self._inverse_std, out=target)


def normalise(x: Array, preprocess: Preprocess) -> Array:
    """A normalised copy of a batch `(n, *shape) float32`, channels first."""
    target = np.empty((len(x), *preprocess.network_shape(x.shape[1:])), dtype=np.float32)
    Normaliser(preprocess, x.shape[1:]).into(x, target)
    return target
