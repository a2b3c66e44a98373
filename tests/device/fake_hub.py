"""A hub that speaks the protocol and does as it is told. No store, no model."""

from __future__ import annotations

import threading

from edge_cascade.codec import Reassembler, decode, encode, frame_digest, split_frame
from edge_cascade.messages import (
    Acks,
    BaseRequest,
    CaseBatch,
    Chunk,
    ClientUpdate,
    Receipts,
    Refusal,
    Rejection,
    Report,
    Status,
)
from edge_cascade.mqtt import Broker, MqttSession
from edge_cascade.topics import UP, down_topic, fleet_filter, parse_topic
from tests.device.spooling_cases import wait_until


class FakeHub:
    """Remembers what it got. `answer` is called for every frame of cases, updates and reports.

    `is_silent` from the start: a device that waits may send before anybody could set `answer`.
    """

    def __init__(self, port, device="dev-1", prefix="edge", is_silent=False):
        self.device, self.prefix = device, prefix
        self.stored: dict[tuple[bytes, int], object] = {}
        self.deliveries: list[tuple[bytes, int]] = []
        self.batches: list[tuple[int, ...]] = []
        self.statuses: list[Status] = []
        self.receipts: list[tuple[int, int]] = []
        self.base_requests: list[BaseRequest] = []
        self.payload_sizes: list[int] = []
        self.lock = threading.Lock()
        self.answer = self.stay_silent if is_silent else self.acknowledge
        self._reassembler = Reassembler()
        self._session = MqttSession(
            Broker(port=port),
            "hub",
            subscriptions=[fleet_filter(prefix, channel) for channel in UP],
            on_message=self._receive,
        )

    def __enter__(self):
        self._session.start()
        # Up is not enough: what is published before the broker has the subscription goes to nobody.
        wait_until(lambda: self._session.is_listening, what="the hub is subscribed")
        return self

    def __exit__(self, *_):
        self._session.stop()

    def send(self, channel, message, max_payload_bytes=100_000):
        for payload in split_frame(encode(message), max_payload_bytes):
            self.send_raw(channel, payload)

    def send_raw(self, channel, payload, retain=False):
        topic = down_topic(self.prefix, self.device, channel)
        assert self._session.publish(topic, payload, retain=retain) is not None

    def retain(self, channel, message):
        """So that the device hears it whenever it subscribes."""
        self.send_raw(channel, encode(message), retain=True)

    # --- answers ---

    def acknowledge(self, frame, names):
        new = [seq for boot, seq in names if (boot, seq) not in self.stored]
        old = [seq for boot, seq in names if (boot, seq) in self.stored]
        self.send("acks", Acks(names[0][0], new, old))
        return names

    def stay_silent(self, frame, names):
        return names

    def forget(self, frame, names):
        return []

    def reject(self, frame, names):
        self.send("acks", Acks(names[0][0], [], [], [Rejection(seq, "not today") for _, seq in names]))
        return []

    def refuse(self, frame, names):
        self.send("acks", Acks(names[0][0], refused=[Refusal(frame_digest(frame), "cannot read this")]))
        return []

    # --- what comes ---

    def _receive(self, incoming):
        with self.lock:
            self._read(parse_topic(self.prefix, incoming.topic).channel, incoming.payload)

    def _read(self, channel, payload):
        if not payload:
            return
        self.payload_sizes.append(len(payload))
        message, frame = decode(payload), payload
        if isinstance(message, Chunk):
            frame = self._reassembler.add(message)
            if frame is None:
                return
            message = decode(frame)
        match channel, message:
            case "status", Status():
                self.statuses.append(message)
            case "telemetry", Receipts():
                self.receipts += [(receipt.seq, receipt.revision) for receipt in message.receipts]
            case "telemetry", BaseRequest():
                self.base_requests.append(message)
            case "cases", CaseBatch():
                self.batches.append(tuple(case.seq for case in message.cases))
                self._store(frame, {(message.boot, case.seq): case for case in message.cases})
            case "update", ClientUpdate():
                self._store(frame, {(message.boot, message.seq): message})
            case "telemetry", Report():
                self._store(frame, {(message.boot, message.seq): message})
            case _:
                raise AssertionError(f"{type(message).__name__} on {channel}")

    def _store(self, frame, items):
        self.deliveries += items
        for name in self.answer(frame, list(items)):
            self.stored.setdefault(name, items[name])
