"""Labels from the site: topics and payloads -> a sensor, a class and the answer that it is about. No I/O."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from edge_cascade.burst import Burst
from edge_cascade.mqtt import Incoming
from edge_daemon.inlet.sources import MAX_SENSOR_LENGTH

log = logging.getLogger(__name__)

MAX_PAYLOAD_BYTES: Final = 1024
MAX_LABEL_LENGTH: Final = 256

OnLabel = Callable[[str, str, str | None], None]
"""Sensor; the class's name, or its index in decimal; the answer's id, None for the sensor's last answer."""


class LabelError(ValueError):
    """A payload that is no label: says what was found and what was expected."""


class SiteLabel(msgspec.Struct, frozen=True):
    """What a payload says."""

    label: (
        Annotated[str, Meta(min_length=1, max_length=MAX_LABEL_LENGTH)] | Annotated[int, Meta(ge=0, lt=2**16)]
    )
    id: Annotated[str, Meta(min_length=1, max_length=64)] | None = None


_object_decoder: Final = msgspec.json.Decoder(SiteLabel)
_text_decoder: Final = msgspec.json.Decoder(str)


def labels_filter(prefix: str) -> str:
    """The MQTT topic filter of all labels; a sensor's name may have levels."""
    return f"{prefix}/+/#"


def decode_label(payload: bytes) -> SiteLabel:
    """The label in a payload: a JSON object, a JSON string, or text as it is.

    Raises:
        LabelError: for anything else.
    """
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise LabelError(f"{len(payload)} bytes, at most {MAX_PAYLOAD_BYTES} are read")
    try:
        text = payload.decode().strip()
        if text.startswith("{"):
            return _object_decoder.decode(text)
        if text.startswith('"'):
            text = _text_decoder.decode(text)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise LabelError(f"no label: {error}") from error
    if not 1 <= len(text) <= MAX_LABEL_LENGTH or not text.isprintable():
        raise LabelError(f"a label has 1 to {MAX_LABEL_LENGTH} printable characters")
    return SiteLabel(text)


class LabelInlet:
    """Reads what comes below the labels' prefix; malformed input is counted, never fatal."""

    def __init__(self, prefix: str, on_label: OnLabel, on_malformed: Callable[[str], None]) -> None:
        self.topic_filter = labels_filter(prefix)
        self._start = f"{prefix}/"
        self._on_label = on_label
        self._on_malformed = on_malformed
        self._burst = Burst()

    def takes(self, topic: str) -> bool:
        """Whether labels come on this topic."""
        return topic.startswith(self._start)

    def receive(self, message: Incoming, *, now_s: float) -> None:
        """Pass one label on."""
        sensor = message.topic.removeprefix(self._start)
        try:
            if not 1 <= len(sensor) <= MAX_SENSOR_LENGTH:
                raise LabelError(f"a sensor's name has 1 to {MAX_SENSOR_LENGTH} characters")
            label = decode_label(message.payload)
            if message.retained and label.id is None:
                raise LabelError("retained without an id: it would label another answer at each connection")
        except LabelError as error:
            self._on_malformed(self.topic_filter)
            kept_back = self._burst.note(now_s=now_s)
            if kept_back is not None:
                log.warning(
                    "malformed label topic=%s why=%s kept_back=%d", message.topic[:200], error, kept_back
                )
            return
        self._on_label(sensor, str(label.label), label.id)
