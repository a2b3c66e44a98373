"""The frame of what works beside the answers: others put something in, a thread deals with it. No I/O.

It must hold nobody up: what does not fit is not taken. A defect costs the one thing in hand, is said once a
burst, and keeps nothing else from being dealt with.

The thread has the priority of all others. One of a lower one that holds the interpreter's lock, and is not
run because other processes are, would hold up every answer.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Final, Generic, TypeVar

from edge_cascade.burst import Burst
from edge_daemon.ports import Clock

log = logging.getLogger(__name__)

MAX_WAITING: Final = 64
LOOK_S: Final = 1.0
STOP_S: Final = 5.0

ItemT = TypeVar("ItemT")


class SideThread(ABC, Generic[ItemT]):
    """Takes turns on one thread of its own, from `start` to `stop`, which are called once each."""

    def __init__(self, name: str, clock: Clock) -> None:
        self._name = name
        self._clock = clock
        self._items: queue.Queue[ItemT | None] = queue.Queue(MAX_WAITING)
        self._burst = Burst()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @abstractmethod
    def turn(self, item: ItemT | None) -> None:
        """Deal with what was put in. None: somebody gave a sign, or a second has gone by."""

    def end(self) -> None:
        """Do what is left to do at a stop, as the last thing on the thread."""

    # --- other threads -------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread; samples are answered and the spool is open by now."""
        self._thread.start()

    def stop(self) -> None:
        """Finish the turn at hand and what is left to do, and end the thread."""
        self._stopping.set()
        self.wake()
        if self._thread.is_alive():
            self._thread.join(STOP_S)

    def wake(self) -> None:
        """Give a sign: there may be something to do."""
        # Full: it is awake.
        with contextlib.suppress(queue.Full):
            self._items.put_nowait(None)

    def offer(self, item: ItemT) -> bool:
        """Put something in; whether it was taken."""
        try:
            self._items.put_nowait(item)
        except queue.Full:
            return False
        return True

    @property
    def is_full(self) -> bool:
        """Whether nothing more would be taken now."""
        return self._items.full()

    # --- the thread ----------------------------------------------------------------------------------------

    def guard(self, act: Callable[..., None], *arguments: object) -> None:
        """Do it; a defect in it is said and goes no further."""
        try:
            act(*arguments)
        except Exception:
            # It must not keep anything from being dealt with later.
            if self._burst.note(now_s=self._clock.monotonic_s()) is not None:
                log.exception("turn failed thread=%s", self._name)

    def left(self) -> Iterator[ItemT]:
        """What was put in and not dealt with, each once."""
        with contextlib.suppress(queue.Empty):
            while True:
                item = self._items.get_nowait()
                if item is not None:
                    yield item

    def _run(self) -> None:
        while not self._stopping.is_set():
            item = None
            with contextlib.suppress(queue.Empty):
                item = self._items.get(timeout=LOOK_S)
            self.guard(self.turn, item)
        self.guard(self.end)
