"""The virtual site: its broker, what its sensors send, and what comes back for every sample."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from threading import Lock

import msgspec

from edge_cascade.bundle import Bundle
from edge_cascade.mqtt import Broker, Incoming, MqttSession
from edge_cascade.tensors import encode_tensor
from edge_daemon.simulate.brokers import BrokerKind, SiteBroker
from edge_daemon.simulate.ledger import AnswerView, Counted, Ledger, VerdictView
from edge_daemon.simulate.sensors import Labelled


class VirtualSite:
    """Publishes every sample under a sensor name of its own, so that answers and verdicts find it unaided."""

    def __init__(self, kind: BrokerKind, directory: Path, bundle: Bundle) -> None:
        self._broker = SiteBroker(kind, directory)
        self._graph = bundle.graph
        self._lock = Lock()
        self.ledger = Ledger()
        """Read it once nothing comes any more; until then see `counted`."""
        self.encoded: dict[tuple[str, str], bytes] = {}
        """By device and sensor, the sample as it would come off the wire in the hub."""
        self._session = MqttSession(
            self._broker.address, "virtual-site", subscriptions=["results/#"], on_message=self._receive
        )

    @property
    def address(self) -> Broker:
        """Where boards find their sensors."""
        return self._broker.address

    @property
    def is_up(self) -> bool:
        """Whether answers would be heard."""
        return self._session.is_up

    def start(self) -> None:
        """Start the broker; answers are heard once `listen` was called."""
        self._broker.start()

    def listen(self) -> None:
        """Connect."""
        self._session.start()

    def stop(self) -> None:
        """Hear no more, and end the broker."""
        self._session.stop()
        self._broker.process.stop()

    def send(self, device: str, sensor: str, labelled: Labelled) -> None:
        """Publish a sample for a board; waits while the broker takes none."""
        x, label = labelled
        self.encoded[device, sensor] = encode_tensor(x, self._graph.wire)
        with self._lock:
            self.ledger.sent(device, sensor, self._graph.labels[label])
        payload = x.astype("<f4").tobytes()
        # None: the session's queue is full for a moment, or the site's broker is away.
        while self._session.publish(f"sensors/{device}/{sensor}", payload, qos=1) is None:
            time.sleep(0.005)

    def counted(self) -> Counted:
        """How far it is."""
        with self._lock:
            return self.ledger.counted()

    def answered_by(self, devices: Iterable[str]) -> Mapping[tuple[str, str], int]:
        """How many samples each of these boards has answered with each bundle."""
        with self._lock:
            wanted = set(devices)
            return {key: count for key, count in self.ledger.by_bundle.items() if key[0] in wanted}

    def _receive(self, message: Incoming) -> None:
        now_s = time.monotonic()
        levels = message.topic.split("/")
        device, sensor = levels[1], levels[2]
        with self._lock:
            if levels[-1] == "verdict":
                verdict = msgspec.json.decode(message.payload, type=VerdictView)
                self.ledger.note_verdict(device, sensor, verdict, now_s=now_s)
            else:
                answer = msgspec.json.decode(message.payload, type=AnswerView)
                self.ledger.note_answer(device, sensor, answer, now_s=now_s)
