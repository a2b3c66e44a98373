"""Offers of rounds: signed once, published to each board, retained; and taken away again.

What the broker does not take waits here and is tried again; of a board and a model only the last word counts.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Final, Protocol

from edge_cascade.codec import encode
from edge_cascade.messages import RoundOffer, RoundTerms
from edge_cascade.round_terms import encode_terms, sign_terms
from edge_cascade.topics import down_topic

_CLEARED: Final = b""
"""How MQTT takes a retained message away."""


class Publish(Protocol):
    """Hands a message to the broker; None when it was not taken."""

    def __call__(self, topic: str, payload: bytes, *, retain: bool = False) -> int | None:
        """Publish."""


@dataclass(frozen=True, slots=True)
class _Word:
    """What is to be on a board's topic, and for which round it is counted."""

    payload: bytes
    round_id: str | None


@dataclass(frozen=True, slots=True)
class Flushed:
    """What was published: bytes of offers by round and device, and whose topic is empty now."""

    sent: Mapping[str, Mapping[str, int]]
    cleared: Set[str]


class Offers:
    """Publishes offers. Not safe for use by two threads. The key is asked for with the first offer."""

    def __init__(self, publish: Publish, *, prefix: str, private_key: Callable[[], bytes]) -> None:
        self._publish = publish
        self._prefix = prefix
        self._private_key = private_key
        self._waiting: dict[tuple[str, str], _Word] = {}
        self._signed: tuple[RoundTerms, bytes, bytes] | None = None

    def offer(self, devices: Iterable[str], terms: RoundTerms, *, seconds_left: float) -> None:
        """Put the offer before these devices with the next `flush`.

        Raises:
            ProtocolError: for terms that no board would take.
            StoreError: when the key cannot be had.
        """
        if self._signed is None or self._signed[0] != terms:
            content = encode_terms(terms)
            self._signed = (terms, content, sign_terms(content, self._private_key()))
        _, content, signature = self._signed
        payload = encode(RoundOffer(content, signature, max(0, math.ceil(seconds_left))))
        for device in devices:
            self._waiting[device, terms.model] = _Word(payload, terms.round_id)

    def clear(self, devices: Iterable[str], model: str) -> None:
        """Take the offer of a model's round away from these devices with the next `flush`."""
        for device in devices:
            self._waiting[device, model] = _Word(_CLEARED, None)

    def flush(self) -> Flushed:
        """Publish what waits, as far as the broker takes it."""
        sent: defaultdict[str, dict[str, int]] = defaultdict(dict)
        cleared: set[str] = set()
        while self._waiting:
            device, model = next(iter(self._waiting))
            word = self._waiting[device, model]
            if self._publish(down_topic(self._prefix, device, "round"), word.payload, retain=True) is None:
                break
            del self._waiting[device, model]
            if word.round_id is None:
                cleared.add(device)
            else:
                sent[word.round_id][device] = len(word.payload)
        return Flushed(sent, cleared)
