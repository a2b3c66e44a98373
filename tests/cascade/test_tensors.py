import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge_cascade.errors import ProtocolError, TooLargeError
from edge_cascade.manifest import Wire
from edge_cascade.tensors import decode_tensor, deflate_bytes, encode_tensor, inflate_bytes, through_wire

shapes = hnp.array_shapes(min_dims=1, max_dims=4, max_side=9)
values = st.floats(-(2.0**100), 2.0**100, width=32)
arrays = hnp.arrays(np.float32, shapes, elements=values)


@given(arrays, st.booleans())
def test_float32_comes_back_bit_for_bit(x, deflate):
    assert np.array_equal(decode_tensor(encode_tensor(x, Wire("float32"), deflate=deflate)), x)


@given(arrays, st.booleans())
def test_int8_comes_back_within_half_a_step_of_the_largest_value(x, deflate):
    back = decode_tensor(encode_tensor(x, Wire("int8"), deflate=deflate))
    step = max(float(np.abs(x).max()) / 127, float(np.finfo(np.float32).tiny))
    assert back.shape == x.shape
    assert np.abs(back.astype(np.float64) - x).max() <= step * 0.5001


def test_a_declared_scale_keeps_small_integers_exact():
    x = np.arange(-16, 17, dtype=np.float32)
    assert np.array_equal(through_wire(x, Wire("int8", scale=1.0)), x)


def test_int8_saturates_instead_of_wrapping_around():
    x = np.array([-1000.0, 1000.0], dtype=np.float32)
    assert through_wire(x, Wire("int8", scale=1.0)).tolist() == [-127.0, 127.0]


def test_deflate_is_left_out_where_it_would_not_make_the_tensor_smaller():
    x = np.random.default_rng(0).standard_normal(8).astype(np.float32)
    assert encode_tensor(x, Wire("float32"), deflate=True) == encode_tensor(x, Wire("float32"))


def test_wire_is_idempotent_so_that_a_stored_case_can_be_encoded_again():
    x = np.random.default_rng(0).standard_normal((3, 50)).astype(np.float32)
    once = through_wire(x, Wire("int8"))
    assert np.allclose(through_wire(once, Wire("int8")), once, rtol=1e-6)


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_or_a_small_tensor(data):
    try:
        tensor = decode_tensor(data, max_bytes=4096)
    except ProtocolError:
        return
    assert tensor.nbytes <= 4096
    assert np.isfinite(tensor).all()


@given(arrays, st.booleans(), st.data())
def test_a_truncated_or_extended_tensor_is_refused(x, deflate, data):
    encoded = encode_tensor(x, Wire("int8"), deflate=deflate)
    cut = data.draw(st.integers(0, len(encoded) - 1))
    with pytest.raises(ProtocolError):
        decode_tensor(encoded[:cut])
    with pytest.raises(ProtocolError):
        decode_tensor(encoded + b"\0")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(bad):
    with pytest.raises(ProtocolError, match="NaN or infinity"):
        decode_tensor(encode_tensor(np.array([1.0, bad], dtype=np.float32), Wire("float32")))


def test_a_shape_above_the_bound_is_refused_before_it_is_allocated():
    header = bytes((0, 4)) + b"\xff\xff\xff\xff\x0f" * 4
    with pytest.raises(TooLargeError, match="at most"):
        decode_tensor(header)


def test_a_deflate_bomb_is_refused_at_the_announced_size():
    bomb = deflate_bytes(bytes(200 * 2**20))
    with pytest.raises(TooLargeError, match="announced"):
        inflate_bytes(bomb, 1000)
    tensor = bytes((0x80, 1, 10)) + bomb
    with pytest.raises(TooLargeError):
        decode_tensor(tensor)


def test_bytes_after_a_deflate_stream_are_refused():
    with pytest.raises(ProtocolError, match="announced"):
        inflate_bytes(deflate_bytes(b"abc") + b"tail", 3)


def test_a_zlib_header_is_no_raw_deflate_stream():
    with pytest.raises(ProtocolError, match="damaged"):
        inflate_bytes(zlib.compress(b"abc" * 100), 300)
