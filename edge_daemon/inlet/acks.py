"""QoS 1 messages are acknowledged in the order of their arrival (MQTT 5, section 4.6). No I/O of its own.

A message is finished when every sample made of it is answered and, where one went to the spool, committed.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from edge_cascade.mqtt import Incoming


@dataclass(slots=True, eq=False)
class Ticket:
    """One message and how many of its samples are unfinished."""

    message: Incoming
    unfinished: int = 1
    owner: OrderedAcks | None = field(default=None, repr=False)

    def finish(self) -> None:
        """One sample (or the message itself, if it made none) is dealt with. From any thread."""
        if self.owner is not None:
            self.owner.finish(self)


class OrderedAcks:
    """Acknowledges the longest finished run at the head of the queue."""

    def __init__(self, acknowledge: Callable[[Incoming], None]) -> None:
        self._acknowledge = acknowledge
        self._lock = threading.Lock()
        self._open: deque[Ticket] = deque()

    def __len__(self) -> int:
        return len(self._open)

    def open(self, message: Incoming, parts: int) -> Ticket:
        """Begin a message that makes `parts` samples (0: it is finished by the caller all the same)."""
        if message.qos == 0:
            return Ticket(message)
        ticket = Ticket(message, max(parts, 1), self)
        with self._lock:
            self._open.append(ticket)
        return ticket

    def finish(self, ticket: Ticket) -> None:
        """Count one part down and acknowledge whatever that frees."""
        with self._lock:
            ticket.unfinished -= 1
            while self._open and self._open[0].unfinished <= 0:
                self._acknowledge(self._open.popleft().message)

    def forget_all(self) -> None:
        """The connection is gone: its packet ids mean nothing any more, the broker will redeliver."""
        with self._lock:
            for ticket in self._open:
                ticket.owner = None
            self._open.clear()
