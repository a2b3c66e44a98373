"""Which audits judge and never train. No I/O; chance is a hash, so that every worker decides alike."""

from __future__ import annotations

import hashlib

from edge_cascade.messages import Use


def decide_use(device: str, boot: bytes, seq: int, *, audited: bool, holdout_share: float) -> Use:
    """HOLDOUT for `holdout_share` (0..1) of the audits, TRAIN for all else.

    Depends on the case's id alone: never on what the case shows, so the holdout stays a fair sample.
    """
    if not audited:
        return Use.TRAIN
    digest = hashlib.sha256(b"holdout\0" + device.encode() + b"\0" + boot + seq.to_bytes(8, "big")).digest()
    return Use.HOLDOUT if int.from_bytes(digest[:8], "big") < holdout_share * 2**64 else Use.TRAIN
