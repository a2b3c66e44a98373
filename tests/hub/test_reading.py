"""From payload to delivery: nothing that arrives can end the hub or cost it more than its bounds."""

import struct
import tracemalloc

from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_hub.core.admission import Shape
from cloud_hub.core.delivery import Delivery
from cloud_hub.intake import Intake, Taken
from cloud_hub.reading import FleetReassembler, Reader
from edge_cascade.codec import MAGIC, VERSION, encode, frame_digest, split_frame
from edge_cascade.messages import (
    Acks,
    BaseRequest,
    Chunk,
    ClientUpdate,
    Kind,
    Receipt,
    Receipts,
    Report,
    Status,
)
from edge_cascade.tensors import deflate_bytes
from tests.hub.fleet import BOOT, a_batch, a_case

# A busy machine is no finding.
unhurried = settings(deadline=None)

TOPIC = "edge/v1/press-1/up/cases"
MAX_FRAME = 2**20


def a_reader(**changes):
    settings_ = {"holdout_share": 0.3, "max_payload_bytes": 200_000, "max_frame_bytes": MAX_FRAME}
    return Reader("edge", shapes=lambda: {"pump": Shape((2, 4), 3)}, **(settings_ | changes))


def read(payload, topic=TOPIC, reader=None):
    return (reader or a_reader()).read(Taken(topic, payload, 0.0))


def refused_as(payload, kind, topic=TOPIC, reader=None):
    delivery = read(payload, topic, reader)
    assert delivery.refused
    assert delivery.counts == {f"malformed/{kind}": 1}
    assert delivery.cases == []
    return delivery


GOOD = encode(a_batch(*[a_case(seq) for seq in range(5)]))


@unhurried
@given(st.binary(max_size=300))
def test_random_bytes_are_refused_by_their_digest(payload):
    delivery = read(payload)
    assert delivery.refused
    assert delivery.frame_digest == frame_digest(payload)


@unhurried
@given(st.sampled_from(list(Kind)), st.binary(max_size=200), st.booleans())
def test_random_bodies_behind_a_good_header_end_nothing(kind, body, deflated):
    frame = bytes((MAGIC, VERSION, kind, deflated))
    frame += struct.pack("<I", len(body)) + deflate_bytes(body) if deflated else body
    for channel in ("cases", "update", "status", "telemetry"):
        delivery = read(frame, f"edge/v1/press-1/up/{channel}")
        assert delivery is None or isinstance(delivery, Delivery)


@unhurried
@given(st.integers(min_value=0, max_value=len(GOOD) - 1))
def test_a_truncated_frame_is_refused(cut):
    assert read(GOOD[:cut]).refused


@unhurried
@given(st.integers(min_value=0, max_value=len(GOOD) - 1), st.integers(min_value=1, max_value=255))
def test_a_flipped_byte_is_refused_or_rejected_or_is_another_case(position, flip):
    damaged = bytearray(GOOD)
    damaged[position] ^= flip
    delivery = read(bytes(damaged))
    assert delivery.refused or len(delivery.cases) + len(delivery.rejected) == 5


def test_a_deflate_bomb_is_refused_without_inflating_it():
    bomb = deflate_bytes(bytes(64 * 2**20))
    reader = a_reader()
    for announced in (64 * 2**20, MAX_FRAME, 100):
        frame = bytes((MAGIC, VERSION, Kind.CASES, 1)) + struct.pack("<I", announced) + bomb
        tracemalloc.start()
        refused_as(frame, "oversize", reader=reader)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 4 * MAX_FRAME


def test_a_list_that_only_claims_to_be_long_allocates_nothing():
    # msgpack: array of 6, then strings and, where the cases belong, an array of 2**32 - 1 entries.
    for body in (
        b"\xdd\xff\xff\xff\xff",
        b"\x96\xa1d\xc4\x08" + BOOT + b"\xa1m\xc4\x20" + bytes(32) + b"\xa1p\xdd\xff\xff\xff\xff",
    ):
        tracemalloc.start()
        refused_as(bytes((MAGIC, VERSION, Kind.CASES, 0)) + body, "frame")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2**20


def test_an_oversize_payload_is_refused_before_it_is_read():
    refused_as(GOOD + bytes(200_000), "oversize")


def test_a_foreign_device_in_the_payload_is_refused_on_every_kind():
    messages = [
        a_batch(a_case(1), device="press-2"),
        Report("press-2", BOOT, 1, 2, {}),
        ClientUpdate("press-2", BOOT, 1, "pump", "r", bytes(32), 1, "int8", b"d"),
        Status("press-2", True, BOOT, "1"),
        BaseRequest("press-2", "pump", bytes(32), bytes(32)),
    ]
    for message in messages:
        assert refused_as(encode(message), "device", "edge/v1/press-1/up/status").device == "press-1"


def test_a_request_for_a_training_base_is_passed_on_and_a_name_that_no_model_has_is_refused():
    request = BaseRequest("press-1", "pump", bytes(32), bytes(32))
    delivery = read(encode(request), "edge/v1/press-1/up/telemetry")
    assert (delivery.base_request, delivery.refused) == (request, None)
    refused_as(encode(BaseRequest("press-1", "p\0", bytes(32), bytes(32))), "name")


def test_what_only_the_hub_says_is_refused_from_a_device():
    refused_as(encode(Acks(BOOT)), "kind")


def test_a_topic_that_is_not_ours_is_counted_and_answered_to_nobody():
    for topic in ("edge/v1/press-1/up/other", "x/v1/press-1/up/cases", "edge/v1/$bad/up/cases", "edge"):
        assert refused_as(GOOD, "topic", topic).device is None


def test_chunks_in_any_order_become_their_frame():
    reader = a_reader()
    pieces = split_frame(GOOD, 120)
    assert len(pieces) > 1
    assert [read(piece, reader=reader) for piece in reversed(pieces[1:])] == [None] * (len(pieces) - 1)
    assert len(read(pieces[0], reader=reader).cases) == 5


def test_chunks_of_two_devices_do_not_mix():
    reader = a_reader()
    first, *rest = split_frame(GOOD, 120)
    assert read(first, reader=reader) is None
    for piece in rest:
        assert read(piece, "edge/v1/press-2/up/cases", reader=reader) is None


def test_a_frame_that_was_chunked_is_refused_by_its_own_digest():
    frame = encode(a_batch(a_case(1), device="press-2")) + bytes(500)
    reader = a_reader()
    *most, last = split_frame(frame, 200)
    for piece in most:
        assert read(piece, reader=reader) is None
    assert refused_as(last, "frame", reader=reader).frame_digest == frame_digest(frame)


def test_incomplete_frames_are_bounded_over_the_whole_fleet():
    fleet = FleetReassembler(max_frame_bytes=10_000, max_held_bytes=50_000, max_devices=20)
    for number in range(500):
        chunk = Chunk(number.to_bytes(32, "big"), 0, 2, 9_000, bytes(4_000))
        assert fleet.add(f"device-{number}", chunk) is None
        assert fleet.held_bytes <= 50_000
    assert fleet.held_bytes > 0


def test_an_empty_retained_status_is_an_operators_broom():
    assert read(b"", "edge/v1/press-1/up/status") is None


def test_receipts_are_read_on_any_channel():
    delivery = read(encode(Receipts([Receipt(BOOT, 1, 1)])), "edge/v1/press-1/up/telemetry")
    assert delivery.receipts == (Receipt(BOOT, 1, 1),)


def test_a_thousand_receipts_of_one_verdict_are_one_of_its_last_revision():
    said = [Receipt(BOOT, 1 + number % 2, number // 2) for number in range(1024)]
    delivery = read(encode(Receipts(said)), "edge/v1/press-1/up/telemetry")
    assert delivery.receipts == (Receipt(BOOT, 1, 511), Receipt(BOOT, 2, 511))


def test_a_full_intake_takes_nothing_more_and_counts_it():
    intake = Intake(max_messages=2, max_bytes=10_000)
    assert [intake.offer(Taken("t", b"x", 0.0)) for _ in range(3)] == [True, True, False]
    assert len(intake.take(10, 10_000)) == 2
    assert [intake.offer(Taken("t", bytes(9_000), 0.0)) for _ in range(2)] == [True, False]
    assert intake.not_taken == 2


def test_a_closed_intake_gives_what_it_has_and_then_ends():
    intake = Intake()
    intake.offer(Taken("t", b"x", 0.0))
    intake.close()
    assert not intake.offer(Taken("t", b"y", 0.0))
    assert [len(intake.take(10, 10_000)) for _ in range(2)] == [1, 0]
