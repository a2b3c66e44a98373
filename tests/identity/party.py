"""Somebody who speaks to the broker, well-behaved or not: paho with nothing of ours in between."""

import queue
import socket
import ssl

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

TIMEOUT_S = 10.0


class Party:
    """One connection. `connected` is the broker's reason code; publishing returns the PUBACK's."""

    def __init__(
        self, port, user=None, password=None, *, tls=None, client_id="", version=5, expiry_s=0, will=None
    ):
        self._client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            protocol=MQTTProtocolVersion(version),
            clean_session=None if version == 5 else True,
        )
        if user is not None:
            self._client.username_pw_set(user, password)
        if tls is not None:
            self._client.tls_set_context(tls)
        if will is not None:
            self._client.will_set(will, b"will", qos=1)
        self.received = queue.Queue()
        self._answers = {name: queue.Queue() for name in ("connect", "publish", "subscribe", "disconnect")}
        self._client.on_connect = lambda _, __, ___, reason, ____: self._answers["connect"].put(reason)
        self._client.on_publish = lambda _, __, ___, reason, ____: self._answers["publish"].put(reason)
        self._client.on_subscribe = lambda _, __, ___, reasons, ____: self._answers["subscribe"].put(reasons)
        self._client.on_disconnect = self._disconnected
        self._client.on_message = lambda _, __, message: self.received.put((message.topic, message.payload))
        properties = None
        if version == 5:
            properties = Properties(PacketTypes.CONNECT)
            properties.SessionExpiryInterval = expiry_s
        self._client.connect(
            # The name is what a certificate is for.
            "localhost" if tls is not None else "127.0.0.1",
            port,
            clean_start=expiry_s == 0 if version == 5 else paho.MQTT_CLEAN_START_FIRST_ONLY,
            properties=properties,
        )
        self._client.loop_start()
        self.connected = str(self._answers["connect"].get(timeout=TIMEOUT_S))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _disconnected(self, client, _, __, reason, ___):
        # A client that came back by itself would hide that it was thrown out.
        client.disconnect()
        self._answers["disconnect"].put(reason)

    def close(self):
        self._client.disconnect()
        self._client.loop_stop()

    def vanish(self):
        """Cut the connection without a goodbye."""
        self._client.socket().shutdown(socket.SHUT_RDWR)
        self._answers["disconnect"].get(timeout=TIMEOUT_S)
        self._client.loop_stop()

    def is_thrown_out(self):
        """Wait for the broker to end the connection."""
        self._answers["disconnect"].get(timeout=TIMEOUT_S)
        return True

    def publish(self, topic, payload=b"x", *, retain=False):
        self._client.publish(topic, payload, qos=1, retain=retain)
        return str(self._answers["publish"].get(timeout=TIMEOUT_S))

    def may_publish(self, topic, payload=b"x"):
        reason = self.publish(topic, payload)
        assert reason in {"Success", "No matching subscribers", "Not authorized"}
        return reason != "Not authorized"

    def subscribe(self, topic_filter):
        self._client.subscribe(topic_filter, qos=1)
        return [str(reason) for reason in self._answers["subscribe"].get(timeout=TIMEOUT_S)]

    def received_until(self, payload):
        """What came up to and with the message with this payload: a broker keeps one client's order."""
        messages = []
        while not messages or messages[-1][1] != payload:
            messages.append(self.received.get(timeout=TIMEOUT_S))
        return messages


def alert_from(port, context):
    """The TLS alert with which the broker refuses a client; fails when it does not refuse."""
    with (
        socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as tls,
    ):
        # In TLS 1.3 the client's side of the handshake is over before the broker has seen its certificate.
        # Nothing is sent here: data that arrives after the refusal would reset the connection, alert and all.
        try:
            tls.recv(1)
        except ssl.SSLError as error:
            return error.reason
    raise AssertionError("the broker closed the connection without a TLS alert")


def tls_context(ca_file, certificate_file=None, key_file=None):
    """Strict about the broker's certificate, as Python is from 3.13 on."""
    context = ssl.create_default_context(cafile=ca_file)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    if certificate_file is not None:
        context.load_cert_chain(certificate_file, key_file)
    return context
