"""What other threads tell the uplink, and what it counts. No I/O."""

from __future__ import annotations

from dataclasses import dataclass

from edge_cascade.messages import BaseRequest
from edge_cascade.mqtt import Incoming


@dataclass(slots=True)
class UplinkCounts:
    """What went to the hub since the start. A frame sent again counts in `retries`, an item in its end."""

    frames: int = 0
    items: int = 0
    retries: int = 0
    acknowledged: int = 0
    duplicates: int = 0
    rejected: int = 0
    refused: int = 0


@dataclass(frozen=True, slots=True)
class SessionUp:
    """The session was made."""


@dataclass(frozen=True, slots=True)
class SessionDown:
    """The session is gone."""


@dataclass(frozen=True, slots=True)
class Puback:
    """The broker has a publication, or refused it and says why."""

    packet_id: int
    refusal: str | None


@dataclass(frozen=True, slots=True)
class Wake:
    """There may be something to send."""


@dataclass(frozen=True, slots=True)
class Announce:
    """The status is to be published again."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A training base is wanted."""

    request: BaseRequest


@dataclass(frozen=True, slots=True)
class Stop:
    """Send what can be sent within `drain_s`, then end."""

    drain_s: float


Inbox = SessionUp | SessionDown | Puback | Wake | Announce | Ask | Stop | Incoming
