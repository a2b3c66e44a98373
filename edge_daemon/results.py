"""What leaves for the site's own consumers: answers at once, verdicts when they come. JSON, on MQTT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, Protocol

import msgspec

from edge_cascade.messages import Source, Verdict
from edge_cascade.packing import unpack_probabilities
from edge_daemon.errors import EdgeError
from edge_daemon.pipeline import Answer


class NotPublishedError(EdgeError):
    """The site's broker did not take a message; it is worth trying again."""


class Publisher(Protocol):
    """The session that takes results."""

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> int | None: ...


class VerdictMessage(msgspec.Struct, frozen=True):
    """What leaves on `results/<sensor>/verdict`. `id` is that of the answer it confirms or corrects.

    A `human` verdict outranks the `model`; a later `revision` replaces an earlier one. `label` is None for
    a model that this board no longer serves.
    """

    id: str
    sensor: str
    model: str
    label: str | None
    label_index: int
    probability: float
    source: Literal["model", "human"]
    revision: int
    full_model: str


class Results:
    """Publishes below one prefix."""

    def __init__(
        self, publisher: Publisher, prefix: str, qos: int, labels: Mapping[str, tuple[str, ...]]
    ) -> None:
        self._publisher = publisher
        self._prefix = prefix
        self._qos = qos
        self._labels = labels
        self._encode: Callable[[msgspec.Struct], bytes] = msgspec.json.Encoder().encode
        self.unpublished = 0
        self.bytes_sent = 0

    def publish_answer(self, answer: Answer) -> None:
        """Publish one answer; what the broker does not take is counted in `unpublished`."""
        payload = self._encode(answer)
        if self._publisher.publish(f"{self._prefix}/{answer.sensor}", payload, qos=self._qos) is None:
            self.unpublished += 1
            return
        self.bytes_sent += len(payload)

    def publish_verdict(self, model: str, full_model: bytes, verdict: Verdict) -> None:
        """Publish one verdict.

        Raises:
            NotPublishedError: when the broker is away: the hub will send the verdict again.
        """
        labels = self._labels.get(model, ())
        probabilities = unpack_probabilities(verdict.probabilities)
        message = VerdictMessage(
            id=f"{verdict.boot.hex()}-{verdict.seq}",
            sensor=verdict.sensor,
            model=model,
            label=labels[verdict.label] if verdict.label < len(labels) else None,
            label_index=verdict.label,
            probability=round(probabilities[verdict.label], 6) if verdict.label < len(probabilities) else 1.0,
            source="human" if verdict.source is Source.HUMAN else "model",
            revision=verdict.revision,
            full_model=full_model.hex(),
        )
        topic = f"{self._prefix}/{verdict.sensor}/verdict"
        if self._publisher.publish(topic, self._encode(message), qos=1) is None:
            raise NotPublishedError(f"{topic}: the site's broker did not take the verdict")
