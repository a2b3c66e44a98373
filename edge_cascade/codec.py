"""Messages <-> bytes: version, kind, size and shape are checked before anything is believed. No I/O.

    byte 0      0xED
    byte 1      protocol version
    byte 2      kind, see `messages.Kind`
    byte 3      flags: bit 0 the body is deflated
    4 bytes     (deflated only) length of the inflated body, little-endian
    ...         the body: one msgpack array

A frame above a payload's limit travels as `Chunk` frames and is put together by a `Reassembler`.
"""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, TypeVar

import msgspec

from edge_cascade.errors import ProtocolError, TooLargeError
from edge_cascade.messages import KIND_OF, Chunk, Kind, Message
from edge_cascade.tensors import deflate_bytes, inflate_bytes

MAGIC: Final = 0xED
VERSION: Final = 1
READ_VERSIONS: Final = (1,)
"""This version and the one before it, as soon as there is one."""

MAX_PAYLOAD_BYTES: Final = 100 * 1024
MAX_BODY_BYTES: Final = 64 * 2**20
MAX_CHUNKS: Final = 2**12

_DEFLATED: Final = 1
_HEADER: Final = 4
_LENGTH = struct.Struct("<I")
# Below this nothing is won, and the length field alone costs four bytes.
_SMALLEST_DEFLATED_BYTES: Final = 64
# Room for a chunk frame's own fields around its data.
_CHUNK_OVERHEAD_BYTES: Final = 80

_encoder = msgspec.msgpack.Encoder()
_TYPE_OF: Final = {kind: message for message, kind in KIND_OF.items()}
_decoders: Final = {kind: msgspec.msgpack.Decoder(message) for kind, message in _TYPE_OF.items()}

MessageT = TypeVar("MessageT", bound=Message)


def encode(message: Message) -> bytes:
    """One frame, deflated where that makes it smaller."""
    body = _encoder.encode(message)
    kind = KIND_OF[type(message)]
    if len(body) >= _SMALLEST_DEFLATED_BYTES:
        packed = deflate_bytes(body)
        if len(packed) + _LENGTH.size < len(body):
            return bytes((MAGIC, VERSION, kind, _DEFLATED)) + _LENGTH.pack(len(body)) + packed
    return bytes((MAGIC, VERSION, kind, 0)) + body


def decode(frame: bytes, *, max_body_bytes: int = MAX_BODY_BYTES) -> Message:
    """The message in `frame`.

    Raises:
        TooLargeError: when its body is, or would inflate to, more than `max_body_bytes`.
        ProtocolError: for anything that is no frame of a version in `READ_VERSIONS`.
    """
    kind, body = _open_frame(frame, max_body_bytes)
    try:
        return _decoders[kind].decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"{kind.name.lower()}: {error}") from error


def decode_as(frame: bytes, expected: type[MessageT], *, max_body_bytes: int = MAX_BODY_BYTES) -> MessageT:
    """`decode`, where only one kind of message belongs.

    Raises:
        ProtocolError: also for a message of another kind.
    """
    message = decode(frame, max_body_bytes=max_body_bytes)
    if not isinstance(message, expected):
        raise ProtocolError(f"a {type(message).__name__} where a {expected.__name__} belongs")
    return message


def frame_digest(frame: bytes) -> bytes:
    """The eight bytes by which the hub names a frame that it cannot read."""
    return hashlib.sha256(frame).digest()[:8]


def split_frame(frame: bytes, max_payload_bytes: int = MAX_PAYLOAD_BYTES) -> list[bytes]:
    """The frame itself if it fits into a payload, else the chunk frames that carry it.

    Raises:
        TooLargeError: when it would take more than `MAX_CHUNKS` chunks.
    """
    if len(frame) <= max_payload_bytes:
        return [frame]
    step = max_payload_bytes - _CHUNK_OVERHEAD_BYTES
    count = -(-len(frame) // step) if step > 0 else MAX_CHUNKS + 1
    if count > MAX_CHUNKS:
        raise TooLargeError(f"{len(frame)} bytes do not fit into {MAX_CHUNKS} chunks of {max_payload_bytes}")
    digest = hashlib.sha256(frame).digest()
    return [
        # Not `encode`: what is in a chunk has been deflated already.
        bytes((MAGIC, VERSION, Kind.CHUNK, 0))
        + _encoder.encode(Chunk(digest, index, count, len(frame), frame[index * step : (index + 1) * step]))
        for index in range(count)
    ]


def _open_frame(frame: bytes, max_body_bytes: int) -> tuple[Kind, bytes]:
    if len(frame) < _HEADER or frame[0] != MAGIC:
        raise ProtocolError(f"{len(frame)} bytes that are no frame of this protocol")
    version, kind_byte, flags = frame[1], frame[2], frame[3]
    if version not in READ_VERSIONS:
        raise ProtocolError(f"protocol version {version}; this side reads {READ_VERSIONS}")
    try:
        kind = Kind(kind_byte)
    except ValueError:
        raise ProtocolError(f"unknown kind of message {kind_byte}") from None
    if flags & ~_DEFLATED:
        raise ProtocolError(f"unknown flags {flags:#04x}")
    body = frame[_HEADER:]
    if flags & _DEFLATED:
        if len(body) < _LENGTH.size:
            raise ProtocolError("frame ends before the length of its body")
        (length,) = _LENGTH.unpack_from(body)
        if length > max_body_bytes:
            raise TooLargeError(f"announces {length} bytes inflated, at most {max_body_bytes} are read")
        return kind, inflate_bytes(body[_LENGTH.size :], length)
    if len(body) > max_body_bytes:
        raise TooLargeError(f"{len(body)} bytes, at most {max_body_bytes} are read")
    return kind, body


@dataclass(slots=True)
class _Partial:
    count: int
    total_bytes: int
    pieces: dict[int, bytes] = field(default_factory=dict)
    held_bytes: int = 0


class Reassembler:
    """Puts chunked frames of one sender together within a byte bound.

    Chunks may come in any order and more than once. When the bound is reached, the frame that has gone
    longest without a new chunk is forgotten (its sender sends it again) and counted in `forgotten`.
    """

    def __init__(self, *, max_held_bytes: int = MAX_BODY_BYTES, max_frames: int = 8) -> None:
        self._max_held_bytes = max_held_bytes
        self._max_frames = max_frames
        self._partials: OrderedDict[bytes, _Partial] = OrderedDict()
        self._held_bytes = 0
        self.forgotten = 0

    @property
    def held_bytes(self) -> int:
        """Bytes of incomplete frames in memory."""
        return self._held_bytes

    def add(self, chunk: Chunk) -> bytes | None:
        """The whole frame, once its last chunk is here.

        Raises:
            TooLargeError: when the frame announces more than may be held.
            ProtocolError: when a chunk contradicts an earlier one, or the whole is not what was announced.
        """
        if chunk.total_bytes > self._max_held_bytes:
            raise TooLargeError(
                f"a chunked frame of {chunk.total_bytes} bytes, at most {self._max_held_bytes}"
            )
        if chunk.index >= chunk.count or chunk.count > MAX_CHUNKS or not chunk.data:
            raise ProtocolError(f"chunk {chunk.index} of {chunk.count} with {len(chunk.data)} bytes")
        partial = self._partials.setdefault(chunk.digest, _Partial(chunk.count, chunk.total_bytes))
        self._partials.move_to_end(chunk.digest)
        if (partial.count, partial.total_bytes) != (chunk.count, chunk.total_bytes):
            self._forget(chunk.digest)
            raise ProtocolError("chunks of one frame disagree about its size")
        if chunk.index not in partial.pieces:
            partial.pieces[chunk.index] = chunk.data
            partial.held_bytes += len(chunk.data)
            self._held_bytes += len(chunk.data)
        if partial.held_bytes > partial.total_bytes:
            self._forget(chunk.digest)
            raise ProtocolError("chunks hold more than their frame announced")
        if len(partial.pieces) == partial.count:
            self._forget(chunk.digest)
            return _joined(chunk.digest, partial)
        self._make_room()
        return None

    def _make_room(self) -> None:
        while self._held_bytes > self._max_held_bytes or len(self._partials) > self._max_frames:
            self._forget(next(iter(self._partials)))
            self.forgotten += 1

    def _forget(self, digest: bytes) -> None:
        self._held_bytes -= self._partials.pop(digest).held_bytes


def _joined(digest: bytes, partial: _Partial) -> bytes:
    frame = b"".join(partial.pieces[index] for index in range(partial.count))
    if len(frame) != partial.total_bytes or hashlib.sha256(frame).digest() != digest:
        raise ProtocolError("a chunked frame does not have the digest that was announced")
    return frame


def iterate_kinds() -> Iterator[tuple[Kind, type[Message]]]:
    """Every kind with its message, for documentation and tests."""
    yield from _TYPE_OF.items()
