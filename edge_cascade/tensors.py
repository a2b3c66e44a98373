"""Arrays <-> bytes. No I/O, no pickle; every size is bounded before anything is allocated for it.

    byte 0      encoding: 0 float32, 1 int8, 2 uint8, both scaled; bit 7 set where the payload is deflated
    byte 1      number of axes, 1 to 8
    ...         each size as an unsigned LEB128
    4 bytes     scale, float32 little-endian (int8 and uint8 only)
    ...         the values in C order, little-endian; raw DEFLATE (RFC 1951) if bit 7 is set

Inside a batch of cases the tensors are not deflated one by one: the frame is deflated as a whole, which
finds what the samples have in common.
"""

from __future__ import annotations

import math
import struct
import zlib
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge_cascade.errors import ProtocolError, TooLargeError
from edge_cascade.manifest import Wire

MAX_AXES: Final = 8
MAX_TENSOR_BYTES: Final = 64 * 2**20

_FLOAT32: Final = 0
_DEFLATED: Final = 0x80
_DTYPES: Final = ("<f4", "i1", "u1")  # by encoding
_CODES: Final = {"float32": _FLOAT32, "int8": 1, "uint8": 2}
_RANGES: Final = {"int8": (-127, 127), "uint8": (0, 255)}
_SCALE = struct.Struct("<f")


def encode_tensor(x: NDArray[np.float32], wire: Wire, *, deflate: bool = False) -> bytes:
    """Encode a float32 array of 1 to 8 axes as `wire` says; see the module's head for the layout."""
    code = _CODES[wire.encoding]
    header = bytearray((code, x.ndim))
    for size in x.shape:
        _append_varint(header, size)
    if wire.encoding != "float32":
        lowest, highest = _RANGES[wire.encoding]
        scale = wire.scale if wire.scale is not None else _scale_of(x, highest)
        header += _SCALE.pack(scale)
        # What the reader multiplies by is the float32 that was written, so divide by the same.
        stored = np.float32(_SCALE.unpack(header[-_SCALE.size :])[0])
        payload: bytes = np.clip(np.rint(x / stored), lowest, highest).astype(_DTYPES[code]).tobytes()
    else:
        payload = x.astype("<f4", copy=False).tobytes()
    if deflate:
        packed = deflate_bytes(payload)
        if len(packed) < len(payload):
            header[0] |= _DEFLATED
            payload = packed
    return bytes(header) + payload


def decode_tensor(data: bytes, *, max_bytes: int = MAX_TENSOR_BYTES) -> NDArray[np.float32]:
    """The array that `encode_tensor` was given, as float32 (int8 and uint8: to within half a scale).

    `max_bytes` bounds the decoded float32 array.

    Raises:
        TooLargeError: before the array is allocated.
        ProtocolError: for anything that is no tensor of this layout, infinities and NaN included.
    """
    if len(data) < 2:
        raise ProtocolError(f"tensor of {len(data)} bytes is shorter than its header")
    encoding, axes = data[0] & ~_DEFLATED, data[1]
    if encoding >= len(_DTYPES):
        raise ProtocolError(f"unknown tensor encoding {encoding}")
    if not 1 <= axes <= MAX_AXES:
        raise ProtocolError(f"tensor of {axes} axes, expected 1 to {MAX_AXES}")
    shape, offset = _read_shape(data, axes)
    elements = math.prod(shape)
    if elements * 4 > max_bytes:
        raise TooLargeError(f"tensor {shape} takes {elements * 4} bytes, at most {max_bytes} are read")
    scale = np.float32(1.0)
    if encoding != _FLOAT32:
        scale, offset = _read_scale(data, offset)
    expected = elements * np.dtype(_DTYPES[encoding]).itemsize
    payload = data[offset:]
    if data[0] & _DEFLATED:
        payload = inflate_bytes(payload, expected)
    if len(payload) != expected:
        raise ProtocolError(f"tensor {shape} needs {expected} bytes, has {len(payload)}")
    # An overflow becomes an infinity, which is refused below by name.
    with np.errstate(over="ignore"):
        values = np.frombuffer(payload, dtype=_DTYPES[encoding]).astype(np.float32) * scale
    if not np.isfinite(values).all():
        raise ProtocolError(f"tensor {shape} holds NaN or infinity")
    return values.reshape(shape)


def through_wire(x: NDArray[np.float32], wire: Wire) -> NDArray[np.float32]:
    """What the other side will see of `x` (one sample): calibration must see the same."""
    return decode_tensor(encode_tensor(x, wire))


def deflate_bytes(data: bytes) -> bytes:
    """Raw DEFLATE, without zlib's header and checksum: MQTT runs over TCP."""
    compressor = zlib.compressobj(level=6, wbits=-zlib.MAX_WBITS)
    return b"".join((compressor.compress(data), compressor.flush()))


def inflate_bytes(data: bytes, expected_bytes: int) -> bytes:
    """Inflate raw DEFLATE of exactly `expected_bytes`; never allocates more than one byte beyond them.

    Raises:
        ProtocolError: when the data is damaged, too short, too long or followed by anything.
        TooLargeError: when it inflates to more than `expected_bytes`.
    """
    inflater = zlib.decompressobj(wbits=-zlib.MAX_WBITS)
    try:
        inflated = inflater.decompress(data, expected_bytes + 1)
    except zlib.error as error:
        raise ProtocolError(f"damaged deflate stream: {error}") from error
    if len(inflated) > expected_bytes:
        raise TooLargeError(f"inflates to more than the {expected_bytes} bytes that were announced")
    if len(inflated) < expected_bytes or not inflater.eof or inflater.unused_data:
        raise ProtocolError(f"inflates to {len(inflated)} bytes, {expected_bytes} were announced")
    return inflated


def _read_shape(data: bytes, axes: int) -> tuple[tuple[int, ...], int]:
    shape: list[int] = []
    offset = 2
    for _ in range(axes):
        size, offset = _read_varint(data, offset)
        shape.append(size)
    return tuple(shape), offset


def _read_scale(data: bytes, offset: int) -> tuple[np.float32, int]:
    if len(data) < offset + _SCALE.size:
        raise ProtocolError("tensor ends before its scale")
    scale = np.float32(_SCALE.unpack_from(data, offset)[0])
    if not 0 < scale < np.inf:
        raise ProtocolError(f"tensor scale {scale} is not a positive number")
    return scale, offset + _SCALE.size


def _scale_of(x: NDArray[np.float32], highest: int) -> float:
    largest = float(np.abs(x).max()) if x.size else 0.0
    # The smallest normal float32 keeps the stored scale from becoming 0.
    return max(largest / highest, float(np.finfo(np.float32).tiny))


def _append_varint(target: bytearray, value: int) -> None:
    while value > 0x7F:
        target.append(value & 0x7F | 0x80)
        value >>= 7
    target.append(value)


def _read_varint(data: bytes, offset: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 35, 7):
        if offset >= len(data):
            raise ProtocolError("tensor ends inside its shape")
        byte = data[offset]
        offset += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, offset
    raise ProtocolError("a size in the tensor's shape is longer than 35 bits")
