"""The queue between the network's thread and ingest: bounded in messages and in bytes. No MQTT, no store.

When it is full nothing more is taken. What is not taken is not acknowledged, so its device sends it again;
the queue counts it. Waiting instead would keep the network's thread from answering the broker's pings.

Statuses are not sent again: a board says that it is there once, and ten thousand do so at once when a broker
comes back. What finds no room of these is kept aside, the newest of each board, and comes out in its turn.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

MAX_MESSAGES: Final = 4096
MAX_BYTES: Final = 64 * 2**20
MAX_ASIDE: Final = 131_072
MAX_ASIDE_BYTES: Final = 64 * 2**20
MAX_STATUS_BYTES: Final = 16 * 2**10
"""A larger one is no status of ours, and finds no place aside."""
# Python's own share of a small message in the queue.
_OVERHEAD_BYTES: Final = 256


@dataclass(frozen=True, slots=True)
class Taken:
    """A message as it came, and when (monotonic seconds)."""

    topic: str
    payload: bytes
    arrived_s: float


class Intake:
    """A bounded queue of messages with one taker. `is_status` tells by its topic what is kept aside."""

    def __init__(
        self,
        *,
        max_messages: int = MAX_MESSAGES,
        max_bytes: int = MAX_BYTES,
        max_aside: int = MAX_ASIDE,
        is_status: Callable[[str], bool] = lambda topic: topic.endswith("/up/status"),
    ) -> None:
        self._is_status = is_status
        self._max_aside = max_aside
        # By topic, in the order of arrival: who speaks again goes to the end.
        self._aside: dict[str, Taken] = {}
        self._aside_bytes = 0
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._messages: deque[Taken] = deque()
        self._bytes = 0
        self._changed = threading.Condition()
        self._is_closed = False
        self.not_taken = 0

    def __len__(self) -> int:
        return len(self._messages) + len(self._aside)

    def offer(self, message: Taken) -> bool:
        """Queue a message; False, and counted, when there is no room or the queue is closed."""
        size = len(message.payload) + _OVERHEAD_BYTES
        with self._changed:
            is_full = len(self._messages) >= self._max_messages or self._bytes + size > self._max_bytes
            # A newer status must not overtake the one before it.
            if not self._is_closed and (is_full or message.topic in self._aside) and self._put_aside(message):
                self._changed.notify()
                return True
            if self._is_closed or is_full:
                self.not_taken += 1
                return False
            self._messages.append(message)
            self._bytes += size
            self._changed.notify()
        return True

    def take(self, max_messages: int, max_bytes: int) -> list[Taken]:
        """Wait for messages and take what is there; an empty list once the queue is closed and drained."""
        taken: list[Taken] = []
        taken_bytes = 0
        with self._changed:
            while not len(self) and not self._is_closed:
                self._changed.wait()
            while len(self) and len(taken) < max_messages and taken_bytes < max_bytes:
                message = self._next()
                taken.append(message)
                taken_bytes += len(message.payload) + _OVERHEAD_BYTES
        return taken

    def close(self) -> None:
        """Take nothing more; what is queued can still be taken out."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _put_aside(self, message: Taken) -> bool:
        if not self._is_status(message.topic) or len(message.payload) > MAX_STATUS_BYTES:
            return False
        before = self._aside.get(message.topic)
        grown = (
            len(message.payload) - len(before.payload) if before else len(message.payload) + _OVERHEAD_BYTES
        )
        if (before is None and len(self._aside) >= self._max_aside) or (
            self._aside_bytes + grown > MAX_ASIDE_BYTES
        ):
            return False
        self._aside.pop(message.topic, None)
        self._aside[message.topic] = message
        self._aside_bytes += grown
        return True

    def _next(self) -> Taken:
        """Whatever came first of both."""
        aside = next(iter(self._aside.values()), None)
        if aside is None or (self._messages and self._messages[0].arrived_s <= aside.arrived_s):
            message = self._messages.popleft()
            self._bytes -= len(message.payload) + _OVERHEAD_BYTES
            return message
        del self._aside[aside.topic]
        self._aside_bytes -= len(aside.payload) + _OVERHEAD_BYTES
        return aside
