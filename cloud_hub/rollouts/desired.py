"""Tells every board what it should run: retained messages, made of what is stored.

What the broker does not take waits here and is tried again; of a board only the last word counts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Final, Protocol

import msgspec

from cloud_hub.errors import HubError
from cloud_hub.store.database import Database
from cloud_hub.store.desired import desired_devices, desired_states
from edge_cascade.codec import encode
from edge_cascade.messages import SHIPPED, DesiredState
from edge_cascade.topics import down_topic

log = logging.getLogger(__name__)

MAX_AT_ONCE: Final = 500


class Publish(Protocol):
    """Hands a message to the broker; None when it was not taken."""

    def __call__(self, topic: str, payload: bytes, *, retain: bool = False) -> int | None:
        """Publish."""


class DesiredStates:
    """Publishes what boards should run. Not safe for use by two threads.

    `size_of` says how many bytes a release takes on a board's disk; it may raise `HubError`. A board takes no
    more than it was told: so a release of unknown size is not told, and the board goes on with what it runs.
    """

    def __init__(
        self, database: Database, publish: Publish, *, prefix: str, size_of: Callable[[int], int]
    ) -> None:
        self._database = database
        self._publish = publish
        self._prefix = prefix
        self._size_of = size_of
        self._sizes: dict[str, int] = {}
        # In the order in which they are told; a dict for its order.
        self._waiting: dict[str, None] = {}
        self._unsized: set[str] = set()
        self._told_less: set[str] = set()

    def tell(self, devices: Iterable[str]) -> None:
        """Tell these boards with the next `flush`."""
        self._waiting.update(dict.fromkeys(devices))

    def tell_all(self) -> None:
        """Tell every board of which anything is desired.

        Raises:
            StoreError: when the store is away.
        """
        self.tell(self._database.run(desired_devices))

    def flush(self) -> None:
        """Publish what waits, as far as the broker takes it.

        Raises:
            StoreError: when the store is away; what waits goes on waiting.
        """
        if self._unsized and any(self._size(release) is not None for release in sorted(self._unsized)):
            self.tell(sorted(self._told_less))
            self._unsized.clear()
            self._told_less.clear()
        while self._waiting:
            devices = list(self._waiting)[:MAX_AT_ONCE]
            states = self._database.run(partial(desired_states, devices=devices))
            if not self._send(devices, states):
                return

    def _send(self, devices: Iterable[str], states: Mapping[str, DesiredState]) -> bool:
        for device in devices:
            state = states.get(device)
            if state is not None:
                sized = self._sized(state)
                if len(sized.models) < len(state.models):
                    self._told_less.add(device)
                payload = encode(sized)
                if self._publish(down_topic(self._prefix, device, "desired"), payload, retain=True) is None:
                    return False
            del self._waiting[device]
        return True

    def _sized(self, state: DesiredState) -> DesiredState:
        models = []
        for model in state.models:
            size_bytes = 0 if model.release == SHIPPED else self._size(model.release)
            if size_bytes is not None:
                models.append(msgspec.structs.replace(model, size_bytes=size_bytes))
        return msgspec.structs.replace(state, models=models)

    def _size(self, release: str) -> int | None:
        # A bundle's content never changes, and neither does its size.
        if release not in self._sizes:
            try:
                self._sizes[release] = self._size_of(int(release))
            except HubError as error:
                level = logging.DEBUG if release in self._unsized else logging.WARNING
                log.log(level, "release not told, its size is unknown release=%s reason=%s", release, error)
                self._unsized.add(release)
                return None
        return self._sizes[release]
