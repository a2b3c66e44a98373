"""paho's client with a short way for the two packets that come all day: PUBLISH and PUBACK.

paho builds its tables of MQTT 5 properties and reason codes anew for every packet, and that takes several
times as long as reading it. Nobody here asks for the properties of a message, so the short way steps over
them, and the two usual reasons in a PUBACK are made once; whatever is not of the usual form is left to paho.

It replaces methods that paho keeps for itself, so it is used only with the versions whose insides it knows;
with any other paho everything works as before, only slower.
"""

from __future__ import annotations

import struct
from typing import Final, Literal

import paho.mqtt.client as paho
from paho.mqtt import __version__ as paho_version
from paho.mqtt.enums import MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

_U16: Final = struct.Struct("!H")
# By what stands behind the packet id: MQTT 5, section 3.4.2.1.
_REASONS: Final = {
    b"": ReasonCode(PacketTypes.PUBACK, "Success"),
    b"\x00": ReasonCode(PacketTypes.PUBACK, "Success"),
    b"\x10": ReasonCode(PacketTypes.PUBACK, "No matching subscribers"),
}
_NO_PROPERTIES: Final = Properties(PacketTypes.PUBACK)  # type: ignore[no-untyped-call]


KNOWN_PAHO: Final = ("2.1.", "2.2.")


def client_class() -> type[paho.Client]:
    """The short way where paho is known, else paho as it is."""
    return ShortWayClient if paho_version.startswith(KNOWN_PAHO) else paho.Client


class ShortWayClient(paho.Client):
    """Messages come without `properties` and `timestamp`, all else is as paho has it."""

    def _handle_publish(self) -> MQTTErrorCode:
        header, packet = self._in_packet["command"], bytes(self._in_packet["packet"])
        found = read_publish(header, packet, has_properties=self._protocol == MQTTProtocolVersion.MQTTv5)
        if found is None:
            return super()._handle_publish()
        topic, packet_id, payload = found
        message = paho.MQTTMessage(packet_id, topic)
        message.dup = bool(header & 0x08)
        message.qos = header >> 1 & 0x03
        message.retain = bool(header & 0x01)
        message.payload = payload
        self._handle_on_message(message)
        if message.qos == 0 or self._manual_ack:
            return MQTTErrorCode.MQTT_ERR_SUCCESS
        return self._send_puback(packet_id)

    def _handle_pubackcomp(self, cmd: Literal["PUBACK", "PUBCOMP"]) -> MQTTErrorCode:
        packet = bytes(self._in_packet["packet"])
        reason = _REASONS.get(packet[2:])
        if cmd != "PUBACK" or len(packet) < 2 or reason is None:
            return super()._handle_pubackcomp(cmd)
        (packet_id,) = _U16.unpack_from(packet)
        with self._out_message_mutex:
            if packet_id in self._out_messages:
                return self._do_on_publish(packet_id, reason, _NO_PROPERTIES)
        return MQTTErrorCode.MQTT_ERR_SUCCESS


def read_publish(header: int, packet: bytes, *, has_properties: bool) -> tuple[bytes, int, bytes] | None:
    """Topic, packet id (0 at QoS 0) and payload; None for what is malformed, of QoS 2 or otherwise unusual.

    `header` is the packet's first byte, `packet` what follows its length (MQTT 5, section 3.3).
    """
    qos = header >> 1 & 0x03
    packet_id = 0
    try:
        end = 2 + _U16.unpack_from(packet)[0]
        topic = packet[2:end]
        if qos:
            (packet_id,) = _U16.unpack_from(packet, end)
            end += 2
        if has_properties:
            length = packet[end]
            if length > 0x7F:
                return None
            end += 1 + length
    except (struct.error, IndexError):
        return None
    if qos > 1 or not topic or end > len(packet):
        return None
    return topic, packet_id, packet[end:]
