"""The values of a delta, as one vector <-> a payload in one of four encodings. No I/O, no loop over values.

    fp32        the values
    int8        the scale of each block of 512 values (a tensor's last block is shorter), then an int8 a value
    sign        the scale of each tensor, then a bit a value, the lowest bit first, 1 for zero and above
    topk        count (4 bytes), the scale of each 512 kept values, an int8 for each, then the positions:
                the values left out before each, unsigned LEB128

Scales are float32, all numbers little-endian. What goes around a payload is in `deltas`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from edge_cascade.errors import ProtocolError, TooLargeError

Encoding = Literal["fp32", "int8", "sign", "topk"]
Floats = NDArray[np.float32]
Indices = NDArray[np.int64]

BLOCK_VALUES: Final = 512
MAX_TOP_SHARE: Final = 0.5
"""Above it `int8`, which sends every value, is smaller."""

_COUNT = struct.Struct("<I")
_SCALE_BYTES: Final = 4
_HIGHEST: Final = 127
_FLOAT32: Final = np.finfo(np.float32)
# The smallest normal number keeps a scale from becoming 0, the largest 127 of them from becoming infinite.
_SMALLEST_SCALE: Final = _FLOAT32.tiny
_LARGEST_SCALE: Final = np.nextafter(np.float32(_FLOAT32.max / _HIGHEST), np.float32(0))
_LONGEST_GAP_BYTES: Final = 5


@dataclass(frozen=True, slots=True)
class Spans:
    """Where each tensor begins in the vector of `size` values."""

    starts: tuple[int, ...]
    size: int

    def lengths(self) -> list[int]:
        """How many values each tensor has."""
        return [stop - start for start, stop in self.pairs()]

    def pairs(self) -> list[tuple[int, int]]:
        """Where each tensor begins and ends."""
        return list(zip(self.starts, (*self.starts[1:], self.size), strict=True))


def write_payload(vector: Floats, spans: Spans, encoding: Encoding, *, top_share: float) -> bytes:
    """`vector` (float32, finite) in `encoding`; the same vector always gives the same bytes.

    Raises:
        ValueError: for a `top_share` outside 0 (not included) to `MAX_TOP_SHARE`.
    """
    match encoding:
        case "fp32":
            return vector.astype("<f4", copy=False).tobytes()
        case "int8":
            return _write_blocks(vector, _blocks_of(spans))
        case "sign":
            return _write_signs(vector, spans)
        case "topk":
            return _write_top(vector, top_share)


def read_payload(payload: bytes, spans: Spans, encoding: Encoding) -> Floats:
    """The vector, which may hold NaN or infinity, in a payload of a length that `payload_bounds` allows.

    Raises:
        TooLargeError: when `topk` keeps more values than it may, before anything is allocated for them.
        ProtocolError: for a payload that `write_payload` would not have written.
    """
    # An overflow becomes an infinity, which is refused by name.
    with np.errstate(over="ignore"):
        match encoding:
            case "fp32":
                return np.frombuffer(payload, "<f4").astype(np.float32)
            case "int8":
                return _read_blocks(payload, _blocks_of(spans), spans.size)
            case "sign":
                return _read_signs(payload, spans)
            case "topk":
                return _read_top(payload, spans.size)


def payload_bounds(spans: Spans, encoding: Encoding) -> tuple[int, int]:
    """How many bytes the shortest and the longest payload have."""
    size = spans.size
    match encoding:
        case "fp32":
            exact = size * 4
        case "int8":
            exact = sum(map(_blocks_in, spans.lengths())) * _SCALE_BYTES + size
        case "sign":
            exact = len(spans.starts) * _SCALE_BYTES + (size + 7) // 8
        case "topk":
            kept = _most_kept(size)
            # A position of more than one byte passes over at least 128 values: so few of them fit.
            positions = kept + size // 127
            return _COUNT.size, _COUNT.size + _blocks_in(kept) * _SCALE_BYTES + kept + positions
    return exact, exact


@lru_cache(maxsize=4)
def _blocks_of(spans: Spans) -> Indices:
    """Where each block begins: none reaches over the end of its tensor."""
    starts = np.concatenate([np.arange(*pair, BLOCK_VALUES, dtype=np.int64) for pair in spans.pairs()])
    starts.flags.writeable = False
    return starts


def _blocks_in(count: int) -> int:
    return -(-count // BLOCK_VALUES)


def _most_kept(size: int) -> int:
    return max(1, int(MAX_TOP_SHARE * size))


def _write_blocks(vector: Floats, starts: Indices) -> bytes:
    scales = np.maximum.reduceat(np.abs(vector), starts) / np.float32(_HIGHEST)
    scales = np.clip(scales, _SMALLEST_SCALE, _LARGEST_SCALE).astype("<f4")
    steps = np.repeat(scales, np.diff(starts, append=vector.size))
    return scales.tobytes() + np.clip(np.rint(vector / steps), -_HIGHEST, _HIGHEST).astype("i1").tobytes()


def _read_blocks(payload: bytes, starts: Indices, size: int) -> Floats:
    scales = _read_scales(payload, starts.size)
    values = np.frombuffer(payload, "i1", size, scales.nbytes)
    if (values < -_HIGHEST).any():
        raise ProtocolError("an int8 value of a delta is -128, below the lowest that is written")
    return values.astype(np.float32) * np.repeat(scales, np.diff(starts, append=size))


def _read_scales(payload: bytes, count: int) -> Floats:
    scales = np.frombuffer(payload, "<f4", count).astype(np.float32)
    if not ((scales > 0) & (scales < np.inf)).all():
        raise ProtocolError("a scale of a delta is not a positive number")
    return scales


def _write_signs(vector: Floats, spans: Spans) -> bytes:
    sums = np.add.reduceat(np.abs(vector), spans.starts, dtype=np.float64)
    means = sums / spans.lengths()
    scales = np.maximum(means, _SMALLEST_SCALE).astype("<f4")
    return scales.tobytes() + np.packbits(vector >= 0, bitorder="little").tobytes()


def _read_signs(payload: bytes, spans: Spans) -> Floats:
    scales = _read_scales(payload, len(spans.starts))
    packed = np.frombuffer(payload, np.uint8, offset=scales.nbytes)
    if spans.size % 8 and packed[-1] >> spans.size % 8:
        raise ProtocolError("sign delta has bits beyond its last value")
    steps = np.repeat(scales, spans.lengths())
    return np.where(np.unpackbits(packed, count=spans.size, bitorder="little"), steps, -steps)


def _write_top(vector: Floats, top_share: float) -> bytes:
    kept = _largest(np.abs(vector), top_share)
    blocks = np.arange(0, kept.size, BLOCK_VALUES)
    count = _COUNT.pack(kept.size)
    return count + _write_blocks(vector[kept], blocks) + _write_gaps(kept)


def _largest(magnitudes: Floats, share: float) -> Indices:
    if not 0 < share <= MAX_TOP_SHARE:
        raise ValueError(f"top_share {share} is not above 0 and at most {MAX_TOP_SHARE}")
    wanted = max(1, int(share * magnitudes.size))
    limit = np.partition(magnitudes, -wanted)[-wanted]
    kept = magnitudes > limit
    if limit > 0:
        equals = np.flatnonzero(magnitudes == limit)
        kept[equals[: wanted - np.count_nonzero(kept)]] = True
    return np.flatnonzero(kept)


def _read_top(payload: bytes, size: int) -> Floats:
    (count,) = _COUNT.unpack_from(payload)
    if count > _most_kept(size):
        raise TooLargeError(f"topk delta keeps {count} of {size} values, at most {_most_kept(size)} are read")
    gaps_at = _COUNT.size + _blocks_in(count) * _SCALE_BYTES + count
    if len(payload) < gaps_at:
        raise ProtocolError("topk delta ends before its positions")
    kept = _read_gaps(payload[gaps_at:], count, size)
    vector = np.zeros(size, np.float32)
    vector[kept] = _read_blocks(payload[_COUNT.size : gaps_at], np.arange(0, count, BLOCK_VALUES), count)
    return vector


def _write_gaps(ascending: Indices) -> bytes:
    gaps = np.diff(ascending, prepend=-1) - 1
    places = np.arange(_LONGEST_GAP_BYTES)
    sevens = gaps[:, np.newaxis] >> (7 * places)
    # A byte is followed by another as long as anything is left above its seven bits.
    written = np.where(sevens >> 7 > 0, sevens & 0x7F | 0x80, sevens).astype(np.uint8)
    packed: bytes = written[(sevens > 0) | (places == 0)].tobytes()
    return packed


def _read_gaps(data: bytes, count: int, size: int) -> Indices:
    """The positions, strictly ascending because a gap is never negative."""
    raw = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(raw < 0x80)
    if ends.size != count or (raw.size and raw[-1] >= 0x80):
        raise ProtocolError(f"topk delta of {count} values has positions for {ends.size}")
    starts = np.concatenate([np.zeros(min(count, 1), np.int64), ends[:-1] + 1])
    lengths = ends - starts + 1
    if (lengths > _LONGEST_GAP_BYTES).any() or ((raw[ends] == 0) & (lengths > 1)).any():
        raise ProtocolError("topk delta holds an over-long number")
    shifts = 7 * (np.arange(raw.size) - np.repeat(starts, lengths))
    gaps = np.add.reduceat((raw & 0x7F).astype(np.int64) << shifts, starts)
    # Each below `size` first, so that their sum cannot overflow.
    if (gaps >= size).any() or int(gaps.sum()) + count > size:
        raise ProtocolError(f"topk delta has a position beyond its {size} values")
    positions: Indices = np.cumsum(gaps + 1) - 1
    return positions
