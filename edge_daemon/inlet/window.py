"""A stream of values per sensor -> windows of fixed length. No I/O.

The first window comes when `length` values per channel are there, the next ones `hop` values later each.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge_cascade.manifest import Window
from edge_daemon.inlet.decode import SampleError

Array = NDArray[np.float32]

MAX_SENSORS: Final = 4096
MAX_WINDOWS_PER_MESSAGE: Final = 256


class Windower:
    """Cuts the streams of many sensors into samples of `(*input_shape)` whose last axis is time.

    At most `max_sensors` streams are remembered; the one that has been silent longest is forgotten.
    """

    def __init__(
        self, window: Window, input_shape: tuple[int, ...], *, max_sensors: int = MAX_SENSORS
    ) -> None:
        self._length = window.length
        self._hop = window.hop
        self._shape = input_shape
        self._channels = int(np.prod(input_shape)) // window.length
        self._max_sensors = max_sensors
        self._streams: OrderedDict[str, Array] = OrderedDict()

    def push(self, sensor: str, values: Array) -> list[Array]:
        """Append `values`, get the windows that became complete.

        A flat array of a sensor with several channels holds one value of each channel after the other
        (frame by frame); an array with two axes is `(channels, time)`.

        Raises:
            SampleError: when the values cannot be frames of the model's channels, or are far too many.
        """
        frames = self._frames(values)
        if frames.shape[1] > self._length + MAX_WINDOWS_PER_MESSAGE * self._hop:
            raise SampleError(
                f"{frames.shape[1]} values per channel make more than {MAX_WINDOWS_PER_MESSAGE} windows"
            )
        held = self._streams.pop(sensor, None)
        stream = frames if held is None else np.concatenate((held, frames), axis=1)
        windows: list[Array] = []
        start = 0
        while stream.shape[1] - start >= self._length:
            windows.append(stream[:, start : start + self._length].reshape(self._shape))
            start += self._hop
        # A copy, so that a small remainder does not keep a large payload alive.
        self._streams[sensor] = stream[:, start:].copy()
        if len(self._streams) > self._max_sensors:
            self._streams.popitem(last=False)
        return windows

    def _frames(self, values: Array) -> Array:
        if values.ndim == 2 and values.shape[0] == self._channels:
            return values
        if values.ndim > 1 and min(values.shape) > 1:
            raise SampleError(f"shape {values.shape} where {self._channels} channels are expected")
        if values.size % self._channels:
            raise SampleError(
                f"{values.size} values are no whole number of frames of {self._channels} channels"
            )
        return values.reshape(-1, self._channels).T
