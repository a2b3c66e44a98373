"""One MQTT session over paho-mqtt: its own thread, its own reconnecting, its own errors. No protocol of ours.

What paho leaves to its user and this module settles: TCP_NODELAY (without it a QoS 1 answer waits for the
peer's delayed acknowledgement), full jitter between attempts, the fall-back from MQTT 5 to 3.1.1, payloads
above the broker's maximum packet size (paho would reconnect for ever), and publishing while offline (paho
returns an error *and* queues; here nothing is queued unless the session is up).

Only paho's own thread writes to the socket (`loop_start`). With `loop_forever` in a thread of ours, paho
would write from whichever thread publishes, and on a slow line two partial writes mix two packets.

A PUBACK says that the broker has a message, not that anybody keeps it: nothing here is a promise of delivery.
"""

from __future__ import annotations

import enum
import logging
import random
import socket
import ssl
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from edge_cascade.errors import CascadeError
from edge_cascade.mqtt_client import client_class

log = logging.getLogger(__name__)

FIRST_RETRY_S: Final = 0.5
LONGEST_RETRY_S: Final = 60.0
MAX_UNCONFIRMED: Final = 1000
"""Messages that the broker has not acknowledged yet; no more are taken."""
# Fixed header, topic length, packet id and properties around a payload (MQTT 5, section 3.3).
PACKET_OVERHEAD_BYTES: Final = 64
# MQTT 5, section 3.4.2.1: a success, but nobody has subscribed.
NO_MATCHING_SUBSCRIBERS: Final = 0x10
PROTOCOLS: Final[dict[str, Literal[4, 5]]] = {"5": 5, "3.1.1": 4}


class BrokerConfigError(CascadeError):
    """A broker's address or credentials that cannot be used: says which file or key, and why."""


class Broker(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a broker is and who we are to it. Secrets are in files, so that no configuration holds one."""

    host: str = "127.0.0.1"
    port: int = 1883
    username: str | None = None
    password_file: str | None = None
    ca_file: str | None = None
    certificate_file: str | None = None
    key_file: str | None = None
    keepalive_s: int = 30
    protocol: Literal["5", "3.1.1"] = "5"


class State(enum.Enum):
    """Where a session stands."""

    STOPPED = "stopped"
    CONNECTING = "connecting"
    CONNECTED = "connected"


@dataclass(frozen=True, slots=True)
class Will:
    """What the broker publishes, retained and at QoS 1, when the session ends without a goodbye."""

    topic: str
    payload: bytes


class Incoming(msgspec.Struct, frozen=True):
    """A message as it came. `ack` is called once it is dealt with, from any thread (QoS 1, manual only)."""

    topic: str
    payload: bytes
    qos: int
    retained: bool
    packet_id: int


OnMessage = Callable[[Incoming], None]
OnPublished = Callable[[int, str | None], None]
"""A packet id and, where the broker has the message for nobody, why (MQTT 5 only: "No matching subscribers",
"Not authorized", ...); None where somebody gets it, or the protocol cannot say."""


class MqttSession:
    """A session that is up whenever the broker is. Callbacks run on its own network thread and must be short.

    `subscriptions` are renewed at every connect, before `on_up` is called. With `manual_ack` a QoS 1 message
    is acknowledged by `ack`, in the order of arrival; the broker redelivers what was not, provided that
    `expiry_s` lets it keep the session. With `forget_on_down` what the broker had not acknowledged when the
    session went down is not sent again by itself: for callers with a queue of their own.
    """

    def __init__(
        self,
        broker: Broker,
        client_id: str,
        *,
        subscriptions: Sequence[str] = (),
        on_message: OnMessage | None = None,
        on_up: Callable[[], None] | None = None,
        on_down: Callable[[], None] | None = None,
        on_published: OnPublished | None = None,
        will: Will | None = None,
        expiry_s: int = 0,
        manual_ack: bool = False,
        receive_maximum: int | None = None,
        max_unconfirmed: int = MAX_UNCONFIRMED,
        forget_on_down: bool = False,
    ) -> None:
        self._broker = broker
        self._client_id = client_id
        self._subscriptions = tuple(subscriptions)
        self._on_message = on_message
        self._on_up = on_up
        self._on_down = on_down
        self._on_published = on_published
        self._will = will
        self._expiry_s = expiry_s
        self._manual_ack = manual_ack
        self._receive_maximum = receive_maximum
        self._max_unconfirmed = max_unconfirmed
        self._forget_on_down = forget_on_down
        self._state = State.STOPPED
        self._protocol: Literal[4, 5] = PROTOCOLS[broker.protocol]
        self._client: paho.Client | None = None
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._turned = threading.Event()
        self._attempt = 0
        self._last_problem: str | None = None
        self._unanswered_subscriptions: set[int] = set()
        self._is_refused = False
        self.max_packet_bytes: int | None = None
        self.connects = 0
        self.bytes_sent = 0
        self.bytes_received = 0

    @property
    def state(self) -> State:
        """Where the session stands at this moment."""
        return self._state

    @property
    def is_up(self) -> bool:
        """Whether a publish made now would go out."""
        return self._state is State.CONNECTED

    @property
    def is_listening(self) -> bool:
        """Whether the broker has granted every subscription of this connection."""
        return self.is_up and not self._unanswered_subscriptions and not self._is_refused

    @property
    def problem(self) -> str | None:
        """Why the last attempt failed, None once connected."""
        return self._last_problem

    @property
    def max_payload_bytes(self) -> int | None:
        """The largest payload that the broker takes, None where it names no limit."""
        return None if self.max_packet_bytes is None else self.max_packet_bytes - PACKET_OVERHEAD_BYTES

    def start(self) -> None:
        """Start connecting; returns at once and never fails because the broker is away.

        Raises:
            BrokerConfigError: for credentials that cannot be read.
        """
        self._client = self._build_client()
        self._state = State.CONNECTING
        self._thread = threading.Thread(target=self._run, name=f"mqtt-{self._client_id}", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Say goodbye (the will is not sent) and end the thread."""
        self._stopping.set()
        if self._client is not None:
            self._client.disconnect()
        self._turned.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
        self._state = State.STOPPED

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> int | None:
        """Hand one message over; its packet id, or None when it was not taken (offline, too large, full)."""
        client = self._client
        if client is None or self._state is not State.CONNECTED:
            return None
        limit = self.max_payload_bytes
        if limit is not None and len(payload) + len(topic) > limit:
            log.warning(
                "payload above the broker's limit topic=%s bytes=%d limit=%d", topic, len(payload), limit
            )
            return None
        info = client.publish(topic, payload, qos=qos, retain=retain)
        if info.rc not in {paho.MQTT_ERR_SUCCESS, paho.MQTT_ERR_NO_CONN}:
            return None
        self.bytes_sent += len(payload) + len(topic)
        return info.mid

    def ack(self, message: Incoming) -> None:
        """Acknowledge one QoS 1 message (manual mode)."""
        if self._client is not None and message.qos > 0:
            self._client.ack(message.packet_id, message.qos)

    def _build_client(self) -> paho.Client:
        is_five = self._protocol == 5
        client = client_class()(
            CallbackAPIVersion.VERSION2,
            client_id=self._client_id,
            protocol=MQTTProtocolVersion(self._protocol),
            # MQTT 5 says it at connect, by clean start and session expiry.
            clean_session=None if is_five else self._expiry_s == 0,
            manual_ack=self._manual_ack,
        )
        # No window within these: a PUBACK comes behind all that the broker has sent before it, so a window
        # shuts as soon as messages come faster than they are read; and to move it, paho goes through all
        # that wait at each PUBACK.
        client.max_inflight_messages_set(0)
        client.max_queued_messages_set(self._max_unconfirmed)
        client.connect_timeout = 10.0
        client.on_connect = self._connected
        client.on_connect_fail = self._connect_failed
        client.on_disconnect = self._disconnected
        client.on_message = self._received
        client.on_publish = self._published
        client.on_subscribe = self._subscribed
        client.on_socket_open = _set_nodelay
        if self._broker.username is not None:
            client.username_pw_set(self._broker.username, _read_secret(self._broker.password_file))
        if self._broker.ca_file is not None:
            client.tls_set_context(_tls_context(self._broker))
        if self._will is not None:
            client.will_set(self._will.topic, self._will.payload, qos=1, retain=True)
        self._set_next_delay(client)
        properties = None
        if is_five:
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            properties.SessionExpiryInterval = self._expiry_s
            if self._receive_maximum is not None:
                properties.ReceiveMaximum = self._receive_maximum
        client.connect_async(
            self._broker.host,
            self._broker.port,
            keepalive=self._broker.keepalive_s,
            clean_start=self._expiry_s == 0 if is_five else paho.MQTT_CLEAN_START_FIRST_ONLY,
            properties=properties,
        )
        return client

    def _run(self) -> None:
        while True:
            client = self._client
            assert client is not None
            client.loop_start()
            self._turned.wait()
            client.loop_stop()
            self._turned.clear()
            if self._stopping.is_set():
                return
            # Only a change of protocol ends a client while the session lives.
            self._client = self._build_client()

    def _connected(
        self, client: paho.Client, _: Any, __: Any, reason: ReasonCode, properties: Properties | None
    ) -> None:
        if self._stopping.is_set():
            # `stop` came while the connection was being made.
            client.disconnect()
            return
        if reason.is_failure:
            if self._protocol == 5 and str(reason) == "Unsupported protocol version":
                log.info("broker offers no MQTT 5, going on with 3.1.1 broker=%s", self._address)
                self._protocol = 4
                client.disconnect()
                self._turned.set()
                return
            self._note_problem(f"refused: {reason}")
            self._set_next_delay(client)
            return
        self._attempt = 0
        self._last_problem = None
        self.connects += 1
        self.max_packet_bytes = getattr(properties, "MaximumPacketSize", None)
        self._set_next_delay(client)
        self._is_refused = False
        self._unanswered_subscriptions.clear()
        for topic in self._subscriptions:
            if self._protocol == 5:
                _, packet_id = client.subscribe(topic, options=SubscribeOptions(qos=1))
            else:
                _, packet_id = client.subscribe(topic, qos=1)
            if packet_id is not None:
                self._unanswered_subscriptions.add(packet_id)
        self._state = State.CONNECTED
        log.info("connected broker=%s client=%s", self._address, self._client_id)
        if self._on_up is not None:
            self._on_up()

    def _connect_failed(self, client: paho.Client, _: Any) -> None:
        self._note_problem("no connection")
        self._set_next_delay(client)

    def _disconnected(self, client: paho.Client, _: Any, __: Any, reason: ReasonCode, ___: Any) -> None:
        was_up = self._state is State.CONNECTED
        self._state = State.CONNECTING
        if self._forget_on_down:
            client.drop_out_messages()
        if not self._stopping.is_set():
            self._note_problem(f"disconnected: {reason}")
            self._set_next_delay(client)
        if was_up and self._on_down is not None:
            self._on_down()

    def _received(self, _: paho.Client, __: Any, message: paho.MQTTMessage) -> None:
        self.bytes_received += len(message.payload) + len(message.topic)
        if self._on_message is not None:
            self._on_message(
                Incoming(message.topic, bytes(message.payload), message.qos, message.retain, message.mid)
            )

    def _published(
        self, _: paho.Client, __: Any, packet_id: int, reason: ReasonCode, ___: Properties | None
    ) -> None:
        if self._on_published is not None:
            is_for_nobody = reason.is_failure or reason.value == NO_MATCHING_SUBSCRIBERS
            self._on_published(packet_id, str(reason) if is_for_nobody else None)

    def _subscribed(
        self, _: paho.Client, __: Any, packet_id: int, reasons: Sequence[ReasonCode], ___: Any
    ) -> None:
        for reason in reasons:
            if reason.is_failure:
                self._is_refused = True
                self._note_problem(f"subscription refused: {reason}")
        self._unanswered_subscriptions.discard(packet_id)

    def _note_problem(self, problem: str) -> None:
        # The first of a kind warns, its repetitions are for those who look closely.
        level = logging.DEBUG if problem == self._last_problem else logging.WARNING
        log.log(level, "broker=%s client=%s %s", self._address, self._client_id, problem)
        self._last_problem = problem

    def _set_next_delay(self, client: paho.Client) -> None:
        """Full jitter: a delay anywhere below the doubled last ceiling (AWS Architecture Blog, 2015)."""
        ceiling_s = min(FIRST_RETRY_S * 2**self._attempt, LONGEST_RETRY_S)
        self._attempt = min(self._attempt + 1, 16)
        delay_s = random.uniform(0.05, ceiling_s)  # noqa: S311 - spreads load, guards nothing
        client.reconnect_delay_set(min_delay=delay_s, max_delay=delay_s)  # type: ignore[arg-type]

    @property
    def _address(self) -> str:
        return f"{self._broker.host}:{self._broker.port}"


def _set_nodelay(_: paho.Client, __: Any, sock: Any) -> None:
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError as error:
        log.debug("no TCP_NODELAY: %s", error)


def _read_secret(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BrokerConfigError(f"password_file {path!r}: {_why(error)}") from error


def check_credentials(broker: Broker) -> None:
    """Read the files that a session would read at its start.

    Raises:
        BrokerConfigError: naming the one that cannot be used.
    """
    if broker.username is not None:
        _read_secret(broker.password_file)
    if broker.ca_file is not None:
        _tls_context(broker)


def _tls_context(broker: Broker) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=broker.ca_file)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if broker.certificate_file is not None:
            context.load_cert_chain(broker.certificate_file, broker.key_file)
    except (OSError, ssl.SSLError) as error:
        raise BrokerConfigError(
            f"TLS files ca_file={broker.ca_file!r} certificate_file={broker.certificate_file!r} "
            f"key_file={broker.key_file!r}: {_why(error)}"
        ) from error
    return context


def _why(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
