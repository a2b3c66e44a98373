"""Whether a case may be kept. No I/O. What passes here is believed everywhere else in the hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from cloud_hub.core.delivery import Delivery, NewCase, NewUpdate
from cloud_hub.core.holdout import decide_use
from edge_cascade.errors import ProtocolError
from edge_cascade.gate import Exit, select_most_reliable
from edge_cascade.messages import (
    BaseRequest,
    Case,
    CaseBatch,
    ClientUpdate,
    Reason,
    ShadowReport,
    SwapReport,
)
from edge_cascade.packing import unpack_exits
from edge_cascade.tensors import decode_tensor

# What a bundle's manifest may call a model: a name outside it will never be a known model.
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
# PostgreSQL takes no NUL in a text, terminals take no other control characters well.
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")

MAX_REASON_CHARACTERS: Final = 160


@dataclass(frozen=True, slots=True)
class Shape:
    """What the hub must know of a model to check a case: the sample's shape and how many labels there are."""

    input_shape: tuple[int, ...]
    labels: int


class RejectedError(Exception):
    """An item that will never be taken. `kind` names the counter."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason[:MAX_REASON_CHARACTERS])
        self.kind = kind


def admit_batch(
    batch: CaseBatch, delivery: Delivery, *, known: Mapping[str, Shape], holdout_share: float, max_bytes: int
) -> None:
    """Put every case of the batch into the delivery: as a case to commit, or as rejected with its reason.

    `max_bytes` bounds a decoded tensor. A case of a model that is not in `known` is taken as well: it waits.

    Raises:
        RejectedError: when the batch as a whole cannot be taken.
    """
    _check_model_name(batch.model)
    check_text("plan", batch.plan)
    shape = known.get(batch.model)
    for case in batch.cases:
        try:
            exits = _check_case(case, shape, max_bytes)
        except RejectedError as error:
            delivery.rejected.append((case.seq, str(error)))
            delivery.counts[f"rejected/{error.kind}"] += 1
            continue
        use = decide_use(
            batch.device, batch.boot, case.seq, audited=case.audited, holdout_share=holdout_share
        )
        delivery.cases.append(
            NewCase(
                device=batch.device,
                boot=batch.boot,
                seq=case.seq,
                model=batch.model,
                bundle=batch.bundle,
                plan=batch.plan,
                point=case.point,
                sensor=case.sensor,
                taken_at_ms=case.taken_at_ms,
                exits=case.exits,
                device_label=device_label(exits, case),
                escalated=case.escalated,
                audit_ppm=case.audit_ppm,
                reason=case.reason,
                deferred=case.deferred,
                uncertified=case.uncertified,
                use=use,
                tensor=case.tensor,
            )
        )


def admit_update(update: ClientUpdate) -> NewUpdate:
    """The row of a client update. Its delta is judged when its round is closed, not here.

    Raises:
        RejectedError: when it names no possible model or round.
    """
    _check_model_name(update.model)
    check_text("round", update.round_id)
    if not update.delta:
        raise RejectedError("empty", "the update has no delta")
    return NewUpdate(
        device=update.device,
        boot=update.boot,
        seq=update.seq,
        model=update.model,
        round_id=update.round_id,
        training_base=update.training_base,
        num_examples=update.num_examples,
        encoding=update.encoding,
        delta=update.delta,
    )


def admit_base_request(request: BaseRequest) -> BaseRequest:
    """The request, if it names a possible model.

    Raises:
        RejectedError: when it does not.
    """
    _check_model_name(request.model)
    return request


def admit_swap(report: SwapReport) -> SwapReport:
    """The report, if it can be kept.

    Raises:
        RejectedError: when it names no possible model, or holds what no text may.
    """
    _check_model_name(report.model)
    for what, text in (("release", report.release), ("failure", report.failure), ("detail", report.detail)):
        check_text(what, text)
    return report


def admit_shadow(report: ShadowReport) -> ShadowReport:
    """The report, if it can be kept.

    Raises:
        RejectedError: when it names no possible model or sensor, or more pairs differ than there are.
    """
    _check_model_name(report.model)
    for scene in report.scenes:
        check_text("sensor", scene.sensor)
        if len(scene.differing) > scene.pairs:
            raise RejectedError("pairs", f"{len(scene.differing)} of {scene.pairs} pairs differ")
    return report


def device_label(exits: tuple[Exit, ...], case: Case) -> int | None:
    """What the board answered with: the exit that the gate accepted, else the most reliable one it saw."""
    if not exits or case.reason is Reason.FAILED:
        return None
    accepted = not case.escalated and not case.deferred
    return exits[-1].label if accepted else select_most_reliable(exits).label


def check_text(what: str, text: str) -> None:
    """Refuse a name that a database or a terminal would stumble over.

    Raises:
        RejectedError: for a control character.
    """
    if _CONTROL.search(text):
        raise RejectedError("name", f"the {what}'s name {text[:64]!r} holds a control character")


def _check_case(case: Case, shape: Shape | None, max_bytes: int) -> tuple[Exit, ...]:
    check_text("sensor", case.sensor)
    try:
        exits = unpack_exits(case.exits)
    except ProtocolError as error:
        raise RejectedError("exits", str(error)) from error
    if case.reason is Reason.SHADOW and (case.audited or case.escalated):
        # Drawn because two bundles differ: among the audits it would judge a network by its worst.
        raise RejectedError("shadow", "a shadowed case is neither audited nor escalated")
    if not exits and case.reason is not Reason.FAILED:
        raise RejectedError("exits", "no exit was climbed, and the reason is not FAILED")
    if shape is not None and any(exit_.label >= shape.labels for exit_ in exits):
        raise RejectedError("label", f"an exit's label is not one of the model's {shape.labels}")
    try:
        x = decode_tensor(case.tensor, max_bytes=max_bytes)
    except ProtocolError as error:
        raise RejectedError("tensor", str(error)) from error
    if shape is not None and x.shape != shape.input_shape:
        raise RejectedError("shape", f"tensor {x.shape}, the model takes {shape.input_shape}")
    return exits


def _check_model_name(name: str) -> None:
    if not _MODEL_NAME.fullmatch(name):
        raise RejectedError("name", f"model name {name[:64]!r} is not 1 to 64 letters, digits, '-' or '_'")
