"""Taking turns at what only one thread may do at a time; whoever waits can be told to stop waiting."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from edge_daemon.errors import StoppedError

_LOOK_S: Final = 0.2


@contextmanager
def turn(gate: threading.Lock, stop: threading.Event | None = None) -> Iterator[None]:
    """Hold `gate`.

    Raises:
        StoppedError: `stop` was set before the gate was free.
    """
    # A lock cannot wait for an event too.
    while not gate.acquire(timeout=-1 if stop is None else _LOOK_S):
        if stop is not None and stop.is_set():
            raise StoppedError("stopped while others had their turn")
    try:
        yield
    finally:
        gate.release()
