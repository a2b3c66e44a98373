"""What the hub sends: decoded, bounded, passed on once. Hostile bytes are counted and never fatal.

One thread reads. A verdict that was passed on before is receipted again and not passed on twice, as long as
it is among the last `REMEMBERED_VERDICTS`; after that, and after a restart, a repetition is possible: a
verdict corrects an answer by its id, so doing it twice changes nothing.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, assert_never

from edge_cascade.burst import Burst
from edge_cascade.codec import Reassembler, decode
from edge_cascade.errors import ProtocolError
from edge_cascade.messages import (
    Acks,
    Chunk,
    DesiredState,
    Message,
    Receipt,
    Receipts,
    RoundOffer,
    TrainingBase,
    Verdict,
    VerdictBatch,
)
from edge_cascade.topics import Down
from edge_daemon.errors import EdgeError

log = logging.getLogger(__name__)

MAX_BODY_BYTES: Final = 16 * 2**20
MAX_HELD_BYTES: Final = 16 * 2**20
REMEMBERED_VERDICTS: Final = 8192

OnVerdict = Callable[[str, bytes, Verdict], None]
"""Model, digest of the full model, verdict. Returns once the verdict is passed on; raises if it is not."""
OnRound = Callable[[RoundOffer | TrainingBase | None], None]
"""An offer, a training base, or None where the offer was cleared."""


@dataclass(slots=True)
class DownCounts:
    """What came from the hub since the start."""

    malformed: int = 0
    verdicts: int = 0
    verdicts_repeated: int = 0
    verdicts_not_passed_on: int = 0


class Downlink:
    """Reads the four down topics. Answers (acknowledgements, receipts) are returned, not sent."""

    def __init__(
        self,
        on_verdict: OnVerdict,
        on_desired: Callable[[DesiredState], None] | None,
        on_round: OnRound | None,
    ) -> None:
        self.counts = DownCounts()
        self._on_verdict = on_verdict
        self._on_desired = on_desired
        self._on_round = on_round
        self._reassembler = Reassembler(max_held_bytes=MAX_HELD_BYTES)
        self._passed_on: OrderedDict[tuple[bytes, int], int] = OrderedDict()
        self._burst = Burst()

    def read(self, channel: Down, payload: bytes, *, now_s: float) -> Acks | Receipts | None:
        """Deal with one payload. Acknowledgements are for the caller; receipts are to be sent."""
        if not payload:
            # How MQTT clears a retained message; it takes back an offer or a wish, and asks for nothing.
            if channel == "round" and self._on_round is not None:
                self._on_round(None)
            return None
        try:
            message = self._decode(payload)
            if message is None:
                return None
            return self._dispatch(channel, message)
        except ProtocolError as error:
            self._note_malformed(channel, error, now_s)
            return None

    def _decode(self, payload: bytes) -> Message | None:
        message = decode(payload, max_body_bytes=MAX_BODY_BYTES)
        if not isinstance(message, Chunk):
            return message
        frame = self._reassembler.add(message)
        return None if frame is None else decode(frame, max_body_bytes=MAX_BODY_BYTES)

    def _dispatch(self, channel: Down, message: Message) -> Acks | Receipts | None:
        match channel, message:
            case "acks", Acks():
                return message
            case "verdicts", VerdictBatch():
                return self._pass_on(message)
            case "desired", DesiredState():
                if self._on_desired is not None:
                    self._on_desired(message)
                return None
            case "round", RoundOffer() | TrainingBase():
                if self._on_round is not None:
                    self._on_round(message)
                return None
            case "acks" | "verdicts" | "desired" | "round", _:
                raise ProtocolError(f"a {type(message).__name__} does not belong on down/{channel}")
        assert_never(channel)

    def _pass_on(self, batch: VerdictBatch) -> Receipts | None:
        receipts = [
            Receipt(verdict.boot, verdict.seq, verdict.revision)
            for verdict in batch.verdicts
            if self._is_passed_on(batch, verdict)
        ]
        return Receipts(receipts) if receipts else None

    def _is_passed_on(self, batch: VerdictBatch, verdict: Verdict) -> bool:
        name = (verdict.boot, verdict.seq)
        known = self._passed_on.get(name)
        if known is not None and known >= verdict.revision:
            self._passed_on.move_to_end(name)
            self.counts.verdicts_repeated += 1
            return True
        try:
            self._on_verdict(batch.model, batch.full_model, verdict)
        except Exception as error:
            # Not receipted: the hub sends it again.
            self.counts.verdicts_not_passed_on += 1
            if isinstance(error, EdgeError):
                log.debug("verdict not passed on seq=%d: %s", verdict.seq, error)
            else:
                log.exception("verdict not passed on model=%s seq=%d", batch.model, verdict.seq)
            return False
        self.counts.verdicts += 1
        self._passed_on[name] = verdict.revision
        self._passed_on.move_to_end(name)
        if len(self._passed_on) > REMEMBERED_VERDICTS:
            self._passed_on.popitem(last=False)
        return True

    def _note_malformed(self, channel: Down, error: ProtocolError, now_s: float) -> None:
        self.counts.malformed += 1
        kept_back = self._burst.note(now_s=now_s)
        if kept_back is not None:
            why = str(error)[:200]
            log.warning("malformed message from the hub channel=%s kept_back=%d: %s", channel, kept_back, why)
