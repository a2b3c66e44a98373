"""What device and hub say to each other: typed, frozen, bounded. No I/O; bytes are made in `codec`.

On the wire each message is a msgpack array in the order of its fields, so a field is only ever added at the
end and with a default: an older reader ignores it, a newer one fills it in. docs/protocol.md is the
reference; docs/asyncapi.yaml says the same to a program.

An item that passes through the device's spool (case, update, report) is known by `(device, boot, seq)`:
`boot` is drawn at random at each start of the daemon, `seq` counts from there. Neither needs a clock.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from edge_cascade.delta_payloads import Encoding

BOOT_BYTES: Final = 8
DIGEST_BYTES: Final = 32
MAX_BATCH_ITEMS: Final = 1024
MAX_EXITS: Final = 16
SHIPPED: Final = "shipped"
"""In place of a release's number: the bundle that a board was installed with."""

Name = Annotated[str, Meta(min_length=1, max_length=128)]
Text = Annotated[str, Meta(max_length=512)]
Boot = Annotated[bytes, Meta(min_length=BOOT_BYTES, max_length=BOOT_BYTES)]
Digest = Annotated[bytes, Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]
Seq = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Small = Annotated[int, Meta(ge=0, lt=2**16)]
Millis = Annotated[int, Meta(ge=0, lt=2**53)]
Ppm = Annotated[int, Meta(ge=0, le=1_000_000)]
Blob = bytes


class Kind(IntEnum):
    """The kind byte of a frame."""

    CASES = 1
    ACKS = 2
    VERDICTS = 3
    RECEIPTS = 4
    STATUS = 5
    REPORT = 6
    DESIRED = 7
    ROUND_OFFER = 8
    CLIENT_UPDATE = 9
    CHUNK = 10
    BASE_REQUEST = 11
    TRAINING_BASE = 12
    SWAP_REPORT = 13
    SHADOW_REPORT = 14


class Reason(IntEnum):
    """Why a case leaves the board."""

    UNSURE = 1
    """The gate escalated it: no rung was sure enough."""
    AUDIT = 2
    """The coin, thrown before the gate saw the sample, said so; the gate accepted."""
    UNSURE_AND_AUDIT = 3
    FAILED = 4
    """No stage gave a usable answer (a NaN, a runtime's error)."""
    SHADOW = 5
    """The gate accepted, but the bundle that ran beside answered otherwise; drawn by a coin before that."""


class Message(msgspec.Struct, frozen=True, array_like=True):
    """Base of everything that has a kind byte."""


class Case(msgspec.Struct, frozen=True, array_like=True):
    """One sample that goes to the hub. `exits` is packed by `pack_exits`, `tensor` by `tensors`.

    `taken_at_ms` is the device's wall clock: for people to read, never for ordering or expiry.
    `audit_ppm` is the probability with which the audit coin fell, in parts per million; 0 if not audited.
    """

    seq: Seq
    sensor: Name
    taken_at_ms: Millis
    point: Small
    exits: Annotated[bytes, Meta(max_length=7 * MAX_EXITS)]
    escalated: bool
    audit_ppm: Ppm
    reason: Reason
    deferred: bool
    uncertified: bool
    tensor: Blob

    @property
    def audited(self) -> bool:
        """Whether the audit coin sent this case."""
        return self.audit_ppm > 0


class CaseBatch(Message, frozen=True, array_like=True):
    """Cases of one start of the daemon, one bundle and one plan."""

    device: Name
    boot: Boot
    model: Name
    bundle: Digest
    plan: Name
    cases: Annotated[list[Case], Meta(min_length=1, max_length=MAX_BATCH_ITEMS)]


class Rejection(msgspec.Struct, frozen=True, array_like=True):
    """An item that the hub will never take, and why."""

    seq: Seq
    reason: Text


class Refusal(msgspec.Struct, frozen=True, array_like=True):
    """A frame that could not be read at all, known by the first 8 bytes of its SHA-256."""

    frame_digest: Annotated[bytes, Meta(min_length=8, max_length=8)]
    reason: Text


class Acks(Message, frozen=True, array_like=True):
    """The hub has committed these items (or had them, or will never take them): their rows may go.

    An empty one is the hub's greeting when it comes back: no need to wait any longer.
    """

    boot: Boot
    committed: list[Seq] = []
    duplicate: list[Seq] = []
    rejected: list[Rejection] = []
    refused: list[Refusal] = []


class Source(IntEnum):
    """Who answered. A human outranks the full model everywhere."""

    MODEL = 1
    HUMAN = 2


class Use(IntEnum):
    """What a verdict may be used for: the holdout judges and certifies, and never trains."""

    TRAIN = 1
    HOLDOUT = 2


class Verdict(msgspec.Struct, frozen=True, array_like=True):
    """The hub's answer to one case. `revision` grows when a human corrects it."""

    boot: Boot
    seq: Seq
    sensor: Name
    label: Small
    probabilities: Annotated[bytes, Meta(max_length=2 * 4096)]
    source: Source
    use: Use
    revision: Count


class VerdictBatch(Message, frozen=True, array_like=True):
    """Verdicts of one model, with the digest of the full model that gave them."""

    model: Name
    full_model: Digest
    verdicts: Annotated[list[Verdict], Meta(min_length=1, max_length=MAX_BATCH_ITEMS)]


class Receipt(msgspec.Struct, frozen=True, array_like=True):
    """The device has passed this revision of a verdict on."""

    boot: Boot
    seq: Seq
    revision: Count


class Receipts(Message, frozen=True, array_like=True):
    """Verdicts that need not be sent again."""

    receipts: Annotated[list[Receipt], Meta(min_length=1, max_length=MAX_BATCH_ITEMS)]


class RunningModel(msgspec.Struct, frozen=True, array_like=True):
    """What a board is serving; `takes_releases`: whether it would serve another bundle that the hub wants."""

    model: Name
    bundle: Digest
    plan: Name
    point: Small
    takes_releases: bool = False


class Status(Message, frozen=True, array_like=True):
    """Retained; the offline form is the device's last will."""

    device: Name
    online: bool
    boot: Boot
    daemon_version: Name
    models: Annotated[list[RunningModel], Meta(max_length=64)] = []


class Report(Message, frozen=True, array_like=True):
    """The device's counters since its start, sent through the spool. Keys are metric names."""

    device: Name
    boot: Boot
    seq: Seq
    taken_at_ms: Millis
    counters: Annotated[dict[Name, Count], Meta(max_length=512)]


class DesiredModel(msgspec.Struct, frozen=True, array_like=True):
    """A release that a board should run; `SHIPPED` and zero digests: the bundle that it was installed with.

    `graph` and `weights` are the digests of the parts of `bundle`; `size_bytes` is what it takes on disk.
    While a wave is judged the board audits at least `audit_ppm` of its samples, and answers `shadow_ppm` of
    them with its previous bundle as well. A scene of shadowed pairs lasts `scene_s`.
    """

    model: Name
    release: Name
    bundle: Digest
    graph: Digest = bytes(DIGEST_BYTES)
    weights: Digest = bytes(DIGEST_BYTES)
    size_bytes: Count = 0
    audit_ppm: Ppm = 0
    shadow_ppm: Ppm = 0
    scene_s: Small = 300


class DesiredState(Message, frozen=True, array_like=True):
    """Retained: what a board should become. The releases themselves are fetched and verified elsewhere."""

    device: Name
    revision: Count
    models: Annotated[list[DesiredModel], Meta(max_length=64)]


class SwapReport(Message, frozen=True, array_like=True):
    """How an attempt to run a release ended, sent through the spool. `failure` is empty where it committed.

    `serving` is the bundle that answers now.
    """

    device: Name
    boot: Boot
    seq: Seq
    taken_at_ms: Millis
    model: Name
    release: Name
    bundle: Digest
    serving: Digest
    failure: Text
    detail: Text


class DifferingPair(msgspec.Struct, frozen=True, array_like=True):
    """A sample on which two bundles differ; its input is the case `seq` of the same boot."""

    seq: Seq
    served_label: Small
    other_label: Small


class ShadowScene(msgspec.Struct, frozen=True, array_like=True):
    """What one sensor showed in one stretch of time: so many pairs, and those that differ."""

    sensor: Name
    pairs: Count
    differing: Annotated[list[DifferingPair], Meta(max_length=1024)]


class ShadowReport(Message, frozen=True, array_like=True):
    """Scenes that are over, in which `bundle` answered and `other` was asked as well; through the spool."""

    device: Name
    boot: Boot
    seq: Seq
    model: Name
    bundle: Digest
    other: Digest
    scenes: Annotated[list[ShadowScene], Meta(min_length=1, max_length=256)]


class SelfLabels(IntEnum):
    """What a round makes of samples that a board answered itself and never uploaded."""

    NONE = 0
    HARD = 1
    """The answer's label is the target."""
    SOFT = 2
    """The answer's probability on its label, the rest spread over the others: a consistency target."""


class RoundTerms(msgspec.Struct, frozen=True, array_like=True):
    """What a round asks of a board; see `round_terms`. Shares and rates are in millionths.

    `graph` is the digest of the graph part whose parameters `training_base` holds; `base_bytes` are those
    of the base as float32. `soft_ppm` is the share of the full model's probabilities in a verdict's target.
    `clip_norm_ppm` and `noise_multiplier_ppm` are 0 without differential privacy.
    """

    model: Name
    round_id: Name
    graph: Digest
    training_base: Digest
    base_bytes: Count
    encoding: Encoding
    top_share_ppm: Ppm
    epochs: Small
    batch_size: Small
    learning_rate_ppm: Count
    momentum_ppm: Ppm
    prox_mu_ppm: Count
    min_examples: Count
    max_examples: Count
    soft_ppm: Ppm = 0
    self_labels: SelfLabels = SelfLabels.NONE
    self_weight_ppm: Ppm = 1_000_000
    private_heads: bool = False
    clip_norm_ppm: Count = 0
    noise_multiplier_ppm: Count = 0


class RoundOffer(Message, frozen=True, array_like=True):
    """Retained: an invitation to a round of federated averaging.

    `terms` is the msgpack of `RoundTerms`, byte for byte what the hub's Ed25519 key has signed (RFC 8032).
    `seconds_left` counts from receipt, so that no clock needs to agree, and is not signed.
    """

    terms: Annotated[bytes, Meta(min_length=1, max_length=4096)]
    signature: Annotated[bytes, Meta(max_length=64)]
    seconds_left: Count


class BaseRequest(Message, frozen=True, array_like=True):
    """A board that takes part asks for the training base. `origin`: one that it holds, or 32 zero bytes."""

    device: Name
    model: Name
    training_base: Digest
    origin: Digest


class TrainingBase(Message, frozen=True, array_like=True):
    """The answer, not retained: `steps` are deltas (see `deltas`) that lead from `origin` to the base."""

    model: Name
    training_base: Digest
    origin: Digest
    steps: Annotated[list[Blob], Meta(min_length=1, max_length=64)]


class ClientUpdate(Message, frozen=True, array_like=True):
    """What one board learned in one round: a delta against the training base."""

    device: Name
    boot: Boot
    seq: Seq
    model: Name
    round_id: Name
    training_base: Digest
    num_examples: Annotated[int, Meta(gt=0, lt=2**31)]
    encoding: Encoding
    delta: Blob


class Chunk(Message, frozen=True, array_like=True):
    """A piece of a frame that is larger than a payload may be. `digest` is the SHA-256 of the whole frame."""

    digest: Digest
    index: Small
    count: Annotated[int, Meta(gt=0, lt=2**16)]
    total_bytes: Count
    data: Blob


KIND_OF: Final[dict[type[Message], Kind]] = {
    CaseBatch: Kind.CASES,
    Acks: Kind.ACKS,
    VerdictBatch: Kind.VERDICTS,
    Receipts: Kind.RECEIPTS,
    Status: Kind.STATUS,
    Report: Kind.REPORT,
    DesiredState: Kind.DESIRED,
    RoundOffer: Kind.ROUND_OFFER,
    ClientUpdate: Kind.CLIENT_UPDATE,
    Chunk: Kind.CHUNK,
    BaseRequest: Kind.BASE_REQUEST,
    TrainingBase: Kind.TRAINING_BASE,
    SwapReport: Kind.SWAP_REPORT,
    ShadowReport: Kind.SHADOW_REPORT,
}
