"""Exits and probabilities inside of messages, two bytes a number: pure functions from and to bytes."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Final

from edge_cascade.errors import ProtocolError
from edge_cascade.gate import Exit

_EXIT = struct.Struct("<BHHH")
_UNIT: Final = 65535


def pack_exits(exits: Sequence[Exit]) -> bytes:
    """Seven bytes per exit climbed: rung, label, probability and score in 1/65535, little-endian.

    A NaN is written as what it means: probability 0, score 1.
    """
    return b"".join(
        _EXIT.pack(exit_.rung, exit_.label, _to_unit(exit_.probability, 0), _to_unit(exit_.score, _UNIT))
        for exit_ in exits
    )


def unpack_exits(data: bytes) -> tuple[Exit, ...]:
    """The exits of `pack_exits`, to 1/65535.

    Raises:
        ProtocolError: when the length is no multiple of seven.
    """
    if len(data) % _EXIT.size:
        raise ProtocolError(f"exits of {len(data)} bytes are no multiple of {_EXIT.size}")
    return tuple(
        Exit(rung, label, probability / _UNIT, score / _UNIT)
        for rung, label, probability, score in _EXIT.iter_unpack(data)
    )


def pack_probabilities(probabilities: Sequence[float]) -> bytes:
    """Two bytes per class, in 1/65535, little-endian."""
    return struct.pack(f"<{len(probabilities)}H", *(_to_unit(value, 0) for value in probabilities))


def unpack_probabilities(data: bytes) -> tuple[float, ...]:
    """The probabilities of `pack_probabilities`, to 1/65535.

    Raises:
        ProtocolError: when the length is odd.
    """
    if len(data) % 2:
        raise ProtocolError(f"probabilities of {len(data)} bytes are no multiple of 2")
    return tuple(value / _UNIT for value in struct.unpack(f"<{len(data) // 2}H", data))


def _to_unit(value: float, if_nan: int) -> int:
    if math.isnan(value):
        return if_nan
    return min(max(round(value * _UNIT), 0), _UNIT)
