"""The queue between the network's thread and ingest: bounded in messages and in bytes. No MQTT, no store.

When it is full nothing more is taken. What is not taken is not acknowledged, so its device sends it again;
the queue counts it. Waiting instead would keep the network's thread from answering the broker's pings.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import Final

MAX_MESSAGES: Final = 4096
MAX_BYTES: Final = 64 * 2**20
# Python's own share of a small message in the queue.
_OVERHEAD_BYTES: Final = 256


@dataclass(frozen=True, slots=True)
class Taken:
    """A message as it came, and when (monotonic seconds)."""

    topic: str
    payload: bytes
    arrived_s: float


class Intake:
    """A bounded queue of messages with one taker."""

    def __init__(self, *, max_messages: int = MAX_MESSAGES, max_bytes: int = MAX_BYTES) -> None:
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._messages: deque[Taken] = deque()
        self._bytes = 0
        self._changed = threading.Condition()
        self._is_closed = False
        self.not_taken = 0

    def __len__(self) -> int:
        return len(self._messages)

    def offer(self, message: Taken) -> bool:
        """Queue a message; False, and counted, when there is no room or the queue is closed."""
        size = len(message.payload) + _OVERHEAD_BYTES
        with self._changed:
            if self._is_closed or len(self._messages) >= self._max_messages:
                self.not_taken += 1
                return False
            if self._bytes + size > self._max_bytes:
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
            while not self._messages and not self._is_closed:
                self._changed.wait()
            while self._messages and len(taken) < max_messages and taken_bytes < max_bytes:
                message = self._messages.popleft()
                taken.append(message)
                taken_bytes += len(message.payload) + _OVERHEAD_BYTES
            self._bytes -= taken_bytes
        return taken

    def close(self) -> None:
        """Take nothing more; what is queued can still be taken out."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
