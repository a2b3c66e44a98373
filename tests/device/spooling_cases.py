"""Items, clocks and waiting for the tests of spool and uplink."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from edge_cascade.gate import Exit
from edge_cascade.manifest import Wire
from edge_cascade.messages import Case, ClientUpdate, Reason, Report
from edge_cascade.packing import pack_exits
from edge_cascade.tensors import encode_tensor
from edge_daemon.core.spooling import (
    BatchKey,
    ItemKind,
    Priority,
    SpoolItem,
    case_item,
    report_item,
    update_item,
)

BOOT = b"bootboot"
OTHER_BOOT = b"earlier!"
BUNDLE = bytes(range(32))


class FakeClock:
    """Moves when told to; the wall may jump without it."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.wall_now_ms = 1_790_000_000_000

    def monotonic_s(self) -> float:
        return self.now_s

    def wall_ms(self) -> int:
        return self.wall_now_ms


def case(
    seq: int, *, audit_ppm: int = 0, escalated: bool = True, values: int = 16, reason: Reason = Reason.UNSURE
) -> Case:
    tensor = encode_tensor(np.random.default_rng(seq).normal(size=values).astype(np.float32), Wire("float32"))
    exits = pack_exits([Exit(0, 1, 0.5, 0.9)])
    return Case(seq, "pump-1", 1_790_000_000_000, 3, exits, escalated, audit_ppm, reason, True, False, tensor)


def item(seq: int, *, boot: bytes = BOOT, model: str = "vibration", **kwargs) -> SpoolItem:
    return case_item(case(seq, **kwargs), boot=boot, model=model, bundle=BUNDLE, plan="p")


def raw(
    seq: int,
    *,
    size: int = 100,
    priority: Priority = Priority.ESCALATION,
    boot: bytes = BOOT,
    model: str = "m",
) -> SpoolItem:
    """A row of exactly `size` body bytes, which only a spool looks at."""
    key = BatchKey(ItemKind.CASE, boot, model, BUNDLE, "p")
    return SpoolItem(key, seq, priority, bytes([seq % 256]) * size)


def update(seq: int, *, delta: bytes = b"delta") -> SpoolItem:
    return update_item(ClientUpdate("dev-1", BOOT, seq, "vibration", "round-7", BUNDLE, 20, "fp32", delta))


def report(seq: int) -> SpoolItem:
    return report_item(Report("dev-1", BOOT, seq, 5, {"edge_samples": 7}))


def wait_until(condition: Callable[[], object], timeout_s: float = 45.0, what: str = "") -> None:
    # Far above what it takes: a disk that stands still for seconds fails no test.
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what or condition}"
        time.sleep(0.005)
