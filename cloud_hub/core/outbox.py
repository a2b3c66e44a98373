"""When a verdict is sent, to whom first, and how many share a frame. No I/O, no clock, no randomness."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from edge_cascade.messages import MAX_BATCH_ITEMS, Source, Use, Verdict, VerdictBatch

FIRST_RETRY_MS: Final = 2_000
LONGEST_RETRY_MS: Final = 120_000
OFFLINE_RETRY_MS: Final = 300_000
# Boot, seq, numbers and their markers around a verdict's probabilities and sensor.
_VERDICT_OVERHEAD_BYTES: Final = 40


@dataclass(frozen=True, slots=True)
class DueVerdict:
    """A verdict that is to be sent to its device now."""

    case_id: int
    model: str
    full_model: bytes
    boot: bytes
    seq: int
    sensor: str
    label: int
    probabilities: bytes
    source: int
    use: int
    revision: int
    sends: int

    @property
    def size_bytes(self) -> int:
        """About what it takes in a frame before deflating."""
        return len(self.probabilities) + 4 * len(self.sensor) + _VERDICT_OVERHEAD_BYTES

    def message(self) -> Verdict:
        """As it goes out."""
        return Verdict(
            self.boot,
            self.seq,
            self.sensor,
            self.label,
            self.probabilities,
            Source(self.source),
            Use(self.use),
            self.revision,
        )


def next_send_ms(sends: int, *, online: bool, now_ms: int, jitter: float) -> int:
    """When a verdict that was just sent for the `sends`-th time is sent again unless confirmed.

    Doubles from two seconds; `jitter` in 0..1 spreads the upper half of the wait (AWS Architecture Blog,
    2015, "equal jitter": never at once, because a confirmation needs its time). To a device that seems
    offline it goes slowly, but it goes: the sign that it is back may have been lost with the broker.
    """
    ceiling_ms = min(FIRST_RETRY_MS << min(max(sends - 1, 0), 16), LONGEST_RETRY_MS)
    if not online:
        ceiling_ms = max(ceiling_ms, OFFLINE_RETRY_MS)
    return now_ms + ceiling_ms // 2 + int(ceiling_ms / 2 * jitter)


def select_turn(waiting: Sequence[str], hinted: Iterable[str], *, limit: int) -> list[str]:
    """The devices that are served now, at most `limit`: the head of the queue, then who joins it.

    `waiting` is in the order of joining, so that a device whose verdicts never end cannot keep another out:
    the caller puts whoever has more at the end again.
    """
    return list(dict.fromkeys((*waiting, *hinted)))[:limit]


def select_frames(
    due: Sequence[DueVerdict], *, max_bytes: int
) -> list[tuple[VerdictBatch, list[DueVerdict]]]:
    """Frames of one model and full model each, within `max_bytes` before deflating (one verdict at least)."""
    groups: dict[tuple[str, bytes], list[DueVerdict]] = {}
    for verdict in due:
        groups.setdefault((verdict.model, verdict.full_model), []).append(verdict)
    frames: list[tuple[VerdictBatch, list[DueVerdict]]] = []
    for (model, full_model), verdicts in groups.items():
        batch: list[DueVerdict] = []
        size_bytes = 0
        for verdict in verdicts:
            if batch and (size_bytes + verdict.size_bytes > max_bytes or len(batch) == MAX_BATCH_ITEMS):
                frames.append((_frame(model, full_model, batch), batch))
                batch, size_bytes = [], 0
            batch.append(verdict)
            size_bytes += verdict.size_bytes
        frames.append((_frame(model, full_model, batch), batch))
    return frames


def _frame(model: str, full_model: bytes, batch: Sequence[DueVerdict]) -> VerdictBatch:
    return VerdictBatch(model, full_model, [verdict.message() for verdict in batch])
