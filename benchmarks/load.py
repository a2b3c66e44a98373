"""Publishes samples and receives answers on one clock, over a bare MQTT 3.1.1 connection.

A client library would use more of the core than the broker does, and what it cannot keep up with would look
like the device's fault. So: packets are put together once per message by hand, a burst is one `send`.

A sample is known by its sensor's name, which is its number; the answer's topic repeats it.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

_CONNECT: Final = 0x10
_CONNACK: Final = 2
_PUBLISH: Final = 3
_PUBACK: Final = 4
_SUBSCRIBE: Final = 0x82
_SUBACK: Final = 9
_NUMBERS: Final = 1 << 16
_MAX_BURST: Final = 64
_U16 = struct.Struct(">H")

OnAnswer = Callable[[int, int, int, bytes], None]
"""The sample's number, when it was sent and answered (`perf_counter_ns`), and the answer."""


@dataclass(slots=True)
class Step:
    """What became of one stretch at one rate. `latency_us` in the order of the answers."""

    sent: int = 0
    sending_s: float = 0.0
    answered: int = 0
    answering_s: float = 0.0
    """From the first sample to the last answer."""
    repeated: int = 0
    latency_us: list[float] = field(default_factory=list)


class LoadGenerator:
    """One connection; not for several threads."""

    def __init__(self, port: int, results: Sequence[str], on_answer: OnAnswer = lambda *_: None) -> None:
        """Connect and subscribe to these filters at QoS 1."""
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=10.0)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = bytearray()
        self._on_answer = on_answer
        self._sent: dict[bytes, tuple[int, int]] = {}
        self._next = 0
        self._step = Step()
        self._start_s = 0.0
        variable = b"\0\4MQTT\4\2\0\0" + _text("load")
        self._socket.sendall(bytes((_CONNECT,)) + _length(len(variable)) + variable)
        self._expect(_CONNACK)
        for number, each in enumerate(results, 1):
            body = _U16.pack(number) + _text(each) + b"\1"
            self._socket.sendall(bytes((_SUBSCRIBE,)) + _length(len(body)) + body)
            self._expect(_SUBACK)
        self._socket.setblocking(False)

    def run(
        self,
        topic: str,
        payloads: Sequence[bytes],
        rate_hz: float,
        count: int,
        *,
        qos: int,
        is_over: Callable[[], bool] = lambda: False,
    ) -> Step:
        """Publish `count` samples below `topic`, taking turns with `payloads`, at an even pace, or until over.

        A generator that falls behind sends a burst; `sending_s` says what the rate was in the end.
        """
        step = self._step = Step()
        self._sent.clear()
        start_s = self._start_s = time.monotonic()
        while step.sent < count and not is_over():
            due = min(int((time.monotonic() - start_s) * rate_hz) + 1, count) - step.sent
            if due > 0:
                self._publish(topic, payloads, min(due, _MAX_BURST), qos)
            wait_s = start_s + step.sent / rate_hz - time.monotonic()
            self._receive(max(wait_s, 0.0))
        step.sending_s = time.monotonic() - start_s
        return step

    def drain(self, *, quiet_s: float, timeout_s: float) -> None:
        """Receive until all is answered, or nothing has come for `quiet_s`."""
        step = self._step
        deadline_s = time.monotonic() + timeout_s
        heard_s = time.monotonic()
        while self._sent and time.monotonic() < min(deadline_s, heard_s + quiet_s):
            before = step.answered
            self._receive(0.05)
            if step.answered > before:
                heard_s = time.monotonic()

    def close(self) -> None:
        """Say goodbye."""
        self._socket.setblocking(True)
        self._socket.sendall(b"\xe0\0")
        self._socket.close()

    def _publish(self, topic: str, payloads: Sequence[bytes], count: int, qos: int) -> None:
        packets = bytearray()
        numbers = []
        for _ in range(count):
            name = b"%d" % (self._next % _NUMBERS)
            payload = payloads[self._next % len(payloads)]
            packet_id = _U16.pack(self._next % 65535 + 1) if qos else b""
            numbers.append((name, self._next))
            self._next += 1
            whole = _text(f"{topic}/{name.decode()}") + packet_id + payload
            packets.append(0x30 | qos << 1)
            packets += _length(len(whole))
            packets += whole
        self._step.sent += count
        now_ns = time.perf_counter_ns()
        for name, number in numbers:
            self._sent[name] = number, now_ns
        self._send(packets)

    def _send(self, data: bytes | bytearray) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[self._socket.send(view) :]
            except BlockingIOError:
                # The broker reads no more before its own answers are read.
                select.select([self._socket], [self._socket], [])
                self._receive(0.0)

    def _receive(self, timeout_s: float) -> None:
        readable, _, _ = select.select([self._socket], [], [], timeout_s)
        if not readable:
            return
        data = self._socket.recv(1 << 18)
        now_ns = time.perf_counter_ns()
        if not data:
            raise ConnectionError("the broker closed the load generator's connection")
        self._buffer += data
        acknowledgements = bytearray()
        for kind, flags, body in self._packets():
            if kind == _PUBLISH:
                (length,) = _U16.unpack_from(body)
                payload = body[2 + length + (2 if flags & 6 else 0) :]
                self._answered(body[2 : 2 + length], payload, now_ns)
                if flags & 6:
                    acknowledgements += b"\x40\2" + body[2 + length : 4 + length]
        self._step.answering_s = time.monotonic() - self._start_s
        if acknowledgements:
            self._send(acknowledgements)

    def _answered(self, topic: bytes, payload: bytes, now_ns: int) -> None:
        sent = self._sent.pop(topic.rpartition(b"/")[2], None)
        if sent is None:
            self._step.repeated += 1
            return
        number, sent_ns = sent
        self._step.answered += 1
        self._step.latency_us.append((now_ns - sent_ns) / 1e3)
        self._on_answer(number, sent_ns, now_ns, payload)

    def _packets(self) -> list[tuple[int, int, bytes]]:
        """Every whole packet that has come: kind, flags, body."""
        found = []
        data = bytes(self._buffer)
        offset = 0
        while offset + 2 <= len(data):
            length, shift, at = 0, 0, offset + 1
            while at < len(data):
                byte = data[at]
                length |= (byte & 0x7F) << shift
                shift += 7
                at += 1
                if byte < 0x80:
                    break
            else:
                break
            if at + length > len(data):
                break
            found.append((data[offset] >> 4, data[offset] & 0xF, data[at : at + length]))
            offset = at + length
        del self._buffer[:offset]
        return found

    def _expect(self, kind: int) -> None:
        """Read one packet; nothing else is under way yet."""
        while True:
            self._buffer += self._socket.recv(4096)
            for found, _, body in self._packets():
                if found != kind or body[-1] >= 0x80:
                    raise ConnectionError(f"the broker answered {found} where {kind} was expected")
                return


def _text(text: str) -> bytes:
    encoded = text.encode()
    return _U16.pack(len(encoded)) + encoded


def _length(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
