"""What other threads tell the follower of rounds, and what it needs of them. No I/O."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edge_cascade.bundle import Bundle
from edge_cascade.messages import BaseRequest, RoundOffer, TrainingBase
from edge_daemon.core.spooling import DropReason
from edge_daemon.core.vitals import Vitals
from edge_daemon.metrics import Metrics
from edge_daemon.ports import Clock, Examples, Spool
from edge_daemon.training.runner import ChildEnded
from edge_daemon.training.supervisor import Launch


@dataclass(frozen=True, slots=True)
class FromHub:
    """What came on down/round; None where the offer was cleared."""

    message: RoundOffer | TrainingBase | None


@dataclass(frozen=True, slots=True)
class Appended:
    """The spool has a model's update, or has refused it."""

    model: str
    problem: str | None


@dataclass(frozen=True, slots=True)
class Gone:
    """An update has left the spool: to the hub where there is no reason."""

    boot: bytes
    seq: int
    reason: DropReason | None


@dataclass(frozen=True, slots=True)
class Swapped:
    """Another bundle answers."""

    bundle: Bundle


@dataclass(frozen=True, slots=True)
class Stop:
    """End."""


Inbox = FromHub | ChildEnded | Appended | Gone | Swapped | Stop


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a follower needs of the rest of the device."""

    examples: Examples
    spool: Spool
    ask_for_base: Callable[[BaseRequest], None]
    read_vitals: Callable[[int | None], Vitals]
    """Given the process id of the child, if one runs."""
    launch: Launch
    metrics: Metrics
    clock: Clock
    boot: bytes
    next_seq: Callable[[], int]
    on_heads: Callable[[str, bytes], None] = lambda *_: None
    """Told, on the follower's thread, which private heads (safetensors) are kept for a model from now on."""
