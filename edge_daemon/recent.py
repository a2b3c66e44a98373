"""The last samples of every sensor, so that a label that comes a moment later still finds its input. No I/O.

Written by the inference thread, read by whoever brings labels: a lock, held for a few lines.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

MAX_PER_SENSOR: Final = 16
MAX_SENSOR_BYTES: Final = 64 * 2**10
MAX_BYTES: Final = 16 * 2**20
OVERHEAD_BYTES: Final = 512
"""What a remembered sample takes beside its values."""


# One is made per sample, and a frozen dataclass takes four times as long to make.
class Seen(msgspec.Struct, frozen=True):
    """An answered sample. `label` and `probability` are the board's own, None and NaN where it had none.

    `answer_id` is the id of its answer. `is_sent`: a verdict will say whether it may train.
    """

    model: str
    sensor: str
    answer_id: str
    x: NDArray[np.float32]
    label: int | None
    probability: float
    is_sent: bool


class RecentSamples:
    """Remembers by sensor; the sensor that has been silent longest is forgotten first."""

    def __init__(self, *, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._size_bytes = 0
        self._sensors: OrderedDict[str, deque[Seen]] = OrderedDict()
        self._barred: set[str] = set()
        self._lock = threading.Lock()

    def add(self, seen: Seen) -> None:
        """Remember one more; the oldest of its sensor make room."""
        size_bytes = seen.x.nbytes + OVERHEAD_BYTES
        with self._lock:
            samples = self._sensors.get(seen.sensor)
            if samples is None:
                samples = self._sensors[seen.sensor] = deque()
            else:
                self._sensors.move_to_end(seen.sensor)
            samples.append(seen)
            self._size_bytes += size_bytes
            while len(samples) > 1 and (
                len(samples) > MAX_PER_SENSOR or len(samples) * size_bytes > MAX_SENSOR_BYTES
            ):
                self._forget(samples.popleft())
            while self._size_bytes > self._max_bytes:
                _, silent = self._sensors.popitem(last=False)
                for each in silent:
                    self._forget(each)

    def find(self, sensor: str, answer_id: str | None) -> Seen | None:
        """The sample with this answer, or the last one; None if it is not remembered or was barred."""
        with self._lock:
            samples = self._sensors.get(sensor, ())
            for seen in reversed(samples):
                if answer_id in {None, seen.answer_id}:
                    return None if seen.answer_id in self._barred else seen
        return None

    def bar(self, sensor: str, answer_id: str) -> None:
        """Never find this sample again."""
        with self._lock:
            if any(seen.answer_id == answer_id for seen in self._sensors.get(sensor, ())):
                self._barred.add(answer_id)

    def _forget(self, seen: Seen) -> None:
        self._size_bytes -= seen.x.nbytes + OVERHEAD_BYTES
        self._barred.discard(seen.answer_id)
