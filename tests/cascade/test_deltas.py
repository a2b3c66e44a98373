import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge_cascade.delta_payloads import BLOCK_VALUES, MAX_TOP_SHARE, Spans, payload_bounds
from edge_cascade.deltas import (
    Residual,
    decode_delta,
    encode_delta,
    encoding_of,
    layout_digest,
    with_feedback,
)
from edge_cascade.errors import ProtocolError, TooLargeError
from edge_cascade.tensors import deflate_bytes

ENCODINGS = ("fp32", "int8", "sign", "topk")
PROTOCOL = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text(encoding="utf-8")

TINY = float(np.finfo(np.float32).tiny)
LARGEST = float(np.finfo(np.float32).max)
SMALL = {
    "w": np.array([[1.0, -2.0, 0.0], [0.5, 4.0, -1.0]], dtype=np.float32),
    "b": np.array([0.5, -0.25], dtype=np.float32),
}
SHAPES = {"b": (2,), "w": (2, 3)}
HEADER = 10

encodings = st.sampled_from(ENCODINGS)
names = st.text(
    st.characters(min_codepoint=33, max_codepoint=0x17F, exclude_categories=("C", "Z")), max_size=6
)
ordinary = st.floats(-(2.0**60), 2.0**60, width=32)
any_finite = st.floats(allow_nan=False, allow_infinity=False, width=32)
shares = st.floats(1e-3, MAX_TOP_SHARE)


def deltas(elements=any_finite, max_side=40):
    arrays = hnp.arrays(
        np.float32, hnp.array_shapes(min_dims=0, max_dims=3, max_side=max_side), elements=elements
    )
    return st.dictionaries(names, arrays, min_size=1, max_size=4)


def shapes_of(delta):
    return {name: array.shape for name, array in delta.items()}


def size_of(delta):
    return sum(array.size for array in delta.values())


def round_trip(delta, encoding, **share):
    data = encode_delta(delta, encoding, **share)
    return decode_delta(data, shapes_of(delta), max_bytes=4 * size_of(delta))


def flat(delta):
    return np.concatenate([delta[name].ravel() for name in sorted(delta)])


def normal_delta(seed, **shapes):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def raw(code, payload, shapes):
    return bytes((1, code)) + layout_digest(shapes) + payload


class TestRoundTrips:
    @given(deltas(), encodings, shares)
    def test_every_finite_delta_can_be_read_back_in_its_names_and_shapes(self, delta, encoding, share):
        back = round_trip(delta, encoding, top_share=share)
        assert shapes_of(back) == shapes_of(delta)
        assert all(array.dtype == np.float32 and np.isfinite(array).all() for array in back.values())

    @given(deltas())
    def test_fp32_comes_back_bit_for_bit(self, delta):
        back = round_trip(delta, "fp32")
        assert all(back[name].tobytes() == delta[name].tobytes() for name in delta)

    @given(deltas())
    def test_int8_comes_back_within_half_a_step_of_the_largest_value_of_its_block(self, delta):
        back = round_trip(delta, "int8")
        for name, array in delta.items():
            values, read = array.ravel().astype(np.float64), back[name].ravel().astype(np.float64)
            for at in range(0, values.size, BLOCK_VALUES):
                block = slice(at, at + BLOCK_VALUES)
                step = max(np.abs(values[block]).max() / 127, TINY)
                assert np.abs(values[block] - read[block]).max() <= 0.5001 * step

    @given(deltas())
    def test_sign_comes_back_as_the_mean_magnitude_of_its_tensor(self, delta):
        back = round_trip(delta, "sign")
        for name, array in delta.items():
            mean = max(np.abs(array.astype(np.float64)).mean(), TINY)
            assert np.allclose(back[name], np.where(array >= 0, mean, -mean), rtol=1e-6, atol=0)

    @given(deltas(ordinary), shares)
    def test_topk_keeps_the_largest_values_and_leaves_the_rest_at_zero(self, delta, share):
        values, read = flat(delta).astype(np.float64), flat(round_trip(delta, "topk", top_share=share))
        wanted = max(1, int(share * values.size))
        kept = np.zeros(values.size, bool)
        kept[np.argsort(-np.abs(values), kind="stable")[:wanted]] = True
        step = max(np.abs(values).max() / 127, TINY)
        assert not read[~kept].any()
        assert np.abs(read[kept] - values[kept]).max() <= 0.5001 * step

    def test_a_small_block_keeps_its_own_scale_beside_a_large_one(self):
        delta = {"a": np.full(300, 1e6, np.float32), "b": np.full(300, 1e-6, np.float32)}
        delta["a"][BLOCK_VALUES:] = 1e-3
        back = round_trip(delta, "int8")
        assert np.allclose(back["a"], delta["a"], rtol=1e-6)
        assert np.allclose(back["b"], delta["b"], rtol=1e-6)

    def test_positions_of_one_to_four_bytes_come_back(self):
        positions = [0, 127, 128, 256, 257, 300, 20_000, 2_200_000, 4_999_999]
        delta = {"w": np.zeros(5_000_000, np.float32)}
        delta["w"][positions] = 1.0
        back = round_trip(delta, "topk")
        assert np.flatnonzero(back["w"]).tolist() == positions

    def test_topk_never_sends_a_zero_and_takes_the_earlier_of_equals(self):
        sparse = {"w": np.array([0, 0, 3, 0, 0, 0, 0, 0], np.float32)}
        assert struct.unpack_from("<I", encode_delta(sparse, "topk", top_share=0.5), HEADER) == (1,)
        equal = {"w": np.array([1, -1, 1, -1, 1, 1, 1, 1], np.float32)}
        assert round_trip(equal, "topk", top_share=0.25)["w"].tolist() == [1, -1, 0, 0, 0, 0, 0, 0]
        nothing = {"w": np.zeros(8, np.float32)}
        assert round_trip(nothing, "topk")["w"].tolist() == [0] * 8

    def test_the_order_of_names_and_of_memory_changes_nothing(self):
        turned = {"b": SMALL["b"], "w": np.asfortranarray(SMALL["w"])}
        for encoding in ENCODINGS:
            assert encode_delta(turned, encoding) == encode_delta(SMALL, encoding)

    def test_reading_neither_aliases_the_input_nor_freezes_the_arrays(self):
        for encoding in ENCODINGS:
            back = round_trip(SMALL, encoding)
            back["w"] += 1
            carried, residual = with_feedback(SMALL, Residual(), encoding)
            assert not any(
                np.shares_memory(SMALL[name], part[name])
                for part in (carried, residual.values)
                for name in SMALL
            )


GOLDEN_DIGEST = "6157d1bbc50fdc43"
GOLDEN_PAYLOADS = {
    "fp32": "0000003f 000080be 0000803f 000000c0 00000000 0000003f 00008040 000080bf",
    "int8": "0402813b 0402013d 7fc0 20c000107fe0",
    "sign": "0000c03e 5555b53f 75",
    "topk": "04000000 0402013d 20c07fe0 02000200",
}


class TestGoldenBytes:
    """One small delta in each encoding, byte for byte: b = 0.5 -0.25, w = 1 -2 0 / 0.5 4 -1."""

    def test_the_layout_digest_is_over_one_line_a_tensor(self):
        assert layout_digest(SHAPES).hex() == GOLDEN_DIGEST
        assert layout_digest({"w": (2, 3), "b": (2,)}) == layout_digest(SHAPES)

    @pytest.mark.parametrize("encoding", ENCODINGS)
    def test_these_are_the_bytes(self, encoding):
        code, payload = ENCODINGS.index(encoding), bytes.fromhex(GOLDEN_PAYLOADS[encoding])
        data = encode_delta(SMALL, encoding, top_share=0.5)
        header = bytes((1, code)) + bytes.fromhex(GOLDEN_DIGEST)
        if encoding == "fp32":  # the only one that deflate makes much smaller
            header = bytes((1, 0x80)) + bytes.fromhex(GOLDEN_DIGEST) + struct.pack("<I", len(payload))
            payload = deflate_bytes(payload)
        assert data.hex() == (header + payload).hex()
        assert encoding_of(data) == encoding
        plain = raw(code, bytes.fromhex(GOLDEN_PAYLOADS[encoding]), SHAPES)
        assert np.array_equal(
            flat(decode_delta(plain, SHAPES, max_bytes=32)), flat(round_trip(SMALL, encoding, top_share=0.5))
        )

    @pytest.mark.parametrize("encoding", ENCODINGS)
    def test_the_document_shows_them(self, encoding):
        shown = PROTOCOL.split(f"```hex delta {encoding}\n")[1].split("```")[0]
        written = "".join(line.split("  ")[0] for line in shown.splitlines())
        assert bytes.fromhex(written) == raw(
            ENCODINGS.index(encoding), bytes.fromhex(GOLDEN_PAYLOADS[encoding]), SHAPES
        )

    def test_floats_are_deflated_only_where_it_saves_a_tenth(self):
        delta = normal_delta(0, w=(10_000,))
        assert len(encode_delta(delta, "fp32")) == 10 + 40_000
        assert len(deflate_bytes(delta["w"].tobytes())) < 40_000

    def test_a_deflated_payload_has_its_length_before_it(self):
        delta = {"w": np.zeros(100, np.float32)}
        packed = (
            bytes((1, 0x80))
            + layout_digest({"w": (100,)})
            + struct.pack("<I", 400)
            + deflate_bytes(bytes(400))
        )
        assert encode_delta(delta, "fp32") == packed
        assert decode_delta(packed, {"w": (100,)}, max_bytes=400)["w"].tolist() == [0] * 100


class TestFeedback:
    @given(deltas(ordinary), encodings, shares)
    def test_the_residual_is_what_the_encoding_of_the_carried_delta_leaves_out(self, delta, encoding, share):
        carried, residual = with_feedback(delta, Residual(), encoding, top_share=share)
        again, after = with_feedback(delta, residual, encoding, top_share=share)
        for sent, left in ((carried, residual), (again, after)):
            back = round_trip(sent, encoding, top_share=share)
            assert all(np.array_equal(left.values[name], sent[name] - back[name]) for name in delta)
        assert all(np.array_equal(carried[name], delta[name]) for name in delta)
        assert all(np.array_equal(again[name], delta[name] + residual.values[name]) for name in delta)

    @settings(max_examples=40, deadline=None)
    @given(
        hnp.arrays(np.float32, (3, 8), elements=st.floats(-1, 1, width=32)),
        encodings,
        st.sampled_from([0.125, 0.25, 0.5]),
    )
    def test_what_was_read_over_many_rounds_converges_to_the_sum_of_the_deltas(self, three, encoding, share):
        """|residual| stays below 2 sqrt(1 - c) / c times the largest delta (Karimireddy 2019, lemma 3), however
        many rounds: c is the share of a squared norm that an encoding keeps at least, 1/8 for one value of eight."""
        rounds, residual, read, sent = 120, Residual(), np.zeros(8), np.zeros(8)
        for turn in range(rounds):
            delta = {"w": three[turn % 3]}
            carried, residual = with_feedback(delta, residual, encoding, top_share=share)
            read += round_trip(carried, encoding, top_share=share)["w"]
            sent += delta["w"]
        largest = max(np.linalg.norm(delta) for delta in three)
        assert np.allclose(read + residual.values["w"], sent, atol=1e-3)
        assert np.linalg.norm(read - sent) <= 2 * 8 * largest + 1e-3

    @pytest.mark.parametrize(("encoding", "share"), [("sign", 0.01), ("topk", 0.05)])
    def test_the_mean_of_what_was_read_comes_closer_with_every_round_and_without_feedback_it_does_not(
        self, encoding, share
    ):
        delta = normal_delta(3, w=(40, 20), b=(20,))
        residual, read, errors = Residual(), 0.0, {}
        for turn in range(1, 401):
            carried, residual = with_feedback(delta, residual, encoding, top_share=share)
            read = read + flat(round_trip(carried, encoding, top_share=share))
            errors[turn] = np.linalg.norm(read / turn - flat(delta)) / np.linalg.norm(flat(delta))
        without = flat(round_trip(delta, encoding, top_share=share))
        assert errors[400] < 0.05
        # Without a bound on the residual the mean would stay where it is. That of sign is still growing here.
        assert errors[400] < 0.5 * errors[100]
        assert np.linalg.norm(without - flat(delta)) / np.linalg.norm(flat(delta)) > 0.5

    def test_fp32_leaves_nothing_out(self):
        carried, residual = with_feedback(SMALL, Residual(), "fp32")
        assert not flat(residual.values).any()
        assert np.array_equal(flat(carried), flat(SMALL))

    def test_a_residual_of_another_base_is_refused(self):
        _, residual = with_feedback({"w": np.ones(3, np.float32)}, Residual(), "sign")
        with pytest.raises(ProtocolError, match="other names or shapes"):
            with_feedback(SMALL, residual, "sign")

    def test_a_sum_beyond_float32_is_refused_by_name(self):
        delta = {"w": np.full(2, LARGEST, np.float32)}
        with pytest.raises(ProtocolError, match="NaN or infinity"):
            with_feedback(delta, Residual(delta), "sign")


class TestRefusedOnTheWayOut:
    @pytest.mark.parametrize("encoding", ENCODINGS)
    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
    def test_a_value_that_is_not_finite(self, encoding, bad):
        delta = {"b": np.ones(2, np.float32), "w": np.array([1.0, bad], np.float32)}
        with pytest.raises(ProtocolError, match="'w' holds NaN or infinity"):
            encode_delta(delta, encoding)

    @pytest.mark.parametrize(
        ("delta", "message"),
        [
            ({}, "without tensors"),
            ({"w": np.ones(2)}, "float64"),
            ({"w": np.ones((2, 0), np.float32)}, "is empty"),
            ({"w\n2\t1": np.ones(1, np.float32)}, "not printable"),
            ({"\ud800": np.ones(1, np.float32)}, "not printable"),
        ],
    )
    def test_a_delta_that_has_no_layout(self, delta, message):
        with pytest.raises(ProtocolError, match=message):
            encode_delta(delta, "int8")

    @pytest.mark.parametrize("share", [0.0, -0.1, 0.51, float("nan")])
    def test_a_share_out_of_bounds(self, share):
        with pytest.raises(ValueError, match="top_share"):
            encode_delta(SMALL, "topk", top_share=share)


class TestRefusedOnTheWayIn:
    @settings(max_examples=300)
    @given(encodings, st.booleans(), st.binary(max_size=80))
    @example("topk", False, b"\x00\x00\x00\x00")
    @example("topk", True, b"\x00\x00\x00\x00")
    def test_any_payload_is_refused_or_a_finite_delta(self, encoding, deflated, payload):
        data = raw(ENCODINGS.index(encoding) | deflated << 7, payload, SHAPES)
        try:
            back = decode_delta(data, SHAPES, max_bytes=32)
        except ProtocolError:
            return
        assert shapes_of(back) == SHAPES
        assert np.isfinite(flat(back)).all()

    @settings(max_examples=300)
    @given(deltas(max_side=9), encodings, st.data())
    def test_a_changed_byte_is_refused_or_another_finite_delta(self, delta, encoding, data):
        encoded = bytearray(encode_delta(delta, encoding, top_share=0.5))
        at = data.draw(st.integers(0, len(encoded) - 1))
        encoded[at] ^= data.draw(st.integers(1, 255))
        try:
            back = decode_delta(bytes(encoded), shapes_of(delta), max_bytes=4 * size_of(delta))
        except ProtocolError:
            return
        assert shapes_of(back) == shapes_of(delta)
        assert np.isfinite(flat(back)).all()

    @given(deltas(max_side=9), encodings, st.data())
    def test_a_truncated_or_extended_delta_is_refused(self, delta, encoding, data):
        encoded, bound = encode_delta(delta, encoding, top_share=0.5), 4 * size_of(delta)
        cut = data.draw(st.integers(0, len(encoded) - 1))
        for damaged in (encoded[:cut], encoded + b"\0"):
            with pytest.raises(ProtocolError):
                decode_delta(damaged, shapes_of(delta), max_bytes=bound)

    @given(st.binary(max_size=40))
    def test_random_bytes_are_refused(self, data):
        with pytest.raises(ProtocolError):
            decode_delta(data, SHAPES, max_bytes=32)

    @pytest.mark.parametrize(
        ("start", "message"),
        [(b"\x02\x00", "version 2"), (b"\x01\x04", "encoding 4"), (b"\x01\x7f", "encoding 127")],
    )
    def test_an_unknown_version_or_encoding(self, start, message):
        with pytest.raises(ProtocolError, match=message):
            decode_delta(start + bytes(40), SHAPES, max_bytes=32)

    @pytest.mark.parametrize(
        "shapes",
        [{"b": (2,), "w": (3, 2)}, {"b": (2,), "w": (6,)}, {"b": (2,), "v": (2, 3)}, {"b": (6,), "w": (2,)}],
    )
    def test_a_base_of_other_names_or_shapes(self, shapes):
        with pytest.raises(ProtocolError, match="other names or shapes"):
            decode_delta(encode_delta(SMALL, "fp32"), shapes, max_bytes=1000)

    @pytest.mark.parametrize("encoding", ENCODINGS)
    def test_arrays_above_the_bound(self, encoding):
        with pytest.raises(TooLargeError, match="at most 31"):
            decode_delta(encode_delta(SMALL, encoding), SHAPES, max_bytes=31)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_fp32_that_is_not_finite(self, bad):
        with pytest.raises(ProtocolError, match="NaN or infinity"):
            decode_delta(raw(0, struct.pack("<8f", *[1.0] * 7, bad), SHAPES), SHAPES, max_bytes=32)

    @pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
    @pytest.mark.parametrize(("code", "rest"), [(1, bytes(8)), (2, b"\0")])
    def test_a_scale_that_is_not_a_positive_number(self, scale, code, rest):
        with pytest.raises(ProtocolError, match="not a positive number"):
            decode_delta(raw(code, struct.pack("<2f", 1.0, scale) + rest, SHAPES), SHAPES, max_bytes=32)

    def test_a_scale_that_makes_a_value_infinite(self):
        with pytest.raises(ProtocolError, match="NaN or infinity"):
            decode_delta(raw(1, struct.pack("<2f", 1.0, LARGEST) + b"\x02" * 8, SHAPES), SHAPES, max_bytes=32)

    def test_minus_128(self):
        with pytest.raises(ProtocolError, match="-128"):
            decode_delta(raw(1, struct.pack("<2f", 1.0, 1.0) + b"\x80" * 8, SHAPES), SHAPES, max_bytes=32)

    def test_bits_beyond_the_last_sign(self):
        payload = struct.pack("<f", 1.0) + b"\x3f"
        assert (
            decode_delta(raw(2, payload, {"w": (6,)}), {"w": (6,)}, max_bytes=24)["w"].tolist() == [1.0] * 6
        )
        with pytest.raises(ProtocolError, match="beyond its last value"):
            decode_delta(raw(2, payload[:-1] + b"\x7f", {"w": (6,)}), {"w": (6,)}, max_bytes=24)

    @pytest.mark.parametrize(
        ("count", "values", "positions", "message"),
        [
            (2, b"\1\1", b"\0\6", None),
            (2, b"\1\1", b"\0\7", "beyond its 8 values"),
            (1, b"\1", b"\x08", "beyond its 8 values"),
            (1, b"\1", b"\xff\x7f", "beyond its 8 values|allows"),
            (1, b"\1", b"\x80\0", "over-long"),
            (2, b"\1\1", b"\0\x80", "positions for 1"),
            (2, b"\1\1", b"\0", "positions for 1"),
            (1, b"\1", b"\0\0", "positions for 2"),
            (0, b"", b"\0", "ends before|positions for 1"),
            (5, b"\1" * 5, b"\0\0", "keeps 5 of 8 values"),
            (4, b"\1", b"", "ends before its positions"),
        ],
    )  # fmt: skip
    def test_positions_that_do_not_fit_their_count_or_base(self, count, values, positions, message):
        scale = struct.pack("<f", 1.0) if count else b""
        data = raw(3, struct.pack("<I", count) + scale + values + positions, {"w": (8,)})
        if message is None:
            assert decode_delta(data, {"w": (8,)}, max_bytes=32)["w"].tolist() == [1, 0, 0, 0, 0, 0, 0, 1]
            return
        with pytest.raises(ProtocolError, match=message):
            decode_delta(data, {"w": (8,)}, max_bytes=32)

    def test_a_position_longer_than_five_bytes(self):
        shapes = {"w": (5000,)}
        payload = struct.pack("<If", 1, 1.0) + b"\1" + b"\x80" * 9 + b"\1"
        with pytest.raises(ProtocolError, match="over-long"):
            decode_delta(raw(3, payload, shapes), shapes, max_bytes=20_000)

    @pytest.mark.parametrize("code", range(4))
    def test_a_deflate_bomb_is_refused_by_its_announced_length_or_where_it_passes_it(self, code):
        bomb = deflate_bytes(bytes(50_000_000))
        tracemalloc.start()
        for announced in (50_000_000, payload_bounds(Spans((0, 2), 8), ENCODINGS[code])[1]):
            with pytest.raises(TooLargeError):
                decode_delta(
                    raw(code | 0x80, struct.pack("<I", announced) + bomb, SHAPES), SHAPES, max_bytes=32
                )
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 6 * len(bomb) + 100_000

    @pytest.mark.parametrize("encoding", ENCODINGS)
    def test_reading_takes_at_most_eight_times_the_decoded_arrays(self, encoding):
        size = 2**18
        data = encode_delta(normal_delta(0, w=(size,)), encoding, top_share=MAX_TOP_SHARE)
        tracemalloc.start()
        decode_delta(data, {"w": (size,)}, max_bytes=4 * size)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8 * 4 * size

    @given(st.integers(1, 5000), shares, st.integers(0, 2**32 - 1))
    def test_no_delta_is_longer_than_its_bound(self, size, share, seed):
        delta = normal_delta(seed, w=(size,))
        for encoding in ENCODINGS:
            longest = payload_bounds(Spans((0,), size), encoding)[1]
            assert len(encode_delta(delta, encoding, top_share=share)) <= HEADER + longest


class TestSizes:
    @pytest.mark.parametrize(("column", "parameters"), [(1, 27_000), (2, 120_000)])
    def test_the_documents_sizes_are_what_the_code_writes(self, column, parameters):
        tensors = 10
        delta = normal_delta(0, **{f"w{i}": (parameters // tensors,) for i in range(tensors)})
        stated = PROTOCOL.split("### Sizes of deltas")[1].split("\n## ")[0].splitlines()
        cells = [
            [cell.strip().strip("`") for cell in line.split("|")[1:-1]]
            for line in stated
            if line.startswith("|")
        ]
        rows = {row[0]: int(row[column].replace(",", "")) for row in cells if row[0] in ENCODINGS}
        measured = {encoding: len(encode_delta(delta, encoding)) for encoding in ENCODINGS}
        # zlib's releases differ by a little.
        assert measured == {name: pytest.approx(value, rel=0.02) for name, value in rows.items()}
