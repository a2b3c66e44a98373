"""Sends verdicts until their devices confirm them, on one thread of its own.

What is to be sent is a query; the names in memory are only hints about where to look first. A sweep over the
devices finds whatever no hint named: repetitions, and everything that was due when the hub last stopped.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable
from typing import Final

from sqlalchemy import Connection, select

from cloud_hub.core.outbox import DueVerdict, next_send_ms, select_frames, select_turn
from cloud_hub.store import schema
from cloud_hub.store.database import Database
from cloud_hub.store.verdicts import devices_with_due, due_verdicts, note_sent
from cloud_hub.thread_loop import ThreadLoop
from edge_cascade.codec import encode
from edge_cascade.messages import BOOT_BYTES, Acks
from edge_cascade.topics import down_topic

MAX_DEVICES_PER_TURN: Final = 32
MAX_VERDICTS_PER_DEVICE: Final = 256
MAX_FRAME_BYTES: Final = 48 * 1024
SWEEP_S: Final = 1.0
# Verdicts that come within this moment share a frame and a commit.
GATHER_S: Final = 0.01

Publish = Callable[[str, bytes], int | None]


class Outbox(ThreadLoop):
    """Sends verdicts. `publish` returns None when a message was not taken: it stays due."""

    def __init__(
        self,
        database: Database,
        publish: Publish,
        *,
        prefix: str,
        clock_ms: Callable[[], int] = lambda: time.monotonic_ns() // 1_000_000,
        rng: random.Random | None = None,
        sweep_s: float = SWEEP_S,
    ) -> None:
        super().__init__("outbox", gather_s=GATHER_S)
        self._database = database
        self._publish = publish
        self._prefix = prefix
        self._clock_ms = clock_ms
        self._rng = rng or random.Random()  # noqa: S311 - spreads load, guards nothing
        self._sweep_s = sweep_s
        self._waiting: list[str] = []
        self._hinted: set[str] = set()
        self._swept_to = ""
        self._next_sweep_s = 0.0
        self._gate = threading.Lock()
        self._is_to_greet = threading.Event()
        self.frames_sent = 0
        self.verdicts_sent = 0

    def hint(self, devices: Iterable[str]) -> None:
        """Say that these devices have something new."""
        with self._gate:
            self._hinted.update(devices)
        self.wake()

    def greet(self) -> None:
        """Tell every board that the hub is here: those that wait for it need not wait any longer."""
        self._is_to_greet.set()
        self.wake()

    def take_turn(self) -> bool:
        """Serve some devices, a bounded amount each; whether somebody is still waiting.

        Raises:
            StoreError: what was sent may be sent once more.
        """
        with self._gate:
            hinted, self._hinted = self._hinted, set()
            turn = select_turn(self._waiting, sorted(hinted), limit=MAX_DEVICES_PER_TURN)
            served = set(turn)
            queue = dict.fromkeys((*self._waiting, *sorted(hinted)))
            self._waiting = [device for device in queue if device not in served]
        now_ms = self._clock_ms()
        due = self._database.run(lambda c: _due(c, turn, now_ms))
        sent: list[tuple[DueVerdict, int]] = []
        for device, online, verdicts in due:
            delivered = self._send(device, verdicts)
            sent += [
                (
                    verdict,
                    next_send_ms(verdict.sends + 1, online=online, now_ms=now_ms, jitter=self._rng.random()),
                )
                for verdict in delivered
            ]
            if len(delivered) == MAX_VERDICTS_PER_DEVICE:
                self._waiting.append(device)
        if sent:
            self._database.run(lambda c: note_sent(c, sent))
        return bool(self._waiting)

    def sweep(self) -> None:
        """Look for the next devices with something due, in the order of their names.

        Raises:
            StoreError: the next sweep looks again.
        """
        now_ms = self._clock_ms()
        found = self._database.run(
            lambda c: devices_with_due(c, after=self._swept_to, now_ms=now_ms, limit=MAX_DEVICES_PER_TURN)
        )
        self._swept_to = found[-1] if len(found) == MAX_DEVICES_PER_TURN else ""
        with self._gate:
            self._hinted.update(found)

    def run_once(self) -> float:
        """Sweep when it is time, greet when asked, and serve some devices; see `ThreadLoop`.

        Raises:
            StoreError: what was sent may be sent once more.
        """
        if time.monotonic() >= self._next_sweep_s:
            self._next_sweep_s = time.monotonic() + self._sweep_s
            self.sweep()
        if self._is_to_greet.is_set():
            self._is_to_greet.clear()
            self._greet_all()
        is_busy = self.take_turn()
        return 0.0 if is_busy else max(0.0, self._next_sweep_s - time.monotonic())

    def _greet_all(self) -> None:
        table = schema.devices
        names = self._database.run(lambda c: c.execute(select(table.c.name)).scalars().all())
        greeting = encode(Acks(bytes(BOOT_BYTES)))
        for name in names:
            self._publish(down_topic(self._prefix, name, "acks"), greeting)

    def _send(self, device: str, verdicts: list[DueVerdict]) -> list[DueVerdict]:
        delivered: list[DueVerdict] = []
        topic = down_topic(self._prefix, device, "verdicts")
        for frame, contents in select_frames(verdicts, max_bytes=MAX_FRAME_BYTES):
            if self._publish(topic, encode(frame)) is None:
                break
            self.frames_sent += 1
            self.verdicts_sent += len(contents)
            delivered += contents
        return delivered


def _due(connection: Connection, turn: list[str], now_ms: int) -> list[tuple[str, bool, list[DueVerdict]]]:
    table = schema.devices
    online = set(
        connection.execute(select(table.c.name).where(table.c.name.in_(turn), table.c.online)).scalars()
    )
    found = (
        (device, due_verdicts(connection, device, now_ms=now_ms, limit=MAX_VERDICTS_PER_DEVICE))
        for device in turn
    )
    return [(device, device in online, verdicts) for device, verdicts in found if verdicts]
