"""The short way through paho reads what paho reads."""

import struct

import paho.mqtt.client as paho
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt import _packet
from paho.mqtt.enums import MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edge_cascade import mqtt_client
from edge_cascade.mqtt_client import _REASONS, read_publish

words = st.text("abc", max_size=20)


def published(topic, payload, *, qos, packet_id, properties):
    """A PUBLISH behind its length; `properties` is None for MQTT 3.1.1."""
    name = topic.encode()
    packet = struct.pack("!H", len(name)) + name
    if qos:
        packet += struct.pack("!H", packet_id)
    if properties is not None:
        packet += properties.pack()
    return 0x30 | qos << 1, packet + payload


def with_properties(pairs):
    properties = Properties(PacketTypes.PUBLISH)
    for pair in pairs:
        properties.UserProperty = pair
    return properties


@given(
    topic=st.text(st.characters(codec="utf-8", exclude_characters="\0+#"), min_size=1, max_size=200),
    payload=st.binary(max_size=600),
    qos=st.sampled_from([0, 1]),
    packet_id=st.integers(1, 65535),
    pairs=st.lists(st.tuples(words, words), max_size=2),
    is_five=st.booleans(),
)
def test_a_message_is_read_as_paho_reads_it(topic, payload, qos, packet_id, pairs, is_five):
    properties = with_properties(pairs) if is_five else None
    header, packet = published(topic, payload, qos=qos, packet_id=packet_id, properties=properties)
    protocol = MQTTProtocolVersion.MQTTv5 if is_five else MQTTProtocolVersion.MQTTv311
    expected = _packet.decode_publish(header, packet, protocol)
    found = read_publish(header, packet, has_properties=is_five)
    assert found == (expected.topic, expected.mid, expected.payload)


@given(header=st.integers(0x30, 0x3F), packet=st.binary(max_size=40), has_properties=st.booleans())
def test_bytes_of_any_kind_are_read_or_left_to_paho(header, packet, has_properties):
    found = read_publish(header, packet, has_properties=has_properties)
    assert found is None or len(found[0]) + len(found[2]) <= len(packet)


@pytest.mark.parametrize(
    ("qos", "pairs"), [(2, []), (1, [("key", "v" * 100)] * 2)], ids=["QoS 2", "many properties"]
)
def test_what_is_unusual_is_left_to_paho(qos, pairs):
    header, packet = published("a", b"b", qos=qos, packet_id=1, properties=with_properties(pairs))
    assert read_publish(header, packet, has_properties=True) is None


@pytest.mark.parametrize("behind_the_id", _REASONS)
def test_a_known_reason_is_the_one_that_paho_reads(behind_the_id):
    puback = _packet.decode_puback(0x40, b"\0\7" + behind_the_id, MQTTProtocolVersion.MQTTv5)
    assert _REASONS[behind_the_id] == puback.reason


def test_with_a_paho_whose_insides_are_not_known_paho_is_used_as_it_is(monkeypatch):
    assert mqtt_client.client_class() is mqtt_client.ShortWayClient
    monkeypatch.setattr(mqtt_client, "paho_version", "2.9.0")
    assert mqtt_client.client_class() is paho.Client
