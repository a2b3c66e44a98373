"""The bounded hand-over from the network thread to the inference thread. What is shed is counted."""

from __future__ import annotations

import queue
from collections.abc import Callable

import msgspec

from edge_daemon.inlet.acks import Ticket
from edge_daemon.pipeline import Sample


class Queued(msgspec.Struct, frozen=True):
    """A sample on its way, the model that will answer it and the message that it is a part of."""

    model: str
    sample: Sample
    ticket: Ticket


class SampleQueue:
    """First in, first out; when full, the oldest sample goes: a late answer is worth least.

    `on_shed` gets what went, in the thread that put. One reader only.
    """

    def __init__(self, max_samples: int, on_shed: Callable[[Queued], None]) -> None:
        self._queue: queue.SimpleQueue[Queued | None] = queue.SimpleQueue()
        self._max_samples = max_samples
        self._on_shed = on_shed

    def __len__(self) -> int:
        return self._queue.qsize()

    def put(self, item: Queued) -> None:
        """Add a sample, shedding the oldest ones beyond the bound."""
        while self._queue.qsize() >= self._max_samples:
            try:
                oldest = self._queue.get_nowait()
            except queue.Empty:
                break
            if oldest is not None:
                self._on_shed(oldest)
        self._queue.put(item)

    def get(self, max_items: int, timeout_s: float) -> list[Queued]:
        """Up to `max_items` samples of one wait; empty after `timeout_s` or when woken by `close`."""
        try:
            first = self._queue.get(timeout=timeout_s)
        except queue.Empty:
            return []
        items = [] if first is None else [first]
        while items and len(items) < max_items:
            try:
                following = self._queue.get_nowait()
            except queue.Empty:
                break
            if following is None:
                break
            items.append(following)
        return items

    def wake(self) -> None:
        """Make a waiting reader return."""
        self._queue.put(None)
