import hashlib
import random
import struct

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_cascade.codec import (
    MAGIC,
    VERSION,
    Reassembler,
    decode,
    decode_as,
    encode,
    frame_digest,
    iterate_kinds,
    split_frame,
)
from edge_cascade.errors import ProtocolError, TooLargeError
from edge_cascade.messages import (
    Acks,
    BaseRequest,
    Case,
    CaseBatch,
    Chunk,
    ClientUpdate,
    DesiredModel,
    DesiredState,
    DifferingPair,
    Kind,
    Reason,
    Receipt,
    Receipts,
    Refusal,
    Rejection,
    Report,
    RoundOffer,
    RunningModel,
    ShadowReport,
    ShadowScene,
    Source,
    Status,
    SwapReport,
    TrainingBase,
    Use,
    Verdict,
    VerdictBatch,
)
from edge_cascade.tensors import deflate_bytes

BOOT = bytes(range(8))
DIGEST = bytes(range(32))
CASE = Case(7, "bearing", 1_700_000_000_000, 3, bytes(14), True, 0, Reason.UNSURE, True, True, b"tensor")
BATCH = CaseBatch("pump-1", BOOT, "vibration", DIGEST, "int8", [CASE])

EXAMPLES = [
    BATCH,
    Acks(BOOT, [1, 2], [3], [Rejection(4, "shape")], [Refusal(bytes(8), "version")]),
    VerdictBatch("m", DIGEST, [Verdict(BOOT, 7, "s", 2, bytes(8), Source.HUMAN, Use.HOLDOUT, 1)]),
    Receipts([Receipt(BOOT, 7, 0)]),
    Status("pump-1", True, BOOT, "0.1.0", [RunningModel("m", DIGEST, "int8", 3)]),
    Report("pump-1", BOOT, 9, 0, {"samples": 5}),
    DesiredState("pump-1", 1, [DesiredModel("m", "r1", DIGEST)]),
    RoundOffer(b"terms", bytes(64), 3600),
    ClientUpdate("pump-1", BOOT, 1, "m", "r", DIGEST, 5, "fp32", bytes(100)),
    Chunk(DIGEST, 0, 2, 100, b"x"),
    BaseRequest("pump-1", "m", DIGEST, bytes(32)),
    TrainingBase("m", DIGEST, bytes(32), [b"step"]),
    SwapReport("pump-1", BOOT, 3, 0, "m", "7", DIGEST, DIGEST, "golden", "0.2 off"),
    ShadowReport("pump-1", BOOT, 4, "m", DIGEST, DIGEST, [ShadowScene("s", 5, [DifferingPair(9, 1, 2)])]),
]


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_every_message_comes_back_as_it_was(message):
    assert decode(encode(message)) == message


def test_every_kind_has_an_example_here():
    assert {type(message) for message in EXAMPLES} == {message for _, message in iterate_kinds()}


def test_cases_that_resemble_each_other_are_deflated_together():
    one = len(encode(BATCH))
    cases = [msgspec.structs.replace(CASE, seq=n, tensor=bytes(50)) for n in range(50)]
    assert len(encode(msgspec.structs.replace(BATCH, cases=cases))) < 10 * one


@settings(max_examples=300)
@given(st.binary(max_size=300))
def test_random_bytes_are_refused_by_name(data):
    with pytest.raises(ProtocolError):
        decode(data)


@settings(max_examples=300)
@given(st.sampled_from(list(Kind)), st.integers(0, 3), st.binary(max_size=200))
def test_random_bodies_behind_a_valid_header_are_refused_or_a_message(kind, flags, body):
    try:
        message = decode(bytes((MAGIC, VERSION, kind, flags)) + body)
    except ProtocolError:
        return
    assert decode(encode(message)) == message


@given(st.sampled_from(EXAMPLES), st.data())
def test_a_truncated_frame_is_refused(message, data):
    frame = encode(message)
    with pytest.raises(ProtocolError):
        decode(frame[: data.draw(st.integers(0, len(frame) - 1))])


def test_an_unknown_version_names_itself_and_what_this_side_reads():
    frame = bytearray(encode(BATCH))
    frame[1] = 9
    with pytest.raises(ProtocolError, match=r"version 9.*\(1,\)"):
        decode(bytes(frame))


def test_a_field_added_later_is_ignored_and_a_missing_one_gets_its_default():
    acks = Acks(BOOT, [1])
    body = msgspec.msgpack.encode([*msgspec.to_builtins(acks, builtin_types=(bytes,)), "from the future"])
    header = bytes((MAGIC, VERSION, Kind.ACKS, 0))
    assert decode(header + body) == acks
    assert decode(header + msgspec.msgpack.encode([BOOT])) == Acks(BOOT)


def test_a_bomb_is_refused_by_its_announcement_and_by_its_true_size():
    bomb = deflate_bytes(bytes(100 * 2**20))
    header = bytes((MAGIC, VERSION, Kind.CASES, 1))
    with pytest.raises(TooLargeError, match="announces"):
        decode(header + struct.pack("<I", 100 * 2**20) + bomb)
    with pytest.raises(TooLargeError, match="inflates"):
        decode(header + struct.pack("<I", 1000) + bomb)


def test_a_body_nested_deep_is_refused_without_exhausting_the_stack():
    with pytest.raises(ProtocolError):
        decode(bytes((MAGIC, VERSION, Kind.REPORT, 0)) + b"\x91" * 100_000 + b"\xc0")


def test_another_kind_than_the_expected_one_is_refused():
    with pytest.raises(ProtocolError, match="Acks where a CaseBatch"):
        decode_as(encode(Acks(BOOT)), CaseBatch)


@pytest.mark.parametrize(
    "change",
    [{"boot": b"short"}, {"bundle": b""}, {"device": ""}, {"device": "x" * 129}, {"cases": []}],
    ids=str,
)
def test_values_outside_their_bounds_are_refused(change):
    with pytest.raises(ProtocolError):
        decode(encode(msgspec.structs.replace(BATCH, **change)))


def test_a_client_update_without_examples_is_refused():
    update = ClientUpdate("pump-1", BOOT, 1, "m", "r", DIGEST, 0, "fp32", b"")
    with pytest.raises(ProtocolError):
        decode(encode(update))


class TestChunks:
    frame = encode(ClientUpdate("d", BOOT, 1, "m", "r", DIGEST, 5, "fp32", random.Random(0).randbytes(5000)))

    def chunks(self, size=1000):
        return [decode_as(piece, Chunk) for piece in split_frame(self.frame, size)]

    @given(st.randoms(use_true_random=False), st.integers(100, 6000))
    def test_come_together_in_any_order_and_with_repetitions(self, rng, size):
        pieces = split_frame(self.frame, size)
        assert all(len(piece) <= size for piece in pieces)
        if len(pieces) == 1:
            assert pieces == [self.frame]
            return
        chunks = [decode_as(piece, Chunk) for piece in pieces]
        rng.shuffle(chunks)
        reassembler = Reassembler()
        results = [reassembler.add(chunk) for chunk in [*chunks[:-1], *chunks[:-1], chunks[-1]]]
        assert [result for result in results if result is not None] == [self.frame]
        assert reassembler.held_bytes == 0

    def test_a_changed_byte_is_found_by_the_digest(self):
        chunks = self.chunks()
        chunks[2] = msgspec.structs.replace(chunks[2], data=chunks[2].data[:-1] + b"\0")
        reassembler = Reassembler()
        with pytest.raises(ProtocolError, match="digest"):
            for chunk in chunks:
                reassembler.add(chunk)
        assert reassembler.held_bytes == 0

    def test_chunks_that_disagree_are_refused_and_forgotten(self):
        chunks = self.chunks()
        reassembler = Reassembler()
        reassembler.add(chunks[0])
        with pytest.raises(ProtocolError, match="disagree"):
            reassembler.add(msgspec.structs.replace(chunks[1], total_bytes=9))
        assert reassembler.held_bytes == 0

    def test_more_than_may_be_held_is_refused_before_it_is_held(self):
        with pytest.raises(TooLargeError):
            Reassembler(max_held_bytes=1000).add(self.chunks()[0])

    def test_a_flood_of_beginnings_stays_within_the_bound_and_is_counted(self):
        reassembler = Reassembler(max_held_bytes=10_000, max_frames=4)
        for n in range(50):
            reassembler.add(Chunk(hashlib.sha256(bytes([n])).digest(), 0, 9, 9000, bytes(3000)))
        assert reassembler.held_bytes <= 10_000
        assert reassembler.forgotten == 47

    @given(
        st.builds(
            Chunk,
            st.binary(min_size=32, max_size=32),
            st.integers(0, 9),
            st.integers(1, 9),
            st.integers(0, 99),
            st.binary(max_size=50),
        )
    )
    def test_random_chunks_never_raise_anything_else(self, chunk):
        try:
            Reassembler().add(chunk)
        except ProtocolError:
            return

    def test_too_small_a_limit_says_so(self):
        with pytest.raises(TooLargeError, match="chunks"):
            split_frame(bytes(10_000_000), 90)


def test_a_frame_is_known_by_eight_bytes_of_its_digest():
    assert frame_digest(b"abc") == hashlib.sha256(b"abc").digest()[:8]
