"""What a board's uplink carries: real frames of real samples, counted byte by byte. No I/O.

MQTT, at QoS 1 (MQTT 5 section 3.3 and 3.4, MQTT 3.1.1 likewise): up, PUBLISH with its fixed header, topic,
packet id and (MQTT 5) the length of no properties; down, its PUBACK of four bytes; down, the hub's
acknowledgement of every frame of cases, with the PUBACK for it up. TCP/IPv4, beside it: every packet is sent
alone, in segments of at most 1,460 bytes with 40 bytes of headers (no options); the other side acknowledges
every second segment, and the last one, with a bare 40.

Left out, because they belong to every way of sending or depend on the line: connecting and keeping alive, TLS
records, retransmissions, verdicts and their receipts. Audits come on top of a cascade's cases.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from cloud_hub.builder.calibration.outcomes import Floats, Outcomes, Walk
from edge_cascade.bundle import Bundle
from edge_cascade.codec import MAX_PAYLOAD_BYTES, encode, split_frame
from edge_cascade.gate import Exit
from edge_cascade.manifest import Wire
from edge_cascade.messages import BOOT_BYTES, Acks, Case, CaseBatch, Reason
from edge_cascade.packing import pack_exits
from edge_cascade.policy import Plan
from edge_cascade.scores import LABEL, PROBABILITY, SCORE_COLUMN
from edge_cascade.tensors import encode_tensor
from edge_cascade.topics import DEFAULT_PREFIX, down_topic, up_topic

Protocol = Literal["5", "3.1.1"]
PROTOCOLS: Final[tuple[Protocol, ...]] = get_args(Protocol)

PUBACK_BYTES: Final = 4
SEGMENT_BYTES: Final = 1460
SEGMENT_HEADER_BYTES: Final = 40

FIRST_SAMPLE_AT_MS: Final = 1_767_225_600_000
UNPACED_SAMPLE_MS: Final = 20


class Bytes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """From the board and to it."""

    up: int
    down: int


class Traffic(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What sending took. `payload_bytes` are the frames alone; `tcp` includes `mqtt`; both by protocol."""

    samples: int
    publishes: int
    payload_bytes: int
    mqtt: dict[Protocol, Bytes]
    tcp: dict[Protocol, Bytes]

    @property
    def up(self) -> int:
        """MQTT 5 bytes from the board: the figure that this project quotes."""
        return self.mqtt["5"].up


@dataclass(frozen=True, slots=True)
class PlanRun:
    """A bundle's plan on samples `x` (n, *input_shape) in the sensor's unit: what its rungs said of them."""

    bundle: Bundle
    plan: Plan
    x: Floats
    outcomes: Outcomes


@dataclass(frozen=True, slots=True)
class Sender:
    """The board that sends, with the daemon's defaults for how it gathers cases.

    `samples_per_s` None: batches are as full as they may be, as on a busy board or after a time offline.
    Otherwise a batch leaves `linger_s` after its first case at the latest, so quiet boards send small ones.
    """

    device: str = "board-1"
    sensor: str = "sensor-1"
    prefix: str = DEFAULT_PREFIX
    max_batch_items: int = 64
    max_batch_bytes: int = 98_304
    linger_s: float = 0.2
    samples_per_s: float | None = None

    @property
    def topic(self) -> str:
        """Where cases are published."""
        return up_topic(self.prefix, self.device, "cases")

    def taken_at_ms(self, sample: int) -> int:
        """When a sample was taken."""
        every_ms = UNPACED_SAMPLE_MS if self.samples_per_s is None else 1000.0 / self.samples_per_s
        return FIRST_SAMPLE_AT_MS + round(sample * every_ms)


@dataclass(frozen=True, slots=True)
class _Packet:
    topic: str
    payload_bytes: int


def cascade_traffic(run: PlanRun, walked: Walk, sender: Sender, *, point: int | None = None) -> Traffic:
    """What it took to send the samples of `run` that `walked` escalated; each has climbed every rung.

    `point` is the one that the cases name, by default the plan's chosen one.
    """
    column = SCORE_COLUMN[run.plan.score]
    named = run.plan.chosen if point is None else point

    def case(sample: int) -> Case:
        exits = [
            Exit(rung, int(head[LABEL]), float(head[PROBABILITY]), float(head[column]))
            for rung, head in enumerate(run.outcomes.heads[:, sample])
        ]
        plain = _case(sample, run, sender)
        beyond = named > run.bundle.certified_point(run.plan)
        return msgspec.structs.replace(plain, exits=pack_exits(exits), point=named, uncertified=beyond)

    return _traffic_of_cases(run, np.flatnonzero(walked.escalated), case, sender)


def all_deflated_traffic(run: PlanRun, sender: Sender) -> Traffic:
    """What it takes to send every sample through the same protocol: same encoding, same batches, no exits."""
    return _traffic_of_cases(run, np.arange(len(run.x)), lambda sample: _case(sample, run, sender), sender)


def one_by_one_traffic(x: Floats, wire: Wire, sender: Sender) -> Traffic:
    """What it takes to publish every sample alone: its tensor in the wire's encoding, deflated, nothing else.

    The hub acknowledges nothing here: MQTT's own PUBACK is all.
    """
    return _plain_traffic((len(encode_tensor(sample, wire, deflate=True)) for sample in x), sender)


def all_raw_traffic(x: NDArray[np.generic], sender: Sender) -> Traffic:
    """What it takes to publish every sample alone as its bare values, in the dtype of `x`.

    As `one_by_one_traffic`, undeflated; see `natural_dtype`.
    """
    return _plain_traffic((sample.nbytes for sample in x), sender)


def natural_dtype(x: NDArray[np.generic]) -> NDArray[np.generic]:
    """The samples in the narrowest dtype a sensor would have given them in: uint8, int16 or float32.

    Integers that were turned into floats on their way here go back to what they were.
    """
    for dtype in (np.uint8, np.int16):
        limits = np.iinfo(dtype)
        if x.min() >= limits.min and x.max() <= limits.max and np.array_equal(x, np.rint(x)):
            return x.astype(dtype)
    return x.astype(np.float32)


def publish_bytes(topic: str, payload_bytes: int, protocol: Protocol) -> int:
    """A whole PUBLISH packet at QoS 1 without properties."""
    remaining = 2 + len(topic.encode()) + 2 + (1 if protocol == "5" else 0) + payload_bytes
    return 1 + _varint_bytes(remaining) + remaining


def tcp_bytes(packets: Iterable[int]) -> Bytes:
    """Packets sent one way with their TCP/IPv4 headers (`up`), the bare acknowledgements of them (`down`)."""
    there = back = 0
    for size in packets:
        segments = -(-size // SEGMENT_BYTES)
        there += size + segments * SEGMENT_HEADER_BYTES
        back += -(-segments // 2) * SEGMENT_HEADER_BYTES
    return Bytes(there, back)


def _case(sample: int, run: PlanRun, sender: Sender) -> Case:
    """A case as an operating point that escalates everything would send it, but for its exits."""
    return Case(
        seq=sample,
        sensor=sender.sensor,
        taken_at_ms=sender.taken_at_ms(sample),
        point=0,
        exits=b"",
        escalated=True,
        audit_ppm=0,
        reason=Reason.UNSURE,
        deferred=True,
        uncertified=False,
        tensor=encode_tensor(run.x[sample], run.bundle.graph.wire),
    )


def _traffic_of_cases(
    run: PlanRun, samples: NDArray[np.intp], case: Callable[[int], Case], sender: Sender
) -> Traffic:
    # Drawn at each start in the field; it must not deflate, and it must be the same every time.
    boot = hashlib.sha256(sender.device.encode()).digest()[:BOOT_BYTES]
    model, bundle_id = run.bundle.graph.model, bytes.fromhex(run.bundle.bundle_id)
    up: list[_Packet] = []
    down: list[_Packet] = []
    for batch in _batches((case(int(sample)) for sample in samples), sender):
        frame = encode(CaseBatch(sender.device, boot, model, bundle_id, run.plan.name, batch))
        up += [_Packet(sender.topic, len(payload)) for payload in split_frame(frame, MAX_PAYLOAD_BYTES)]
        acks = encode(Acks(boot, committed=[each.seq for each in batch]))
        down.append(_Packet(down_topic(sender.prefix, sender.device, "acks"), len(acks)))
    return _count(len(samples), up, down)


def _batches(cases: Iterable[Case], sender: Sender) -> Iterator[list[Case]]:
    """As the daemon claims them from its spool: by number, by the bytes of their bodies, by waiting time."""
    batch: list[Case] = []
    size_bytes = 0
    for case in cases:
        body_bytes = len(msgspec.msgpack.encode(case))
        if batch and (
            len(batch) == sender.max_batch_items
            or size_bytes + body_bytes > sender.max_batch_bytes
            or _has_lingered(batch[0], case, sender)
        ):
            yield batch
            batch, size_bytes = [], 0
        batch.append(case)
        size_bytes += body_bytes
    if batch:
        yield batch


def _has_lingered(first: Case, case: Case, sender: Sender) -> bool:
    if sender.samples_per_s is None:
        return False
    return case.taken_at_ms - first.taken_at_ms > sender.linger_s * 1000.0


def _plain_traffic(sizes: Iterable[int], sender: Sender) -> Traffic:
    up: list[_Packet] = []
    samples = 0
    for size in sizes:
        samples += 1
        whole, rest = divmod(size, MAX_PAYLOAD_BYTES)
        up += [_Packet(sender.topic, MAX_PAYLOAD_BYTES)] * whole
        if rest:
            up.append(_Packet(sender.topic, rest))
    return _count(samples, up, [])


def _count(samples: int, up: Sequence[_Packet], down: Sequence[_Packet]) -> Traffic:
    mqtt: dict[Protocol, Bytes] = {}
    tcp: dict[Protocol, Bytes] = {}
    for protocol in PROTOCOLS:
        sent = [publish_bytes(each.topic, each.payload_bytes, protocol) for each in up]
        sent += [PUBACK_BYTES] * len(down)
        got = [publish_bytes(each.topic, each.payload_bytes, protocol) for each in down]
        got += [PUBACK_BYTES] * len(up)
        mqtt[protocol] = Bytes(sum(sent), sum(got))
        out, back = tcp_bytes(sent), tcp_bytes(got)
        tcp[protocol] = Bytes(out.up + back.down, back.up + out.down)
    return Traffic(samples, len(up), sum(each.payload_bytes for each in up), mqtt, tcp)


def _varint_bytes(value: int) -> int:
    """How many bytes MQTT's variable byte integer takes (MQTT 5 section 1.5.5)."""
    return 1 + sum(value >= limit for limit in (128, 16_384, 2_097_152))
