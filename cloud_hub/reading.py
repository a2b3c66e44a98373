"""From an MQTT message to a `Delivery`: sizes, frame, chunks, kind, sender. No I/O.

The broker decides who may publish where; the sender that a payload names must be the one of its topic all
the same. A frame that cannot be read at all becomes a delivery that is refused by its digest, so that the
device can let go of it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from cloud_hub.core.admission import (
    RejectedError,
    Shape,
    admit_base_request,
    admit_batch,
    admit_shadow,
    admit_swap,
    admit_update,
    check_text,
)
from cloud_hub.core.delivery import Delivery, NewReport, NewStatus
from cloud_hub.intake import Taken
from edge_cascade.codec import Reassembler, decode, frame_digest
from edge_cascade.errors import ProtocolError, TooLargeError
from edge_cascade.messages import (
    BaseRequest,
    CaseBatch,
    Chunk,
    ClientUpdate,
    Message,
    Receipt,
    Receipts,
    Report,
    ShadowReport,
    Status,
    SwapReport,
)
from edge_cascade.topics import Topic, parse_topic

MAX_FRAME_BYTES: Final = 16 * 2**20
MAX_HELD_BYTES: Final = 128 * 2**20
MAX_CHUNKING_DEVICES: Final = 1024


class FleetReassembler:
    """A `Reassembler` per device, and a bound over all of them; whoever was quiet longest is forgotten."""

    def __init__(
        self,
        *,
        max_frame_bytes: int = MAX_FRAME_BYTES,
        max_held_bytes: int = MAX_HELD_BYTES,
        max_devices: int = MAX_CHUNKING_DEVICES,
    ) -> None:
        self._max_frame_bytes = max_frame_bytes
        self._max_held_bytes = max_held_bytes
        self._max_devices = max_devices
        self._of: OrderedDict[str, Reassembler] = OrderedDict()
        self._held_bytes = 0

    @property
    def held_bytes(self) -> int:
        """Bytes of incomplete frames in memory."""
        return self._held_bytes

    def add(self, device: str, chunk: Chunk) -> bytes | None:
        """The whole frame, once its last chunk is here.

        Raises:
            ProtocolError: as `Reassembler.add` does.
        """
        reassembler = self._of.setdefault(device, Reassembler(max_held_bytes=self._max_frame_bytes))
        self._of.move_to_end(device)
        before = reassembler.held_bytes
        try:
            return reassembler.add(chunk)
        finally:
            self._held_bytes += reassembler.held_bytes - before
            if reassembler.held_bytes == 0:
                del self._of[device]
            while self._held_bytes > self._max_held_bytes or len(self._of) > self._max_devices:
                _, forgotten = self._of.popitem(last=False)
                self._held_bytes -= forgotten.held_bytes


class Reader:
    """Reads the messages of a fleet. `shapes` gives what is known of the models at that moment."""

    def __init__(
        self,
        prefix: str,
        *,
        holdout_share: float,
        max_payload_bytes: int,
        shapes: Callable[[], Mapping[str, Shape]],
        max_frame_bytes: int = MAX_FRAME_BYTES,
        reassembler: FleetReassembler | None = None,
    ) -> None:
        self._prefix = prefix
        self._holdout_share = holdout_share
        self._max_payload_bytes = max_payload_bytes
        self._max_frame_bytes = max_frame_bytes
        self._shapes = shapes
        self._reassembler = reassembler or FleetReassembler(max_frame_bytes=max_frame_bytes)

    def read(self, taken: Taken) -> Delivery | None:
        """What the message brought, None for a piece of something that is not whole yet."""
        try:
            topic = parse_topic(self._prefix, taken.topic)
        except ProtocolError as error:
            return _refused(None, b"", "topic", str(error))
        if not taken.payload and topic.channel == "status":
            # How MQTT clears a retained message: an operator tidies up, no device speaks.
            return None
        digest = frame_digest(taken.payload)
        try:
            self._check_size(taken.payload)
            message = decode(taken.payload, max_body_bytes=self._max_frame_bytes)
            if isinstance(message, Chunk):
                digest = message.digest[:8]
                frame = self._reassembler.add(topic.device, message)
                if frame is None:
                    return None
                message = decode(frame, max_body_bytes=self._max_frame_bytes)
            return self._read_message(topic, message, digest)
        except RejectedError as error:
            return _refused(topic.device, digest, error.kind, str(error))
        except ProtocolError as error:
            kind = "oversize" if isinstance(error, TooLargeError) else "frame"
            return _refused(topic.device, digest, kind, str(error))

    def _check_size(self, payload: bytes) -> None:
        if len(payload) > self._max_payload_bytes:
            raise TooLargeError(f"payload of {len(payload)} bytes, at most {self._max_payload_bytes}")

    def _read_message(self, topic: Topic, message: Message, digest: bytes) -> Delivery:
        delivery = Delivery(topic.device, digest)
        match message:
            case CaseBatch():
                _check_sender(topic, message.device)
                delivery.boot = message.boot
                admit_batch(
                    message,
                    delivery,
                    known=self._shapes(),
                    holdout_share=self._holdout_share,
                    max_bytes=self._max_frame_bytes,
                )
            case ClientUpdate():
                _check_sender(topic, message.device)
                delivery.boot = message.boot
                delivery.update = admit_update(message)
            case Report():
                _check_sender(topic, message.device)
                delivery.boot = message.boot
                delivery.report = NewReport(
                    message.device, message.boot, message.seq, message.taken_at_ms, message.counters
                )
            case Status():
                _check_sender(topic, message.device)
                if topic.channel != "status":
                    raise RejectedError("kind", "a Status belongs on the status channel")
                check_text("daemon version", message.daemon_version)
                delivery.status = NewStatus(
                    message.device,
                    message.online,
                    message.boot,
                    message.daemon_version,
                    tuple(message.models),
                )
            case SwapReport():
                _check_sender(topic, message.device)
                delivery.boot = message.boot
                delivery.swap = admit_swap(message)
            case ShadowReport():
                _check_sender(topic, message.device)
                delivery.boot = message.boot
                delivery.shadow = admit_shadow(message)
            case BaseRequest():
                _check_sender(topic, message.device)
                delivery.base_request = admit_base_request(message)
            case Receipts():
                delivery.receipts = _last_of_each(message.receipts)
            case _:
                raise RejectedError("kind", f"a {type(message).__name__} is nothing that a device sends")
        return delivery


def _last_of_each(receipts: Iterable[Receipt]) -> tuple[Receipt, ...]:
    """The highest revision of each verdict: a thousand of one are a few bytes to send, and cost as one."""
    last: dict[tuple[bytes, int], Receipt] = {}
    for receipt in receipts:
        name = (receipt.boot, receipt.seq)
        if name not in last or receipt.revision > last[name].revision:
            last[name] = receipt
    return tuple(last.values())


def _check_sender(topic: Topic, device: str) -> None:
    if device != topic.device:
        raise RejectedError("device", f"the payload names the device {device[:64]!r}, not the topic's")


def _refused(device: str | None, digest: bytes, kind: str, reason: str) -> Delivery:
    delivery = Delivery(device, digest, refused=reason)
    delivery.counts[f"malformed/{kind}"] += 1
    return delivery
