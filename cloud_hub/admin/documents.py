"""What the REST interface says and hears, as types: the OpenAPI document is made from these. No I/O."""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta
from sqlalchemy import RowMapping

from cloud_hub.documents import Document, Heard, Hex, Number
from cloud_hub.models import HubModel
from cloud_hub.store.schema import CaseState
from edge_cascade.messages import Reason, Source, Use
from edge_cascade.packing import unpack_exits, unpack_probabilities

MAX_PAGE: Final = 500

ReasonName = Literal["unsure", "audit", "unsure_and_audit", "failed", "shadow"]
SourceName = Literal["model", "human"]
UseName = Literal["train", "holdout"]
StateName = Literal["pending", "answered", "failed"]


class Problem(Document, frozen=True):
    """An error (RFC 9457)."""

    title: str
    status: Annotated[int, Meta(ge=400, le=599)]
    detail: str
    type: str = "about:blank"


class Running(Document, frozen=True):
    """A model that a board serves."""

    model: str
    bundle: Hex
    plan: str
    point: Number
    takes_releases: bool = False


class Device(Document, frozen=True):
    """A board as the hub last saw it."""

    name: str
    online: bool
    first_seen_ms: Number
    last_seen_ms: Number
    boot: Hex | None
    daemon_version: str | None
    models: list[Running]
    report_at_ms: Number | None
    counters: dict[str, int]


class Devices(Document, frozen=True):
    """A page of boards; `next` is the `cursor` of the following one."""

    devices: list[Device]
    next: str | None


class ExitAnswer(Document, frozen=True):
    """What one rung said."""

    rung: Number
    label: Number
    probability: Annotated[float, Meta(ge=0, le=1)]
    score: Annotated[float, Meta(ge=0, le=1)]


class VerdictOf(Document, frozen=True):
    """What the hub says of a case. `model_label`: what the full model said before a person disagreed."""

    label: Number
    label_name: str | None
    source: SourceName
    revision: Number
    created_at_ms: Number
    confirmed: bool
    full_model: Hex
    model_label: Number | None
    probabilities: list[Annotated[float, Meta(ge=0, le=1)]]


class CaseDocument(Document, frozen=True):
    """A case that a board sent."""

    id: Number
    device: str
    boot: Hex
    seq: Annotated[int, Meta(ge=0)]
    model: str
    bundle: Hex
    plan: str
    point: Number
    sensor: str
    taken_at_ms: Number
    received_at_ms: Number
    exits: list[ExitAnswer]
    device_label: Number | None
    device_label_name: str | None
    escalated: bool
    audited: bool
    audit_ppm: Number
    reason: ReasonName
    deferred: bool
    uncertified: bool
    use: UseName
    state: StateName
    failure: str | None
    verdict: VerdictOf | None


class Cases(Document, frozen=True):
    """A page of cases, the newest first; `next` is the `cursor` of the following one."""

    cases: list[CaseDocument]
    next: str | None


class HumanLabel(Document, frozen=True):
    """What a person said of a case."""

    label: Number
    label_name: str | None
    revision: Number
    labelled_by: str
    created_at_ms: Number


class CaseDetail(Document, frozen=True):
    """A case and everything that people said of it."""

    case: CaseDocument
    labels: list[HumanLabel]


class LabelRequest(Heard, frozen=True):
    """A label by its name or its index."""

    label: Annotated[int, Meta(ge=0, lt=2**16)] | Annotated[str, Meta(min_length=1, max_length=256)]


class Labelled(Document, frozen=True):
    """The verdict that a label became; it goes to the board by itself."""

    case: Number
    label: Number
    label_name: str
    revision: Number


class DeviceQuery(Heard, frozen=True):
    """Which page of boards."""

    cursor: Annotated[str, Meta(max_length=64, description="`next` of the page before")] = ""
    limit: Annotated[int, Meta(ge=1, le=MAX_PAGE)] = 100


class CaseQuery(Heard, frozen=True):
    """Which cases. Times are of receipt, in milliseconds since 1970; `since` included, `until` not."""

    device: Annotated[str, Meta(max_length=64)] | None = None
    model: Annotated[str, Meta(max_length=64)] | None = None
    label: (
        Annotated[str, Meta(max_length=256, description="the verdict's: index, or name with `model`")] | None
    ) = None
    source: SourceName | None = None
    escalated: bool | None = None
    audited: bool | None = None
    since: Number | None = None
    until: Number | None = None
    verdict: Annotated[bool, Meta(description="whether it has one")] | None = None
    cursor: Annotated[str, Meta(pattern="^[0-9]{1,18}$", description="`next` of the page before")] | None = (
        None
    )
    limit: Annotated[int, Meta(ge=1, le=MAX_PAGE)] = 50


class Agreement(Document, frozen=True):
    """How often the board's own answer was the full model's."""

    same: Number
    different: Number
    share: Annotated[float, Meta(ge=0, le=1)] | None


class ModelStats(Document, frozen=True):
    """What was counted of one model. `audits` are those that the gate had accepted; `rounds` by outcome."""

    cases: dict[str, int]
    verdicts: dict[str, int]
    failed: Number
    audits: Agreement
    escalations: Agreement
    rounds: dict[str, int]


class Latency(Document, frozen=True):
    """From a message's arrival to its acknowledgement, over the last thousand."""

    p50_ms: float
    p99_ms: float


class Stats(Document, frozen=True):
    """The hub in numbers, since its store was made.

    `votes`: client updates by what became of them; `base_requests` by how they ended; `round_bytes` up
    (deltas) and down (offers and training bases).
    """

    devices: Number
    devices_online: Number
    models: dict[str, ModelStats]
    pending: Number
    unconfirmed_verdicts: Number
    stored_bytes: Number
    tensor_bytes: Number
    duplicates: Number
    updates: Number
    votes: dict[str, int]
    base_requests: dict[str, int]
    round_bytes: dict[str, int]
    rejected: dict[str, int]
    malformed: dict[str, int]
    not_taken: Number
    acks_latency: Latency | None


class Health(Document, frozen=True):
    """Whether the hub works; `problems` is empty when it does."""

    status: Literal["ok", "unready"]
    problems: list[str]


def device_document(row: RowMapping) -> Device:
    """A row of `devices` as it is shown."""
    return Device(
        name=row["name"],
        online=bool(row["online"]),
        first_seen_ms=row["first_seen_ms"],
        last_seen_ms=row["last_seen_ms"],
        boot=None if row["boot"] is None else row["boot"].hex(),
        daemon_version=row["daemon_version"],
        models=msgspec.json.decode(row["models"], type=list[Running]),
        report_at_ms=row["report_at_ms"],
        counters=msgspec.json.decode(row["counters"], type=dict[str, int]),
    )


def case_document(row: RowMapping, model: HubModel | None) -> CaseDocument:
    """A row of `cases` with its verdict as it is shown; `model` gives the labels their names."""
    return CaseDocument(
        id=row["id"],
        device=row["device"],
        boot=row["boot"].hex(),
        seq=row["seq"],
        model=row["model"],
        bundle=row["bundle"].hex(),
        plan=row["plan"],
        point=row["point"],
        sensor=row["sensor"],
        taken_at_ms=row["taken_at_ms"],
        received_at_ms=row["received_at_ms"],
        exits=[
            ExitAnswer(rung=e.rung, label=e.label, probability=e.probability, score=e.score)
            for e in unpack_exits(row["exits"])
        ],
        device_label=row["device_label"],
        device_label_name=label_name(model, row["device_label"]),
        escalated=row["escalated"],
        audited=row["audit_ppm"] > 0,
        audit_ppm=row["audit_ppm"],
        reason=_REASONS[Reason(row["reason"])],
        deferred=row["deferred"],
        uncertified=row["uncertified"],
        use=_USES[Use(row["use"])],
        state=_STATES[CaseState(row["state"])],
        failure=row["failure"],
        verdict=None if row["verdict_label"] is None else _verdict(row, model),
    )


def label_document(row: RowMapping, model: HubModel | None) -> HumanLabel:
    """A row of `labels` as it is shown."""
    return HumanLabel(
        label=row["label"],
        label_name=label_name(model, row["label"]),
        revision=row["revision"],
        labelled_by=row["labelled_by"],
        created_at_ms=row["created_at_ms"],
    )


def label_name(model: HubModel | None, label: int | None) -> str | None:
    """A label's name, None where the model is unknown here."""
    if model is None or label is None or label >= len(model.labels):
        return None
    return model.labels[label]


def _verdict(row: RowMapping, model: HubModel | None) -> VerdictOf:
    return VerdictOf(
        label=row["verdict_label"],
        label_name=label_name(model, row["verdict_label"]),
        source=_SOURCES[Source(row["verdict_source"])],
        revision=row["verdict_revision"],
        created_at_ms=row["verdict_created_at_ms"],
        confirmed=row["verdict_confirmed_revision"] >= row["verdict_revision"],
        full_model=row["verdict_full_model"].hex(),
        model_label=row["verdict_model_label"],
        probabilities=list(unpack_probabilities(row["verdict_probabilities"])),
    )


_REASONS: dict[Reason, ReasonName] = {
    Reason.UNSURE: "unsure",
    Reason.AUDIT: "audit",
    Reason.UNSURE_AND_AUDIT: "unsure_and_audit",
    Reason.FAILED: "failed",
    Reason.SHADOW: "shadow",
}
_SOURCES: dict[Source, SourceName] = {Source.MODEL: "model", Source.HUMAN: "human"}
_USES: dict[Use, UseName] = {Use.TRAIN: "train", Use.HOLDOUT: "holdout"}
_STATES: dict[CaseState, StateName] = {
    CaseState.PENDING: "pending",
    CaseState.ANSWERED: "answered",
    CaseState.FAILED: "failed",
}
