"""What a device delivered, checked and as values: what ingest hands to the store. No I/O."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from edge_cascade.messages import BaseRequest, Reason, Receipt, RunningModel, ShadowReport, SwapReport, Use

ItemId = tuple[str, bytes, int]
"""Device, boot, seq: what a device's spool knows an item by."""


@dataclass(frozen=True, slots=True)
class NewCase:
    """A case that passed every check. `tensor` is encoded as `edge_cascade.tensors` does."""

    device: str
    boot: bytes
    seq: int
    model: str
    bundle: bytes
    plan: str
    point: int
    sensor: str
    taken_at_ms: int
    exits: bytes
    device_label: int | None
    escalated: bool
    audit_ppm: int
    reason: Reason
    deferred: bool
    uncertified: bool
    use: Use
    tensor: bytes

    @property
    def item(self) -> ItemId:
        """What the spool knows it by."""
        return self.device, self.boot, self.seq


@dataclass(frozen=True, slots=True)
class NewUpdate:
    """A client update, to be kept for its round."""

    device: str
    boot: bytes
    seq: int
    model: str
    round_id: str
    training_base: bytes
    num_examples: int
    encoding: str
    delta: bytes

    @property
    def item(self) -> ItemId:
        """What the spool knows it by."""
        return self.device, self.boot, self.seq


@dataclass(frozen=True, slots=True)
class NewReport:
    """A device's counters."""

    device: str
    boot: bytes
    seq: int
    taken_at_ms: int
    counters: dict[str, int]

    @property
    def item(self) -> ItemId:
        """What the spool knows it by."""
        return self.device, self.boot, self.seq


@dataclass(frozen=True, slots=True)
class NewStatus:
    """A device says that it is there, or its last will that it is gone."""

    device: str
    online: bool
    boot: bytes
    daemon_version: str
    models: tuple[RunningModel, ...]


@dataclass(slots=True)
class Delivery:
    """What one frame brought. `counts` are added to the counters in the same commit."""

    device: str | None
    frame_digest: bytes
    boot: bytes | None = None
    cases: list[NewCase] = field(default_factory=list)
    rejected: list[tuple[int, str]] = field(default_factory=list)
    refused: str | None = None
    update: NewUpdate | None = None
    report: NewReport | None = None
    status: NewStatus | None = None
    receipts: tuple[Receipt, ...] = ()
    swap: SwapReport | None = None
    shadow: ShadowReport | None = None
    base_request: BaseRequest | None = None
    """Not kept: its board asks again until it has an answer."""
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def single_items(self) -> list[ItemId]:
        """What the frame brought that is no case, as the device's spool knows it."""
        items = [one.item for one in (self.update, self.report) if one is not None]
        items += [(one.device, one.boot, one.seq) for one in (self.swap, self.shadow) if one is not None]
        return items


@dataclass(frozen=True, slots=True)
class Committed:
    """What a commit changed: items that are new, and devices that came online with it."""

    fresh: frozenset[ItemId]
    came_online: frozenset[str]
