"""Verdicts: the full model's, a person's, and which of them a device has not confirmed yet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, bindparam, func, select, update

from cloud_hub.core.outbox import DueVerdict
from cloud_hub.errors import NotFoundError
from cloud_hub.store import schema
from edge_cascade.messages import Receipt, Source

_cases = schema.cases
_verdicts = schema.verdicts
_UNCONFIRMED = _verdicts.c.revision > _verdicts.c.confirmed_revision


@dataclass(frozen=True, slots=True)
class PendingCase:
    """A case that waits for the full model's answer."""

    case_id: int
    device: str
    model: str
    device_label: int | None
    escalated: bool
    blob: str
    offset: int
    length: int
    tensor_bytes: int


@dataclass(frozen=True, slots=True)
class Answered:
    """The full model's answer to a pending case."""

    case: PendingCase
    label: int
    probabilities: bytes
    full_model: bytes


def pending_cases(connection: Connection, model: str, limit: int) -> list[PendingCase]:
    """The oldest cases of a model that have no answer."""
    query = (
        select(
            _cases.c.id,
            _cases.c.device,
            _cases.c.model,
            _cases.c.device_label,
            _cases.c.escalated,
            _cases.c.blob,
            _cases.c.blob_offset,
            _cases.c.blob_length,
            _cases.c.tensor_bytes,
        )
        .where(_cases.c.model == model, _cases.c.state == schema.PENDING)
        .order_by(_cases.c.id)
        .limit(limit)
    )
    return [PendingCase(*row) for row in connection.execute(query)]


def insert_answers(connection: Connection, answers: Sequence[Answered], *, now_ms: int) -> None:
    """Keep the full model's verdicts; a person's verdict that came first stays."""
    ids = [answer.case.case_id for answer in answers]
    taken = set(connection.execute(select(_verdicts.c.case_id).where(_verdicts.c.case_id.in_(ids))).scalars())
    counts: Counter[str] = Counter()
    rows = []
    for answer in answers:
        case = answer.case
        kind = "escalation" if case.escalated else "audit"
        if case.device_label is not None:
            verdict = "same" if case.device_label == answer.label else "different"
            counts[f"agreement/{case.model}/{kind}/{verdict}"] += 1
        if case.case_id in taken:
            connection.execute(
                update(_verdicts).where(_verdicts.c.case_id == case.case_id).values(model_label=answer.label)
            )
            continue
        counts[f"verdicts/{case.model}/model"] += 1
        rows.append(
            {
                "case_id": case.case_id,
                "device": case.device,
                "label": answer.label,
                "probabilities": answer.probabilities,
                "full_model": answer.full_model,
                "model_label": answer.label,
                "source": int(Source.MODEL),
                "revision": 1,
                "created_at_ms": now_ms,
                "confirmed_revision": 0,
                "sends": 0,
                "next_send_ms": 0,
            }
        )
    schema.insert_if_absent(connection, _verdicts, rows)
    connection.execute(
        update(_cases).where(_cases.c.id.in_(ids)).values(state=schema.CaseState.ANSWERED.value)
    )
    schema.add_to_counters(connection, counts)


def mark_failed(connection: Connection, failures: Sequence[tuple[PendingCase, str]]) -> None:
    """Note cases that the full model cannot answer, so that they are not tried for ever."""
    for case, why in failures:
        connection.execute(
            update(_cases)
            .where(_cases.c.id == case.case_id)
            .values(state=schema.CaseState.FAILED.value, failure=why[:500])
        )
    schema.add_to_counters(connection, Counter(f"failures/{case.model}" for case, _ in failures))


def label_case(
    connection: Connection,
    case_id: int,
    label: int,
    *,
    probabilities: bytes,
    full_model: bytes,
    labelled_by: str,
    now_ms: int,
) -> int:
    """Let a person's label outrank what was said before; the new revision.

    Raises:
        NotFoundError: when there is no such case.
    """
    case = connection.execute(
        select(_cases.c.device, _cases.c.model).where(_cases.c.id == case_id).with_for_update()
    ).first()
    if case is None:
        raise NotFoundError(f"there is no case {case_id}")
    before = connection.execute(select(_verdicts).where(_verdicts.c.case_id == case_id)).first()
    revision = 1 if before is None else int(before.revision) + 1
    row = {
        "case_id": case_id,
        "device": case.device,
        "label": label,
        "probabilities": probabilities,
        "full_model": full_model if before is None else before.full_model,
        "source": int(Source.HUMAN),
        "revision": revision,
        "created_at_ms": now_ms,
        "confirmed_revision": 0 if before is None else before.confirmed_revision,
        "sends": 0,
        "next_send_ms": 0,
    }
    changed = ["label", "probabilities", "source", "revision", "created_at_ms", "sends", "next_send_ms"]
    schema.upsert(connection, _verdicts, [row], update=changed)
    connection.execute(
        schema.labels.insert(),
        {
            "case_id": case_id,
            "label": label,
            "revision": revision,
            "labelled_by": labelled_by,
            "created_at_ms": now_ms,
        },
    )
    connection.execute(
        update(_cases).where(_cases.c.id == case_id).values(state=schema.CaseState.ANSWERED.value)
    )
    counts = Counter({f"verdicts/{case.model}/human": 1})
    if before is not None:
        counts[f"verdicts/{case.model}/{Source(before.source).name.lower()}"] -= 1
    schema.add_to_counters(connection, {name: amount for name, amount in counts.items() if amount})
    return revision


def due_verdicts(connection: Connection, device: str, *, now_ms: int, limit: int) -> list[DueVerdict]:
    """What a device has not confirmed and is to be sent by `now_ms` (this run's monotonic clock)."""
    query = (
        select(
            _verdicts.c.case_id,
            _cases.c.model,
            _verdicts.c.full_model,
            _cases.c.boot,
            _cases.c.seq,
            _cases.c.sensor,
            _verdicts.c.label,
            _verdicts.c.probabilities,
            _verdicts.c.source,
            _cases.c.use,
            _verdicts.c.revision,
            _verdicts.c.sends,
        )
        .join_from(_verdicts, _cases, _verdicts.c.case_id == _cases.c.id)
        .where(_verdicts.c.device == device, _UNCONFIRMED, _verdicts.c.next_send_ms <= now_ms)
        .order_by(_verdicts.c.next_send_ms)
        .limit(limit)
    )
    return [DueVerdict(**row._asdict()) for row in connection.execute(query)]


def note_sent(connection: Connection, sent: Sequence[tuple[DueVerdict, int]]) -> None:
    """Note verdicts as sent once more, each with the time of its next sending."""
    if not sent:
        return
    statement = (
        update(_verdicts)
        .where(_verdicts.c.case_id == bindparam("of_case"), _verdicts.c.revision == bindparam("of_revision"))
        .values(sends=bindparam("to_sends"), next_send_ms=bindparam("to_next"))
    )
    connection.execute(
        statement,
        [
            {
                "of_case": verdict.case_id,
                "of_revision": verdict.revision,
                "to_sends": verdict.sends + 1,
                "to_next": next_send_ms,
            }
            for verdict, next_send_ms in sent
        ],
    )


def send_again(connection: Connection, devices: Collection[str]) -> None:
    """Make everything unconfirmed of these devices due at once."""
    if devices:
        connection.execute(
            update(_verdicts)
            .where(_verdicts.c.device.in_(sorted(devices)), _UNCONFIRMED)
            .values(sends=0, next_send_ms=0)
        )


def send_everything_again(connection: Connection) -> None:
    """Make everything unconfirmed due: the monotonic clock of the last run means nothing in this one."""
    connection.execute(update(_verdicts).where(_UNCONFIRMED).values(sends=0, next_send_ms=0))


def confirm(connection: Connection, receipts: Sequence[tuple[str, Receipt]]) -> None:
    """Note what devices confirm; a receipt for a revision that does not exist changes nothing."""
    if not receipts:
        return
    its_case = (
        select(_cases.c.id)
        .where(
            _cases.c.device == bindparam("of_device"),
            _cases.c.boot == bindparam("of_boot"),
            _cases.c.seq == bindparam("of_seq"),
        )
        .scalar_subquery()
    )
    revision = bindparam("of_revision", type_=_verdicts.c.revision.type)
    statement = (
        update(_verdicts)
        .where(
            _verdicts.c.case_id == its_case,
            _verdicts.c.revision >= revision,
            _verdicts.c.confirmed_revision < revision,
        )
        .values(confirmed_revision=revision)
    )
    connection.execute(
        statement,
        [
            {
                "of_device": device,
                "of_boot": receipt.boot,
                "of_seq": receipt.seq,
                "of_revision": receipt.revision,
            }
            for device, receipt in receipts
        ],
    )


def count_unconfirmed(connection: Connection) -> int:
    """Verdicts that their devices have not confirmed."""
    return connection.execute(select(func.count()).select_from(_verdicts).where(_UNCONFIRMED)).scalar_one()


def devices_with_due(connection: Connection, *, after: str, now_ms: int, limit: int) -> list[str]:
    """Names, in order, of devices after `after` that have something to be sent by `now_ms`."""
    due = (
        select(_verdicts.c.case_id)
        .where(_verdicts.c.device == schema.devices.c.name, _UNCONFIRMED, _verdicts.c.next_send_ms <= now_ms)
        .exists()
    )
    query = (
        select(schema.devices.c.name)
        .where(schema.devices.c.name > after, due)
        .order_by(schema.devices.c.name)
        .limit(limit)
    )
    return list(connection.execute(query).scalars())
