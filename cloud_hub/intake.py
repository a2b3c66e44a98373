"""The queue between the network's thread and ingest: bounded in messages and in bytes. No MQTT, no store.

When it is full nothing more is taken, except that the newest of whoever has most gives way to somebody who
has less: a board that floods the hub keeps out nobody but itself. What is not taken, or gives way, is not
acknowledged, so its device sends it again; the queue counts it. Waiting instead would keep the network's
thread from answering the broker's pings.

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


@dataclass(frozen=True, slots=True)
class _Load:
    """What the queue holds of one sender."""

    messages: int = 0
    bytes: int = 0


class Intake:
    """A bounded queue of messages with one taker. By a message's topic `is_status` tells what is kept aside,
    `sender_of` whose it is.
    """

    def __init__(
        self,
        *,
        max_messages: int = MAX_MESSAGES,
        max_bytes: int = MAX_BYTES,
        max_aside: int = MAX_ASIDE,
        is_status: Callable[[str], bool] = lambda topic: topic.endswith("/up/status"),
        sender_of: Callable[[str], str] = lambda topic: topic.rpartition("/up/")[0],
    ) -> None:
        self._is_status = is_status
        self._sender_of = sender_of
        self._max_aside = max_aside
        # By topic, in the order of arrival: who speaks again goes to the end.
        self._aside: dict[str, Taken] = {}
        self._aside_bytes = 0
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._messages: deque[Taken] = deque()
        self._bytes = 0
        self._loads: dict[str, _Load] = {}
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
            if self._is_closed or (is_full and not self._make_room(message, size)):
                self.not_taken += 1
                return False
            self._messages.append(message)
            self._note(message, size)
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

    def _make_room(self, message: Taken, size: int) -> bool:
        """Let the newest messages of whoever has most give way to one of somebody who has less."""
        sender = self._sender_of(message.topic)
        while len(self._messages) >= self._max_messages or self._bytes + size > self._max_bytes:
            largest = max(self._loads, key=lambda name: self._share(self._loads[name]), default=sender)
            own = self._loads.get(sender, _Load())
            grown = self._share(_Load(own.messages + 1, own.bytes + size))
            if largest == sender or self._share(self._loads[largest]) <= grown:
                return False
            if not self._give_way(largest):
                return False
        return True

    def _give_way(self, sender: str) -> bool:
        """Drop the newest message of a sender, whose statuses stay: nobody would send them again."""
        for index in range(len(self._messages) - 1, -1, -1):
            message = self._messages[index]
            if self._sender_of(message.topic) == sender and not self._is_status(message.topic):
                del self._messages[index]
                self._note(message, -len(message.payload) - _OVERHEAD_BYTES)
                self.not_taken += 1
                return True
        return False

    def _note(self, message: Taken, grown: int) -> None:
        """A message came, or went where `grown` is negative."""
        self._bytes += grown
        sender = self._sender_of(message.topic)
        before = self._loads.get(sender, _Load())
        after = _Load(before.messages + (1 if grown > 0 else -1), before.bytes + grown)
        if after.messages:
            self._loads[sender] = after
        else:
            self._loads.pop(sender, None)

    def _share(self, load: _Load) -> float:
        """Of the queue, by whichever it takes more of."""
        return max(load.messages / self._max_messages, load.bytes / self._max_bytes)

    def _next(self) -> Taken:
        """Whatever came first of both."""
        aside = next(iter(self._aside.values()), None)
        if aside is None or (self._messages and self._messages[0].arrived_s <= aside.arrived_s):
            message = self._messages.popleft()
            self._note(message, -len(message.payload) - _OVERHEAD_BYTES)
            return message
        del self._aside[aside.topic]
        self._aside_bytes -= len(aside.payload) + _OVERHEAD_BYTES
        return aside
