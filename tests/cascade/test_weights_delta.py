import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from edge_cascade.deltas import decode_delta, encode_delta
from edge_cascade.errors import CascadeError, ProtocolError, TooLargeError
from edge_cascade.weights_delta import apply_weights, encode_weights

SHAPES = {"conv1": (32, 9, 9), "conv2": (64, 32, 5), "conv3": (128, 64, 5), "fc": (666, 128), "b": (128,)}


def weights_file(values, scales=None):
    """As a weights part has it: float32, and int8 with a scale per output channel."""
    tensors = {f"fp32/{name}": array for name, array in values.items()}
    for name, array in values.items():
        if array.ndim > 1:
            axes = tuple(range(1, array.ndim))
            scale = (np.abs(array).max(axis=axes) / 127).astype(np.float32)
            levels = np.rint(array / scale.reshape(-1, *[1] * (array.ndim - 1)))
            tensors[f"int8/{name}_scale"] = scale
            tensors[f"int8/{name}_quantized"] = np.clip(levels, -127, 127).astype(np.int8)
    return save(tensors)


def trained(seed=0, spread=0.02):
    rng = np.random.default_rng(seed)
    held = {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in SHAPES.items()}
    step = {name: rng.normal(0, spread, shape).astype(np.float32) for name, shape in SHAPES.items()}
    coded = decode_delta(encode_delta(step, "int8"), SHAPES, max_bytes=2**24)
    return held, {name: held[name] + coded[name] for name in held}


def test_weights_that_are_a_base_and_a_coded_delta_travel_in_less_than_200_kilobytes():
    held, wanted = trained()
    assert sum(array.size for array in wanted.values()) > 139_000
    before, after = weights_file(held), weights_file(wanted)
    delta = encode_weights(before, after)
    assert apply_weights(before, delta, max_bytes=len(after)) == after
    assert len(after) > 690_000
    assert len(delta) < 150_000


def test_int8_costs_next_to_nothing_beside_float32():
    held, wanted = trained()
    both = encode_weights(weights_file(held), weights_file(wanted))
    alone = encode_weights(
        save({f"fp32/{name}": array for name, array in held.items()}),
        save({f"fp32/{name}": array for name, array in wanted.items()}),
    )
    assert len(both) < 1.03 * len(alone)


ARRAYS = st.dictionaries(
    st.sampled_from(["fp32/a", "fp32/w", "int8/w_scale", "int8/w_quantized", "int8/b", "x"]),
    st.tuples(
        st.sampled_from([np.float32, np.int8, np.int32, np.uint8]),
        st.lists(st.integers(0, 5), max_size=3),
        st.integers(0, 2**32 - 1),
    ),
    max_size=5,
)


def made(arrays):
    """Any bits whatever: NaN, infinities and denormal numbers are among them."""
    tensors = {}
    for name, (dtype, shape, seed) in arrays.items():
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        content = np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8)
        tensors[name] = content.view(dtype).reshape(shape) if count else np.zeros(shape, dtype)
    return save(tensors)


@given(ARRAYS, ARRAYS)
@settings(deadline=None)
def test_any_two_files_lead_to_each_other_byte_for_byte(held, wanted):
    held, wanted = made(held), made(wanted)
    delta = encode_weights(held, wanted)
    assert apply_weights(held, delta, max_bytes=len(wanted)) == wanted


@given(st.data())
@settings(deadline=None, max_examples=200)
def test_a_spoiled_delta_is_an_error_or_another_file_never_a_crash(data):
    held = save({"fp32/w": np.ones((3, 4), np.float32), "int8/w_scale": np.ones(3, np.float32)})
    wanted = save({"fp32/w": np.full((3, 4), 1.5, np.float32), "int8/w_quantized": np.ones((3, 4), np.int8)})
    delta = bytearray(encode_weights(held, wanted))
    for _ in range(data.draw(st.integers(1, 4))):
        delta[data.draw(st.integers(0, len(delta) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(delta)))
    try:
        result = apply_weights(held, bytes(delta[:cut]), max_bytes=10_000)
    except CascadeError:
        return
    assert len(result) <= 10_000


def test_more_than_was_signed_is_refused_before_it_is_made():
    held, wanted = trained()
    before, after = weights_file(held), weights_file(wanted)
    with pytest.raises(TooLargeError):
        apply_weights(before, encode_weights(before, after), max_bytes=len(after) - 1)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"EWD1",
        struct.pack("<Q", 2**40) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 4) + b"null",
        struct.pack("<Q", 2) + b"{}" + b"x",
    ],
)
def test_what_is_no_safetensors_file_is_said(content):
    with pytest.raises(ProtocolError):
        encode_weights(content, content)


@pytest.mark.parametrize("offsets", [[0, 3], [4, 8], [-4, 0], [0.0, 4.0], [0, 4, 8]])
def test_tensors_elsewhere_than_they_must_be_are_refused(offsets):
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": offsets}}).encode()
    with pytest.raises(ProtocolError):
        encode_weights(
            save({"x": np.zeros(1, np.float32)}), struct.pack("<Q", len(header)) + header + bytes(4)
        )


def test_a_file_of_it_loads_again():
    held, wanted = trained()
    before, after = weights_file(held), weights_file(wanted)
    tensors = load(apply_weights(before, encode_weights(before, after), max_bytes=len(after)))
    assert all((tensors[f"fp32/{name}"] == array).all() for name, array in wanted.items())
