"""The MQTT session to the hub: rows out of the spool, acknowledgements and verdicts back in.

One thread owns everything here. The session's callbacks and the spool's only put events into its inbox;
what follows from an event is decided by `core.sending` and done by `_do`. Nothing is kept here that must
survive: a row stays in the spool until the hub has acknowledged it.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, assert_never

from edge_cascade.burst import Burst
from edge_cascade.codec import MAX_PAYLOAD_BYTES, encode, frame_digest, split_frame
from edge_cascade.errors import ProtocolError, TooLargeError
from edge_cascade.messages import (
    Acks,
    BaseRequest,
    DesiredState,
    Message,
    RunningModel,
    Status,
)
from edge_cascade.mqtt import Incoming, MqttSession, Will
from edge_cascade.topics import DOWN, Up, down_topic, parse_topic, up_topic
from edge_daemon.config import HubConfig
from edge_daemon.core.sending import SendingLimits, SendingState, next_due_s, next_state
from edge_daemon.core.sending_events import (
    Acked,
    Acknowledge,
    Claim,
    Claimed,
    Connected,
    Defer,
    Disconnected,
    Draining,
    Drop,
    Effect,
    Event,
    Greeted,
    NothingClaimed,
    NotSent,
    Published,
    Refused,
    Rejected,
    Release,
    Send,
    Tick,
    Waiting,
)
from edge_daemon.core.spooling import BatchKey, DropReason, ItemKind
from edge_daemon.downlink import Downlink, OnRound, OnVerdict
from edge_daemon.errors import SpoolError
from edge_daemon.frames import Item, decode_batch, message_of
from edge_daemon.ports import Clock, Spool
from edge_daemon.uplink_inbox import (
    Announce,
    Ask,
    Inbox,
    Puback,
    SessionDown,
    SessionUp,
    Stop,
    UplinkCounts,
    Wake,
)

log = logging.getLogger(__name__)

GOODBYE_S: Final = 1.0
"""How long the last status may take to reach the broker."""
LONGEST_SLEEP_S: Final = 60.0
DEFECT_PAUSE_S: Final = 0.2

_CHANNEL: Final[dict[ItemKind, Up]] = {
    ItemKind.CASE: "cases",
    ItemKind.UPDATE: "update",
    ItemKind.REPORT: "telemetry",
}


@dataclass(frozen=True, slots=True)
class _Aloft:
    """A batch in flight, decoded: by `seq` what goes into its frames."""

    key: BatchKey
    items: dict[int, Item]


class MqttUplink:
    """The way to the hub over MQTT; implements `ports.Uplink`. `start` and `stop` are called once each."""

    def __init__(  # noqa: PLR0917 - the six that no uplink can be without
        self,
        config: HubConfig,
        device_id: str,
        boot: bytes,
        spool: Spool,
        on_verdict: OnVerdict,
        models: Callable[[], list[RunningModel]],
        *,
        client_id: str,
        clock: Clock,
        daemon_version: str,
        on_desired: Callable[[DesiredState], None] | None = None,
        on_round: OnRound | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._prefix = config.prefix
        self._device_id = device_id
        self._boot = boot
        self._spool = spool
        self._models = models
        self._clock = clock
        self._version = daemon_version
        # Spreads load, guards nothing.
        self._rng = rng or random.Random()  # noqa: S311
        self._limits = SendingLimits(
            max_in_flight=config.max_in_flight_batches,
            max_items=config.max_batch_items,
            max_bytes=config.max_batch_bytes,
            linger_s=config.batch_linger_s,
            ack_timeout_s=config.ack_timeout_s,
        )
        self._counts = UplinkCounts()
        self._inbox: queue.SimpleQueue[Inbox] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="uplink", daemon=True)
        self._burst = Burst()
        self._pause = threading.Event()
        """Never set: only waited for."""
        self._state = SendingState()
        self._aloft: dict[int, _Aloft] = {}
        self._sent: dict[bytes, tuple[int, int]] = {}
        self._packets: dict[int, tuple[int, int]] = {}
        self._ever_sent: set[tuple[bytes, int]] = set()
        self._drain_until_s: float | None = None
        self._goodbye: threading.Event = threading.Event()
        self._goodbye_packet: int | None = None
        self._downlink = Downlink(on_verdict, on_desired, on_round)
        self._status_topic = up_topic(config.prefix, device_id, "status")
        self._session = MqttSession(
            config.broker,
            client_id,
            subscriptions=[down_topic(config.prefix, device_id, channel) for channel in DOWN],
            on_message=self._inbox.put,
            on_up=lambda: self._inbox.put(SessionUp()),
            on_down=lambda: self._inbox.put(SessionDown()),
            on_published=lambda packet_id, refusal: self._inbox.put(Puback(packet_id, refusal)),
            will=Will(self._status_topic, encode(self._status(is_online=False))),
            forget_on_down=True,
        )

    # --- any thread ----------------------------------------------------------------------------------------

    @property
    def is_up(self) -> bool:
        """Whether the hub's broker is there."""
        return self._session.is_up

    @property
    def problem(self) -> str | None:
        """Why the broker is not there."""
        return self._session.problem

    def start(self) -> None:
        """Begin connecting; neither the broker nor the hub needs to be there.

        Raises:
            BrokerConfigError: for credentials that cannot be read.
        """
        self._session.start()
        self._spool.on_append(lambda: self._inbox.put(Wake()))
        self._thread.start()

    def stop(self, drain_s: float) -> None:
        """Send what waits for at most `drain_s`, say goodbye, end. What is left stays in the spool."""
        if self._thread.is_alive():
            self._inbox.put(Stop(drain_s))
            self._thread.join(drain_s + GOODBYE_S + 5.0)
        self._session.stop()

    def announce(self) -> None:
        """Publish the retained status again."""
        self._inbox.put(Announce())

    def ask_for_base(self, request: BaseRequest) -> None:
        """Ask the hub for a training base, once; while the broker is away nobody is asked."""
        self._inbox.put(Ask(request))

    def counters(self) -> dict[str, int]:
        """Everything counted since the start, for metrics and reports."""
        up, down = self._counts, self._downlink.counts
        return {
            "bytes_up": self._session.bytes_sent,
            "bytes_down": self._session.bytes_received,
            "connects": self._session.connects,
            "frames": up.frames,
            "items": up.items,
            "retries": up.retries,
            "acknowledged": up.acknowledged,
            "duplicates": up.duplicates,
            "rejected": up.rejected,
            "refused": up.refused,
            "malformed": down.malformed,
            "verdicts": down.verdicts,
            "verdicts_repeated": down.verdicts_repeated,
            "verdicts_not_passed_on": down.verdicts_not_passed_on,
        }

    # --- the uplink's thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._is_done():
            try:
                self._turn()
            except Exception:
                # A defect in one event must not end the delivery of all others.
                if self._burst.note(now_s=self._clock.monotonic_s()) is not None:
                    log.exception("defect in the uplink")
                # What is due stays due: not at once, or nobody else had the processor.
                self._pause.wait(DEFECT_PAUSE_S)
        self._say_goodbye()

    def _turn(self) -> None:
        try:
            heard = self._inbox.get(timeout=self._sleep_s())
        except queue.Empty:
            self._feed(Tick())
        else:
            self._hear(heard)

    def _sleep_s(self) -> float:
        due_s = next_due_s(self._state, self._limits)
        now_s = self._clock.monotonic_s()
        sleep_s = LONGEST_SLEEP_S if due_s is None else due_s - now_s
        if self._drain_until_s is not None:
            sleep_s = min(sleep_s, self._drain_until_s - now_s)
        return min(max(sleep_s, 0.0), LONGEST_SLEEP_S)

    def _is_done(self) -> bool:
        if self._drain_until_s is None:
            return False
        is_empty = not self._state.flights and self._spool.counts().waiting_rows <= 0
        return is_empty or not self._state.is_up or self._clock.monotonic_s() >= self._drain_until_s

    def _hear(self, heard: Inbox) -> None:
        match heard:
            case SessionUp():
                self._publish_status(is_online=True)
                self._feed(Connected())
            case SessionDown():
                self._packets.clear()
                self._feed(Disconnected())
            case Puback(packet_id, refusal):
                self._published(packet_id, refusal)
            case Wake():
                self._feed(self._waiting())
            case Announce():
                if self._state.is_up:
                    self._publish_status(is_online=True)
            case Ask(request):
                self._tell(request)
            case Stop(drain_s):
                self._drain_until_s = self._clock.monotonic_s() + drain_s
                with contextlib.suppress(SpoolError):
                    # What was appended a moment ago is to be seen by the drain.
                    self._spool.flush()
                self._feed(Draining())
            case Incoming():
                self._receive(heard)
            case _:
                assert_never(heard)

    def _feed(self, event: Event) -> None:
        """One event, and all that follows from it."""
        events = [event]
        while events:
            self._state, effects = next_state(
                self._state,
                events.pop(0),
                now_s=self._clock.monotonic_s(),
                limits=self._limits,
                rng=self._rng,
            )
            for effect in effects:
                events += self._do(effect)
        for token in [token for token in self._aloft if token not in self._state.flights]:
            del self._aloft[token]
            self._sent = {digest: place for digest, place in self._sent.items() if place[0] != token}

    def _do(self, effect: Effect) -> list[Event]:
        match effect:
            case Claim():
                return [self._claim(effect)]
            case Send():
                return self._send(effect)
            case Acknowledge():
                self._spool.acknowledge(effect.boot, effect.seqs)
                self._ever_sent.difference_update((effect.boot, seq) for seq in effect.seqs)
            case Drop():
                log.warning("row given up seq=%d reason=%s", effect.seq, effect.reason.value)
                self._spool.reject(effect.boot, effect.seq, effect.reason)
            case Defer():
                self._spool.defer(effect.boot, (effect.seq,), effect.delay_s)
            case Release():
                self._spool.release(effect.token)
            case _:
                assert_never(effect)
        return []

    def _claim(self, claim: Claim) -> Event:
        try:
            while batch := self._spool.claim(claim.max_items, claim.max_bytes):
                items, damaged = decode_batch(batch)
                for seq in damaged:
                    # No hub could read it either.
                    log.warning("damaged row given up seq=%d", seq)
                    self._spool.reject(batch.key.boot, seq, DropReason.DAMAGED)
                if items:
                    self._aloft[batch.token] = _Aloft(batch.key, items)
                    is_shared = batch.key.kind is ItemKind.CASE
                    return Claimed(batch.token, batch.key.boot, tuple(items), is_shared, self._waiting())
        except SpoolError as error:
            log.debug("nothing claimed: %s", error)
        return NothingClaimed()

    def _send(self, send: Send) -> list[Event]:
        aloft = self._aloft.get(send.token)
        if aloft is None or send.token not in self._state.flights:
            return []
        items = [aloft.items[seq] for seq in send.seqs]
        frame = encode(message_of(self._device_id, aloft.key, items))
        topic = up_topic(self._prefix, self._device_id, _CHANNEL[aloft.key.kind])
        try:
            payloads = split_frame(frame, self._max_payload_bytes(topic))
        except TooLargeError as error:
            log.warning("no frame for these rows seqs=%s: %s", send.seqs[:5], error)
            return [Refused(send.token, send.part)]
        for known in (frame, *payloads):
            self._sent[frame_digest(known)] = (send.token, send.part)
        packet_id: int | None = None
        for payload in payloads:
            packet_id = self._session.publish(topic, payload)
            if packet_id is None:
                return [NotSent(send.token)]
        assert packet_id is not None
        self._packets[packet_id] = (send.token, send.part)
        self._count_sent(aloft.key.boot, send.seqs)
        return []

    def _max_payload_bytes(self, topic: str) -> int:
        limit = self._session.max_payload_bytes
        return MAX_PAYLOAD_BYTES if limit is None else min(MAX_PAYLOAD_BYTES, limit - len(topic))

    def _count_sent(self, boot: bytes, seqs: tuple[int, ...]) -> None:
        names = {(boot, seq) for seq in seqs}
        self._counts.frames += 1
        self._counts.items += len(names - self._ever_sent)
        self._counts.retries += bool(names & self._ever_sent)
        if len(self._ever_sent) < 65536:
            self._ever_sent |= names

    def _waiting(self) -> Waiting:
        counts = self._spool.counts()
        return Waiting(counts.waiting_rows, counts.waiting_bytes)

    def _published(self, packet_id: int, refusal: str | None) -> None:
        if packet_id == self._goodbye_packet:
            self._goodbye.set()
        place = self._packets.pop(packet_id, None)
        if place is None:
            return
        if refusal is not None:
            # The broker is there and the hub is not (or may not read us): no use in waiting for it.
            log.debug("the broker has a frame for nobody: %s", refusal)
            self._feed(NotSent(place[0]))
        else:
            self._feed(Published(*place))

    def _receive(self, incoming: Incoming) -> None:
        try:
            topic = parse_topic(self._prefix, incoming.topic)
        except ProtocolError as error:
            log.debug("message on a foreign topic: %s", error)
            return
        channel = topic.channel
        if topic.device != self._device_id or channel not in DOWN:
            # Some brokers hand out retained messages that nobody subscribed to.
            log.debug("message of somebody else topic=%s", incoming.topic)
            return
        answer = self._downlink.read(channel, incoming.payload, now_s=self._clock.monotonic_s())
        if isinstance(answer, Acks):
            self._acknowledged(answer)
        elif answer is not None:
            self._tell(answer)

    def _tell(self, message: Message) -> None:
        """What is not worth a row: the other side asks again, or we do."""
        self._session.publish(up_topic(self._prefix, self._device_id, "telemetry"), encode(message))

    def _acknowledged(self, acks: Acks) -> None:
        self._counts.acknowledged += len(acks.committed)
        self._counts.duplicates += len(acks.duplicate)
        self._counts.rejected += len(acks.rejected)
        self._counts.refused += len(acks.refused)
        if not (acks.committed or acks.duplicate or acks.rejected or acks.refused):
            self._feed(Greeted())
        if acks.committed or acks.duplicate:
            self._feed(Acked(acks.boot, (*acks.committed, *acks.duplicate)))
        if acks.rejected:
            for rejection in acks.rejected[:5]:
                log.warning("the hub rejected seq=%d: %s", rejection.seq, rejection.reason)
            self._feed(Rejected(acks.boot, tuple(rejection.seq for rejection in acks.rejected)))
        for refusal in acks.refused:
            place = self._sent.pop(refusal.frame_digest, None)
            log.warning("the hub could not read a frame, known=%s: %s", place is not None, refusal.reason)
            if place is not None:
                self._feed(Refused(*place))

    # --- status --------------------------------------------------------------------------------------------

    def _status(self, *, is_online: bool) -> Status:
        models = self._models() if is_online else []
        return Status(self._device_id, is_online, self._boot, self._version, models)

    def _publish_status(self, *, is_online: bool) -> int | None:
        return self._session.publish(
            self._status_topic, encode(self._status(is_online=is_online)), retain=True
        )

    def _say_goodbye(self) -> None:
        """The offline status, as the will would say it; flights go back to the spool."""
        self._feed(Disconnected())
        self._goodbye_packet = self._publish_status(is_online=False) if self._session.is_up else None
        until_s = self._clock.monotonic_s() + GOODBYE_S
        while self._goodbye_packet is not None and not self._goodbye.is_set():
            try:
                self._hear(self._inbox.get(timeout=max(until_s - self._clock.monotonic_s(), 0.0)))
            except queue.Empty:
                break
