"""What a board learned, as bytes: float32 arrays by name, against a training base. No I/O, no pickle.

    byte 0      version of this layout, 1
    byte 1      encoding: 0 fp32, 1 int8, 2 sign, 3 topk; bit 7 set where the payload is deflated
    8 bytes     layout digest: the start of a SHA-256 over names and shapes, see `layout_digest`
    4 bytes     (deflated only) length of the inflated payload, unsigned, little-endian
    ...         the payload; raw DEFLATE (RFC 1951) if bit 7 is set

All tensors are one vector: in the order of their sorted names, each in C order. Names and shapes are not
sent, because both sides have the base. The payload of each encoding is described in `delta_payloads`.

Sign and topk leave most of a delta out. `with_feedback` adds it to the next one, without which training
with them stalls: 1-bit SGD (Seide et al., Interspeech 2014), sparsified SGD with memory (Stich et al.,
NeurIPS 2018), error feedback (Karimireddy et al., ICML 2019, whose scaled sign this is).
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

import numpy as np

from edge_cascade.delta_payloads import Encoding, Floats, Spans, payload_bounds, read_payload, write_payload
from edge_cascade.errors import ProtocolError, TooLargeError
from edge_cascade.tensors import deflate_bytes, inflate_bytes

VERSION: Final = 1
DEFAULT_TOP_SHARE: Final = 0.01
DIGEST_BYTES: Final = 8

_ENCODINGS: Final[tuple[Encoding, ...]] = ("fp32", "int8", "sign", "topk")  # by code
_DEFLATED: Final = 0x80
_HEADER_BYTES: Final = 2 + DIGEST_BYTES
_LENGTH = struct.Struct("<I")

# Of floats deflate saves a fourteenth, and to inflate them is most of what closing a round costs a hub. The
# frame around a delta is deflated all the same.
_WORTH_DEFLATING: Final[dict[Encoding, float]] = {"fp32": 0.9, "int8": 1.0, "sign": 1.0, "topk": 1.0}


@dataclass(frozen=True, slots=True, eq=False)
class Residual:
    """What earlier updates left out, to be added to the next one, whatever its base. Empty at first."""

    values: Mapping[str, Floats] = field(default_factory=dict)


def encode_delta(
    delta: Mapping[str, Floats], encoding: Encoding, *, top_share: float = DEFAULT_TOP_SHARE
) -> bytes:
    """One blob for all of `delta`; see the module's head for the layout. The same delta gives the same bytes.

    `top_share` is the share of all values together that `topk` keeps: the largest magnitudes, the earlier
    ones of equals, at least one, never a zero.

    Raises:
        ProtocolError: for NaN, infinity, an array that is not float32 or is empty, or no array at all.
        ValueError: for a share outside 0 (not included) to 0.5.
    """
    layout, vector = _flatten(delta)
    payload = write_payload(vector, layout.spans, encoding, top_share=top_share)
    flags, length = 0, b""
    packed = deflate_bytes(payload)
    if len(packed) + _LENGTH.size < _WORTH_DEFLATING[encoding] * len(payload):
        flags, length, payload = _DEFLATED, _LENGTH.pack(len(payload)), packed
    return bytes((VERSION, _ENCODINGS.index(encoding) | flags)) + layout.digest + length + payload


def decode_delta(data: bytes, shapes: Mapping[str, tuple[int, ...]], *, max_bytes: int) -> dict[str, Floats]:
    """The arrays of `encode_delta`, as far as the encoding keeps them. `shapes` are those of the base.

    `max_bytes` bounds the decoded arrays together; reading them takes up to eight times as much for a moment.

    Raises:
        TooLargeError: before anything is allocated for it.
        ProtocolError: for anything that is no delta of this layout against such a base.
    """
    layout = _layout_of(shapes)
    if layout.spans.size * 4 > max_bytes:
        raise TooLargeError(f"a delta of {layout.spans.size * 4} bytes, at most {max_bytes} are read")
    encoding = encoding_of(data)
    if data[2:_HEADER_BYTES] != layout.digest:
        raise ProtocolError("delta is for a base with other names or shapes")
    vector = read_payload(_open_payload(data, encoding, layout.spans), layout.spans, encoding)
    if not np.isfinite(vector).all():
        raise ProtocolError(f"{encoding} delta holds NaN or infinity")
    return layout.split(vector)


def most_delta_bytes(shapes: Mapping[str, tuple[int, ...]], encoding: Encoding) -> int:
    """How long a delta of these shapes may become: of `topk` with the largest share that there is."""
    return _HEADER_BYTES + payload_bounds(_layout_of(shapes).spans, encoding)[1]


def encoding_of(data: bytes) -> Encoding:
    """Which encoding a delta is in, for comparing with the one that its message names.

    Raises:
        ProtocolError: when the header is cut off, or of an unknown version or encoding.
    """
    if len(data) < _HEADER_BYTES:
        raise ProtocolError(f"delta of {len(data)} bytes is shorter than its header")
    if data[0] != VERSION:
        raise ProtocolError(f"delta of version {data[0]}, this side reads {VERSION}")
    code = data[1] & ~_DEFLATED
    if code >= len(_ENCODINGS):
        raise ProtocolError(f"unknown delta encoding {code}")
    return _ENCODINGS[code]


def with_feedback(
    delta: Mapping[str, Floats],
    residual: Residual,
    encoding: Encoding,
    *,
    top_share: float = DEFAULT_TOP_SHARE,
) -> tuple[dict[str, Floats], Residual]:
    """What to encode in place of `delta`, and what that encoding will leave out of it.

    The first is `delta` plus `residual`, for `encode_delta` with the same encoding and share. The second
    counts only once the update is with the hub: until then the caller keeps the old residual. All updates
    read so far and the last residual add up to all deltas so far.

    Raises:
        ProtocolError: as `encode_delta`; also for a residual of other names or shapes than `delta`.
        ValueError: for a share outside 0 (not included) to 0.5.
    """
    layout, vector = _flatten(delta)
    if residual.values:
        pending_layout, pending = _flatten(residual.values)
        if pending_layout.digest != layout.digest:
            raise ProtocolError("residual is of a base with other names or shapes")
        # An overflow becomes an infinity, which is refused by name.
        with np.errstate(over="ignore"):
            vector = vector + pending
        _refuse_unless_finite(vector, "delta with what was left out before")
    payload = write_payload(vector, layout.spans, encoding, top_share=top_share)
    left_out = vector - read_payload(payload, layout.spans, encoding)
    return layout.split(vector), Residual(layout.split(left_out))


def layout_digest(shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """Eight bytes that tell one set of names and shapes from another.

    The start of the SHA-256 over one line `name` TAB sizes joined by commas LF per tensor, by sorted name.

    Raises:
        ProtocolError: when there is no tensor, or one is empty or has a name that cannot be printed.
    """
    return _layout_of(shapes).digest


@dataclass(frozen=True, slots=True, eq=False)
class _Layout:
    """The tensors in their order, where they are in the vector of all of them, and their digest."""

    shapes: dict[str, tuple[int, ...]]
    spans: Spans
    digest: bytes

    def split(self, vector: Floats) -> dict[str, Floats]:
        places = zip(self.shapes.items(), self.spans.pairs(), strict=True)
        return {name: vector[start:stop].reshape(shape) for (name, shape), (start, stop) in places}


def _layout_of(shapes: Mapping[str, tuple[int, ...]]) -> _Layout:
    return _sorted_layout(tuple(sorted(shapes.items())))


@lru_cache(maxsize=16)
def _sorted_layout(tensors: tuple[tuple[str, tuple[int, ...]], ...]) -> _Layout:
    """Kept, because a hub reads one delta after another of the same layout."""
    if not tensors:
        raise ProtocolError("a delta without tensors")
    starts, size, digest = [], 0, hashlib.sha256()
    for name, shape in tensors:
        if not name.isprintable():
            raise ProtocolError(f"tensor name {name!r} is not printable")
        if min(shape, default=1) < 1:
            raise ProtocolError(f"tensor {name!r} of shape {shape} is empty")
        digest.update(f"{name}\t{','.join(map(str, shape))}\n".encode())
        starts.append(size)
        size += math.prod(shape)
    return _Layout(dict(tensors), Spans(tuple(starts), size), digest.digest()[:DIGEST_BYTES])


def _flatten(delta: Mapping[str, Floats]) -> tuple[_Layout, Floats]:
    layout = _layout_of({name: array.shape for name, array in delta.items()})
    for name in layout.shapes:
        if delta[name].dtype != np.float32:
            raise ProtocolError(f"tensor {name!r} is {delta[name].dtype}, deltas are float32")
        _refuse_unless_finite(delta[name], f"tensor {name!r}")
    return layout, np.concatenate([delta[name].ravel() for name in layout.shapes])


def _refuse_unless_finite(values: Floats, what: str) -> None:
    if not np.isfinite(values).all():
        raise ProtocolError(f"{what} holds NaN or infinity")


def _open_payload(data: bytes, encoding: Encoding, spans: Spans) -> bytes:
    least, most = payload_bounds(spans, encoding)
    body = data[_HEADER_BYTES:]
    length = len(body)
    deflated = bool(data[1] & _DEFLATED)
    if deflated:
        if len(body) < _LENGTH.size:
            raise ProtocolError("delta ends before the length of its payload")
        (length,) = _LENGTH.unpack_from(body)
    if length > most:
        raise TooLargeError(f"{encoding} delta of {length} bytes, its base allows {most}")
    if length < least:
        raise ProtocolError(f"{encoding} delta of {length} bytes, its base needs {least}")
    return inflate_bytes(body[_LENGTH.size :], length) if deflated else body
