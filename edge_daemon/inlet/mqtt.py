"""Sensors over MQTT: topics and payloads -> samples in the queue, acknowledged when they are dealt with."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_cascade.burst import Burst
from edge_cascade.mqtt import Broker, Incoming, MqttSession
from edge_daemon.inlet.acks import OrderedAcks
from edge_daemon.inlet.decode import Decode, SampleError, shape_sample
from edge_daemon.inlet.labels import LabelInlet
from edge_daemon.inlet.queue import Queued, SampleQueue
from edge_daemon.inlet.sources import MAX_SENSOR_LENGTH, TopicPattern, filter_of
from edge_daemon.inlet.window import Windower
from edge_daemon.pipeline import Sample

log = logging.getLogger(__name__)

# How long the broker keeps what was not acknowledged while the daemon restarts.
SESSION_EXPIRY_S = 3600
RECEIVE_MAXIMUM = 1000
# An answer more than this behind its PUBACK is not published: several times what can be unanswered at once.
MAX_UNCONFIRMED = 10_000


@dataclass(frozen=True, slots=True)
class Source:
    """One configured source: where it comes in, how it is decoded, which model answers it."""

    pattern: str
    model: str
    input_shape: tuple[int, ...]
    decode: Decode
    windower: Windower | None


class MqttInlet:
    """The session to the sensors' broker; answers go out through the same one.

    A QoS 1 message is acknowledged after its answers were handed to this session and its cases committed.
    Both travel over one connection in that order, so a broker that has the acknowledgement has the answers.
    """

    def __init__(
        self,
        broker: Broker,
        client_id: str,
        sources: Sequence[Source],
        queue: SampleQueue,
        *,
        max_payload_bytes: int,
        on_malformed: Callable[[str], None],
        labels: LabelInlet | None = None,
        now_s: Callable[[], float] = time.monotonic,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._sources = [(TopicPattern.parse(source.pattern), source) for source in sources]
        self._queue = queue
        self._max_payload_bytes = max_payload_bytes
        self._on_malformed = on_malformed
        self._labels = labels
        self._now_s = now_s
        self._now_ms = now_ms
        self._burst = Burst()
        self._paused = False
        self.session = MqttSession(
            broker,
            client_id,
            subscriptions=[
                *(filter_of(source.pattern) for source in sources),
                *([] if labels is None else [labels.topic_filter]),
            ],
            on_message=self.receive,
            on_down=self._lost,
            expiry_s=SESSION_EXPIRY_S,
            manual_ack=True,
            receive_maximum=RECEIVE_MAXIMUM,
            max_unconfirmed=MAX_UNCONFIRMED,
        )
        self._acks = OrderedAcks(self.session.ack)

    @property
    def unacknowledged(self) -> int:
        """QoS 1 messages that are not yet dealt with."""
        return len(self._acks)

    def pause(self) -> None:
        """Take nothing more: what comes now stays unacknowledged and is redelivered to the next session."""
        self._paused = True

    def receive(self, message: Incoming) -> None:
        """Turn one message into samples; malformed input is counted, never fatal."""
        received_s = self._now_s()
        if self._paused:
            return
        source, sensor = self._route(message.topic)
        if source is None and self._labels is not None and self._labels.takes(message.topic):
            self._labels.receive(message, now_s=received_s)
            self._acks.open(message, 0).finish()
            return
        arrays: list[NDArray[np.float32]] = []
        try:
            if source is None:
                raise SampleError("no configured source matches this topic")
            arrays = self._read(source, sensor, message.payload)
        except SampleError as error:
            self._note_malformed(source, message.topic, error)
        ticket = self._acks.open(message, len(arrays))
        if source is None or not arrays:
            ticket.finish()
            return
        taken_at_ms = self._now_ms()
        for x in arrays:
            self._queue.put(Queued(source.model, Sample(sensor, x, received_s, taken_at_ms), ticket))

    def _route(self, topic: str) -> tuple[Source | None, str]:
        for pattern, source in self._sources:
            sensor = pattern.sensor_of(topic)
            if sensor is not None:
                return source, sensor
        return None, ""

    def _read(self, source: Source, sensor: str, payload: bytes) -> list[NDArray[np.float32]]:
        if len(payload) > self._max_payload_bytes:
            raise SampleError(f"{len(payload)} bytes, at most {self._max_payload_bytes} are read")
        if not 1 <= len(sensor) <= MAX_SENSOR_LENGTH:
            raise SampleError(f"a sensor's name has 1 to {MAX_SENSOR_LENGTH} characters, not {len(sensor)}")
        values = source.decode(payload)
        if source.windower is not None:
            return source.windower.push(sensor, values)
        return [shape_sample(values, source.input_shape)]

    def _note_malformed(self, source: Source | None, topic: str, error: SampleError) -> None:
        self._on_malformed(source.pattern if source is not None else "unmatched")
        kept_back = self._burst.note(now_s=self._now_s())
        if kept_back is not None:
            log.warning("malformed input topic=%s why=%s kept_back=%d", topic[:200], error, kept_back)

    def _lost(self) -> None:
        self._acks.forget_all()
