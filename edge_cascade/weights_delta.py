"""A weights file as its difference from another one, byte for byte. No I/O.

Both are safetensors files. New weights of a fleet are old ones plus a coded delta of eight bits a value (see
`deltas`), and int8 follows from float32 by rounding; so most of a file can be foretold:

- a float32 tensor from the one held: `held + level * scale`, a signed byte a value and a scale for each 512
  of them, as `delta_payloads` has it; what the foretelling misses travels beside it;
- an int8 tensor `int8/<name>_quantized` from the new `fp32/<name>` and the new scales;
- any other tensor from the one held of the same name and size.

What is foretold wrongly costs bytes and changes nothing: the result is exact for whatever two files.

    4 bytes     "EWD1"
    8 bytes     length of the wanted file's header, and of that deflated (unsigned, little-endian)
    ...         the header as safetensors has it, without its length, deflated
    per tensor, those of float32 first, then the others, each in the order of the header:
      1 byte    method: 0 from the held bytes, 1 from levels, 2 from rounding (3: along the second axis)
      4 bytes   length of the deflated body; then the body. Of method 1: the scales, the levels, and
                what they miss as four planes of bytes, the lowest first
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge_cascade.delta_payloads import BLOCK_VALUES
from edge_cascade.errors import ProtocolError, TooLargeError
from edge_cascade.tensors import deflate_bytes, inflate_bytes

MAGIC: Final = b"EWD1"
MAX_HEADER_BYTES: Final = 2**20
MAX_TENSORS: Final = 65536

Bytes = NDArray[np.uint8]

_HELD, _LEVELS, _ROUNDED, _ROUNDED_SECOND = range(4)
_LENGTHS: Final = struct.Struct("<II")
_LENGTH: Final = struct.Struct("<I")
_LONG: Final = struct.Struct("<Q")
_ITEM_BYTES: Final = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Tensor:
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def encode_weights(held: bytes, wanted: bytes) -> bytes:
    """What leads from `held` to `wanted`, two safetensors files.

    Raises:
        ProtocolError: when one of them is none.
    """
    header, tensors, data = _open_file(wanted)
    before = _tensors_by_name(held)
    made: dict[str, Bytes] = {}
    packed = deflate_bytes(header)
    parts = [MAGIC, _LENGTHS.pack(len(header), len(packed)), packed]
    for tensor in _in_order(tensors):
        content = np.frombuffer(data[tensor.start : tensor.stop], np.uint8)
        parts.append(min(_ways_to(tensor, content, before, made), key=len))
        made[tensor.name] = content
    return b"".join(parts)


def apply_weights(held: bytes, delta: bytes, *, max_bytes: int) -> bytes:
    """The file that `delta` leads to from `held`; at most `max_bytes` long.

    Whether it is the right one, its digest says: a delta made for another file gives another result.

    Raises:
        TooLargeError: before anything is allocated for it.
        ProtocolError: for anything that is no delta.
    """
    reader = _Reader(delta)
    if reader.take(len(MAGIC)) != MAGIC:
        raise ProtocolError("no delta of weights: it begins with other bytes")
    header_bytes, packed_bytes = _LENGTHS.unpack(reader.take(_LENGTHS.size))
    if header_bytes > min(MAX_HEADER_BYTES, max_bytes):
        raise TooLargeError(f"a header of {header_bytes} bytes")
    header = inflate_bytes(reader.take(packed_bytes), header_bytes)
    tensors = _read_header(header)
    total = max((tensor.stop for tensor in tensors), default=0)
    if _LONG.size + len(header) + total > max_bytes:
        raise TooLargeError(f"a file of {total} bytes and more, at most {max_bytes} are made")
    before = _tensors_by_name(held)
    made: dict[str, Bytes] = {}
    for tensor in _in_order(tensors):
        made[tensor.name] = _read_tensor(reader, tensor, before, made)
    reader.close()
    ordered = sorted(tensors, key=lambda tensor: tensor.start)
    return b"".join((_LONG.pack(len(header)), header, *(made[tensor.name].tobytes() for tensor in ordered)))


# --- ways to a tensor --------------------------------------------------------------------------------------


def _ways_to(
    tensor: _Tensor, content: Bytes, before: Mapping[str, tuple[_Tensor, Bytes]], made: Mapping[str, Bytes]
) -> Iterator[bytes]:
    yield _record(_HELD, content - _held(tensor, before))
    if tensor.dtype == "F32" and (levels := _levels(tensor, content, before)) is not None:
        yield _record(_LEVELS, levels)
    for method in (_ROUNDED, _ROUNDED_SECOND):
        foretold = _rounded(tensor, method, made)
        if foretold is not None:
            yield _record(method, content - foretold)


def _record(method: int, body: Bytes) -> bytes:
    packed = deflate_bytes(body.tobytes())
    return bytes((method,)) + _LENGTH.pack(len(packed)) + packed


def _read_tensor(
    reader: _Reader,
    tensor: _Tensor,
    before: Mapping[str, tuple[_Tensor, Bytes]],
    made: Mapping[str, Bytes],
) -> Bytes:
    size = tensor.stop - tensor.start
    method = reader.take(1)[0]
    if method == _HELD:
        return reader.body(size) + _held(tensor, before)
    if method == _LEVELS and tensor.dtype == "F32":
        blocks = -(-(size // 4) // BLOCK_VALUES)
        return _from_levels(tensor, reader.body(size // 4 * 5 + 4 * blocks), before)
    foretold = _rounded(tensor, method, made) if method in {_ROUNDED, _ROUNDED_SECOND} else None
    if foretold is None:
        raise ProtocolError(f"tensor {tensor.name!r} cannot be made by method {method}")
    return reader.body(size) + foretold


def _held(tensor: _Tensor, before: Mapping[str, tuple[_Tensor, Bytes]]) -> Bytes:
    known = before.get(tensor.name)
    if known is None or len(known[1]) != tensor.stop - tensor.start:
        return np.zeros(tensor.stop - tensor.start, np.uint8)
    return known[1]


def _levels(tensor: _Tensor, content: Bytes, before: Mapping[str, tuple[_Tensor, Bytes]]) -> Bytes | None:
    """The body of method 1, None where something is not finite."""
    held, wanted = _held(tensor, before).view("<f4"), content.view("<f4")
    if not wanted.size or not (np.isfinite(held).all() and np.isfinite(wanted).all()):
        return None
    step = wanted.astype(np.float64) - held
    starts = np.arange(0, step.size, BLOCK_VALUES)
    lengths = np.diff(starts, append=step.size)
    scales = np.maximum(np.maximum.reduceat(np.abs(step), starts) / 127.0, np.finfo(np.float32).tiny)
    levels = np.clip(np.rint(step / np.repeat(scales, lengths)), -127, 127)
    # Adding the step rounded it, which hides the last bits of a scale; all its values together show them.
    weight = np.add.reduceat(levels * levels, starts)
    fitted = np.add.reduceat(levels * step, starts) / np.maximum(weight, 1.0)
    scales = np.where((weight > 0.0) & (fitted > 0.0), fitted, scales)
    scales32 = np.clip(scales, np.finfo(np.float32).tiny, np.finfo(np.float32).max).astype("<f4")
    signed = levels.astype(np.int8)
    foretold = _foretell(held, signed, scales32)
    missed = _zigzag(wanted.view("<i4").astype(np.int64) - foretold.view("<i4"))
    planes = missed.astype("<u4").view(np.uint8).reshape(-1, 4).T
    return np.concatenate([scales32.view(np.uint8), signed.view(np.uint8), planes.ravel()])


def _from_levels(tensor: _Tensor, body: Bytes, before: Mapping[str, tuple[_Tensor, Bytes]]) -> Bytes:
    held = _held(tensor, before).view("<f4")
    count = held.size
    scales = body[: body.size - 5 * count].view("<f4")
    levels, planes = body[-5 * count : -4 * count].view(np.int8), body[-4 * count :].reshape(4, count)
    if not count or not np.isfinite(scales).all():
        raise ProtocolError(
            f"tensor {tensor.name!r}: levels without values, or of a scale that is not finite"
        )
    missed = _unzigzag(np.ascontiguousarray(planes.T).view("<u4").ravel().astype(np.int64))
    bits = _foretell(held, levels, scales).view("<i4").astype(np.int64) + missed
    # Wraps around as the encoder's difference may have.
    return (bits & 0xFFFFFFFF).astype("<u4").view(np.uint8)


def _foretell(
    held: NDArray[np.float32], levels: NDArray[np.int8], scales: NDArray[np.float32]
) -> NDArray[np.float32]:
    with np.errstate(over="ignore", invalid="ignore"):
        step = levels.astype(np.float32) * np.repeat(scales, BLOCK_VALUES)[: levels.size]
        return np.asarray(held + step, dtype="<f4")


def _zigzag(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Small magnitudes become small numbers; differences of 32 bits are taken modulo 2^32."""
    wrapped = (values + 2**31) % 2**32 - 2**31
    return (wrapped << 1) ^ (wrapped >> 63)


def _unzigzag(values: NDArray[np.int64]) -> NDArray[np.int64]:
    return (values >> 1) ^ -(values & 1)


def _rounded(tensor: _Tensor, method: int, made: Mapping[str, Bytes]) -> Bytes | None:
    """What `float32 / scale` rounds to; None where there is nothing to round."""
    name = tensor.name.removeprefix("int8/").removesuffix("_quantized")
    weights, scales = made.get(f"fp32/{name}"), made.get(f"int8/{name}_scale")
    axis = 0 if method == _ROUNDED else 1
    size = tensor.stop - tensor.start
    if tensor.dtype != "I8" or weights is None or scales is None or len(tensor.shape) <= axis:
        return None
    if len(weights) != 4 * size or len(scales) not in {4, 4 * tensor.shape[axis]} or not size:
        return None
    shape = [1] * len(tensor.shape)
    shape[axis] = len(scales) // 4
    with np.errstate(all="ignore"):
        shares = weights.view("<f4").reshape(tensor.shape) / scales.view("<f4").reshape(shape)
    levels = np.clip(np.rint(np.nan_to_num(shares)), -128, 127).astype(np.int8)
    foretold: Bytes = levels.ravel().view(np.uint8)
    return foretold


# --- files -------------------------------------------------------------------------------------------------


class _Reader:
    """Reads a delta from its start to its end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, size: int) -> bytes:
        piece = self._data[self._at : self._at + size]
        if len(piece) < size:
            raise ProtocolError("the delta of weights is cut off")
        self._at += size
        return piece

    def body(self, size: int) -> Bytes:
        (packed,) = _LENGTH.unpack(self.take(_LENGTH.size))
        return np.frombuffer(inflate_bytes(self.take(packed), size), np.uint8)

    def close(self) -> None:
        if self._at != len(self._data):
            raise ProtocolError("bytes after the end of the delta of weights")


def _in_order(tensors: list[_Tensor]) -> list[_Tensor]:
    """Those of float32 first: int8 is foretold from them."""
    return sorted(tensors, key=lambda tensor: (tensor.dtype != "F32", tensor.start, tensor.name))


def _tensors_by_name(content: bytes) -> dict[str, tuple[_Tensor, Bytes]]:
    _, tensors, data = _open_file(content)
    return {
        tensor.name: (tensor, np.frombuffer(data[tensor.start : tensor.stop], np.uint8)) for tensor in tensors
    }


def _open_file(content: bytes) -> tuple[bytes, list[_Tensor], bytes]:
    if len(content) < _LONG.size:
        raise ProtocolError("no safetensors file: too short")
    (size,) = _LONG.unpack_from(content)
    header, data = content[_LONG.size : _LONG.size + size], content[_LONG.size + size :]
    if size > MAX_HEADER_BYTES or len(header) < size:
        raise ProtocolError(f"no safetensors file: a header of {size} bytes")
    tensors = _read_header(header)
    if max((tensor.stop for tensor in tensors), default=0) != len(data):
        raise ProtocolError("no safetensors file: its data end elsewhere than its header says")
    return header, tensors, data


def _read_header(header: bytes) -> list[_Tensor]:
    """The tensors of a header, which must lie one after another without a gap."""
    try:
        entries = json.loads(header.decode())
        tensors = [
            _tensor_of(name, entry["dtype"], entry["shape"], *entry["data_offsets"])
            for name, entry in entries.items()
            if name != "__metadata__"
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ProtocolError(f"no safetensors header: {error!r}") from error
    at = 0
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.stop)):
        if tensor.start != at:
            raise ProtocolError(f"tensor {tensor.name!r} does not follow the one before it")
        at = tensor.stop
    if len(tensors) > MAX_TENSORS:
        raise ProtocolError(f"{len(tensors)} tensors, at most {MAX_TENSORS} are read")
    return tensors


def _tensor_of(name: str, dtype: str, shape: list[int], start: int, stop: int) -> _Tensor:
    size = _ITEM_BYTES[dtype]
    for each in shape:
        if type(each) is not int or each < 0:
            raise ValueError(f"shape {shape}")
        size *= each
    if type(start) is not int or type(stop) is not int or start < 0 or stop - start != size:
        raise ValueError(f"{name}: offsets {start} and {stop} for {size} bytes")
    return _Tensor(name, dtype, tuple(shape), start, stop)
