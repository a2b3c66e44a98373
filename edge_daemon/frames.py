"""Rows of the spool -> the messages that carry them. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, assert_never

import msgspec

from edge_cascade.messages import (
    Case,
    CaseBatch,
    ClientUpdate,
    Message,
    Report,
    ShadowReport,
    SwapReport,
)
from edge_daemon.core.spooling import SHADOW_PLAN, SWAP_PLAN, Batch, BatchKey, ItemKind

Item = Case | ClientUpdate | Report | SwapReport | ShadowReport

_decode_case: Final = msgspec.msgpack.Decoder(Case).decode
_decode_update: Final = msgspec.msgpack.Decoder(ClientUpdate).decode
_decode_report: Final = msgspec.msgpack.Decoder(Report).decode
_decode_swap: Final = msgspec.msgpack.Decoder(SwapReport).decode
_decode_shadow: Final = msgspec.msgpack.Decoder(ShadowReport).decode


def decode_batch(batch: Batch) -> tuple[dict[int, Item], list[int]]:
    """What the bodies say, by `seq`, and the `seq` of those that say nothing any more."""
    items: dict[int, Item] = {}
    damaged: list[int] = []
    for seq, body in batch.bodies.items():
        try:
            items[seq] = _decode_body(batch.key, body)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            damaged.append(seq)
    return items, damaged


def message_of(device: str, key: BatchKey, items: Sequence[Item]) -> Message:
    """One message for the items: a batch of cases, or the one update or report itself."""
    cases = [item for item in items if isinstance(item, Case)]
    if cases:
        assert len(cases) == len(items)
        return CaseBatch(device, key.boot, key.model, key.bundle, key.plan, cases)
    (message,) = items
    assert isinstance(message, (ClientUpdate, Report, SwapReport, ShadowReport))
    return message


def _decode_body(key: BatchKey, body: bytes) -> Item:
    match key.kind:
        case ItemKind.CASE:
            return _decode_case(body)
        case ItemKind.UPDATE:
            return _decode_update(body)
        case ItemKind.REPORT if key.plan == SWAP_PLAN:
            return _decode_swap(body)
        case ItemKind.REPORT if key.plan == SHADOW_PLAN:
            return _decode_shadow(body)
        case ItemKind.REPORT:
            return _decode_report(body)
    assert_never(key.kind)
